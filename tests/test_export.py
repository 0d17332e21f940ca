# SPDX-License-Identifier: Apache-2.0
"""The small GPT as an ONNX graph in ONNX Runtime, against torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_models import left_padded, make_ids, make_model

for package in ("onnx", "onnxscript", "onnxruntime", "transformers.exporters.runners"):
    pytest.importorskip(package, exc_type=ImportError)

from transformers.exporters import ExportedModel  # noqa: E402

from hf_gdc.onnx_export import empty_cache, export_onnx, generate_greedily, quantized, size_of  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "export" / "run.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model, and the folders of its float32 and 8-bit graphs."""
    folder = tmp_path_factory.mktemp("onnx")
    model = make_model(num_key_value_heads=2, initializer_range=0.1, hidden_size=64)
    exported = export_onnx(model)
    exported.save_pretrained(folder / "float32")
    quantized(exported).save_pretrained(folder / "int8")
    return model, folder / "float32", folder / "int8"


def test_logits_agree(saved):
    """With left padding, other sizes than were traced, one token, and from a cache."""
    model, folder, _ = saved
    exported = ExportedModel.from_pretrained(folder)
    _, padded, mask = left_padded()
    for ids, shown in (
        (padded, mask),
        (make_ids(1, 1), torch.ones(1, 1).long()),
        (make_ids(5, 30), torch.ones(5, 30).long()),
    ):
        expected = model(ids, shown).logits
        logits = exported(input_ids=ids, attention_mask=shown, past_key_values=empty_cache(model, len(ids))).logits
        assert (logits - expected)[shown == 1].abs().max() < 1e-4
    first = exported(input_ids=padded[:, :-4], attention_mask=mask[:, :-4], past_key_values=empty_cache(model, 3))
    rest = exported(input_ids=padded[:, -4:], attention_mask=mask, past_key_values=first.past_key_values)
    assert (rest.logits - model(padded, mask).logits[:, -4:]).abs().max() < 1e-4


def test_generation_agrees(saved):
    model, folder, _ = saved
    exported = ExportedModel.from_pretrained(folder)
    ids = make_ids()
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(generate_greedily(exported, empty_cache(model, 3), ids, 10), expected)


def test_eight_bits_are_smaller_and_near(saved):
    model, float32, int8 = saved
    exported, ids = ExportedModel.from_pretrained(int8), make_ids(8)
    logits = exported(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=empty_cache(model, 8)).logits
    logps, expected = logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
    kl = (expected.exp() * (expected - logps)).sum(-1).mean()
    assert 0 < kl < 0.01  # 0 would mean that nothing was quantised
    assert size_of(float32) > 2 * size_of(int8)  # tiny: half of the 8-bit file is the graph


@pytest.mark.slow
def test_the_recipe_measures_what_it_saves(tmp_path):
    from hf_gdc.data import word_tokenizer
    from hf_gdc.stories import sample

    tokenizer = word_tokenizer(sample(500, seed=0))
    model = make_model(
        vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--num_texts", "32", "--runs", "1", "--new_tokens", "4", "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, str(RECIPE), "--model_name_or_path", str(tmp_path / "model"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert report["float32"]["largest_difference"] < 1e-4 < report["int8"]["largest_difference"]
    assert report["float32"]["perplexity"] == pytest.approx(report["model"]["perplexity"], rel=1e-5)
    assert report["int8"]["bytes"] == size_of(tmp_path / "out" / "int8")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode != 0 and "holds an earlier export" in again.stderr
