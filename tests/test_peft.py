"""Adapters: one set of weights for policy and reference; what is saved loads, merges and goes on training."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_gdc import GDCConfig, GDCTrainer

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
GDC_RECIPE = Path(__file__).parents[1] / "recipes" / "gdc" / "run.py"


def lora(*modules: str, **options) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(modules or ("q_proj", "v_proj")), task_type="CAUSAL_LM", **options)


def train(output_dir, lm, peft_config=None, resume=None, callback=None, target=None, **options) -> GDCTrainer:
    """A run of a few steps on prompts; returns its trainer."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 32, "num_generations": 16, "fit_samples": 256}
    settings |= {"max_completion_length": 3, "learning_rate": 1e-2, "logging_steps": 1000, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = GDCTrainer(
        lm,
        tiny.HARD["pointwise and moment"]() if target is None else target,
        args=GDCConfig(output_dir=str(output_dir), **settings | options),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b a"]}),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    lm.eval()
    return lm(input_ids=torch.tensor([[1, 2, 2, 1, 0], [2, 1, 1, 2, 2]])).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(0, 0.5, torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A trained adapter: its trainer and the folder where it was saved."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = train(folder / "run", str(base), lora(*EVERY_LAYER))
    trainer.save_model(str(folder / "model"))
    return trainer, folder / "model"


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(*EVERY_LAYER, lora_dropout=0.1),
        lora("q_proj", use_dora=True),
        lora("q_proj", modules_to_save=["lm_head"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["two modules", "every layer", "DoRA", "modules_to_save", "IA3"],
)
def test_the_reference_is_the_base_model_bit_for_bit(config, tmp_path):
    lm = tiny.model(0, 0.5, torch.float32)
    with torch.no_grad():
        expected = tiny.model(0, 0.5, torch.float32)
    alone = {name: value.clone() for name, value in expected.state_dict().items()}
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with model.disable_adapter():
                seen.append(torch.equal(logits(model), logits(expected)))
            model.train()
            assert any(p.requires_grad for p in model.parameters())

    trainer = train(tmp_path, lm, config, callback=Watch())
    assert seen == [True] * 4
    rollouts = trainer._last_rollouts
    plain = train(tmp_path / "plain", expected, max_steps=1, learning_rate=0.0)
    recorded = rollouts.scores.pop("reference_logp")
    assert torch.equal(recorded, plain.actors.policy_logp(rollouts))
    assert torch.equal(recorded, trainer.actors.reference_logp(rollouts))
    assert (trainer.actors.policy_logp(rollouts) - recorded).abs().max() > 1e-3
    kept = trainer.model.get_base_model().state_dict()
    for name, value in alone.items():
        stem, _, leaf = name.rpartition(".")
        places = (name, f"{stem}.base_layer.{leaf}", f"{stem}.original_module.{leaf}")
        assert torch.equal(next(kept[place] for place in places if place in kept), value), name


def test_policy_and_reference_are_one_set_of_weights(tmp_path):
    lm = tiny.model(0, 0.5, torch.float32, hidden_size=128)
    alone = sum(t.nbytes for t in (*lm.parameters(), *lm.buffers()))
    target = tiny.HARD["pointwise"]()
    full = train(tmp_path / "full", tiny.model(0, 0.5, torch.float32, hidden_size=128), target=target, max_steps=1)
    assert sum(t.nbytes for t in full.actors.tensors()) == 2 * alone
    adapted = train(tmp_path / "lora", lm, lora(), target=target, max_steps=1)
    assert alone < sum(t.nbytes for t in adapted.actors.tensors()) <= 1.1 * alone


def test_a_saved_adapter_loads_with_the_same_logits(base, trained):
    trainer, folder = trained
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    wanted = logits(trainer.model)
    assert not torch.equal(wanted, logits(AutoModelForCausalLM.from_pretrained(base)))
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for again in (on_base, AutoPeftModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_weights_give_the_same_logits(trained, dtype, tolerance):
    _, folder = trained
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).to(dtype)
    wanted = logits(adapted)
    assert wanted.dtype == dtype
    torch.testing.assert_close(logits(adapted.merge_and_unload()), wanted, rtol=0, atol=tolerance)


def test_a_saved_adapter_is_trained_further_on_the_same_reference(base, trained, tmp_path):
    _, folder = trained
    start = AutoPeftModelForCausalLM.from_pretrained(folder)
    trainer = train(tmp_path, str(folder), max_steps=1, learning_rate=0.0)
    assert torch.equal(logits(trainer.model), logits(start))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(AutoModelForCausalLM.from_pretrained(base)))
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    trainer = train(tmp_path / "wrapped", on_base)  # a model that is a PeftModel already
    assert not torch.equal(logits(trainer.model), logits(start))


def test_a_resumed_adapter_run_is_bit_equal(base, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "peft_config": lora(*EVERY_LAYER)}
    whole = train(tmp_path / "whole", str(base), **options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    cut = train(tmp_path / "cut", str(base), callback=Stop(), **options)
    assert cut.state.global_step == 3
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3", ignore_errors=True)  # as if killed after step 3
    torch.manual_seed(99)
    resumed = train(tmp_path / "cut", str(base), resume=True, **options)
    assert resumed.state.global_step == 6
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert str(whole.partition.state_dict()) == str(resumed.partition.state_dict())
    saved = {path.name for path in (tmp_path / "cut" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_activation_checkpointing_changes_nothing(tmp_path):
    ends = []
    for name, on in (("plain", False), ("checkpointed", True)):
        torch.manual_seed(0)
        trainer = train(tmp_path / name, tiny.model(0, 0.5), lora(*EVERY_LAYER), gradient_checkpointing=on)
        assert trainer.model.get_base_model().is_gradient_checkpointing == on
        ends.append(logits(trainer.model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)
    assert (ends[0] - logits(tiny.model(0, 0.5))).abs().max() > 1e-3


def test_the_recipe_saves_an_adapter_and_a_merged_model(base, tmp_path, monkeypatch):
    options = {"config": GDC_RECIPE.with_name("config.yaml"), "model_name_or_path": base, "output_dir": tmp_path / "o"}
    options |= {"pointwise": "contains:b", "moment": "contains:a=0.6", "max_steps": 2, "max_completion_length": 3}
    options |= {"per_device_train_batch_size": 32, "fit_samples": 128, "reference_samples": 128, "eval_samples": 64}
    options |= {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "q_proj v_proj lm_head"}
    options |= {"merge_adapter": "true", "use_cpu": "true", "disable_tqdm": "true"}
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", [str(GDC_RECIPE), *words])
    recipe = runpy.run_path(str(GDC_RECIPE))
    recipe["main"](words)
    folder = tmp_path / "o" / "model"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], set(saved["target_modules"])) == (4, 8, {"q_proj", "v_proj", "lm_head"})
    for place in (folder, tmp_path / "o" / "merged"):
        assert {"target.json", "tokenizer.json", "README.md"} <= {path.name for path in place.iterdir()}
        assert "[contains:b]" in (place / "README.md").read_text()
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="there is none: add --use_peft"):
        recipe["main"]([word if word != str(tmp_path / "o") else str(tmp_path / "p") for word in _without_peft(words)])


def _without_peft(words: list[str]) -> list[str]:
    at = words.index("--use_peft")
    return words[:at] + words[at + 2 :]


def refused(message: str, tmp_path, lm, config=None) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, lm, config)


def test_adapters_that_give_no_reference_are_refused(tmp_path):
    def lm():
        return tiny.model(0, 0.5, torch.float32)

    refused("PROMPT_TUNING adds virtual tokens", tmp_path, lm(), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    refused("changes the model under the adapter", tmp_path, lm(), lora(init_lora_weights="pissa"))
    refused("bias='all' trains biases", tmp_path, lm(), lora(bias="all"))
    wrapped = get_peft_model(lm(), lora(bias="lora_only"))
    refused("bias='lora_only' trains biases", tmp_path, wrapped)
    refused("has an adapter already", tmp_path, get_peft_model(lm(), lora()), lora())
    refused("no parameter of the model is trainable", tmp_path, lm().requires_grad_(False))
    assert not any(tmp_path.iterdir())


def test_the_smollm2_recipe_reports_both_features(base, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", "b a")))
    script = GDC_RECIPE.parents[1] / "smollm2" / "run.py"
    options = {"config": script.with_name("config.yaml"), "model_name_or_path": base, "output_dir": tmp_path / "o"}
    options |= {"data": prompts, "pointwise": "contains:b", "moment": "contains:a=0.6", "dtype": "float32", "lora_r": 1}
    options |= {"max_steps": 2, "max_completion_length": 3, "num_generations": 32, "lora_target_modules": "q_proj"}
    options |= {"fit_samples": 128, "reference_samples": 128, "eval_samples": 64, "disable_tqdm": "true"}
    recipe = runpy.run_path(str(script))
    recipe["main"]([word for name, value in options.items() for word in (f"--{name}", *str(value).split())])
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert {name: row["wanted"] for name, row in report["features"].items()} == {"contains:b": 1.0, "contains:a": 0.6}
    assert all(0 <= row["p_value"] <= 1 and row["samples"] == [64, 64] for row in report["features"].values())
    assert 1 < report["memory_ratio"] < 1.1 and set(report["after"]["samples"]) == {"a", "b a"}
    assert {"adapter_model.safetensors", "target.json"} <= {path.name for path in (tmp_path / "o" / "model").iterdir()}
    # 30 of 100 against 50 of 100: z = 0.2 / sqrt(0.21 / 99 + 0.25 / 99) = 2.934
    few, many = (torch.tensor([1.0] * n + [0.0] * (100 - n)) for n in (30, 50))
    assert recipe["z_test"](few, many) == pytest.approx(0.00335, abs=2e-5)
