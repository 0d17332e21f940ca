"""How far a language model is from the grammar of the stories: exact but for the noise of sampling.

The grammar gives log p of every text, so that on samples

    KL(p || pi) = E_p[log p - log pi]
    JS = log 2 - (E_p[softplus(log pi - log p)] + E_pi[softplus(log p - log pi)]) / 2

where p = 0 outside the grammar, and for other tokens than the tokenizer's own of a text. Shapes: B texts.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gdc import Rollouts, stories
from hf_gdc.actors import score_in_parts
from hf_gdc.adversarial.real_text import RealTexts
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer

LENGTH, BATCH = 52, 500
JUDGED = 10_000  # samples of the grammar, and of each model


class Judge:
    """Exact log-probabilities of texts, and distances between the grammar and a model.

    Args:
        tokenizer: of the models. known: the texts that they have seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, known: list[str]):
        self.sampler, self.known = TransformersSampler(tokenizer, LENGTH), set(known)
        texts = stories.sample(JUDGED, 10**6)  # a seed of its own
        self.stories = self.rollouts(texts)
        self.log_p = torch.tensor([stories.log_prob(text) for text in texts], dtype=torch.float64)

    def rollouts(self, texts: list[str]) -> Rollouts:
        return RealTexts(self.sampler)([{"prompt": "", "completion": text} for text in texts], torch.device("cpu"))

    def log_pi(self, model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
        return score_in_parts(Scorer(model.eval()), rollouts, BATCH, torch.device("cpu"))

    def sample(self, model: PreTrainedModel, seed: int, count: int = JUDGED) -> Rollouts:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return Rollouts.concatenate([self.sampler(model.eval(), [""] * BATCH) for _ in range(count // BATCH)])

    def grammar(self, samples: Rollouts) -> Tensor:
        """(B,) log p of tokens: -inf where the text is not a story, was cut, or has other tokens than the tokenizer's."""
        own = self.rollouts(samples.texts).completion_ids()
        pairs = zip(samples.texts, own, samples.completion_ids(), strict=True)
        log_p = [stories.log_prob(text) if a == b else -math.inf for text, a, b in pairs]
        return torch.tensor(log_p, dtype=torch.float64)

    def model(self, model: PreTrainedModel) -> dict[str, float]:
        samples = self.sample(model, 1)
        return self.distances(self.log_pi(model, self.stories), samples, samples.policy_logp_B)

    def distances(
        self, log_pi: Tensor, samples: Rollouts, log_pi_own: Tensor, weights: Tensor | None = None
    ) -> dict[str, float]:
        """Distances in nats with standard errors, the entropy of a text in nats, shares of samples.

        Args:
            log_pi: of the grammar's stories. samples, log_pi_own, weights: of the model; weights turn them into its samples.
        """
        log_p_own = self.grammar(samples)
        ours, theirs = mean(softplus(log_pi - self.log_p)), mean(softplus(log_p_own - log_pi_own), weights)
        copied = torch.tensor([text in self.known for text in samples.texts]).double()
        found = {"kl": mean(self.log_p - log_pi), "entropy": mean(-log_pi_own, weights)}
        found |= {"grammatical": mean((log_p_own > -math.inf).double(), weights), "copied": mean(copied, weights)}
        found["js"] = (math.log(2) - (ours[0] + theirs[0]) / 2, math.hypot(ours[1], theirs[1]) / 2)
        return {name: value for name, (value, _) in found.items()} | {
            f"{name}_stderr": error for name, (_, error) in found.items()
        }


def mean(numbers: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """The (weighted) mean and its standard error."""
    shares = torch.ones_like(numbers) if weights is None else weights
    shares = shares / shares.sum()
    average = (shares * numbers).sum()
    return float(average), float((shares * (numbers - average)).square().sum().sqrt())
