"""The loss of a few plain rows: from the arguments straight to operators of the processor (see ``ops/direct.py``)."""

from typing import Any

import torch
from torch import Tensor

from maskops.ops.calls import as_torch_says_it, run
from maskops.ops.cross_entropy import registration
from maskops.ops.direct import REFUSED, applied, are_plain, is_eager, nothing_intervenes, saves_as_usual

_forward = torch.ops.maskops.cross_entropy_direct.default
_loss = torch.ops.maskops.cross_entropy_loss.default
_backward = torch.ops.maskops.cross_entropy_direct_backward.default

_is_grad_enabled = torch.is_grad_enabled
_LONGEST = 2**31
_MOST_LOGITS = 2**18
"""With more of them the rows take longer than the way to them."""


def cross_entropy(
    logits: Any,
    target: Any,
    ignore_index: Any,
    reduction: object,
    mask: object,
    token_weights: object,
    class_weights: object,
    cu_seqlens: object,
    num_items: object,
    grad_buffer: object,
    shift: object,
    inplace_backward: object,
    return_lse: object,
    return_logprobs: object,
    return_entropy: object,
    return_argmax: object,
    label_smoothing: object,
    z_loss: object,
    softcap: object,
    logit_scale: object,
) -> Any:
    """``maskops.cross_entropy`` of labels as a mean or a sum, where that is all; else None, as where it raises.

    Args:
        logits: (..., V), and so on: the arguments of ``maskops.cross_entropy``.
        target: (...) labels.
        ignore_index: the label of rows to skip.
        reduction: ``"mean"`` or ``"sum"``.
        mask: None in a direct call.
        token_weights: None.
        class_weights: None.
        cu_seqlens: None.
        num_items: None.
        grad_buffer: None.
        shift: False.
        inplace_backward: False.
        return_lse: False.
        return_logprobs: False.
        return_entropy: False.
        return_argmax: False.
        label_smoothing: 0.0.
        z_loss: 0.0.
        softcap: 0.0.
        logit_scale: 1.0.
    """
    if not (
        mask is None
        and token_weights is None
        and class_weights is None
        and cu_seqlens is None
        and num_items is None
        and grad_buffer is None
        and shift is False
        and inplace_backward is False
        and return_lse is False
        and return_logprobs is False
        and return_entropy is False
        and return_argmax is False
        and type(label_smoothing) is float
        and label_smoothing == 0.0
        and type(z_loss) is float
        and z_loss == 0.0
        and type(softcap) is float
        and softcap == 0.0
        and type(logit_scale) is float
        and logit_scale == 1.0
        and type(reduction) is str
        and (reduction == "mean" or reduction == "sum")
        and type(ignore_index) is int
        and -_LONGEST <= ignore_index < _LONGEST
        and is_eager()
        and are_plain(logits, target)
        and logits.numel() <= _MOST_LOGITS
    ):
        return None
    try:
        if logits.dim() != 2:  # rows of a batch: the reduction knows no other order of them
            if logits.dim() < 2 or target.shape != logits.shape[:-1] or not logits.is_contiguous():
                return None
            logits, target = logits.flatten(0, -2), target.flatten()
        if not (_is_grad_enabled() and logits.requires_grad):
            return _loss(logits, target, ignore_index, reduction == "mean")
        if not saves_as_usual():
            return None
        return _apply(logits, target, ignore_index, reduction == "mean")
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
            return run(_backward, grad_loss, logits, target, lse, logprobs, ignore_index, mean), None, None, None
        kept = target != ignore_index
        weights = kept.to(torch.float32)
        # As row_factors has it: the same bits.
        factors = weights / kept.sum().to(torch.float32).clamp(min=1.0) if mean else weights
        grad = registration.gradient(logits, target, lse, logprobs, grad_loss * factors, ignore_index)
        return grad, None, None, None


_apply = applied(_CrossEntropy)
