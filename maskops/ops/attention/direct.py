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
from maskops.ops.direct import REFUSED, applied, are_plain, is_eager, nothing_intervenes
from maskops.ops.plan.registration import MAX_LENGTH, build_plan, fits_a_kernel
from maskops.spans import RowSpans

_forward = torch.ops.maskops.attention_direct.default
_backward = torch.ops.maskops.attention_direct_backward.default

_FULL = full()
_INTEGERS = (torch.int32, torch.int64)
_LARGEST = torch.finfo(torch.float32).max


def attention(q: Any, k: Any, v: Any, mask: object, *rest: Any) -> Any:
    """``maskops.attention`` where it has no features, else None; also None where the full way raises.

    Args:
        q: (batch, heads, q_len, head_dim).
        k: (batch, kv_heads, k_len, head_dim).
        v: (batch, kv_heads, k_len, value_dim).
        mask: as in ``maskops.attention``.
        *rest: bias, alibi_slopes, sinks, softcap, softmax_scale, dropout_p, backend, return_lse.
    """
    if not _is_plain(q, k, v, rest):
        return None
    try:
        if q.dim() != 4 or k.dim() != 4 or q.shape[3] == 0:
            return None
        plan = _plan(mask, q.shape[2], k.shape[2])
        return None if plan is None else _attend(q, k, v, plan, rest[4], rest[7])
    except REFUSED:
        return None


def varlen_attention(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, mask: object, *rest: Any) -> Any:
    """``maskops.varlen_attention``, as ``attention`` of this module."""
    if not _is_plain(q, k, v, rest):
        return None
    try:
        if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[2] == 0:
            return None
        if cu_seqlens_q is not None:
            plan = _packed_plan(cu_seqlens_q, cu_seqlens_k, mask, q.shape[0], k.shape[0])
        elif cu_seqlens_k is None and type(mask) is RowSpans:
            plan = _plan(mask, q.shape[0], k.shape[0])
        else:
            return None
        if plan is None:
            return None
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        outputs = _attend(q, k, v, plan, rest[4], rest[7])
    except REFUSED:
        return None
    if rest[7]:
        return outputs[0].squeeze(0).transpose(0, 1), outputs[1].squeeze(0)
    return outputs.squeeze(0).transpose(0, 1)


def _is_plain(q: Any, k: Any, v: Any, rest: tuple[Any, ...]) -> bool:
    bias, alibi_slopes, sinks, softcap, softmax_scale, dropout_p, backend, return_lse = rest
    return (
        bias is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and is_eager()
        and type(softcap) is float
        and softcap == 0.0
        and type(dropout_p) is float
        and dropout_p == 0.0
        and type(return_lse) is bool
        and (softmax_scale is None or (type(softmax_scale) is float and -_LARGEST <= softmax_scale <= _LARGEST))
        and are_plain(q, k, v)
    )


def _plan(mask: object, q_len: int, k_len: int) -> RowSpans | None:
    if type(mask) is RowSpans:
        return mask if mask.dense is None and mask.start.is_cpu else None
    if mask is None:
        mask = _FULL
    return mask.kept_spans(q_len, k_len) if type(mask) is Mask else None


def _packed_plan(queries: Any, keys: Any, mask: object, q_len: int, k_len: int) -> RowSpans | None:
    """The plan of one packed row; the operator checks shapes and values."""
    if mask is None:
        mask = _FULL
    elif type(mask) is not Mask or mask.layouts or mask.operands:
        return None
    operands = [queries] if keys is None or keys is queries else [queries, keys]
    if not are_plain(*operands) or any(x.dtype not in _INTEGERS for x in operands):
        return None
    if q_len >= MAX_LENGTH or k_len >= MAX_LENGTH:
        return None
    program = f"varlen 0 {len(operands) - 1} {int(keys is not None)} {mask.span_program}"
    if not fits_a_kernel(program):
        return None
    wanted = {"grad": False, "order": False, "positions": False}
    return build_plan("cpu", program, operands, 1, q_len, k_len, queries.device, **wanted)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: RowSpans, scale: float | None, return_lse: bool) -> Any:
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply(q, k, v, plan, scale, return_lse)
    outputs = _forward(q, k, v, *plan[:5], scale)
    return outputs if return_lse else outputs[0]


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


_apply = applied(_Attention)
