"""The critic: whose values it gives, that it survives saving and resuming, and what it costs in memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from test_ppo import lora, ppo, weighed
from test_processes import launch
from test_resume import assert_equal
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_gdc import PPOTrainer

WORKER = Path(__file__).parent / "worker.py"
KINDS = ["shared", "separate", "adapter"]
EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(3, 0.2, torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def trainer_of(kind: str, folder, base, **options) -> PPOTrainer:
    adapter = {"peft_config": lora(*EVERY_LAYER)} if kind == "adapter" else {}
    return ppo(folder, str(base), critic=kind, **adapter, **options)


@torch.no_grad()
def states(model, rollouts) -> torch.Tensor:
    """Hidden states before each token, from a plain forward of the backbone."""
    ids = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT], 1)
    mask = torch.cat([rollouts.prompt_mask_BP, rollouts.completion_mask_BT], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return out[:, rollouts.prompt_ids_BP.shape[1] - 1 : -1]


@pytest.mark.parametrize("kind", KINDS)
def test_values_come_from_the_critics_own_weights(kind, base, tmp_path):
    """And training them leaves the reference, the saved weights' names and the policy's adapter alone."""
    trainer = trainer_of(kind, tmp_path, base, max_steps=3, critic_learning_rate=3e-2)
    trainer.train()
    model, rollouts = trainer.model, weighed(trainer)
    head, mask = model.critic.head, rollouts.completion_mask_BT
    assert head.weight.abs().max() > 1e-3
    plain = model.get_base_model() if kind == "adapter" else model
    if kind == "adapter":
        model.set_adapter("critic")
    hidden = states(model.critic.backbone if kind == "separate" else plain.model, rollouts)
    if kind == "adapter":
        model.set_adapter("default")
    values = (hidden @ head.weight.T + head.bias).squeeze(-1).detach()
    torch.testing.assert_close(rollouts.values_BT[mask], values[mask], rtol=1e-4, atol=1e-6)
    own = states(plain.model, rollouts)  # the policy's
    assert ((own - hidden).abs().max() < 1e-6) == (kind == "shared")
    torch.testing.assert_close(
        rollouts.scores["reference_logp"],
        tiny.log_probs(trainer, AutoModelForCausalLM.from_pretrained(base), rollouts),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_has_gradients_and_its_own_learning_rate(kind, base, tmp_path):
    trainer = trainer_of(kind, tmp_path, base, critic_learning_rate=7e-3, learning_rate=1e-4)
    optimizer = trainer.create_optimizer()
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    critic = {name for name in rates if "critic" in name}
    assert {rates[name] for name in critic} == {7e-3} and {rates[name] for name in rates.keys() - critic} == {1e-4}
    assert rates.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    backbone = {"shared": 0, "separate": 10, "adapter": 14}[kind]
    assert len(critic) >= 2 + backbone and not any("lm_head" in name for name in critic)
    rollouts = weighed(trainer)
    torch.nn.init.normal_(trainer.model.critic.head.weight)
    trainer.sample_losses(trainer.model, rollouts)[0].mean().backward()
    without = {name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_critic_is_loaded_and_the_model_is_as_ever(kind, base, tmp_path):
    trainer = trainer_of(kind, tmp_path / "run", base, max_steps=3, critic_learning_rate=3e-2)
    trainer.train()
    folder = tmp_path / "model"
    trainer.save_model(str(folder))
    if kind == "adapter":
        policy = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert list(policy.peft_config) == ["default"]
    else:
        policy, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert not any("critic" in name for name in load_file(folder / "model.safetensors"))
    rollouts = weighed(trainer)
    torch.testing.assert_close(tiny.log_probs(trainer, policy, rollouts), rollouts.policy_logp_B, rtol=0, atol=1e-5)
    adapter = {"peft_config": lora(*EVERY_LAYER)} if kind == "adapter" else {}
    for place in (folder, folder / "critic"):
        again = ppo(tmp_path / "again", str(base), critic=kind, critic_path=str(place), **adapter)
        loaded = dict(again.model.named_parameters())
        own = {name: p for name, p in trainer.model.named_parameters() if "critic" in name}
        assert own and all(torch.equal(loaded[name], p) and loaded[name].requires_grad for name, p in own.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal(kind, base, tmp_path):
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_iterations": 2,
        "steps_per_generation": 2,
    }
    options |= {"per_device_train_batch_size": 16, "kl_target": 0.5, "critic_learning_rate": 3e-2}
    whole = trainer_of(kind, tmp_path / "whole", base, **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    cut = trainer_of(kind, tmp_path / "cut", base, callbacks=[Stop()], **options)
    cut.train()
    assert cut.state.global_step == 3
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3", ignore_errors=True)  # as if killed after step 3
    torch.manual_seed(99)
    resumed = trainer_of(kind, tmp_path / "cut", base, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert any("critic" in name for name in first)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.kl_coef == whole.kl_coef != 0.05
    optimizers = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert_equal(*optimizers)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path):
    def run(folder, resume: str, kill_at: int) -> int:
        command = [sys.executable, str(WORKER), "ppo", str(folder), resume, str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600).returncode

    assert run(tmp_path / "whole", "fresh", 0) == 0
    assert run(tmp_path / "cut", "fresh", 5) == -9
    assert run(tmp_path / "cut", "resume", 0) == 0
    assert_equal(torch.load(tmp_path / "cut" / "end0.pt"), torch.load(tmp_path / "whole" / "end0.pt"))


def test_two_processes_train_one_critic(tmp_path):
    """Each samples for itself; policy, critic and KL coefficient stay the same on both."""
    launch(2, "ppo", str(tmp_path), "fresh", "0")
    one, two = (torch.load(tmp_path / f"end{rank}.pt") for rank in (0, 1))
    assert one.pop("texts") != two.pop("texts")
    assert not torch.equal(one["random"], two["random"])
    one.pop("random"), two.pop("random")
    assert_equal(one, two)


def test_policy_reference_and_critic_share_one_base(tmp_path):
    """Parameters and buffers, the reward's too, are at most 1.2 times those of the base model."""
    lm = tiny.model(3, 0.2, torch.float32, hidden_size=128)
    alone = sum(t.nbytes for t in (*lm.parameters(), *lm.buffers()))
    for kind in ("shared", "adapter"):
        lm = tiny.model(3, 0.2, torch.float32, hidden_size=128)
        trainer = ppo(tmp_path / kind, lm, critic=kind, peft_config=lora())
        trainer.train()
        assert alone < sum(t.nbytes for t in trainer.actors.tensors()) <= 1.2 * alone


def refused(message: str, tmp_path, lm=None, **options) -> None:
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path / "refused", lm, **options)


def test_critics_that_do_not_fit_are_refused(tmp_path):
    refused("critic must be 'shared' or 'adapter' or 'separate', but is 'own'", tmp_path, critic="own")
    refused("give a peft_config, or use 'shared'", tmp_path, critic="adapter")
    refused("copies the backbone of a model that is trained whole", tmp_path, critic="separate", peft_config=lora())
    refused("activation checkpointing", tmp_path, critic="adapter", peft_config=lora(), gradient_checkpointing=True)
    refused("there is no critic in", tmp_path, critic_path=str(tmp_path))
    trainer = ppo(tmp_path / "small")
    trainer.save_model(str(tmp_path / "model"))
    other = tiny.model(3, 0.2, torch.float32, hidden_size=32)
    refused("of another kind or size", tmp_path, other, critic_path=str(tmp_path / "model"))
    refused("so it does not fit", tmp_path, critic="adapter", peft_config=lora(), critic_path=str(tmp_path / "model"))


def test_a_models_own_optimizer_gets_the_critic(tmp_path):
    lm = tiny.model(3, 0.2, torch.float32)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    trainer = ppo(tmp_path, lm, optimizers=(optimizer, None), max_steps=2)
    trainer.train()
    assert trainer.model.critic.head.weight.abs().max() > 0


def test_activation_checkpointing_changes_nothing(tmp_path):
    ends = []
    for name, on in (("plain", False), ("checkpointed", True)):
        trainer = ppo(tmp_path / name, tiny.model(3, 0.2), max_steps=3, gradient_checkpointing=on)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == on
        ends.append(trainer.model.state_dict())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-6)
    assert (ends[0]["lm_head.weight"] - tiny.model(3, 0.2).lm_head.weight).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_in_half_precision_has_values_in_single(kind, tmp_path):
    """bfloat16 has 8 bits: a head in it could not tell returns apart, and small steps would round to nothing."""
    tiny.model(3, 0.2, torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options = {"max_steps": 3, "critic_learning_rate": 1e-4, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = trainer_of(kind, tmp_path / "run", tmp_path / "base", **options)
    head = trainer.model.critic.head
    assert head.weight.dtype == head.bias.dtype == torch.float32
    trainer.train()
    rollouts = weighed(trainer)
    assert rollouts.values_BT.dtype == rollouts.returns_BT.dtype == torch.float32
    moved = head.weight.abs()
    assert 0 < float(moved.max()) < 1e-3 and torch.isfinite(moved).all()
    states_BTH = states(_critics_backbone(trainer, kind), rollouts)
    values_BT = (states_BTH.float() @ head.weight.T + head.bias).squeeze(-1).detach()
    mask_BT = rollouts.completion_mask_BT
    torch.testing.assert_close(rollouts.values_BT[mask_BT], values_BT[mask_BT], rtol=0.05, atol=1e-5)
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "critic" / "critic.safetensors")
    assert torch.equal(saved["head.weight"], head.weight)


def _critics_backbone(trainer, kind: str):
    if kind == "adapter":
        trainer.model.set_adapter("critic")
        return trainer.model.get_base_model().model
    return trainer.model.critic.backbone if kind == "separate" else trainer.model.model
