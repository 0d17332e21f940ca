"""Targets: what the policy is to match."""

from .base import Context, Factor, Target
from .constraints import Moment, Pointwise
from .discriminator import Discriminator
from .reference import Policy, Reference
from .reward import Reward
from .teacher import Teacher

__all__ = [
    "Context",
    "Discriminator",
    "Factor",
    "Moment",
    "Pointwise",
    "Policy",
    "Reference",
    "Reward",
    "Target",
    "Teacher",
]
