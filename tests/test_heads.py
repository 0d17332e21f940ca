# SPDX-License-Identifier: Apache-2.0
"""The heads of the small GPT: what they see, what they read, that they learn, and that they travel."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from test_models import VOCAB, gradients, left_padded, make_ids, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

from hf_gdc import (
    SmallGPTConfig,
    SmallGPTForCausalLM,
    SmallGPTForMaskedLM,
    SmallGPTForQuestionAnswering,
    SmallGPTForSequenceClassification,
    SmallGPTForTokenClassification,
    SmallGPTModel,
)

POSITIONS = ("rotary", "learned", "sinusoidal")
HEADS = {
    "AutoModelForMaskedLM": SmallGPTForMaskedLM,
    "AutoModelForQuestionAnswering": SmallGPTForQuestionAnswering,
    "AutoModelForSequenceClassification": SmallGPTForSequenceClassification,
    "AutoModelForTokenClassification": SmallGPTForTokenClassification,
}


def changed_at(ids, place):
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    return changed


# --- attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("position", POSITIONS)
def test_bidirectional_attention_sees_both_sides_and_causal_one_side(position, implementation):
    for is_causal in (False, True):
        model = make_model(
            model_class=SmallGPTModel,
            position_embedding_type=position,
            is_causal=is_causal,
            attn_implementation=implementation,
        )
        ids = make_ids()
        moved = (model(changed_at(ids, 6))[0] - model(ids)[0]).abs().amax(-1) > 1e-4
        assert moved[:, 6:].all()
        assert moved[:, :6].all() == (not is_causal) and moved[:, :6].any() == (not is_causal)


@pytest.mark.parametrize("position", POSITIONS)
def test_bidirectional_attention_sees_no_padding(position):
    model = make_model(model_class=SmallGPTForMaskedLM, position_embedding_type=position, is_causal=False)
    rows, ids, mask = left_padded()
    for padded, shown in ((ids, mask), (ids.flip(1), mask.flip(1))):
        logits = model(padded, shown).logits
        for i, row in enumerate(rows):
            alone = row if shown is mask else row.flip(1)
            torch.testing.assert_close(logits[i, shown[i] == 1], model(alone).logits[0], atol=1e-5, rtol=1e-5)


def test_bidirectional_attention_keeps_no_cache():
    model = make_model(model_class=SmallGPTModel, is_causal=False)
    assert model(make_ids()).past_key_values is None
    assert SmallGPTConfig(is_causal=False, use_cache=True).use_cache is False


@pytest.mark.parametrize(
    ("model_class", "is_causal", "fix"),
    [(SmallGPTForCausalLM, False, "use SmallGPTForMaskedLM"), (SmallGPTForMaskedLM, True, "Set is_causal=False")],
)
def test_a_language_model_with_the_wrong_attention_is_refused(model_class, is_causal, fix):
    with pytest.raises(ValueError, match=fix):
        make_model(model_class=model_class, is_causal=is_causal)


# --- losses


def test_masked_labels_give_the_cross_entropy_in_place():
    model, ids = make_model(model_class=SmallGPTForMaskedLM, is_causal=False), make_ids()
    labels = torch.full_like(ids, -100)
    labels[:, [2, 7]] = ids[:, [2, 7]]
    ids[:, [2, 7]] = 0
    output = model(ids, labels=labels)
    logps = output.logits.log_softmax(-1)[:, [2, 7]].gather(-1, labels[:, [2, 7], None])
    torch.testing.assert_close(output.loss, -logps.mean())


def test_a_causal_model_goes_on_as_a_masked_one(tmp_path):
    causal = make_model()
    causal.save_pretrained(tmp_path)
    masked = SmallGPTForMaskedLM.from_pretrained(tmp_path, is_causal=False)
    weights = causal.state_dict()
    assert weights.keys() == masked.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in masked.state_dict().items())
    assert masked.lm_head.weight is masked.model.embed_tokens.weight
    ids = make_ids()  # the last token sees the same in both, in the first layer
    torch.testing.assert_close(
        masked(ids, output_hidden_states=True).hidden_states[1][:, -1],
        causal(ids, output_hidden_states=True).hidden_states[1][:, -1],
    )


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (1, [0.5, -1.0, 2.0], lambda logits, labels: (logits[:, 0] - labels).square().mean()),
        (3, [0, 2, 1], lambda logits, labels: -logits.log_softmax(-1)[torch.arange(3), labels].mean()),
    ],
)
def test_classification_loss(num_labels, labels, expected):
    model = make_model(model_class=SmallGPTForSequenceClassification, num_labels=num_labels)
    labels = torch.tensor(labels)
    output = model(make_ids(), labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))


@pytest.mark.parametrize("num_labels", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(num_labels, tmp_path):
    """The heads' losses are means, which the Trainer divides by the number of micro-batches."""
    model = make_model(model_class=SmallGPTForSequenceClassification, num_labels=num_labels)
    ids, labels = make_ids(4), torch.tensor([1, 0, 1, 1]).to(torch.float if num_labels == 1 else torch.long)
    whole = gradients(model, input_ids=ids, labels=labels)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 1.0}
    args |= {"optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    Trainer(model, TrainingArguments(tmp_path, disable_tqdm=True, **args), train_dataset=rows).train()
    steps = {name: start[name] - weight for name, weight in model.named_parameters()}
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-4)


# --- what the sequence classifier reads


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pad", [0, 5], ids=["pad is a token of its own", "pad is the end of every text"])
def test_the_last_token_counts_wherever_the_padding_is(pad, is_causal):
    model = make_model(model_class=SmallGPTForSequenceClassification, num_labels=3, is_causal=is_causal)
    model.config.pad_token_id = model.config.eos_token_id = 5
    lengths, width = (4, 9, 7), 11
    rows = [make_ids(1, length, seed=length) for length in lengths]
    for row in rows:
        row[:, -1] = 5
    alone = torch.cat([model(row, torch.ones_like(row)).logits for row in rows])
    without_mask = torch.cat([model(row).logits for row in rows])
    torch.testing.assert_close(alone, without_mask)
    for left in (True, False):
        sides = [(width - length, 0) if left else (0, width - length) for length in lengths]
        padded = zip(rows, sides, strict=True)
        ids = torch.cat([torch.nn.functional.pad(row, side, value=pad) for row, side in padded])
        mask = torch.cat([torch.nn.functional.pad(torch.ones(1, n), s) for n, s in zip(lengths, sides, strict=True)])
        torch.testing.assert_close(model(ids, mask.long()).logits, alone, atol=1e-5, rtol=1e-5)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)


def test_the_classifier_equals_the_generic_head_where_that_is_right():
    """Without padding, and with a padding token that no text contains."""
    model = make_model(model_class=SmallGPTForSequenceClassification, num_labels=3, pad_token_id=0)
    _, ids, mask = left_padded()
    generic = transformers.modeling_layers.GenericForSequenceClassification.forward
    torch.testing.assert_close(model(ids, mask).logits, generic(model, ids, mask).logits)


def test_the_classifier_reads_on_from_a_cache():
    model = make_model(model_class=SmallGPTForSequenceClassification, num_labels=2)
    _, ids, mask = left_padded()
    past = model(ids[:, :-3], mask[:, :-3], use_cache=True).past_key_values
    torch.testing.assert_close(
        model(ids[:, -3:], mask, past_key_values=past).logits, model(ids, mask).logits, atol=1e-5, rtol=1e-5
    )


# --- learning


def train(model, rows, tmp_path, steps=60, **options):
    args = {"per_device_train_batch_size": 16, "max_steps": steps, "learning_rate": 1e-2, "report_to": "none"}
    args |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    Trainer(model, TrainingArguments(tmp_path, **args), train_dataset=rows, **options).train()
    return model.eval()


def test_a_token_classifier_and_a_question_answerer_learn(tmp_path):
    """Marks the tokens below 30, and finds the first and the last of a run of 1s: none of them at random."""
    ids = make_ids(256, 8) % 59 + 2
    classifier = make_model(model_class=SmallGPTForTokenClassification, num_labels=2, initializer_range=0.02)
    rows = [{"input_ids": row, "labels": (row < 30).long()} for row in ids]
    classifier = train(classifier, rows, tmp_path)
    assert (classifier(ids).logits.argmax(-1) == (ids < 30)).float().mean() > 0.99  # 0.5 by chance

    start = torch.arange(256) % 5
    ids = ids.index_put((torch.arange(256)[:, None], start[:, None] + torch.arange(3)), torch.tensor(1))
    answerer = make_model(model_class=SmallGPTForQuestionAnswering, is_causal=False, initializer_range=0.02)
    columns = {"input_ids": ids, "start_positions": start, "end_positions": start + 2}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(256)]
    answerer = train(answerer, rows, tmp_path)
    output = answerer(ids)
    assert (output.start_logits.argmax(-1) == start).float().mean() > 0.95  # 0.2 by chance
    assert (output.end_logits.argmax(-1) == start + 2).float().mean() > 0.95


def test_trl_trains_it_as_a_reward_model(tmp_path):
    """It learns to prefer the texts with a word to those without, from TRL's own trainer."""
    animals = ["dog", "cat", "bird", "fox"]
    words = ["<end>", "a", "little", "was", "happy", "sad", *animals]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    model = SmallGPTForSequenceClassification(
        SmallGPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    good = [f"a little {animal} was happy" for animal in animals]
    bad = [f"a little {animal} was sad" for animal in animals]
    args = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    args |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    trainer = RewardTrainer(
        model,
        RewardConfig(str(tmp_path), **args),
        train_dataset=Dataset.from_dict({"chosen": good * 4, "rejected": bad * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    # TRL ends every text with EOS, which is the padding here: the reward is read off it.
    batch = tokenizer([f"{text} <end>" for text in good + bad], return_tensors="pt", padding=True)
    rewards = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    assert (rewards[:4] - rewards[4:]).min() > 4.0  # odds of e^4 to 1


# --- the Hub

REMOTE = """
import sys, torch, transformers
sys.modules["hf_gdc"] = None  # even where it is installed, importing it fails
for name in sys.argv[2:]:
    path = f"{sys.argv[1]}/{name}"
    expected = torch.load(path + "/expected.pt")
    model = getattr(transformers, name).from_pretrained(path, trust_remote_code=True)
    model.save_pretrained(path + "/again")
    for one in (model, getattr(transformers, name).from_pretrained(path + "/again", trust_remote_code=True)):
        torch.testing.assert_close(one(**expected["inputs"])[0], expected["first"])
    # A head of another kind on the same body: what transfer learning from the Hub does.
    settings = {"trust_remote_code": True, "ignore_mismatched_sizes": True, "num_labels": 3}
    settings |= {"is_causal": name != "AutoModelForMaskedLM"}
    other = transformers.AutoModelForSequenceClassification.from_pretrained(path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), model.model.parameters(), strict=True))
    assert other(**expected["inputs"]).logits.shape == (3, 3)
"""


def test_every_head_loads_as_remote_code_without_the_library(tmp_path):
    names = ["AutoModelForCausalLM", *HEADS]
    for name in names:
        model_class = HEADS.get(name, SmallGPTForCausalLM)
        model = make_model(model_class=model_class, is_causal=name != "AutoModelForMaskedLM")
        model.save_pretrained(tmp_path / name)
        _, ids, mask = left_padded()
        inputs = {"input_ids": ids, "attention_mask": mask}
        torch.save({"inputs": inputs, "first": model(**inputs)[0].detach()}, tmp_path / name / "expected.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), *names],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", HEADS)
def test_auto_classes_build_the_heads(name, tmp_path):
    model = make_model(model_class=HEADS[name], is_causal=False)
    assert type(getattr(transformers, name).from_config(model.config)) is HEADS[name]
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    assert type(loaded) is HEADS[name]
    torch.testing.assert_close(loaded(make_ids())[0], model(make_ids())[0])
