"""The backward pass: one thread a row that turns incoming gradients into coefficients, and one program a row that reads
the logits and writes their gradient, which may replace them.

dz_j = A p_j - E p_j (log p_j + H) + w_j (D t_j + F [z_j finite]) + G t_j, with the weight w_j and the probability t_j
of a column, and dx = dz * dz/dx. The gradient of the pivot's column, where parts of the sum cancel, comes with the
coefficients.
"""

import triton
import triton.language as tl

from maskops.ops.cross_entropy.triton_kernels.forward import N_STATISTICS
from maskops.ops.cross_entropy.triton_kernels.values import capped, exact_slope, expm1, number, slope
from maskops.ops.triton_language import LOG2E
from maskops.ops.triton_rows import edge_elements, group_pointers, whole_groups

# Rows of the matrix of coefficients, (N_COEFFICIENTS, N).
EVERY = tl.constexpr(0)  # A
AT_PIVOT = tl.constexpr(1)
ENTROPY_FACTOR = tl.constexpr(2)  # E
ENTROPY_OFFSET = tl.constexpr(3)  # H
WEIGHTED_FACTOR = tl.constexpr(4)  # D
SMOOTHED = tl.constexpr(5)  # F
MASS_FACTOR = tl.constexpr(6)  # G
NORMALISER = tl.constexpr(7)
# The gradient of a probability is (these two: of its share with the weight, less of its share without) (lse - z_j).
SHARE_FACTOR = tl.constexpr(8)
SHARE_OFFSET = tl.constexpr(9)
SHARE_AT_PIVOT = tl.constexpr(10)
N_COEFFICIENTS = 11


@triton.jit
def _incoming(values, stride, row, kept, WANTED: tl.constexpr, like):
    result = tl.zeros_like(like)
    if WANTED:
        result = tl.load(values + row * stride, mask=kept, other=0.0).to(tl.float64)
    return result


@triton.jit(do_not_specialize=["ignore_index", "vocabulary", "lead", "row_stride", "probability_lead",
                               "probability_stride", "target_stride", "rows"])  # fmt: skip
def find_coefficients(
    logits, target, class_weights, probabilities, lse, logprobs, entropy, statistics,
    grad_loss, grad_lse, grad_logprobs, grad_entropy, coefficients, pivots,
    grad_loss_stride, grad_lse_stride, grad_logprobs_stride, grad_entropy_stride,
    lead, row_stride, target_stride, probability_lead, probability_stride, rows, vocabulary, ignore_index,
    smoothing, z_loss, softcap_high, softcap_low, scale_high, scale_low,
    LOSS: tl.constexpr, LSE: tl.constexpr, LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The coefficients of every row, and its pivot: -1 where the gradient is 0 and no logit need be read."""
    rows = rows.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    label = tl.load(target + row * target_stride, mask=is_row, other=0).to(tl.int64)
    kept = is_row & (label != ignore_index)
    if SOFT and SHIFT:
        kept = kept & (row < rows - 1)
    normaliser = tl.load(lse + row, mask=kept, other=0.0).to(tl.float64)
    of_loss = _incoming(grad_loss, grad_loss_stride, row, kept, LOSS, normaliser)
    of_lse = _incoming(grad_lse, grad_lse_stride, row, kept, LSE, normaliser)
    of_logprobs = _incoming(grad_logprobs, grad_logprobs_stride, row, kept, LOGPROBS, normaliser)
    of_entropy = _incoming(grad_entropy, grad_entropy_stride, row, kept, ENTROPY, normaliser)
    kept = kept & ((of_loss != 0.0) | (of_lse != 0.0) | (of_logprobs != 0.0) | (of_entropy != 0.0))

    row_statistics = statistics + row * N_STATISTICS
    pivot = label
    if SOFT:
        pivot = tl.load(row_statistics + 4, mask=kept, other=0.0).to(tl.int64)
        logprob = tl.load(row_statistics + 5, mask=kept, other=0.0)
    else:
        logprob = tl.load(logprobs + row, mask=kept, other=0.0).to(tl.float64)
    pivot = tl.minimum(tl.maximum(pivot, 0), vocabulary - 1)
    probability = tl.exp(logprob)
    rest = expm1(logprob)
    x = tl.load(logits + lead + row * row_stride + pivot, mask=kept, other=0.0).to(tl.float64)
    weight = tl.zeros_like(x) + 1.0
    if WEIGHTED:
        weight = tl.load(class_weights + pivot, mask=kept, other=0.0).to(tl.float64)
    scale = number(scale_high, scale_low, x)
    share = tl.zeros_like(x) + smoothing
    of_target = (1.0 - share) * of_loss
    normalised = of_lse + 2.0 * z_loss * normaliser * of_loss
    # A sum of a_j (lse - z_j) has the gradient p_j * (sum of a) - a_j. At the pivot that is a * (p - 1), of which
    # nothing cancels, plus p * (sum of the other a).
    every = normalised
    at_pivot = normalised * probability
    if SOFT:
        place = probability_lead + row * probability_stride
        own = tl.load(probabilities + place + pivot, mask=kept, other=0.0).to(tl.float64)
        others = tl.load(row_statistics + 2, mask=kept, other=0.0)
        every += of_target * (others + own * weight)
        at_pivot += of_target * (others * probability + own * weight * rest)
        others = tl.load(row_statistics + 3, mask=kept, other=0.0)
        every -= of_logprobs * (others + own)
        at_pivot -= of_logprobs * (others * probability + own * rest)
    else:
        every += of_target * weight - of_logprobs
        at_pivot += (of_target * weight - of_logprobs) * rest
    smoothed = tl.zeros_like(x)
    if SMOOTHING:
        smoothed = -share * of_loss / tl.load(row_statistics, mask=kept, other=1.0)
        others = tl.load(row_statistics + 1, mask=kept, other=0.0)
        own = tl.where(x > float("-inf"), weight, 0.0)
        every -= smoothed * (others + own)
        at_pivot -= smoothed * (others * probability + own * rest)
    uncertainty = tl.zeros_like(x)
    if ENTROPY:
        uncertainty = tl.load(entropy + row, mask=kept, other=0.0).to(tl.float64)
        at_pivot -= tl.where(probability > 0.0, of_entropy * probability * (logprob + uncertainty), 0.0)

    tl.store(pivots + row, tl.where(kept, pivot, -1).to(tl.int32), mask=is_row)
    result = coefficients + row
    slope_there = exact_slope(x, scale, number(softcap_high, softcap_low, x), SOFTCAP)
    tl.store(result + EVERY * rows, (every * scale).to(tl.float32), mask=kept)
    tl.store(result + AT_PIVOT * rows, (at_pivot * slope_there).to(tl.float32), mask=kept)
    tl.store(result + NORMALISER * rows, normaliser.to(tl.float32), mask=kept)
    if ENTROPY:
        tl.store(result + ENTROPY_FACTOR * rows, (of_entropy * scale).to(tl.float32), mask=kept)
        tl.store(result + ENTROPY_OFFSET * rows, uncertainty.to(tl.float32), mask=kept)
    if SMOOTHING:
        tl.store(result + SMOOTHED * rows, (smoothed * scale).to(tl.float32), mask=kept)
    if SOFT:
        tl.store(result + WEIGHTED_FACTOR * rows, (-of_target * scale).to(tl.float32), mask=kept)
        tl.store(result + MASS_FACTOR * rows, (of_logprobs * scale).to(tl.float32), mask=kept)
        tl.store(result + SHARE_FACTOR * rows, of_target.to(tl.float32), mask=kept)
        tl.store(result + SHARE_OFFSET * rows, of_logprobs.to(tl.float32), mask=kept)
        coefficient = weight * of_target - of_logprobs
        surprise = tl.where(coefficient == 0.0, 0.0, -coefficient * logprob)
        tl.store(result + SHARE_AT_PIVOT * rows, surprise.to(tl.float32), mask=kept)


@triton.jit
def _gradients(
    x, column, pivot, weight, probability, every, at_pivot, entropy_factor, entropy_offset, weighted_factor, smoothed,
    mass_factor, normaliser, share_factor, share_offset, share_at_pivot, inside, softcap, factor,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, SOFT: tl.constexpr, ENTROPY: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Gradients of logits and, with ``SHARES``, of probabilities."""
    value = capped(x, inside, softcap, SOFTCAP)
    depth = value * factor - normaliser
    p = tl.exp2(depth * LOG2E)
    grad = p * every
    if ENTROPY:
        # Far below, p (log p + H) is 0, where log p may be -inf; a NaN is not below.
        grad -= tl.where(depth <= -88.0, 0.0, p * entropy_factor * (depth + entropy_offset))
    if SOFT:
        grad += probability * (weight * weighted_factor + mass_factor)
    if SMOOTHING:
        grad += tl.where(value > float("-inf"), weight * smoothed, 0.0)
    if SOFTCAP:
        grad *= slope(x, inside)
    grad = tl.where(column == pivot, at_pivot, grad)
    grad_share = 0.0
    if SHARES:
        coefficient = tl.zeros_like(value) + weight * share_factor - share_offset
        nothing = (value == float("-inf")) & ((probability == 0.0) | (coefficient == 0.0))
        grad_share = tl.where(nothing, 0.0, coefficient * (normaliser - value * factor))
        grad_share = tl.where(column == pivot, share_at_pivot, grad_share)
    return grad, grad_share


@triton.jit
def _clear(grad, place, vocabulary, GROUP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Zeros for a row."""
    LANES: tl.constexpr = BLOCK_V // GROUP
    lane = tl.arange(0, LANES)
    first, last = whole_groups(place, 0, vocabulary, GROUP)
    edge, is_edge = edge_elements(0, first, last, vocabulary, lane, GROUP)
    tl.store(grad + place + edge, tl.zeros([LANES], grad.dtype.element_ty), mask=is_edge)
    pointers = group_pointers(grad, place + first, lane, GROUP)
    zeros = tl.zeros([LANES, GROUP], grad.dtype.element_ty)
    within = lane[:, None] * GROUP + tl.zeros([1, GROUP], tl.int32)
    for begin in tl.range(0, (last - first).to(tl.int32), BLOCK_V):
        tl.store(pointers + begin, zeros, mask=within < (last - first).to(tl.int32) - begin)


@triton.jit(do_not_specialize=["lead", "row_stride", "grad_lead", "grad_stride", "probability_lead",
                               "probability_stride", "rows", "vocabulary"])  # fmt: skip
def write_gradients(
    logits, class_weights, probabilities, coefficients, pivots, grad_logits, grad_probabilities,
    lead, row_stride, grad_lead, grad_stride, probability_lead, probability_stride, rows, vocabulary,
    inside, softcap, factor,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
    IN_STEP: tl.constexpr, SHIFT: tl.constexpr, ENTROPY: tl.constexpr, SHARES: tl.constexpr,
    SHARES_IN_STEP: tl.constexpr, GRAD_IN_STEP: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, and that of the probabilities that it is scored against.

    ``grad_probabilities`` is (rows, vocabulary), contiguous. ``IN_STEP``, ``SHARES_IN_STEP`` and ``GRAD_IN_STEP`` say
    that groups begin in the same columns as those of the logits.
    """
    LANES: tl.constexpr = BLOCK_V // GROUP
    rows = rows.to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    pivot = tl.load(pivots + row)
    place = lead + row * row_stride
    grad_place = grad_lead + row * grad_stride
    # Under shift no row is scored against the first: the last one, which is against none, clears its gradient.
    share_row = row
    if SHIFT:
        share_row = (row + 1) % rows
    share_place = share_row * vocabulary
    if pivot < 0:
        _clear(grad_logits, grad_place, vocabulary, GROUP, BLOCK_V)
        if SHARES:
            _clear(grad_probabilities, share_place, vocabulary, GROUP, BLOCK_V)
        return
    result = coefficients + row
    every = tl.load(result + EVERY * rows)
    at_pivot = tl.load(result + AT_PIVOT * rows)
    normaliser = tl.load(result + NORMALISER * rows)
    # What a call does not ask for is a constant that nothing is computed with.
    entropy_factor = 0.0
    entropy_offset = 0.0
    weighted_factor = 0.0
    smoothed = 0.0
    mass_factor = 0.0
    share_factor = 0.0
    share_offset = 0.0
    share_at_pivot = 0.0
    if ENTROPY:
        entropy_factor = tl.load(result + ENTROPY_FACTOR * rows)
        entropy_offset = tl.load(result + ENTROPY_OFFSET * rows)
    if SMOOTHING:
        smoothed = tl.load(result + SMOOTHED * rows)
    if SOFT:
        weighted_factor = tl.load(result + WEIGHTED_FACTOR * rows)
        mass_factor = tl.load(result + MASS_FACTOR * rows)
    if SHARES:
        share_factor = tl.load(result + SHARE_FACTOR * rows)
        share_offset = tl.load(result + SHARE_OFFSET * rows)
        share_at_pivot = tl.load(result + SHARE_AT_PIVOT * rows)

    lane = tl.arange(0, LANES)
    first, last = whole_groups(place, 0, vocabulary, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    probability_place = probability_lead + row * probability_stride
    edge, is_edge = edge_elements(0, first, last, vocabulary, lane, GROUP)
    edge_x = tl.load(logits + place + edge, mask=is_edge, other=float("-inf")).to(tl.float32)
    edge_weight = 1.0
    edge_share = 0.0
    if WEIGHTED:
        edge_weight = tl.load(class_weights + edge, mask=is_edge, other=0.0)
    if SOFT:
        edge_share = tl.load(probabilities + probability_place + edge, mask=is_edge, other=0.0).to(tl.float32)
    edge_grad, edge_grad_share = _gradients(
        edge_x, edge, pivot, edge_weight, edge_share, every, at_pivot, entropy_factor, entropy_offset, weighted_factor,
        smoothed, mass_factor, normaliser, share_factor, share_offset, share_at_pivot, inside, softcap, factor,
        SOFTCAP, SMOOTHING, SOFT, ENTROPY, SHARES,
    )  # fmt: skip
    tl.store(grad_logits + grad_place + edge, edge_grad.to(grad_logits.dtype.element_ty), mask=is_edge)
    if SHARES:
        edge_grad_share = edge_grad_share.to(grad_probabilities.dtype.element_ty)
        tl.store(grad_probabilities + share_place + edge, edge_grad_share, mask=is_edge)

    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(logits, place + first, lane, GROUP)
    probability_pointers = group_pointers(probabilities, probability_place + first, lane, GROUP, IN_STEP)
    grad_pointers = group_pointers(grad_logits, grad_place + first, lane, GROUP, GRAD_IN_STEP)
    share_pointers = group_pointers(grad_probabilities, share_place + first, lane, GROUP, SHARES_IN_STEP)
    length = last - first
    whole = length // BLOCK_V * BLOCK_V
    # In place, a tile is read before it is written, and no tile is read twice.
    for begin in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        column = first + begin + within
        x = tl.load(pointers + begin).to(tl.float32)
        weight = 1.0
        probability = 0.0
        if WEIGHTED:
            weight = tl.load(class_weights + column)
        if SOFT:
            probability = tl.load(probability_pointers + begin).to(tl.float32)
        grad, grad_share = _gradients(
            x, column, pivot, weight, probability, every, at_pivot, entropy_factor, entropy_offset, weighted_factor,
            smoothed, mass_factor, normaliser, share_factor, share_offset, share_at_pivot, inside, softcap, factor,
            SOFTCAP, SMOOTHING, SOFT, ENTROPY, SHARES,
        )  # fmt: skip
        tl.store(grad_pointers + begin, grad.to(grad_logits.dtype.element_ty))
        if SHARES:
            tl.store(share_pointers + begin, grad_share.to(grad_probabilities.dtype.element_ty))
    if whole < length:
        column = first + whole + within
        # Of whole groups, so that loads and stores stay wide.
        there = (whole + lane[:, None] * GROUP < length) & (within >= 0)
        x = tl.load(pointers + whole, mask=there, other=float("-inf")).to(tl.float32)
        weight = 1.0
        probability = 0.0
        if WEIGHTED:
            weight = tl.load(class_weights + column, mask=there, other=0.0)
        if SOFT:
            probability = tl.load(probability_pointers + whole, mask=there, other=0.0).to(tl.float32)
        grad, grad_share = _gradients(
            x, column, pivot, weight, probability, every, at_pivot, entropy_factor, entropy_offset, weighted_factor,
            smoothed, mass_factor, normaliser, share_factor, share_offset, share_at_pivot, inside, softcap, factor,
            SOFTCAP, SMOOTHING, SOFT, ENTROPY, SHARES,
        )  # fmt: skip
        tl.store(grad_pointers + whole, grad.to(grad_logits.dtype.element_ty), mask=there)
        if SHARES:
            tl.store(share_pointers + whole, grad_share.to(grad_probabilities.dtype.element_ty), mask=there)
