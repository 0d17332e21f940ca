"""Black-box distillation as users run it: a student that is the teacher has nothing to learn; texts alone are enough."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_gdc import Discriminator, SmallGPTConfig, SmallGPTForCausalLM, Target, stories
from hf_gdc.data import word_tokenizer

FOLDER = Path(__file__).parents[1] / "recipes" / "gad"


@pytest.fixture(scope="module")
def gad():
    """The recipe's `main`."""
    spec = importlib.util.spec_from_file_location("gad_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Where a small model and its tokenizer are; far from uniform, so that its KLs are too."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = word_tokenizer(stories.sample(500, 0), 64)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = SmallGPTForCausalLM(SmallGPTConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **size, **ids))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def options(output: Path, *more: str) -> list[str]:
    """A run of three steps, one of each phase."""
    words = ["--config", str(FOLDER / "config.yaml"), "--output_dir", str(output), "--use_cpu", "true"]
    words += ["--max_steps", "3", "--mle_steps", "1", "--discriminator_warmup_steps", "1", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", "16", "--max_completion_length", "12", "--eval_samples", "32"]
    return [*words, *more]


def printed(text: str) -> dict[str, float]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and pair[0].startswith("kl_")}


def test_kl_is_zero_between_a_teacher_and_itself(gad, teacher, tmp_path, capsys):
    still = ("--learning_rate", "0", "--num_stories", "100")
    gad(options(tmp_path / "out", "--model_name_or_path", teacher, "--teacher", teacher, *still))
    found = printed(capsys.readouterr().out)
    assert found["kl_teacher_student"] == pytest.approx(0.0, abs=1e-4)
    assert found["kl_student_teacher"] == pytest.approx(0.0, abs=1e-4)
    target = json.loads((tmp_path / "out" / "model" / "target.json").read_text())
    assert [factor["type"] for factor in target["factors"]] == ["Policy", "Discriminator"]


def test_kl_is_positive_both_ways_between_others(gad, teacher, tmp_path, capsys):
    student = SmallGPTForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        student.lm_head.weight += 0.1 * torch.randn_like(student.lm_head.weight)
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "student")
    still = ("--learning_rate", "0", "--num_stories", "200")
    gad(options(tmp_path / "out", "--model_name_or_path", str(tmp_path / "student"), "--teacher", teacher, *still))
    found = printed(capsys.readouterr().out)
    for name in ("kl_teacher_student", "kl_student_teacher"):
        assert found[name] > 3 * found[f"{name}_stderr"] > 0


def test_a_black_box_is_a_file_of_its_texts(gad, teacher, tmp_path, capsys):
    texts, plain = tmp_path / "answers.jsonl", tmp_path / "plain.jsonl"
    rows = [dict(zip(("prompt", "completion"), story.split(". ", 1), strict=True)) for story in stories.sample(60, 1)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("".join(json.dumps({"text": row["completion"]}) + "\n" for row in rows))
    model = ("--model_name_or_path", teacher)
    gad(options(tmp_path / "out", *model, "--data", str(texts)))
    before, after = (
        SmallGPTForCausalLM.from_pretrained(folder).lm_head.weight for folder in (teacher, tmp_path / "out" / "model")
    )
    assert not torch.equal(before, after) and not printed(capsys.readouterr().out).keys() & {"kl_teacher_student"}
    with pytest.raises(ValueError, match="has no prompts"):
        gad(options(tmp_path / "again", *model, "--data", str(plain)))


@pytest.mark.parametrize("recipe", ["gan", "unified"])
def test_the_other_games_leave_a_model_and_its_target(recipe, teacher, tmp_path):
    main = runpy.run_path(str(FOLDER.parent / recipe / "run.py"))["main"]
    output = tmp_path / "out"
    sizes = ("--num_stories", "200", "--reference_samples", "32", "--model_name_or_path", teacher)
    argv = options(output, *sizes)
    argv[1] = str(FOLDER.parent / recipe / "config.yaml")
    main(argv)
    target = Target.from_pretrained(output / "model")
    assert any(isinstance(factor, Discriminator) for factor, _ in target.terms)
    start, end = (SmallGPTForCausalLM.from_pretrained(folder) for folder in (teacher, output / "model"))
    assert not torch.equal(start.lm_head.weight, end.lm_head.weight)
    assert "divergence" in (output / "model" / "README.md").read_text()
