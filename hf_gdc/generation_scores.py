"""What a model writes after prompts whose right answers are known as a distribution: several references for each.

Overlap with the references (BLEU, ROUGE) rises when a model repeats what is likeliest, so it says something only beside
diversity. `matched_temperature` brings two models to equal diversity: Caccia et al. 2018 (arXiv 1811.02549).

Left out: likelihoods of held-out text (`text_scores`), classifiers (`two_sample`). Shapes: B prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .metrics.diversity import distinct_n
from .metrics.embeddings import embedding_distance
from .metrics.overlap import bleu, rouge
from .metrics.self_bleu import self_bleu
from .rollouts import Rollouts
from .sampling import TransformersSampler
from .text_models import TextModel


@dataclass
class GenerationScores:
    """Draws and scores one completion for each prompt, with the same random numbers for every model.

    Args:
        tokenizer: of the models.
        prompts: B texts.
        references: for each, texts that may follow it.
        real: for each, one more such text, which is nobody's reference.
        encoder: reads prompt and completion for `embedding_distance`.
        max_completion_length: in tokens.
        seed: of the draws.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    real: Sequence[str]
    encoder: TextModel
    max_completion_length: int = 64
    seed: int = 0

    def draw(self, model: PreTrainedModel, temperature: float = 1.0, prompts: Sequence[str] | None = None) -> Rollouts:
        """One completion for each prompt; `sampler_logp_B` is its log-probability at this temperature."""
        sampler = TransformersSampler(self.tokenizer, self.max_completion_length, temperature=temperature)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return sampler(model, list(self.prompts if prompts is None else prompts))

    def scores(self, texts: Sequence[str]) -> dict[str, float]:
        """`bleu`, `rouge1`, `rouge2`, `rougeL` (0 to 100); `self_bleu`, `distinct_2` (0 to 1); `embedding_distance`."""
        ours, theirs = ([a + b for a, b in zip(self.prompts, side, strict=True)] for side in (texts, self.real))
        known = [[text.strip() for text in several] for several in self.references]
        bare = [text.strip() for text in texts]
        return {
            "bleu": bleu(bare, known),
            **rouge(bare, known),
            "self_bleu": self_bleu(bare),
            "distinct_2": distinct_n(bare, 2),
            "embedding_distance": embedding_distance(ours, theirs, self.encoder),
        }

    def matched_temperature(
        self, model: PreTrainedModel, diversity: Callable[[Rollouts], float], wanted: float, steps: int = 7
    ) -> float:
        """The temperature, of 1/2 to 2, at which what is drawn is as diverse as wanted: bisection, `steps` draws.

        Args:
            diversity: of completions; it rises with the temperature.
        """
        low, high = 0.5, 2.0
        for _ in range(steps):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if diversity(self.draw(model, middle)) < wanted else (low, middle)
        return (low * high) ** 0.5


def sampling_entropy(rollouts: Rollouts) -> float:
    """Nats per completion of what was sampled from, at its temperature."""
    return float(-rollouts.sampler_logp_B.mean())


def variety(rollouts: Rollouts) -> float:
    """1 - self-BLEU."""
    return 1 - self_bleu([text.strip() for text in rollouts.texts])
