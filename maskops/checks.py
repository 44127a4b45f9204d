"""Checks of single arguments: the lowest layer, which knows no layout. Messages begin with the caller's name of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_SINGLE = torch.finfo(torch.float32)
_SMALLEST_SOFTCAP = 1e-30  # scores are divided by it

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiling(function: _Function) -> _Function:
    """Makes Dynamo run the function while it traces, and keep the answer: for what it cannot trace.

    Leaves the mark of ``torch.compiler.assume_constant_result``, which itself imports all of Dynamo: most of the time
    that an import of maskops would take, in programs that never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiling
def has_autocast(device: str) -> bool:
    """Whether autocast knows a type of device; of meta and others it does not want to be asked."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to in this place of the program on a type of device, None where it is off."""
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_tensor(name: str, value: object, expected: str) -> None:
    """Raise TypeError for what is no tensor; ``expected`` says which one is meant."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: expected a dense one {expected}; pad it with x.to_padded_tensor(0.0)"
        )


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


def check_scale_and_softcap(softmax_scale: float | None, softcap: float) -> None:
    """Raises for numbers that attention cannot compute with: kernels hold them, and softcap's inverse, in float32."""
    if softmax_scale is not None and not -_SINGLE.max <= softmax_scale <= _SINGLE.max:
        raise ValueError(f"softmax_scale is {softmax_scale}: expected a finite number, in the range of float32")
    check_softcap(softcap)


def check_softcap(softcap: float) -> None:
    """Raises for a cap that kernels cannot hold in float32, or not its inverse."""
    if softcap != 0 and not _SMALLEST_SOFTCAP <= softcap <= _SINGLE.max:
        raise ValueError(
            f"softcap is {softcap}: expected 0 (none) or a positive number, {_SMALLEST_SOFTCAP} or more, in the range "
            f"of float32"
        )
