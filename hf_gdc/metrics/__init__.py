"""Metrics of texts, as pure functions."""

from .diversity import distinct_n

__all__ = ["distinct_n"]
