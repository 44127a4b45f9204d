"""Layouts and bounds on a device: the sequence and the spans of every row of a window of rows.

A window is evaluated from the operands alone, whatever lies before it, so that every program of the first launch finds
the spans of its rows, and of the few rows beyond them that it needs, without waiting for another.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(2**31 - 1)
_HALF = tl.constexpr(2**29)


@triton.jit
def number(encoded):
    """A number of a program, from the odd one that stands for it (see ``encoded``)."""
    return (encoded >> 1) - _HALF


def encoded(value: int) -> int:
    """A number as an argument in a tuple, an odd one above 1.

    Triton compiles a kernel anew where an integer of a tuple is 1 or becomes a multiple of 16; these are neither.

    Args:
        value: between -2**29 and 2**29.
    """
    return 2 * (value + 2**29) + 1


@triton.jit
def hull_of_mask(mask, size, b, length, W: tl.constexpr):
    """First and one past the last 1 of a batch element's row of a mask, 0 and 0 where there is none."""
    base = tl.minimum(b, size - 1).to(tl.int64) * length
    first = length
    last = length * 0
    for at in range(0, length, W):
        place = at + tl.arange(0, W)
        there = tl.load(mask + base + place, mask=place < length, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(there, place, length)))
        last = tl.maximum(last, tl.max(tl.where(there, place + 1, 0)))
    return tl.minimum(first, last), last


@triton.jit
def _offset_in(cumulative, index, size, total):
    """Element ``index`` of cumulative lengths, within its tensor and within the total."""
    value = tl.load(cumulative + index, mask=(index >= 0) & (index < size), other=0).to(tl.int64)
    return tl.minimum(tl.maximum(value, 0), total).to(tl.int32)


@triton.jit
def _of_cu_seqlens(queries, keys, size, row, q_len, k_len):
    """Rows and keys of the sequence in which each row lies, its number, and whether there is one."""
    low = row * 0
    high = low + size
    width = size
    while width > 0:  # how many elements are at most row
        middle = (low + high) // 2
        value = tl.load(queries + middle, mask=low < high, other=0).to(tl.int64)
        goes_up = (low < high) & (value <= row)
        low = tl.where(goes_up, middle + 1, low)
        high = tl.where((low < high) & ~goes_up, middle, high)
        width = width // 2
    index = low - 1
    inside = (index >= 0) & (index < size - 1)
    index = tl.where(inside, index, 0)
    q_start = tl.where(inside, _offset_in(queries, index, size, q_len), 0)
    q_end = tl.where(inside, _offset_in(queries, index + 1, size, q_len), 0)
    k_start = tl.where(inside, _offset_in(keys, index, size, k_len), 0)
    k_end = tl.where(inside, tl.maximum(_offset_in(keys, index + 1, size, k_len), k_start), 0)
    return q_start, q_end, k_start, k_end, index


@triton.jit
def _begins(ids, base, place, length):
    """Whether a document, or padding, begins at a place of one row; so does what lies behind the row."""
    known = (place >= 0) & (place < length)
    here = tl.load(ids + base + place, mask=known, other=0)
    before = tl.load(ids + base + place - 1, mask=known & (place > 0), other=0)
    return (known & ((place == 0) | (here != before))) | (place == length), known & (here >= 0)


@triton.jit
def _documents_before(ids, length, stop, W: tl.constexpr):
    """How many documents begin before the flat place ``stop`` of rows of ``length`` ids."""
    count = length * 0
    for at in range(0, stop, W):
        place = at + tl.arange(0, W)
        known = place < stop
        here = tl.load(ids + place, mask=known, other=-1)
        before = tl.load(ids + place - 1, mask=known & (place > 0), other=-1)
        count += tl.sum((known & (here >= 0) & ((place % length == 0) | (here != before))).to(tl.int32))
    return count


@triton.jit
def _of_ids(ids, size, b, row, first_row, length, scratch, ORDINALS: tl.constexpr, W: tl.constexpr):
    """Rows of the document in which each row of a window lies, and its number where that is wanted."""
    base = tl.minimum(b, size - 1).to(tl.int64) * length
    begins, inside = _begins(ids, base, row, length)
    count = tl.cumsum(begins.to(tl.int32))
    in_window = tl.sum(begins.to(tl.int32))
    tl.store(scratch + count - 1, row, mask=begins)
    tl.debug_barrier()
    start = tl.load(scratch + count - 1, mask=count > 0, other=-1)
    end = tl.load(scratch + count, mask=count < in_window, other=-1)
    tl.debug_barrier()

    # The document in which the window begins may have begun, and that in which it ends may end, far outside of it.
    began = length * 0 - 1
    at = first_row
    while (began < 0) & (at > 0):
        at -= W
        place = at + tl.arange(0, W)
        there, _ = _begins(ids, base, place, length)
        began = tl.max(tl.where(there, place, -1))
    ends = length * 0 - 1
    at = first_row + W
    while (ends < 0) & (at <= length):
        place = at + tl.arange(0, W)
        there, _ = _begins(ids, base, place, length)
        nearest = tl.min(tl.where(there, place, FAR))
        ends = tl.where(nearest == FAR, -1, nearest)
        at += W
    start = tl.where(start < 0, began, start)
    end = tl.where(end < 0, ends, end)
    start = tl.where(inside, start, 0)
    end = tl.where(inside, end, 0)

    ordinal = row * 0
    if ORDINALS:
        earlier = _documents_before(ids, length, base + tl.maximum(first_row, 0), W)
        if size == 1:
            earlier += b * _documents_before(ids, length, length, W)
        ordinal = earlier + tl.cumsum((begins & inside).to(tl.int32)) - 1
    return start, end, ordinal


@triton.jit
def sequences(
    LAYOUTS: tl.constexpr, operands, sizes, values, hulls, b, row, first_row, q_len, k_len, scratch,
    ORDINALS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Where the sequence of each row of a window lies: all layouts intersected.

    Args:
        LAYOUTS: as ``Program.structure`` gives it.
        operands: pointers.
        sizes: elements of the first dimension of each operand, 1 where all batch elements share one row.
        values: numbers of the program.
        hulls: first and end of the 1s of each mask, as ``hull_of_mask`` finds them.
        b: batch element.
        row: rows of the window, ``first_row`` and those behind it; some may lie outside of the tensor.
        first_row: as said.
        q_len: query rows.
        k_len: keys.
        scratch: room for W int32.
        ORDINALS: whether numbers of sequences are read.
        W: rows of the window.

    Returns:
        inside, sees (not a hole), k_start, k_end, diag, ordinal (of rows inside).
    """
    real = (row >= 0) & (row < q_len)
    q_start = row * 0
    q_end = q_start + q_len
    k_start = row * 0
    k_end = k_start + k_len
    ordinal = row * 0 + b
    sees = real
    for i in tl.static_range(len(LAYOUTS) // 5):
        operand = operands[LAYOUTS[5 * i + 1]]
        size = number(sizes[LAYOUTS[5 * i + 1]])
        if LAYOUTS[5 * i] == "key_length":
            k_end = tl.minimum(k_end, number(values[LAYOUTS[5 * i + 3]]))
        elif LAYOUTS[5 * i] == "cu_seqlens":
            q_from, q_to, k_from, k_to, index = _of_cu_seqlens(
                operand, operands[LAYOUTS[5 * i + 2]], size, row, q_len, k_len
            )
            q_start = tl.maximum(q_start, q_from)
            q_end = tl.minimum(q_end, q_to)
            k_start = tl.maximum(k_start, k_from)
            k_end = tl.minimum(k_end, k_to)
            if LAYOUTS[5 * i + 4]:
                ordinal = index
        elif LAYOUTS[5 * i] == "ids":
            begin, stop, index = _of_ids(operand, size, b, row, first_row, q_len, scratch, ORDINALS, W)
            q_start = tl.maximum(q_start, begin)
            q_end = tl.minimum(q_end, stop)
            k_start = tl.maximum(k_start, begin)
            k_end = tl.minimum(k_end, stop)
            if LAYOUTS[5 * i + 4]:
                ordinal = index
        elif LAYOUTS[5 * i] == "padding_mask" or LAYOUTS[5 * i] == "key_mask":
            first = hulls[LAYOUTS[5 * i + 3]][0]
            last = hulls[LAYOUTS[5 * i + 3]][1]
            k_start = tl.maximum(k_start, first)
            k_end = tl.minimum(k_end, last)
            if LAYOUTS[5 * i] == "padding_mask":
                q_start = tl.maximum(q_start, first)
                q_end = tl.minimum(q_end, last)
                base = tl.minimum(b, size - 1).to(tl.int64) * k_len
                sees = sees & (tl.load(operand + base + row, mask=real, other=0) != 0)
        else:
            at = tl.minimum(b, size - 1)
            length = tl.load(operand + at, mask=at >= 0, other=0).to(tl.int64)
            length = tl.minimum(tl.maximum(length, 0), k_len).to(tl.int32)
            if LAYOUTS[5 * i] == "padding_left":
                q_start = tl.maximum(q_start, k_len - length)
                k_start = tl.maximum(k_start, k_len - length)
            else:
                k_end = tl.minimum(k_end, length)
                if LAYOUTS[5 * i] == "padding_right":
                    q_end = tl.minimum(q_end, length)
    inside = real & (row >= q_start) & (row < q_end)
    k_start = tl.where(inside, k_start, 0)
    k_end = tl.where(inside, tl.maximum(k_end, k_start), 0)
    diag = tl.where(inside, k_end - q_end + row, 0)
    return inside, sees & inside, k_start, k_end, diag, ordinal


@triton.jit
def _chunk(k_start, diag, size):
    """Which chunk of ``size`` keys from the first key of its sequence a row stands in; negative before that key."""
    place = diag - k_start
    chunk = place // size
    return tl.where(place < chunk * size, chunk - 1, chunk)


@triton.jit
def _prefix_of(lengths, size, k_start, ordinal, farthest):
    """The end of a prefix whose length is that of the row's sequence."""
    at = tl.minimum(tl.maximum(ordinal, 0), size - 1)
    length = tl.load(lengths + at, mask=at >= 0, other=0).to(tl.int64)
    return k_start + tl.minimum(tl.maximum(length, -farthest), farthest).to(tl.int32)


@triton.jit
def spans(
    STEPS: tl.constexpr, N_SPANS: tl.constexpr, operands, sizes, values, sees, k_start, k_end, diag, ordinal, q_len,
    k_len,
):  # fmt: skip
    """The spans of each row, disjoint and sorted, as a tuple of starts and a tuple of ends.

    Args:
        STEPS: as ``Program.structure`` gives it.
        N_SPANS: how many spans they make.
        operands: as for ``sequences``, as are the others.
    """
    farthest = q_len + k_len + 1
    starts = ()
    ends = ()
    stack = ()
    for step in tl.static_range(len(STEPS) // 2):
        if STEPS[2 * step] == "span":
            start = tl.minimum(tl.maximum(stack[0], k_start), k_end)
            end = tl.minimum(tl.maximum(stack[1], start), k_end)
            starts = starts + (tl.where(sees, start, 0),)
            ends = ends + (tl.where(sees, end, 0),)
            stack = ()
        elif STEPS[2 * step] == "max":
            stack = stack[: len(stack) - 2] + (tl.maximum(stack[len(stack) - 2], stack[len(stack) - 1]),)
        elif STEPS[2 * step] == "min":
            stack = stack[: len(stack) - 2] + (tl.minimum(stack[len(stack) - 2], stack[len(stack) - 1]),)
        elif STEPS[2 * step] == "prefix_of":
            size = number(sizes[STEPS[2 * step + 1]])
            stack = stack + (_prefix_of(operands[STEPS[2 * step + 1]], size, k_start, ordinal, farthest),)
        elif STEPS[2 * step] == "first":
            stack = stack + (k_start,)
        elif STEPS[2 * step] == "last":
            stack = stack + (k_end,)
        else:
            value = number(values[STEPS[2 * step + 1]])
            if STEPS[2 * step] == "diag":
                stack = stack + (diag + value,)
            elif STEPS[2 * step] == "prefix":
                stack = stack + (k_start + value,)
            elif STEPS[2 * step] == "chunk_start":
                stack = stack + (k_start + _chunk(k_start, diag, value) * value,)
            else:
                stack = stack + (k_start + (_chunk(k_start, diag, value) + 1) * value,)
    for done in tl.static_range(N_SPANS - 1):
        for span in tl.static_range(N_SPANS - 1 - done):
            swapped = (starts[span + 1] < starts[span]) | (
                (starts[span + 1] == starts[span]) & (ends[span + 1] < ends[span])
            )
            start = tl.where(swapped, starts[span + 1], starts[span])
            end = tl.where(swapped, ends[span + 1], ends[span])
            other_start = tl.where(swapped, starts[span], starts[span + 1])
            other_end = tl.where(swapped, ends[span], ends[span + 1])
            starts = starts[:span] + (start, other_start) + starts[span + 2 :]
            ends = ends[:span] + (end, other_end) + ends[span + 2 :]
    for span in tl.static_range(1, N_SPANS):
        start = tl.maximum(starts[span], ends[span - 1])
        end = tl.maximum(ends[span], start)
        starts = starts[:span] + (start,) + starts[span + 1 :]
        ends = ends[:span] + (end,) + ends[span + 1 :]
    return starts, ends
