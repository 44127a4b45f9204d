"""The forward pass: one program a row that reads it once and leaves a few sums, and one thread a row that scores them.

Sums leave out the pivot, the column whose exponential stays out of the others': the label, or the largest logit where
the row is scored against probabilities. With d = sum over j != pivot of e^(z_j - z_pivot) the loss is log1p(d), which
keeps its relative accuracy where the probability of the label approaches 1 and lse - z cancels. What is done once a row
is done in float64, in a kernel of its own: in the first one every thread of the row would do it.
"""

import triton
import triton.language as tl

from maskops.ops.cross_entropy.triton_kernels.values import capped, exact_z, log1p, number
from maskops.ops.triton_language import LOG2E
from maskops.ops.triton_rows import edge_elements, group_pointers, whole_groups

# Rows of the matrix of sums, (N_SUMS, N).
PIVOT_LOGIT = tl.constexpr(0)
ORIGIN = tl.constexpr(1)  # value that depths are measured from: the pivot's, 0 where it is banned
TOP = tl.constexpr(2)  # value that exponentials refer to
EXPONENTIALS = tl.constexpr(3)
MOMENT = tl.constexpr(4)  # sum of d e^d with d = z - top: for the entropy
ALLOWED_VALUES = tl.constexpr(5)  # sum of the values above -inf
ALLOWED_COLUMNS = tl.constexpr(6)
ALLOWED_WEIGHT = tl.constexpr(7)
ALLOWED_DEPTH = tl.constexpr(8)  # sum of weight * (origin - value) over the columns above -inf
TARGET_WEIGHT = tl.constexpr(9)  # sum of probability * weight
TARGET_DEPTH = tl.constexpr(10)
TARGET_MASS = tl.constexpr(11)  # sum of probability
MASS_DEPTH = tl.constexpr(12)
N_SUMS = 13

N_STATISTICS = tl.constexpr(6)  # columns of the statistics, in the order of csrc/cross_entropy.h

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _weighted(coefficient, depth):
    """Sums of a and of a * depth; a column whose coefficient is 0 adds nothing, even where its logit is -inf."""
    return tl.sum(coefficient, 1), tl.sum(tl.where(coefficient == 0.0, 0.0, coefficient * depth), 1)


@triton.jit
def _accumulate(
    x, column, pivot, weight, probability, origin, inside, softcap, factor,
    top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
    target_weight, target_depth, mass, mass_depth, best, best_column,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    """Adds a tile (lanes, k) of logits, -inf where there is none, to the sums of the lanes."""
    value = capped(x, inside, softcap, SOFTCAP)
    others = tl.where(column == pivot, float("-inf"), value)
    # A NaN does not raise the top; it enters the sum.
    raised = tl.maximum(top, tl.max(tl.maximum(others, LOWEST), 1))
    e = tl.exp2((others - raised[:, None]) * (factor * LOG2E))
    alpha = tl.exp2((top - raised) * (factor * LOG2E))
    if ENTROPY:
        rescaled = alpha * (moment + (top - raised) * factor * exponentials)
        moment = tl.where(alpha == 0.0, 0.0, rescaled)
        moment += tl.sum(tl.where(e == 0.0, 0.0, (others - raised[:, None]) * factor * e), 1)
    exponentials = exponentials * alpha + tl.sum(e, 1)
    if SMOOTHING:
        allowed = others > float("-inf")
        columns += tl.sum(allowed.to(tl.float32), 1)
        if WEIGHTED or SOFT:
            total, depth = _weighted(tl.where(allowed, weight, 0.0), origin - value)
            allowed_weight += total
            allowed_depth += depth
        else:
            values += tl.sum(tl.where(allowed, value, 0.0), 1)
    if SOFT:
        share = tl.where(column == pivot, 0.0, probability)
        total, depth = _weighted(share, origin - value)
        mass += total
        mass_depth += depth
        if WEIGHTED:
            total, depth = _weighted(share * weight, origin - value)
            target_weight += total
            target_depth += depth
    if ARGMAX:
        highest = tl.max(tl.maximum(x, float("-inf")), 1)
        best_column = tl.where(highest > best, tl.min(column, 1), best_column)
        best = tl.maximum(best, highest)
    return (
        raised, exponentials, moment, values, columns, allowed_weight, allowed_depth,
        target_weight, target_depth, mass, mass_depth, best, best_column,
    )  # fmt: skip


@triton.jit
def _raise_best(x, column, best, best_column):
    highest = tl.max(tl.maximum(x, float("-inf")), 1)
    return tl.maximum(best, highest), tl.where(highest > best, tl.min(column, 1), best_column)


@triton.jit
def _first_of_best(row, best, best_column, vocabulary, GROUP: tl.constexpr):
    """The first column that holds the largest logit: in the earliest of the groups where a lane found it."""
    highest = tl.max(best, 0)
    start = tl.min(tl.where(best == highest, best_column, vocabulary), 0)
    k = tl.arange(0, GROUP)
    x = tl.load(row + start + k, mask=start + k < vocabulary, other=float("nan")).to(tl.float32)
    place = tl.min(tl.where(x == highest, k, GROUP), 0)
    return tl.where(place < GROUP, start + place, 0)  # 0: nothing but NaN


@triton.jit
def _highest(logits, place, vocabulary, GROUP: tl.constexpr, LANES: tl.constexpr):
    """The first column that holds the largest logit of a row, in a pass of its own."""
    lane = tl.arange(0, LANES)
    first, last = whole_groups(place, 0, vocabulary, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(0, first, last, vocabulary, lane, GROUP)
    edge_x = tl.load(logits + place + edge, mask=is_edge, other=float("-inf")).to(tl.float32)
    best = tl.maximum(edge_x, float("-inf"))
    best_column = tl.where(best > float("-inf"), edge, 0)
    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(logits, place + first, lane, GROUP)
    whole = (last - first) // (LANES * GROUP) * (LANES * GROUP)
    for begin in tl.range(0, whole, LANES * GROUP):
        x = tl.load(pointers + begin).to(tl.float32)
        best, best_column = _raise_best(x, first + begin + within, best, best_column)
    if whole < last - first:
        inside = (whole + lane[:, None] * GROUP < last - first) & (within >= 0)
        x = tl.load(pointers + whole, mask=inside, other=float("-inf")).to(tl.float32)
        best, best_column = _raise_best(x, first + whole + within, best, best_column)
    return _first_of_best(logits + place, best, best_column, vocabulary, GROUP)


@triton.jit(do_not_specialize=["row_stride", "vocabulary", "ignore_index", "lead", "probability_lead",
                               "probability_stride", "target_stride", "rows"])  # fmt: skip
def sum_rows(
    logits, target, class_weights, probabilities, sums, pivots, argmax,
    lead, row_stride, target_stride, probability_lead, probability_stride, rows, vocabulary, ignore_index,
    inside, softcap, factor,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
    IN_STEP: tl.constexpr, SHIFT: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of one row; a row that is skipped is not read, and gets none.

    Row r begins at ``logits + lead + r * row_stride``, the probabilities that it is scored against at ``probabilities +
    probability_lead + r * probability_stride``; ``IN_STEP`` says that groups begin in the same columns of both.
    """
    LANES: tl.constexpr = BLOCK_V // GROUP
    rows = rows.to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row * target_stride).to(tl.int64)
    skipped = label == ignore_index
    if SOFT and SHIFT:
        skipped = skipped | (row == rows - 1)
    if skipped:
        if ARGMAX:
            tl.store(argmax + row, -1)
        return
    place = lead + row * row_stride
    if SOFT:
        pivot = _highest(logits, place, vocabulary, GROUP, LANES)
        tl.store(pivots + row, pivot)
    else:
        pivot = tl.minimum(tl.maximum(label, 0), vocabulary - 1).to(tl.int32)
    pivot_logit = tl.load(logits + place + pivot).to(tl.float32)
    origin = capped(pivot_logit, inside, softcap, SOFTCAP)
    origin = tl.where(origin > float("-inf"), origin, 0.0)

    lane = tl.arange(0, LANES)
    zeros = tl.zeros([LANES], tl.float32)
    first, last = whole_groups(place, 0, vocabulary, GROUP)
    first = first.to(tl.int32)
    last = last.to(tl.int32)
    edge, is_edge = edge_elements(0, first, last, vocabulary, lane, GROUP)
    probability_place = probability_lead + row * probability_stride
    edge_x = tl.load(logits + place + edge, mask=is_edge, other=float("-inf")).to(tl.float32)
    # What is not loaded because a call does not ask for it is a constant that nothing is computed with.
    edge_weight = 1.0
    edge_share = 0.0
    if WEIGHTED:
        edge_weight = tl.load(class_weights + edge, mask=is_edge, other=0.0)[:, None]
    if SOFT:
        edge_share = tl.load(probabilities + probability_place + edge, mask=is_edge, other=0.0).to(tl.float32)[:, None]
    (
        top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
        target_weight, target_depth, mass, mass_depth, best, best_column,
    ) = _accumulate(
        edge_x[:, None], edge[:, None], pivot, edge_weight, edge_share, origin, inside, softcap, factor,
        zeros + LOWEST, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
        zeros + float("-inf"), tl.zeros([LANES], tl.int32),
        SOFTCAP, SMOOTHING, WEIGHTED, SOFT, ENTROPY, ARGMAX,
    )  # fmt: skip

    within = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pointers = group_pointers(logits, place + first, lane, GROUP)
    probability_pointers = group_pointers(probabilities, probability_place + first, lane, GROUP, IN_STEP)
    length = last - first
    whole = length // BLOCK_V * BLOCK_V
    for begin in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        column = first + begin + within
        x = tl.load(pointers + begin).to(tl.float32)
        weight = 1.0
        probability = 0.0
        if WEIGHTED:
            weight = tl.load(class_weights + column)
        if SOFT:
            probability = tl.load(probability_pointers + begin).to(tl.float32)
        (
            top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
            target_weight, target_depth, mass, mass_depth, best, best_column,
        ) = _accumulate(
            x, column, pivot, weight, probability, origin, inside, softcap, factor,
            top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
            target_weight, target_depth, mass, mass_depth, best, best_column,
            SOFTCAP, SMOOTHING, WEIGHTED, SOFT, ENTROPY, ARGMAX,
        )  # fmt: skip
    if whole < length:
        column = first + whole + within
        # Of whole groups, so that the loads stay wide.
        there = (whole + lane[:, None] * GROUP < length) & (within >= 0)
        x = tl.load(pointers + whole, mask=there, other=float("-inf")).to(tl.float32)
        weight = 1.0
        probability = 0.0
        if WEIGHTED:
            weight = tl.load(class_weights + column, mask=there, other=0.0)
        if SOFT:
            probability = tl.load(probability_pointers + whole, mask=there, other=0.0).to(tl.float32)
        (
            top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
            target_weight, target_depth, mass, mass_depth, best, best_column,
        ) = _accumulate(
            x, column, pivot, weight, probability, origin, inside, softcap, factor,
            top, exponentials, moment, values, columns, allowed_weight, allowed_depth,
            target_weight, target_depth, mass, mass_depth, best, best_column,
            SOFTCAP, SMOOTHING, WEIGHTED, SOFT, ENTROPY, ARGMAX,
        )  # fmt: skip

    highest = tl.max(top, 0)
    alpha = tl.exp2((top - highest) * (factor * LOG2E))
    result = sums + row
    tl.store(result + PIVOT_LOGIT * rows, pivot_logit)
    tl.store(result + ORIGIN * rows, origin)
    tl.store(result + TOP * rows, highest)
    tl.store(result + EXPONENTIALS * rows, tl.sum(exponentials * alpha, 0))
    if ENTROPY:
        rescaled = alpha * (moment + (top - highest) * factor * exponentials)
        tl.store(result + MOMENT * rows, tl.sum(tl.where(alpha == 0.0, 0.0, rescaled), 0))
    if SMOOTHING:
        tl.store(result + ALLOWED_COLUMNS * rows, tl.sum(columns, 0))
        if WEIGHTED or SOFT:
            tl.store(result + ALLOWED_WEIGHT * rows, tl.sum(allowed_weight, 0))
            tl.store(result + ALLOWED_DEPTH * rows, tl.sum(allowed_depth, 0))
        else:
            tl.store(result + ALLOWED_VALUES * rows, tl.sum(values, 0))
    if SOFT:
        tl.store(result + TARGET_MASS * rows, tl.sum(mass, 0))
        tl.store(result + MASS_DEPTH * rows, tl.sum(mass_depth, 0))
        if WEIGHTED:
            tl.store(result + TARGET_WEIGHT * rows, tl.sum(target_weight, 0))
            tl.store(result + TARGET_DEPTH * rows, tl.sum(target_depth, 0))
    if ARGMAX:
        if SOFT:
            tl.store(argmax + row, pivot.to(tl.int64))
        else:
            tl.store(argmax + row, _first_of_best(logits + place, best, best_column, vocabulary, GROUP).to(tl.int64))


@triton.jit
def _sum(sums, index, row, rows, kept):
    return tl.load(sums + index * rows + row, mask=kept, other=0.0).to(tl.float64)


@triton.jit
def _cross(total, depth, at_pivot, base, nll, factor):
    """sum of a_j (lse - z_j), the pivot's share apart. Where a is 0 nothing is added, not 0 * inf."""
    rest = depth * factor + tl.where(total == 0.0, 0.0, total * base)
    return rest + tl.where(at_pivot == 0.0, 0.0, at_pivot * nll)


@triton.jit(do_not_specialize=["ignore_index", "vocabulary", "probability_lead", "probability_stride",
                               "target_stride", "rows"])  # fmt: skip
def score_rows(
    target, class_weights, probabilities, sums, pivots, loss, lse, logprobs, entropy, statistics,
    target_stride, probability_lead, probability_stride, rows, vocabulary, ignore_index,
    smoothing, z_loss, softcap_high, softcap_low, scale_high, scale_low,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, SHIFT: tl.constexpr,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From sums to scores, one thread a row, in float64. Writes every value of every row: 0 where it is skipped."""
    rows = rows.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    label = tl.load(target + row * target_stride, mask=is_row, other=0).to(tl.int64)
    kept = is_row & (label != ignore_index)
    if SOFT and SHIFT:
        kept = kept & (row < rows - 1)
    x = _sum(sums, PIVOT_LOGIT, row, rows, kept)
    scale = number(scale_high, scale_low, x)
    cap = number(softcap_high, softcap_low, x)
    factor = scale
    if SOFTCAP:
        factor = tl.zeros_like(x) + 1.0
    z = exact_z(x, scale, cap, SOFTCAP)
    others = _sum(sums, EXPONENTIALS, row, rows, kept)
    reference = _sum(sums, TOP, row, rows, kept) * factor
    gap = reference - z
    # Otherwise the pivot's probability is below 1e-250, or it is banned.
    is_near = gap <= 600.0
    ratio = tl.exp(tl.minimum(gap, 600.0))
    log_others = tl.where(others == 0.0, float("-inf"), tl.log(tl.where(others == 0.0, 1.0, others)))
    nll = log1p(others * ratio)
    row_lse = tl.where(is_near, z + nll, log_others + reference)
    nll = tl.where(is_near, nll, row_lse - z)
    is_nan = ~(z < float("inf"))  # inf - inf, as everywhere
    row_lse = tl.where(is_nan, float("nan"), row_lse)
    nll = tl.where(is_nan, float("nan"), nll)
    banned = z == float("-inf")

    of_target = nll
    of_mass = nll
    pivot_weight = tl.zeros_like(x) + 1.0
    pivot = tl.minimum(tl.maximum(label, 0), vocabulary - 1)
    if SOFT:
        pivot = tl.load(pivots + row, mask=kept, other=0).to(tl.int64)
    if WEIGHTED:
        pivot_weight = tl.load(class_weights + pivot, mask=kept, other=0.0).to(tl.float64)
        of_target = tl.where(pivot_weight == 0.0, 0.0, pivot_weight * nll)
    origin = _sum(sums, ORIGIN, row, rows, kept)
    base = tl.where(banned, row_lse, nll + (z - origin * factor))
    target_weight = tl.zeros_like(x)
    mass = tl.zeros_like(x)
    if SOFT:
        place = probability_lead + row * probability_stride
        probability = tl.load(probabilities + place + pivot, mask=kept, other=0.0).to(tl.float64)
        mass = _sum(sums, TARGET_MASS, row, rows, kept)
        of_mass = _cross(mass, _sum(sums, MASS_DEPTH, row, rows, kept), probability, base, nll, factor)
        target_weight = mass
        of_target = of_mass
        if WEIGHTED:
            target_weight = _sum(sums, TARGET_WEIGHT, row, rows, kept)
            depth = _sum(sums, TARGET_DEPTH, row, rows, kept)
            of_target = _cross(target_weight, depth, probability * pivot_weight, base, nll, factor)
    row_loss = of_target
    columns = tl.zeros_like(x)
    allowed_weight = tl.zeros_like(x)
    if SMOOTHING:
        columns = _sum(sums, ALLOWED_COLUMNS, row, rows, kept)
        if WEIGHTED or SOFT:
            allowed_weight = _sum(sums, ALLOWED_WEIGHT, row, rows, kept)
            depth = _sum(sums, ALLOWED_DEPTH, row, rows, kept)
            of_allowed = _cross(allowed_weight, depth, tl.where(banned, 0.0, pivot_weight), base, nll, factor)
            columns += tl.where(banned, 0.0, 1.0)
        else:
            allowed_weight = columns
            columns += tl.where(banned, 0.0, 1.0)
            total = _sum(sums, ALLOWED_VALUES, row, rows, kept) * factor + tl.where(banned, 0.0, z)
            of_allowed = columns * row_lse - total
        share = tl.zeros_like(x) + smoothing
        # 0 * inf where the label is banned.
        row_loss = tl.where(share < 1.0, (1.0 - share) * of_target, 0.0)
        row_loss += share / tl.where(kept, columns, 1.0) * of_allowed
    coefficient = tl.zeros_like(x) + z_loss
    row_loss += tl.where(coefficient == 0.0, 0.0, coefficient * row_lse * row_lse)

    tl.store(loss + row, tl.where(kept, row_loss, 0.0).to(tl.float32), mask=is_row)
    tl.store(lse + row, tl.where(kept, row_lse, 0.0).to(tl.float32), mask=is_row)
    tl.store(logprobs + row, tl.where(kept, 0.0 - of_mass, 0.0).to(tl.float32), mask=is_row)
    if ENTROPY:
        moment = _sum(sums, MOMENT, row, rows, kept)
        near = nll - ratio * (moment + gap * others) / (1.0 + others * ratio)
        far = log_others - moment / tl.where(others == 0.0, 1.0, others)
        uncertainty = tl.where(is_nan, float("nan"), tl.where(is_near, near, far))
        tl.store(entropy + row, tl.where(kept, uncertainty, 0.0).to(tl.float32), mask=is_row)
    if SOFT or SMOOTHING:
        row_statistics = statistics + row * N_STATISTICS
        tl.store(row_statistics, tl.where(kept, columns, 0.0), mask=is_row)
        tl.store(row_statistics + 1, tl.where(kept, allowed_weight, 0.0), mask=is_row)
        tl.store(row_statistics + 2, tl.where(kept, target_weight, 0.0), mask=is_row)
        tl.store(row_statistics + 3, tl.where(kept, mass, 0.0), mask=is_row)
        tl.store(row_statistics + 4, tl.where(kept, pivot.to(tl.float64), 0.0), mask=is_row)
        tl.store(row_statistics + 5, tl.where(kept, 0.0 - nll, 0.0), mask=is_row)
