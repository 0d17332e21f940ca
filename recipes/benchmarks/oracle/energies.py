"""The unified objective with an energy that is a causal LM beside the generator's start a.

    L = D_f(P_G || P_D) + lambda * KL(P_D, P_true),    P_D = a e^d,    d = sum_t log(1 - w + w c(x_t | x_t-1) / a(x_t | x_<t))

c are the training sequences' counts of word pairs, smoothed (absolute discounting, Ney et al. 1994): they have one number for
each pair where the LSTM has 32 units, so they know and mistake other things than a, and the mixture is better than either. P_D
is a probability (Z = 1) that can be sampled and whose every next word has a distribution. So the policy's gradient for f = kl,
E_{P_D}[-grad log pi], is taken over samples of P_D, and over the next word exactly rather than by the one drawn:

    KL(P_D || pi) = E_{x ~ P_D} sum_t KL(P_D(. | x_<t) || pi(. | x_<t))

w is chosen on the validation sequences. In the game it moves slowly: of the training sequences the counts know more than of
others, so that their likelihood alone would trust the counts too much. The generator is pulled to a P_D that it can't learn by
heart, on as many fresh sequences as one likes, and keeps of the counts what its 32 units can say.

Left out: other f, for which the exact form holds for the words of one prefix alone. Shapes: B sequences, T words, N words of a
batch, V vocabulary.
"""

import copy

import torch
from language import LENGTH, START, nll
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from hf_gdc import UnifiedTrainer
from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.rollouts import Rollouts
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import PolicyOutput, Scorer

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def pair_probabilities(words_BT: Tensor, vocab_size: int, discount: float) -> Tensor:
    """(V, V) smoothed c(next | word): each seen pair gives `discount` of a count to the words' own frequencies."""
    before = torch.cat([torch.full_like(words_BT[:, :1], START), words_BT[:, :-1]], 1).flatten()
    place, seen = before * vocab_size + words_BT.flatten(), torch.ones(words_BT.numel())
    counts_VV = torch.zeros(vocab_size**2).scatter_add_(0, place, seen).view(vocab_size, vocab_size)
    total_V1 = counts_VV.sum(1, keepdim=True)
    free_V1 = torch.where(total_V1 > 0, discount * (counts_VV > 0).sum(1, keepdim=True) / total_V1.clamp_min(1), 1.0)
    words_V = torch.bincount(words_BT.flatten(), minlength=vocab_size) + 0.5
    return (counts_VV - discount).clamp_min_(0).div_(total_V1.clamp_min(1)).add_(free_V1 * (words_V / words_V.sum()))


class MixtureLM(PreTrainedModel, GenerationMixin):
    """P_D: a's next word with probability 1 - w, that of the pairs' counts with probability w; a may be any causal LM."""

    base_model_prefix = "reference"
    _supports_sdpa = True  # attention is the reference's matter

    def __init__(self, reference: PreTrainedModel, pairs_VV: Tensor, weight: float):
        super().__init__(reference.config)
        self.reference = reference
        self.weight_logit = nn.Parameter(torch.logit(torch.tensor(weight)))
        self.register_buffer("pairs_VV", pairs_VV, persistent=False)
        self.prepare_inputs_for_generation = reference.prepare_inputs_for_generation
        self._update_model_kwargs_for_generation = reference._update_model_kwargs_for_generation

    def forward(self, input_ids: Tensor, **kwargs) -> ModelOutput:
        out = self.reference(input_ids, **kwargs)
        pairs_BTV = self.pairs_VV[input_ids[:, -out.logits.shape[1] :]]
        out.logits = torch.lerp(torch.softmax(out.logits, -1), pairs_BTV, self.weight_logit.sigmoid()).log()
        return out

    def get_output_embeddings(self) -> nn.Module:
        return self.reference.get_output_embeddings()

    def _supports_default_dynamic_cache(self) -> bool:
        return self.reference._supports_default_dynamic_cache()


def make_energy(
    reference: PreTrainedModel, train_BT: Tensor, validation_BT: Tensor, discount: float = 0.9
) -> MixtureLM:
    """The mixture whose weight gives the validation sequences the least NLL."""
    pairs_VV = pair_probabilities(train_BT, reference.config.vocab_size, discount)
    mixtures = [MixtureLM(reference, pairs_VV, weight) for weight in WEIGHTS]
    return min(mixtures, key=lambda mixture: float(nll(mixture, validation_BT).mean()))


class ResidualEnergy(LogitNetwork):
    """d(x) = log P_D(x) - log a(x), of which the weight w is learned."""

    name = "residual energy"

    def __init__(self, mixture: MixtureLM, batch_size: int = 512):
        super().__init__(batch_size=batch_size)
        self.mixture = mixture
        self._scorers = Scorer(mixture), Scorer(mixture.reference)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [self.mixture.weight_logit]

    def forward(self, rollouts: Rollouts) -> Tensor:
        if rollouts.reference_logps_BT is None:
            with torch.no_grad():
                rollouts.reference_logps_BT = self._scorers[1].rollouts(rollouts).logps_BT
        words_BT = rollouts.completion_ids_BT
        before_BT = torch.cat([rollouts.prompt_ids_BP[:, -1:], words_BT[:, :-1]], 1)
        gain_BT = self.mixture.pairs_VV[before_BT, words_BT] / rollouts.reference_logps_BT.exp()
        return torch.log1p(self.mixture.weight_logit.sigmoid() * (gain_BT - 1)).sum(1, keepdim=True)

    @torch.no_grad()
    def next_words(self, rollouts: Rollouts) -> Tensor:
        """(N, V) P_D of every word of the completions, given those before."""
        return self._scorers[0].token_logits(rollouts)(slice(None)).exp()


class EnergySampler(TransformersSampler):
    """Samples P_D whatever model it is called with; what is drawn for evaluation comes from the policy as ever."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
        super().__init__(tokenizer, LENGTH)
        self.model = model

    def __call__(self, model, *args, **kwargs) -> Rollouts:
        rollouts = super().__call__(self.model, *args, **kwargs)
        rollouts.policy_logp_B = None  # the trainer scores the policy, as it does for other engines
        return rollouts

    def unwarped(self) -> TransformersSampler:
        return TransformersSampler(self.tokenizer, LENGTH)


class SampledEnergyTrainer(UnifiedTrainer):
    """`UnifiedTrainer` for `divergence="kl"` whose rollouts are P_D's, with the next word's distribution summed exactly."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert self.divergence.name == "kl", self.divergence.name
        self.actors.sampler = EnergySampler(self.processing_class, self.discriminator.network.mixture)

    def sample_losses(self, model, rollouts: Rollouts) -> tuple[Tensor, PolicyOutput]:
        """(B,) cross-entropies, whose mean over samples of P_D has the gradient of KL(P_D || pi)."""
        next_NV = self.discriminator.network.next_words(rollouts)
        out = self.actors.scorer.rollouts(
            rollouts, module=model, extra=lambda logp_NV, part: -(next_NV[part] * logp_NV).sum(-1)
        )
        self._averages.add({"cross_entropy_per_word": float(out.extra_BT.detach().mean())})
        return out.extra_BT.sum(1), out


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that stays as it is."""
    return copy.deepcopy(model).eval().requires_grad_(False)
