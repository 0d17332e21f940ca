"""Samples of the reference: to fit and replay before and in training, and others to judge by.

What a policy was trained on says little of the rest of p: one that replays a pool can be 0.04 nats from the pool and 0.6
nats from p (measured on the quickstart). So the two kinds never share a sample.

Left out: what is done with them. Shapes: B samples of this process.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from .actors import Actors
from .evaluation import repeated
from .rollouts import Rollouts

FITTING = 10**6  # salt of the random numbers; those of judging and of the policy's samples are others


class ReferencePools:
    """Samples of the reference, made in parts and kept on the CPU.

    Trainers of one reference may share what judges them: `trainer.reference_pools.share(other.reference_pools)`.
    """

    def __init__(self, actors: Actors):
        self.actors = actors
        self._pools: dict[tuple, Rollouts] = {}

    def judging(self, rows: Sequence[dict], total: int) -> Rollouts:
        """This process's share of about `total` samples for these rows (`prompt` and other columns), drawn once."""
        key = (total, *(repr(row["prompt"]) for row in rows))
        if key not in self._pools:
            self._pools[key] = self.actors.draw(repeated(rows, total), from_reference=True)
        return self._pools[key]

    def fitting(
        self, rows: Sequence[dict], total: int, log_score: Callable[[Rollouts], Tensor], wanted: int, most: int
    ) -> Rollouts:
        """`total` samples, then as many more until `wanted` of all processes have log P > -inf or `most` are drawn."""
        parts, drawn, found = [], 0, 0
        while not parts or found < wanted and drawn < most:
            parts.append(self.actors.draw(repeated(rows, total), from_reference=True, salt=FITTING + len(parts)))
            alive = (log_score(parts[-1]) > -float("inf")).double().sum()
            found += int(self.actors.gather(alive.view(1)).sum())
            drawn += total
        return Rollouts.concatenate(parts)

    def share(self, other: "ReferencePools") -> None:
        """Use another trainer's samples too, without what its target computed of them."""
        for key, pool in other._pools.items():
            scores = {"reference_logp": pool.scores["reference_logp"]}
            self._pools[key] = Rollouts(**(pool.state_dict() | {"scores": scores}))
