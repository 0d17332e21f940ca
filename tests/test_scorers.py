"""Scorers: a classifier against plain forward passes text by text, VADER against its package, and messages for mistakes."""

import builtins
import math

import pytest
import torch
from builders import letters, rollouts_by_hand
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hf_gdc.features import Feature
from hf_gdc.scorers import classifier
from hf_gdc.targets import Context, Moment, Pointwise, Reference, Target

TEXTS = ["a b c", "", "d", "c b a " * 9, "v u t s", "   ", "a b c d e"]


def tokenizer():
    mine = letters()
    mine.model_input_names = ["input_ids", "attention_mask"]
    return mine


def bert(seed=0, labels=("sad", "happy", "angry"), **options):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=23,
        max_position_embeddings=12,
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
        initializer_range=1.0,
        pad_token_id=0,
        **size,
        **options,
    )
    return BertForSequenceClassification(config).eval()


def gpt2():
    """A decoder without a pad token, which classifies the last token."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=12, num_labels=2)
    config.id2label, config.initializer_range = {0: "no", 1: "yes"}, 1.0
    return GPT2ForSequenceClassification(config).eval()


@pytest.fixture
def saved(tmp_path):
    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@torch.no_grad()
def one_by_one(model, text, limit=12):
    """Logits of a text alone, without padding; nothing to read is read as E."""
    ids = tokenizer()(text)["input_ids"][:limit] or [0]
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_probability_of_a_label(make, batch_size, saved):
    """Whatever the batches are: padding, sorting and cutting leave no trace."""
    model = make()
    label, index = ("happy", 1) if make is bert else ("yes", 1)
    wanted = [float(one_by_one(model, text).softmax(-1)[index]) for text in TEXTS]
    assert max(wanted) - min(wanted) > 0.1
    for source in (saved(model), model):
        given = None if source is not model else tokenizer()
        feature = Feature(classifier(source, label, given, batch_size=batch_size))
        assert feature(rollouts_by_hand(TEXTS)).tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_label_as_zero_or_one(saved):
    path = saved(bert())
    share = Feature(classifier(path, "sad"))(rollouts_by_hand(TEXTS))
    for threshold in (0.3, 0.5):
        feature = Feature(classifier(path, "sad", output="label", threshold=threshold))
        assert feature(rollouts_by_hand(TEXTS)).tolist() == (share > threshold).double().tolist()
    assert Pointwise(feature).log_score(rollouts_by_hand(TEXTS)).tolist() == [
        0.0 if s > 0.5 else -math.inf for s in share
    ]


def test_sigmoid_for_one_logit_and_for_many_labels():
    many = bert(problem_type="multi_label_classification")
    one = bert(2, labels=("LABEL_0",))
    for model, label, index in ((many, "angry", 2), (one, "LABEL_0", 0)):
        wanted = [float(one_by_one(model, text).sigmoid()[index]) for text in TEXTS]
        values = Feature(classifier(model, label, tokenizer()))(rollouts_by_hand(TEXTS))
        assert values.tolist() == pytest.approx(wanted, abs=1e-5)


def test_chats_and_empty_batches(saved):
    feature, chat = Feature(classifier(saved(bert()), "happy")), [{"role": "user", "content": "?"}]
    text = feature(rollouts_by_hand(["a b"]))
    assert torch.equal(feature(rollouts_by_hand(["a b"], prompts=[chat])), text)
    assert len(feature(rollouts_by_hand(["a b"]).select(torch.tensor([], dtype=torch.int64)))) == 0


@pytest.mark.parametrize("folder", ["model", "a:b=c"])
def test_spelt_as_text(saved, folder):
    path = saved(bert(), folder)
    plain, above = Feature(f"classifier:{path}=happy"), Feature(f"classifier:{path}=happy>0.3")
    rollouts = rollouts_by_hand(TEXTS)
    assert plain.name == plain.spec == f"classifier:{path}=happy"
    assert torch.equal(plain(rollouts), Feature(classifier(path, "happy"), "other")(rollouts))
    assert torch.equal(above(rollouts), (plain(rollouts) > 0.3).double())


def test_saved_in_a_target(saved, tmp_path):
    path = saved(bert())
    target = Target([Pointwise(classifier(path, "happy", output="label", threshold=0.2))])
    target = target * Moment(f"classifier:{path}=sad", 0.4)
    target.bind(Context(lambda rollouts: torch.zeros(len(rollouts)), lambda prompts: None))
    target.moments[0].lam = 1.5
    target.save_pretrained(tmp_path / "target")
    loaded = Target.from_pretrained(tmp_path / "target")
    wanted = target.log_score(rollouts_by_hand(TEXTS))
    assert torch.equal(loaded.log_score(rollouts_by_hand(TEXTS)), wanted) and 0 < int(wanted.isinf().sum()) < len(TEXTS)
    with pytest.raises(ValueError, match="can't be saved"):  # its tokenizer is not beside it
        (Reference() * Moment(classifier(path, "sad", tokenizer()), 0.4)).save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("component", ["neg", "neu", "pos", "compound"])
def test_vader(component, tmp_path):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["What a wonderful, happy day!", "I hate this terrible thing.", "A table.", ""]
    wanted = [SentimentIntensityAnalyzer().polarity_scores(text)[component] for text in texts]
    feature = Feature(f"vader:{component}")
    assert feature(rollouts_by_hand(texts)).tolist() == pytest.approx(wanted)
    chat = [{"role": "user", "content": "?"}]
    assert feature(rollouts_by_hand(texts, prompts=[chat] * 4)).tolist() == pytest.approx(wanted)
    Target([Moment(feature, 0.5)]).save_pretrained(tmp_path)
    assert Target.from_pretrained(tmp_path).moments[0].feature.name == f"vader:{component}"


# ---- mistakes ----


def test_a_label_that_is_not_there(saved):
    path = saved(bert())
    with pytest.raises(
        ValueError, match=r"classifier '.*model' has no label 'joyful'; it has 'sad', 'happy', 'angry'\."
    ):
        Feature(f"classifier:{path}=joyful")
    with pytest.raises(ValueError, match="has no label 'joyful'; it has 'no', 'yes'"):
        classifier(gpt2(), "joyful", tokenizer())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("classifier:", "'classifier:' needs an argument, such as classifier:org/model=positive"),
        ("classifier:org/model", "spell it classifier:MODEL=LABEL"),
        ("classifier:=happy", "spell it classifier:MODEL=LABEL"),
        ("classifier:org/model=", "spell it classifier:MODEL=LABEL"),
        ("classifier:org/model=happy>much", "the threshold 'much' is not a number"),
        ("vader:mood", "vader:mood is unknown; say vader:neg, vader:neu, vader:pos, vader:compound"),
        ("vader", "'vader' needs an argument, such as vader:compound"),
    ],
)
def test_bad_spellings(spec, message):
    with pytest.raises(ValueError, match=message):
        Feature(spec)


def test_options_that_say_nothing():
    with pytest.raises(ValueError, match="'probability' or 'label' .* not 'logit' with 0.5"):
        classifier(bert(), "happy", tokenizer(), output="logit")
    with pytest.raises(ValueError, match="threshold in .0, 1., not 'label' with 1"):
        classifier(bert(), "happy", tokenizer(), output="label", threshold=1)
    with pytest.raises(ValueError, match="pass its tokenizer as processing_class"):
        classifier(bert(), "happy")


def test_vader_without_its_package(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="needs the package vaderSentiment: pip install vaderSentiment"):
        Feature("vader:compound")
