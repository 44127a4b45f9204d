"""Lengths of documents, however they are given: the one truth of this half of the package."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

Lengths = Iterable[Any] | Tensor
"""Lengths in tokens: a list of integers, a one-dimensional tensor or array of them."""


def read_lengths(lengths: Lengths, name: str = "lengths") -> list[int]:
    """Lengths as a list of Python's integers.

    Args:
        lengths: integers, 0 or more: a list, a tensor (n,) or an array (n,).
        name: what errors call them.

    Raises:
        TypeError: something that is no integer.
        ValueError: a negative length, or a tensor that is not one-dimensional.
    """
    if isinstance(lengths, Tensor) and lengths.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}, expected (n_documents,)")
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected a list, a tensor or an array of integers, got {type(lengths).__name__}")
    result = []
    for number, value in enumerate(values):
        try:
            length = _integer(value)
        except TypeError:
            raise TypeError(
                f"{name}[{number}] is {value!r}: expected a length in tokens, an integer; of token lists give "
                "[len(tokens) for tokens in documents]"
            ) from None
        if length < 0:
            raise ValueError(f"{name}[{number}]={length} is negative")
        result.append(length)
    return result


def check_count(name: str, value: object, least: int = 1) -> int:
    """An integer of at least ``least``, or an error that names the argument."""
    try:
        count = _integer(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected an integer") from None
    if count < least:
        raise ValueError(f"{name}={count}: expected {least} or more")
    return count


def _integer(value: Any) -> int:
    """Python's integer; TypeError for others, and for booleans, which would count as 0 and 1."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
