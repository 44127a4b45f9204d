"""The masked softmax of plain scores: straight to the operator of the processor (see ``ops/direct.py``)."""

from typing import Any

import torch
from torch import Tensor

from maskops.masks import Mask
from maskops.ops.calls import as_torch_says_it, run
from maskops.ops.direct import REFUSED, applied, are_plain, is_eager, nothing_intervenes, saves_as_usual
from maskops.ops.softmax import registration
from maskops.spans import RowSpans

_forward = torch.ops.maskops.masked_softmax_forward.default
_backward = torch.ops.maskops.masked_softmax_backward.default

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
_NO_PLAN = (_NOTHING, _NOTHING, _NOTHING)


def masked_softmax(x: Any, mask: Any, dim: object, return_lse: bool, backend: object) -> Any:
    """``maskops.masked_softmax`` along contiguous rows, else None; also None where the full way raises."""
    if backend is not None or type(dim) is not int or not is_eager() or not are_plain(x):
        return None
    try:
        arguments = _arguments(x, mask, dim, return_lse)
    except (*REFUSED, RuntimeError):  # what tensors answer that have no such shape
        return None
    if arguments is None:
        return None
    try:
        if torch.is_grad_enabled() and x.requires_grad:
            if not saves_as_usual():
                return None
            weights, lse = _apply(*arguments)
        else:
            weights, lse = _forward(*arguments)
    except REFUSED:
        return None
    except RuntimeError as error:
        raise as_torch_says_it(error) from None
    return (weights, lse) if return_lse else weights


def _arguments(x: Tensor, mask: Any, dim: int, return_lse: bool) -> tuple[Any, ...] | None:
    """Those of the operator; None where the call is not plain."""
    last = x.dim() - 1
    if last < 0 or dim not in (-1, last) or not x.is_contiguous() or x.numel() == 0 or type(return_lse) is not bool:
        return None
    allowed, plan = _NOTHING, _NO_PLAN
    if type(mask) is Mask or type(mask) is RowSpans:
        if last < 1:
            return None
        spans = mask.kept_spans(*x.shape[-2:]) if isinstance(mask, Mask) else mask
        if spans is None or spans.dense is not None or not spans.start.is_cpu:
            return None
        plan = spans[:3]
    elif mask is not None:
        # The operator broadcasts it; one without elements would be none to it.
        if not are_plain(mask) or mask.dtype != torch.bool or mask.numel() == 0:
            return None
        allowed = mask
    return x, allowed, *plan, last, return_lse


class _MaskedSoftmax(torch.autograd.Function):
    # Arguments: those of the operator.

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, *plan_and_numbers: Any) -> tuple[Tensor, Tensor]:
        weights, lse = _forward(x, mask, *plan_and_numbers)
        ctx.save_for_backward(weights, *plan_and_numbers[:3])
        ctx.set_materialize_grads(False)
        ctx.dim = plan_and_numbers[3]
        return weights, lse

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, *plan = ctx.saved_tensors
        if grad_lse is None and not torch.is_grad_enabled() and are_plain(grad_weights) and nothing_intervenes():
            assert grad_weights is not None
            grad = run(_backward, registration.readable(grad_weights, ctx.dim), _NO_GRADIENT, weights, *plan, ctx.dim)
        else:
            grad = registration.gradient(grad_weights, grad_lse, weights, plan, ctx.dim, "cpu")
        return grad, *(None,) * 6


_NO_GRADIENT = torch.empty(0, dtype=torch.float32, device="cpu")
_apply = applied(_MaskedSoftmax)
