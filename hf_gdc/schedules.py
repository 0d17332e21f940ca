"""Learning rates that transformers' `lr_scheduler_type` lacks, or asks for in steps.

Left out: everything that it has.
"""

from bisect import bisect_right

import torch
from torch.optim.lr_scheduler import LambdaLR

TENTH = 0.1


def steps_of(amount: float, num_training_steps: int) -> int:
    """A number of steps, or below 1 a share of the run, as `TrainingArguments.warmup_steps` is read."""
    return int(amount) if amount >= 1 else round(amount * num_training_steps)


def constant_with_drops(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, drops: list[float]
) -> LambdaLR:
    """Linear warm-up, then constant, but for a fall to a tenth at each of these shares of the run."""
    at = sorted(steps_of(drop, num_training_steps) for drop in drops)

    def factor(step: int) -> float:
        warm = min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0
        return warm * TENTH ** bisect_right(at, step)

    return LambdaLR(optimizer, factor)
