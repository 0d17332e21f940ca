"""How an energy d learns: the unified objective's gradient in d.

    L = D_f(pi || p) + lambda * D(P_D, P_true),     P_D = a e^d / Z,     p = P_D times the target's other factors

The first term's gradient is generative distillation, E_p[(f(t) - t f'(t)) grad log p] with t = pi/p and grad log p = grad d -
E_p[grad d]. The second is one of

    ml       KL(P_true || P_D), maximum likelihood: E_{P_D}[grad d] - E_data[grad d] (Finn et al. 2016, arXiv 1611.03852)
    nce      a loss of the logit d + log a - log q, with the sampler q as the noise (Gutmann & Hyvarinen 2010; residual
             energies, Deng et al. 2020, arXiv 2004.11714): a surrogate with the same optimum, which also fixes Z = 1
    critic   D_f(P_D || P_true) itself: E_{P_D}[f'(s) grad log P_D], s = e^-l, l = log P_true/P_D = c - d by a second network c

Expectations under P_D and p are self-normalised importance-weighted sums over the policy's samples (and, with
`reference_negatives`, the reference's, in a mixture whose density is known).

Left out: the policy's side, which is f-DPG. Shapes: R real texts, F samples of this process, N of all processes, G prompts.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..partition import effective_sample_size, group_logsumexp, group_sum
from ..rollouts import Rollouts
from .discriminator_training import DiscriminatorLearner
from .logit_networks import LogitNetwork
from .losses import dual

# Entries of scores, which select cuts along.
COEFFICIENT, OFFSET, LOG_PI = "coefficient of grad d", "log a - log q", "log pi of real texts"


class EnergyLearner(DiscriminatorLearner):
    """Trains a network to be an energy.

    Args:
        log_weight: log P - log q of the whole target.
        critic: for the data term of that name, the second network.

    For the others see `DiscriminatorLearner`.
    """

    def __init__(
        self,
        network: LogitNetwork,
        *args,
        log_weight: Callable[[Rollouts], Tensor],
        critic: LogitNetwork | None = None,
        **kwargs,
    ):
        super().__init__(network, *args, **kwargs)
        self.log_weight = log_weight
        self.critic = None if critic is None else CriticLearner(critic, *args, energy=self)
        if self.network.dense:
            raise ValueError(
                "an energy is a number for a whole text: its prefixes have none. Use a discriminator that is not dense."
            )

    def __call__(self, rollouts: Rollouts, real: Rollouts) -> bool:
        if self.critic is not None:
            self.critic(rollouts, real)
        return super().__call__(rollouts, real)

    def prepare(self, fake: Rollouts, real: Rollouts) -> tuple[Rollouts, Rollouts]:
        """Copies with what each sample's grad d is multiplied by; for nce also the rest of the logit, and weights."""
        args = self.args
        shares_N, keep = self._shares(self._log_energy_weight(fake), fake)
        coefficient_N = torch.zeros_like(shares_N)
        if args.distil:
            coefficient_N += self._distillation(fake)
        real_coefficient = 0.0
        if args.data_term == "ml":
            coefficient_N += args.data_weight * shares_N
            real_coefficient = -args.data_weight / len(real)
        elif args.data_term == "critic":
            coefficient_N += args.data_weight * self._criticised(fake, shares_N)
        self.log({"energy/ess": effective_sample_size(shares_N.log())})
        offsets = self._offsets(fake, real) if args.data_term == "nce" else None
        plain, real = super().prepare(fake, real)
        # Each process adds up its own part, and gradients are averaged.
        plain.scores[COEFFICIENT] = coefficient_N[keep] * args.world_size
        real.scores[COEFFICIENT] = torch.full((len(real),), real_coefficient, dtype=torch.float64)
        if offsets is not None:
            plain.scores[OFFSET], real.scores[OFFSET] = offsets
        return plain, real

    def objective(self, real_BT: Tensor, fake_BT: Tensor, real: Rollouts, fake: Rollouts) -> Tensor:
        total = 0.0
        for logits_BT, side in ((real_BT, real), (fake_BT, fake)):
            total = total + (_like(side.scores[COEFFICIENT], logits_BT) * logits_BT[:, 0]).sum()
        if self.args.data_term == "nce":
            whole = (_with_offset(logits_BT, side) for logits_BT, side in ((real_BT, real), (fake_BT, fake)))
            total = total + self.args.data_weight * super().objective(*whole, real, fake)
        return total

    # ---- expectations ----

    def energy_weights(self, fake: Rollouts) -> Tensor:
        """(F,) weights of mean 1 (over all processes) that turn the sampler's distribution into P_D."""
        shares_N, keep = self._shares(self._log_energy_weight(fake), fake)
        return shares_N[keep] * len(shares_N)

    def _log_energy_weight(self, fake: Rollouts) -> Tensor:
        """(F,) log a + d - log q."""
        return self.network.whole_scores(fake) + self.actors.reference_logp(fake) - fake.sampler_logp_B

    def _shares(self, log_w_F: Tensor, fake: Rollouts) -> tuple[Tensor, slice]:
        """Weights of all processes' samples, which add up to 1/G for each prompt; and which of them are this process's."""
        log_w_N, group_N, groups = self._grouped(log_w_F, fake)
        shares_N = torch.exp(log_w_N - group_logsumexp(log_w_N, group_N, groups)[group_N]) / groups
        start = self.args.process_index * len(fake)
        return shares_N, slice(start, start + len(fake))

    def _grouped(self, numbers_F: Tensor, fake: Rollouts) -> tuple[Tensor, Tensor, int]:
        gather = self.actors.gather
        keys, group_N = torch.unique(gather(fake.prompt_key_B), return_inverse=True)
        return gather(numbers_F), group_N, len(keys)

    def _centred(self, shares_N: Tensor, numbers_N: Tensor, fake: Rollouts) -> Tensor:
        """(N,) shares times the numbers less their weighted mean for the prompt: of grad log p rather than grad d."""
        _, group_N, groups = self._grouped(fake.sampler_logp_B, fake)
        means_G = group_sum(shares_N * numbers_N, group_N, groups) * groups
        return shares_N * (numbers_N - means_G[group_N])

    def _distillation(self, fake: Rollouts) -> Tensor:
        """(N,) coefficients of E_p[(f(t) - t f'(t)) grad log p]."""
        log_w_F, divergence = self.log_weight(fake), self.divergence
        log_w_N, group_N, groups = self._grouped(log_w_F, fake)
        log_z_G = group_logsumexp(log_w_N, group_N, groups) - torch.bincount(group_N).double().log()
        shares_N, _ = self._shares(log_w_F, fake)
        log_ratio_N = self.actors.gather(fake.policy_logp_B - fake.sampler_logp_B)
        alive_N = log_w_N > -torch.inf
        log_t_N = torch.where(alive_N, log_ratio_N - log_w_N + log_z_G[group_N], 0.0)
        values_N = dual(log_t_N, divergence.f, divergence.f_prime)
        return self._centred(torch.where(alive_N, shares_N, 0.0), values_N, fake)

    def _criticised(self, fake: Rollouts, shares_N: Tensor) -> Tensor:
        """(N,) coefficients of E_{P_D}[f'(s) grad log P_D], s = P_D / P_true as the critic sees it."""
        log_ratio_F = self.critic.network.whole_scores(fake) - self.network.whole_scores(fake)
        logits_N, group_N, groups = self._grouped(log_ratio_F, fake)
        log_z_G = group_logsumexp(shares_N.log() + logits_N, group_N, groups) + math.log(groups)
        return self._centred(shares_N, self.divergence.f_prime(log_z_G[group_N] - logits_N), fake)

    # ---- samples of the reference beside the policy's ----

    def _with_earlier(self, fake: Rollouts, real: Rollouts) -> tuple[Rollouts, Rollouts]:
        """The samples, and as many of the reference as `reference_negatives` says, weighed as one mixture."""
        each = self.args.reference_negatives // len(real)
        if not each:
            return fake, real
        own = len(fake) // len(real)
        rows = [{"prompt": fake.prompts[n * own]} for n in range(len(real)) for _ in range(each)]
        rows = [
            row | {name: values[n // each * own] for name, values in fake.columns.items()} for n, row in enumerate(rows)
        ]
        more = self.actors.sample_reference(rows)
        more.policy_logp_B = self.actors.policy_logp(more)
        self.actors.reference_logp(fake)
        parts = [replace(part, scores={"reference_logp": part.scores["reference_logp"]}) for part in (fake, more)]
        both = Rollouts.concatenate(parts)
        blocks = torch.cat([torch.arange(len(real)).repeat_interleave(size) for size in (own, each)])
        both = both.select(blocks.argsort(stable=True))
        both.sampler_logp_B = self._log_mixture(both.policy_logp_B, both.scores["reference_logp"], own, each)
        return both, real

    def _log_mixture(self, log_pi: Tensor, log_a: Tensor, own: int, each: int) -> Tensor:
        shares = torch.tensor([own, each], dtype=torch.float64) / (own + each)
        return torch.logaddexp(log_pi + shares[0].log(), log_a + shares[1].log())

    def _offsets(self, fake: Rollouts, real: Rollouts) -> tuple[Tensor, Tensor]:
        """log a - log q of samples and real texts; models score a set of them once, however many steps it lasts."""
        offset_F = self.actors.reference_logp(fake) - fake.sampler_logp_B
        return offset_F, self.actors.reference_logp(real) - self._log_q(real)

    def _log_q(self, real: Rollouts) -> Tensor:
        """(R,) log-density of what the samples are from, at the real texts."""
        if LOG_PI not in real.scores:  # the policy stands still while the energy takes its steps
            real.scores[LOG_PI] = self.actors.policy_logp(real)
        log_pi, each = real.scores[LOG_PI], self.args.reference_negatives // len(real)
        if not each:
            return log_pi
        return self._log_mixture(log_pi, self.actors.reference_logp(real), self.args.num_generations, each)

    # ---- checkpoints ----

    def state_dict(self) -> dict:
        return super().state_dict() | {"critic": None if self.critic is None else self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])


class CriticLearner(DiscriminatorLearner):
    """Trains a network c such that c - d is log P_true/P_D: c itself is log P_true/a, which stands still while d moves.

    Args:
        energy: learns d.

    For the others see `DiscriminatorLearner`.
    """

    def __init__(self, *args, energy: EnergyLearner, **kwargs):
        super().__init__(*args, fake_weights=energy.energy_weights, **kwargs)
        self.energy = energy

    def prepare(self, fake: Rollouts, real: Rollouts) -> tuple[Rollouts, Rollouts]:
        offset_R = -self.energy.network.whole_scores(real)
        offset_F = -self.energy.network.whole_scores(fake)  # last, as its scores are wanted again
        fake, real = super().prepare(fake, real)
        fake.scores[OFFSET], real.scores[OFFSET] = offset_F, offset_R
        return fake, real

    def objective(self, real_BT: Tensor, fake_BT: Tensor, real: Rollouts, fake: Rollouts) -> Tensor:
        return super().objective(_with_offset(real_BT, real), _with_offset(fake_BT, fake), real, fake)


def _with_offset(logits_BT: Tensor, side: Rollouts) -> Tensor:
    return logits_BT + _like(side.scores[OFFSET], logits_BT)[:, None]


def _like(numbers_B: Tensor, tensor: Tensor) -> Tensor:
    return numbers_B.to(tensor.dtype).to(tensor.device)
