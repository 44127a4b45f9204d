"""One schema, an operator for every backend that is a kernel.

``define`` registers ``maskops::<name>`` (of ``cpu``) and ``maskops::<name>_<backend>`` with one schema, one fake kernel
and, where it takes floats, the twin of ``scalars.define_open``. Which of them a call runs is decided by
``backend.choose`` and travels with the arguments as a name: the device of the tensors does not tell ``triton`` from
``cuda``, and both run on processors too, interpreted or compiled as host code, when they are tested.

The C++ extension implements the operators of ``cpu`` and ``cuda``. Those of ``triton`` are Python: the operator
``<name>_triton`` of the package ``maskops.ops.<op>`` is the function ``<name>`` of ``maskops.ops.<op>.triton_kernels``,
which is imported when it is first called.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from maskops.ops.scalars import define_open

KERNEL_BACKENDS = ("cpu", "triton", "cuda")


def name_of(name: str, backend: str) -> str:
    """Name of an operator, without the namespace, as ``backend`` implements it."""
    return name if backend == "cpu" else f"{name}_{backend}"


def names_of(name: str) -> tuple[str, ...]:
    """The names of an operator on every backend that is a kernel."""
    return tuple(name_of(name, backend) for backend in KERNEL_BACKENDS)


def define(
    library: torch.library.Library,
    op: str,
    name: str,
    signature: str,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Defines an operator for every backend that is a kernel.

    Args:
        library: a fragment of the library ``maskops``.
        op: the package in ``maskops.ops`` whose ``triton_kernels`` implement it.
        name: name of the operator.
        signature: arguments and results, ``(Tensor x, float scale) -> Tensor``.
        fake: the fake kernel.
        tags: tags of the operator.
    """
    for operator in names_of(name):
        library.define(f"{operator}{signature}", tags=tags)
        torch.library.register_fake(f"maskops::{operator}", fake, lib=library)
        if "float " in signature:
            define_open(library, operator, tags)
    library.impl(name_of(name, "triton"), _triton_implementation(op, name), "CompositeExplicitAutograd")


def define_direct(library: torch.library.Library, schema: str) -> None:
    """Defines an operator that only an op's ``direct.py`` calls, eager, on the processor, with its graph around it.

    It has no fake kernel, which nobody would call, so it is not tagged as one that compiled code may hold, and the
    dispatcher has nothing to do for it before its kernel.

    Args:
        library: a fragment of the library ``maskops``.
        schema: the operator's whole schema.
    """
    name = library.define(schema)
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _triton_implementation(op: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"maskops.ops.{op}.triton_kernels"), name)(*args)

    return run
