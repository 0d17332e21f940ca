"""Features: what the ready ones say, how functions are found and called, and messages for mistakes."""

import asyncio
import functools

import pytest
import torch
from builders import rollouts_by_hand
from trl import rewards
from trl.import_utils import is_math_verify_available

from hf_gdc.features import READY, Feature
from hf_gdc.ready_features import text_of


def values(source, *texts, **columns):
    return Feature(source)(rollouts_by_hand(list(texts), **columns)).tolist()


# ---- ready features ----


@pytest.mark.parametrize(
    ("spec", "yes", "no"),
    [
        (
            "contains:dragon",
            ["a Dragon!", "DRAGON", "dragon-fly", "“dragon”", "x\ndragon"],
            ["dragons", "snapdragon", ""],
        ),
        ("contains:the old man", ["See The Old Man."], ["the old  man", "the oldman"]),
        ("contains:C++", ["I like c++.", "(C++)"], ["C+", "C++11"]),
        ("contains:a.b", ["a.b"], ["axb"]),
        ("contains:10:30", ["at 10:30 h"], ["10.30", "110:30"]),
        ("contains:é", ["É!"], ["née"]),
        (r"regex:^Once .*\.$", ["Once upon."], ["once upon.", "Once"]),
        (r"regex:\d:\d", ["1:2"], ["12"]),
        ("starts_with:Once", ["Once", "  Once upon", "\nOnce"], ["once", "A. Once", ""]),
        ("max_words:3", ["", "a b c", " a\nb "], ["a b c d"]),
    ],
)
def test_ready_features(spec, yes, no):
    assert values(spec, *yes, *no) == [1.0] * len(yes) + [0.0] * len(no)


def test_counts_and_lengths():
    texts = ["she, She and SHE; ashes", "", "über alles"]
    assert values("count:she", *texts) == [3, 0, 0]
    assert values("length:words", *texts) == [5, 0, 2]
    assert values("length:characters", *texts) == [23, 0, 10]
    in_tokens = [23, 1, 11]  # one per byte of UTF-8, and the EOS of the empty one
    assert values("length:tokens", *texts) == values("length", *texts) == in_tokens


def test_cut_completions_end_with_no_eos():
    rollouts = rollouts_by_hand(["ab", "", "abc"])
    (eos,) = rollouts.completion_ids()[1]
    assert Feature(f"cut:{eos}")(rollouts).tolist() == [1, 0, 1]
    last = rollouts.completion_ids()[2][-1]
    assert Feature(f"cut:{eos},{last}")(rollouts).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="say the ids of EOS tokens"):
        Feature("cut:</s>")


def test_chat_completions():
    chat = [{"role": "user", "content": "dragon?"}]
    rollouts = rollouts_by_hand(["no", "a dragon"], prompts=[chat, chat])
    assert [Feature(f"{name}:dragon")(rollouts).tolist() for name in ("contains", "count")] == [[0, 1], [0, 1]]
    assert Feature("length:words")(rollouts).tolist() == [1, 2]
    seen = Feature(lambda completions, **_: [float(c[0]["role"] == "assistant") for c in completions], "role")
    assert seen(rollouts).tolist() == [1, 1]
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "ab"


# ---- own functions ----


def by_names(prompts, completions, completion_ids, bonus):
    return [
        len(p) + len(c) + len(i) + b for p, c, i, b in zip(prompts, completions, completion_ids, bonus, strict=True)
    ]


def only_completions(completions):
    return torch.tensor([len(c) / 2 for c in completions])


def tenths(completions):
    return [0.1] * len(completions)


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c) + kwargs["bonus"][0]) for c in completions]


def test_functions_get_columns_by_name_and_only_what_they_take():
    rollouts = rollouts_by_hand(["ab", "c"], prompts=["p", "pp"], bonus=[100, 200], other=["x", "y"])
    assert Feature(by_names)(rollouts).tolist() == [1 + 2 + 2 + 100, 2 + 1 + 1 + 200]
    assert Feature(only_completions)(rollouts).tolist() == [1.0, 0.5]
    assert Feature(tenths)(rollouts).tolist() == [0.1, 0.1]  # float64 all the way
    assert Feature(later)(rollouts).tolist() == [102.0, 101.0]
    got = {}
    Feature(lambda **kwargs: got.update(kwargs) or [0, 0], "all")(rollouts)
    extras = {name: got.pop(name) for name in ("trainer_state", "log_extra", "log_metric")}  # as TRL's trainers give
    assert extras["trainer_state"].global_step == 0
    assert extras["log_extra"]("column", [1, 2]) is None and extras["log_metric"]("name", 1.0) is None
    assert got == {
        "prompts": ["p", "pp"],
        "completions": ["ab", "c"],
        "completion_ids": [[97, 98], [99]],
        "bonus": [100, 200],
        "other": ["x", "y"],
    }


def test_called_once_per_batch_under_its_name():
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return [1.0] * len(completions)

    feature, first, second = Feature(counted), rollouts_by_hand(["a", "b"]), rollouts_by_hand(["c"])
    for rollouts in (first, first, second, first):
        assert feature(rollouts).dtype == torch.float64
    assert Feature(feature)(first).tolist() == [1.0, 1.0] and calls == [2, 1]
    assert set(first.scores) == {"counted"} and len(feature(first.select(torch.tensor([], dtype=torch.long)))) == 0
    Feature(counted, "renamed")(first)
    assert set(first.scores) == {"counted", "renamed"}


def test_spellings(tmp_path, monkeypatch):
    file = tmp_path / "my_features.py"
    file.write_text("def f(completions, **_):\n    return [float('x' in c) for c in completions]\n")
    assert values(f"{file}:f", "x", "y") == [1, 0]
    monkeypatch.chdir(tmp_path)
    assert values("my_features.py:f", "x", "y") == [1, 0]
    monkeypatch.syspath_prepend(tmp_path)
    assert values("my_features:f", "x", "y") == [1, 0]
    assert values(f"{__name__}:only_completions", "abcd") == [2.0]
    assert (
        Feature("my_features.py:f", "mine").name == "mine" and repr(Feature("my_features.py:f")) == "my_features.py:f"
    )


def test_only_what_can_be_found_again_has_a_spec():
    def local(completions):
        return [0.0]

    specs = [Feature(source).spec for source in (by_names, local, lambda completions: [0.0], "contains:x")]
    assert specs == [f"{__name__}:by_names", None, None, "contains:x"]


# ---- TRL's reward functions ----


def test_trls_own_reward_functions_unchanged():
    chat = [{"role": "user", "content": "1 + 1?"}]
    rollouts = rollouts_by_hand(["<think>easy</think> 2", "2"], prompts=[chat, chat])
    for source in (rewards.think_format_reward, "trl.rewards:think_format_reward"):
        assert Feature(source)(rollouts).tolist() == [1.0, 0.0]
    overlong = Feature(rewards.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10))
    assert overlong.name == "soft_overlong_punishment_reward" and overlong.spec is None
    assert overlong(rollouts_by_hand(["a" * n for n in (10, 15, 21)])).tolist() == [0.0, -0.5, -1.0]
    cut = rollouts_by_hand(["abab", "abcd"])
    repetition = Feature(rewards.get_repetition_penalty_reward(ngram_size=2))(cut).tolist()
    assert repetition == pytest.approx([-1 / 3, 0.0])


@pytest.mark.skipif(not is_math_verify_available(), reason="needs math-verify")
def test_trls_accuracy_reward():
    chat = [{"role": "user", "content": "1 + 1?"}]
    texts, solutions = [r"\boxed{2}", r"\boxed{3}", r"\boxed{3}"], [r"\boxed{2}", r"\boxed{2}", "?"]
    rollouts = rollouts_by_hand(texts, prompts=[chat] * 3, solution=solutions)
    assert Feature(rewards.accuracy_reward)(rollouts, allow_none=True).nan_to_num(nan=-1).tolist() == [1, 0, -1]


def test_what_a_trainer_gives_reaches_the_function():
    def logs(completions, trainer_state, log_metric, log_extra):
        log_metric("length", 2.0)
        log_extra("text", completions)
        return [float(trainer_state)] * len(completions)

    feature, seen = Feature(logs), []
    feature.extras |= {
        "trainer_state": 7,
        "log_metric": lambda *a: seen.append(a),
        "log_extra": lambda *a: seen.append(a),
    }
    assert feature(rollouts_by_hand(["ab"])).tolist() == [7.0]
    assert seen == [("length", 2.0), ("text", ["ab"])]


def longer_than(completions, limit, **_):
    return [float(len(c) > limit) for c in completions]


class Longer:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, completions, **_):
        return longer_than(completions, self.limit)


class Later(Longer):
    async def __call__(self, completions, **_):
        await asyncio.sleep(0)
        return longer_than(completions, self.limit)


def test_partials_and_objects():
    partial = Feature(functools.partial(longer_than, limit=1))
    nested = Feature(functools.partial(functools.partial(longer_than), ["x" * 30], limit=1))
    assert partial.name == "longer_than(limit=1)" and partial.spec is None
    assert nested.name == "longer_than(['xxxxxxxxxxxxxxxxxx..., limit=1)"
    for source, name in ((Longer(1), "Longer"), (Later(1), "Later"), (Longer(1).__call__, "__call__")):
        feature = Feature(source)
        assert (feature.name, feature.spec) == (name, None)
        assert feature(rollouts_by_hand(["a", "ab"])).tolist() == [0.0, 1.0]
    assert partial(rollouts_by_hand(["a", "ab"])).tolist() == [0.0, 1.0]


def test_async_features_inside_a_running_event_loop():
    """As in a notebook, where `asyncio.run` is refused."""

    async def notebook():
        return Feature(later)(rollouts_by_hand(["ab"], bonus=[100])).tolist()

    assert asyncio.run(notebook()) == [102.0]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"feature 'bad' returned 1 values for 2 samples"),
        ([1.0, 2.0, 3.0], r"returned 3 values for 2"),
        ([1.0, float("nan")], r"returned nan for sample 1: 'two'\. Return a finite number"),
        ([float("inf"), 1.0], r"returned inf for sample 0: 'one'"),
        ([0.0, None], r"returned None for sample 1\. None means 'not applicable' and is allowed in a Reward only"),
    ],
)
def test_bad_values(answer, message):
    with pytest.raises(ValueError, match=message):
        Feature(lambda completions: answer, "bad")(rollouts_by_hand(["one", "two"]))


def test_none_where_it_is_allowed():
    rollouts = rollouts_by_hand(["one", "two"])
    feature = Feature(lambda completions: [None, 2], "graded")
    assert feature(rollouts, allow_none=True).nan_to_num(nan=-1).tolist() == [-1, 2]
    with pytest.raises(ValueError, match="returned None for sample 0"):  # also of cached values
        feature(rollouts)
    with pytest.raises(ValueError, match="returned nan for sample 0"):
        Feature(lambda completions: [float("nan"), None], "bad")(rollouts, allow_none=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dragon", "unknown feature 'dragon'. Ready ones: contains:.*your own: my_file.py:function"),
        ("missing.py:f", r"no file 'missing\.py' \(looked in /"),
        ("no_such_module:f", "'no_such_module' is neither a ready feature nor a module"),
        ("json:dump_all", "json has no function 'dump_all'; it has .*dumps"),
        ("length:lines", "length:lines is unknown; say length:tokens, length:words or length:characters"),
        ("contains", "'contains' needs an argument, such as contains:"),
        ("contains:", "'contains:' needs an argument"),
        ("max_words:few", "max_words:few is unknown; say a number of words"),
        ("regex:(", r"'regex:\(': not a regular expression"),
        (3, "a feature is a function or a text such as 'contains:dragon', not 3"),
    ],
)
def test_bad_spellings(source, message):
    with pytest.raises(ValueError, match=message):
        Feature(source)


def test_every_ready_feature_is_tested():
    here = {"contains", "regex", "count", "starts_with", "max_words", "length", "cut"}
    there = {"vader", "classifier", "similarity", "reward_model"}  # in test_scorers.py and test_reward_models.py
    there |= {"brightness", "image_class", "column"}  # in test_image_metrics.py
    assert set(READY) == here | there
