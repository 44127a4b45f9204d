"""Calls that go straight from a public function to the operator of the processor.

A small problem is computed in less time than it takes to find out how: to check each argument, to plan a mask, to ask
every backend. Of most calls all of that is known beforehand: eager, on plain tensors of the processor, without a
transform, a mode, autocast or a feature. An op's ``direct.py`` recognises such calls by conditions that cost little,
and calls the operator. What it does not recognise, or what the operator refuses, goes the full way, which alone knows
what is wrong and says so: a direct call gives what the full way gives, and complains of no argument. Where a kernel
fails or memory runs out it raises, once: nothing is tried again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskops.backend import processor_is_free

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_length_of_function_modes = torch._C._len_torch_function_stack
_length_of_modes = torch._C._len_torch_dispatch_stack
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_tracing_state = torch._C._get_tracing_state
_transforms_are_active = torch._C._are_functorch_transforms_active

_PLAIN = frozenset((Tensor, torch.nn.Parameter))

REFUSED = (ValueError, IndexError, TypeError, AttributeError, NotImplementedError)
"""What operators raise for arguments that they do not take, torch for those that they do not know, and tensors for
dimensions that they have not. Whatever else goes wrong has gone wrong, and nothing is tried again."""


def nothing_intervenes() -> bool:
    """Whether this thread traces nothing and transforms nothing, so that an operator that is called is run."""
    return not (
        _is_compiling()
        or _length_of_modes()
        or _length_of_function_modes()
        or _transforms_are_active()
        or _tracing_state() is not None
    )


def is_eager() -> bool:
    """Whether a call on plain tensors of the processor is one of the backend ``cpu``, with their own dtypes."""
    return nothing_intervenes() and forward_ad._current_level < 0 and not _is_autocast_enabled() and processor_is_free()


def saves_as_usual() -> bool:
    """Whether nobody packs what is saved for a backward pass.

    Who does (checkpointing, offloading) may count it, and each way saves other tensors.
    """
    return _saving_hooks(True) is None


def are_plain(*arguments: Any) -> bool:
    """Whether all arguments are tensors of the processor, none a subclass, and none what is left of a transform."""
    for x in arguments:
        if type(x) not in _PLAIN or not x.is_cpu:
            return False
        if _is_wrapped(x) or _is_legacy_batched(x):
            return False
    return True


def applied(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` for plain arguments where nothing intervenes: without what torch does for its transforms.

    That takes as long as all the rest of it.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
