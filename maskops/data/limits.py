"""What fits a bin."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import isqrt

from maskops.data.lengths import check_count

MIN_FILL = 0.99
"""How full the bins of an epoch shall be: what is left in the end goes to fewer ranks where all would push it below."""


@dataclass(frozen=True)
class Limits:
    """The budgets of a bin, all of them hard.

    Attributes:
        capacity: Tokens.
        max_segments: Sequences; None for any number.
        max_attention_work: Sum of squared lengths; None for any.
    """

    capacity: int
    max_segments: int | None = None
    max_attention_work: int | None = None

    def __post_init__(self) -> None:
        check_count("capacity", self.capacity)
        for name in ("max_segments", "max_attention_work"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    @functools.cached_property
    def segments(self) -> int:
        """Sequences of a bin, as a number that is never reached without a budget."""
        return 1 << 62 if self.max_segments is None else self.max_segments

    @functools.cached_property
    def work(self) -> int:
        """Attention work of a bin; without a budget, that of one document of the whole capacity, which is the most."""
        return self.capacity**2 if self.max_attention_work is None else self.max_attention_work

    def longest(self, work: int) -> int:
        """The longest document that a bin of this work takes, if it has the room."""
        # Without a budget room is what ends: the squares of lengths within a capacity are less than its square.
        return self.capacity if self.max_attention_work is None else isqrt(self.work - work)

    @property
    def largest(self) -> int:
        """The longest document that a bin takes."""
        return min(self.capacity, isqrt(self.work))

    def check(self, document: int, length: int, more: int = 0) -> None:
        """Raises ValueError for a document that fits no bin even alone, and says how many ``more`` there are."""
        others = f" (and {more} more)" if more else ""
        if length > self.capacity:
            raise ValueError(
                f"document {document}{others} has {length} tokens, more than capacity={self.capacity}: truncate, split "
                "or filter such documents first, data.prepare(..., max_length=capacity, overlong=...), or raise it"
            )
        if length**2 > self.work:
            raise ValueError(
                f"document {document}{others} has {length} tokens, an attention work of {length**2}, more than "
                f"max_attention_work={self.max_attention_work}: raise it, or shorten the document with "
                "data.prepare(..., max_length=..., overlong=...)"
            )
