"""Checks of single arguments: the lowest layer, which knows no layout. Messages begin with the caller's name of one."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(name: str, value: object, expected: str) -> None:
    """Raise TypeError for what is no tensor; ``expected`` says which one is meant."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(value).__name__}")


def check_mask_values(name: str, mask: Tensor) -> None:
    """Raise ValueError for the first element that is neither 0 nor 1. Reads values, but not those of a bool tensor."""
    if mask.dtype == torch.bool:
        return
    bad = (mask != 0) & (mask != 1)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        place = f"[{', '.join(map(str, at))}]" if at else ""
        raise ValueError(
            f"{name}{place}={int(mask[at])}: a mask holds 0 and 1; for document ids use masks.documents(ids)"
        )
