"""Adversarial training of a language model: a GAN, GAIL or GAD, by the f-divergence of your choice.

    p(x) = q(x) e^l(x) / Z,      l trained to be log p_data/q on samples of q, the policy as it was when it sampled

and the policy takes f-DPG steps to p: with pseudo-reward -f'(t), t = pi/p = pi Z / (q e^l). While pi = q and Z = 1 that is a
function of the logit alone, which names the classic GANs:

    divergence        reward, up to a constant     known as
    reverse_kl        l                            AIRL (Fu et al. 2018), GAD (Ye et al. 2025, arXiv 2511.10643)
    kl                e^l                          MaliGAN (Che et al. 2017, arXiv 1702.07983)
    js                softplus(l)                  the minimax GAN (Goodfellow et al. 2014, arXiv 1406.2661)
    seqgan            sigmoid(l)                   SeqGAN (Yu et al. 2017, arXiv 1609.05473), ScratchGAN
    non_saturating    -softplus(-l)                the non-saturating GAN

With a dense discriminator every token gets credit: J = sum_t D_f(pi_<=t || p_<=t) over the prefixes of t tokens has as its
exact gradient the reward-to-go of -f'(t_<=t); no roll-outs. The logits of prefixes are never added up.

Left out: images. Shapes: B samples of this process, N of all processes, T completion tokens.
"""

import torch
from torch import Tensor

from ..adversarial.arguments import GANConfig
from ..adversarial.real_text import with_completions
from ..adversarial.token_credit import PrefixCredit
from ..evaluation import Scored
from ..objectives import clipped_policy_loss
from ..rollouts import Rollouts
from ..scoring import PolicyOutput
from ..targets import Discriminator, Policy
from ..targets.base import Factor
from .adversarial import AdversarialTrainer


class GANTrainer(AdversarialTrainer):
    """Trains a policy against a discriminator, on real texts.

        GANTrainer("my-model", Discriminator("my-model"), args=GANConfig(output_dir="out"), train_dataset=texts).train()
        GANTrainer("my-model", Discriminator(dense=True), peft_config=LoraConfig(...), train_dataset=texts)

    Args:
        model: see `PolicyGradientTrainer`, as for everything that is not said here.
        discriminator: the factor e^l that is trained.
        target: further factors, constraints and rewards: the target is q e^l times these.
        args: a `GANConfig`.
        train_dataset: rows with `text`, or with `prompt` and `completion`.

    Raises:
        ValueError: see `AdversarialTrainer`.
    """

    def __init__(
        self, model, discriminator: Discriminator, target: Factor | None = None, args: GANConfig | None = None, **kwargs
    ):
        args = GANConfig(output_dir="gan") if args is None else args
        whole = Policy() * discriminator
        if target is not None:
            whole = whole * target
            if any(isinstance(factor, Discriminator) for factor, _ in whole.terms[2:]):
                raise ValueError("give the discriminator by itself; target has further factors alone.")
        self.prefix_credit = None
        if discriminator.dense and args.token_credit and target is None:
            self._check_token_credit(args)
            self.prefix_credit = PrefixCredit(args.max_completion_length, args.gamma)
        super().__init__(model, discriminator, whole, args, **kwargs)

    def _check_token_credit(self, args: GANConfig) -> None:
        if args.demonstrations:
            raise ValueError(
                "demonstrations are weighed as whole completions: use token_credit=False, or a discriminator that is not dense."
            )

    def assign_credit(self, rollouts: Rollouts, scored_N: Scored) -> None:
        credit = self.prefix_credit
        if credit is not None:
            scores_BT = self.discriminator.network.prefix_scores(rollouts)
            credit.assign(
                rollouts, scores_BT, scored_N, self.pseudo_reward, self.actors.gather, self.args.process_index
            )
        if self.args.cliprange is None:
            return
        if credit is not None:
            rollouts.advantages_BT = credit.advantages(rollouts, rollouts.sampler_logps_BT, self.pseudo_reward)
            return
        reward_B = self.pseudo_reward(rollouts.policy_logp_B - rollouts.log_score_B + rollouts.log_z_B)
        advantage_B = reward_B - rollouts.baseline_B
        rollouts.advantages_BT = advantage_B[:, None].to(rollouts.sampler_logps_BT).expand_as(rollouts.sampler_logps_BT)

    def policy_loss(self, out: PolicyOutput, reward_B: Tensor, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        if self.args.cliprange is not None:
            return self._clipped_loss(out, rollouts)
        if self.prefix_credit is None:
            return super().policy_loss(out, reward_B, rollouts)
        return self.prefix_credit.loss(out, rollouts, self.pseudo_reward, self.args.importance_clip)

    def _clipped_loss(self, out: PolicyOutput, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss with advantages that were fixed with the rollouts (Schulman et al. 2017, arXiv 1707.06347)."""
        old_BT = rollouts.sampler_logps_BT.to(out.logps_BT)
        losses_BT, clipped_BT = clipped_policy_loss(
            out.logps_BT, old_BT, rollouts.advantages_BT.to(out.logps_BT), self.args.cliprange
        )
        mask_BT = rollouts.completion_mask_BT
        metrics = {
            "sampling/importance_ratio": torch.exp((out.logps_BT.detach() - old_BT).sum(1)),
            "policy/clipfrac_avg": (clipped_BT & mask_BT).sum(1) / mask_BT.sum(1),
        }
        return torch.where(mask_BT, losses_BT, 0.0).sum(1), metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """What held-out texts say of `eval_samples` fresh completions; q e^l itself is no target to measure against.

        `nll` of the real texts under the policy (nats; KL(p_data || pi) up to the data's entropy), lower bounds of the
        divergences from the logits (`js_bound`, ...), the discriminator's accuracy, AUC and calibration, lengths, copies.
        """
        if eval_dataset is not None:
            eval_dataset = with_completions(eval_dataset)
        metrics = self.evaluate_game(eval_dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
