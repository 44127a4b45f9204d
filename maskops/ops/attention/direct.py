"""Attention of plain calls without features: from the arguments straight to operators of the processor.

See ``maskops/ops/direct.py``. The operators are ``attention_forward`` and ``attention_backward`` without the arguments
that are absent here: each of them costs, and two dozen cost more than a small problem.
"""

import math
from typing import Any

import torch
from torch import Tensor

from maskops.masks import Mask, full
from maskops.ops.attention import registration
from maskops.ops.direct import REFUSED, are_plain, is_eager, nothing_intervenes
from maskops.spans import RowSpans

_forward = torch.ops.maskops.attention_direct.default
_backward = torch.ops.maskops.attention_direct_backward.default

_FULL = full()
_LARGEST = torch.finfo(torch.float32).max


def attention(
    q: object,
    k: object,
    v: object,
    mask: object,
    bias: object,
    alibi_slopes: object,
    sinks: object,
    softcap: object,
    softmax_scale: object,
    dropout_p: object,
    backend: object,
    return_lse: bool,
) -> Any:
    """``maskops.attention`` where it has no features, else None; also None where the full way raises."""
    if not (
        bias is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and is_eager()
        and type(softcap) is float
        and softcap == 0.0
        and type(dropout_p) is float
        and dropout_p == 0.0
        and are_plain(q, k, v)
    ):
        return None
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    shape = q.shape
    if len(shape) != 4 or shape[3] == 0:
        return None
    if softmax_scale is None:
        scale = 1.0 / math.sqrt(shape[3])
    elif type(softmax_scale) is float and -_LARGEST <= softmax_scale <= _LARGEST:
        scale = softmax_scale
    else:
        return None
    try:
        if type(mask) is RowSpans:
            plan = mask
            if plan.dense is not None or not plan.start.is_cpu:
                return None
        else:
            if mask is None:
                mask = _FULL
            elif type(mask) is not Mask:
                return None
            kept = mask.kept_spans(shape[2], k.shape[2])
            if kept is None:
                return None
            plan = kept
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(q, k, v, plan, scale, return_lse)  # type: ignore[no-untyped-call]
        outputs = _forward(q, k, v, plan.start, plan.end, plan.key_valid, plan.tiles, plan.tile_count, scale)
        return outputs if return_lse else outputs[0]
    except REFUSED:
        return None


class _Attention(torch.autograd.Function):
    # Without setup_context, which costs as much as everything else here: no transform meets it. Arguments: q, k, v, the
    # plan, the scale, whether the lse is a result.

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RowSpans, scale: float, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        spans = plan[:5]
        out, lse = _forward(q, k, v, *spans, scale)
        ctx.save_for_backward(q, k, v, out, lse, *spans)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *spans = ctx.saved_tensors
        if grad_lse is None and not torch.is_grad_enabled() and are_plain(grad_out) and nothing_intervenes():
            assert grad_out is not None
            if grad_out.stride(3) != 1:
                grad_out = grad_out.contiguous()
            return *_backward(grad_out, q, k, v, out, lse, *spans, ctx.scale), None, None, None
        plan = (*spans, None, None, None, None)
        features = registration.Features(softmax_scale=ctx.scale)
        saved = (q, k, v, out, lse, *plan, *features[:4])
        grads = registration.gradients(saved, features[4:], (False, False, False), "cpu", grad_out, grad_lse)
        return *grads[:3], None, None, None
