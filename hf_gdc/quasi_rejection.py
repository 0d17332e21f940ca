"""Certified sampling: draws of a policy, filtered towards the target, with estimates of what comes out.

Quasi-rejection sampling (Eikema et al. 2022, arXiv 2112.05702) accepts a draw x of the policy q with probability
min(1, P(x) / (beta q(x))). `acceptance` has the mathematics: one pool of samples gives the acceptance rate, KL and TV to the
target at every beta. A draw with P(x) = 0 is never accepted; GUARD (Khalifa et al. 2024, arXiv 2410.06716) is beta -> 0 with a
pure hard constraint.

beta is in units of P/q, as in the paper. Every prompt has its own Z, so one number means something else for each prompt:
give `tv` or `acceptance_rate` for a beta of its own from each prompt's pool.

A prompt is text, a chat, or a row of a dataset, {"prompt": ..., and the columns that features read}.

Left out: several processes and sharded models; changes of the policy's weights, after which a new sampler is due. Shapes:
B samples.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .acceptance import MIN_ESS, AcceptanceEstimate, AcceptancePool, check_choice
from .certificates import (
    factor_rows,
    prompt_row,
    reference_row,
    sampling_settings,
    write_card,
    write_custom_generate,
)
from .proposals import AcceptedSamples, Proposal, build_pool, pool_parts
from .rollouts import Rollouts
from .targets.base import Context, Factor, Target


class QuasiRejectionSampler:
    """Samples p_beta, which lies between the policy (small beta) and the target (large beta).

        sampler = QuasiRejectionSampler(target, "outputs/quickstart/model", tv=0.05, reference="outputs/.../base")
        sampler.pool(num_samples=20_000)
        print(sampler.estimates())
        stories = sampler.sample(100).texts

    Args:
        target: a product of factors, its moments fitted (as `Target.from_pretrained` loads it).
        policy: the proposal q: a model, its path or Hub id.
        beta: the threshold of P/q, one number for all prompts; or
        tv: the wanted upper bound of TV(p, p_beta), or
        acceptance_rate: the wanted lower bound of the acceptance rate: beta is then chosen for every prompt.
        guaranteed: promise that the target's hard constraints hold: refuse a target without any, and check every
            completion once more, afresh, before it is returned. Without beta, tv and acceptance_rate, whatever satisfies
            the constraints is accepted (beta -> 0).
        reference: what Reference() stands for: a model, its path or Hub id; the policy itself if it is the same object or
            name. Under PEFT, by default, the policy with its adapter off.
        processing_class: the tokenizer; default: the one beside the policy.
        max_completion_length: in tokens, as in training: it is part of what P and q are.
        temperature: of the proposal. Other than 1, the pool has no samples of the reference.
        batch_size: completions drawn and scored at once.
        pool_samples: for each prompt, where `pool` is not called first.
        confidence: of each one-sided bound.
        max_draws_per_sample: give up after so many draws for each wanted sample.
        seed: of everything random; torch's global random numbers are left alone.

    Raises:
        ValueError: options out of range or in conflict, a Reference() without a model, a guarantee without a hard
            constraint.
    """

    def __init__(
        self,
        target: Factor,
        policy: "str | PreTrainedModel | PeftModel",
        beta: float | None = None,
        *,
        tv: float | None = None,
        acceptance_rate: float | None = None,
        guaranteed: bool = False,
        reference: "str | PreTrainedModel | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        batch_size: int = 64,
        pool_samples: int = 8192,
        confidence: float = 0.95,
        max_draws_per_sample: int = 10_000,
        chat_template_kwargs: dict | None = None,
        model_init_kwargs: dict | None = None,
        seed: int = 42,
        disable_tqdm: bool = False,
    ):
        check_choice(beta, tv, acceptance_rate)
        for name, value in (("temperature", temperature), ("batch_size", batch_size), ("pool_samples", pool_samples)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, but is {value!r}.")
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), but is {confidence!r}.")
        self.target = target if isinstance(target, Target) else Target([target])
        if guaranteed and not self.target.hard:
            raise ValueError(
                "guaranteed=True needs a hard constraint in the target, such as Pointwise('contains:dragon'); "
                f"{self.target.formula()} has none."
            )
        self.beta, self.tv, self.acceptance_rate, self.guaranteed = beta, tv, acceptance_rate, guaranteed
        self.pool_samples, self.confidence = pool_samples, confidence
        self.max_draws_per_sample, self.disable_tqdm = max_draws_per_sample, disable_tqdm
        named = [factor for factor, _ in self.target.terms if type(factor).__name__ == "Reference"]
        owned = [factor.model for factor in named if factor.model is not None]
        if reference is None and owned and len(owned) == len(named):
            reference = owned[0]  # for the pool, which wants samples of it
        self.proposal = Proposal(
            policy,
            reference,
            processing_class,
            max_completion_length,
            temperature,
            batch_size,
            chat_template_kwargs,
            model_init_kwargs,
            seed,
        )
        if len(owned) < len(named) and self.proposal.reference_kind is None:
            raise ValueError(
                "the target has Reference() without a model, and there is no trainer here whose start it could be: pass "
                "reference=... (the model before training, or the policy itself), or write Reference('its/name')."
            )
        self.target.bind(
            Context(
                self.proposal.reference_logp, self.proposal.draw_reference, tokenizer=self.proposal.sampler.tokenizer
            )
        )
        self._restart()

    # ---- the pool and what follows from it ----

    def pool(
        self, prompts: Sequence = ("",), num_samples: int | None = None, reference_share: float = 0.5
    ) -> list[AcceptancePool]:
        """Draw `num_samples` more samples for the pool of each prompt and return the pools.

        A share comes from the reference where there is one: a policy's own samples cannot show a mode that it lost. The
        pool is for estimates alone; none of its samples is ever returned by `sample`, whose beta was chosen on them.

        Raises:
            ValueError: moments that were not fitted, a log P that is NaN or +inf, no sample with P > 0.
        """
        self._check_target()
        size = self.pool_samples if num_samples is None else num_samples
        if not size > 0 or not 0 <= reference_share < 1:
            raise ValueError(
                f"num_samples must be positive and reference_share in [0, 1), not {size!r} and {reference_share!r}."
            )
        prompts = list({repr(prompt): prompt for prompt in prompts}.values())
        with tqdm(total=size * len(prompts), desc="pool", leave=False, disable=self.disable_tqdm) as bar:
            for prompt in prompts:
                text = repr(prompt)
                self._parts[text] += pool_parts(self.proposal, self.target, prompt, size, reference_share, bar)
                self._prompts[text], self._pools[text] = prompt, build_pool(self._parts[text], self.confidence)
        return [self._pools[repr(prompt)] for prompt in prompts]

    def pool_of(self, prompt) -> AcceptancePool:
        """The pool of a prompt; None: of the only one.

        Raises:
            ValueError: no pool for it.
        """
        self._check_target()
        if prompt is None and len(self._pools) == 1:
            return next(iter(self._pools.values()))
        if repr(prompt) not in self._pools:
            known = ", ".join(text[:60] for text in self._pools) or "none"
            raise ValueError(
                f"there is no pool for the prompt {prompt!r}; there are pools for: {known}. "
                "Call pool([prompt]) first, and pass prompt=... where there are several."
            )
        return self._pools[repr(prompt)]

    def estimates(self, betas: Sequence[float] | None = None, prompt=None) -> list[AcceptanceEstimate]:
        """Acceptance rate, TV and KL at each beta (in units of P/q; default: Z * 2^k for k = -4 to 4), from the pool.

        Args:
            prompt: which one, where there are pools of several.

        Raises:
            ValueError: a beta that is not positive, or an unknown prompt.
        """
        pool = self.pool_of(prompt)
        if betas is None:
            return [pool.at(pool.log_z + k * math.log(2)) for k in range(-4, 5)]
        for beta in betas:
            check_choice(beta)
        return [pool.at(math.log(beta)) for beta in betas]

    def beta_for(self, tv: float | None = None, acceptance_rate: float | None = None, prompt=None) -> float:
        """The smallest beta (in units of P/q) with TV(p, p_beta) at most `tv`, or the largest that accepts at least the
        share `acceptance_rate`, each with the pool's confidence.

        Raises:
            ValueError: not exactly one of the two, out of (0, 1), out of reach, or a pool too small to certify it (the
                message says how many samples are needed).
        """
        if (tv is None) == (acceptance_rate is None):
            raise ValueError("beta_for needs either tv or acceptance_rate.")
        pool = self.pool_of(prompt)
        return math.exp(
            pool.log_beta_for_tv(tv) if tv is not None else pool.log_beta_for_acceptance_rate(acceptance_rate)
        )

    def log_beta(self, prompt="") -> float:
        """log beta that `sample` uses for a prompt; -inf where whatever has P > 0 is accepted. May draw the pool."""
        if self.beta is not None:
            return math.log(self.beta)
        if self.tv is None and self.acceptance_rate is None:
            if not self.guaranteed:
                raise ValueError("say how to accept: pass beta, tv, acceptance_rate or guaranteed=True to the sampler.")
            return -math.inf
        self._check_target()
        if repr(prompt) not in self._pools:
            self.pool([prompt])
        if repr(prompt) not in self._log_betas or self._log_betas[repr(prompt)][0] != self._pools[repr(prompt)].size:
            pool = self._pools[repr(prompt)]
            by_tv = self.tv is not None
            chosen = pool.log_beta_for_tv(self.tv) if by_tv else pool.log_beta_for_acceptance_rate(self.acceptance_rate)
            self._log_betas[repr(prompt)] = (pool.size, chosen)
        return self._log_betas[repr(prompt)][1]

    # ---- sampling ----

    def sample(self, num_samples: int, prompts: Sequence = ("",)) -> Rollouts:
        """Exactly `num_samples` accepted completions for each prompt, prompt by prompt.

        Every batch is full; accepted samples beyond what was asked are kept for the next call. `sampler_logp_B` is
        log p_beta, with the acceptance rate of the pool or, without one, of all draws so far.

        Raises:
            ValueError: too few accepted after `max_draws_per_sample` draws for each (the message has the acceptance
                rate), or a completion that fails the guarantee when checked again. Nothing else is returned instead.
        """
        self._check_target()
        if not (isinstance(num_samples, int) and num_samples > 0 and prompts):
            raise ValueError(
                f"sample needs a positive number of samples and a prompt, not {num_samples!r} and {prompts!r}."
            )
        keys = [(repr(prompt), self.log_beta(prompt)) for prompt in prompts]
        wanted = {key: num_samples * keys.count(key) for key in keys}
        self._accepted.fill(dict(zip(keys, prompts, strict=True)), wanted)
        parts = []
        for key in keys:
            pool = self._pools.get(key[0])
            rate = self._accepted.rate(key) if pool is None else pool.at(key[1]).acceptance_rate
            parts.append(self._accepted.take(key, num_samples, math.log(rate)))
        rollouts = Rollouts.concatenate(parts).tokens_to(self.proposal.device)
        if self.guaranteed:
            self._check_again(rollouts)
        return rollouts

    def _check_again(self, rollouts: Rollouts) -> None:
        """Features may not be functions of the completion alone (a judge, a clock): look once more at what goes out."""
        named = {feature.name for factor, _ in self.target.terms for feature in factor.features}
        kept = {name: value for name, value in rollouts.scores.items() if name not in named}
        violated = self.target.log_score(replace(rollouts, scores=kept)) == -math.inf
        if bool(violated.any()):
            row = int(violated.nonzero()[0])
            raise ValueError(
                f"{int(violated.sum())} of {len(rollouts)} accepted samples violate a hard constraint when checked again, such "
                f"as {rollouts.texts[row][:80]!r}: a feature gives different answers for one completion. Make it "
                "deterministic; nothing is returned."
            )

    def save_pretrained(self, path: "str | Path", save_reference: bool = False, repo_id: str | None = None) -> None:
        """Write a folder for `model.generate(..., custom_generate=path, trust_remote_code=True)`, without hf_gdc.

        It holds the code, the target with copies of its feature files, the certificate of every prompt with a pool (the
        empty prompt if there is none yet), and a card. Upload it to a repository of its own: in the model's it would
        replace `generate`.

        Args:
            save_reference: write the reference's weights to path/reference too; otherwise the name it was loaded from is
                written down.
            repo_id: where the folder will be uploaded, so that the reference's weights are looked for there.

        Raises:
            ValueError: a feature that can't travel (a lambda, a function of a script), a reference without a name, a pool
                too small for a certificate.
        """
        reference = reference_row(self.proposal, Path(path), save_reference, repo_id)
        factors = factor_rows(self.target, reference)  # says what can't travel before anything is drawn
        if not self._pools:
            self.pool()
        prompts, rows = [], []
        for text, prompt in self._prompts.items():
            self._pools[text].require_ess(MIN_ESS, "for a certificate")
            rows.append({"prompt": prompt, **self._pools[text].at(self.log_beta(prompt)).to_dict()})
            prompts.append(prompt_row(self.proposal, prompt, rows[-1]["log_beta"]))
        limits = {"max_draws_per_sample": self.max_draws_per_sample, "batch_size": self.proposal.batch_size}
        settings = {"formula": self.target.formula(), "factors": factors, "prompts": prompts} | limits
        write_custom_generate(Path(path), self.target, settings | sampling_settings(self.proposal, prompts[0]))
        if save_reference and reference is not None and reference["kind"] == "model":
            self.proposal.reference.save_pretrained(Path(path) / "reference")
        write_card(Path(path), self.target.formula(), self._how(), rows, reference)

    def _how(self) -> str:
        if self.tv is not None:
            return f"the smallest with TV(p, p_beta) <= {self.tv:g}, for each prompt"
        if self.acceptance_rate is not None:
            return f"the largest with an acceptance rate >= {self.acceptance_rate:g}, for each prompt"
        return "0: whatever has P > 0 is accepted" if self.beta is None else f"{self.beta:g} in units of P/q"

    # ---- inside ----

    def _check_target(self) -> None:
        """Pools and kept samples are of one P: start afresh if it changed."""
        unfitted = [moment.feature.name for moment in self.target.moments if not moment.lam]
        if unfitted and self.target.ess == 0:
            raise ValueError(
                f"lambda of the moment {', '.join(unfitted)} has not been fitted. Load the target that training saved "
                "(Target.from_pretrained), or fit it first: sampler.target.report(prompts, num_samples=...)."
            )
        if self._version != (self.target.version, str([moment.lam for moment in self.target.moments])):
            self._restart()

    def _restart(self) -> None:
        self._version = (self.target.version, str([moment.lam for moment in self.target.moments]))
        self._prompts: dict[str, object] = {}
        self._parts: dict[str, list[tuple]] = defaultdict(list)
        self._pools: dict[str, AcceptancePool] = {}
        self._log_betas: dict[str, tuple[int, float]] = {}
        self._accepted = AcceptedSamples(self.proposal, self.target, self.max_draws_per_sample, self.disable_tqdm)
