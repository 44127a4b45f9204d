"""``maskops.cross_entropy``: what it takes, what it refuses, and which backend computes it."""

import math
import numbers
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from maskops import backend
from maskops.checks import INTEGERS, check_mask_values, check_tensor
from maskops.layouts import DOCUMENTS, Layout, check_values, values_can_be_read
from maskops.ops.cross_entropy import reference, registration
from maskops.ops.cross_entropy.rows import Scoring, check_labels, reduce_rows, select_rows

Reduction = Literal["mean", "sum", "none", "sequence_mean"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LABELS = (torch.int64, torch.int32)
_OFFSETS = DOCUMENTS._replace(owner="", q_total="the {} targets")


class CrossEntropyOutput(NamedTuple):
    """What ``maskops.cross_entropy`` returns when any ``return_*`` is set; what was not asked for is None.

    Attributes:
        loss: 0-dim, or target's shape under ``reduction="none"``.
        lse: logsumexp of the row (natural log, after scale and softcap), target's shape, 0 in skipped rows.
        logprobs: log-probability of the label, target's shape, 0 in skipped rows.
        entropy: of the row's distribution, in nats, target's shape, 0 in skipped rows.
        argmax: int64, the first column with the largest logit, target's shape, -1 in skipped rows.
    """

    loss: Tensor
    lse: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_per_token(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected one value per target, shape {tuple(target.shape)}"
        )
    if value.device != target.device:
        raise ValueError(f"{name} is on {value.device}, target on {target.device}: put them on one device")


def _check_tensors(logits: Tensor, target: Tensor, mask: Tensor | None, token_weights: Tensor | None) -> None:
    check_tensor("logits", logits, "(..., V)")
    check_tensor("target", target, "of int64 or int32 labels")
    if logits.dtype not in _FLOATS:
        raise TypeError(f"logits has dtype {_dtype_name(logits)}: expected float32, bfloat16, float16 or float64")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (..., V) with at least one column")
    if target.dtype not in _LABELS:
        hint = ": class probabilities are not taken, only labels" if target.is_floating_point() else ""
        raise TypeError(f"target has dtype {_dtype_name(target)}: expected int64 or int32{hint}")
    if target.shape != logits.shape[:-1]:
        hint = ""
        if logits.dim() > 2 and target.shape == (*logits.shape[:1], *logits.shape[2:]):
            hint = ". The vocabulary is the last dimension here: logits.movedim(1, -1)"
        raise ValueError(
            f"target has shape {tuple(target.shape)}: expected {tuple(logits.shape[:-1])}, the shape of the logits "
            f"{tuple(logits.shape)} without their last dimension{hint}"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}: put them on one device")
    if mask is not None:
        check_tensor("mask", mask, "of bool or 0/1 integers, where True (1) keeps a token")
        if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
            raise TypeError(
                f"mask has dtype {_dtype_name(mask)}: expected bool or integers, where True (1) keeps a token; weights "
                f"go into token_weights"
            )
        _check_per_token("mask", mask, target)
        if values_can_be_read([mask], mask.device):
            check_mask_values("mask", mask)
    if token_weights is not None:
        check_tensor("token_weights", token_weights, "of one number per target")
        if token_weights.dtype == torch.bool or token_weights.is_complex():
            raise TypeError(
                f"token_weights has dtype {_dtype_name(token_weights)}: expected numbers; a bool tensor goes into mask"
            )
        if token_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "token_weights requires grad, but they are constants here: pass token_weights.detach(), or multiply "
                "the losses of reduction='none' by weights that are to be learned"
            )
        _check_per_token("token_weights", token_weights, target)


def _check_number(name: str, number: object, expected: str) -> None:
    # A tensor would cost a sync, and its gradient would be lost.
    if not isinstance(number, (numbers.Real, torch.SymInt, torch.SymFloat)):
        came = f"a tensor ({name}.item() is a number)" if isinstance(number, Tensor) else repr(number)
        raise TypeError(f"{name} is {came}: expected {expected}")


def _check_numbers(
    target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float
) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}: expected an int")
    if target.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index is {ignore_index}: it does not fit target's dtype, int32")
    _check_number("label_smoothing", label_smoothing, "a number in [0, 1]")
    _check_number("z_loss", z_loss, "a finite number >= 0")
    _check_number("softcap", softcap, "a finite number >= 0, where 0 means none")
    _check_number("logit_scale", logit_scale, "a finite number > 0")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: expected a number in [0, 1]")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}: expected a finite number >= 0")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: expected a finite number >= 0, where 0 means none")
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}: expected a finite number > 0")


def _check_reduction(
    target: Tensor, reduction: str, cu_seqlens: Tensor | None, num_items: int | Tensor | None, shift: bool
) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}: expected one of {', '.join(map(repr, get_args(Reduction)))}")
    if reduction == "sequence_mean" and cu_seqlens is None and target.dim() != 2:
        raise ValueError(
            f"reduction is 'sequence_mean' and target has shape {tuple(target.shape)}: pass cu_seqlens, or a target of "
            f"shape (B, S)"
        )
    if shift and target.dim() == 0:
        raise ValueError("shift is True, but target has no dimension: there is no next token")
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(
                f"num_items replaces the denominator of reduction='mean', but reduction is {reduction!r}: leave it out"
            )
        if isinstance(num_items, Tensor):
            if num_items.numel() != 1:
                raise ValueError(f"num_items has shape {tuple(num_items.shape)}: expected an int or a 0-dim tensor")
        elif not isinstance(num_items, (int, torch.SymInt)) or isinstance(num_items, bool):
            raise TypeError(f"num_items is {num_items!r}: expected an int or a 0-dim tensor")
        elif num_items < 0:
            raise ValueError(f"num_items is {num_items}: expected a number >= 0")


def _check_cu_seqlens(cu_seqlens: Tensor, target: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens, "(n_sequences + 1,) of int32 or int64")
    if cu_seqlens.dtype not in _LABELS:
        raise TypeError(f"cu_seqlens has dtype {_dtype_name(cu_seqlens)}: expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (n_sequences + 1,)")
    if cu_seqlens.device != target.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, target on {target.device}: put them on one device")
    if values_can_be_read([cu_seqlens], cu_seqlens.device):
        total = target.numel()
        check_values((Layout("cu_seqlens", cu_seqlens, names=_OFFSETS),), total, total, batch=1)


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    cu_seqlens: Tensor | None = ...,
    num_items: int | Tensor | None = ...,
    shift: bool = ...,
    return_lse: Literal[False] = ...,
    return_logprobs: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float = ...,
    logit_scale: float = ...,
    reduction: Reduction = ...,
    cu_seqlens: Tensor | None = ...,
    num_items: int | Tensor | None = ...,
    shift: bool = ...,
    return_lse: bool = ...,
    return_logprobs: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    inplace_backward: bool = ...,
) -> Tensor | CrossEntropyOutput: ...
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    cu_seqlens: Tensor | None = None,
    num_items: int | Tensor | None = None,
    shift: bool = False,
    return_lse: bool = False,
    return_logprobs: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    inplace_backward: bool = False,
) -> Tensor | CrossEntropyOutput:
    r"""Cross-entropy between logits and labels that skips masked tokens: they are neither computed nor read.

    With ``z = softcap(logit_scale * logits)`` and ``lse = logsumexp(z)`` over the vocabulary, the loss of a token is

        (1 - label_smoothing) * (lse - z[target]) + label_smoothing * (lse - mean(z)) + z_loss * lse ** 2

    A token is kept where ``target != ignore_index`` and its mask is true and its weight is not 0. The logits of all
    other tokens may hold anything, NaN included: they reach no result, and their gradient is exactly 0. So is, with a
    ``cu_seqlens``, that of tokens after the last sequence.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. Any strides; nothing is copied where the last dimension
            is contiguous and the leading ones have one stride between rows. Computed in float32 (float64 for float64).
            A logit of -inf is a banned column: probability 0, also under ``softcap``; label smoothing takes the mean
            over the other columns, entropy ignores it, its gradient is 0.
        target: (...) int64 or int32, labels in [0, V), or ``ignore_index``.
        mask: (...) bool or 0/1 integers; True keeps a token.
        token_weights: (...) numbers that multiply the loss of each token. Constants: a gradient for them is refused.
        ignore_index: the label of tokens to skip; may lie inside the vocabulary.
        label_smoothing: share in [0, 1] of the loss that goes to the mean over the vocabulary (Szegedy et al. 2016).
        z_loss: factor of ``lse ** 2``, which keeps the normaliser near 0 (PaLM, Chowdhery et al. 2022, section 5).
        softcap: ``softcap * tanh(z / softcap)`` after the scale (Gemma 2, section 2); 0 for none.
        logit_scale: factor of the logits, > 0: an inverse temperature.
        reduction: ``"mean"``: sum(weight * loss) / sum(weight) over kept tokens, 0 where the denominator is 0.
            ``"sum"``. ``"none"``: weight * loss of every token, 0 for skipped ones. ``"sequence_mean"``: the mean, over
            the sequences that have a kept token, of the mean inside each.
        cu_seqlens: (n_sequences + 1,) int32 or int64, offsets of packed sequences in the flattened tokens, starting
            with 0. Without it the last dimension of ``target`` runs along a sequence.
        num_items: replaces the denominator of ``"mean"``, for gradient accumulation: an int or a 0-dim tensor, which
            is not read on the host.
        shift: scores position i against the target of position i + 1 of the same sequence; the last position of every
            sequence is skipped. ``mask`` and ``token_weights`` belong to the target and shift along. No logits are
            copied.
        return_lse: also return the normaliser of every token.
        return_logprobs: also return the log-probability of every label.
        return_entropy: also return the entropy of every distribution.
        return_argmax: also return the most likely column of every token.
        inplace_backward: allow the backward pass to write the gradient over the storage of ``logits`` (it is an
            allowance: compiled code and backends that cannot do it ignore it). The logits are lost then, ``.grad`` of
            logits that are a leaf shares their memory, and a second backward pass, or one of another op that saved
            the logits, raises autograd's error about a modified variable.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, or target's shape for ``"none"``. With any ``return_*``,
        a ``CrossEntropyOutput``; its lse, logprobs and entropy are differentiable, unweighted, and 0 for skipped tokens
        (argmax: -1).

    Raises:
        TypeError: a type or dtype is wrong.
        ValueError: a shape, device or number is wrong, or ``mask`` holds other values than 0 and 1, or ``cu_seqlens``
            is not ascending from 0 or ends beyond the tokens, or the label of a kept token is outside the vocabulary.
            Values are checked on the CPU, and on other devices under ``maskops.validate()``; where they are not, no
            memory outside of the tensors is touched. Compiled code checks labels, not the values of ``mask`` and
            ``cu_seqlens``.

    The kernels have no double backward; ``maskops.use_backend("reference")`` has.

    Example:
        >>> logits, target = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
        >>> loss = maskops.cross_entropy(logits, target, mask=torch.ones(2, 5, dtype=torch.bool), shift=True)
    """
    _check_tensors(logits, target, mask, token_weights)
    _check_numbers(target, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check_reduction(target, reduction, cu_seqlens, num_items, shift)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, target)

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = select_rows(
        target,
        mask=mask,
        token_weights=token_weights,
        ignore_index=ignore_index,
        cu_seqlens=cu_seqlens,
        shift=shift,
        dtype=dtype,
    )
    matrix = logits.reshape(-1, logits.shape[-1])
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()

    # The reference holds the logits in the wide dtype, their exponentials, and a few temporaries of that size.
    reference_bytes = None if torch.compiler.is_compiling() else 4 * dtype.itemsize * logits.numel()
    chosen = backend.choose("cross_entropy", logits.device.type, logits.dtype, reference_bytes=reference_bytes)
    scoring = Scoring(
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        float(logit_scale),
        entropy=return_entropy,
        argmax=return_argmax,
    )
    if chosen == backend.REFERENCE:
        if values_can_be_read([rows.labels], rows.labels.device):
            check_labels(rows.labels, matrix.shape[1], ignore_index)
        results = reference.row_losses(matrix, rows.labels, scoring)
    else:
        results = registration.row_losses(matrix, rows.labels, scoring, inplace_backward)
    row_loss, lse, logprobs, entropy, argmax = results

    shape = target.shape
    loss = reduce_rows(row_loss, rows, shape=shape, reduction=reduction, num_items=num_items)
    if not (return_lse or return_logprobs or return_entropy or return_argmax):
        return loss
    return CrossEntropyOutput(
        loss,
        lse.reshape(shape) if return_lse else None,
        logprobs.reshape(shape) if return_logprobs else None,
        entropy.reshape(shape) if return_entropy else None,
        argmax.reshape(shape) if return_argmax else None,
    )
