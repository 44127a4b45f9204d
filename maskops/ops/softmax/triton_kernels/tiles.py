"""Softmaxes of any strides in tiles: rows that fit on the chip whole, and lanes side by side, however long."""

import triton
import triton.language as tl

from maskops.ops.softmax.triton_kernels.places import (
    covered,
    groups_of,
    hull,
    outer_place,
    plan_places,
    softmaxes,
    tile_mask,
    tile_pointers,
)
from maskops.ops.triton_language import LOG2E


@triton.jit
def _scores(
    x_pointers, mask_pointers, key_valid, key_place, k, there, low, high, length,
    start, end, n_spans, span_stride, plan_place,
    GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """A tile of scores, -inf where something masks them, and which of them are visible."""
    inside = tile_mask(there, k, length, GROUP, LANES, ALIGNED)
    visible = inside
    if MASK:
        visible = visible & (tl.load(mask_pointers, mask=inside, other=0) != 0)
    if SPANS:
        visible = inside & covered(k, start, end, n_spans, span_stride, plan_place, there, length)
        key_pointers = key_valid + key_place[:, None] + k[None, :]
        visible = visible & (tl.load(key_pointers, mask=visible, other=0) != 0)
    if ALIGNED:
        # Masked element by element, loads would be of single elements: some that are masked are read, and not used.
        wanted = inside
        if SPANS and not LANES:
            wanted = wanted & groups_of(k, low, high, GROUP)
        x = tl.load(x_pointers, mask=wanted, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(x_pointers, mask=visible, other=float("-inf")).to(tl.float32)
    return tl.where(visible, x, float("-inf")), visible


@triton.jit
def _reference(top):
    """What exponentials of a maximum refer to: finite where nothing is visible."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _highest(scores):
    # A NaN is no maximum; it enters the sum.
    return tl.max(tl.maximum(scores, float("-inf")), 1)


@triton.jit
def _exponentials(scores, reference):
    return tl.exp2((scores - reference[:, None]) * LOG2E)


_UNSPECIALISED = [
    "length", "lanes", "outer_count", "size_1", "size_2", "size_3",
    "x_0", "x_1", "x_2", "x_3", "mask_0", "mask_1", "mask_2", "mask_3",
    "weights_0", "weights_1", "weights_2", "weights_3", "grad_0", "grad_1", "grad_2", "grad_3",
    "x_lead", "mask_lead", "grad_lead", "n_spans", "span_stride", "plan_batch_stride", "key_batch_stride", "q_len",
    "rows_per_batch_element",
]  # fmt: skip


@triton.jit(do_not_specialize=[name for name in _UNSPECIALISED if not name.startswith("grad")])
def forward_tiles(
    x, mask, start, end, key_valid, weights, lse,
    length, lanes, outer_count, size_1, size_2, size_3,
    x_lead, x_along, x_across, x_0, x_1, x_2, x_3,
    mask_lead, mask_along, mask_across, mask_0, mask_1, mask_2, mask_3,
    weights_along, weights_0, weights_1, weights_2, weights_3,
    n_spans, span_stride, plan_batch_stride, key_batch_stride, q_len, rows_per_batch_element,
    GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, MASK_ALIGNED: tl.constexpr, MASK: tl.constexpr,
    SPANS: tl.constexpr, LSE: tl.constexpr, STREAM: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Weights and lse of S softmaxes. With ``STREAM`` they are longer than K, and read again for the weights."""
    outer, lane, there = softmaxes(lanes, outer_count, S, GROUP, LANES, ALIGNED)
    x_place = x_lead + outer_place(outer, size_1, size_2, size_3, x_0, x_1, x_2, x_3)
    mask_place = mask_lead + outer_place(outer, size_1, size_2, size_3, mask_0, mask_1, mask_2, mask_3)
    weights_place = outer_place(outer, size_1, size_2, size_3, weights_0, weights_1, weights_2, weights_3)
    # Only rows have spans; lanes take the arguments as they are.
    plan_place = outer
    key_place = outer
    low = lane.to(tl.int32)
    high = lane.to(tl.int32)
    if SPANS:
        plan_place, key_place = plan_places(outer, q_len, rows_per_batch_element, plan_batch_stride, key_batch_stride)
        low, high = hull(start, end, n_spans, span_stride, plan_place, there, length)
    range_k = tl.arange(0, K)
    weights_dtype = weights.dtype.element_ty
    if STREAM:
        top = tl.zeros([S], tl.float32) + float("-inf")
        total = tl.zeros([S], tl.float32)
        nans = tl.zeros([S], tl.int32)
        for begin in range(0, length, K):
            k = begin + range_k
            scores, _ = _scores(
                tile_pointers(x, x_place, lane, x_along, x_across, k, GROUP, LANES, ALIGNED),
                tile_pointers(mask, mask_place, lane, mask_along, mask_across, k, GROUP, LANES, MASK_ALIGNED),
                key_valid, key_place, k, there, low, high, length, start, end, n_spans, span_stride, plan_place,
                GROUP, LANES, ALIGNED, MASK, SPANS,
            )  # fmt: skip
            raised = tl.maximum(top, _highest(scores))
            alpha = tl.where(top == float("-inf"), 0.0, tl.exp2((top - _reference(raised)) * LOG2E))
            total = total * alpha + tl.sum(_exponentials(scores, _reference(raised)), 1)
            top = raised
            if LSE:
                nans = tl.maximum(nans, tl.max((scores != scores).to(tl.int32), 1))
    else:
        scores, visible = _scores(
            tile_pointers(x, x_place, lane, x_along, x_across, range_k, GROUP, LANES, ALIGNED),
            tile_pointers(mask, mask_place, lane, mask_along, mask_across, range_k, GROUP, LANES, MASK_ALIGNED),
            key_valid, key_place, range_k, there, low, high, length, start, end, n_spans, span_stride, plan_place,
            GROUP, LANES, ALIGNED, MASK, SPANS,
        )  # fmt: skip
        top = _highest(scores)
        e = _exponentials(scores, _reference(top))
        total = tl.sum(e, 1)
        nans = tl.max((scores != scores).to(tl.int32), 1)
    reference = _reference(top)
    is_empty = total == 0.0
    scale = tl.where(is_empty, 0.0, tl.div_rn(tl.full([S], 1.0, tl.float32), tl.where(is_empty, 1.0, total)))
    if STREAM:
        for begin in range(0, length, K):
            k = begin + range_k
            scores, visible = _scores(
                tile_pointers(x, x_place, lane, x_along, x_across, k, GROUP, LANES, ALIGNED),
                tile_pointers(mask, mask_place, lane, mask_along, mask_across, k, GROUP, LANES, MASK_ALIGNED),
                key_valid, key_place, k, there, low, high, length, start, end, n_spans, span_stride, plan_place,
                GROUP, LANES, ALIGNED, MASK, SPANS,
            )  # fmt: skip
            result = tl.where(visible, _exponentials(scores, reference) * scale[:, None], 0.0)
            pointers = tile_pointers(weights, weights_place, lane, weights_along, 1, k, GROUP, LANES, ALIGNED)
            tl.store(pointers, result.to(weights_dtype), mask=tile_mask(there, k, length, GROUP, LANES, ALIGNED))
    else:
        result = tl.where(visible, e * scale[:, None], 0.0)
        pointers = tile_pointers(weights, weights_place, lane, weights_along, 1, range_k, GROUP, LANES, ALIGNED)
        tl.store(pointers, result.to(weights_dtype), mask=tile_mask(there, range_k, length, GROUP, LANES, ALIGNED))
    if LSE:
        value = tl.where(is_empty, float("-inf"), reference + tl.log(tl.where(is_empty, 1.0, total)))
        # inf - inf is NaN, but the logsumexp of an infinite score is infinite.
        value = tl.where(total != total, tl.where(nans > 0, float("nan"), float("inf")), value)
        tl.store(lse + outer * lanes + lane, value, mask=there)


@triton.jit
def _products(
    weights_pointers, grad_pointers, k, there, low, high, length,
    GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, HULL: tl.constexpr,
):  # fmt: skip
    """A tile of weights and of incoming gradients, 0 where the weight is, whatever the gradient holds there."""
    inside = tile_mask(there, k, length, GROUP, LANES, ALIGNED)
    if HULL:
        inside = inside & groups_of(k, low, high, GROUP)
    w = tl.load(weights_pointers, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_pointers, mask=inside, other=0.0).to(tl.float32)
    return w, tl.where(w == 0.0, 0.0, grad)


@triton.jit(do_not_specialize=[name for name in _UNSPECIALISED if not name.startswith(("x_", "mask_"))])
def backward_tiles(
    weights, grad_weights, grad_lse, start, end, grad_x,
    length, lanes, outer_count, size_1, size_2, size_3,
    grad_lead, grad_along, grad_across, grad_0, grad_1, grad_2, grad_3,
    weights_along, weights_0, weights_1, weights_2, weights_3,
    n_spans, span_stride, plan_batch_stride, q_len, rows_per_batch_element,
    GROUP: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, SPANS: tl.constexpr, LSE: tl.constexpr,
    STREAM: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """grad_x = w * (grad_weights - sum(w * grad_weights) + grad_lse), and 0 where w is 0; weights and result alike."""
    outer, lane, there = softmaxes(lanes, outer_count, S, GROUP, LANES, ALIGNED)
    grad_place = grad_lead + outer_place(outer, size_1, size_2, size_3, grad_0, grad_1, grad_2, grad_3)
    weights_place = outer_place(outer, size_1, size_2, size_3, weights_0, weights_1, weights_2, weights_3)
    low = lane.to(tl.int32)
    high = lane.to(tl.int32)
    if SPANS:
        plan_place, _ = plan_places(outer, q_len, rows_per_batch_element, plan_batch_stride, 0)
        low, high = hull(start, end, n_spans, span_stride, plan_place, there, length)
    range_k = tl.arange(0, K)
    offset = tl.zeros([S], tl.float32)
    if STREAM:
        for begin in range(0, length, K):
            k = begin + range_k
            w, grad = _products(
                tile_pointers(weights, weights_place, lane, weights_along, 1, k, GROUP, LANES, ALIGNED),
                tile_pointers(grad_weights, grad_place, lane, grad_along, grad_across, k, GROUP, LANES, ALIGNED),
                k, there, low, high, length, GROUP, LANES, ALIGNED, SPANS,
            )  # fmt: skip
            offset += tl.sum(w * grad, 1)
    else:
        w, grad = _products(
            tile_pointers(weights, weights_place, lane, weights_along, 1, range_k, GROUP, LANES, ALIGNED),
            tile_pointers(grad_weights, grad_place, lane, grad_along, grad_across, range_k, GROUP, LANES, ALIGNED),
            range_k, there, low, high, length, GROUP, LANES, ALIGNED, SPANS,
        )  # fmt: skip
        offset = tl.sum(w * grad, 1)
    if LSE:
        offset -= tl.load(grad_lse + outer * lanes + lane, mask=there, other=0.0)
    if STREAM:
        for begin in range(0, length, K):
            k = begin + range_k
            w, grad = _products(
                tile_pointers(weights, weights_place, lane, weights_along, 1, k, GROUP, LANES, ALIGNED),
                tile_pointers(grad_weights, grad_place, lane, grad_along, grad_across, k, GROUP, LANES, ALIGNED),
                k, there, low, high, length, GROUP, LANES, ALIGNED, SPANS,
            )  # fmt: skip
            result = tl.where(w == 0.0, 0.0, w * (grad - offset[:, None])).to(grad_x.dtype.element_ty)
            pointers = tile_pointers(grad_x, weights_place, lane, weights_along, 1, k, GROUP, LANES, ALIGNED)
            tl.store(pointers, result, mask=tile_mask(there, k, length, GROUP, LANES, ALIGNED))
    else:
        result = tl.where(w == 0.0, 0.0, w * (grad - offset[:, None])).to(grad_x.dtype.element_ty)
        pointers = tile_pointers(grad_x, weights_place, lane, weights_along, 1, range_k, GROUP, LANES, ALIGNED)
        tl.store(pointers, result, mask=tile_mask(there, range_k, length, GROUP, LANES, ALIGNED))
