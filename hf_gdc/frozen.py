"""A causal language model that is only read: another reference, a teacher.

Left out: sharding (such a model is whole on every process) and training. Shapes: B samples, P prompt, T completion.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .actors import score_in_parts
from .rollouts import Rollouts
from .scoring import Scorer, evaluating

_NUMBERS = itertools.count()


class FrozenLM:
    """Log-probs of completions under a model, `batch_size` at a time and once for each batch of rollouts.

    Args:
        model: Hub id, path or model; it follows the rollouts to their device.

    Raises:
        ValueError: when scored, if prompt and completion are longer than the model's context.
    """

    def __init__(self, model: PreTrainedModel | str, batch_size: int = 64):
        self.model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        self.model.eval()
        self.batch_size = batch_size
        self.scorer = Scorer(self.model)
        self.key = f"log-prob {next(_NUMBERS)} of {self.name}"  # of rollouts' scores: the same in every process and run
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def logp(self, rollouts: Rollouts) -> Tensor:
        """(B,) log-probs in nats, in float64 on the CPU."""
        if self.key not in rollouts.scores:
            self.follow(rollouts)
            rollouts.scores[self.key] = score_in_parts(self.scorer, rollouts, self.batch_size, self.model.device)
        return rollouts.scores[self.key]

    def token_logits(self, rollouts: Rollouts) -> Callable[[slice], Tensor]:
        """The logits (n, V) at a slice of the completions' real tokens: see `Scorer.token_logits`."""
        self.follow(rollouts)
        with evaluating(self.model):
            return self.scorer.token_logits(rollouts)

    def follow(self, rollouts: Rollouts) -> None:
        """Go to the rollouts' device, and check that they fit."""
        length = rollouts.prompt_ids_BP.shape[1] + rollouts.completion_ids_BT.shape[1] - 1
        if self.context is not None and length > self.context:
            raise ValueError(
                f"{self.name} reads {self.context} tokens, and a prompt with its completion has {length}: shorten the prompts "
                "or lower max_completion_length."
            )
        device = rollouts.completion_ids_BT.device
        if device.type != "cpu":  # pools lie on the CPU, and come to the model a batch at a time
            self.model.to(device)

    @property
    def path(self) -> str:
        """Where it was loaded from; empty if nowhere."""
        return self.model.config._name_or_path

    @property
    def name(self) -> str:
        """Its id without the owner, or its folder's name, which may move; its class's where it has neither."""
        return Path(self.path).name or type(self.model).__name__
