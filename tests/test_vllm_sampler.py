"""vLLM's rollouts: a small engine with the interface of TRL's, which samples from our own models token by token."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
from builders import letters, small_gpt
from peft import LoraConfig, PeftModel
from test_ppo import ppo
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from hf_gdc import DistillationConfig, DistillationTrainer, Teacher, vllm_sampler
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer
from hf_gdc.vllm_sampler import VLLMSampler

PROMPTS = ["a b c", "d", "e f"]


class Engine:
    """Has the weights of its last sync; writes `tail` tokens behind EOS, if asked."""

    def __init__(self, model, max_completion_length, temperature=1.0, tail=0, reports="processed_logprobs", **options):
        self.model, self.length, self.temperature, self.tail = model, max_completion_length, temperature, tail
        self.eos, self.options, self.pushed, self.own = 0, options, [], None
        info = {"model_config": {"logprobs_mode": reports}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    def sync_weights(self):
        adapted = isinstance(self.model, PeftModel)
        if adapted:
            self.model.merge_adapter()
        self.own, self.known = copy.deepcopy(self.model).eval(), {}
        self.pushed.append([name for name, _ in self.model.named_parameters()])
        if adapted:
            self.model.unmerge_adapter()

    def next_logps(self, *ids):
        if ids not in self.known:
            logits = self.own(input_ids=torch.tensor([ids])).logits[0, -1].double()
            self.known[ids] = torch.log_softmax(logits / self.temperature, -1)
        return self.known[ids]

    @torch.no_grad()
    def generate(self, prompts, images, num_generations):
        assert images is None and num_generations == 1
        completions, logprobs = [], []
        for prompt in prompts:
            ids, logps = [], []
            while len(ids) < self.length and self.eos not in ids:
                logp = self.next_logps(*prompt, *ids)
                ids.append(int(torch.multinomial(logp.exp(), 1)))
                logps.append([float(logp[ids[-1]])])
            more = self.tail if ids[-1] == self.eos else 0
            completions.append(ids + [5] * more)
            logprobs.append(logps + [[-1.0]] * more)
        return prompts, completions, logprobs, None


def sampler_of(model, tail=0, temperature=1.0, length=6) -> VLLMSampler:
    base = TransformersSampler(letters(), length, max_context=64, temperature=temperature)
    return VLLMSampler(base, Engine(model, length, temperature, tail=tail), model)


@pytest.mark.parametrize("tail", [0, 2])
def test_tokens_masks_and_log_probs(tail):
    """As `TransformersSampler` gives them, and log q is the model's own where nothing is warped."""
    torch.manual_seed(0)
    model, prompts = small_gpt(), PROMPTS * 20
    sampler = sampler_of(model, tail)
    sampler.sync()
    rollouts = sampler(model, prompts, {"topic": list(range(60))})
    ids, mask, keys = sampler.base.encode(prompts)
    assert torch.equal(rollouts.prompt_ids_BP, ids) and torch.equal(rollouts.prompt_mask_BP, mask)
    assert torch.equal(rollouts.prompt_key_B, keys) and rollouts.columns == {"topic": list(range(60))}
    rows = rollouts.completion_ids()
    ended = [row for row in rows if row[-1] == 0]
    assert 10 < len(ended) < 60 and all(row.count(0) <= 1 for row in rows)
    assert all(row[-1] == 0 or len(row) == 6 for row in rows)
    assert rollouts.texts == sampler.base.decode(rollouts.completion_ids_BT, rollouts.completion_mask_BT)
    out = Scorer(model).rollouts(rollouts)
    torch.testing.assert_close(rollouts.sampler_logps_BT, out.logps_BT.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollouts.sampler_logp_B, out.logp_B.detach().double(), rtol=1e-5, atol=1e-5)
    assert rollouts.policy_logp_B is None


def test_log_q_is_that_of_the_warped_distribution():
    torch.manual_seed(0)
    model = small_gpt()
    sampler = sampler_of(model, temperature=0.6)
    sampler.sync()
    rollouts = sampler(model, PROMPTS)
    warped = copy.deepcopy(model)
    warped.lm_head.weight = torch.nn.Parameter(warped.lm_head.weight / 0.6)
    torch.testing.assert_close(
        rollouts.sampler_logps_BT, Scorer(warped).rollouts(rollouts).logps_BT.detach(), rtol=1e-4, atol=1e-5
    )
    assert not sampler.unwarped().warpers and isinstance(sampler.unwarped(), TransformersSampler)


def test_log_probs_that_are_missing_are_refused():
    model = small_gpt()
    sampler = sampler_of(model)
    sampler.sync()
    whole = sampler.engine.generate

    def broken(change):
        def generate(**arguments):
            prompts, completions, logprobs, _ = whole(**arguments)
            return prompts, completions, change(logprobs), None

        sampler.engine.generate = generate
        sampler(model, PROMPTS)

    with pytest.raises(ValueError, match="reported no log-probs, without which pi/q is unknown"):
        broken(lambda logprobs: None)
    with pytest.raises(ValueError, match="not finite for 1 of 3 completions, such as .nan"):
        broken(lambda logprobs: [[[None]] + logprobs[0][1:], *logprobs[1:]])
    with pytest.raises(ValueError, match="missing or not finite for 3 of 3"):
        broken(lambda logprobs: [row + [[-1.0]] for row in logprobs])


# ---- in a trainer ----


@pytest.fixture
def engines(monkeypatch):
    """Trainers get our engine; what they ask of it must be options of TRL's."""
    made = []

    def engine(**options):
        inspect.signature(VLLMGeneration.__init__).bind(None, **options)
        made.append(Engine(**options))
        return made[-1]

    monkeypatch.setattr(vllm_sampler, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_sampler, "vllm_engine", engine)
    return made


@pytest.fixture
def base(tmp_path):
    tiny.model(3, 0.2, torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def gdc(folder, model, **options):
    lm = AutoModelForCausalLM.from_pretrained(model)
    return tiny.trainer(tiny.SOFT["reward"](), folder, lm, use_vllm=True, **options)


def test_a_trainer_learns_from_rollouts_of_another_density(engines, base, tmp_path):
    """q is the policy at temperature 1.5, from the weights of the step: training comes to the exact optimum all the same."""
    options = {"max_steps": 60, "per_device_train_batch_size": 256, "learning_rate": 1e-2, "temperature": 1.5}
    trainer = gdc(tmp_path / "run", base, lr_scheduler_type="linear", **options)
    (engine,) = engines
    assert engine.options["generation_kwargs"] == {"stop_token_ids": [0]} and engine.options["max_num_seqs"] == 256
    fresh = []
    plain = trainer.weigh

    def weigh(rollouts):
        now = trainer.actors.policy_logp(rollouts)
        fresh.append(torch.equal(rollouts.policy_logp_B, now) and not torch.equal(rollouts.sampler_logp_B, now))
        assert all(torch.equal(p, q) for p, q in zip(engine.own.parameters(), trainer.model.parameters(), strict=True))
        return plain(rollouts)

    trainer.weigh = weigh

    def kl() -> float:
        rollouts = tiny.enumerated(trainer)
        log_p = tiny.exact_log_p(trainer, rollouts, 1)
        return float((log_p.exp() * (log_p - rollouts.policy_logp_B)).sum())

    before = kl()
    trainer.train()
    assert fresh == [True] * 60 and len(engine.pushed) == 60
    assert before > 0.2 and kl() < 0.01


def test_what_is_pushed_is_the_policy_alone(engines, base, tmp_path):
    """Without the critic; and merging an adapter to push it leaves the reference bit for bit what it was."""
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()]
    ppo(tmp_path / "whole", base, use_vllm=True).train()
    assert engines[-1].pushed == [names]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    options = {"max_steps": 3, "learning_rate": 0.1, "num_iterations": 1, "peft_config": adapter}
    trainer = ppo(tmp_path / "adapted", base, use_vllm=True, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if ".base_layer." in name}
    trainer.train()
    assert len(engines[-1].pushed) == 3 and not any("critic" in name for name in engines[-1].pushed[0])
    after = dict(trainer.model.named_parameters())
    assert before and all(torch.equal(after[name], p) for name, p in before.items())
    assert trainer.model.critic.head.weight.requires_grad
    logps = trainer._last_rollouts.sampler_logp_B - trainer._last_rollouts.policy_logp_B
    assert logps.abs().max() < 1e-4  # the engine had the adapter's weights


def test_refusals(engines, base, tmp_path, monkeypatch):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            gdc(tmp_path / "no", options.pop("model", base), **options)

    refused("vllm_mode must be 'colocate' or 'server', but is 'near'", vllm_mode="near")
    refused("replay_samples mixes in samples of the policy itself, .* does not go with use_vllm", replay_samples=8)
    refused("generation_kwargs are options of `generate`", generation_kwargs={"use_cache": False})
    with pytest.raises(ValueError, match="not loaded from anywhere: save it with its tokenizer"):
        tiny.trainer(tiny.SOFT["reward"](), tmp_path / "no", tiny.model(0), use_vllm=True)
    gdc(tmp_path / "server", base, vllm_mode="server", temperature=0.5)
    plain = vllm_sampler.vllm_engine
    monkeypatch.setattr(vllm_sampler, "vllm_engine", lambda **options: Engine(reports="raw_logprobs", **options))
    with pytest.raises(ValueError, match="the vLLM server reports raw_logprobs, .*--logprobs-mode processed_"):
        gdc(tmp_path / "raw", base, vllm_mode="server", temperature=0.5)
    gdc(tmp_path / "unwarped", base, vllm_mode="server")
    monkeypatch.setattr(vllm_sampler, "vllm_engine", plain)
    monkeypatch.undo()
    refused("use_vllm samples with vLLM, which is not installed: `pip install trl.vllm.`")
    assert not (tmp_path / "no").exists()


def test_distillation_takes_them_too(engines, base, tmp_path):
    args = DistillationConfig(
        str(tmp_path / "run"), use_vllm=True, max_steps=1, max_completion_length=3, use_cpu=True, save_strategy="no"
    )
    trainer = DistillationTrainer(base, Teacher(tiny.model(1), tiny.tokenizer()), args)
    trainer.train()
    rollouts = trainer._last_rollouts
    assert (
        len(engines[0].pushed) == 1
        and 0 < float(rollouts.policy_logp_B.sub(rollouts.sampler_logp_B).abs().max()) < 1e-4
    )
