"""What ``torch.func`` asks of operators: batching rules for ``vmap``, and a clear word where there is no derivative.

A sample of a batch of calls is a call. Where the samples differ only in the tensors that an operator works through, all
of them are one call, whose heads or rows are those of every sample; where they differ in more (each with a plan, a bias
or a seed of its own), they are computed one after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Argument(NamedTuple):
    """An argument of an operator under ``vmap``."""

    name: str
    value: Any
    """With the dimension of the samples in front, if it has one."""
    has_samples: bool

    def of_every_sample(self, samples: int) -> Any:
        """The value with a dimension of samples in front, in any case; tensors that are absent have none."""
        if is_absent(self):
            return self.value.new_empty(0)
        return self.value if self.has_samples else self.value.expand(samples, *self.value.shape)


def is_absent(argument: Argument) -> bool:
    """Whether the argument is an empty tensor of one dimension (beside that of the samples): how operators say None."""
    value = argument.value
    return isinstance(value, Tensor) and value.dim() == 1 + argument.has_samples and value.shape[-1] == 0


def define_vmap(
    library: torch.library.Library,
    name: str,
    fold: Callable[[dict[str, Argument], int], dict[str, Any] | None],
    unfold: Callable[[Tensor, int], Tensor],
) -> None:
    """Gives the operator ``maskops::<name>`` its batching rule.

    Args:
        library: where the operator is defined.
        name: name of the operator.
        fold: from the arguments and the number of samples, what to change in them for one call that computes all
            samples; None if there is no such call.
        unfold: from a result of that call and the number of samples, the result with the samples in front.
    """
    operator = getattr(torch.ops.maskops, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def one_by_one(arguments: list[Argument], samples: int) -> list[Tensor]:
        if samples == 0:
            raise ValueError(f"maskops::{name} under vmap needs at least one sample, got 0")
        calls = []
        for sample in range(samples):
            outputs = operator(*[x.value[sample] if x.has_samples else x.value for x in arguments])
            calls.append((outputs,) if isinstance(outputs, Tensor) else outputs)
        return [torch.stack(parts) for parts in zip(*calls, strict=True)]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        samples = info.batch_size
        arguments = [
            Argument(argument, x if dim is None else x.movedim(dim, 0), dim is not None)
            for argument, x, dim in zip(names, args, in_dims, strict=True)
        ]
        folded = fold({argument.name: argument for argument in arguments}, samples)
        if folded is None:
            results = one_by_one(arguments, samples)
        else:
            outputs = operator(*[folded.get(argument.name, argument.value) for argument in arguments])
            results = [unfold(x, samples) for x in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
        single = len(operator._schema.returns) == 1
        return (results[0], 0) if single else (tuple(results), (0,) * len(results))

    torch.library.register_vmap(f"maskops::{name}", rule, lib=library)


def refuse_forward_mode(op: str, *inputs: Tensor) -> None:
    """Raises where an input carries a tangent of forward-mode differentiation: an operator would drop it in silence.

    Args:
        op: public name of the op.
        inputs: its differentiable tensors.
    """
    if forward_ad._current_level < 0:
        return
    if any(_has_tangent(x) for x in inputs):
        raise NotImplementedError(
            f"maskops.{op} has no derivative for forward mode AD in a kernel (jvp, jacfwd, hessian): "
            f"maskops.use_backend('reference') has; vjp, grad and jacrev are served by every backend"
        )


def _has_tangent(x: Tensor) -> bool:
    if forward_ad.unpack_dual(x, level=forward_ad._current_level).tangent is not None:
        return True
    # A tensor of one transform inside that of another, such as those of hessian, hides its tangent.
    functorch = torch._C._functorch
    levels = [
        interpreter.level()
        for interpreter in functorch.get_interpreter_stack() or ()
        if interpreter.key() == functorch.TransformType.Jvp
    ]
    while functorch.is_functorch_wrapped_tensor(x):
        x_level, x = functorch.maybe_get_level(x), functorch.get_unwrapped(x)
        if x_level in levels and x_level != functorch.maybe_current_level():
            return True
    return False


def under_transform(*tensors: Tensor) -> bool:
    """Whether one of the tensors is of a transform of ``torch.func``. Not while compiling, where that is unknown."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    # autograd.grad(is_grads_batched=True) has a vmap of its own, older than functorch's.
    return any(functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x) for x in tensors)


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient of one of the tensors may be asked for.

    Under ``vmap`` inside ``torch.func.grad`` a tensor does not tell: its ``requires_grad`` is False, and what it wraps
    is differentiated.
    """
    return torch.is_grad_enabled() and (any(x.requires_grad for x in tensors) or under_transform(*tensors))


def requires_grad(x: Tensor) -> bool:
    """Whether a gradient of the tensor is recorded, also where ``vmap`` inside of another transform hides it."""
    while not x.requires_grad:
        if not under_transform(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True
