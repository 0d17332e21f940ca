"""The pipeline recipe, made small, and what its table is measured with."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from builders import letters, small_gpt

from hf_gdc import load_metric
from hf_gdc.generation_scores import GenerationScores, sampling_entropy, variety
from hf_gdc.metrics.embeddings import embedding_distance, mean_embeddings, text_encoder
from hf_gdc.metrics.images import frechet_distance
from hf_gdc.two_sample import two_sample_accuracy

SCRIPT = Path(__file__).parents[1] / "recipes" / "glm" / "run.py"
SMALL = {
    "num_stories": 200,
    "num_texts": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "max_steps": 2,
    "eval_samples": 8,
}
SMALL |= {"per_device_train_batch_size": 16, "discriminator_warmup_steps": 1, "max_completion_length": 12}
SMALL |= {"report_prompts": 8, "report_references": 2, "disable_tqdm": "true", "masked_epochs": 0.5, "sft_epochs": 1}
TEXTS = ["a b c", "d e", "a a a a", "f", "b c d e f", "g a"]


# ---- distance of embeddings ----


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """Samples with exactly these means and covariances: |m1 - m2|^2 + sum (s1 - s2)^2 where the covariances commute."""
    generator = torch.Generator().manual_seed(0)

    def exactly(mean, spread, samples):
        raw = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(raw - raw.mean(0))  # orthonormal columns of mean 0
        return basis * math.sqrt(samples - 1) * torch.tensor(spread) + torch.tensor(mean)

    first, second = exactly([0.0, 1.0, 2.0], [1.0, 2.0, 0.5], 40), exactly([1.0, 1.0, 0.0], [1.5, 1.0, 0.5], 60)
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 0.25 + 1, rel=1e-6)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(6.25, rel=1e-6)


@pytest.fixture(scope="module")
def encoder():
    return text_encoder(small_gpt(1, pad_token_id=0).model, letters(), batch_size=4)


def test_embeddings_are_means_over_the_texts_own_tokens(encoder):
    for text, row in zip(TEXTS, mean_embeddings(TEXTS, encoder), strict=True):
        hidden = encoder.model(**letters()(text, return_tensors="pt")).last_hidden_state
        assert row.tolist() == pytest.approx(hidden[0].mean(0).tolist(), abs=1e-5)


def test_embedding_distance_is_that_of_the_embeddings(encoder):
    ours, theirs = TEXTS[:3], TEXTS[3:]
    expected = frechet_distance(mean_embeddings(ours, encoder), mean_embeddings(theirs, encoder))
    assert embedding_distance(ours, theirs, encoder) == pytest.approx(expected) and expected > 0.1
    assert embedding_distance(TEXTS, TEXTS[::-1], encoder) == pytest.approx(0, abs=1e-6)
    metric = load_metric("embedding_distance")
    assert metric.compute(predictions=ours, references=theirs, model=encoder) == {"embedding_distance": expected}
    with pytest.raises(ValueError, match="2 against 3 can't be compared"):
        embedding_distance(ours[:2], theirs, encoder)


# ---- a fresh discriminator ----


def test_a_fresh_discriminator_sees_what_differs_and_nothing_else(tmp_path):
    """Accuracy 1/2 on one distribution; near (1 + TV)/2 where half of the samples have a letter that real texts lack."""
    small_gpt(2, pad_token_id=0, eos_token_id=0, bos_token_id=0).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def draw(strange):
        rows = torch.randint(1, 8, (400, 4), generator=generator)
        rows[:, 2] = torch.where(torch.arange(400) % 2 < strange, 9, rows[:, 2])
        return [("a b", " ".join(chr(96 + n) for n in row)) for row in rows.tolist()]

    real, same, strange = draw(0), draw(0), draw(1)
    assert two_sample_accuracy(str(tmp_path), letters(), real, same) == pytest.approx(0.5, abs=4 * 0.5 / 20)  # of 400
    assert two_sample_accuracy(str(tmp_path), letters(), real, strange, 6, 1e-2) == pytest.approx(0.75, abs=0.09)
    with pytest.raises(ValueError, match="as many texts"):
        two_sample_accuracy(str(tmp_path), letters(), real, same[:-1])


# ---- scores at equal diversity ----


@pytest.mark.parametrize("ruler", [sampling_entropy, variety])
def test_two_models_are_brought_to_equal_diversity(encoder, ruler):
    prompts = ["a", "b c"] * 32
    judge = GenerationScores(letters(), prompts, [["a b"]] * 64, ["a b"] * 64, encoder, max_completion_length=6)
    model = small_gpt(3, eos_token_id=0, pad_token_id=0)
    wanted = ruler(judge.draw(model, 1.3))
    found = judge.matched_temperature(model, ruler, wanted, steps=9)
    assert ruler(judge.draw(model, found)) == pytest.approx(wanted, rel=0.02)
    if ruler is sampling_entropy:
        assert found == pytest.approx(1.3, rel=0.02)


def test_a_model_that_writes_references_has_full_marks(encoder):
    texts = ["b c d e f"] * 4
    judge = GenerationScores(letters(), ["a"] * 4, [[" b c d e f", " g"]] * 4, texts, encoder)
    found = judge.scores(texts)
    assert found["bleu"] == pytest.approx(100) and found["rougeL"] == pytest.approx(100)
    assert found["self_bleu"] == pytest.approx(1) and found["embedding_distance"] == pytest.approx(0, abs=1e-6)


# ---- the recipe ----


def glm(output: Path, **options) -> dict:
    words = [word for name, value in (SMALL | options).items() for word in (f"--{name}", str(value))]
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--config", str(SCRIPT.with_name("config.yaml")), "--output_dir", str(output), *words])
    return json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)


def test_every_stage_is_made_once_and_measured(tmp_path, capsys):
    report = glm(tmp_path / "out")
    assert list(report["models"]) == ["grammar", "pretrain", "sft", "longer", "gan", "fusion"]
    truth = report["models"]["grammar"]
    for row in list(report["models"].values())[1:]:
        assert row["nll"] > truth["nll"] and row["bleu"] < truth["bleu"] and 0 <= row["discriminator"] <= 1
    for row in report["ratios"].values():
        assert set(row) == {"temperature 1", "equal entropy", "equal self-BLEU"}
    longer = report["models"]["longer"]["rouge1"] / report["models"]["sft"]["rouge1"]
    assert report["ratios"]["longer"]["temperature 1"]["rouge1"] == pytest.approx(longer)
    for stage in ("gan", "fusion"):
        factors = json.loads((tmp_path / "out" / stage / "model" / "target.json").read_text())["factors"]
        assert [row["type"] for row in factors] == [{"gan": "Policy", "fusion": "Reference"}[stage], "Discriminator"]
    files = [path for path in (tmp_path / "out").rglob("*.safetensors")]
    before = [path.stat().st_mtime_ns for path in files]
    assert "over the fine-tuned model" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"fusion' was made with data_weight=1.0, now 3.0"):
        glm(tmp_path / "out", data_weight=3.0)
    assert [path.stat().st_mtime_ns for path in files] == before
    with pytest.raises(ValueError, match="fusion_from must be 'gan' or 'sft', but is 'pretrain'"):
        glm(tmp_path / "two", fusion_from="pretrain")
