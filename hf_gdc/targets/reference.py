"""The factors a(x) and q(x): the frozen start of the policy, and the sampler itself."""

from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..actors import score_in_parts
from ..rollouts import Rollouts
from ..scoring import Scorer
from .base import Context, Factor


class Reference(Factor):
    """a(x), the reference model.

    Args:
        model: None for what the policy was before training (under PEFT the model with its adapter off); a model or a Hub
            id for another one with the same tokenizer.
        batch_size: completions that such a model scores at a time. Without one, the trainer's own batches apply.
    """

    def __init__(self, model: PreTrainedModel | str | None = None, batch_size: int = 64):
        self.model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        self.batch_size = batch_size
        self._scorer = None if self.model is None else Scorer(self.model.eval())

    def bind(self, context: Context) -> None:
        self._context = context

    def log_score(self, rollouts: Rollouts) -> Tensor:
        if self._scorer is None:
            return self._context.reference_logp(rollouts)
        return self._own_logp(rollouts)

    def _own_logp(self, rollouts: Rollouts) -> Tensor:
        key = f"log-prob of {id(self)}"
        if key not in rollouts.scores:
            device = rollouts.completion_ids_BT.device
            self.model.to(device)
            rollouts.scores[key] = score_in_parts(self._scorer, rollouts, self.batch_size, device)
        return rollouts.scores[key]

    def formula(self) -> str:
        if self.model is None:
            return "a(x)"
        name = Path(self.model.config._name_or_path).name  # without its owner or folder, which may move
        return f"a_{name or type(self.model).__name__}(x)"

    def to_dict(self) -> dict:
        if self.model is None:
            return {}
        if not self.model.config._name_or_path:
            raise ValueError("a Reference of a model without a name can't be saved: give its Hub id or path instead.")
        return {"model": self.model.config._name_or_path}


class Policy(Factor):
    """q(x), whatever produced the rollouts; it contributes nothing to log P - log q.

    `Policy() * Discriminator(...)` is the target of a GAN.
    """

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return rollouts.sampler_logp_B

    def formula(self) -> str:
        return "q(x)"
