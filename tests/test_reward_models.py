"""Reward models and similarity to texts, against plain forward passes one by one; and messages for models that don't fit."""

import pytest
import torch
from builders import letters, rollouts_by_hand
from test_scorers import TEXTS, bert, tokenizer
from transformers import BertModel, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from hf_gdc import Reference, Reward, Target
from hf_gdc.cli import TargetArguments, build_target
from hf_gdc.features import Feature
from hf_gdc.reward_models import reward_model
from hf_gdc.scorers import similarity

CHAT = [{"role": "user", "content": "a b"}]


def judge(vocab_size=23, labels=1):
    """A decoder that gives one number, read at its last token."""
    torch.manual_seed(1)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "initializer_range": 1.0}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=vocab_size, num_labels=labels, **size)).eval()


@pytest.fixture
def saved(tmp_path):
    def save(model, name="model", with_tokenizer=True):
        model.save_pretrained(tmp_path / name)
        if with_tokenizer:
            tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@torch.no_grad()
def reward_of(model, text):
    """Of a text alone, its last 12 tokens where it has more."""
    ids = tokenizer()(text)["input_ids"][-12:] or [0]
    return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


# ---- reward models ----


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_reward_model_reads_prompt_and_completion(batch_size, saved):
    model, prompts = judge(), ["b a ", "", "v v v ", "a ", "", "", "u "]
    rollouts = rollouts_by_hand(TEXTS, prompts=prompts)
    path = saved(model)
    model.config.pad_token_id = 0
    wanted = [reward_of(model, prompt + text) for prompt, text in zip(prompts, TEXTS, strict=True)]
    assert max(wanted) - min(wanted) > 0.1
    values = Feature(reward_model(path, batch_size=batch_size))(rollouts)
    assert values.tolist() == pytest.approx(wanted, abs=1e-5)
    given = Feature(reward_model(judge(), tokenizer(), batch_size), "given")(rollouts)
    assert given.tolist() == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_without_a_padding_token_the_last_token_is_read_even_if_it_is_eos():
    model, texts = judge(), ["a b E", "c E", "a", "b c", "d E"]
    assert model.config.pad_token_id is None
    wanted = [float(model(input_ids=torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, 0]) for text in texts]
    values = Feature(reward_model(model, tokenizer(), batch_size=2), "r")(rollouts_by_hand(texts))
    assert values.tolist() == pytest.approx(wanted, abs=1e-5)
    assert model.config.pad_token_id is None


def test_chats_go_through_its_own_template(saved):
    rollouts = rollouts_by_hand(["c", "d e"], prompts=[CHAT, CHAT])
    model = judge()
    model.config.pad_token_id = 0
    wanted = [reward_of(model, f"u a b E a {text} E ") for text in ("c", "d e")]
    assert Feature(reward_model(saved(model)))(rollouts).tolist() == pytest.approx(wanted, abs=1e-5)
    other = tokenizer()
    other.chat_template = "{% for m in messages %}{{ sign }} {{ m.content }} {% endfor %}"
    signed = reward_model(model, other, chat_template_kwargs={"sign": "v"})
    wanted = [reward_of(model, f"v a b v {text} ") for text in ("c", "d e")]
    assert Feature(signed)(rollouts).tolist() == pytest.approx(wanted, abs=1e-5)


def count_b(completions, **_):
    return [float(c.count("b")) for c in completions]


def test_several_rewards_weighed_and_saved(saved, tmp_path):
    path, model = saved(judge()), judge()
    rollouts = rollouts_by_hand(["a b", "b b c"])
    model.config.pad_token_id = 0
    number = torch.tensor([reward_of(model, text) for text in rollouts.texts], dtype=torch.float64)
    counts = torch.tensor([1.0, 2.0], dtype=torch.float64)
    wanted = (0.5 * number + 2 * counts) / 0.1
    for source, tokenizers in ((path, None), (f"reward_model:{path}", None), (path, [tokenizer(), None])):
        reward = Reward([source, count_b], 0.1, [0.5, 2.0], reward_processing_classes=tokenizers)
        torch.testing.assert_close(reward.log_score(rollouts_by_hand(rollouts.texts)), wanted, rtol=1e-5, atol=1e-4)
    target = Reference() * Reward([path, count_b], 0.1, [0.5, 2.0])
    target.save_pretrained(tmp_path / "target")
    loaded = Target.from_pretrained(tmp_path / "target").terms[1][0]
    torch.testing.assert_close(loaded.log_score(rollouts), wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="rewards reward_model:.* can't be saved"):
        (Reference() * Reward(judge(), 1.0, reward_processing_classes=tokenizer())).save_pretrained(tmp_path / "no")
    options = TargetArguments(reward=[path, "length:words"], reward_weights=[1.0, 3.0], beta=0.5)
    assert build_target(options).terms[1][0].weights == [1.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda save: save(bert()),
            r"has 3 labels \('sad', 'happy', 'angry'\), and a reward model has one.*classifier:",
        ),
        (lambda save: save(judge(labels=2)), r"has 2 labels .*classifier:.*=LABEL"),
        (
            lambda save: save(judge(vocab_size=9)),
            "ids up to 22, but the model has embeddings for 9 tokens, .*reward_pro",
        ),
        (lambda save: judge(), "this reward model was not loaded from anywhere: pass its tokenizer"),
    ],
)
def test_models_that_are_no_reward_model(make, message, saved):
    with pytest.raises(ValueError, match=message):
        Reward(make(saved), 1.0)


def test_a_name_that_is_nothing(monkeypatch):
    def nothing(name):
        raise OSError(f"no {name}")

    monkeypatch.setattr("hf_gdc.reward_models.AutoConfig.from_pretrained", nothing)
    with pytest.raises(
        ValueError, match="found no reward model 'nobody'.* spelt with a colon, such as contains:dragon"
    ):
        Reward("nobody", 1.0)


def test_a_head_that_was_never_trained(saved):
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=12, num_labels=1))
    with pytest.raises(ValueError, match="is no reward model: its weights lack score.weight, which would be random"):
        Reward(saved(lm), 1.0)


def test_chats_that_its_template_does_not_fit(saved):
    rollouts, bare = rollouts_by_hand(["c"], prompts=[CHAT]), tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: set its chat_template .* or give prompts as plain text"):
        Reward(judge(), 1.0, reward_processing_classes=bare).log_score(rollouts)
    bare.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(
        ValueError, match=r"refuses the roles \['user', 'assistant'\]: no user here. Change the prompts"
    ):
        Reward(judge(), 1.0, reward_processing_classes=bare).log_score(rollouts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([count_b, judge()], [None]), "2 reward functions need as many reward_processing_classes, not 1"),
        (([count_b], [letters()]), "are for reward models, and <function count_b .* is a function: give None there"),
    ],
)
def test_tokenizers_that_dont_match(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reward(arguments[0], 1.0, reward_processing_classes=arguments[1])


def test_a_reward_model_that_gives_nan(saved):
    broken = judge()
    broken.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="returned nan for sample 0: 'a'. Return a finite number"):
        Reward(broken, 1.0, reward_processing_classes=tokenizer()).log_score(rollouts_by_hand(["a"]))


# ---- similarity ----


def encoder():
    return BertModel(bert().config, add_pooling_layer=False).eval()


def test_similarity_to_the_nearest_text(saved, tmp_path, monkeypatch):
    references = ["a b c", "v u v"]
    (tmp_path / "texts.txt").write_text("a b c\n\n  v u v \n")
    model = encoder()
    path = saved(model)

    @torch.no_grad()
    def embedding(text):
        ids = tokenizer()(text)["input_ids"][:12] or [0]
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)

    wanted = [
        max(float(torch.cosine_similarity(embedding(text), embedding(r), dim=0)) for r in references) for text in TEXTS
    ]
    spelt = Feature(f"similarity:{path}={tmp_path / 'texts.txt'}")
    assert spelt(rollouts_by_hand(TEXTS)).tolist() == pytest.approx(wanted, abs=1e-5)
    assert wanted[0] == pytest.approx(1.0) and min(wanted) < 0.9
    assert len(spelt(rollouts_by_hand(TEXTS).select(torch.tensor([], dtype=torch.int64)))) == 0
    given = Feature(similarity(model, references, tokenizer(), batch_size=2), "near")
    assert given(rollouts_by_hand(TEXTS)).tolist() == pytest.approx(wanted, abs=1e-5) and given.spec is None

    Target([Reward(spelt, 0.5)]).save_pretrained(tmp_path / "target")  # with the file of texts
    (tmp_path / "texts.txt").unlink()
    loaded = Target.from_pretrained(tmp_path / "target")
    twice = [2 * value for value in wanted]
    assert loaded.log_score(rollouts_by_hand(TEXTS)).tolist() == pytest.approx(twice, abs=1e-5)


def test_mistakes_with_similarity(saved, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for spec, message in {
        "similarity:org/encoder": "spell it similarity:MODEL=FILE",
        "similarity:=texts.txt": "spell it similarity:MODEL=FILE",
        "similarity:org/encoder=missing.txt": r"there is no file 'missing.txt' with texts \(looked in /",
        f"similarity:org/encoder={tmp_path}/empty.txt": "needs a text to compare with, and .*empty.txt has none",
        "similarity": "'similarity' needs an argument, such as similarity:org/encoder=texts.txt",
    }.items():
        with pytest.raises(ValueError, match=message):
            Feature(spec)
