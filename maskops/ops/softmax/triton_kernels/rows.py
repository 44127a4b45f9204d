"""Rows that are too long for a chip, with neighbouring elements: streamed twice, in 16-byte pieces.

A row is read once for its maximum and its sum and a second time, from the cache it was left in, for the results. With
spans only what they cover is read.
"""

import triton
import triton.language as tl

from maskops.ops.softmax.triton_kernels.places import hull, outer_place, plan_places, span
from maskops.ops.triton_language import LOG2E
from maskops.ops.triton_rows import edge_elements, group_pointers, whole_groups


@triton.jit
def _reference(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _add(x, visible, top, total, nans):
    """Adds a tile (lanes, k) to the maximum and the sum of the lanes; what is not visible counts as -inf."""
    scores = tl.where(visible, x, float("-inf"))
    raised = tl.maximum(top, tl.max(tl.maximum(scores, float("-inf")), 1))
    reference = _reference(raised)
    alpha = tl.where(top == float("-inf"), 0.0, tl.exp2((top - reference) * LOG2E))
    total = total * alpha + tl.sum(tl.exp2((scores - reference[:, None]) * LOG2E), 1)
    return raised, total, tl.maximum(nans, tl.max((scores != scores).to(tl.int32), 1))


@triton.jit
def _visible(pointers, there, MASKED: tl.constexpr):
    """Which elements their bytes show, among those that are there."""
    if MASKED:
        there = there & (tl.load(pointers, mask=there, other=0) != 0)
    return there


@triton.jit
def _sum_piece(
    x, x_place, mask, mask_place, mask_along, begin, end, lane, top, total, nans,
    GROUP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, MASK_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds the elements [begin, end) of a row."""
    first, last = whole_groups(x_place, begin, end, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(begin, first, last, end, lane, GROUP)
    visible = _visible(mask + mask_place + edge.to(tl.int64) * mask_along, is_edge, MASKED)
    edge_x = tl.load(x + x_place + edge, mask=visible, other=float("-inf")).to(tl.float32)
    top, total, nans = _add(edge_x[:, None], visible[:, None], top, total, nans)
    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(x, x_place + first, lane, GROUP)
    if MASK_ALIGNED:
        mask_pointers = group_pointers(mask, mask_place + first, lane, GROUP)
    else:
        mask_pointers = mask + mask_place
    length = last - first
    whole = length // BLOCK_V * BLOCK_V
    for at in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        tile = tl.load(pointers + at).to(tl.float32)
        shown = within >= 0
        if MASKED:
            # Beside a row of bytes, all of them are read: loads of single elements would take longer.
            if MASK_ALIGNED:
                shown = tl.load(mask_pointers + at) != 0
            else:
                shown = tl.load(mask_pointers + (first + at + within).to(tl.int64) * mask_along) != 0
        top, total, nans = _add(tile, shown, top, total, nans)
    if whole < length:
        there = (whole + lane[:, None] * GROUP < length) & (within >= 0)
        rest = tl.load(pointers + whole, mask=there, other=float("-inf")).to(tl.float32)
        shown = there
        if MASKED:
            if MASK_ALIGNED:
                shown = _visible(mask_pointers + whole, there, True)
            else:
                shown = _visible(mask_pointers + (first + whole + within).to(tl.int64) * mask_along, there, True)
        top, total, nans = _add(rest, shown, top, total, nans)
    return top, total, nans


@triton.jit
def _weights(x, visible, reference, scale):
    return tl.where(visible, tl.exp2((x - reference) * LOG2E) * scale, 0.0)


@triton.jit
def _write_piece(
    x, x_place, mask, mask_place, mask_along, weights, weights_place, begin, end, lane, reference, scale,
    GROUP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, MASK_ALIGNED: tl.constexpr,
    IN_STEP: tl.constexpr,
):  # fmt: skip
    """Writes the weights [begin, end) of a row."""
    dtype = weights.dtype.element_ty
    first, last = whole_groups(x_place, begin, end, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(begin, first, last, end, lane, GROUP)
    visible = _visible(mask + mask_place + edge.to(tl.int64) * mask_along, is_edge, MASKED)
    edge_x = tl.load(x + x_place + edge, mask=visible, other=float("-inf")).to(tl.float32)
    tl.store(weights + weights_place + edge, _weights(edge_x, visible, reference, scale).to(dtype), mask=is_edge)
    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(x, x_place + first, lane, GROUP)
    weights_pointers = group_pointers(weights, weights_place + first, lane, GROUP, IN_STEP)
    if MASK_ALIGNED:
        mask_pointers = group_pointers(mask, mask_place + first, lane, GROUP)
    else:
        mask_pointers = mask + mask_place
    length = last - first
    whole = length // BLOCK_V * BLOCK_V
    for at in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        tile = tl.load(pointers + at).to(tl.float32)
        shown = within >= 0
        if MASKED:
            if MASK_ALIGNED:
                shown = tl.load(mask_pointers + at) != 0
            else:
                shown = tl.load(mask_pointers + (first + at + within).to(tl.int64) * mask_along) != 0
        tl.store(weights_pointers + at, _weights(tile, shown, reference, scale).to(dtype))
    if whole < length:
        there = (whole + lane[:, None] * GROUP < length) & (within >= 0)
        rest = tl.load(pointers + whole, mask=there, other=float("-inf")).to(tl.float32)
        shown = there
        if MASKED:
            if MASK_ALIGNED:
                shown = _visible(mask_pointers + whole, there, True)
            else:
                shown = _visible(mask_pointers + (first + whole + within).to(tl.int64) * mask_along, there, True)
        tl.store(weights_pointers + whole, _weights(rest, shown, reference, scale).to(dtype), mask=there)


@triton.jit
def _clear(out, place, begin, end, lane, GROUP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Zeros for the elements [begin, end) of a row."""
    dtype = out.dtype.element_ty
    first, last = whole_groups(place, begin, end, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(begin, first, last, end, lane, GROUP)
    tl.store(out + place + edge, tl.zeros_like(lane).to(dtype), mask=is_edge)
    pointers = group_pointers(out, place + first, lane, GROUP)
    within = lane[:, None] * GROUP + tl.zeros([1, GROUP], tl.int32)
    zeros = tl.zeros_like(within).to(dtype)
    for at in tl.range(0, last - first, BLOCK_V):
        tl.store(pointers + at, zeros, mask=within < last - first - at)


_UNSPECIALISED = [
    "length", "size_1", "size_2", "size_3", "x_lead", "x_0", "x_1", "x_2", "x_3",
    "mask_lead", "mask_0", "mask_1", "mask_2", "mask_3", "grad_lead", "grad_0", "grad_1", "grad_2", "grad_3",
    "n_spans", "span_stride", "plan_batch_stride", "key_batch_stride", "q_len", "rows_per_batch_element",
]  # fmt: skip


@triton.jit(do_not_specialize=[name for name in _UNSPECIALISED if not name.startswith("grad")])
def forward_rows(
    x, mask, start, end, key_valid, weights, lse,
    length, size_1, size_2, size_3, x_lead, x_0, x_1, x_2, x_3,
    mask_lead, mask_along, mask_0, mask_1, mask_2, mask_3,
    n_spans, span_stride, plan_batch_stride, key_batch_stride, q_len, rows_per_batch_element,
    GROUP: tl.constexpr, MASK: tl.constexpr, MASK_ALIGNED: tl.constexpr, SPANS: tl.constexpr, LSE: tl.constexpr,
    IN_STEP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights and lse of one row; ``IN_STEP`` says that groups begin in the same elements of x and of the weights."""
    LANES: tl.constexpr = BLOCK_V // GROUP
    row = tl.program_id(0).to(tl.int64)
    x_place = x_lead + outer_place(row, size_1, size_2, size_3, x_0, x_1, x_2, x_3)
    mask_place = mask_lead + outer_place(row, size_1, size_2, size_3, mask_0, mask_1, mask_2, mask_3)
    weights_place = row * length
    lane = tl.arange(0, LANES)
    top = tl.zeros([LANES], tl.float32) + float("-inf")
    total = tl.zeros([LANES], tl.float32)
    nans = tl.zeros([LANES], tl.int32)
    if SPANS:
        # The bytes of the keys are the mask, of every row of a batch element.
        plan_place, key_place = plan_places(row, q_len, rows_per_batch_element, plan_batch_stride, key_batch_stride)
        written = tl.zeros_like(plan_place).to(tl.int32)
        for n in range(n_spans):
            from_key, to_key, written = span(start, end, n, span_stride, plan_place, True, written, length)
            top, total, nans = _sum_piece(
                x, x_place, key_valid, key_place, 1, from_key, to_key, lane, top, total, nans,
                GROUP, BLOCK_V, STAGES, True, False,
            )  # fmt: skip
    else:
        nothing = tl.zeros_like(row).to(tl.int32)
        top, total, nans = _sum_piece(
            x, x_place, mask, mask_place, mask_along, nothing, nothing + length, lane, top, total, nans,
            GROUP, BLOCK_V, STAGES, MASK, MASK_ALIGNED,
        )  # fmt: skip
    highest = tl.max(top, 0)
    reference = _reference(highest)
    alpha = tl.where(top == float("-inf"), 0.0, tl.exp2((top - reference) * LOG2E))
    row_total = tl.sum(total * alpha, 0)
    is_empty = row_total == 0.0
    scale = tl.where(is_empty, 0.0, tl.div_rn(1.0, tl.where(is_empty, 1.0, row_total)))
    if SPANS:
        written = tl.zeros_like(plan_place).to(tl.int32)
        for n in range(n_spans):
            before = written
            from_key, to_key, written = span(start, end, n, span_stride, plan_place, True, written, length)
            if from_key < to_key:
                _clear(weights, weights_place, before, from_key, lane, GROUP, BLOCK_V)
                _write_piece(
                    x, x_place, key_valid, key_place, 1, weights, weights_place, from_key, to_key, lane, reference,
                    scale, GROUP, BLOCK_V, STAGES, True, False, IN_STEP,
                )  # fmt: skip
        _clear(weights, weights_place, written, written * 0 + length, lane, GROUP, BLOCK_V)
    else:
        nothing = tl.zeros_like(row).to(tl.int32)
        _write_piece(
            x, x_place, mask, mask_place, mask_along, weights, weights_place, nothing, nothing + length, lane,
            reference, scale, GROUP, BLOCK_V, STAGES, MASK, MASK_ALIGNED, IN_STEP,
        )  # fmt: skip
    if LSE:
        value = tl.where(is_empty, float("-inf"), reference + tl.log(tl.where(is_empty, 1.0, row_total)))
        holds_nan = tl.max(nans, 0) > 0
        # inf - inf is NaN, but the logsumexp of an infinite score is infinite.
        value = tl.where(row_total != row_total, tl.where(holds_nan, float("nan"), float("inf")), value)
        tl.store(lse + row, value)


@triton.jit
def _products(weights_pointers, grad_pointers, there):
    """Weights and incoming gradients, 0 where the weight is, whatever the gradient holds there."""
    w = tl.load(weights_pointers, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_pointers, mask=there, other=0.0).to(tl.float32)
    return w, tl.where(w == 0.0, 0.0, grad)


@triton.jit(do_not_specialize=[name for name in _UNSPECIALISED if not name.startswith(("x_", "mask_", "key_"))])
def backward_rows(
    weights, grad_weights, grad_lse, start, end, grad_x,
    length, size_1, size_2, size_3, grad_lead, grad_0, grad_1, grad_2, grad_3,
    n_spans, span_stride, plan_batch_stride, q_len, rows_per_batch_element,
    GROUP: tl.constexpr, SPANS: tl.constexpr, LSE: tl.constexpr, IN_STEP: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, between the ends of its spans; ``IN_STEP``: of the gradient with the weights."""
    LANES: tl.constexpr = BLOCK_V // GROUP
    row = tl.program_id(0).to(tl.int64)
    grad_place = grad_lead + outer_place(row, size_1, size_2, size_3, grad_0, grad_1, grad_2, grad_3)
    place = row * length
    lane = tl.arange(0, LANES)
    low = tl.zeros_like(row).to(tl.int32)
    high = low + length
    if SPANS:
        plan_place, _ = plan_places(row, q_len, rows_per_batch_element, plan_batch_stride, 0)
        low, high = hull(start, end, n_spans, span_stride, plan_place, True, length)
        high = tl.maximum(low, high)
    dtype = grad_x.dtype.element_ty
    first, last = whole_groups(place, low, high, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(low, first, last, high, lane, GROUP)
    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(weights, place + first, lane, GROUP)
    grad_pointers = group_pointers(grad_weights, grad_place + first, lane, GROUP, IN_STEP)
    result_pointers = group_pointers(grad_x, place + first, lane, GROUP)
    n_elements = last - first
    whole = n_elements // BLOCK_V * BLOCK_V
    there = (whole + lane[:, None] * GROUP < n_elements) & (within >= 0)

    edge_w, edge_grad = _products(weights + place + edge, grad_weights + grad_place + edge, is_edge)
    sums = edge_w * edge_grad
    for at in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        w = tl.load(pointers + at).to(tl.float32)
        grad = tl.load(grad_pointers + at).to(tl.float32)
        sums += tl.sum(tl.where(w == 0.0, 0.0, w * grad), 1)
    w_rest, grad_rest = _products(pointers + whole, grad_pointers + whole, there)
    sums += tl.sum(w_rest * grad_rest, 1)
    offset = tl.sum(sums, 0)
    if LSE:
        offset -= tl.load(grad_lse + row)

    result = tl.where(edge_w == 0.0, 0.0, edge_w * (edge_grad - offset))
    tl.store(grad_x + place + edge, result.to(dtype), mask=is_edge)
    for at in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        w = tl.load(pointers + at).to(tl.float32)
        grad = tl.load(grad_pointers + at).to(tl.float32)
        tl.store(result_pointers + at, tl.where(w == 0.0, 0.0, w * (grad - offset)).to(dtype))
    result_rest = tl.where(w_rest == 0.0, 0.0, w_rest * (grad_rest - offset))
    tl.store(result_pointers + whole, result_rest.to(dtype), mask=there)
    if SPANS:
        _clear(grad_x, place, low * 0, low, lane, GROUP, BLOCK_V)
        _clear(grad_x, place, high, high * 0 + length, lane, GROUP, BLOCK_V)
