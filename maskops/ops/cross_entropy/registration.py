"""Operator schemas of cross-entropy, their fake kernels, and the autograd.Function around them.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one.
The forward pass keeps one normaliser and one log-probability per row, no probabilities; the backward pass reads the
logits again.
"""

import math
from typing import Any

import torch
from torch import Tensor

from maskops.ops import calls
from maskops.ops.cross_entropy.gradient_memory import GradientMemory
from maskops.ops.cross_entropy.rows import Scoring, total
from maskops.ops.operators import define, define_direct, name_of, names_of
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
# The columns of a row are contiguous, so Inductor must hand the logits over as they were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Values of a row that the backward pass needs beside the outputs; csrc/cross_entropy.h names them.
_STATISTICS = 6

_NUMBERS = "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale"
# class_weights: (V,) float32, or empty. probabilities: those of every row, (N, V), or a tensor of another number of
# dimensions where rows are scored against their label alone; under shift, row r is scored against row r + 1 of them.
_TARGETS = "Tensor target, Tensor class_weights, Tensor probabilities"
_SAVED = "Tensor lse, Tensor logprobs, Tensor entropy, Tensor statistics"
_GRADIENTS = "Tensor grad_loss, Tensor grad_lse, Tensor grad_logprobs, Tensor grad_entropy"


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    shift: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]

    def per_row(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(rows if wanted else 0, dtype=dtype)

    has_statistics = probabilities.dim() == 2 or label_smoothing != 0.0
    statistics = logits.new_empty((rows if has_statistics else 0, _STATISTICS), dtype=torch.float64)
    return per_row(), per_row(), per_row(), per_row(entropy), per_row(argmax, torch.int64), statistics


def _backward_fake(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    shift: bool,
    probabilities_grad: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    wanted = probabilities_grad and probabilities.dim() == 2
    return logits.new_empty(logits.shape), probabilities.new_empty((logits.shape[0] if wanted else 0, logits.shape[1]))


def _backward_in_place_fake(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    shift: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> None:
    return None


def _both_in_place_fake(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    argmax: bool,
) -> tuple[Tensor, ...]:
    nothing = logits.new_empty(0)
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return _forward_fake(logits, target, class_weights, nothing, False, *numbers, entropy, argmax)[:5]


# Results: loss, lse, logprobs, entropy, argmax, and statistics for the backward pass, (N, 6) float64. The last three
# have no rows where they are not needed.
define(
    _library, "cross_entropy", "cross_entropy_forward",
    f"(Tensor logits, {_TARGETS}, bool shift, {_NUMBERS}, bool entropy, bool argmax) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake, _TAGS,
)  # fmt: skip
# Results: the gradients of the logits and, unless it is not wanted and without rows, of the probabilities.
define(
    _library, "cross_entropy", "cross_entropy_backward",
    f"({_GRADIENTS}, Tensor logits, {_TARGETS}, {_SAVED}, bool shift, bool probabilities_grad, {_NUMBERS}) "
    "-> (Tensor, Tensor)",
    _backward_fake, _TAGS,
)  # fmt: skip
# The same, but the gradient replaces the logits, and the probabilities get none.
define(
    _library, "cross_entropy", "cross_entropy_backward_",
    f"({_GRADIENTS}, Tensor(a!) logits, {_TARGETS}, {_SAVED}, bool shift, {_NUMBERS}) -> ()",
    _backward_in_place_fake, _TAGS,
)  # fmt: skip

# Both passes of rows that are scored against their labels, where incoming gradients are known before the losses: the
# gradient replaces the logits. `cuda` alone has it, whose rows stay on chip in between. Results: loss, lse, logprobs,
# entropy, argmax.
_library.define(
    f"cross_entropy_both__cuda({_GRADIENTS}, Tensor(a!) logits, Tensor target, Tensor class_weights, {_NUMBERS}, "
    "bool entropy, bool argmax) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.register_fake("maskops::cross_entropy_both__cuda", _both_in_place_fake, lib=_library)


def _backward_into_fake(*args: Any) -> None:
    return None


def _both_into_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_entropy, entropy, argmax = args[3], *args[-2:]
    arguments = [*args[4:8], *args[9:-2], entropy or grad_entropy.numel() != 0, argmax]
    return _forward_fake(*arguments)[:5]


# `cpu` alone has these two: where the gradient goes to is memory of the caller's, or the logits themselves; the
# probabilities get none. Eager code calls them: what compiled code writes to is its own to choose.
for _name, _signature, _into_fake in (
    (
        "cross_entropy_backward_into",
        f"{_SAVED}, Tensor(a!) grad_logits, bool shift, {_NUMBERS}) -> ()",
        _backward_into_fake,
    ),
    (
        # Both passes, as above.
        "cross_entropy_both_into",
        f"Tensor(a!) grad_logits, bool shift, {_NUMBERS}, bool entropy, bool argmax) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _both_into_fake,
    ),
):
    _library.define(f"{_name}({_GRADIENTS}, Tensor logits, {_TARGETS}, {_signature}", tags=_TAGS)
    torch.library.register_fake(f"maskops::{_name}", _into_fake, lib=_library)

# A few plain rows of labels on the processor, reduced to their sum or mean; direct.py alone calls them. Results: the
# loss, lse and logprobs; the loss alone; the gradient of the logits.
for _schema in (
    "cross_entropy_direct(Tensor logits, Tensor target, int ignore_index, bool mean) -> (Tensor, Tensor, Tensor)",
    "cross_entropy_loss(Tensor logits, Tensor target, int ignore_index, bool mean) -> Tensor",
    "cross_entropy_direct_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, Tensor logprobs, "
    "int ignore_index, bool mean) -> Tensor",
):
    define_direct(_library, _schema)


_OF_ROWS = ("logits", "target", "lse", "logprobs", "entropy", "columns")


def _fold_into_rows(arguments: dict[str, Argument], samples: int) -> dict[str, Any] | None:
    """Under vmap the rows of all samples are rows of one call, as long as each has logits of its own."""
    if not is_absent(arguments["probabilities"]):
        return None
    folded = {}
    for name, argument in arguments.items():
        if isinstance(argument.value, Tensor) and (name in _OF_ROWS or name.startswith("grad_")):
            if name == "logits" and not argument.has_samples:
                return None  # one after the other: logits are not to be repeated in memory
            x = argument.of_every_sample(samples)
            folded[name] = x if is_absent(argument) else x.flatten(0, 1)
        elif argument.has_samples:
            return None
    logits = folded["logits"]
    folded["logits"] = logits if logits.stride(1) == 1 else logits.contiguous()
    return folded


def _unfold_rows(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, x.shape[0] // samples, *x.shape[1:])


for _name in (*names_of("cross_entropy_forward"), *names_of("cross_entropy_backward")):
    define_vmap(_library, _name, _fold_into_rows, _unfold_rows)


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it says why it cannot be done."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend = args
        grads: tuple[Tensor, Tensor] = call(name_of("cross_entropy_backward", backend), *arguments)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Nothing is kept; torch.func asks for the method."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "maskops.cross_entropy has no double backward in a kernel: its backward pass keeps no probabilities that "
            "could be differentiated. Under maskops.use_backend('reference') it can be differentiated any number of "
            "times"
        )


class _CrossEntropy(torch.autograd.Function):
    # Arguments: logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing, z_loss, softcap,
    # logit_scale, entropy, argmax, over_logits, buffer, backend. The context is set up apart from the forward pass,
    # which torch.func asks for.

    generate_vmap_rule = True  # from those of the operators

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *arguments, _over_logits, _buffer, backend = args
        outputs: tuple[Tensor, ...] = call(name_of("cross_entropy_forward", backend), *arguments)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, class_weights, probabilities, shift, *numbers = inputs[:-5]
        *memory, backend = inputs[-3:]
        _loss, lse, logprobs, entropy, argmax, statistics = output
        ctx.save_for_backward(logits, target, class_weights, probabilities, lse, logprobs, entropy, statistics)
        ctx.mark_non_differentiable(argmax, statistics)
        ctx.set_materialize_grads(False)
        ctx.shift = shift
        ctx.numbers = tuple(numbers)
        ctx.memory = GradientMemory(*memory)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        nothing = logits.new_empty(0, dtype=torch.float32)
        incoming = [nothing if grad is None else grad for grad in grads[:4]]
        probabilities_grad = ctx.needs_input_grad[3]
        arguments = (*incoming, logits, *saved, ctx.shift, probabilities_grad, *ctx.numbers)
        # Compiled code gets the functional operator: what is saved belongs to the compiler there. The gradient of the
        # probabilities needs the logits.
        memory = None if probabilities_grad or under_transform(*incoming) else ctx.memory.of(logits)
        if torch.is_grad_enabled():
            # create_graph=True: somebody may differentiate the gradient, and is told.
            grad, grad_probabilities = _Backward.apply(*arguments, ctx.backend)  # type: ignore[no-untyped-call]
        elif memory is None or torch.compiler.is_compiling():
            grad, grad_probabilities = call(name_of("cross_entropy_backward", ctx.backend), *arguments)
        else:
            grad, grad_probabilities = memory, None
            if memory.data_ptr() == logits.data_ptr():
                call(name_of("cross_entropy_backward_", ctx.backend), *incoming, grad, *saved, ctx.shift, *ctx.numbers)
            else:
                into = torch.ops.maskops.cross_entropy_backward_into
                calls.run(into, *incoming, logits, *saved, grad, ctx.shift, *ctx.numbers)
            # Whoever else saved the logits for a backward pass of its own gets autograd's error, not a wrong gradient.
            torch.autograd.graph.increment_version(grad)
        return grad, None, None, grad_probabilities if probabilities_grad else None, *[None] * 11


class _Finished(torch.autograd.Function):
    """A gradient that was computed before, so that differentiating it says why it cannot be done."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, gradient: Tensor, _differentiated: Tensor) -> Tensor:
        return gradient * grad

    backward = staticmethod(_Backward.backward)


class _LossInto(torch.autograd.Function):
    """The sum of factors times losses, whose gradient is written while the logits are read: one pass for both.

    Arguments: logits, memory of the gradient, factors, the arguments of the forward operator after the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, memory: Tensor, factors: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *targets, entropy, argmax = arguments
        nothing = factors.new_empty(0)
        target, class_weights, probabilities, *others = targets
        loss, _, _, _, best = calls.run(
            torch.ops.maskops.cross_entropy_both_into, factors, nothing, nothing, nothing, logits, target,
            class_weights, probabilities, memory, *others, entropy, argmax,
        )  # fmt: skip
        # Whoever saved what was in this memory gets autograd's error. So do we, if it is written to before the backward
        # pass.
        torch.autograd.graph.increment_version(memory)
        ctx.save_for_backward(memory)
        ctx.mark_non_differentiable(best)
        ctx.set_materialize_grads(False)
        ctx.count = len(arguments)
        return total(loss * factors), best

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        others = [None] * (2 + ctx.count)
        if grad is None:
            return None, *others
        gradient = ctx.saved_tensors[0].detach()
        if torch.is_grad_enabled():
            # The logits, which it is a function of, are gone; another tensor that is differentiated stands for them.
            differentiated = gradient.new_empty(0, requires_grad=True)
            return _Finished.apply(grad, gradient, differentiated), *others  # type: ignore[no-untyped-call]
        if under_transform(grad):
            return gradient * grad, *others  # one for each sample: the memory holds but one
        factor = float(grad)
        if not math.isfinite(factor):
            torch.where(gradient == 0.0, gradient, gradient * grad, out=gradient)  # rows to skip stay exactly 0
        elif factor != 1.0:
            gradient.mul_(grad)
        # It is handed out once.
        torch.autograd.graph.increment_version(gradient)
        return gradient, *others


def needs_logits_gradient_alone(logits: Tensor, *targets: Tensor) -> bool:
    """Whether a backward pass will want a gradient of the logits and of no target, outside of every transform."""
    if not torch.is_grad_enabled() or under_transform(logits, *targets):
        return False
    return is_differentiated(logits) and not is_differentiated(*targets)


def loss_into(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor,
    scoring: Scoring,
    numbers: tuple[float | Tensor, ...],
    memory: Tensor,
    *,
    class_weights: Tensor | None = None,
    probabilities: Tensor | None = None,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of factors times losses on the backend ``cpu``, its gradient written to ``memory`` at once.

    Args:
        factors: (N,) float32.
        memory: (N, V), the dtype of the logits, contiguous columns; or the logits themselves.
        logits: as the others, what it is for ``row_losses``.
        labels: see there.
        scoring: see there; entropy is not among the results.
        numbers: see there.
        class_weights: see there.
        probabilities: see there; they get no gradient.
        shift: see there.

    Returns:
        The sum, 0-dim, and argmax of every row, empty where it was not asked for.
    """
    weights = factors.new_empty(0) if class_weights is None else class_weights
    targets = logits.new_empty(0) if probabilities is None else probabilities
    arguments = (labels, weights, targets, shift, scoring.ignore_index, *numbers, False, scoring.argmax)
    loss, argmax = _LossInto.apply(logits, memory, factors, *arguments)  # type: ignore[no-untyped-call]
    return loss, argmax


def gradient(
    logits: Tensor, target: Tensor, lse: Tensor, logprobs: Tensor, grad_loss: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of the logits for that of each row's loss, by the backend ``cpu``, of rows with labels alone.

    Args:
        logits: (N, V).
        target: (N,) labels.
        lse: (N,), what the forward pass gave.
        logprobs: (N,), likewise.
        grad_loss: (N,).
        ignore_index: the label of rows to skip.
    """
    nothing = logits.new_empty(0, dtype=torch.float32)
    saved = (nothing, nothing, lse, logprobs, nothing, logits.new_empty((0, _STATISTICS), dtype=torch.float64))
    numbers = (False, False, ignore_index, 0.0, 0.0, 0.0, 1.0)
    arguments = (grad_loss, nothing, nothing, nothing, logits, target, *saved, *numbers)
    if torch.is_grad_enabled():
        return _Backward.apply(*arguments, "cpu")[0]  # type: ignore[no-any-return, no-untyped-call]
    grad: Tensor = call("cross_entropy_backward", *arguments)[0]
    return grad


def row_losses(
    logits: Tensor,
    labels: Tensor,
    scoring: Scoring,
    numbers: tuple[float | Tensor, ...],
    memory: GradientMemory,
    backend: str,
    *,
    class_weights: Tensor | None = None,
    probabilities: Tensor | None = None,
    shift: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the registered op of a backend, differentiably.

    Args:
        logits: (N, V), any row stride, contiguous columns.
        labels: (N,) int32 or int64; rows that hold ``scoring.ignore_index`` are skipped and never read.
        numbers: the floats of ``scoring`` in their order, as ``scalars.scalar`` gives them.
        memory: where the backward pass may write the gradient.
        backend: name of the backend, one that is a kernel.
        class_weights: (V,) float32, contiguous.
        probabilities: (N, V), any row stride, contiguous columns: what rows are scored against instead of their labels,
            which then only say whether they are skipped.
        shift: row r is scored against row r + 1 of the probabilities.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row; the last two are empty where they were not asked for.
    """
    weights = logits.new_empty(0, dtype=torch.float32) if class_weights is None else class_weights
    targets = logits.new_empty(0) if probabilities is None else probabilities
    arguments = (
        logits, labels, weights, targets, shift, scoring.ignore_index, *numbers, scoring.entropy, scoring.argmax,
    )  # fmt: skip
    refuse_forward_mode("cross_entropy", logits, targets)
    if not is_differentiated(logits, targets):
        # The bare operator: an autograd.Function costs more than a small problem.
        results = call(name_of("cross_entropy_forward", backend), *arguments)
    else:
        results = _CrossEntropy.apply(*arguments, *memory, backend)  # type: ignore[no-untyped-call]
    loss, lse, logprobs, entropy, argmax, _statistics = results
    return loss, lse, logprobs, entropy, argmax
