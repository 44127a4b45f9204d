"""Where the elements of a softmax lie, and which of them are visible: what the kernels of both passes share.

The common shape of all tensors is outer dimensions x length x lanes, see csrc/softmax.h. A tile is (S, K): S softmaxes,
which are rows or neighbouring lanes, with K elements each.
"""

import triton
import triton.language as tl


@triton.jit
def outer_place(outer, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3):
    """Place of outer index ``outer`` in a tensor; the outer sizes are (any, size_1, size_2, size_3)."""
    index_3 = outer % size_3
    outer = outer // size_3
    index_2 = outer % size_2
    outer = outer // size_2
    return outer // size_1 * stride_0 + outer % size_1 * stride_1 + index_2 * stride_2 + index_3 * stride_3


@triton.jit
def softmaxes(lanes, outer_count, S: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Outer indices and lanes of the S softmaxes of a program, and which of them there are.

    Returns:
        outer: one index, or S of them where softmaxes are rows.
        lane: one 0, or S lanes.
        there: (S,) bool.
    """
    program = tl.program_id(0).to(tl.int64)
    if LANES:
        strips = (lanes + S - 1) // S
        outer = program // strips
        lane = program % strips * S + tl.arange(0, S)
        there = lane < lanes
        if ALIGNED:  # by whole groups: the same, seen by the compiler
            there = lane // GROUP * GROUP < lanes
    else:
        outer = program * S + tl.arange(0, S)
        there = outer < outer_count
        outer = tl.where(there, outer, 0)
        lane = tl.zeros([S], tl.int64)
    return outer, lane, there


@triton.jit
def tile_pointers(base, place, lane, along, across, k, GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers (S, K). ``ALIGNED``: places, and steps between neighbours of another direction, are multiples of GROUP,
    which is then written so that the compiler sees it.
    """
    if LANES:
        if ALIGNED:
            pointers = base + place // GROUP * GROUP + (lane * across)[:, None]
            pointers = pointers + (k.to(tl.int64) * (along // GROUP) * GROUP)[None, :]
        else:
            pointers = base + place + (lane * across)[:, None] + (k.to(tl.int64) * along)[None, :]
    else:
        if ALIGNED:
            place = place // GROUP * GROUP
        pointers = base + place[:, None] + (k.to(tl.int64) * along)[None, :]
    return pointers


@triton.jit
def tile_mask(there, k, length, GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """(S, K) bool: the elements of a tile that there are; by whole groups where ALIGNED, which the compiler sees."""
    if ALIGNED and not LANES:
        k = k // GROUP * GROUP
    return there[:, None] & (k[None, :] < length)


@triton.jit
def span(start, end, n, span_stride, plan_place, there, written, length):
    """Span n of a row, clamped to the row and to what lies behind the spans before it.

    Returns:
        begin, stop, and ``written`` for the next span.
    """
    begin = tl.load(start + n * span_stride + plan_place, mask=there, other=0)
    stop = tl.load(end + n * span_stride + plan_place, mask=there, other=0)
    begin = tl.minimum(tl.maximum(begin, written), length)
    stop = tl.minimum(tl.maximum(stop, begin), length)
    return begin, stop, tl.where(begin < stop, stop, written)


@triton.jit
def plan_places(outer, q_len, rows_per_batch_element, plan_batch_stride, key_batch_stride):
    """Places of a row in start and end, and of its batch element in key_valid; strides of 0 serve every batch."""
    batch = outer // rows_per_batch_element
    return batch * plan_batch_stride + outer % q_len, batch * key_batch_stride


@triton.jit
def hull(start, end, n_spans, span_stride, plan_place, there, length):
    """First key and end of the keys that any span of a row covers, and of all rows together."""
    low = tl.zeros_like(plan_place).to(tl.int32) + length
    high = tl.zeros_like(low)
    written = tl.zeros_like(low)
    for n in range(n_spans):
        begin, stop, written = span(start, end, n, span_stride, plan_place, there, written, length)
        low = tl.minimum(low, tl.where(begin < stop, begin, length))
        high = tl.maximum(high, tl.where(begin < stop, stop, 0))
    return low, high


@triton.jit
def covered(k, start, end, n_spans, span_stride, plan_place, there, length):
    """(S, K) bool: the keys that the spans of the rows cover."""
    result = (k[None, :] < 0) & there[:, None]
    written = tl.zeros_like(plan_place).to(tl.int32)
    for n in range(n_spans):
        begin, stop, written = span(start, end, n, span_stride, plan_place, there, written, length)
        result = result | ((k[None, :] >= begin[:, None]) & (k[None, :] < stop[:, None]))
    return result


@triton.jit
def groups_of(k, low, high, GROUP: tl.constexpr):
    """(S, K) bool: the groups of elements that [low, high) touches; whole ones, so that loads stay wide."""
    first = k // GROUP * GROUP
    return (first[None, :] + GROUP > low[:, None]) & (first[None, :] < high[:, None])
