"""The recipe that runs TRL's trainers: on the enumerable language RLOO and PPO come to a exp(r / beta) / Z, GRPO beside it."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_gdc import Reference, Reward, SmallGPTConfig, SmallGPTForCausalLM
from recipes.trl import ppo, run

BETA = 1.0
SMALL = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "report_to": "none"}
SMALL |= {"save_strategy": "no", "disable_tqdm": "true", "learning_rate": "1e-2", "lr_scheduler_type": "linear"}
GROUP = {"max_steps": "100", "num_generations": "64", "per_device_train_batch_size": "64", "beta": str(BETA)}
GROUP |= {"max_completion_length": str(tiny.LENGTH)}


@pytest.fixture
def saved(tmp_path):
    """The folder of a reference with its tokenizer."""
    folder = tmp_path / "reference"
    tiny.model(3, 0.2, torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def trained(method: str, saved, **options):
    """The model that the recipe saves."""
    given = {"method": method, "model_name_or_path": saved, "reward": "count:a", "output_dir": saved.parent / "out"}
    words = [word for name, value in (given | SMALL | options).items() for word in (f"--{name}", str(value))]
    run.main(words)
    return AutoModelForCausalLM.from_pretrained(saved.parent / "out" / "model")


def kl_to_target(lm, folder, reference=None) -> float:
    """KL(p || lm), p = a exp(count_a / BETA) / Z, by enumeration."""
    target = Reference() * Reward(tiny.count_a, BETA)
    trainer = tiny.trainer(target, folder / "judge", reference or tiny.model(3, 0.2, torch.float32))
    rollouts = tiny.enumerated(trainer, sampler=lm)
    log_p = tiny.exact_log_p(trainer, rollouts, 1)
    return float((log_p.exp() * (log_p - rollouts.sampler_logp_B)).sum())


def test_rloo_and_grpo_from_the_recipe(saved, tmp_path):
    """RLOO arrives at p. GRPO moves towards it and comes to rest elsewhere, as test_rloo.py says."""
    before = kl_to_target(AutoModelForCausalLM.from_pretrained(saved), tmp_path)
    rloo = kl_to_target(trained("rloo", saved, **GROUP), tmp_path)
    again = {"overwrite": "true", "scale_rewards": "none"}
    grpo = kl_to_target(trained("grpo", saved, **GROUP, **again), tmp_path)
    assert rloo < 0.01 < 0.2 < before
    assert rloo < grpo < before


def test_an_output_folder_is_not_overwritten(saved):
    (saved.parent / "out").mkdir()
    (saved.parent / "out" / "mine.txt").write_text("of the user")
    with pytest.raises(ValueError, match="not empty"):
        trained("rloo", saved, **GROUP)


def tokenizer_with_padding() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "P"})
    return tokenizer


def test_a_reward_function_is_a_reward_model_for_trls_ppo():
    """Each completion's own reward at every token, whatever padding is behind it."""
    tokenizer = tokenizer_with_padding()
    reward = ppo.FunctionReward([tiny.count_a, lambda completions, **_: [len(c) for c in completions]], tokenizer, 2)
    ids = torch.tensor([[1, 2, 1, 1, 2], [1, 1, 2, 0, 3]])  # the prompts are "a b" and "a a"
    hidden = reward.backbone(input_ids=ids.masked_fill(ids == 3, 0), attention_mask=ids != 3).hidden_states[-1]
    wanted = torch.tensor([2.0 + len("a a b"), 0.0 + len("b")])
    torch.testing.assert_close(reward.score(hidden)[..., 0], wanted[:, None].expand(2, 5))


def test_ppo_refuses_what_it_would_get_wrong(saved):
    args, model = None, AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match="padding token that is not EOS"):
        ppo.trl_ppo(model, [tiny.count_a], args, ["a"], tiny.tokenizer())
    with pytest.raises(ValueError, match="one length"):
        ppo.trl_ppo(model, [tiny.count_a], args, ["a", "a b"], tokenizer_with_padding())


def with_padding() -> SmallGPTForCausalLM:
    """A model of four tokens, the last of which, padding, has a logit of -30 everywhere."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 3}
    lm = SmallGPTForCausalLM(SmallGPTConfig(vocab_size=4, norm_type="layer", tie_word_embeddings=False, **size, **ids))
    with torch.no_grad():
        lm.model.norm.weight[0], lm.model.norm.bias[0] = 0.0, 1.0  # one of the hidden states is always 1
        lm.lm_head.weight[:, 0], lm.lm_head.weight[3] = 0.0, 0.0
        lm.lm_head.weight[3, 0] = -30.0
    return lm


def test_ppo_of_trl_from_the_recipe(saved, tmp_path):
    """Only with TRL 1.12 in front: `make test-trl-ppo`."""
    pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 has no PPO any more")
    tokenizer_with_padding().save_pretrained(saved)
    with_padding().save_pretrained(saved)
    before = kl_to_target(with_padding(), tmp_path, with_padding())
    options = {"total_episodes": 64 * 80, "per_device_train_batch_size": 64, "response_length": tiny.LENGTH}
    options |= {"stop_token": "eos", "temperature": 1.0, "kl_coef": BETA, "num_sample_generations": 0, "world_size": 1}
    lm = trained("ppo", saved, **options)
    assert before > 0.2 and kl_to_target(lm, tmp_path, with_padding()) < 0.02


@pytest.mark.skipif("trl_has_ppo()")
def test_without_ppo_the_recipe_says_where_it_is(saved):
    with pytest.raises(ValueError, match="make test-trl-ppo"):
        trained("ppo", saved)


def trl_has_ppo() -> bool:
    try:
        ppo.import_ppo()
    except ValueError:
        return False
    return True
