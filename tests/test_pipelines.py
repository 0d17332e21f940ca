# SPDX-License-Identifier: Apache-2.0
"""transformers' pipelines on the small GPT: they give what the model itself says, padded batches included."""

import pytest
import torch
from test_models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_gdc import (
    SmallGPTForMaskedLM,
    SmallGPTForSequenceClassification,
    SmallGPTForTokenClassification,
    SmallGPTModel,
)

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "fox",
    "who",
    "saw",
    "the",
    "big",
    "red",
    "dog",
    "and",
    "ran",
]
SPECIAL = ["<end>", "<mask>", "<unk>"]
TEXTS = ["once upon a time there was a little fox", "the big dog"]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<end>", "pad_token": "<end>", "mask_token": "<mask>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **names)


def build(task, model_class, tokenizer, batch_size=2, **options):
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0}
    model = make_model(model_class=model_class, **size, **options)
    return model, pipeline(task, model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def encode(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_text_generation(tokenizer):
    model = make_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    outputs = generator(TEXTS, max_new_tokens=6, do_sample=False, return_full_text=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = encode(tokenizer, text)
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert output[0]["generated_text"].split() == tokenizer.decode(alone, skip_special_tokens=True).split()


def test_fill_mask(tokenizer):
    model, fill = build("fill-mask", SmallGPTForMaskedLM, tokenizer, is_causal=False)
    texts = ["once upon a <mask> there was a fox", "the <mask> dog"]
    for text, guesses in zip(texts, fill(texts, top_k=3), strict=True):
        ids = encode(tokenizer, text)
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        best = model(ids).logits[0, place].softmax(-1).topk(3)
        assert [guess["token"] for guess in guesses] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([guess["score"] for guess in guesses]), best.values)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_text_classification(tokenizer, num_labels):
    model, classify = build("text-classification", SmallGPTForSequenceClassification, tokenizer, num_labels=num_labels)
    for text, found in zip(TEXTS, classify(TEXTS, top_k=None), strict=True):
        logits = model(encode(tokenizer, text)).logits[0]
        expected = logits.sigmoid() if num_labels == 1 else logits.softmax(-1)
        scores = {item["label"]: item["score"] for item in found}
        torch.testing.assert_close(torch.tensor([scores[f"LABEL_{i}"] for i in range(num_labels)]), expected)


def test_token_classification(tokenizer):
    model, tag = build("token-classification", SmallGPTForTokenClassification, tokenizer, num_labels=3)
    for text, found in zip(TEXTS, tag(TEXTS, ignore_labels=[]), strict=True):
        labels = model(encode(tokenizer, text)).logits[0].argmax(-1)
        assert [item["entity"] for item in found] == [f"LABEL_{i}" for i in labels]
        assert [item["word"] for item in found] == text.split()


def test_feature_extraction(tokenizer):
    model, extract = build("feature-extraction", SmallGPTModel, tokenizer)
    for text, found in zip(TEXTS, extract(TEXTS, return_tensors=True), strict=True):
        expected = model(encode(tokenizer, text)).last_hidden_state[0]
        torch.testing.assert_close(found[0, -len(expected) :], expected, atol=1e-5, rtol=1e-5)
