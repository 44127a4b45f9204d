"""Operator schemas of span attention, their fake kernels, and the autograd.Function around them.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops.ops.operators import define, define_direct, name_of, names_of
from maskops.ops.scalars import call
from maskops.ops.transforms import Argument, define_vmap, is_absent, is_differentiated, refuse_forward_mode
from maskops.spans import RowSpans, packed_bits

_library = torch.library.Library("maskops", "FRAGMENT")
# The outputs' strides follow those of the inputs, so Inductor must hand the inputs over as they were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# key_tiles is read by the backends that declare it, and may be empty for others. An empty order is that of the rows.
# dense is bool for cpu, bits (RowSpans.dense_bits) for the others.
_PLAN = (
    "Tensor start, Tensor end, Tensor key_valid, Tensor tiles, Tensor tile_count, Tensor key_tiles, Tensor order, "
    "Tensor positions, Tensor dense, "
    "Tensor bias, Tensor alibi_slopes, Tensor sinks, Tensor seed, bool slopes_by_sequence, float softmax_scale, "
    "float softcap, float dropout_p"
)


class Features(NamedTuple):
    """What a call uses beyond q, k, v and the spans, as the operators take it.

    Attributes:
        bias: (B|1, H|1, Sq|1, Sk|1), float32, bfloat16 or float16, any strides, or None.
        alibi_slopes: float32 (n, H) or None.
        sinks: float32 (1, H) or None.
        seed: int64, one element, where there is dropout, else None.
        slopes_by_sequence: whether the n of the slopes are sequences, by ``RowSpans.positions``; else they are 1 or B.
        softmax_scale: factor of the scores; this number and the next two as ``scalars.scalar`` gives them.
        softcap: 0 for none.
        dropout_p: 0 for none.
    """

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    slopes_by_sequence: bool = False
    softmax_scale: float | Tensor = 1.0
    softcap: float | Tensor = 0.0
    dropout_p: float | Tensor = 0.0


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


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_in_order(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, bias, slopes, sinks, _seed, _by_sequence, _scale, _softcap, _dropout_p = arguments[:-3]
    extras = [
        x.new_empty(x.shape) if is_wanted else x.new_empty(0, dtype=torch.float32)
        for x, is_wanted in zip((bias, slopes, sinks), arguments[-3:], strict=True)
    ]
    return (*(empty_in_order(x, x.shape[3]) for x in (q, k, v)), *extras)


define(
    _library, "attention", "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_PLAN}) -> (Tensor, Tensor)",
    _forward_fake, _TAGS,
)  # fmt: skip
# Gradients of q, k, v, bias, alibi_slopes and sinks; one that is not wanted is an empty tensor.
define(
    _library, "attention", "attention_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PLAN}, "
    "bool wants_bias, bool wants_alibi_slopes, bool wants_sinks) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake, _TAGS,
)  # fmt: skip

# The same without what plain calls of the processor have not (direct.py, which alone calls them): no feature, and a
# gradient of out alone. Their q, k, v, out and gradients may be packed, (rows, heads, width), and lse is then (heads,
# rows). ``program`` is that of the spans of a mask, within the sequences of offsets where there are any; offsets of the
# keys that are empty are those of the queries. ``saving`` also gives what a backward pass needs.
_HEADS = "Tensor q, Tensor k, Tensor v"
_GIVEN = f"Tensor grad_out, {_HEADS}, Tensor out, Tensor lse"
_SPANS = "Tensor start, Tensor end, Tensor key_valid, Tensor tiles, Tensor tile_count, float softmax_scale"
_PATTERN = "str program, float softmax_scale"
_PACKED = f"Tensor cu_seqlens_q, Tensor cu_seqlens_k, {_PATTERN}"
_DIRECT = {
    "attention_direct": f"({_HEADS}, {_SPANS}) -> (Tensor, Tensor)",
    "attention_direct_backward": f"({_GIVEN}, {_SPANS}) -> (Tensor, Tensor, Tensor)",
    "attention_pattern": f"({_HEADS}, {_PATTERN}) -> Tensor",
    "attention_pattern_saving": f"({_HEADS}, {_PATTERN}) -> (Tensor, Tensor)",
    "attention_pattern_backward": f"({_GIVEN}, {_PATTERN}) -> (Tensor, Tensor, Tensor)",
    "attention_packed": f"({_HEADS}, {_PACKED}) -> Tensor",
    "attention_packed_saving": f"({_HEADS}, {_PACKED}) -> (Tensor, Tensor, Tensor)",
    "attention_packed_backward": f"({_GIVEN}, Tensor offsets, {_PATTERN}) -> (Tensor, Tensor, Tensor)",
}
for _name, _signature in _DIRECT.items():
    define_direct(_library, f"{_name}{_signature}")


_OF_HEADS = ("q", "k", "v", "out", "lse", "grad_out", "grad_lse")
_OF_ROWS_AND_KEYS = ("start", "end", "key_valid", "tiles", "tile_count", "key_tiles", "order")


def _fold_into_heads(arguments: dict[str, Argument], samples: int) -> dict[str, Any] | None:
    """Under vmap the heads of all samples are heads of one call, as long as they share all that depends on heads."""
    others = [x for name, x in arguments.items() if name not in _OF_HEADS and isinstance(x.value, Tensor)]
    if any(x.has_samples or (x.name not in _OF_ROWS_AND_KEYS and not is_absent(x)) for x in others):
        return None
    folded = {}
    for name in _OF_HEADS:
        if name in arguments:
            x = arguments[name].of_every_sample(samples)
            x = x if x.dim() == 1 else x.movedim(0, 1).flatten(1, 2)
            folded[name] = x if x.dim() == 4 and x.stride(3) == 1 else x.contiguous()
    return folded


def _unfold_heads(x: Tensor, samples: int) -> Tensor:
    if x.dim() == 1:
        return x.expand(samples, 0)  # a gradient that is not wanted
    return x.reshape(x.shape[0], samples, x.shape[1] // samples, *x.shape[2:]).movedim(1, 0)


for _name in (*names_of("attention_forward"), *names_of("attention_backward")):
    define_vmap(_library, _name, _fold_into_heads, _unfold_heads)


_ABSENT = torch.empty(0, device="cpu")


def filled(arguments: Sequence[Any], like: Tensor) -> list[Any]:
    """The arguments of an operator, with an empty tensor in the place of each None."""
    if torch.compiler.is_compiling() or type(like) is not Tensor or like.device.type != "cpu":
        absent = like.new_empty(0)
    else:
        absent = _ABSENT  # a new one costs more than all the rest of this call's arguments
    return [absent if argument is None else argument for argument in arguments]


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it says why it cannot be done."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *arguments, backend = args
        grads: tuple[Tensor, ...] = call(name_of("attention_backward", backend), *arguments)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept; torch.func asks for the method."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "maskops.attention has no double backward in a kernel: its backward pass keeps no scores that could be "
            "differentiated. backend='reference' can be differentiated any number of times"
        )


class _SpanAttention(torch.autograd.Function):
    # Arguments: q, k, v, start, end, key_valid, tiles, tile_count, key_tiles, order, positions, dense, then the fields
    # of Features, then the backend. An absent tensor is None here.

    generate_vmap_rule = True  # from those of the operators

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend = args
        outputs: tuple[Tensor, Tensor] = call(name_of("attention_forward", backend), *filled(arguments, arguments[0]))
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *plan = inputs
        *tensors, by_sequence, softmax_scale, softcap, dropout_p, backend = plan
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)
        ctx.numbers = (by_sequence, softmax_scale, softcap, dropout_p)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[12:15])  # bias, alibi_slopes, sinks
        grads = gradients(ctx.saved_tensors, ctx.numbers, wanted, ctx.backend, grad_out, grad_lse)
        extras = [grad if is_wanted else None for grad, is_wanted in zip(grads[3:], wanted, strict=True)]
        return (*grads[:3], *(None,) * 9, *extras, *(None,) * 6)


def gradients(
    saved: Sequence[Tensor | None],
    numbers: Sequence[Any],
    wanted: Sequence[bool],
    backend: str,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    """Runs the backward operator of a backend on what arrives in a backward pass.

    Args:
        saved: q, k, v, out, lse, and the tensors of ``operator_arguments``.
        numbers: what follows the tensors there.
        wanted: whether gradients of bias, alibi_slopes and sinks are; those that are not are empty.
        backend: name of the backend.
        grad_out: the gradient of out, None for zeros, as ``grad_lse``.
        grad_lse: that of the lse.
    """
    q, _, _, out, *_ = saved
    assert q is not None and out is not None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    arguments = filled((grad_out, grad_lse, *saved, *numbers, *wanted), q)
    # Under create_graph=True somebody may differentiate the gradients, and is told.
    if torch.is_grad_enabled():
        grads = _Backward.apply(*arguments, backend)  # type: ignore[no-untyped-call]
    else:
        grads = call(name_of("attention_backward", backend), *arguments)
    return grads  # type: ignore[no-any-return]


def operator_arguments(spans: RowSpans, features: Features, backend: str) -> tuple[Any, ...]:
    """What the operators take after q, k and v (the backward operator: after out and lse); None for absent tensors.

    Args:
        spans: the plan.
        features: everything else.
        backend: whose operators; ``dense`` is bool for ``cpu``, ``RowSpans.dense_bits`` for the others.
    """
    dense = spans.dense
    if dense is not None and backend != "cpu":
        dense = packed_bits(dense) if spans.dense_bits is None else spans.dense_bits
    needs_positions = features.alibi_slopes is not None or features.seed is not None
    positions = spans.positions if needs_positions else None
    work = (spans.tiles, spans.tile_count, spans.key_tiles, spans.order)
    return (spans.start, spans.end, spans.key_valid, *work, positions, dense, *features)


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: RowSpans, features: Features, backend: str
) -> tuple[Tensor, Tensor]:
    """Runs the registered op of a backend, differentiably.

    Args:
        q: (B, Hq, Sq, D), any strides with a contiguous last dimension, as k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv).
        spans: the plan, with positions where there are ALiBi slopes or dropout.
        features: everything else.
        backend: name of the backend, one that is a kernel.

    Returns:
        out (B, Hq, Sq, Dv) in q's dimension order, lse (B, Hq, Sq) float32.
    """
    extras = (features.bias, features.alibi_slopes, features.sinks)
    differentiable = (q, k, v, *(x for x in extras if x is not None))
    refuse_forward_mode("attention", *differentiable)
    if not is_differentiated(*differentiable):
        # The bare operator: an autograd.Function costs more than a small problem.
        arguments = filled((q, k, v, *operator_arguments(spans, features, backend)), q)
        outputs: tuple[Tensor, Tensor] = call(name_of("attention_forward", backend), *arguments)
        return outputs
    # Dynamo rejects the same tensor given twice to an autograd.Function; a view is another tensor.
    bias = features.bias
    if bias is not None and (bias is q or bias is k or bias is v):
        features = features._replace(bias=bias.view_as(bias))
    if v is q or v is k:
        v = v.view_as(v)
    if k is q:
        k = k.view_as(k)
    plan = operator_arguments(spans, features, backend)
    return _SpanAttention.apply(q, k, v, *plan, backend)  # type: ignore[no-any-return, no-untyped-call]
