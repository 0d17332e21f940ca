"""Certified sampling: against exact values on an enumerable language, and from the saved folder without hf_gdc.

The oracle sums over the 15 strings. Tolerances: chi-squared tests reject at p < 1e-3 with fixed seeds; estimates from a
pool lie within 4 of their own standard errors.
"""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from hf_gdc import Moment, Pointwise, QuasiRejectionSampler, Reference, Reward, Target
from hf_gdc.acceptance import AcceptancePool
from hf_gdc.intervals import wilson_bound
from hf_gdc.targets import Factor

BETAS = [0.01, 0.3, 1.0, 3.0, 30.0]
FEATURES = """
def has_b(completion_ids, **_):
    return [float(2 in ids) for ids in completion_ids]


def count_a(completion_ids, **_):
    return [float(ids.count(1)) for ids in completion_ids]
"""


def soft():
    return Reference() * Reward(tiny.count_a, beta=1.0)


def hard():
    return Reference() * Pointwise(tiny.has_b) * Reward(tiny.count_a, beta=2.0)


def sampler(target=None, policy=None, reference=None, **options) -> QuasiRejectionSampler:
    options = {"processing_class": tiny.tokenizer(), "max_completion_length": tiny.LENGTH, "batch_size": 1024} | options
    return QuasiRejectionSampler(
        hard() if target is None else target,
        tiny.model(1) if policy is None else policy,
        reference=tiny.model(0) if reference is None else reference,
        disable_tqdm=True,
        **options,
    )


def exact(qrs: QuasiRejectionSampler, prompt=""):
    """The strings as rollouts, with log P and log q, from plain forward passes."""
    stub = SimpleNamespace(actors=SimpleNamespace(sampler=qrs.proposal.sampler), model=qrs.proposal.model)
    rollouts = tiny.enumerated(stub, [prompt])
    rollouts.scores["reference_logp"] = tiny.log_probs(stub, qrs.proposal.reference, rollouts)
    return rollouts, qrs.target.log_score(rollouts), rollouts.policy_logp_B


def exact_p_beta(log_score, log_q, beta) -> torch.Tensor:
    low = torch.minimum(log_score.exp(), beta * log_q.exp())
    return low / low.sum()


def counts(rollouts) -> torch.Tensor:
    index = {tuple(row): n for n, row in enumerate(tiny.strings())}
    return torch.bincount(
        torch.tensor([index[tuple(ids)] for ids in rollouts.completion_ids()]), minlength=len(index)
    ).double()


def chi_squared(observed: torch.Tensor, probability: torch.Tensor) -> float:
    """p-value of the observed counts; cells that expect fewer than 5 are pooled."""
    assert bool((observed[probability == 0] == 0).all())
    expected = probability * observed.sum()
    large = expected >= 5
    pairs = [(observed[large], expected[large])]
    if float(expected[~large].sum()) > 0:
        pairs.append((observed[~large].sum()[None], expected[~large].sum()[None].clamp_min(1e-9)))
    value = sum(float(((o - e) ** 2 / e).sum()) for o, e in pairs)
    freedom = sum(len(o) for o, _ in pairs) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(value / 2)))


@pytest.mark.parametrize("target", [soft, hard])
@pytest.mark.parametrize("beta", BETAS)
def test_samples_have_the_distribution_p_beta(target, beta):
    qrs = sampler(target(), beta=beta)
    rollouts, log_score, log_q = exact(qrs)
    p_beta = exact_p_beta(log_score, log_q, beta)
    found = qrs.sample(300 if beta == 30.0 else 1500)
    assert chi_squared(counts(found), p_beta) > 1e-3
    rows = [tiny.strings().index(ids) for ids in found.completion_ids()]
    assert float((found.sampler_logp_B - p_beta[rows].log()).abs().max()) < 0.1  # but for the estimated rate
    assert float((found.sampler_logp_B - p_beta[rows].log()).std()) < 1e-6


def test_temperature_is_part_of_the_proposal():
    qrs = sampler(soft(), beta=1.0, temperature=2.0)
    rollouts, log_score, _ = exact(qrs)
    ids = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT], 1)
    logps = (qrs.proposal.model(ids).logits[:, :-1] / 2.0).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    log_q = (logps * rollouts.completion_mask_BT).sum(-1).detach()
    assert chi_squared(counts(qrs.sample(4000)), exact_p_beta(log_score, log_q, 1.0)) > 1e-3
    (pool,) = qrs.pool(num_samples=4000)
    assert pool.policy_samples == 4000
    assert pool.log_z == pytest.approx(float(log_score.logsumexp(0)), abs=0.1)


@pytest.mark.parametrize("target", [soft, hard])
def test_estimates_are_exact_where_everything_is_enumerated(target):
    qrs = sampler(target())
    _, log_score, log_q = exact(qrs)
    uniform = torch.full_like(log_q, -math.log(len(log_q)))  # each string once: means are sums
    pool = AcceptancePool(log_score, log_q, uniform)
    p, q = log_score.softmax(0), log_q.exp()
    inside = p > 0
    kl_pq = float((p * (p / q).log())[inside].sum())
    for beta in [1e-9, *BETAS]:
        got, p_beta = pool.at(math.log(beta)), exact_p_beta(log_score, log_q, beta)
        accept = (log_score.exp() / (beta * q)).clamp_max(1.0)
        assert got.acceptance_rate == pytest.approx(float((q * accept).sum()), rel=1e-9)
        assert got.tv == pytest.approx(float((p - p_beta).abs().sum() / 2), abs=1e-9)
        assert got.kl == pytest.approx(float((p * (p / p_beta).log())[inside].sum()), abs=1e-9)
        assert got.reverse_kl == pytest.approx(float((p_beta * (p_beta / p).log())[inside].sum()), abs=1e-9)
        log_accept = float((p * accept.log())[inside].sum())
        # The identity, with every term by its own definition, and as estimated.
        kl = float((p * (p / p_beta).log())[inside].sum())
        assert kl_pq == pytest.approx(kl - math.log(float((q * accept).sum())) + log_accept, abs=1e-9)
        total = got.kl - math.log(got.acceptance_rate) + got.log_acceptance
        assert got.kl_target_policy == pytest.approx(kl_pq, abs=1e-9)
        assert got.kl_target_policy == pytest.approx(total, abs=1e-9)


def test_with_a_pure_constraint_and_beta_to_zero_it_is_guards():
    """p' = q given the constraint; where q = a, p' is the target itself and KL(p || q) = -log AR."""
    for policy, reference in ((tiny.model(1), tiny.model(0)), (tiny.model(0), tiny.model(0))):
        qrs = sampler(Reference() * Pointwise(tiny.has_b), policy, reference, guaranteed=True)
        _, log_score, log_q = exact(qrs)
        pool = AcceptancePool(log_score, log_q, torch.full_like(log_q, -math.log(len(log_q))))
        got, small = pool.at(-math.inf), pool.at(-50.0)
        for name in ("acceptance_rate", "tv", "kl", "reverse_kl"):
            assert getattr(got, name) == pytest.approx(getattr(small, name), abs=1e-12)
        assert got.kl_target_policy == pytest.approx(got.kl - math.log(got.acceptance_rate), abs=1e-12)
        if policy is not reference and torch.equal(policy.lm_head.weight, reference.lm_head.weight):
            assert got.tv == pytest.approx(0.0, abs=1e-9)
            assert got.kl_target_policy == pytest.approx(-math.log(got.acceptance_rate), abs=1e-9)
        restricted = torch.where(log_score > -math.inf, log_q.exp(), 0.0)
        assert chi_squared(counts(qrs.sample(3000)), restricted / restricted.sum()) > 1e-3


def test_a_pool_estimates_the_exact_values_within_its_standard_errors():
    qrs = sampler(hard(), pool_samples=20_000)
    _, log_score, log_q = exact(qrs)
    truth = AcceptancePool(log_score, log_q, torch.full_like(log_q, -math.log(len(log_q))))
    (pool,) = qrs.pool()
    assert pool.size == 20_000 and pool.policy_samples == 10_000
    for got in qrs.estimates(BETAS):
        right = truth.at(got.log_beta)
        for name in ("acceptance_rate", "tv", "kl", "reverse_kl", "kl_target_policy"):
            error = abs(getattr(got, name) - getattr(right, name))
            assert error <= 4 * getattr(got, f"{name}_stderr") + 1e-12, name
            assert getattr(got, f"{name}_stderr") < 0.1
        assert got.tv_upper >= right.tv and got.acceptance_rate_lower <= right.acceptance_rate
        total = got.kl - math.log(got.acceptance_rate) + got.log_acceptance
        assert got.kl_target_policy == pytest.approx(total, abs=1e-9)
    rates, tvs = zip(*[(e.acceptance_rate, e.tv) for e in qrs.estimates()], strict=True)
    assert list(rates) == sorted(rates, reverse=True) and list(tvs) == sorted(tvs, reverse=True)


def test_standard_errors_are_the_spread_of_the_estimates():
    """400 pools of 400, drawn from the enumerated distribution; the mean of the claimed error is the spread within 15%."""
    qrs = sampler(hard())
    _, log_score, log_q = exact(qrs)
    log_m = torch.logaddexp(log_q, qrs.proposal.reference_logp(exact(qrs)[0])) - math.log(2)
    torch.manual_seed(0)
    rows = torch.multinomial(log_m.exp(), 400 * 400, replacement=True).view(400, 400)
    found = [AcceptancePool(log_score[r], log_q[r], log_m[r]).at(math.log(0.7)) for r in rows]
    for name in ("acceptance_rate", "tv", "kl", "reverse_kl", "kl_target_policy"):
        spread = torch.tensor([getattr(e, name) for e in found]).std()
        claimed = torch.tensor([getattr(e, f"{name}_stderr") for e in found]).mean()
        assert float(claimed / spread) == pytest.approx(1.0, abs=0.15), name
    truth = AcceptancePool(log_score, log_q, torch.full_like(log_q, -math.log(len(log_q)))).at(math.log(0.7))
    held = sum(e.tv_upper >= truth.tv for e in found) / 400
    assert held >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)
    assert sum(e.acceptance_rate_lower <= truth.acceptance_rate for e in found) / 400 >= 0.91


def test_beta_is_chosen_for_a_tv_or_a_rate_from_each_prompts_own_pool():
    qrs = sampler(hard(), tv=0.1, pool_samples=6000)
    qrs.pool(["", "b"])
    for prompt in ("", "b"):
        _, log_score, log_q = exact(qrs, prompt)
        truth = AcceptancePool(log_score, log_q, torch.full_like(log_q, -math.log(len(log_q))))
        by_tv, by_rate = qrs.beta_for(tv=0.1, prompt=prompt), qrs.beta_for(acceptance_rate=0.1, prompt=prompt)
        assert 0.05 < truth.at(math.log(by_tv)).tv <= 0.1
        assert 0.1 <= truth.at(math.log(by_rate)).acceptance_rate < 0.12
        assert qrs.log_beta(prompt) == pytest.approx(math.log(by_tv))
    assert qrs.log_beta("") != qrs.log_beta("b")
    found = qrs.sample(400, ["", "b"])
    assert found.prompts == [""] * 400 + ["b"] * 400
    for at, prompt in enumerate(("", "b")):
        _, log_score, log_q = exact(qrs, prompt)
        own = found.select(torch.arange(400 * at, 400 * (at + 1)))
        assert chi_squared(counts(own), exact_p_beta(log_score, log_q, math.exp(qrs.log_beta(prompt)))) > 1e-3


def test_accepted_samples_are_never_thrown_away(monkeypatch):
    qrs = sampler(soft(), beta=1.0, batch_size=256)
    drawn, draw = [], qrs.proposal.draw
    monkeypatch.setattr(qrs.proposal, "draw", lambda prompts, *rest: drawn.append(len(prompts)) or draw(prompts, *rest))
    first = qrs.sample(20)
    assert drawn == [256]
    for _ in range(3):
        qrs.sample(10)
    assert drawn == [256]  # 50 samples of one batch
    together = sampler(soft(), beta=1.0, batch_size=256).sample(50)
    assert together.completion_ids()[:20] == first.completion_ids()
    twice = sampler(soft(), beta=1.0, batch_size=256).sample(25, ["", ""])
    assert twice.completion_ids() == together.completion_ids()


def test_sampling_leaves_torchs_random_numbers_alone_and_repeats():
    qrs = sampler(hard(), beta=1.0)
    before = torch.get_rng_state()
    texts = qrs.sample(20).texts
    assert torch.equal(before, torch.get_rng_state())
    assert texts == sampler(hard(), beta=1.0).sample(20).texts != sampler(hard(), beta=1.0, seed=1).sample(20).texts


def test_guaranteed_samples_satisfy_the_constraint_or_there_are_none():
    found = sampler(hard(), guaranteed=True).sample(500)
    assert all(2 in ids for ids in found.completion_ids())
    calls = []

    def moody(completion_ids, **_):  # says yes at first, no afterwards
        calls.append(len(completion_ids))
        return [float(len(calls) == 1)] * len(completion_ids)

    with pytest.raises(ValueError, match="violate a hard constraint when checked again"):
        sampler(Reference() * Pointwise(moody), guaranteed=True).sample(10)
    never = Reference() * Pointwise(lambda completions, **_: [0.0] * len(completions), name="never")
    with pytest.raises(ValueError, match="only 0 of 3 samples after 1024 draws.*rate of about 0"):
        sampler(never, guaranteed=True, max_draws_per_sample=100).sample(3)
    with pytest.raises(ValueError, match="none of the pool's 64 samples has P > 0"):
        sampler(never, guaranteed=True).pool(num_samples=64)
    with pytest.raises(ValueError, match="needs a hard constraint"):
        sampler(soft(), guaranteed=True)


def test_a_mode_that_the_policy_lost_is_seen_in_the_pool():
    """The policy all but never says b; its own 4,000 samples show a KL near 0, with the reference's the true 5 nats."""
    policy = tiny.model(0)
    forward = policy.forward

    def without_b(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits - 9.0 * torch.tensor([0.0, 0.0, 1.0], dtype=out.logits.dtype)
        return out

    policy.forward = without_b
    qrs = sampler(Reference() * Reward(tiny.count_a, beta=5.0), policy)
    _, log_score, log_q = exact(qrs)
    right = AcceptancePool(log_score, log_q, torch.full_like(log_q, -math.log(len(log_q)))).at(0.0).kl_target_policy
    (mixed,) = qrs.pool(num_samples=4000)
    assert mixed.at(0.0).kl_target_policy == pytest.approx(right, abs=4 * mixed.at(0.0).kl_target_policy_stderr)
    qrs._restart()
    (own,) = qrs.pool(num_samples=4000, reference_share=0.0)
    assert own.at(0.0).kl_target_policy < right / 2


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.inf}, {"beta": math.nan}])
def test_a_beta_that_is_not_positive_is_refused(options):
    with pytest.raises(ValueError, match="beta must be positive"):
        sampler(**options)


@pytest.mark.parametrize("name", ["tv", "acceptance_rate"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5])
def test_a_rate_or_tv_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
        sampler(**{name: value})
    qrs = sampler()
    qrs.pool(num_samples=512)
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
        qrs.beta_for(**{name: value})


def test_other_bad_options_are_refused():
    with pytest.raises(ValueError, match="give one of them"):
        sampler(beta=1.0, tv=0.1)
    with pytest.raises(ValueError, match="say how to accept"):
        sampler().sample(1)
    with pytest.raises(ValueError, match="Reference\\(\\) without a model"):
        QuasiRejectionSampler(hard(), tiny.model(0), 1.0, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="batch_size must be positive"):
        sampler(batch_size=0)
    with pytest.raises(ValueError, match="beta_for needs either"):
        sampler().beta_for()
    with pytest.raises(ValueError, match="there is no pool for the prompt 'a'"):
        sampler().estimates([1.0], prompt="a")
    with pytest.raises(ValueError, match="positive number of samples"):
        sampler(beta=1.0).sample(0)


def test_a_target_that_is_not_fitted_is_refused_and_can_be_fitted():
    qrs = sampler(Reference() * Moment(tiny.count_a, 0.8), beta=1.0)
    for act in (qrs.pool, lambda: qrs.sample(1)):
        with pytest.raises(ValueError, match="lambda of the moment count_a has not been fitted"):
            act()
    qrs.target.report(num_samples=4096)
    assert qrs.target.moments[0].lam != 0
    _, log_score, _ = exact(qrs)
    mean = float(log_score.softmax(0) @ torch.tensor(tiny.count_a(tiny.strings()), dtype=torch.float64))
    assert mean == pytest.approx(0.8, abs=0.1)  # the fit's own error on 4,096 samples
    assert len(qrs.sample(5)) == 5


def test_a_target_that_can_not_be_normalised_is_refused():
    class Broken(Factor):
        def log_score(self, rollouts):
            return torch.full((len(rollouts),), self.value, dtype=torch.float64)

        def formula(self):
            return "broken"

    for value in (math.nan, math.inf):
        broken = Broken()
        broken.value = value
        for act in (lambda qrs: qrs.pool(num_samples=8), lambda qrs: qrs.sample(1)):
            with pytest.raises(ValueError, match="can't be normalised"):
                act(sampler(Reference() * broken, beta=1.0))
        with pytest.raises(ValueError, match="can't be normalised"):
            AcceptancePool(torch.tensor([0.0, value]), torch.zeros(2), torch.zeros(2))


def test_a_pool_too_small_says_how_many_samples_are_needed():
    qrs = sampler(hard(), batch_size=64)
    qrs.pool(num_samples=64)
    with pytest.raises(ValueError, match="to certify TV <= 0.01.*Draw about \\d+ samples") as caught:
        qrs.beta_for(tv=0.01)
    needed = int(str(caught.value).split("Draw about ")[1].split()[0])
    qrs = sampler(hard())
    qrs.pool(num_samples=2 * needed)
    assert qrs.beta_for(tv=0.01) > 0
    with pytest.raises(ValueError, match="no beta reaches an acceptance rate of 0.99"):
        qrs.beta_for(acceptance_rate=0.99)
    small = sampler(hard())
    (pool,) = small.pool(num_samples=200)
    just_below = pool.at(-math.inf).acceptance_rate - 0.01
    with pytest.raises(ValueError, match="too small to certify an acceptance rate.*Draw about \\d+"):
        small.beta_for(acceptance_rate=just_below)
    size = small.pool(num_samples=100)[0].size
    assert size == 300  # a second call adds to the pool
    assert wilson_bound(0.0, 100, 1.645) == pytest.approx(1.645**2 / (100 + 1.645**2))


# ---- the saved folder ----

RUN = """
import json, sys
try:
    import hf_gdc
except ImportError:
    pass
else:
    sys.exit("hf_gdc can be imported here")
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.manual_seed(0)
def draw(*inputs, **options):
    return model.generate(*inputs, custom_generate=sys.argv[2], trust_remote_code=True, **options)
def error(**options):
    try:
        draw(**options)
    except ValueError as problem:
        return str(problem)
b = torch.tensor([[0, 2], [2, 2]])
mask = torch.tensor([[0, 1], [1, 1]])
start = torch.tensor([[0]])
out = {
    "many": draw(input_ids=start, num_return_sequences=2000)[:, 1:].tolist(),
    "positional": draw(start).shape[0],
    "nothing": error(),
    "rows": draw(input_ids=b[:1], attention_mask=mask[:1], num_return_sequences=3).tolist(),
    "unknown": error(input_ids=b, attention_mask=mask),
    "with_beta": draw(input_ids=b, attention_mask=mask, beta=0.5).shape[0],
    "greedy": error(input_ids=start, do_sample=False),
    "top_k": error(input_ids=start, top_k=5),
    "harmless": draw(input_ids=start, do_sample=True, max_new_tokens=3, use_cache=True).shape[0],
    "bad_beta": error(input_ids=start, beta=-1.0),
}
with torch.no_grad():
    model.lm_head.weight += 1.0 * torch.randn_like(model.lm_head.weight)
out["other"] = error(input_ids=start)
print("RESULT" + json.dumps(out))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A policy and its reference on disk, a feature file, and the exported folder of two prompts."""
    folder = tmp_path_factory.mktemp("saved")
    for name, seed in (("base", 0), ("policy", 1)):
        model = tiny.model(seed, scale=0.5)
        type(model).register_for_auto_class("AutoModelForCausalLM")
        type(model.config).register_for_auto_class()
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "mine.py").write_text(FEATURES)
    target = Reference() * Pointwise(f"{folder}/mine.py:has_b") * Moment(f"{folder}/mine.py:count_a", 0.8, name="a")
    qrs = QuasiRejectionSampler(
        target,
        str(folder / "policy"),
        reference=str(folder / "base"),
        tv=0.1,
        max_completion_length=tiny.LENGTH,
        batch_size=512,
        disable_tqdm=True,
    )
    qrs.target.report(num_samples=4096)
    qrs.pool(["", "b"], num_samples=4000)
    qrs.save_pretrained(folder / "certified")
    return folder, qrs


def run_blocked(tmp_path, code, *arguments) -> dict:
    (tmp_path / "hf_gdc.py").write_text("raise ImportError('not here')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def test_the_saved_folder_samples_p_beta_without_the_library(saved, tmp_path):
    folder, qrs = saved
    out = run_blocked(tmp_path, RUN, str(folder / "policy"), str(folder / "certified"))
    strings = {tuple(row): n for n, row in enumerate(tiny.strings())}
    rows = [tuple(row[: row.index(0) + 1] if 0 in row else row) for row in out["many"]]
    observed = torch.bincount(torch.tensor([strings[row] for row in rows]), minlength=len(strings)).double()
    _, log_score, log_q = exact(qrs)
    assert chi_squared(observed, exact_p_beta(log_score, log_q, math.exp(qrs.log_beta("")))) > 1e-3
    assert out["positional"] == 1 and out["with_beta"] == 2 and out["harmless"] == 1
    assert all(row[:2] == [0, 2] and 2 in row[2:] for row in out["rows"]) and len(out["rows"]) == 3
    assert "which of the 2 certified prompts" in out["nothing"]
    assert "not one of the 2 that this sampler is certified for" in out["unknown"]
    assert "do_sample=False is not what was certified" in out["greedy"]
    assert "top_k=5 is not what was certified" in out["top_k"]
    assert "beta must be positive" in out["bad_beta"]
    assert "this is not the model that was certified" in out["other"]


def test_the_certificate_and_the_target_are_beside_the_code(saved):
    folder, qrs = saved
    content = json.loads((folder / "certified" / "certificate.json").read_text(), parse_constant=pytest.fail)
    assert [row["prompt"] for row in content["prompts"]] == ["", "b"]
    assert all(row["tv_upper"] <= 0.1 and row["ess"] > 30 for row in content["prompts"])
    card = (folder / "certified" / "README.md").read_text()
    assert "[mine.py:has_b]" in card.replace(f"{folder}/", "") and "TV(p, p_beta) <= 0.1" in card
    again = Target.from_pretrained(folder / "certified")
    assert again.moments[0].lam == qrs.target.moments[0].lam
    assert (folder / "certified" / "mine.py").read_text() == FEATURES


def test_the_policy_itself_and_an_adapter_can_be_the_reference(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder, _ = saved
    target = Reference() * Pointwise(f"{folder}/mine.py:has_b")
    same = sampler(target, str(folder / "policy"), str(folder / "policy"), guaranteed=True, pool_samples=1000)
    assert same.proposal.reference is same.proposal.model
    same.save_pretrained(tmp_path / "same")
    got = same.estimates()[0]  # beta below the one value of P/q: GUARD's identity
    assert got.kl_target_policy == pytest.approx(-math.log(got.acceptance_rate), abs=1e-6)
    ids = same.proposal.model.generate(
        custom_generate=str(tmp_path / "same"), trust_remote_code=True, num_return_sequences=50
    )
    assert all(2 in row[1:] for row in ids.tolist()) and ids.shape[0] == 50

    lora = get_peft_model(tiny.model(1), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    qrs = QuasiRejectionSampler(
        Reference() * Pointwise(f"{folder}/mine.py:has_b"),
        lora,
        beta=1.0,
        processing_class=tiny.tokenizer(),
        max_completion_length=tiny.LENGTH,
        disable_tqdm=True,
        pool_samples=2000,
        batch_size=500,
    )
    assert qrs.proposal.reference_kind == "adapter_off"
    base = sampler(target, tiny.model(1), tiny.model(1))
    assert qrs.pool()[0].log_z == pytest.approx(float(exact(base)[1].logsumexp(0)), abs=0.1)  # Z is the base model's
    qrs.save_pretrained(tmp_path / "lora")
    torch.manual_seed(0)
    ids = lora.generate(
        custom_generate=str(tmp_path / "lora"),
        trust_remote_code=True,
        num_return_sequences=2000,
        tokenizer=tiny.tokenizer(),
    )
    rows = [tuple(row[: row.index(0) + 1] if 0 in row else row) for row in ids[:, 1:].tolist()]
    index = {tuple(row): n for n, row in enumerate(tiny.strings())}
    observed = torch.bincount(torch.tensor([index[row] for row in rows]), minlength=15).double()
    stub = SimpleNamespace(actors=SimpleNamespace(sampler=qrs.proposal.sampler), model=lora)
    rollouts = tiny.enumerated(stub, [""])
    with lora.disable_adapter():
        rollouts.scores["reference_logp"] = tiny.log_probs(stub, lora, rollouts)
    p_beta = exact_p_beta(qrs.target.log_score(rollouts), rollouts.policy_logp_B, 1.0)
    assert chi_squared(observed, p_beta) > 1e-3


def test_the_reference_can_travel_and_a_nameless_one_must(saved, tmp_path):
    folder, _ = saved
    target = Reference() * Pointwise(f"{folder}/mine.py:has_b")
    qrs = sampler(target, str(folder / "policy"), tiny.model(0), beta=1.0, pool_samples=1000)
    with pytest.raises(ValueError, match="pass save_reference=True"):
        qrs.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    qrs.save_pretrained(tmp_path / "out", save_reference=True)
    assert (tmp_path / "out" / "reference" / "model.safetensors").is_file()
    model = qrs.proposal.model
    ids = model.generate(torch.tensor([[0]]), custom_generate=str(tmp_path / "out"), trust_remote_code=True)
    assert 2 in ids[0, 1:].tolist()
    (tmp_path / "out" / "reference").rename(tmp_path / "moved")
    from hf_gdc.custom_generate import _load

    with pytest.raises(ValueError, match="reference model is not at"):
        _load(model, str(tmp_path / "out" / "reference"), "", torch.float64)
    ids = model.generate(
        custom_generate=str(tmp_path / "out"), trust_remote_code=True, reference=str(tmp_path / "moved")
    )
    assert 2 in ids[0, 1:].tolist()


def test_a_ready_feature_travels_with_what_it_needs_alone(saved, tmp_path):
    folder, _ = saved
    target = Reference() * Pointwise("contains:b")
    qrs = sampler(target, str(folder / "policy"), str(folder / "policy"), guaranteed=True, pool_samples=1000)
    qrs.save_pretrained(tmp_path / "out")
    names = ["certified_sampling", "features", "generate", "ready_features", "rollouts", "settings"]
    assert sorted(file.stem for file in (tmp_path / "out" / "custom_generate").iterdir()) == names
    ids = qrs.proposal.model.generate(
        custom_generate=str(tmp_path / "out"), trust_remote_code=True, num_return_sequences=50
    )
    assert all(2 in row[1:] for row in ids.tolist()) and ids.shape[0] == 50


def test_features_that_can_not_travel_are_refused(saved, tmp_path):
    folder, _ = saved
    options = {"policy": str(folder / "policy"), "reference": str(folder / "base"), "beta": 1.0, "pool_samples": 500}
    lam = Reference() * Pointwise(lambda completion_ids, **_: [float(2 in ids) for ids in completion_ids], name="b")
    with pytest.raises(ValueError, match="lambda or belongs to a script.*'my_features.py:function'"):
        sampler(lam, **options).save_pretrained(tmp_path / "out")
    script = {"__name__": "__main__"}
    exec(FEATURES, script)
    with pytest.raises(ValueError, match="lambda or belongs to a script"):
        sampler(Reference() * Pointwise(script["has_b"]), **options).save_pretrained(tmp_path / "out")
    near = tmp_path / "near.py"
    near.write_text("def g(completion_ids, **_):\n    return [1.0] * len(completion_ids)\n")
    qrs = sampler(Reference() * Pointwise(f"{near}:g"), **options)
    near.write_text("from .other import f\n" + near.read_text())
    with pytest.raises(ValueError, match="imports its neighbours"):
        qrs.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="too small.*for a certificate"):
        sampler(hard(), **options | {"pool_samples": 8}).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
