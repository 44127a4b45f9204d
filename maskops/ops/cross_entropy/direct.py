"""The loss of a few plain rows: from the arguments straight to operators of the processor (see ``ops/direct.py``)."""

from typing import Any

import torch
from torch import Tensor

from maskops.ops.calls import as_torch_says_it
from maskops.ops.cross_entropy import registration
from maskops.ops.direct import REFUSED, applied, are_plain, is_eager, nothing_intervenes, saves_as_usual

_forward = torch.ops.maskops.cross_entropy_direct.default
_backward = torch.ops.maskops.cross_entropy_direct_backward.default

_LONGEST = 2**31
_MOST_LOGITS = 2**18
"""With more of them the rows take longer than the way to them."""


def cross_entropy(
    logits: Any,
    target: Any,
    absent: tuple[object, ...],
    flags: tuple[object, ...],
    ignore_index: object,
    numbers: tuple[object, ...],
    logit_scale: object,
    reduction: object,
) -> Tensor | None:
    """``maskops.cross_entropy`` of labels as a mean or a sum, where that is all; else None, as where it raises.

    Args:
        logits: (..., V).
        target: (...) labels.
        absent: arguments that a direct call has as None.
        flags: those that it has as False.
        ignore_index: the label of rows to skip.
        numbers: those that a direct call has as 0.0: label_smoothing, z_loss, softcap.
        logit_scale: 1.0 in a direct call.
        reduction: ``"mean"`` or ``"sum"``.
    """
    if not is_eager() or not are_plain(logits, target):
        return None
    for other in absent:
        if other is not None:
            return None
    for flag in flags:
        if flag is not False:
            return None
    for number in numbers:
        if type(number) is not float or number != 0.0:
            return None
    if type(logit_scale) is not float or logit_scale != 1.0 or not isinstance(reduction, str):
        return None
    if reduction not in ("mean", "sum") or type(ignore_index) is not int or not -_LONGEST <= ignore_index < _LONGEST:
        return None
    if logits.dim() != 2 or logits.numel() > _MOST_LOGITS:
        return None
    try:
        if torch.is_grad_enabled() and logits.requires_grad:
            if not saves_as_usual():
                return None
            loss: Tensor = _apply(logits, target, ignore_index, reduction == "mean")
            return loss
        loss, _, _ = _forward(logits, target, ignore_index, reduction == "mean")
        return loss
    except REFUSED:
        return None
    except RuntimeError as error:
        raise as_torch_says_it(error) from None


class _CrossEntropy(torch.autograd.Function):
    # Arguments: logits (N, V), target (N,), ignore_index, whether the loss is a mean.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
        loss: Tensor
        loss, lse, logprobs = _forward(logits, target, ignore_index, mean)
        ctx.save_for_backward(logits, target, lse, logprobs)
        ctx.numbers = (ignore_index, mean)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse, logprobs = ctx.saved_tensors
        ignore_index, mean = ctx.numbers
        if not torch.is_grad_enabled() and are_plain(grad_loss) and nothing_intervenes():
            return _backward(grad_loss, logits, target, lse, logprobs, ignore_index, mean), None, None, None
        kept = target != ignore_index
        weights = kept.to(torch.float32)
        # As row_factors has it: the same bits.
        factors = weights / kept.sum().to(torch.float32).clamp(min=1.0) if mean else weights
        grad = registration.gradient(logits, target, lse, logprobs, grad_loss * factors, ignore_index)
        return grad, None, None, None


_apply = applied(_CrossEntropy)
