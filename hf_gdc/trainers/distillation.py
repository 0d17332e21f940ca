"""On-policy distillation, densely: the divergence of every next-token distribution, over the whole vocabulary.

    J = sum_t E_{x_<t ~ pi}[ D_f(pi(. | x_<t) || teacher(. | x_<t)) ]

GKD (Agarwal et al. 2023, arXiv 2306.13649) on the student's own samples, for any f; with `prefix_term` also through the
distribution of those samples (see `hf_gdc.dense`). J is the sequences' D_f(pi || teacher) for reverse KL alone; for that of
other f take `GDCTrainer` with a `Teacher`. Both vanish only where student and teacher agree.

Left out: mixing in the teacher's or a dataset's completions (train on those first), teachers with another tokenizer, and
products of a teacher with other factors, which have no next-token distributions.

Shapes: B samples, N real tokens, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..arguments import PolicyGradientConfig, suggest_options
from ..dense import dense_loss, token_divergence
from ..divergences import get_divergence
from ..evaluation import Scored, pooled_metrics, repeated
from ..rollouts import Rollouts
from ..scoring import PolicyOutput
from ..targets import Teacher
from ..targets.base import Factor, Target
from .policy_gradient import PolicyGradientTrainer


@suggest_options
@dataclass
class DistillationConfig(PolicyGradientConfig):
    """Options of `DistillationTrainer`; see `PolicyGradientConfig` for those of every trainer."""

    fit_samples: int = field(default=0, metadata={"help": "A teacher needs no fit; samples for a first report."})
    divergence: str = field(
        default="reverse_kl", metadata={"help": "Which f-divergence between next-token distributions."}
    )
    divergence_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its parameters, a JSON object: {"alpha": 0.5} for alpha.'}
    )
    prefix_term: bool = field(
        default=False,
        metadata={
            "help": "Also differentiate through the distribution of the sampled prefixes: the exact gradient, with more "
            "variance. False is the usual stop-gradient."
        },
    )
    teacher_top_k: int = field(
        default=0,
        metadata={
            "help": "Learn from the teacher's k likeliest next tokens, renormalised, which biases the student towards that "
            "truncated teacher; 0 for all. Needs a divergence that is finite where the teacher has no mass."
        },
    )

    _VALID_DICT_FIELDS = PolicyGradientConfig._VALID_DICT_FIELDS + ["divergence_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_top_k < 0:
            raise ValueError(f"teacher_top_k can't be negative, but is {self.teacher_top_k}; 0 means all tokens.")
        if self.replay_samples:
            raise ValueError(
                "the dense estimator needs log q of every token, which replayed samples lack: set replay_samples=0."
            )


class DistillationTrainer(PolicyGradientTrainer):
    """Trains a policy, the student, to match a teacher's next-token distributions on the student's own samples.

        DistillationTrainer("student", Teacher("teacher"), args=DistillationConfig(output_dir="out", max_steps=300)).train()

    Args: see `PolicyGradientTrainer`; `target` is a `Teacher` alone.

    Raises:
        ValueError: another target, vocabularies that differ, or a divergence that is infinite for a truncated teacher.
    """

    def __init__(self, model, target: Factor, args: DistillationConfig | None = None, **kwargs):
        args = DistillationConfig(output_dir="distillation") if args is None else args
        self.divergence = get_divergence(args.divergence, **(args.divergence_kwargs or {}))
        whole = target if isinstance(target, Target) else Target([target])
        if not (whole.normalised and isinstance(whole.terms[0][0], Teacher)):
            raise ValueError(
                f"the dense estimator needs next-token distributions of the target, which a Teacher alone has, but the target "
                f"is {whole.formula()}. Pass Teacher(model), or take GDCTrainer, which takes any target."
            )
        if args.teacher_top_k and not self.divergence.admits_hard_constraints:
            raise ValueError(
                f"{self.divergence.name} is infinite where the truncated teacher has no mass, and teacher_top_k="
                f"{args.teacher_top_k} cuts all other tokens: use kl, js, tv, hellinger or alpha below 1, or "
                "teacher_top_k=0."
            )
        self.teacher = whole.terms[0][0]
        self._judges: dict[tuple, Rollouts] = {}
        super().__init__(model, whole, args, **kwargs)
        sizes = [lm.get_output_embeddings().weight.shape[0] for lm in (self.actors.scorer.model, self.teacher.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the student gives probabilities to {sizes[0]} tokens and the teacher to {sizes[1]}: call "
                f"resize_token_embeddings({min(sizes)}) on the larger one, whose further rows the tokenizer does not use."
            )

    def sample_losses(self, model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, PolicyOutput]:
        """(B,) losses: their mean has the gradient of J, or without the prefix term its first part."""
        teacher_logits = self.teacher.lm.token_logits(rollouts)

        def divergence_of(logp_NV: Tensor, part: slice) -> Tensor:
            log_p_NV = torch.log_softmax(teacher_logits(part), -1, dtype=logp_NV.dtype)
            return token_divergence(logp_NV, log_p_NV, self.divergence, self.args.teacher_top_k)

        out = self.actors.scorer.rollouts(rollouts, module=model, extra=divergence_of)
        group_B = torch.unique(rollouts.prompt_key_B, return_inverse=True)[1]
        loss_B, metrics = dense_loss(
            out.extra_BT,
            out.logps_BT,
            rollouts.sampler_logps_BT.to(out.logps_BT),
            self.args.prefix_term,
            group_B.to(out.logps_BT.device),
            self.args.importance_clip,
        )
        self._averages.add({name: float(value.mean()) for name, value in metrics.items()})
        return loss_B, out

    def _make_rollouts(self, rows: list[dict]) -> Rollouts:
        """Samples of the student, unweighed: the teacher reads them once, with the loss."""
        self._last_rollouts = rollouts = self.actors.sample_policy(rows)
        self.actors.complete(rollouts)
        self._averages.add(self._sample_metrics(rollouts), samples=len(rows) * self.args.world_size)
        return rollouts

    def judge(self, policy: Rollouts, rows: list[dict]) -> dict[str, float]:
        """Divergences between student and teacher on whole sequences; the teacher's samples see what the student dropped.

        `kl_target_policy` is KL(teacher || student), `kl_policy_target` the other direction.
        """
        theirs = self.teacher_samples(rows, self.args.eval_samples)
        scored = self._scored(policy, policy.policy_logp_B)
        return pooled_metrics(scored, self._scored(theirs, self.actors.policy_logp(theirs)))

    def teacher_samples(self, rows: list[dict], total: int) -> Rollouts:
        """This process's share of about `total` completions of the teacher for these rows, drawn once."""
        key = (total, *(repr(row["prompt"]) for row in rows))
        if key not in self._judges:
            self._judges[key] = self.actors.draw(repeated(rows, total), False, other=self.teacher.model)
        return self._judges[key]

    def _scored(self, rollouts: Rollouts, policy_logp: Tensor) -> Scored:
        gather, teacher_logp = self.actors.gather, self.target.log_score(rollouts)
        return Scored(
            log_score=gather(teacher_logp),
            reference_logp=gather(teacher_logp),  # what the pool was drawn from
            policy_logp=gather(policy_logp),
            sampler_logp=gather(rollouts.sampler_logp_B),
            prompt_key=gather(rollouts.prompt_key_B),
        )
