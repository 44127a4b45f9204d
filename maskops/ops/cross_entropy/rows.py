"""Which rows of the logits count, against which label, with what weight; and how their losses become one number.

Tensor operations on one value per row, the same for every backend: no value is read back, so nothing waits for a
device. A row is skipped by giving it the label ``ignore_index``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Sums are cut into pieces of a fixed size, because torch cuts a long one by the number of threads.
_PIECE = 4096


class Scoring(NamedTuple):
    """How a row is scored: the numbers of ``maskops.cross_entropy``, and which extra results are wanted."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    entropy: bool
    argmax: bool


class Rows(NamedTuple):
    """What every row of the logits is scored against.

    Attributes:
        labels: (N,), target's dtype; ``ignore_index`` where the row is skipped.
        weights: (N,) in the dtype of the loss, 0 where the row is skipped; None: 1 for every row that is kept.
        kept: (N,) bool.
        sequence: (N,) int64, the ordinal of the row's sequence in ``cu_seqlens``, n_sequences outside of all; None
            without ``cu_seqlens``.
        n_sequences: how many sequences ``cu_seqlens`` has; 0 without.
        label_weights: (N,) in the dtype of the loss, the class weight of every row's label: a factor of what the row
            adds to a denominator, but not of its loss, which has it already. None: 1.
    """

    labels: Tensor
    weights: Tensor | None
    kept: Tensor
    sequence: Tensor | None
    n_sequences: int
    label_weights: Tensor | None = None


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError for the first label of a kept row that is outside the vocabulary. The C++ op does the same."""
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(outside.any()):
        row = int(outside.int().argmax())
        raise ValueError(
            f"target: the label that row {row} of the logits is scored against is {int(labels[row])}, outside the "
            f"vocabulary of {vocabulary}. Rows to skip hold ignore_index ({ignore_index}) or are masked"
        )


def select_rows(
    target: Tensor,
    *,
    mask: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    cu_seqlens: Tensor | None,
    shift: bool,
    dtype: torch.dtype,
    class_weights: Tensor | None = None,
) -> Rows:
    """Folds the mask, the weights, the sequences and the shift into one label per row of the logits.

    Args:
        class_weights: (V,), or None where they weigh no denominator: rows that are scored against probabilities.
    """
    labels = target
    weights = None
    if mask is not None:
        labels = labels.masked_fill(mask == 0, ignore_index)
    if token_weights is not None:
        weights = token_weights.to(dtype)
        labels = labels.masked_fill(weights == 0, ignore_index)
    sequence, n_sequences = None, 0
    if cu_seqlens is not None:
        labels = labels.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        n_sequences = cu_seqlens.shape[0] - 1
        index = torch.arange(labels.shape[0], device=labels.device)
        # Of all offsets, not of cu_seqlens[1:], whose size is 1 for one sequence: compiled code has a size of 1 apart.
        sequence = torch.bucketize(index, cu_seqlens.long(), right=True) - 1
        labels = labels.masked_fill(sequence == n_sequences, ignore_index)
    if shift and target.numel() > 0:
        # A row's label is that of the next token. The logits stay where they are.
        # Padded first, then cut: a size one less than that of target could be 1, which compiled code has apart.
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if sequence is not None:
            labels = labels.masked_fill(sequence != F.pad(sequence, (0, 1), value=-1)[1:], ignore_index)
        weights = None if weights is None else F.pad(weights, (0, 1))[..., 1:]
    labels = labels.reshape(-1)
    kept = labels != ignore_index
    if weights is not None:
        weights = torch.where(kept, weights.reshape(-1), 0.0)
    label_weights = None
    if class_weights is not None:
        # Labels outside the vocabulary are an error that the op reports; here they must only not be followed.
        index = torch.where(kept, labels, 0).clamp(0, class_weights.shape[0] - 1).long()
        label_weights = class_weights.to(dtype)[index]
    return Rows(labels, weights, kept, sequence, n_sequences, label_weights)


def wide_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What one value a row is computed in: float64 where each device of the kind has it, else the dtype of the rest."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else dtype


def total(values: Tensor) -> Tensor:
    """Sum over the last dimension in `wide_dtype`, the same bits for any number of threads.

    The operator of direct calls adds in double precision, too, where the order of the values hardly ever shows.
    """
    length = values.shape[-1]
    wide = wide_dtype(values.dtype, values.device)
    if not torch.compiler.is_compiling() and length <= _PIECE:
        return values.sum(-1, dtype=wide).to(values.dtype)
    # Compiled code is made once for short and long sums, and has sizes of 1 apart: it always takes two pieces or more.
    count = length // _PIECE + 2
    pieces = F.pad(values, (0, count * _PIECE - length))
    return pieces.reshape(*values.shape[:-1], count, _PIECE).sum(-1, dtype=wide).sum(-1).to(values.dtype)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0, with zero gradient, where the denominator is 0."""
    denominator = denominator.to(numerator.dtype)
    return numerator / denominator.masked_fill(denominator == 0, math.inf)


def row_factors(
    rows: Rows, *, shape: torch.Size, reduction: str, num_items: int | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The factor (N,) of every row's loss in the sum that a reduction is, as ``maskops.cross_entropy`` documents it.

    It depends on no logit, so whoever computes the losses can compute the gradients of the result along with them.

    Args:
        shape: target's shape: ``"sequence_mean"`` takes its leading dimension for the sequences where there are no
            ``cu_seqlens``.
    """
    weights = rows.kept.to(dtype) if rows.weights is None else rows.weights
    shares = weights if rows.label_weights is None else weights * rows.label_weights  # in the denominators
    counted = rows.weights is None and rows.label_weights is None
    if reduction == "mean":
        if num_items is None:
            return _ratio(weights, rows.kept.sum() if counted else total(shares))
        if isinstance(num_items, Tensor):
            return _ratio(weights, num_items.detach().reshape(()).to(weights.device))
        return weights / (num_items if num_items != 0 else math.inf)
    if reduction == "sequence_mean":
        if rows.sequence is None:
            factors = _ratio(weights.reshape(shape), total(shares.reshape(shape))[..., None]).reshape(-1)
            counts = rows.kept.reshape(shape).sum(-1)
        else:
            sequence, places = rows.sequence, rows.n_sequences + 1
            factors = _ratio(weights, shares.new_zeros(places).index_add(0, sequence, shares)[sequence])
            # The last place, of rows outside of every sequence, has none: without it sizes could be 1.
            counts = sequence.new_zeros(places).index_add(0, sequence, rows.kept.long())
        return _ratio(factors, (counts > 0).sum())
    return weights


def reduce_rows(
    loss: Tensor, rows: Rows, *, shape: torch.Size, reduction: str, num_items: int | Tensor | None
) -> Tensor:
    """Weighs the losses of the rows (N,) and reduces them; the arguments are those of ``row_factors``.

    Returns:
        0-dim, or of ``shape`` under ``"none"``.
    """
    if reduction in ("none", "sum") and rows.weights is None:
        weighted = loss  # 0 in skipped rows
    else:
        weighted = loss * row_factors(rows, shape=shape, reduction=reduction, num_items=num_items, dtype=loss.dtype)
    return weighted.reshape(shape) if reduction == "none" else total(weighted)
