"""The quickstart's problem for benchmarks: a base model, its options, one judge for all methods, and a clock.

The base is the quickstart's, trained for longer: the quickstart stops at about 0.06 nats above the grammar, and a tail of
garbled stories then keeps every method above 0.3 nats (recipes/README.md). 400,000 stories come to 0.02 (a quarter of an
hour on one core).

The target p is the quickstart's, a(x) [dragon] exp(lambda she) with E[she] = 0.5. The judge fits lambda once on its own pool
of samples of the base and measures KL(p || pi) of any model on that pool and fresh samples of the model, weighed by the
balance heuristic (`hf_gdc.evaluation.pooled_metrics`). Clocks stand still while it does.
"""

import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gdc import GDCConfig
from hf_gdc.cli import parse_options
from hf_gdc.evaluation import Scored, pooled_metrics
from hf_gdc.rollouts import Rollouts
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer, evaluating
from hf_gdc.targets.base import Context, Target

BASE = "outputs/benchmarks/base/pretrain/model"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from recipes.quickstart.run import QuickstartArguments, make_target, pretrain_base  # noqa: E402

POOL_SEED = 20_001  # the judge's pool must not be a method's own


def quickstart_options(*words: str) -> tuple[QuickstartArguments, GDCConfig]:
    """The quickstart's options, with those in `words` (as on its command line) in place of the config's."""
    return parse_options(
        QuickstartArguments, GDCConfig, argv=["--config", str(ROOT / "recipes/quickstart/config.yaml"), *words]
    )


def load_base(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model at `folder`; OUTPUT/pretrain/model is made now if there is none."""
    path = Path(folder)
    if not path.is_dir():
        if path.parts[-2:] != ("pretrain", "model"):
            raise ValueError(f"there is no model at {folder!r}; to pretrain one, name a folder OUTPUT/pretrain/model.")
        longer = ["--num_stories", "400000", "--pretrain_batch_size", "128"]
        pretrain_base(*quickstart_options("--output_dir", str(path.parents[1]), *longer))
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


class Judge:
    """KL(p || pi) for any causal LM pi with the base's tokenizer, and p itself.

    Args:
        base, tokenizer: the model that the target is built on.
        max_length: most tokens of a completion.
        pool: samples of the base, or how many to draw. samples: fresh ones of the model, for each judgement. batch: so many
            at once.
        target: p; default the quickstart's.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer,
        max_length: int,
        pool: int | Rollouts,
        samples: int,
        batch: int = 1024,
        target: Target | None = None,
    ):
        self.base, self.samples, self.batch = base, samples, batch
        self.sampler = TransformersSampler(tokenizer, max_length)
        self.target = make_target() if target is None else target
        self.target.bind(Context(self._reference_logp, lambda prompts: self._draw(base, len(prompts), POOL_SEED)))
        self.pool = self._draw(base, pool, POOL_SEED) if isinstance(pool, int) else pool
        self.pool.scores["reference_logp"] = self.pool.policy_logp_B
        self.target.fit(self.pool)
        self.lam = self.target.moments[0].lam if self.target.moments else None
        self.pool_score = self.target.log_score(self.pool)
        self.alive = (self.pool_score > -math.inf).nonzero().flatten()
        self.accepted = self.pool.select(self.alive)
        log_w = (self.pool_score - self.pool.policy_logp_B)[self.alive]
        self._share, self.log_z = torch.softmax(log_w, 0), float(log_w.logsumexp(0)) - math.log(len(self.pool))

    def kl(self, model: PreTrainedModel, salt: int) -> tuple[float, float]:
        """KL(p || model) in nats and its standard error; leaves the random numbers of training alone."""
        metrics, _ = self.measure(model, salt)
        return metrics["kl_target_policy"], metrics["kl_target_policy_stderr"]

    def measure(self, model: PreTrainedModel, salt: int) -> tuple[dict[str, float], Rollouts]:
        """Every divergence between model and p, KL(model || base), and the model's samples that they are estimated from."""
        policy = self._draw(model, self.samples, 7919 * (salt + 1))
        policy_logp = torch.zeros(len(self.pool), dtype=torch.float64)
        policy_logp[self.alive] = self._score(model, self.accepted)
        mine = Scored(
            log_score=self.target.log_score(policy),
            reference_logp=self._reference_logp(policy),
            policy_logp=policy.policy_logp_B,
            sampler_logp=policy.sampler_logp_B,
            prompt_key=policy.prompt_key_B,
        )
        pool = Scored(
            log_score=self.pool_score,
            reference_logp=self.pool.policy_logp_B,
            policy_logp=policy_logp,
            sampler_logp=self.pool.sampler_logp_B,
            prompt_key=self.pool.prompt_key_B,
        )
        distance = float((mine.policy_logp - mine.reference_logp).mean())
        return pooled_metrics(mine, pool) | {"kl_policy_reference": distance}, policy

    def rough_kl(self, model: PreTrainedModel) -> float:
        """The same from the pool alone: quick, and good enough far away from p."""
        log_p = self.pool_score[self.alive] - self.log_z
        return float(self._share @ (log_p - self._score(model, self.accepted)))

    def _draw(self, model: PreTrainedModel, number: int, seed: int) -> Rollouts:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            sizes = [min(self.batch, number - at) for at in range(0, number, self.batch)]
            return Rollouts.concatenate([self.sampler(model, [""] * size) for size in sizes])

    def _reference_logp(self, rollouts: Rollouts) -> Tensor:
        if "reference_logp" not in rollouts.scores:
            rollouts.scores["reference_logp"] = self._score(self.base, rollouts)
        return rollouts.scores["reference_logp"]

    @torch.no_grad()
    def _score(self, model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
        scorer = Scorer(model)
        with evaluating(model):
            parts = [rollouts.select(part) for part in torch.arange(len(rollouts)).split(self.batch)]
            return torch.cat([scorer.rollouts(part).logp_B.double() for part in parts])


class Race:
    """A method's way to the goal: a clock that stops while the judge looks, the samples drawn, and the curve that he saw.

    Args:
        judge: of the problem.
        goal: KL(p || pi) in nats at which the method has arrived.
        every: seconds of the method between two looks.
        limit: seconds of the method after which it is told to stop; may be raised later.

    `curve` has [seconds, samples, KL, standard error], the last None where only the pool was looked at (KL above 3 goals).
    `reached` is the (seconds, samples) of the first crossing, interpolated between two looks, or None.
    """

    def __init__(self, judge: Judge, goal: float, every: float, limit: float):
        self.judge, self.goal, self.every, self.limit = judge, goal, every, limit
        self.samples = 0
        self.curve: list[list] = []
        self.reached: tuple[float, float] | None = None
        self.seconds, self._next, self._since = 0.0, every, None

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def running(self):
        """The clock runs, and every sequence that any model of the base's class generates meanwhile is counted."""
        kind = type(self.judge.base)
        plain = kind.generate

        def counted(*args, **kwargs):
            out = plain(*args, **kwargs)
            if self._since is not None:  # not the judge's
                self.samples += len(out if isinstance(out, Tensor) else out.sequences)
            return out

        kind.generate = counted
        self.resume()
        try:
            yield
        finally:
            self.pause()
            kind.generate = plain

    def look(self, model: PreTrainedModel) -> bool:
        """To be called after every step; True where the method shall stop."""
        self.pause()
        over = self.seconds >= self.limit
        if over or self.seconds >= self._next:
            kl, stderr = self.judge.rough_kl(model), None
            if kl < 3 * self.goal:
                kl, stderr = self.judge.kl(model, len(self.curve))
            self.curve.append([round(self.seconds, 3), self.samples, kl, stderr])
            self._next = self.seconds + self.every
            if kl <= self.goal:
                self.reached = self._crossing()
        self.resume()
        return over or self.reached is not None

    def _crossing(self) -> tuple[float, float]:
        now = self.curve[-1]
        if len(self.curve) == 1:
            return now[0], now[1]
        before = self.curve[-2]
        share = (before[2] - self.goal) / max(before[2] - now[2], 1e-12)
        return tuple(before[i] + share * (now[i] - before[i]) for i in (0, 1))

    def result(self) -> dict:
        seconds, samples, kl, stderr = self.curve[-1] if self.curve else (self.seconds, 0, None, None)
        return {
            "reached": self.reached is not None,
            "seconds": self.reached[0] if self.reached else seconds,
            "samples": self.reached[1] if self.reached else samples,
            "kl": kl,
            "kl_stderr": stderr,
            "curve": self.curve,
        }
