"""What the arguments of flash-attn's functions mean here; shared by all of them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from maskops import masks
from maskops.checks import check_tensor
from maskops.masks import Mask


def pattern_of(causal: bool, window_size: Sequence[int]) -> Mask | None:
    """flash-attn's window and causal as a mask; both are aligned to the bottom right, as every pattern is."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size is {window_size!r}: expected (left, right), -1 for unbounded")
    for width in window_size:
        if isinstance(width, bool) or not isinstance(width, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"window_size is {tuple(window_size)}: expected two ints, -1 for unbounded")
    left, right = (None if width < 0 else operator.index(width) for width in window_size)
    if causal:
        right = 0
    if left is None and right is None:
        return None
    return masks.causal() if left is None and right == 0 else masks.sliding_window(left, right)


def softcap_of(softcap: object) -> float:
    """A softcap as maskops has it: flash-attn takes any number of 0 or less for none."""
    if not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap is a {type(softcap).__name__}: expected a float")
    return max(float(softcap), 0.0)


def check_dimensions(name: str, x: object, dimensions: int, shape: str) -> None:
    """Raises for what is no tensor of so many dimensions; ``shape`` says what is expected."""
    check_tensor(name, x, shape)
    assert isinstance(x, Tensor)
    if x.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {dimensions} dimensions, {shape}")
