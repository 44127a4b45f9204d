"""Rows of any length and stride in 16-byte pieces, for Triton kernels that stream them.

Triton loads 16 bytes a thread only where it can tell that addresses are multiples of 16: a row of 50257 halves, or a
mask at its end, costs a load for every element. So a row is taken apart: whole groups of 16 bytes, which start where
the address says so, and the few elements before and behind them. Groups are masked as a whole, never inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP_BYTES = 16


def group_of(dtype: torch.dtype) -> int:
    """Elements of a group."""
    return GROUP_BYTES // dtype.itemsize


def aligned(tensor: Tensor) -> tuple[Tensor, int]:
    """The memory of a tensor from a multiple of 16 bytes on, and the place there of the tensor's first element."""
    if tensor.numel() == 0:
        return tensor, 0
    offset = tensor.storage_offset()
    lead = int(offset % group_of(tensor.dtype))
    return tensor.as_strided((1,), (1,), offset - lead), lead


def in_step(places: tuple[int, int], strides: tuple[int, int], group: int) -> bool:
    """Whether the groups of two matrices begin in the same columns of every row, given the place of their first one."""
    return (places[0] - places[1]) % group == 0 and (strides[0] - strides[1]) % group == 0


@triton.jit
def whole_groups(place, begin, end, GROUP: tl.constexpr):
    """Which of the elements [begin, end) of a row lie in whole groups, where the row's element 0 is at ``place``.

    Returns:
        first, last: the groups take the elements [first, last), a multiple of ``GROUP`` of them; at most ``GROUP - 1``
        elements lie on either side of them. Where there is no whole group, all are before ``first``.
    """
    first = tl.minimum((place + begin + GROUP - 1) // GROUP * GROUP - place, end)
    last = tl.maximum((place + end) // GROUP * GROUP - place, first)
    return first, last


@triton.jit
def edge_elements(begin, first, last, end, lane, GROUP: tl.constexpr):
    """The elements outside of whole groups, one a lane: their indices, and whether the lane has one at all.

    ``lane`` is the range of at least ``2 * GROUP`` lanes.
    """
    element = tl.where(lane < GROUP, begin + lane, last + lane - GROUP)
    return element, tl.where(lane < GROUP, element < first, element < end)


@triton.jit
def group_pointers(base, place, lane, GROUP: tl.constexpr, ALIGNED: tl.constexpr = True):
    """Pointers (lanes, GROUP) to neighbouring groups, the first of which begins at ``base + place``.

    ``ALIGNED``: ``place`` is a multiple of ``GROUP``, which is then written so that the compiler sees it.
    """
    if ALIGNED:
        place = place // GROUP * GROUP
    return base + place + (lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
