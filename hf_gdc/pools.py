"""Samples of the reference, drawn once: for the fit before training, for reports, for replay.

Left out: what is done with them. Shapes: B samples of this process.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from .actors import Actors
from .evaluation import repeated
from .rollouts import Rollouts


class ReferencePools:
    """Cached samples of the reference by prompts and size, shared between evaluations.

    Trainers of one reference may share theirs: `trainer.reference_pools.share(other.reference_pools)`.
    """

    def __init__(self, actors: Actors):
        self.actors = actors
        self._pools: dict[tuple, Rollouts] = {}

    def get(self, rows: Sequence[dict], total: int) -> Rollouts:
        """This process's share of about `total` samples for these rows (`prompt` and other columns)."""
        key = (total, *(repr(row["prompt"]) for row in rows))
        if key not in self._pools:
            self._pools[key] = self.actors.draw(repeated(rows, total), from_reference=True)
        return self._pools[key]

    def at_least(
        self, rows: Sequence[dict], total: int, log_score: Callable[[Rollouts], Tensor], wanted: int, most: int
    ) -> Rollouts:
        """`total` samples at first, then as many more until `wanted` have log P > -inf or `most` are drawn."""
        parts, drawn, found = [self.get(rows, total)], 0, 0
        while True:
            drawn += total
            alive = (log_score(parts[-1]) > -float("inf")).double().sum()
            found += int(self.actors.gather(alive.view(1)).sum())
            if found >= wanted or drawn >= most:
                return parts[0] if len(parts) == 1 else Rollouts.concatenate(parts)
            parts.append(self.actors.draw(repeated(rows, total), from_reference=True, salt=10**6 + len(parts)))

    def share(self, other: "ReferencePools") -> None:
        """Use another trainer's samples too, without what its target computed of them."""
        for key, pool in other._pools.items():
            scores = {"reference_logp": pool.scores["reference_logp"]}
            self._pools[key] = Rollouts(**(pool.state_dict() | {"scores": scores}))
