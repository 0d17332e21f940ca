"""The factor teacher(x): another language model's probability of the completion.

Alone it is the target of on-policy distillation: D_f(pi || teacher) on whole sequences, estimated by the score function
(`GDCTrainer`), or densely, token by token over the vocabulary (`DistillationTrainer`). MiniLLM (Gu et al. 2023, arXiv
2306.08543) is its reverse KL, GKD (Agarwal et al. 2023, arXiv 2306.13649) its dense form.

Left out: teachers with another tokenizer, whose probabilities are of other sequences.
"""

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..frozen import FrozenLM
from ..rollouts import Rollouts
from ..vocabularies import differing_tokens
from .base import Context, Factor

INSTEAD = (
    "Teach across tokenizers on text instead: Reference() * Reward(reward_funcs, beta) with a function that scores text (a "
    "judge, a reward model, the teacher's own log-likelihood of it), or fine-tune on text that the teacher wrote "
    "(black-box distillation)."
)


class Teacher(Factor):
    """teacher(x), the probability of the completion given the prompt under another model with the policy's tokenizer.

        GDCTrainer("student", Teacher("teacher"))                       p is the teacher; no Reference is needed
        GDCTrainer("student", Teacher("teacher") * Pointwise("contains:dragon"))

    Args:
        model: Hub id, path or model. It stays whole on every process, on the rollouts' device.
        processing_class: its tokenizer; default the one beside the model. Of a model that was not loaded from anywhere
            only the size of the vocabulary can be checked.
        batch_size: completions that it scores at a time.

    Raises:
        ValueError: when a trainer takes the target, if the two vocabularies differ (what to use instead is named).
    """

    normalised = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
    ):
        self.lm = FrozenLM(model, batch_size)
        self.model, self._processing_class = self.lm.model, processing_class

    def bind(self, context: Context) -> None:
        if context.tokenizer is not None:
            self._check_vocabulary(context.tokenizer)

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return self.lm.logp(rollouts)

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        own, theirs = self._tokenizer(), tokenizer.get_vocab()
        size = self.model.get_output_embeddings().weight.shape[0]
        if size <= max(theirs.values()):
            raise ValueError(
                f"the teacher {self.lm.name} gives probabilities to {size} tokens, and the policy's tokenizer has ids up to "
                f"{max(theirs.values())}: it must have the policy's vocabulary. {INSTEAD}"
            )
        if own is None:
            return
        differ, mine = differing_tokens(own, tokenizer), own.get_vocab()
        if differ:
            raise ValueError(
                f"the teacher {self.lm.name} has another vocabulary than the policy: {len(differ)} tokens differ, such as "
                f"{differ[0]!r} (id {mine.get(differ[0])} for the teacher, {theirs.get(differ[0])} for the policy). {INSTEAD}"
            )
        if own.eos_token_id != tokenizer.eos_token_id:
            raise ValueError(
                f"the teacher ends its texts with {own.eos_token!r} and the policy with {tokenizer.eos_token!r}: set one "
                "eos_token for both, the one that the teacher was trained with."
            )

    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self._processing_class is None and self.lm.path:
            try:
                self._processing_class = AutoTokenizer.from_pretrained(self.lm.path)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"there is no tokenizer beside the teacher {self.lm.path!r}: pass it, Teacher(model, processing_class="
                    "tokenizer); it must be the policy's."
                ) from error
        return self._processing_class

    def formula(self) -> str:
        return f"teacher_{self.lm.name}(x)"

    def to_dict(self) -> dict:
        if not self.lm.path:
            raise ValueError("a Teacher of a model without a name can't be saved: give its Hub id or path instead.")
        return {"model": self.lm.path, "batch_size": self.lm.batch_size}
