"""Attention of plain calls without features: from the arguments straight to operators of the processor.

See ``maskops/ops/direct.py``. Three kinds of operators take what decides the plan, each with one for the backward pass:
``attention_direct`` the tensors of a plan, ``attention_pattern`` the text of a mask that nothing but lengths decides,
``attention_packed`` offsets beside it. The last two plan in the operator, and packed tensors are taken as they are:
each tensor, each view and each operator costs a good part of a small problem.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskops import masks
from maskops.layouts import VARLEN
from maskops.masks import Mask
from maskops.ops.attention import registration
from maskops.ops.calls import as_torch_says_it, run
from maskops.ops.direct import REFUSED, applied, are_plain, is_eager, nothing_intervenes, saves_as_usual
from maskops.spans import RowSpans

_direct = torch.ops.maskops.attention_direct.default
_direct_backward = torch.ops.maskops.attention_direct_backward.default
_pattern = torch.ops.maskops.attention_pattern.default
_pattern_saving = torch.ops.maskops.attention_pattern_saving.default
_pattern_backward = torch.ops.maskops.attention_pattern_backward.default
_packed = torch.ops.maskops.attention_packed.default
_packed_saving = torch.ops.maskops.attention_packed_saving.default
_packed_backward = torch.ops.maskops.attention_packed_backward.default

_FULL = masks.full()
_FULL_PROGRAM = _FULL.span_program
_LARGEST = torch.finfo(torch.float32).max
_DEFAULT_SCALE = math.nan
"""What the operators take for 1 / sqrt(head_dim), which costs Python more than them."""

_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")
_is_grad_enabled = torch.is_grad_enabled


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: object,
    bias: object,
    alibi_slopes: object,
    sinks: object,
    softcap: object,
    softmax_scale: Any,
    dropout_p: object,
    backend: object,
    return_lse: object,
) -> Any:
    """``maskops.attention`` where it has no features, else None; also None where the full way raises.

    Args:
        q: (batch, heads, q_len, head_dim), and so on: the arguments of ``maskops.attention``.
        k: (batch, kv_heads, k_len, head_dim).
        v: (batch, kv_heads, k_len, value_dim).
        mask: as in ``maskops.attention``, like the rest.
        bias: None in a direct call.
        alibi_slopes: None.
        sinks: None.
        softcap: 0.0.
        softmax_scale: a float or None.
        dropout_p: 0.0.
        backend: None.
        return_lse: a bool.
    """
    if not (
        bias is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and is_eager()
        and _are_plain_numbers(softcap, softmax_scale, dropout_p, return_lse)
        and are_plain(q, k, v)
    ):
        return None
    try:
        if q.dim() != 4:
            return None
        return _attend(q, k, v, mask, softmax_scale, return_lse)
    except REFUSED:
        return None
    except RuntimeError as error:
        raise as_torch_says_it(error) from None


def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask: Any,
    bias: object,
    alibi_slopes: object,
    sinks: object,
    softcap: object,
    softmax_scale: Any,
    dropout_p: object,
    backend: object,
    return_lse: object,
) -> Any:
    """``maskops.varlen_attention``, as ``attention`` of this module.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, kv_heads, head_dim).
        v: (total_k, kv_heads, value_dim).
        cu_seqlens_q: as in ``maskops.varlen_attention``, like the rest.
        cu_seqlens_k: offsets of the keys or None.
        mask: a mask without layouts and tensors, None, or, without offsets, a plan.
        bias: None in a direct call.
        alibi_slopes: None.
        sinks: None.
        softcap: 0.0.
        softmax_scale: a float or None.
        dropout_p: 0.0.
        backend: None.
        return_lse: a bool.
    """
    if not (
        bias is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and is_eager()
        and _are_plain_numbers(softcap, softmax_scale, dropout_p, return_lse)
        and are_plain(q, k, v)
    ):
        return None
    try:
        if q.dim() != 3:
            return None
        if cu_seqlens_q is None:
            if cu_seqlens_k is not None or type(mask) is not RowSpans:
                return None
            return _attend(q, k, v, mask, softmax_scale, return_lse)
        if mask is None:
            mask = _FULL
        elif type(mask) is not Mask or mask.layouts or mask.operands:
            return None
        if cu_seqlens_k is None:
            cu_seqlens_k = _NOTHING
        elif cu_seqlens_k.numel() == 0:
            return None
        if not are_plain(cu_seqlens_q, cu_seqlens_k):
            return None
        scale = _DEFAULT_SCALE if softmax_scale is None else softmax_scale
        if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            if not saves_as_usual():
                return None
            return _apply_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, scale, return_lse)
        if return_lse:
            return _packed_saving(q, k, v, cu_seqlens_q, cu_seqlens_k, mask.span_program, scale)[:2]
        return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, mask.span_program, scale)
    except REFUSED:
        return None
    except RuntimeError as error:
        raise as_torch_says_it(error) from None


def _are_plain_numbers(softcap: object, softmax_scale: Any, dropout_p: object, return_lse: object) -> bool:
    return (
        type(softcap) is float
        and softcap == 0.0
        and type(dropout_p) is float
        and dropout_p == 0.0
        and type(return_lse) is bool
        and (softmax_scale is None or (type(softmax_scale) is float and -_LARGEST <= softmax_scale <= _LARGEST))
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, softmax_scale: float | None, return_lse: Any) -> Any:
    scale = _DEFAULT_SCALE if softmax_scale is None else softmax_scale
    if mask is None:
        mask = _FULL
    wants_graph = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wants_graph and not saves_as_usual():
        return None
    if type(mask) is Mask:
        if mask.layouts or mask.operands:
            return None
        if wants_graph:
            return _apply_pattern(q, k, v, mask, scale, return_lse)
        if return_lse:
            return _pattern_saving(q, k, v, mask.span_program, scale)
        return _pattern(q, k, v, mask.span_program, scale)
    if type(mask) is not RowSpans or mask.dense is not None or not mask.start.is_cpu:
        return None
    if wants_graph:
        return _apply_direct(q, k, v, mask, scale, return_lse)
    outputs = _direct(q, k, v, *mask[:5], scale)
    return outputs if return_lse else outputs[0]


# Of the functions below none has setup_context, which costs as much as everything else here: no transform meets them.


class _Pattern(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = _pattern_saving(q, k, v, mask.span_program, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.given = (mask, scale)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        mask, scale = ctx.given
        if _is_plain_gradient(grad_out, grad_lse):
            return *run(_pattern_backward, _readable(grad_out), *saved, mask.span_program, scale), None, None, None
        q, k, *_ = saved
        plan = mask.spans(q.shape[2], k.shape[2], device="cpu", grad=False)
        return *_gradients(saved, plan[:5], scale, grad_out, grad_lse), None, None, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        mask: Mask,
        scale: float,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # The offsets that were read, kept in a copy: callers may fill theirs anew before the backward pass.
        out, lse, offsets = _packed_saving(q, k, v, cu_seqlens_q, cu_seqlens_k, mask.span_program, scale)
        ctx.save_for_backward(q, k, v, out, lse, offsets)
        ctx.set_materialize_grads(False)
        ctx.given = (mask, scale)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        *saved, offsets = ctx.saved_tensors
        mask, scale = ctx.given
        if _is_plain_gradient(grad_out, grad_lse):
            grads = run(_packed_backward, _readable(grad_out), *saved, offsets, mask.span_program, scale)
        else:
            q, k, *_ = saved
            rows = masks.packed_rows(offsets[0], offsets[1] if len(offsets) > 1 else None, VARLEN) & mask
            plan = rows.spans(q.shape[0], k.shape[0], grad=False)
            grads = _gradients(saved, plan[:5], scale, grad_out, grad_lse)
        return *grads, None, None, None, None, None


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RowSpans, scale: float, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        spans = plan[:5]
        out, lse = _direct(q, k, v, *spans, scale)
        ctx.save_for_backward(q, k, v, out, lse, *spans)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if _is_plain_gradient(grad_out, grad_lse):
            return *run(_direct_backward, _readable(grad_out), *saved, ctx.scale), None, None, None
        return *_gradients(saved[:5], saved[5:], ctx.scale, grad_out, grad_lse), None, None, None


def _is_plain_gradient(grad_out: Tensor | None, grad_lse: Tensor | None) -> bool:
    return grad_lse is None and not _is_grad_enabled() and are_plain(grad_out) and nothing_intervenes()


def _readable(grad_out: Tensor | None) -> Tensor:
    assert grad_out is not None
    return grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()


def _gradients(
    saved: Sequence[Tensor], spans: Sequence[Tensor], scale: float, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v as the full way computes them.

    Args:
        saved: q, k, v, out and lse, all packed or none.
        spans: the first five tensors of the plan.
        scale: what the operators were given.
        grad_out: the gradient of out, None for zeros, as ``grad_lse``.
        grad_lse: that of the lse.
    """
    q, k, v, out, lse = saved
    if math.isnan(scale):
        scale = 1.0 / math.sqrt(q.shape[-1])
    is_packed = q.dim() == 3
    if is_packed:
        q, k, v, out = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, out))
        lse = lse.unsqueeze(0)
        grad_out = None if grad_out is None else grad_out.transpose(0, 1).unsqueeze(0)
        grad_lse = None if grad_lse is None else grad_lse.unsqueeze(0)
    features = registration.Features(softmax_scale=scale)
    whole = (q, k, v, out, lse, *spans, None, None, None, None, *features[:4])
    grads = registration.gradients(whole, features[4:], (False, False, False), "cpu", grad_out, grad_lse)[:3]
    return tuple(x.squeeze(0).transpose(0, 1) for x in grads) if is_packed else grads


_apply_pattern, _apply_packed, _apply_direct = applied(_Pattern), applied(_Packed), applied(_Direct)
