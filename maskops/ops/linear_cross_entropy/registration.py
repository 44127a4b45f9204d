"""Operator schema of linear cross-entropy, its fake kernel, and the autograd.Functions around it.

One operator serves both passes: it goes through the rows in chunks, computes their logits, scores them and, where
gradients of the scores come in, what they are for the hidden states, the weight and the bias. The logits of a chunk
are gone when the next one comes, so a backward pass computes them again: one product more than the three that a forward
and a backward pass take at least. A single loss, however, is a sum over the rows with factors that are known before any
logit is: its gradients are computed with it, up to the one factor that the backward pass brings. In float32, with 1024
rows, H 1024 and V 32000, that takes 0.8 of the time of torch's linear and cross_entropy; computing the logits again
takes 1.1 of it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops.ops.cross_entropy.rows import Scoring, total
from maskops.ops.linear_cross_entropy import chunks, device_chunks
from maskops.ops.operators import define, name_of, names_of
from maskops.ops.scalars import call
from maskops.ops.transforms import (
    Argument,
    define_vmap,
    is_absent,
    is_differentiated,
    refuse_forward_mode,
    under_transform,
)

_library = torch.library.Library("maskops", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    argmax: bool,
    values: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, ...]:
    def per_row(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=dtype)

    return (
        *(per_row(values) for _ in range(3)),
        per_row(values and entropy),
        per_row(values and argmax, torch.int64),
        hidden.new_empty(hidden.shape) if hidden_gradient else hidden.new_empty(0),
        torch.empty_like(weight) if weight_gradient else weight.new_empty(0),
        torch.empty_like(bias) if bias_gradient else bias.new_empty(0),
    )


# hidden (N, H), weight (V, H), bias (V,), labels (N,), class_weights (V,) float32, and the gradients that come in for
# the losses, lse, logprobs and entropies, (N,) float32 each. An absent tensor is an empty one. Results: loss, lse,
# logprobs, entropy, argmax, empty without ``values``; and gradients of hidden, weight and bias, empty where they are
# not wanted.
define(
    _library, "linear_cross_entropy", "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, Tensor class_weights, "
    "Tensor grad_loss, Tensor grad_lse, Tensor grad_logprobs, Tensor grad_entropy, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, float logit_scale, bool entropy, bool argmax, bool values, "
    "bool hidden_gradient, bool weight_gradient, bool bias_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake, _TAGS,
)  # fmt: skip
_library.impl("linear_cross_entropy", chunks.linear_cross_entropy, "CPU")
_library.impl(
    name_of("linear_cross_entropy", "cuda"),
    functools.partial(device_chunks.linear_cross_entropy, "cuda"),
    "CompositeExplicitAutograd",
)

# left (M, K) @ right (K, N), of any strides, plus ``row`` (N,) float32 or, with ``add``, what the result (M, N) float32
# holds. `cpu` alone has it.
_library.define("matmul_into(Tensor left, Tensor right, Tensor row, Tensor(a!) result, bool add) -> ()", tags=_TAGS)


@torch.library.register_fake("maskops::matmul_into", lib=_library)  # type: ignore[untyped-decorator]
def _(left: Tensor, right: Tensor, row: Tensor, result: Tensor, add: bool) -> None:
    return None


# A matrix (rows, columns) of the dtype of ``like``, whose contents are anything. A large one takes the memory that
# another left behind (csrc/large_memory.h). `cpu` alone has it.
_library.define("empty_matrix(Tensor like, int rows, int columns) -> Tensor", tags=_TAGS)


@torch.library.register_fake("maskops::empty_matrix", lib=_library)  # type: ignore[untyped-decorator]
def _(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns)


_OF_ROWS = ("hidden", "labels", "grad_loss", "grad_lse", "grad_logprobs", "grad_entropy")


def _fold_into_rows(arguments: dict[str, Argument], samples: int) -> dict[str, Any] | None:
    """Under vmap the rows of all samples are rows of one call, as long as no sum over the rows is wanted."""
    sums = arguments["weight_gradient"].value or arguments["bias_gradient"].value
    if sums or any(arguments[name].has_samples for name in ("weight", "bias", "class_weights")):
        return None
    folded = {name: arguments[name].of_every_sample(samples) for name in _OF_ROWS}
    return {name: x if is_absent(arguments[name]) else x.flatten(0, 1) for name, x in folded.items()}


def _unfold_rows(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, x.shape[0] // samples, *x.shape[1:])


for _name in names_of("linear_cross_entropy"):
    define_vmap(_library, _name, _fold_into_rows, _unfold_rows)


class Inputs(NamedTuple):
    """What the operator reads in either pass; ``bias`` and ``class_weights`` are empty where there are none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    class_weights: Tensor

    def needed_gradients(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias want a gradient."""
        has_bias = self.bias.numel() > 0
        return is_differentiated(self.hidden), is_differentiated(self.weight), has_bias and is_differentiated(self.bias)


_NOT_NEEDED = (False, False, False)
_NO_GRADIENTS = (None, None, None, None)


def _operator(
    inputs: tuple[Tensor, ...],
    incoming: tuple[Tensor | None, ...],
    scoring: tuple[Any, ...],
    values: bool,
    needed: tuple[bool, ...],
    backend: str,
) -> tuple[Tensor, ...]:
    nothing = inputs[0].new_empty(0, dtype=torch.float32)
    grads = [nothing if grad is None else grad for grad in incoming]
    results: tuple[Tensor, ...] = call(
        name_of("linear_cross_entropy", backend), *inputs, *grads, *scoring, values, *needed
    )
    return results


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it says why it cannot be done."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        arguments, backend = args[:-1], args[-1]
        inputs, incoming, scoring, needed = arguments[:5], arguments[5:9], arguments[9:-3], arguments[-3:]
        return _operator(inputs, incoming, scoring, False, needed, backend)[5:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept; torch.func asks for the method."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "maskops.linear_cross_entropy has no double backward in a kernel: its backward pass keeps no probabilities "
            "that could be differentiated. Under maskops.use_backend('reference') it can be differentiated any number "
            "of times"
        )


def _gradients(ctx: Any, inputs: tuple[Tensor, ...], incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What a backward pass returns for all arguments, by another pass through the chunks."""
    if torch.is_grad_enabled():
        # create_graph=True: somebody may differentiate the gradients, and is told.
        grads = _Backward.apply(*inputs, *incoming, *ctx.scoring, *ctx.needed, ctx.backend)  # type: ignore[no-untyped-call]
    else:
        grads = _operator(inputs, incoming, ctx.scoring, False, ctx.needed, ctx.backend)[5:]
    return _for_all_arguments(ctx, grads)


def _for_all_arguments(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needed, strict=True)]
    return *wanted, *[None] * (ctx.count - 3)


class _RowLosses(torch.autograd.Function):
    # Arguments: those of the operator without the gradients and ``values``: hidden, weight, bias, labels,
    # class_weights, seven that say how rows are scored, three that say which gradients are needed, and the backend.

    generate_vmap_rule = True  # from that of the operator

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _operator(arguments[:5], _NO_GRADIENTS, arguments[5:-4], True, _NOT_NEEDED, arguments[-1])[:5]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.scoring, ctx.needed, ctx.backend, ctx.count = inputs[5:-4], inputs[-4:-1], inputs[-1], len(inputs)
        ctx.mark_non_differentiable(output[4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ctx.saved_tensors, grads[:4])


class _Loss(torch.autograd.Function):
    # Arguments: as of _RowLosses, and ``factors`` after the class weights.

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        factors, scoring, needed, backend = arguments[5], arguments[6:-4], arguments[-4:-1], arguments[-1]
        incoming = (factors, None, None, None)
        loss, _, _, _, argmax, *grads = _operator(arguments[:5], incoming, scoring, True, needed, backend)
        return total(loss * factors), argmax, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *others = output
        ctx.scoring, ctx.needed, ctx.backend, ctx.count = inputs[6:-4], inputs[-4:-1], inputs[-1], len(inputs)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        # Gradients as large as the weight are handed out once, not kept for a second backward pass, which would need a
        # copy of its own. Compiled code cannot give away what it saved, and manages its memory itself.
        ctx.compiled = torch.compiler.is_compiling()
        ctx.gradients = None if ctx.compiled else others[1:]
        ctx.save_for_backward(*inputs[:6], *(others[1:] if ctx.compiled else ()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return tuple(None for _ in range(ctx.count))
        *inputs, factors = ctx.saved_tensors[:6]
        if torch.is_grad_enabled() or under_transform(grad):
            return _gradients(ctx, tuple(inputs), (grad * factors, None, None, None))
        if ctx.compiled:
            return _for_all_arguments(ctx, [(made * grad).to(made.dtype) for made in ctx.saved_tensors[6:]])
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            return _gradients(ctx, tuple(inputs), (grad * factors, None, None, None))
        if grad.device.type != "cpu" or grad != 1.0:  # to look at the value would wait for a device
            for made in gradients:
                made.mul_(grad)
        return _for_all_arguments(ctx, gradients)


def _differentiates(inputs: Inputs) -> bool:
    # The bare operator where nothing is differentiated: an autograd.Function costs more than a small problem.
    refuse_forward_mode("linear_cross_entropy", *inputs[:3])
    return torch.is_grad_enabled() and any(inputs.needed_gradients())


def row_losses(
    inputs: Inputs, scoring: Scoring, numbers: tuple[float | Tensor, ...], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the registered op of a backend, differentiably in all results; a backward pass computes the logits again.

    Args:
        inputs: the layer and the labels.
        scoring: how a row is scored.
        numbers: the floats of ``scoring`` in their order, as ``scalars.scalar`` gives them.
        backend: name of the backend, one that is a kernel.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row; the last two are empty where they were not asked for.
    """
    arguments = (scoring.ignore_index, *numbers, scoring.entropy, scoring.argmax)
    if _differentiates(inputs):
        results = _RowLosses.apply(*inputs, *arguments, *inputs.needed_gradients(), backend)  # type: ignore[no-untyped-call]
    else:
        results = _operator(inputs, _NO_GRADIENTS, arguments, True, _NOT_NEEDED, backend)
    loss, lse, logprobs, entropy, argmax = results[:5]
    return loss, lse, logprobs, entropy, argmax


def loss(
    inputs: Inputs, factors: Tensor, scoring: Scoring, numbers: tuple[float | Tensor, ...], backend: str
) -> tuple[Tensor, Tensor]:
    """Runs the registered op of a backend for the sum of factors times losses; computes its gradients along with it.

    Returns:
        The sum, 0-dim, and argmax of every row, empty where it was not asked for.
    """
    # A transform may differentiate with many cotangents, or each sample by itself: the gradients are not one to keep.
    if not _differentiates(inputs) or under_transform(*inputs):
        losses, _, _, _, argmax = row_losses(inputs, scoring, numbers, backend)
        return total(losses * factors), argmax
    arguments = (scoring.ignore_index, *numbers, scoring.entropy, scoring.argmax)
    needed = inputs.needed_gradients()
    results = _Loss.apply(*inputs, factors, *arguments, *needed, backend)  # type: ignore[no-untyped-call]
    return results[0], results[1]
