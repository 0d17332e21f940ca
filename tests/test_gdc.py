"""The trainer as its users meet it: what it logs and evaluates, prompts of every kind, and bad input."""

import json
import math
import warnings

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from hf_gdc import GDCConfig, GDCTrainer, Moment, Pointwise, Reference, Reward, get_divergence

LOGGED = {"kl_target_policy", "kl_policy_target", "js", "tv", "kl_policy_reference", "log_z", "log_z_stderr", "ess"}
LOGGED |= {"in_support", "entropy", "features/has_b"}
LOGGED |= {f"completions/{which}_length" for which in ("mean", "min", "max")}


def small(**options):
    return {"lm": tiny.model(0, 0.5, torch.float32), "per_device_train_batch_size": 64, "learning_rate": 1e-2} | options


def test_logs_and_evaluation_have_what_the_readme_says(tmp_path):
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, **small(max_steps=4, logging_steps=1))
    trainer.train()
    row = trainer.state.log_history[1]
    assert LOGGED | {"samples_per_second", "loss", "grad_norm", "pseudo_reward"} <= set(row)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in LOGGED} | {"eval_kl_target_policy_stderr"} <= set(metrics)
    json.dumps(trainer.state.log_history, allow_nan=False)


@pytest.mark.parametrize("prompts", [None, ["a", "b b"]], ids=["unconditional", "prompts"])
def test_evaluation_agrees_with_enumeration(prompts, tmp_path):
    options = {
        "eval_samples": 4096,
        "reference_samples": 8192,
        "per_device_eval_batch_size": 4096,
        "num_generations": 32,
    }
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, prompts=prompts, **small(max_steps=20, **options))
    trainer.train()
    metrics = trainer.evaluate()
    every = tiny.enumerated(trainer, prompts or ("",), sampler=trainer.model)
    groups = len(prompts or [""])
    log_p = tiny.exact_log_p(trainer, every, groups).view(groups, -1)
    logp = every.policy_logp_B.view(groups, -1)
    for name, log_name in {"kl": "kl_target_policy", "js": "js", "tv": "tv", "hellinger": "hellinger"}.items():
        exact = (
            sum(tiny.exact_divergence(get_divergence(name), *pair) for pair in zip(logp, log_p, strict=True)) / groups
        )
        # 4 standard errors, as reported
        assert abs(metrics[f"eval_{log_name}"] - float(exact)) < 4 * metrics[f"eval_{log_name}_stderr"], name
    reference = trainer.actors.reference_logp(every).view(groups, -1)
    exact = float((logp.exp() * (logp - reference)).sum(1).mean())
    assert metrics["eval_kl_policy_reference"] == pytest.approx(exact, abs=0.05)
    assert metrics["eval_in_support"] == pytest.approx(float(logp[log_p > -math.inf].exp().sum()) / groups, abs=0.03)


def test_evaluation_leaves_training_alone(tmp_path):
    ends = []
    for name, every in (("with", 2), ("without", 1000)):
        options = small(max_steps=6, eval_strategy="steps", eval_steps=every, eval_samples=32, reference_samples=64)
        trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path / name, **options)
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*ends)


def test_accumulation_and_inner_steps_equal_one_large_batch(tmp_path):
    """Four micro-batches of 16 make the same step as one batch of 64, from the same rollouts."""
    ends = []
    for name, options in {
        "one": {"per_device_train_batch_size": 64},
        "four": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
    }.items():
        lm = tiny.model(0, 0.5)
        trainer = tiny.trainer(
            tiny.HARD["pointwise"](), tmp_path / name, lm, **options, learning_rate=1e-3, max_steps=1
        )
        given = trainer.actors.draw([{"prompt": ""}] * 64, from_reference=True, salt=5)
        trainer.actors.sample_policy = lambda rows, given=given: given
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_off_policy_inner_steps_learn(tmp_path):
    options = small(num_iterations=2, steps_per_generation=2, max_steps=80, per_device_train_batch_size=128)
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, **options)
    trainer.train()
    assert trainer.evaluate()["eval_in_support"] > 0.95
    ratios = [row["sampling/importance_ratio"] for row in trainer.state.log_history if "loss" in row]
    assert all(0.9 < ratio < 1.1 for ratio in ratios)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_datasets_and_columns(streaming, tmp_path):
    rows = [{"prompt": prompt, "wanted": wanted} for prompt, wanted in [("a", 1), ("b", 2), ("a b", 1), ("b b", 2)]]
    dataset = Dataset.from_list(rows)
    seen = []

    def has_wanted(completion_ids, wanted, prompts, **_):
        seen.extend(zip(prompts, wanted, strict=True))
        return [float(w in ids) for ids, w in zip(completion_ids, wanted, strict=True)]

    args = GDCConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        fit_samples=64,
    )
    trainer = GDCTrainer(
        tiny.model(0, 0.5, torch.float32),
        Reference() * Pointwise(has_wanted),
        args=args,
        train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
        processing_class=tiny.tokenizer(),
    )
    assert not streaming or isinstance(trainer.train_dataset, IterableDataset)
    trainer.train()
    assert {(row["prompt"], row["wanted"]) for row in rows} == set(seen)
    batch = trainer._last_rollouts
    assert len(set(batch.prompts)) == 2 and all(batch.prompts.count(prompt) == 8 for prompt in batch.prompts)


def test_lora_has_the_adapter_off_model_as_its_reference(tmp_path):
    lm = tiny.model(0, 0.5, torch.float32)
    weights = {name: value.clone() for name, value in lm.state_dict().items()}
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path / "x", lm)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    args = trainer.args
    args.output_dir, args.max_steps = str(tmp_path / "lora"), 5
    adapted = GDCTrainer(
        tiny.model(0, 0.5, torch.float32),
        tiny.HARD["pointwise"](),
        args=args,
        processing_class=tiny.tokenizer(),
        peft_config=config,
    )
    rollouts = tiny.enumerated(trainer)
    expected = trainer.actors.reference_logp(rollouts)
    rollouts.scores.clear()
    adapted.train()
    torch.testing.assert_close(adapted.actors.reference_logp(rollouts), expected, rtol=1e-5, atol=1e-6)
    assert (adapted.actors.policy_logp(rollouts) - expected).abs().max() > 1e-3
    base = adapted.model.get_base_model().state_dict()
    for name, value in weights.items():
        inner = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(base.get(inner, base.get(name)), value), name


def test_early_stopping_and_best_model_by_a_divergence(tmp_path):
    options = small(max_steps=40, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    options |= {"eval_samples": 512, "reference_samples": 512, "metric_for_best_model": "eval_js"}
    options |= {"greater_is_better": False, "load_best_model_at_end": True, "learning_rate": 0.0, "save_total_limit": 2}
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step < 40 and trainer.state.best_metric is not None


def test_completions_are_printed_and_written(tmp_path, capsys):
    options = small(max_steps=2, logging_steps=1, log_completions=True, num_completions_to_print=3)
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, **options)
    trainer.train()
    table = Dataset.from_parquet(str(tmp_path / "completions" / "completions_00001.parquet"))
    assert len(table) == 64 and {"prompt", "completion", "has_b", "log_prob"} <= set(table.column_names)
    assert [float("b" in text) for text in table["completion"]] == table["has_b"]
    assert capsys.readouterr().out.count("[1] ") == 3


def test_the_moment_is_met_and_refitted(tmp_path):
    """With few samples at the start lambda is off; refits on the trained policy's samples bring it to the exact one."""
    target = tiny.HARD["pointwise and moment"]()
    options = small(max_steps=80, fit_samples=48, per_device_train_batch_size=256)
    trainer = tiny.trainer(target, tmp_path, **options)
    trainer.train()
    assert trainer.target.version >= 3
    every = tiny.enumerated(trainer, sampler=trainer.model)
    log_p = tiny.exact_log_p(trainer, every, 1)
    mean = float(log_p.exp() @ torch.tensor(tiny.count_a(every.completion_ids())).double())
    # sd of count_a is about 0.8; each fit has at least half of the window's last ESS
    assert mean == pytest.approx(0.8, abs=4 * 0.8 / math.sqrt(trainer.target.ess))


# ---- bad input ----


def fails(message: str, target, tmp_path, prompts=None, train=True, **options):
    with pytest.raises(ValueError, match=message):
        trainer = tiny.trainer(target, tmp_path, prompts=prompts, **small(**options))
        if train:
            trainer.train()


def test_refusals(tmp_path):
    soft, hard = tiny.SOFT["reward"](), tiny.HARD["pointwise"]()
    fails("Did you mean 'reverse_kl'", soft, tmp_path, divergence="revers_kl")
    fails("Did you mean `divergence`", soft, tmp_path, divergense="js")
    fails("Use js, kl, tv, hellinger or alpha below 1", hard, tmp_path, divergence="reverse_kl")
    fails("multiple of num_generations", soft, tmp_path, prompts=["a"], num_generations=7)
    fails("has 1 prompts, and one batch of rollouts takes 8", soft, tmp_path, prompts=["a"])
    fails("is empty", soft, tmp_path, prompts=[])
    fails("set max_steps", soft, tmp_path, max_steps=-1)
    fails("exceed the model's context of 16", soft, tmp_path, prompts=["a " * 20] * 8)
    fails("'nan_feature' returned nan for sample", Reference() * Pointwise(nan_feature), tmp_path)
    fails("'short' returned 1 values for", Reference() * Pointwise(short), tmp_path)
    fails("must be 0 or 1 but gave", Reference() * Pointwise(tiny.count_a), tmp_path)
    fails("lies outside of what the", hard * Moment(tiny.count_a, 2.5), tmp_path)
    fails("none of 320 samples satisfies \\[never\\]", Reference() * Pointwise(never), tmp_path)
    assert not any(tmp_path.rglob("*.pt"))


def test_reward_clip_lets_reverse_kl_meet_a_hard_constraint(tmp_path):
    options = small(divergence="reverse_kl", reward_clip=5.0, max_steps=60, per_device_train_batch_size=256)
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, **options)
    trainer.train()
    assert trainer.evaluate()["eval_in_support"] > 0.97


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    args = GDCConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(ValueError, match="no EOS token"):
        GDCTrainer(tiny.model(0), Reference() * Reward(tiny.count_a, 1.0), args=args, processing_class=tokenizer)


def test_a_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trainer = tiny.trainer(tiny.SOFT["reward"](), tmp_path, **small())
    with pytest.raises(ValueError, match="resume_from_checkpoint=True .*overwrite=True"):
        trainer.train()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def never(completion_ids, **_):
    return [0.0] * len(completion_ids)


def nan_feature(completion_ids, **_):
    return [float("nan")] * len(completion_ids)


def short(completion_ids, **_):
    return [1.0]


def test_rewards_that_are_all_equal_are_a_warning(tmp_path):
    def constant(completions, **_):
        return [0.7] * len(completions)

    trainer = tiny.trainer(Reference() * Reward(constant, 0.5), tmp_path)
    with pytest.warns(UserWarning, match="all 8 completions of a set of rollouts got the same reward, 0.7"):
        trainer._make_rollouts([{"prompt": ""}] * 8)
    other = tiny.trainer(tiny.SOFT["reward"](), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other._make_rollouts([{"prompt": ""}] * 32)
