"""Where the gradient of the logits goes: a new tensor, over the logits, or memory that the caller keeps for it."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskops.checks import check_tensor
from maskops.ops.cross_entropy.arguments import dtype_name
from maskops.ops.transforms import under_transform


class GradientMemory(NamedTuple):
    """What ``maskops.cross_entropy`` was allowed to write a gradient to.

    Attributes:
        over_logits: the backward pass may overwrite the logits.
        buffer: (N, V), of the logits' dtype, which it may overwrite first of all; None where there is none.
    """

    over_logits: bool = False
    buffer: Tensor | None = None

    def of(self, logits: Tensor) -> Tensor | None:
        """Memory for the gradient of logits (N, V); None where a new tensor is to be made."""
        if self.buffer is not None:
            return self.buffer
        return logits.detach() if self.over_logits and _has_a_place_for_each_row(logits) else None


def _has_a_place_for_each_row(logits: Tensor) -> bool:
    return logits.stride(0) >= logits.shape[1] or logits.shape[0] <= 1


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_grad_buffer(buffer: Tensor, logits: Tensor) -> None:
    """Raises for memory that cannot hold the gradient of the logits (..., V)."""
    check_tensor("grad_buffer", buffer, "like the logits, or None")
    if buffer is logits:
        return
    if buffer.dtype != logits.dtype:
        raise TypeError(f"grad_buffer has dtype {dtype_name(buffer)}: expected that of logits, {dtype_name(logits)}")
    if buffer.shape != logits.shape:
        raise ValueError(f"grad_buffer has shape {tuple(buffer.shape)}: expected that of logits, {tuple(logits.shape)}")
    if buffer.device != logits.device:
        raise ValueError(f"grad_buffer is on {buffer.device}, logits on {logits.device}: put them on one device")
    if not buffer.is_contiguous():
        raise ValueError(
            f"grad_buffer has strides {tuple(buffer.stride())}: expected a contiguous tensor, torch.empty(shape)"
        )
    if buffer.requires_grad:
        raise ValueError("grad_buffer requires a gradient: expected memory alone, grad_buffer.detach()")
    if buffer.is_neg():
        raise ValueError("grad_buffer is a view that negates what it shows: expected plain memory")
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("grad_buffer was made in inference mode: expected memory made outside of it")


def memory_of(
    buffer: Tensor | None, over_logits: bool, logits: Tensor, matrix: Tensor, target: Tensor
) -> GradientMemory:
    """From the arguments of ``maskops.cross_entropy`` to rows of memory.

    Args:
        buffer: its ``grad_buffer``.
        over_logits: its ``inplace_backward``.
        logits: (..., V).
        matrix: the same as rows, (N, V), possibly a copy.
        target: labels or probabilities, which are read while the gradient is written.
    """
    if buffer is None or torch.compiler.is_compiling() or under_transform(matrix, buffer) or matrix.numel() == 0:
        return GradientMemory(over_logits)
    if buffer is logits and (logits.is_neg() or matrix.data_ptr() != logits.data_ptr()):
        return GradientMemory(over_logits)  # their values lie in no memory, or the rows are a copy of them
    first, last = _bytes_of(buffer)
    if first % buffer.element_size() != 0:
        raise ValueError(
            f"grad_buffer begins in the middle of an element of {dtype_name(buffer)}: expected torch.empty"
        )
    if target.numel() > 0:
        begin, end = _bytes_of(target)
        if first < end and begin < last:
            raise ValueError("grad_buffer shares memory with target: expected memory of its own, or logits itself")
    begin, end = _bytes_of(matrix)
    if first >= end or begin >= last:
        return GradientMemory(over_logits, buffer.detach().reshape(matrix.shape))
    same = first == begin and buffer.shape == logits.shape and buffer.stride() == logits.stride()
    if same and _has_a_place_for_each_row(matrix):
        return GradientMemory(over_logits, matrix.detach())
    if same or buffer is logits:
        return GradientMemory(over_logits)  # rows that overlap in memory cannot hold a gradient each
    raise ValueError("grad_buffer shares a part of its memory with logits: expected logits itself, or other memory")
