"""A reward model that is an adapter: on the policy's own base weights, the same numbers as with a base of its own."""

import shutil
import warnings

import pytest
import tiny
import torch
from peft import AutoPeftModelForSequenceClassification, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_ppo import lora, ppo
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hf_gdc import GDCConfig, GDCTrainer, Reference, Reward
from hf_gdc.reward_models import RewardAdapter, reward_model

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def judge_on(base, folder, config=None, seed=0):
    """A reward adapter with random weights, saved with its tokenizer; its stand-alone model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=EVERY_LAYER, task_type="SEQ_CLS") if config is None else config
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base model and a reward adapter on it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.model(3, 0.2, torch.float32, hidden_size=128).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return str(folder / "base"), judge_on(folder / "base", folder / "judge")


@torch.no_grad()
def alone(judge, rollouts) -> torch.Tensor:
    """Rewards from plain forward passes of the saved reward model, text by text."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(judge, num_labels=1).eval()
    texts = [prompt + text for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)]
    rows = [torch.tensor([tiny.tokenizer()(text)["input_ids"] or [0]]) for text in texts]
    return torch.cat([model(input_ids=row).logits[:, 0] for row in rows]).double()


def adapted(folder, base, judge, **options):
    options = {"peft_config": lora("q_proj", "v_proj"), "critic": "adapter", "prompts": ("a ", "b a ")} | options
    return ppo(folder, base, reward_funcs=judge, **options)


def rollouts_of(trainer):
    return trainer._make_rollouts([{"prompt": prompt} for prompt in ("a ", "b a ") for _ in range(16)])


def test_rewards_on_the_shared_base_are_those_of_the_model_alone(places, tmp_path):
    """Whatever the policy has learned, and the policy leaves the reward's weights alone."""
    trainer = adapted(tmp_path, *places, max_steps=4, learning_rate=0.05, critic_learning_rate=0.05)
    model = trainer.model
    assert sorted(model.peft_config) == ["critic", "default", "reward"] and model.active_adapter == "default"
    before = {name: p.clone() for name, p in model.named_parameters() if ".reward." in name}
    assert len(before) == 14 and not any(p.requires_grad for name, p in model.named_parameters() if name in before)
    trainer.train()
    assert model.active_adapter == "default"
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], p) for name, p in before.items())
    moved = [name for name, p in named.items() if "lora_B.default" in name and p.abs().max() > 1e-3]
    assert moved
    rollouts = rollouts_of(trainer)
    wanted = alone(places[1], rollouts)
    assert wanted.std() > 0.1
    rewards = trainer.reward.rewards(rollouts)
    torch.testing.assert_close(rewards, wanted, rtol=0, atol=1e-5)
    with_own_base = reward_model(places[1])(rollouts.prompts, rollouts.texts)
    torch.testing.assert_close(with_own_base, wanted, rtol=0, atol=1e-5)
    reference = tiny.log_probs(trainer, AutoModelForCausalLM.from_pretrained(places[0]), rollouts)
    torch.testing.assert_close(rollouts.scores["reference_logp"], reference, rtol=1e-4, atol=1e-5)


def test_one_base_for_policy_reference_reward_and_critic(places, tmp_path):
    """Parameters and buffers of all of them, those that several use once, are at most 1.2 times the base model's."""
    base = AutoModelForCausalLM.from_pretrained(places[0])
    alone = sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    for critic in ("shared", "adapter"):
        trainer = adapted(tmp_path / critic, *places, critic=critic)
        trainer.train()
        head = trainer.reward.features[0].function._reader.model
        found = {id(t): t for t in (*trainer.actors.tensors(), *head.parameters(), *head.buffers())}
        assert alone < sum(t.nbytes for t in found.values()) <= 1.2 * alone
        assert id(head.score.weight) in found and len(found) == len(trainer.actors.tensors()) + 1


def test_what_is_saved_is_the_policy_alone(places, tmp_path):
    trainer = adapted(tmp_path / "run", *places)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()} == {"critic"}
    assert sorted(trainer.model.peft_config) == ["critic", "default", "reward"]
    trainer.model.peft_config[
        "default"
    ].inference_mode = True  # as a user may have loaded it: it is the policy all the same
    trainer.save_model(str(tmp_path / "frozen"))
    assert (tmp_path / "frozen" / "adapter_model.safetensors").is_file()
    trainer.target.save_pretrained(tmp_path / "model")
    again = adapted(tmp_path / "again", str(tmp_path / "model"), places[1], peft_config=None)
    assert "reward" in again.model.peft_config  # the base of a saved adapter is known as well
    rollouts = rollouts_of(again)
    torch.testing.assert_close(again.reward.rewards(rollouts), alone(places[1], rollouts), rtol=0, atol=1e-5)


def test_a_resumed_run_is_bit_equal(places, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "learning_rate": 0.05}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole = adapted(tmp_path / "whole", *places, **options)
    whole.train()
    adapted(tmp_path / "cut", *places, callbacks=[Stop()], **options).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3", ignore_errors=True)  # as if killed after step 3
    torch.manual_seed(99)
    resumed = adapted(tmp_path / "cut", *places, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert any(".reward." in name for name in first)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    rollouts = rollouts_of(whole)
    assert torch.equal(whole.reward.rewards(rollouts), alone_on(resumed, rollouts))


def alone_on(trainer, rollouts) -> torch.Tensor:
    return trainer.reward.features[0].function(rollouts.prompts, rollouts.texts)


def test_several_rewards_and_any_trainer(places, tmp_path):
    """Each reward adapter has a name of its own; an adapter of the policy on whole modules is switched off with it."""
    other = judge_on(places[0], tmp_path / "other", seed=5)
    target = Reference() * Reward([places[1], other], beta=0.5, reward_weights=[1.0, 2.0])
    args = GDCConfig(str(tmp_path / "run"), max_steps=2, max_completion_length=3, fit_samples=64, use_cpu=True)
    args.per_device_train_batch_size, args.save_strategy, args.learning_rate = 32, "no", 0.05
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    trainer = GDCTrainer(places[0], target, args=args, processing_class=tiny.tokenizer(), peft_config=config)
    trainer.train()
    assert sorted(trainer.model.peft_config) == ["default", "reward", "reward_2"]
    rollouts = trainer._last_rollouts
    rollouts.scores.clear()
    wanted = alone(places[1], rollouts) + 2 * alone(other, rollouts)
    torch.testing.assert_close(target.terms[1][0].rewards(rollouts), wanted, rtol=0, atol=3e-5)


def test_without_a_base_to_share_it_loads_its_own(places, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = ppo(tmp_path / "whole", places[0], reward_funcs=places[1], prompts=("a ", "b a "))
    rollouts = rollouts_of(whole)
    torch.testing.assert_close(whole.reward.rewards(rollouts), alone(places[1], rollouts), rtol=0, atol=1e-5)
    shutil.copytree(places[0], tmp_path / "base")
    with pytest.warns(
        UserWarning, match=r"can't share the policy's base \(LORA on .*/base\): it gets a model of its own"
    ):
        trainer = adapted(tmp_path / "other", str(tmp_path / "base"), places[1])
    assert "reward" not in trainer.model.peft_config
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    with pytest.warns(UserWarning, match=r"\(LORA on .*\) can't share the policy's base \(IA3"):
        adapted(tmp_path / "ia3", *places, critic="shared", peft_config=ia3)


def test_adapters_that_are_no_reward_model(places, tmp_path):
    shutil.copytree(places[1], tmp_path / "mute")
    for file in (tmp_path / "mute").glob("*token*"):
        file.unlink()
    with pytest.raises(
        ValueError, match="there is no tokenizer beside the reward adapter .*mute.*reward_processing_classes"
    ):
        Reward(str(tmp_path / "mute"), 1.0)
    Reward(str(tmp_path / "mute"), 1.0, reward_processing_classes=tiny.tokenizer())
    lm = get_peft_model(AutoModelForCausalLM.from_pretrained(places[0]), lora())
    lm.save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="is for CAUSAL_LM, and a reward model's is for SEQ_CLS"):
        Reward(str(tmp_path / "lm"), 1.0)
    bare = AutoModelForSequenceClassification.from_pretrained(places[0], num_labels=1)
    bare = get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    folder = tmp_path / "headless"
    bare.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ValueError, match="lacks score.weight, which would be random: train it with modules_to_save"):
        adapted(tmp_path / "run", places[0], str(folder))
    with pytest.raises(ValueError, match="lacks .*score.weight"):
        RewardAdapter(str(folder), None, 4, None)(["a "], ["b"])
