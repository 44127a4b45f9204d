"""What the backward kernels have in common: terms of rows, and P and dS of a tile.

P is recomputed from the log-sum-exp, and dS = P * (dP - delta); see ``backward_rows.py`` for the terms of rows. Tiles
are (rows, keys), or (keys, rows) where ``TRANSPOSED``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from maskops.ops.attention.triton_kernels.features import bias_of, distances, kept, power, scores_of
from maskops.ops.triton_language import LOG2E

NEVER = tl.constexpr(float("inf"))
"""The log-sum-exp of a row without a key as the kernels read it: every P of it is 0."""

LSE = tl.constexpr(0)
DELTA = tl.constexpr(1)
LOG2_SUM = tl.constexpr(2)
"""What the log-sum-exp lacks: 0, but where it is the maximum alone (see ``renewed_sums_kernel``)."""
SHARE = tl.constexpr(3)


class Terms(NamedTuple):
    """Vectors along the rows of a tile."""

    lse: Any
    delta: Any
    log2_sum: Any  # under a bias or slopes
    share: Any  # of a row's weights that its sink leaves to the keys, where the kernels need it


class Pairs(NamedTuple):
    """Of each pair of a tile."""

    weight: Any  # of v
    grad_product: Any  # gradient of the product of q and k, without the factor
    grad_score: Any  # gradient of the score, which is the bias's
    distance: Any  # from the diagonal, under slopes


@triton.jit
def over_keys(values, TRANSPOSED: tl.constexpr):
    """A vector along the rows, spread over the keys of a tile."""
    if TRANSPOSED:
        spread = values[None, :]
    else:
        spread = values[:, None]
    return spread


@triton.jit
def over_rows(values, TRANSPOSED: tl.constexpr):
    """A vector along the keys, spread over the rows of a tile."""
    if TRANSPOSED:
        spread = values[:, None]
    else:
        spread = values[None, :]
    return spread


@triton.jit
def terms_of(TERMS, index, term_stride, HAS_SUMS: tl.constexpr, HAS_SHARES: tl.constexpr):
    """Loads the terms of rows, all of which are there; ``TERMS`` of the batch element and head."""
    term_stride = tl.cast(term_stride, tl.int64)
    lse = tl.load(TERMS + LSE * term_stride + index)
    delta = tl.load(TERMS + DELTA * term_stride + index)
    log2_sum, share = delta, delta
    if HAS_SUMS:
        log2_sum = tl.load(TERMS + LOG2_SUM * term_stride + index)
    if HAS_SHARES:
        share = tl.load(TERMS + SHARE * term_stride + index)
    return Terms(lse=lse, delta=delta, log2_sum=log2_sum, share=share)


@triton.jit
def spans_over(rows, key, N_SPANS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Whether the keys of a tile lie in a span of their rows."""
    places = over_rows(key, TRANSPOSED)
    inside = (places >= over_keys(rows.starts[0], TRANSPOSED)) & (places < over_keys(rows.ends[0], TRANSPOSED))
    for span in tl.static_range(1, N_SPANS):
        start, end = over_keys(rows.starts[span], TRANSPOSED), over_keys(rows.ends[span], TRANSPOSED)
        inside = inside | ((places >= start) & (places < end))
    return inside


@triton.jit
def tanh_slope(x):
    """The derivative of tanh, with a small relative error everywhere: 1 - tanh^2 would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    half = 2.0 / (1.0 + e)
    return e * (half * half)


@triton.jit
def scores_of_pairs(
    products, is_visible, row, key, extras, factor, cap, bias_row_stride, bias_key_stride,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, which of its pairs count, and their distances.

    Args:
        products: of q and k.
        is_visible: what the mask allows; no bias of other pairs is read.
        row, key: vectors along the sides.
        extras: as ``features.extras_of`` gives them.
    """
    scores = scores_of(products, factor, cap, HAS_SOFTCAP)
    distance = scores
    if HAS_BIAS:
        bias = bias_of(
            extras.bias, over_keys(row, TRANSPOSED), over_rows(key, TRANSPOSED), is_visible, bias_row_stride,
            bias_key_stride, True,
        )  # fmt: skip
        is_visible &= bias != -NEVER
        scores += bias
    if HAS_ALIBI:
        distance = distances(over_keys(extras.diagonal, TRANSPOSED), over_rows(key, TRANSPOSED))
        scores -= over_keys(extras.slope, TRANSPOSED) * distance
    return scores, is_visible, distance


@triton.jit
def gradients_of_pairs(
    products, grad_weight, is_visible, row, key, head, terms, extras, factor, cap, last_dropped, keep_scale,
    bias_row_stride, bias_key_stride,
    TRANSPOSED: tl.constexpr, PARTIAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of a tile.

    They are selected, never multiplied by 0: what a masked pair holds may be NaN.

    Args:
        products: of q and k.
        grad_weight: products of the incoming gradient and v.
        is_visible: what the mask allows, if that is not everything.
        row, key: vectors along the sides.
        PARTIAL: whether some pair of the tile may not count.
        The others: as in ``scores_of_pairs`` and ``features.kept``.
    """
    scores, is_visible, distance = scores_of_pairs(
        products, is_visible, row, key, extras, factor, cap, bias_row_stride, bias_key_stride,
        TRANSPOSED, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP,
    )  # fmt: skip
    weight = power(scores - over_keys(terms.lse, TRANSPOSED), NATURAL)
    if HAS_BIAS or HAS_ALIBI:
        weight *= over_keys(tl.exp2(-terms.log2_sum), TRANSPOSED)
    used = weight
    if HAS_DROPOUT:
        is_kept = kept(
            extras.seed, last_dropped, over_rows(key, TRANSPOSED), over_keys(extras.first, TRANSPOSED),
            over_keys(extras.diagonal - extras.first, TRANSPOSED), head, over_keys(extras.ordinal, TRANSPOSED),
        )  # fmt: skip
        used = tl.where(is_kept, weight * keep_scale, 0.0)
        grad_weight = tl.where(is_kept, grad_weight * keep_scale, 0.0)
    if HAS_SHARES:
        used *= over_keys(terms.share, TRANSPOSED)
        grad_weight *= over_keys(terms.share, TRANSPOSED)
    grad_score = weight * (grad_weight - over_keys(terms.delta, TRANSPOSED))
    grad_product = grad_score
    if HAS_SOFTCAP:
        grad_product = grad_score * tanh_slope(products * factor)
    if PARTIAL:
        used = tl.where(is_visible, used, 0.0)
        grad_product = tl.where(is_visible, grad_product, 0.0)
        grad_score = tl.where(is_visible, grad_score, 0.0)
    return Pairs(weight=used, grad_product=grad_product, grad_score=grad_score, distance=distance)
