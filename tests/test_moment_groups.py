"""Moments per group of prompts: closed forms, refits, late groups, several processes, files and messages."""

import json
import math
import threading
import warnings

import pytest
import torch
from builders import rollouts_by_hand

from hf_gdc.features import Feature
from hf_gdc.rollouts import Rollouts
from hf_gdc.targets import Context, Moment, Pointwise, Reference, Reward, Target
from hf_gdc.targets.constraints import gather_texts

# Of 100 samples of the reference for each prompt, how many have an "x"; two fables, one of the news.
SHARES = {"fox": ("fable", 10), "owl": ("fable", 40), "rain": ("news", 50)}


def has_x(completions, **_):
    return [float("x" in c) for c in completions]


def is_long(completions, **_):
    return [float(len(c) > 1) for c in completions]


def pool(prompts=tuple(SHARES), shares=SHARES, each=100):
    """Samples whose shares are exactly the reference's probabilities: every other one is long."""
    parts = []
    for prompt in prompts:
        topic, count = shares[prompt]
        texts = [("x" if n < count else "y") * (1 + n % 2) for n in range(each)]
        logp = torch.tensor([math.log(texts.count(text) / each) for text in texts])
        parts.append(rollouts_by_hand(texts, logp, [prompt] * each, topic=[topic] * each))
    return Rollouts.concatenate(parts)


def log_a(rollouts):
    return rollouts.sampler_logp_B


def bound(target, gather=lambda tensor: tensor):
    target.bind(Context(log_a, lambda prompts: pool(dict.fromkeys(prompts)), gather))
    return target


def means(target, feature=has_x, rollouts=None):
    """E_p of the feature for each prompt, exactly."""
    rollouts = pool() if rollouts is None else rollouts
    value, log_w = Feature(feature)(rollouts), target.log_weight(rollouts)
    found = {}
    for prompt in dict.fromkeys(rollouts.prompts):
        mine = torch.tensor([p == prompt for p in rollouts.prompts])
        found[prompt] = float(log_w[mine].softmax(0) @ value[mine])
    return found


def logit(x):
    return math.log(x) - math.log1p(-x)


# ---- exactness ----


def test_closed_form_per_prompt():
    """lambda = logit(mu) - logit(mu0) for each group of one prompt."""
    target = bound(Reference() * Moment(has_x, 0.7, per="prompt"))
    assert target.fit(pool()) and target.version == 1
    wanted = {prompt: logit(0.7) - logit(share / 100) for prompt, (_, share) in SHARES.items()}
    assert target.moments[0].lam == pytest.approx(wanted, abs=1e-6)
    assert means(target) == pytest.approx(dict.fromkeys(SHARES, 0.7), abs=1e-7)


def test_closed_form_per_group_with_a_mean_of_its_own():
    target = bound(Reference() * Moment(has_x, {"fable": 0.6, "news": 0.2}, per="topic"))
    target.fit(pool(["fox", "rain"]))
    lam = target.moments[0].lam
    assert lam == pytest.approx({"fable": logit(0.6) - logit(0.1), "news": logit(0.2) - logit(0.5)}, abs=1e-6)


def test_a_group_shares_one_lambda_and_its_mean_is_over_its_prompts():
    target = bound(Reference() * Moment(has_x, 0.6, per="topic"))
    target.fit(pool())
    reached = means(target)
    assert reached["rain"] == pytest.approx(0.6, abs=1e-7)
    assert (reached["fox"] + reached["owl"]) / 2 == pytest.approx(0.6, abs=1e-7)
    lam = target.moments[0].lam["fable"]  # the same for both
    for prompt in ("fox", "owl"):
        assert reached[prompt] == pytest.approx(
            torch.sigmoid(torch.tensor(lam + logit(SHARES[prompt][1] / 100))).item()
        )


def test_one_lambda_over_all_prompts():
    target = bound(Reference() * Moment(has_x, 0.6))
    target.fit(pool())
    reached = means(target)
    assert sum(reached.values()) / 3 == pytest.approx(0.6, abs=1e-7) and max(reached.values()) > 0.7
    assert isinstance(target.moments[0].lam, float)


def test_any_mix_of_constraints_jointly():
    """A pointwise constraint, a reward, a shared moment and one per group, whose lambdas depend on one another."""

    def uneven(completions, **_):
        return [float(c != "yy") for c in completions]

    target = Reference() * Pointwise(uneven) * Reward(is_long, 2.0) * Moment(is_long, 0.45)
    target = bound(target * Moment(has_x, {"fable": 0.7, "news": 0.8}, per="topic"))
    target.fit(pool())
    assert sum(means(target, is_long).values()) / 3 == pytest.approx(0.45, abs=1e-7)
    reached = means(target)
    assert (reached["fox"] + reached["owl"]) / 2 == pytest.approx(0.7, abs=1e-7)
    assert reached["rain"] == pytest.approx(0.8, abs=1e-7)
    alone = bound(Reference() * Pointwise(uneven) * Reward(is_long, 2.0) * Moment(has_x, 0.8, per="topic"))
    alone.fit(pool())
    assert abs(alone.moments[0].lam["news"] - target.moments[1].lam["news"]) > 0.01


def test_groups_that_the_mapping_does_not_name_are_left_alone():
    target = bound(Reference() * Moment(has_x, {"news": 0.8}, per="topic"))
    target.fit(pool())
    assert means(target) == pytest.approx({"fox": 0.1, "owl": 0.4, "rain": 0.8}, abs=1e-7)
    assert set(target.moments[0].lam) == {"news"}


# ---- over time ----


def test_a_late_group_has_lambda_0_and_is_fitted_on_the_window():
    target = bound(Reference() * Moment(has_x, 0.6, per="topic"))
    target.fit(pool(["fox"]))
    assert means(target, rollouts=pool(["rain"]))["rain"] == pytest.approx(0.5)
    few = pool(["rain"]).select(torch.tensor([0, 1, 98, 99]))  # four samples: not enough
    assert not target.fit(few) and set(target.moments[0].lam) == {"fable"}
    before = target.moments[0].lam
    assert target.fit(pool(["rain"])) and target.version == 2
    assert set(target.moments[0].lam) == {"fable", "news"} and set(before) == {"fable"}
    assert means(target)["rain"] == pytest.approx(0.6, abs=0.01)
    assert not target.fit(pool(["rain"])) and target.version == 2  # nothing new, and no doubling


def test_a_group_without_samples_on_both_sides_waits():
    shares = SHARES | {"rain": ("news", 0)}
    target = bound(Reference() * Moment(has_x, 0.6, per="topic"))
    with pytest.warns(
        UserWarning, match=r"1 groups of prompts .*has_x\[news\] \(wants 0\.6, has \(0, 0\)\)\. Their lambda"
    ):
        target.fit(pool(shares=shares))
    assert set(target.moments[0].lam) == {"fable"}
    assert target.fit(pool(["rain"])) and set(target.moments[0].lam) == {"fable", "news"}


def test_resumed_and_loaded(tmp_path):
    def make():
        return bound(Reference() * Moment(f"{__name__}:has_x", 0.6, per="topic") * Moment(f"{__name__}:is_long", 0.4))

    target = make()
    target.fit(pool(["fox"]))
    torch.save(target.state_dict(), tmp_path / "state.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (target, resumed):
        assert one.fit(pool(["rain"]))
    assert resumed.moments[0].lam == target.moments[0].lam and resumed.moments[1].lam == target.moments[1].lam != 0
    target.save_pretrained(tmp_path)
    loaded = bound(Target.from_pretrained(tmp_path))
    assert torch.equal(loaded.log_score(pool()), target.log_score(pool())) and str(loaded) == str(target)
    assert json.loads((tmp_path / "target.json").read_text())["factors"][1]["arguments"]["per"] == "topic"
    means_of = bound(Reference() * Moment(f"{__name__}:has_x", {"news": 0.3}, per="topic"))
    means_of.save_pretrained(tmp_path)
    assert Target.from_pretrained(tmp_path).moments[0].mean == {"news": 0.3}


# ---- several processes ----


class Processes:
    """`gather` of threads that stand for processes."""

    def __init__(self, count):
        self.barrier, self.parts = threading.Barrier(count, timeout=30), [None] * count

    def run(self, jobs):
        results = [None] * len(jobs)

        def work(rank):
            def gather(tensor):
                self.parts[rank] = tensor
                self.barrier.wait()
                assert len({part.shape for part in self.parts}) == 1, "accelerate gathers equal shapes only"
                joined = torch.cat(self.parts)
                self.barrier.wait()
                return joined

            results[rank] = jobs[rank](gather)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_texts_of_all_processes():
    texts = [["", "über"], [], ["a" * 50, "b", "c"]]
    found = Processes(3).run([lambda gather, own=own: gather_texts(own, gather) for own in texts])
    assert found == [[text for own in texts for text in own]] * 3
    assert Processes(2).run([lambda gather: gather_texts([], gather)] * 2) == [[], []]


def test_processes_that_see_different_groups_agree():
    def job(prompts):
        def fit(gather):
            target = bound(Reference() * Moment(has_x, 0.6, per="topic") * Moment(is_long, 0.4), gather)
            target.fit(pool(prompts))
            return [moment.lam for moment in target.moments], target.report(rollouts=pool(prompts))

        return fit

    (one, first), (two, second) = Processes(2).run([job(["fox"]), job(["rain"])])
    assert one == two and set(one[0]) == {"fable", "news"} and first == second
    alone = bound(Reference() * Moment(has_x, 0.6, per="topic") * Moment(is_long, 0.4))
    alone.fit(pool(["fox", "rain"]))
    assert alone.moments[0].lam == pytest.approx(one[0], rel=1e-9)


# ---- reports ----


def test_report_and_formula():
    target = bound(Reference() * Moment(has_x, 0.6, name="x", per="topic"))
    report = target.report(rollouts=pool())
    assert report["base/x"] == pytest.approx(1 / 3)
    assert report["base/x[fable]"] == pytest.approx(0.25) and report["base/x[news]"] == pytest.approx(0.5)
    assert report["lambda/x[news]"] == pytest.approx(logit(0.6)) and "lambda/x" not in report
    assert str(target) == "P(x) = a(x) * exp(lambda[topic] * x)   with E[x | each topic] = 0.6"
    named = Moment(has_x, {"fable": 0.5, "news": 0.3}, "x", per="topic")
    assert named.wanted() == "E[x | topic = fable] = 0.5, E[x | topic = news] = 0.3"


def test_long_and_chat_prompts_as_groups():
    moment = Moment(has_x, 0.5, name="x", per="prompt")
    chat = [{"role": "user", "content": "Ünder"}]
    rollouts = rollouts_by_hand(["x", "y"], prompts=[chat, "word " * 20])
    groups = moment.groups(rollouts)
    assert groups[0] == '[{"role": "user", "content": "Ünder"}]' and groups[1] == "word " * 20
    assert moment.named("fox") == "x[fox]" and len(moment.named(groups[1])) < 45
    assert moment.named("word " * 20) != moment.named("word " * 21)
    target = bound(Reference() * Moment(has_x, 0.6, per="prompt"))
    many = {f"p{n}": ("t", 50) for n in range(30)}
    report = target.report(rollouts=pool(many, many))
    assert sum(name.startswith("lambda/") for name in report) == 20 and len(target.moments[0].lam) == 30


# ---- mistakes ----


def test_mistakes():
    with pytest.raises(ValueError, match="mean of 'has_x' is a mapping from groups: say with `per`"):
        Moment(has_x, {"news": 0.5})
    with pytest.raises(ValueError, match="must be a number, not {'news': nan}"):
        Moment(has_x, {"news": float("nan")}, per="topic")
    with pytest.raises(ValueError, match=r"per `kind`, but the prompts have no such column; .* they have `topic`\."):
        bound(Reference() * Moment(has_x, 0.5, per="kind")).fit(pool())
    with pytest.raises(ValueError, match=r"mean 1\.2 of 'has_x\[news\]' lies outside of what .*, \(0, 1\)"):
        bound(Reference() * Moment(has_x, {"news": 1.2, "fable": 0.5}, per="topic")).fit(pool())
    with pytest.raises(ValueError, match=r"2 groups of prompts .*has_x\[fable\] \(wants 1.2.* ask for means inside"):
        bound(Reference() * Moment(has_x, 1.2, per="topic")).fit(pool())
    with pytest.raises(
        ValueError, match="no prompt so far has `topic` = 'New', for which .* there are 'fable', 'news'"
    ):
        bound(Reference() * Moment(has_x, {"New": 0.5}, per="topic")).fit(pool())
    with pytest.warns(UserWarning, match="no prompt so far has `topic` = 'fables'"):
        bound(Reference() * Moment(has_x, {"fables": 0.5, "news": 0.6}, per="topic")).fit(pool())
    both = pool(["fox"])
    both.columns["topic"][0] = "news"
    with pytest.raises(ValueError, match="a prompt has samples in two groups of a moment"):
        bound(Reference() * Moment(has_x, {"fable": 0.5}, per="topic")).fit(both)


def test_no_warning_where_there_is_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(Reference() * Moment(has_x, 0.6, per="topic")).fit(pool())
