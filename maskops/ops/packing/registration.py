"""Operators that find and move the tokens of a padded batch on a CUDA device, and the functions around them.

Only the CUDA half of the extension implements them: elsewhere ``packing.py`` does the same with torch operations, which
are the meaning. Rows travel as bytes, so that every dtype does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskops.ops.calls import run

_library = torch.library.Library("maskops", "FRAGMENT")

# An absent tensor is an empty one.
_library.define("unpad_index(Tensor mask, Tensor unused, SymInt capacity) -> (Tensor, Tensor, Tensor)")
_library.define("gather_rows(Tensor source, Tensor index) -> Tensor")
_library.define("scatter_rows(Tensor source, Tensor index, SymInt rows) -> Tensor")

_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64)


@torch.library.register_fake("maskops::unpad_index", lib=_library)  # type: ignore[untyped-decorator]
def _(mask: Tensor, unused: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = mask.shape[0]
    indices = mask.new_empty(capacity, dtype=torch.int64)
    return indices, mask.new_empty(batch + 1, dtype=torch.int32), mask.new_empty(batch, dtype=torch.int32)


@torch.library.register_fake("maskops::gather_rows", lib=_library)  # type: ignore[untyped-decorator]
def _(source: Tensor, index: Tensor) -> Tensor:
    return source.new_empty(index.shape[0], source.shape[1])


@torch.library.register_fake("maskops::scatter_rows", lib=_library)  # type: ignore[untyped-decorator]
def _(source: Tensor, index: Tensor, rows: int) -> Tensor:
    return source.new_empty(rows, source.shape[1])


def unpad_index(mask: Tensor, unused: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of a padded batch are kept, without a look at the device.

    Args:
        mask: bool or integers (batch, length); what is not 0 is a real token.
        unused: the same of tokens that are kept but not counted, or None.
        capacity: tokens that there is room for; more are dropped.

    Returns:
        indices int64 (capacity,) into ``batch * length``, which stands for none behind the last; cu_seqlens int32
        (batch + 1,); real tokens of each row, int32 (batch,).
    """
    passed = [x if x.dtype in _MASKS else x != 0 for x in (mask, unused) if x is not None]
    found: tuple[Tensor, Tensor, Tensor] = run(
        torch.ops.maskops.unpad_index.default,
        passed[0].contiguous(),
        mask.new_empty(0, dtype=torch.bool) if unused is None else passed[1].contiguous(),
        capacity,
    )
    return found


def _as_bytes(x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], x.numel() // x.shape[0] if x.shape[0] else 0).contiguous()
    return rows.view(torch.uint8)


def _gathered(source: Tensor, index: Tensor) -> Tensor:
    shape = (index.shape[0], *source.shape[1:])
    if source.numel() == 0 or index.shape[0] == 0:
        return source.new_zeros(shape)
    moved: Tensor = run(torch.ops.maskops.gather_rows.default, _as_bytes(source), index.to(torch.int64).contiguous())
    return moved.view(source.dtype).reshape(shape)


def _scattered(source: Tensor, index: Tensor, rows: int) -> Tensor:
    shape = (rows, *source.shape[1:])
    if source.numel() == 0 or rows == 0:
        return source.new_zeros(shape)
    moved: Tensor = run(
        torch.ops.maskops.scatter_rows.default, _as_bytes(source), index.to(torch.int64).contiguous(), rows
    )
    return moved.view(source.dtype).reshape(shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = source.shape[0]
        return _gathered(source, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Scatter.apply(grad, index, ctx.rows), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _scattered(source, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Gather.apply(grad, index), None, None  # type: ignore[no-untyped-call]


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """``source[index]``, differentiable; an index beyond the rows gives 0.

    Args:
        source: (rows, ...), any dtype.
        index: integers (n,), none of them twice.
    """
    return _Gather.apply(source, index)  # type: ignore[no-any-return, no-untyped-call]


def scatter_rows(source: Tensor, index: Tensor, rows: int) -> Tensor:
    """Rows of ``source`` (n, ...) at their places among ``rows``, 0 elsewhere; differentiable.

    Args:
        source: (n, ...), any dtype.
        index: integers (n,); an index beyond the rows drops the row.
        rows: rows of the result.
    """
    return _Scatter.apply(source, index, rows)  # type: ignore[no-any-return, no-untyped-call]
