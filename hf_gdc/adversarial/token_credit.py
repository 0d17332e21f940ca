"""Credit for every token from the log-ratios of prefixes, without a critic and without roll-outs.

    J = 1/L sum_{t <= L} D_f(pi_<=t || p_<=t),     D_f of the measures on the completions' prefixes of exactly t tokens

Its gradient is E_pi[sum_s c_s grad log pi(x_s | x_<s)], c_s = 1/L sum_{t >= s} f'(t_<=t): a reward-to-go. Off-policy each
prefix has its own ratio (pi/q)_<=t, which varies less than the whole completion's. With f' = 0 at 1, J is never negative, and 0
where all prefixes, and so all completions, agree.

Left out: where the log-ratios come from. Shapes: B samples of this process, N of all, T tokens, L the longest allowed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluation import Scored
from ..partition import group_logsumexp, leave_one_out_baseline
from ..rollouts import Rollouts
from ..scoring import PolicyOutput


class PrefixCredit:
    """The reward-to-go of prefixes, its baseline, and the loss.

    Args:
        length: L.
        gamma: discount of later prefixes; 1 gives the exact gradient.
    """

    def __init__(self, length: int, gamma: float = 1.0):
        self.length, self.gamma = length, gamma

    def assign(
        self,
        rollouts: Rollouts,
        scores_BT: Tensor,
        scored_N: Scored,
        pseudo_reward: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor],
        rank: int,
    ) -> None:
        """Set log p of each prefix and the baselines of its tokens, from the samples of all processes.

        Each length has a Z of its own, Z_t = E_q[e^l] with ended completions' last logits: prefixes are normalised as the
        completions are.

        Args:
            scores_BT: logits of prefixes, behind the end the last one's.
            scored_N: of all processes' samples.
        """
        log_q_BL = _stretched(rollouts.sampler_logps_BT.cpu().double().cumsum(1), self.length)
        log_e_BL = _stretched(scores_BT, self.length)
        inside_BL = torch.arange(self.length) < rollouts.lengths_B.cpu()[:, None]
        log_e_NL, inside_NL = gather(log_e_BL), gather(inside_BL)
        keys, group_N = torch.unique(scored_N.prompt_key, return_inverse=True)
        place_NL = group_N[:, None] * self.length + torch.arange(self.length)
        cells, size_N = len(keys) * self.length, torch.bincount(group_N)[group_N]
        log_z_NL = (
            group_logsumexp(log_e_NL.flatten(), place_NL.flatten(), cells)[place_NL] - size_N.double().log()[:, None]
        )
        # at the time of the rollouts pi_old/q is a sequence's, of warped sampling alone
        log_ratio_N = scored_N.policy_logp - scored_N.sampler_logp
        reward_NL = torch.where(inside_NL, pseudo_reward(log_z_NL - log_e_NL), 0.0)
        credit_NL = self.to_go(reward_NL)
        ratio_NL = log_ratio_N[:, None].expand_as(credit_NL)
        baseline_NL = torch.zeros_like(credit_NL)
        baseline_NL[inside_NL] = leave_one_out_baseline(
            credit_NL[inside_NL], ratio_NL[inside_NL], place_NL[inside_NL], cells
        )
        longest = rollouts.completion_ids_BT.shape[1]
        mine = slice(rank * len(rollouts), (rank + 1) * len(rollouts))
        rollouts.log_p_BT = (log_q_BL + log_e_BL - log_z_NL[mine])[:, :longest]
        rollouts.baseline_BT = baseline_NL[mine][:, :longest]

    def to_go(self, reward_BT: Tensor) -> Tensor:
        """(B, T) sums of this and later prefixes' rewards, over L."""
        credit_BT, following_B = torch.empty_like(reward_BT), torch.zeros_like(reward_BT[:, 0])
        if self.gamma == 1.0:
            return reward_BT.flip(1).cumsum(1).flip(1) / self.length
        for t in reversed(range(reward_BT.shape[1])):
            following_B = credit_BT[:, t] = reward_BT[:, t] + self.gamma * following_B
        return credit_BT / self.length

    def advantages(
        self, rollouts: Rollouts, logps_BT: Tensor, pseudo_reward: Callable[[Tensor], Tensor], clip: float | None = None
    ) -> Tensor:
        """(B, T) coefficients of grad log pi of each token, pi/q of the prefixes in them, under these log-probs."""
        mask_BT, like = rollouts.completion_mask_BT, logps_BT
        log_pi_BT = logps_BT.detach().cumsum(1)
        log_ratio_BT = log_pi_BT - rollouts.sampler_logps_BT.to(like).cumsum(1)
        ratio_BT = log_ratio_BT.exp() if clip is None else log_ratio_BT.exp().clamp(max=clip)
        reward_BT = pseudo_reward(log_pi_BT - rollouts.log_p_BT.to(like.dtype).to(like.device))
        credit_BT = self.to_go(torch.where(mask_BT, ratio_BT * reward_BT, 0.0))
        return torch.where(mask_BT, credit_BT - ratio_BT * rollouts.baseline_BT.to(like.dtype).to(like.device), 0.0)

    def loss(
        self, out: PolicyOutput, rollouts: Rollouts, pseudo_reward: Callable[[Tensor], Tensor], clip: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) surrogates whose mean over samples of q has J's gradient."""
        advantages_BT = self.advantages(rollouts, out.logps_BT, pseudo_reward, clip)
        ratio_B = (out.logps_BT.detach().sum(1) - rollouts.sampler_logps_BT.to(out.logps_BT).sum(1)).exp()
        metrics = {"sampling/importance_ratio": ratio_B, "pseudo_reward": advantages_BT[:, 0]}
        return -(advantages_BT * out.logps_BT).sum(1), metrics


def _stretched(numbers_BT: Tensor, length: int) -> Tensor:
    """(B, length): the last column repeated behind the longest completion."""
    return torch.cat([numbers_BT, numbers_BT[:, -1:].expand(-1, length - numbers_BT.shape[1])], 1)
