"""The factors a(x) and q(x): the frozen start of the policy, and the sampler itself."""

from torch import Tensor
from transformers import PreTrainedModel

from ..frozen import FrozenLM
from ..rollouts import Rollouts
from .base import BEFORE_JOINING, Context, Factor


class Reference(Factor):
    """a(x), the reference model.

    Args:
        model: None for what the policy was before training (under PEFT the model with its adapter off); a model or a Hub
            id for another one with the same tokenizer.
        batch_size: completions that such a model scores at a time. Without one, the trainer's own batches apply.
    """

    normalised = True

    def __init__(self, model: PreTrainedModel | str | None = None, batch_size: int = 64):
        self._own = None if model is None else FrozenLM(model, batch_size)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model of its own, if it has one."""
        return None if self._own is None else self._own.model

    def bind(self, context: Context) -> None:
        self._context = context

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return self._context.reference_logp(rollouts) if self._own is None else self._own.logp(rollouts)

    def formula(self) -> str:
        return "a(x)" if self._own is None else f"a_{self._own.name}(x)"

    def to_dict(self) -> dict:
        if self._own is None:
            return {}
        if not self._own.path:
            raise ValueError("a Reference of a model without a name can't be saved: give its Hub id or path instead.")
        return {"model": self._own.path}


class Policy(Factor):
    """q(x), whatever produced the rollouts; it contributes nothing to log P - log q.

    `Policy() * Discriminator(...)` is the target of a GAN. Where other samples have joined the rollouts, so that
    `sampler_logp_B` is the density of a mixture, `scores[BEFORE_JOINING]` is log q.
    """

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return rollouts.scores.get(BEFORE_JOINING, rollouts.sampler_logp_B)

    def formula(self) -> str:
        return "q(x)"
