"""Operator schemas of span attention, their fake kernels, and the autograd.Function around them.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskops.ops.scalars import call, define_open
from maskops.spans import RowSpans

_library = torch.library.Library("maskops", "FRAGMENT")
# The outputs' strides follow those of the inputs, so Inductor must hand the inputs over as they were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, Tensor key_valid, Tensor tiles, "
    "Tensor tile_count, float softmax_scale, float softcap) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor start, Tensor end, Tensor key_valid, Tensor tiles, Tensor tile_count, float softmax_scale, float softcap) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def dimension_order(x: Tensor) -> tuple[int, int, int]:
    """The first three dimensions of a 4-D tensor, outermost first.

    Ordered by stride, descending. A stride of 0 (an expanded dimension) counts as the largest, and equal strides keep
    the order of the indices.
    """
    strides = x.stride()
    # Insertion sort: strides may be symbolic, where only comparisons are allowed.
    order: list[int] = []
    for dimension in range(3):
        place = len(order)
        while place > 0 and _is_outside(strides[dimension], strides[order[place - 1]]):
            place -= 1
        order.insert(place, dimension)
    return (order[0], order[1], order[2])


def _is_outside(stride: int, other: int) -> bool:
    if other == 0:
        return False
    return bool(stride == 0 or stride > other)


def empty_in_order(x: Tensor, last: int) -> Tensor:
    """A dense tensor of x's sizes and dtype, but ``last`` in the last dimension, in x's dimension order."""
    order = dimension_order(x)
    sizes = [*x.shape[:3], last]
    stride = last
    strides = [0, 0, 0, 1]
    for dimension in reversed(order):
        strides[dimension] = stride
        # As for a fresh tensor, a dimension of size 0 does not make the strides outside of it 0.
        stride = stride * max(sizes[dimension], 1)
    return x.new_empty_strided(sizes, strides)


def in_order_of(out: Tensor, x: Tensor) -> Tensor:
    """Returns ``out`` with its dimensions laid out in the order of x's: the strides that a kernel's output has."""
    order = (*dimension_order(x), 3)
    return out.permute(order).contiguous().permute([order.index(dimension) for dimension in range(4)])


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return empty_in_order(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_in_order(q, q.shape[3]),
        empty_in_order(k, k.shape[3]),
        empty_in_order(v, v.shape[3]),
    )


torch.library.register_fake("maskops::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("maskops::attention_backward", _backward_fake, lib=_library)
define_open(_library, "attention_forward", _TAGS)
define_open(_library, "attention_backward", _TAGS)


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it says why it cannot be done."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = call("attention_backward", *args)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Nothing is kept; torch.func asks for the method."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "maskops.attention has no double backward in a kernel: its backward pass keeps no scores that could be "
            "differentiated. backend='reference' can be differentiated any number of times"
        )


class _SpanAttention(torch.autograd.Function):
    # Arguments: q, k, v, start, end, key_valid, tiles, tile_count, softmax_scale, softcap.

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = call("attention_forward", *args)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *plan, softmax_scale, softcap = inputs
        ctx.save_for_backward(q, k, v, *output, *plan)
        ctx.set_materialize_grads(False)
        ctx.softmax_scale = softmax_scale
        ctx.softcap = softcap

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *plan = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        grad_lse = lse.new_empty(0) if grad_lse is None else grad_lse.contiguous()
        arguments = (grad_out, grad_lse, q, k, v, out, lse, *plan, ctx.softmax_scale, ctx.softcap)
        if torch.is_grad_enabled():
            # create_graph=True: somebody may differentiate the gradients, and is told.
            dq, dk, dv = _Backward.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            dq, dk, dv = call("attention_backward", *arguments)
        return dq, dk, dv, None, None, None, None, None, None, None


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: RowSpans, softmax_scale: float | Tensor, softcap: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the registered op, differentiably; the kernel is found by the device of the tensors.

    Args:
        q: (B, Hq, Sq, D), any strides with a contiguous last dimension, as k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv).
        spans: plan without dense mask.
        softmax_scale: factor of the scores; this number and the next as ``scalars.scalar`` gives them.
        softcap: 0 for none.

    Returns:
        out (B, Hq, Sq, Dv) in q's dimension order, lse (B, Hq, Sq) float32.
    """
    plan = (spans.start, spans.end, spans.key_valid, spans.tiles, spans.tile_count)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not needs_grad and forward_ad._current_level < 0:
        # The bare operator: an autograd.Function costs more than a small problem. Under forward-mode differentiation
        # the function says that it has none, where the operator would drop the tangents without a word.
        outputs: tuple[Tensor, Tensor] = call("attention_forward", q, k, v, *plan, softmax_scale, softcap)
        return outputs
    # Dynamo rejects the same tensor given twice to an autograd.Function; a view is another tensor.
    if v is q or v is k:
        v = v.view_as(v)
    if k is q:
        k = k.view_as(k)
    return _SpanAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
        q, k, v, *plan, softmax_scale, softcap
    )
