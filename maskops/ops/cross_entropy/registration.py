"""Operator schemas of cross-entropy, their fake kernels, and the autograd.Function around them.

The C++ extension registers implementations for these schemas; it never repeats them. An absent tensor is an empty one.
The forward pass keeps one normaliser and one log-probability per row, no probabilities; the backward pass reads the
logits again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskops.ops.cross_entropy.rows import Scoring
from maskops.ops.scalars import call, define_open

_library = torch.library.Library("maskops", "FRAGMENT")
# The columns of a row are contiguous, so Inductor must hand the logits over as they were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Results: loss, lse, logprobs, entropy, argmax, and columns, which is how many columns are above -inf: label smoothing
# spreads over these. The last three are empty where they are not needed.
_library.define(
    "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
    "float softcap, float logit_scale, bool entropy, bool argmax) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_BACKWARD_ARGUMENTS = (
    "Tensor target, Tensor lse, Tensor logprobs, Tensor entropy, Tensor columns, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, float logit_scale"
)
_GRADIENTS = "Tensor grad_loss, Tensor grad_lse, Tensor grad_logprobs, Tensor grad_entropy"
_library.define(
    f"cross_entropy_backward({_GRADIENTS}, Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor",
    tags=_TAGS,
)
# The same, but the gradient replaces the logits.
_library.define(
    f"cross_entropy_backward_({_GRADIENTS}, Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
    tags=_TAGS,
)


@torch.library.register_fake("maskops::cross_entropy_forward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    logits: Tensor,
    target: Tensor,
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

    smoothing = label_smoothing != 0.0
    return per_row(), per_row(), per_row(), per_row(entropy), per_row(argmax, torch.int64), per_row(smoothing)


@torch.library.register_fake("maskops::cross_entropy_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    columns: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("maskops::cross_entropy_backward_", lib=_library)  # type: ignore[untyped-decorator]
def _(
    grad_loss: Tensor,
    grad_lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    columns: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> None:
    return None


define_open(_library, "cross_entropy_forward", _TAGS)
define_open(_library, "cross_entropy_backward", _TAGS)


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it says why it cannot be done."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        grad: Tensor = call("cross_entropy_backward", *args)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept; torch.func asks for the method."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "maskops.cross_entropy has no double backward in a kernel: its backward pass keeps no probabilities that "
            "could be differentiated. Under maskops.use_backend('reference') it can be differentiated any number of "
            "times"
        )


class _CrossEntropy(torch.autograd.Function):
    # Arguments: logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale, entropy, argmax,
    # inplace_backward. The context is set up apart from the forward pass, which torch.func asks for.

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = call("cross_entropy_forward", *args[:-1])
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, *numbers, _entropy, _argmax, inplace_backward = inputs
        _loss, lse, logprobs, entropy, argmax, columns = output
        ctx.save_for_backward(logits, target, lse, logprobs, entropy, columns)
        ctx.mark_non_differentiable(argmax, columns)
        ctx.set_materialize_grads(False)
        ctx.numbers = tuple(numbers)
        ctx.inplace_backward = inplace_backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        nothing = logits.new_empty(0, dtype=torch.float32)
        incoming = [nothing if grad is None else grad for grad in grads[:4]]
        grad: Tensor
        if torch.is_grad_enabled():
            # create_graph=True: somebody may differentiate the gradient, and is told.
            grad = _Backward.apply(*incoming, logits, *saved, *ctx.numbers)  # type: ignore[no-untyped-call]
            return grad, *[None] * 9
        # Compiled code gets the functional operator: what is saved belongs to the compiler there. Rows that overlap in
        # memory cannot hold a gradient each.
        distinct = logits.stride(0) >= logits.shape[1] or logits.shape[0] <= 1
        if ctx.inplace_backward and distinct and not torch.compiler.is_compiling():
            grad = logits.detach()
            torch.ops.maskops.cross_entropy_backward_(*incoming, grad, *saved, *ctx.numbers)
            # Whoever else saved the logits for a backward pass of its own gets autograd's error, not a wrong gradient.
            torch.autograd.graph.increment_version(grad)
        else:
            grad = call("cross_entropy_backward", *incoming, logits, *saved, *ctx.numbers)
        return grad, *[None] * 9


def row_losses(
    logits: Tensor,
    labels: Tensor,
    scoring: Scoring,
    numbers: tuple[float | Tensor, ...],
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the registered op, differentiably; the kernel is found by the device of the logits.

    Args:
        logits: (N, V), any row stride, contiguous columns.
        labels: (N,) int32 or int64; rows that hold ``scoring.ignore_index`` are skipped and never read.
        numbers: the floats of ``scoring`` in their order, as ``scalars.scalar`` gives them.
        inplace_backward: lets the backward pass write the gradient over the logits.

    Returns:
        loss, lse, logprobs, entropy, argmax: one value per row; the last two are empty where they were not asked for.
    """
    arguments = (logits, labels, scoring.ignore_index, *numbers, scoring.entropy, scoring.argmax)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if not needs_grad and forward_ad._current_level < 0:
        # The bare operator: an autograd.Function costs more than a small problem. Under forward-mode differentiation
        # the function says that it has none, where the operator would drop the tangents without a word.
        results = call("cross_entropy_forward", *arguments)
    else:
        results = _CrossEntropy.apply(*arguments, inplace_backward)  # type: ignore[no-untyped-call]
    loss, lse, logprobs, entropy, argmax, _columns = results
    return loss, lse, logprobs, entropy, argmax
