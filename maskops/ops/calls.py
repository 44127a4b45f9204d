"""Calls of registered operators: where one of them finds no memory, the error is torch's own.

The kernels allocate through torch's C interface, which tells that an allocation failed, but not by an exception of C++
that torch would make a ``torch.OutOfMemoryError`` of. The binding says so in words, and here they become that error.
Compiled code calls operators without us: it raises the words as the RuntimeError that they are, which is what
``torch.OutOfMemoryError`` is as well.
"""

from typing import Any

import torch

_WORDS = "maskops: out of memory"
"""How csrc/torch_abi.h begins to say that an allocation failed."""


def run(operator: Any, *args: Any) -> Any:
    """``operator(*args)``.

    Raises:
        torch.OutOfMemoryError: the operator found no memory for its results or for what it needs beside them.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        return operator(*args)
    except RuntimeError as error:
        raise as_torch_says_it(error) from None


def as_torch_says_it(error: RuntimeError) -> RuntimeError:
    """The error itself, or torch's own where an operator found no memory."""
    return torch.OutOfMemoryError(str(error)) if str(error).startswith(_WORDS) else error
