"""With the optimal discriminator the policy's gradient is that of D_f(pi || p_true); an energy's is that of the objective."""

import adversaries
import pytest
import tiny
import torch

from hf_gdc import Discriminator, available_divergences, get_divergence
from hf_gdc.scoring import Scorer

# Reward as a function of the logit, up to a constant and a positive factor: the table.
REWARDS = {
    "reverse_kl": lambda logit: logit,
    "kl": torch.exp,
    "js": torch.nn.functional.softplus,
    "seqgan": torch.sigmoid,
    "non_saturating": lambda logit: -torch.nn.functional.softplus(-logit),
    "hellinger": lambda logit: torch.exp(logit / 2),
    "tv": lambda logit: torch.sign(logit) / 2,
    "reverse_chi2": lambda logit: -2 * torch.exp(-logit),
}
OTHERS = sorted(set(available_divergences()) - set(REWARDS) - {"alpha"})


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_the_tables(name):
    logits = torch.linspace(-4, 4, 9).double()
    ours, book = -get_divergence(name).f_prime(-logits), REWARDS[name](logits)
    torch.testing.assert_close(ours - ours[4], book - book[4])


@pytest.mark.parametrize("prompts", [("",), ("a", "b b a")], ids=["unconditional", "two prompts"])
@pytest.mark.parametrize("moved", [False, True], ids=["pi is q", "pi has moved"])
@pytest.mark.parametrize("name", [*REWARDS, *OTHERS])
def test_gradient_with_the_optimal_discriminator(name, moved, prompts, tmp_path):
    """Even if its logits are all off by a constant, which Z takes out."""
    log_p, error = adversaries.goal(), 0.7
    optimal = Discriminator(adversaries.Optimal(log_p, error=error))
    trainer = adversaries.gan(tmp_path, optimal, lm=tiny.model(1, 1.0), divergence=name)
    sampler = tiny.model(2, 0.7) if moved else trainer.model
    rollouts = tiny.enumerated(trainer, prompts, sampler)
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = rollouts.log_score_B.view(len(prompts), -1).logsumexp(1, keepdim=True).expand(-1, 15).flatten()
    torch.testing.assert_close(rollouts.log_z_B, torch.full((15 * len(prompts),), error).double())
    rollouts.baseline_B = torch.tensor([0.37, -1.1])[: len(prompts)].repeat_interleave(15).double()
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    estimated = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum() / len(prompts), trainer.model)
    exact = tiny.exact_gradient(trainer, rollouts, log_p.repeat(len(prompts)), len(prompts))
    assert exact.norm() > 1e-3
    assert (estimated - exact).norm() / exact.norm() < 1e-8


# ---- credit for tokens ----


def prefix_divergence(trainer, log_p):
    """J = mean over t of D_f of the measures on prefixes of t tokens, differentiable: by enumeration."""
    rows, every = tiny.strings(), tiny.enumerated(trainer)
    logps_BT = trainer.actors.scorer.rollouts(every).logps_BT
    total = 0.0
    for length in range(1, tiny.LENGTH + 1):
        seen = {}
        for n, row in enumerate(rows):
            if len(row) >= length:
                seen.setdefault(tuple(row[:length]), n)
        log_pi = torch.stack([logps_BT[n, :length].sum() for n in seen.values()])
        same = [torch.tensor([tuple(row[:length]) == prefix for row in rows]) for prefix in seen]
        log_prefix = torch.stack([log_p[rows_].logsumexp(0) for rows_ in same])
        total = total + (log_prefix.exp() * trainer.divergence.f(log_pi - log_prefix)).sum()
    return total / tiny.LENGTH


@pytest.mark.parametrize("moved", [False, True], ids=["pi is q", "pi has moved"])
@pytest.mark.parametrize("name", REWARDS)
def test_token_credit_is_the_gradient_of_the_prefixes_divergences(name, moved, tmp_path):
    log_p = adversaries.goal()
    optimal = Discriminator(adversaries.Optimal(log_p, dense=True))
    trainer = adversaries.gan(tmp_path, optimal, lm=tiny.model(1, 1.0), divergence=name)
    sampler = tiny.model(2, 0.7) if moved else trainer.model
    rollouts = tiny.enumerated(trainer, ("",), sampler)
    with torch.no_grad():
        rollouts.sampler_logps_BT = Scorer(sampler).rollouts(rollouts).logps_BT
    log_q_BT = rollouts.sampler_logps_BT.cumsum(1)
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = torch.zeros(15, dtype=torch.float64)
    rollouts.log_p_BT = log_q_BT + trainer.discriminator.network.score(rollouts)
    rollouts.baseline_BT = torch.tensor([0.4, -0.2, 0.9]).double().expand(15, -1)  # one for each place
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    estimated = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum(), trainer.model)
    exact = tiny.gradient(prefix_divergence(trainer, log_p), trainer.model)
    assert exact.norm() > 1e-3
    assert (estimated - exact).norm() / exact.norm() < 1e-8


def test_prefixes_are_normalised_and_baselines_leave_one_out(tmp_path):
    """Every string once is a sample of the uniform distribution whose means are exact; an error of the logits is taken out."""
    log_p = adversaries.goal()
    optimal = Discriminator(adversaries.Optimal(log_p, dense=True, error=0.7))
    trainer = adversaries.gan(tmp_path, optimal, lm=tiny.model(1, 1.0), divergence="js")
    rollouts, rows = tiny.enumerated(trainer), tiny.strings()
    rollouts.policy_logp_B = rollouts.sampler_logp_B  # on-policy: q is uniform

    def beginning(row, length, log_of):
        same = torch.tensor([other[:length] == row[:length] for other in rows])
        return log_of[same].logsumexp(0)

    uniform = rollouts.sampler_logp_B
    prefixes = [[beginning(row, t + 1, uniform) for t in range(len(row))] for row in rows]
    rollouts.sampler_logps_BT = torch.zeros(15, 3, dtype=torch.float64)
    for n, row in enumerate(prefixes):
        steps = torch.stack([torch.tensor(0.0), *row]).double().diff()
        rollouts.sampler_logps_BT[n, : len(row)] = steps
    scored_N, _ = trainer.weigh(rollouts)
    trainer.assign_credit(rollouts, scored_N)
    for n, row in enumerate(rows):
        for t in range(len(row)):
            assert float(rollouts.log_p_BT[n, t]) == pytest.approx(float(beginning(row, t + 1, log_p)), abs=1e-9)
    reward = (
        trainer.pseudo_reward(rollouts.sampler_logps_BT.cumsum(1) - rollouts.log_p_BT) * rollouts.completion_mask_BT
    )
    credit = reward.flip(1).cumsum(1).flip(1) / 3
    alive = rollouts.completion_mask_BT[:, 1]
    others = alive.clone()
    chosen = int(alive.nonzero()[2])
    others[chosen] = False
    assert float(rollouts.baseline_BT[chosen, 1]) == pytest.approx(float(credit[others, 1].mean()), rel=1e-9)


# ---- energies ----


def energy_gradient(trainer, rollouts, real) -> torch.Tensor:
    """What one step's backward leaves."""
    learner = trainer.learner
    fake, real = learner.prepare(*learner._with_earlier(rollouts, real))
    with learner._learning():
        loss = learner.loss(real, fake)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, learner.parameters)])


def exact_gradient(trainer, every, log_true, weight: float, distil: bool, extra=0.0, divergence_term=None):
    """Of D_f(P_G || p) + weight * (KL(P_true || P_D) or another term of log P_D), by enumeration."""
    learner = trainer.learner
    with learner._learning():
        d = learner.network.logits(every)[:, 0]
        log_a, log_pi = trainer.actors.reference_logp(every), every.policy_logp_B
        log_d = torch.log_softmax(log_a + d, 0)
        log_target = torch.log_softmax(log_a + d + extra, 0)
        total = 0.0
        if distil:
            total = (log_target.exp() * trainer.divergence.f(log_pi - log_target)).sum()
        if divergence_term is None:
            total = total - weight * (log_true.exp() * log_d).sum()
        else:
            total = total + weight * divergence_term(log_d)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, learner.parameters)])


def in_proportion(trainer, counts: list[int]):
    """Real texts: the strings as often as said, and their log-frequencies."""
    texts = adversaries.texts_of_strings()
    rows = [{"prompt": "", "completion": text} for text, count in zip(texts, counts, strict=True) for _ in range(count)]
    return trainer.texts_of(rows, torch.device("cpu")), (torch.tensor(counts).double() / sum(counts)).log()


COUNTS = [1, 2, 1, 1, 3, 1, 1, 1, 1, 2, 4, 1, 1, 1, 3]


def energy_problem(output_dir, **options):
    """A trainer whose policy has moved off the reference and whose energy is not 0; all strings, uniformly sampled."""
    energy = Discriminator(adversaries.classifier(4, dtype=torch.float64, scale=0.5))
    trainer = adversaries.unified(output_dir, energy, lm=tiny.model(0, 0.7), **options)
    trainer.model.load_state_dict(tiny.model(1, 0.7).state_dict())
    return trainer, tiny.enumerated(trainer)


@pytest.mark.parametrize("distil", [True, False])
@pytest.mark.parametrize("weight", [0.3, 2.0])
@pytest.mark.parametrize("name", ["js", "kl", "reverse_kl", "tv", "hellinger", "non_saturating"])
def test_energy_gradient_is_the_objectives(name, weight, distil, tmp_path):
    trainer, rollouts = energy_problem(tmp_path, divergence=name, data_weight=weight, distil=distil)
    real, log_true = in_proportion(trainer, COUNTS)
    rollouts = replicate(rollouts, len(real))
    estimated = energy_gradient(trainer, rollouts, real)
    exact = exact_gradient(trainer, tiny.enumerated(trainer), log_true, weight, distil)
    assert exact.norm() > 1e-3
    assert (estimated - exact).norm() / exact.norm() < 1e-8


def replicate(rollouts, times: int):
    """Every string `times` times: a number of samples that any number of real texts divides."""
    return rollouts.select(torch.arange(len(rollouts)).repeat(times))


def test_lambda_moves_the_direction_and_not_only_the_length(tmp_path):
    gradients = []
    for weight in (0.3, 3.0):
        trainer, rollouts = energy_problem(tmp_path, data_weight=weight)
        real, _ = in_proportion(trainer, COUNTS)
        gradients.append(energy_gradient(trainer, replicate(rollouts, len(real)), real))
    assert float(torch.cosine_similarity(*gradients, dim=0)) < 0.98


def test_energy_gradient_with_a_reward_beside_it(tmp_path):
    """The first term is against the whole target, the second against P_D alone."""
    trainer, rollouts = energy_problem(tmp_path, target=adversaries.reward_of_a(), data_weight=1.5)
    real, log_true = in_proportion(trainer, COUNTS)
    estimated = energy_gradient(trainer, replicate(rollouts, len(real)), real)
    extra = torch.tensor(tiny.count_a([row for row in tiny.strings()])).double()
    exact = exact_gradient(trainer, tiny.enumerated(trainer), log_true, 1.5, True, extra=extra)
    assert (estimated - exact).norm() / exact.norm() < 1e-8


def test_energy_gradient_by_a_critic_is_that_of_the_divergence(tmp_path):
    """With the critic's logit log P_true/a, up to a constant, the data term is D_f(P_D || P_true)."""
    critic = Discriminator(adversaries.Optimal(adversaries.goal()))
    trainer, rollouts = energy_problem(tmp_path, data_term="critic", critic=critic, data_weight=2.0, divergence="js")
    real, log_true = in_proportion(trainer, COUNTS)
    every = tiny.enumerated(trainer)
    log_a = trainer.actors.reference_logp(every)
    critic.network.whole_scores = lambda side: (log_true - log_a + 0.4).repeat(len(side) // 15)
    estimated = energy_gradient(trainer, replicate(rollouts, len(real)), real)

    def term(log_d):
        return (log_true.exp() * trainer.divergence.f(log_d - log_true)).sum()

    exact = exact_gradient(trainer, every, log_true, 2.0, True, divergence_term=term)
    assert (estimated - exact).norm() / exact.norm() < 1e-8


def test_real_texts_are_scored_once_for_all_steps_of_an_energy(tmp_path):
    """Noise contrastive estimation needs log pi of real texts, and the policy stands still meanwhile."""
    trainer, rollouts = energy_problem(tmp_path, data_term="nce", discriminator_steps=4)
    real, _ = in_proportion(trainer, [1] * 15)
    scored, policy_logp = [], trainer.actors.policy_logp
    trainer.actors.policy_logp = lambda side: scored.append(side is real) or policy_logp(side)
    trainer.learner(rollouts, real)
    assert scored == [True]
