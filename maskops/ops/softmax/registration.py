"""Operator schemas of the masked softmax, their fake kernels, and the autograd.Function around them.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one
of one dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskops.ops.calls import run
from maskops.ops.operators import define, name_of, names_of
from maskops.ops.transforms import Argument, define_vmap, is_absent, is_differentiated, refuse_forward_mode
from maskops.spans import RowSpans

_library = torch.library.Library("maskops", "FRAGMENT")
# The kernel walks x and mask by their strides, so Inductor must not lay them out anew (it would materialise a mask that
# was expanded).
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _forward_fake(
    x: Tensor, mask: Tensor, start: Tensor, end: Tensor, key_valid: Tensor, dim: int, return_lse: bool
) -> tuple[Tensor, Tensor]:
    sizes = [*x.shape[:dim], *x.shape[dim + 1 :]] if return_lse else [0]
    return x.new_empty(x.shape), x.new_empty(sizes, dtype=torch.float32)


def _backward_fake(
    grad_weights: Tensor, grad_lse: Tensor, weights: Tensor, start: Tensor, end: Tensor, key_valid: Tensor, dim: int
) -> Tensor:
    return weights.new_empty(weights.shape)


define(
    _library, "softmax", "masked_softmax_forward",
    "(Tensor x, Tensor mask, Tensor start, Tensor end, Tensor key_valid, int dim, bool return_lse) -> (Tensor, Tensor)",
    _forward_fake, _TAGS,
)  # fmt: skip
define(
    _library, "softmax", "masked_softmax_backward",
    "(Tensor grad_weights, Tensor grad_lse, Tensor weights, Tensor start, Tensor end, Tensor key_valid, int dim) "
    "-> Tensor",
    _backward_fake, _TAGS,
)  # fmt: skip


def _fold_into_leading(arguments: dict[str, Argument], samples: int) -> dict[str, Any] | None:
    """Under vmap the samples are one more leading dimension, as long as they share a plan that has no batch."""
    plan = [arguments[name] for name in ("start", "end", "key_valid")]
    if any(x.has_samples or not (is_absent(x) or x.value.shape[-2] == 1) for x in plan):
        return None
    names = [name for name in arguments if name in ("x", "mask", "weights") or name.startswith("grad_")]
    folded = {name: arguments[name].of_every_sample(samples) for name in names}
    return {**folded, "dim": arguments["dim"].value + 1}


def _samples_lead(x: Tensor, samples: int) -> Tensor:
    return x.expand(samples, 0) if x.dim() == 1 and x.shape[0] == 0 else x


for _name in (*names_of("masked_softmax_forward"), *names_of("masked_softmax_backward")):
    define_vmap(_library, _name, _fold_into_leading, _samples_lead)


def _operator(name: str, backend: str) -> Any:
    return getattr(torch.ops.maskops, name_of(name, backend)).default


def readable(x: Tensor, dim: int) -> Tensor:
    """``x``, copied where the kernel would step from row to row in memory for every element it reads.

    It walks any strides, but it is fast where the elements of a row, or softmaxes that lie side by side in the results,
    are neighbours. ``dim`` is not negative.
    """
    last = x.dim() - 1
    while last > dim and x.shape[last] == 1:
        last -= 1
    return x if x.shape[last] == 1 or x.stride(last) == 1 else x.contiguous()


def _differentiable_backward(grad_weights: Tensor, grad_lse: Tensor | None, weights: Tensor, dim: int) -> Tensor:
    """What the kernel computes, in operations that autograd can differentiate again; weights are the forward output."""
    w = weights.float()
    present = w != 0.0
    grad = torch.where(present, grad_weights.float(), 0.0)
    offset = (w * grad).sum(dim, keepdim=True)
    if grad_lse is not None:
        offset = offset - grad_lse.unsqueeze(dim)
    return torch.where(present, w * (grad - offset), 0.0).to(weights.dtype)


class _MaskedSoftmax(torch.autograd.Function):
    # Arguments: x, mask, start, end, key_valid, dim, return_lse, backend. The context is set up apart from the forward
    # pass, which torch.func asks for.

    generate_vmap_rule = True  # from those of the operators

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend = args
        outputs: tuple[Tensor, Tensor] = run(_operator("masked_softmax_forward", backend), *arguments)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _x, _mask, start, end, key_valid, dim, _return_lse, backend = inputs
        # No mask: masked places are those of weight 0.
        ctx.save_for_backward(output[0], start, end, key_valid)
        ctx.set_materialize_grads(False)
        ctx.dim = dim
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, *plan = ctx.saved_tensors
        return gradient(grad_weights, grad_lse, weights, plan, ctx.dim, ctx.backend), *(None,) * 7


def gradient(
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    weights: Tensor,
    plan: Sequence[Tensor],
    dim: int,
    backend: str,
) -> Tensor | None:
    """The gradient of x by the operator of a backend, or in a way that can be differentiated again.

    Args:
        grad_weights: the gradient of the weights, None for zeros, as ``grad_lse``.
        grad_lse: that of the lse.
        weights: what the forward operator gave.
        plan: what it was given as start, end and key_valid.
        dim: as there.
        backend: name of the backend.
    """
    if grad_weights is None and grad_lse is None:
        return None
    if grad_weights is None:
        grad_weights = torch.zeros_like(weights)
    if torch.is_grad_enabled():
        # create_graph=True. The weights are an output, so that what is computed from them leads back to x.
        return _differentiable_backward(grad_weights, grad_lse, weights, dim)
    grad_lse = weights.new_empty(0, dtype=torch.float32) if grad_lse is None else grad_lse.contiguous()
    operator = _operator("masked_softmax_backward", backend)
    grad: Tensor = run(operator, readable(grad_weights, dim), grad_lse, weights, *plan, dim)
    return grad


def masked_softmax(
    x: Tensor, mask: Tensor | None, spans: RowSpans | None, dim: int, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Runs the registered op of a backend, differentiably.

    Args:
        x: any strides.
        mask: bool of x's sizes, any strides, True = visible; None where ``spans`` or nothing masks.
        spans: plan for the last two dimensions of x without a dense mask; ``dim`` is the last one then.
        dim: not negative.
        return_lse: whether the lse is wanted; else it is empty.
        backend: name of the backend, one that is a kernel.
    """

    def absent() -> Tensor:
        # A tensor for each argument: a traced autograd.Function does not take the same one twice.
        return x.new_empty(0, dtype=torch.uint8)

    plan = (absent(), absent(), absent()) if spans is None else (spans.start, spans.end, spans.key_valid)
    arguments = (readable(x, dim), absent() if mask is None else mask, *plan, dim, return_lse)
    refuse_forward_mode("masked_softmax", x)
    if not is_differentiated(x):
        # The bare operator: an autograd.Function costs more than a small problem.
        weights, lse = run(_operator("masked_softmax_forward", backend), *arguments)
    else:
        weights, lse = _MaskedSoftmax.apply(*arguments, backend)  # type: ignore[no-untyped-call]
    return weights, lse
