"""Numbers that compiled code keeps open: a new value of a scale or a coefficient does not compile anew.

``torch.compile`` may treat a Python float as unknown (always under ``dynamic=True``, else from its second value on). An
unknown float can enter tensor arithmetic, but not an operator of ours: torch would then fix its value in the compiled
code, and a schedule of values would compile at every step. So such a number travels as a 0-dim tensor, and every
operator that takes floats has a twin, ``<operator>_open``, that reads them from a tensor when it runs. Numbers that are
constants, and all numbers of eager code, go the direct way.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from maskops.ops.calls import run

# A constant differs from it for certain; of an unknown number that is not known. A constant that equals it is only
# taken for unknown, which is correct as well.
_UNLIKELY = 0.38196601125010515

_places: dict[str, tuple[int, ...]] = {}


def scalar(number: float, neutral: float | None = None) -> float | Tensor:
    """What an operator or an ``autograd.Function`` of ours is given for a number.

    Args:
        number: the number; symbolic where compiled code keeps it open.
        neutral: the value that switches a feature off. Compiled code tells it apart, and computes without the feature.

    Returns:
        A float, or a float64 0-dim tensor on the CPU where the number is open.
    """
    if not torch.compiler.is_compiling():
        return float(number)
    if neutral is not None and number == neutral:
        return neutral
    if statically_known_true(number != _UNLIKELY):
        return float(number)
    # torch turns just such arithmetic of an open float with a tensor into arithmetic of two tensors.
    return torch.ones((), dtype=torch.float64) * number


def define_open(library: torch.library.Library, name: str, tags: tuple[torch.Tag, ...]) -> None:
    """Defines the twin ``<name>_open`` of an operator, whose schema and fake kernel follow from the operator's own.

    It takes the operator's arguments, then ``numbers``, float64 (n,), and ``places``, a bit for each argument that
    ``numbers`` replaces, in their order.
    """
    operator = getattr(torch.ops.maskops, name).default
    arguments = operator._schema.arguments
    _places[name] = tuple(place for place, argument in enumerate(arguments) if str(argument.type) == "float")
    signature, results = str(operator._schema).removeprefix("maskops::").removeprefix(name).split(") -> ")
    twin = f"{name}_open"
    library.define(f"{twin}{signature}, Tensor numbers, int places) -> {results}", tags=tags)

    def run(*args: Any) -> Any:
        *closed, numbers, places = args
        values = iter(numbers.tolist())
        return operator(*[next(values) if places >> place & 1 else given for place, given in enumerate(closed)])

    def fake(*args: Any) -> Any:
        return operator(*args[:-2])

    library.impl(twin, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"maskops::{twin}", fake, lib=library)


def call(name: str, *args: Any) -> Any:
    """Calls the operator ``maskops::<name>``, its floats being what ``scalar`` made of them."""
    places = [place for place in _places[name] if isinstance(args[place], Tensor)]
    if not places:
        return run(getattr(torch.ops.maskops, name).default, *args)
    numbers = torch.stack([args[place] for place in places])
    # An open number is not the neutral one, and 1 stands for it where shapes depend on that.
    closed = [1.0 if place in places else given for place, given in enumerate(args)]
    twin = getattr(torch.ops.maskops, f"{name}_open").default
    return run(twin, *closed, numbers, sum(1 << place for place in places))
