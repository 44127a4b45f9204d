"""Checks of the arguments that every cross-entropy shares, whatever its logits come from."""

import math
import numbers
from typing import Literal, get_args

import torch
from torch import Tensor

from maskops.checks import INTEGERS, check_mask_values, check_softcap, check_tensor
from maskops.layouts import DOCUMENTS, Layout, check_values, values_can_be_read

Reduction = Literal["mean", "sum", "none", "sequence_mean"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LABELS = (torch.int64, torch.int32)
_OFFSETS = DOCUMENTS._replace(owner="", q_total="the {} targets")


def dtype_name(tensor: Tensor) -> str:
    """As in ``torch.float32``, without the module."""
    return str(tensor.dtype).removeprefix("torch.")


def _check_per_token(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected one value per target, shape {tuple(target.shape)}"
        )
    if value.device != target.device:
        raise ValueError(f"{name} is on {value.device}, target on {target.device}: put them on one device")


def _hint_of_rows(target: tuple[int, ...], rows: tuple[int, ...], name: str) -> str:
    """What has probably gone wrong where labels of the first shape meet logits or hidden states of the second."""
    if not target or not rows:
        return ""
    is_flat = len(target) == 1 or len(rows) == 1
    if is_flat and math.prod(target) == math.prod(rows):
        return f": target.reshape({rows})"
    if is_flat and len(target) != len(rows):
        return (
            ". One is packed, the other padded: to_padded(tensor) and to_packed(tensor) of a PackedBatch or a "
            "PaddedBatch turn one into the other"
        )
    if target[:-1] == rows[:-1] and abs(target[-1] - rows[-1]) == 1:
        return (
            f". Cut neither {name} nor labels: shift_labels of a batch go with every row, and shift=True shifts labels "
            "that are aligned with their tokens"
        )
    return ""


def check_target(target: Tensor, scored: Tensor, name: str) -> None:
    """Labels for all but the last dimension of what is scored: logits, or the hidden states that they come from."""
    check_tensor("target", target, "of int64 or int32 labels")
    if target.dtype not in _LABELS:
        raise TypeError(f"target has dtype {dtype_name(target)}: expected int64 or int32")
    if target.shape != scored.shape[:-1]:
        hint = ""
        if scored.dim() > 2 and target.shape == (*scored.shape[:1], *scored.shape[2:]):
            last = "vocabulary" if name == "logits" else "hidden size"
            hint = f". The {last} is the last dimension here: {name}.movedim(1, -1)"
        else:
            hint = _hint_of_rows(tuple(target.shape), tuple(scored.shape[:-1]), name)
        raise ValueError(
            f"target has shape {tuple(target.shape)}: expected {tuple(scored.shape[:-1])}, the shape of {name} "
            f"{tuple(scored.shape)} without the last dimension{hint}"
        )
    if target.device != scored.device:
        raise ValueError(f"target is on {target.device}, {name} on {scored.device}: put them on one device")


def check_probabilities(target: Tensor, logits: Tensor) -> None:
    """A distribution for every row of the logits, instead of a label."""
    if target.dtype not in FLOATS:
        raise TypeError(
            f"target has dtype {dtype_name(target)}: expected labels of int64 or int32, or probabilities of float32, "
            f"bfloat16, float16 or float64"
        )
    if target.shape != logits.shape:
        raise ValueError(
            f"target has dtype {dtype_name(target)}, so it holds probabilities, but its shape is "
            f"{tuple(target.shape)}: expected {tuple(logits.shape)}, the shape of logits. Labels are int64 or int32"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}: put them on one device")


def check_nothing_to_ignore(ignore_index: int) -> None:
    """Of a target of probabilities; a negative index could stand for no class, so that it is let pass as in torch."""
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index is {ignore_index}, but target holds probabilities, none of which is an index: skip tokens "
            f"by mask"
        )


def check_class_weights(class_weights: Tensor, vocabulary: int, device: torch.device) -> None:
    """One factor for every column of the logits."""
    check_tensor("class_weights", class_weights, "(V,) of one number per column of the logits")
    if class_weights.dtype == torch.bool or class_weights.is_complex():
        raise TypeError(f"class_weights has dtype {dtype_name(class_weights)}: expected numbers")
    if class_weights.shape != (vocabulary,):
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}: expected ({vocabulary},), one number per column of "
            f"the logits"
        )
    if class_weights.device != device:
        raise ValueError(f"class_weights is on {class_weights.device}, logits on {device}: put them on one device")
    if class_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "class_weights requires grad, but they are constants here, as in torch: pass class_weights.detach(), or "
            "put weights that are to be learned into a floating target"
        )


def check_tokens(target: Tensor, mask: Tensor | None, token_weights: Tensor | None) -> None:
    """The mask and the weights of the targets."""
    if mask is not None:
        check_tensor("mask", mask, "of bool or 0/1 integers, where True (1) keeps a token")
        if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
            raise TypeError(
                f"mask has dtype {dtype_name(mask)}: expected bool or integers, where True (1) keeps a token; weights "
                f"go into token_weights"
            )
        _check_per_token("mask", mask, target)
        if values_can_be_read([mask], mask.device):
            check_mask_values("mask", mask)
    if token_weights is not None:
        check_tensor("token_weights", token_weights, "of one number per target")
        if token_weights.dtype == torch.bool or token_weights.is_complex():
            raise TypeError(
                f"token_weights has dtype {dtype_name(token_weights)}: expected numbers; a bool tensor goes into mask"
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


def check_numbers(
    target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float
) -> None:
    """The numbers that say how a token is scored."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index is {ignore_index!r}: expected an int")
    bits = 31 if target.dtype == torch.int32 else 63
    if not -(2**bits) <= ignore_index < 2**bits:
        raise ValueError(f"ignore_index is {ignore_index}: it does not fit target's dtype, int{bits + 1}")
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
    check_softcap(softcap)
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}: expected a finite number > 0")


def check_reduction(
    target: Tensor, reduction: str, cu_seqlens: Tensor | None, num_items: int | Tensor | None, shift: bool
) -> None:
    """What depends on how losses are summed up."""
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
            if num_items.dtype == torch.bool or num_items.is_complex():
                raise TypeError(f"num_items has dtype {dtype_name(num_items)}: expected a number")
            if num_items.device != target.device:
                raise ValueError(f"num_items is on {num_items.device}, target on {target.device}: put them together")
            if num_items.requires_grad and torch.is_grad_enabled():
                raise ValueError("num_items requires grad, but it is a constant here: pass num_items.detach()")
            if values_can_be_read([num_items], num_items.device) and bool(num_items < 0):
                raise ValueError(f"num_items is {num_items.item()}: expected a number >= 0")
        elif not isinstance(num_items, (int, torch.SymInt)) or isinstance(num_items, bool):
            raise TypeError(f"num_items is {num_items!r}: expected an int or a 0-dim tensor")
        elif num_items < 0:
            raise ValueError(f"num_items is {num_items}: expected a number >= 0")


def check_cu_seqlens(cu_seqlens: Tensor, target: Tensor) -> None:
    """Offsets of sequences in the flattened targets."""
    check_tensor("cu_seqlens", cu_seqlens, "(n_sequences + 1,) of int32 or int64")
    if cu_seqlens.dtype not in _LABELS:
        raise TypeError(f"cu_seqlens has dtype {dtype_name(cu_seqlens)}: expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (n_sequences + 1,)")
    if cu_seqlens.device != target.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, target on {target.device}: put them on one device")
    if values_can_be_read([cu_seqlens], cu_seqlens.device):
        total = target.numel()
        check_values((Layout("cu_seqlens", cu_seqlens, names=_OFFSETS),), total, total, batch=1)
