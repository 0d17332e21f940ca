"""The proposal of a rejection sampler: a policy that draws, the reference that its draws are weighed against, and pools.

Where a trainer has its `Actors`, this stands alone: one process, models as they are, random numbers of its own.

Left out: what follows from a pool (`acceptance`), and accepting (`quasi_rejection`). Shapes: B samples.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .acceptance import AcceptancePool
from .actors import score_in_parts, split_rows
from .loading import load_policy, load_tokenizer
from .rollouts import Rollouts
from .sampling import TransformersSampler
from .scoring import Scorer


class Proposal:
    """Draws completions of a policy q or of its reference a, and scores them under both.

    Args:
        policy: a model, its path or Hub id.
        reference: the same, or None: under PEFT the policy with its adapter off, otherwise no reference. The policy itself
            if it is the same object or name.
        processing_class: the tokenizer; default: the one beside the policy.
        max_completion_length: in tokens. temperature: of q.
        batch_size: completions drawn and scored at once. seed: torch's global random numbers are left alone.

    `reference_kind` is "policy", "adapter_off", "model" or None.
    """

    def __init__(
        self,
        policy: "str | PreTrainedModel | PeftModel",
        reference: "str | PreTrainedModel | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        batch_size: int = 64,
        chat_template_kwargs: dict | None = None,
        model_init_kwargs: dict | None = None,
        seed: int = 42,
    ):
        self.temperature, self.batch_size = temperature, batch_size
        self.random = torch.Generator().manual_seed(seed)
        self.model = _load(policy, model_init_kwargs)
        self.scorer = self._reference_scorer = Scorer(self.model)
        self.reference: nn.Module | None = None
        self.reference_kind: str | None = None
        if reference is not None and (reference is policy or isinstance(reference, str) and reference == policy):
            self.reference, self.reference_kind = self.model, "policy"
        elif reference is not None:
            self.reference, self.reference_kind = _load(reference, model_init_kwargs), "model"
            self._reference_scorer = Scorer(self.reference)
        elif isinstance(self.model, PeftModel):
            self.reference, self.reference_kind = self.model, "adapter_off"
        self.sampler = TransformersSampler.from_options(
            load_tokenizer(processing_class, self.model),
            self.model,
            SimpleNamespace(
                max_completion_length=max_completion_length,
                temperature=temperature,
                top_k=0,  # truncation would hide a part of the target from every estimate
                top_p=1.0,
                min_p=None,
                repetition_penalty=1.0,
                chat_template_kwargs=chat_template_kwargs,
                generation_kwargs=None,
            ),
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def mixes(self) -> bool:
        """Whether samples of the reference can join a pool: it is another distribution, and q can score them."""
        return self.reference_kind in ("adapter_off", "model") and self.temperature == 1.0

    def draw(self, prompts: Sequence, from_reference: bool = False) -> Rollouts:
        """One completion for each of the B prompts (or rows), from q, or from a at temperature 1; log q or a is recorded."""
        prompts, columns = split_rows(prompts)
        model = self.reference if from_reference else self.model
        device = next(model.parameters()).device
        with self._adapters(from_reference), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.random)))
            rollouts = (self.sampler.unwarped() if from_reference else self.sampler)(model, prompts, columns)
        if from_reference or self.reference_kind == "policy":
            rollouts.scores["reference_logp"] = rollouts.policy_logp_B  # recorded while sampling
        return rollouts

    def draw_reference(self, prompts: Sequence) -> Rollouts:
        """One completion of the reference for each prompt, in batches, kept on the CPU."""
        parts = [prompts[at : at + self.batch_size] for at in range(0, len(prompts), self.batch_size)]
        return Rollouts.concatenate([self.draw(part, from_reference=True).tokens_to("cpu") for part in parts])

    def policy_logp(self, rollouts: Rollouts) -> Tensor:
        """(B,) log-probs under the policy at temperature 1."""
        return self._logp(self.scorer, rollouts)

    def reference_logp(self, rollouts: Rollouts) -> Tensor:
        """(B,) log a, computed once for the rollouts."""
        if "reference_logp" not in rollouts.scores:
            with self._adapters(off=True):
                rollouts.scores["reference_logp"] = self._logp(self._reference_scorer, rollouts)
        return rollouts.scores["reference_logp"]

    def _adapters(self, off: bool):
        return self.model.disable_adapter() if off and self.reference_kind == "adapter_off" else nullcontext()

    def _logp(self, scorer: Scorer, rollouts: Rollouts) -> Tensor:
        return score_in_parts(scorer, rollouts, self.batch_size, next(scorer.model.parameters()).device)


@torch.no_grad()
def pool_parts(
    proposal: Proposal, target, prompt, size: int, reference_share: float, bar
) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Batches of a prompt's pool: log P, log q and (where the reference mixes in) log a, (B,) each; and whose samples."""
    from_reference = round(size * reference_share) if proposal.mixes else 0
    parts = []
    for whose, wanted in ((False, size - from_reference), (True, from_reference)):
        for start in range(0, wanted, proposal.batch_size):
            rollouts = proposal.draw([prompt] * min(proposal.batch_size, wanted - start), whose)
            if whose:
                rollouts.sampler_logp_B = proposal.policy_logp(rollouts)
            log_q_B = rollouts.sampler_logp_B
            log_a_B = proposal.reference_logp(rollouts) if proposal.mixes else torch.zeros_like(log_q_B)
            parts.append((target.log_score(rollouts), log_q_B, log_a_B, whose))
            bar.update(len(log_q_B))
    return parts


def build_pool(parts: list[tuple[Tensor, Tensor, Tensor, bool]], confidence: float) -> AcceptancePool:
    """Balance-heuristic weights: a sample counts as drawn from the mixture of policy and reference."""
    log_score_B, log_q_B, log_a_B = (torch.cat([part[k] for part in parts]) for k in range(3))
    size, of_policy = len(log_q_B), sum(len(part[0]) for part in parts if not part[3])
    log_m_B = log_q_B
    if of_policy < size:
        log_m_B = torch.logaddexp(log_q_B + math.log(of_policy / size), log_a_B + math.log(1 - of_policy / size))
    return AcceptancePool(log_score_B, log_q_B, log_m_B, of_policy, confidence)


class AcceptedSamples:
    """Draws that were accepted and not yet asked for: batches are always full, and what is over is kept.

    A key is (text of the prompt, log beta). Samples leave in the order of drawing, so they stay independent.
    """

    def __init__(self, proposal: Proposal, target, max_draws_per_sample: int, disable_tqdm: bool):
        self.proposal, self.target = proposal, target
        self.max_draws_per_sample, self.disable_tqdm = max_draws_per_sample, disable_tqdm
        self._found: dict[tuple, list[Rollouts]] = defaultdict(list)
        self._drawn: dict[tuple, int] = defaultdict(int)
        self._sum_acc: dict[tuple, float] = defaultdict(float)

    def fill(self, prompt_of: dict, wanted: dict) -> None:
        """Draw full batches until there is what is wanted of each prompt."""
        missing = {key: count - self._count(key) for key, count in wanted.items()}
        limit = {key: self.max_draws_per_sample * count for key, count in missing.items()}
        draws: dict[tuple, int] = defaultdict(int)
        with tqdm(total=sum(max(0, n) for n in missing.values()), desc="accepted", disable=self.disable_tqdm) as bar:
            while short := [key for key, count in missing.items() if count > 0]:
                for key in short:
                    if draws[key] >= limit[key]:
                        found = wanted[key] - missing[key]
                        raise ValueError(
                            f"only {found} of {wanted[key]} samples after {draws[key]} draws for the prompt "
                            f"{str(prompt_of[key])[:60]!r}: an acceptance rate of about {self.rate(key):.2g}. Lower beta, ask "
                            "for a larger tv, train the policy towards the target, or raise max_draws_per_sample."
                        )
                keys = list(itertools.islice(itertools.cycle(short), self.proposal.batch_size))
                accepted = self._accept(self.proposal.draw([prompt_of[key] for key in keys]), keys)
                for key, part in accepted.items():
                    self._found[key].append(part)
                    bar.update(min(len(part), max(0, missing[key])))
                    missing[key] -= len(part)
                for key in short:
                    draws[key] += keys.count(key)
                bar.set_postfix(rate=f"{self.rate(*short):.3g}", refresh=False)

    @torch.no_grad()
    def _accept(self, rollouts: Rollouts, keys: list[tuple]) -> dict[tuple, Rollouts]:
        """The accepted draws of each prompt, in the order of drawing."""
        log_score_B = self.target.log_score(rollouts)
        log_w_B = log_score_B - rollouts.sampler_logp_B
        log_beta_B = torch.tensor([log_beta for _, log_beta in keys], dtype=torch.float64)
        alive_B = log_score_B > -math.inf
        log_acc_B = torch.where(alive_B, (log_w_B - log_beta_B).clamp_max(0.0), -math.inf)
        accepted_B = torch.rand(len(keys), dtype=torch.float64, generator=self.proposal.random) < log_acc_B.exp()
        rollouts.log_score_B, rollouts.sampler_logps_BT = log_score_B, None
        rollouts.sampler_logp_B = rollouts.sampler_logp_B + log_acc_B  # log p_beta, but for the rate: see take
        rollouts = rollouts.tokens_to("cpu")
        accepted = {}
        for key in dict.fromkeys(keys):
            own_B = torch.tensor([other == key for other in keys])
            self._drawn[key] += int(own_B.sum())
            self._sum_acc[key] += float(log_acc_B[own_B].exp().sum())
            if bool((own_B & accepted_B).any()):
                accepted[key] = rollouts.select((own_B & accepted_B).nonzero().flatten())
        return accepted

    def take(self, key: tuple, count: int, log_rate: float) -> Rollouts:
        """The oldest `count` samples; `sampler_logp_B` becomes log p_beta by the given acceptance rate."""
        found = Rollouts.concatenate(self._found[key])
        self._found[key] = [found.select(torch.arange(count, len(found)))] if len(found) > count else []
        taken = found.select(torch.arange(count))
        taken.sampler_logp_B = taken.sampler_logp_B - log_rate
        return taken

    def _count(self, key: tuple) -> int:
        return sum(len(part) for part in self._found[key])

    def rate(self, *keys: tuple) -> float:
        return sum(self._sum_acc[key] for key in keys) / max(1, sum(self._drawn[key] for key in keys))


def _load(model: "str | PreTrainedModel | PeftModel", model_init_kwargs: dict | None):
    if not isinstance(model, str):
        return model
    return load_policy(model, model_init_kwargs, None).to(PartialState().device)
