"""A contest: one computation, everybody who can do it, and the formulas written out to compare with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskops.backend import BACKENDS, REFERENCE
from maskops.cli.bench.jobs import Outcome

Leaves = tuple[Tensor, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and how much.

    Attributes:
        device: Where everything runs.
        dtype: Of the inputs.
        small: Tiny shapes, nothing compiled: shows that a run would work.
        seed: Of all values.
    """

    device: torch.device
    dtype: torch.dtype
    small: bool = False
    seed: int = 0

    def randn(self, *size: int, stream: int = 0) -> Tensor:
        """Normal values in the dtype of the run; another `stream`, other values."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + stream)
        return torch.randn(size, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, which a dry run leaves out."""
        return function if self.small else torch.compile(function)

    def backends(self, op: str) -> list[str]:
        """The kernels that are made for the device and serve an op; the reference too in a dry run."""
        return [
            name
            for name, row in BACKENDS.items()
            if row.is_at_home(self.device.type) and op in row.ops and (self.small or name != REFERENCE)
        ]


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: Label of its row.
        make: From the leaves to what one step runs, `function(*leaves)`: what is made here is not timed. Raises where
            this machine or this torch lacks it.
        layout: Which leaves it takes, a word of its contest.
        ours: Whether it calls maskops.
        habit: Whether it is what people do today.
        partial: Leaves out a part of the step, such as making a mask that every batch needs anew: shown, never best.
        compiles: Its first call compiles something, which a run may want to do beforehand.
        consumes: Overwrites its inputs, so that it gets fresh copies, which are not timed.
        reuses: Writes its gradients to memory that it was given once: they are no new memory.
        releases: maskops gives the memory that it keeps back to the system before each run, untimed.
    """

    name: str
    make: Callable[[Leaves], Function]
    layout: str = ""
    ours: bool = False
    habit: bool = False
    partial: bool = False
    compiles: bool = False
    consumes: bool = False
    reuses: bool = False
    releases: bool = False


def always(function: Function) -> Callable[[Leaves], Function]:
    """For a contender whose step needs nothing that is made before."""
    return lambda leaves: function


class Contest(ABC):
    """One computation.

    Attributes:
        group: Heading under which it is shown.
        name: Unique in its group.
        setting: Where it runs.
        differentiated: Whether forward and backward are measured too.
    """

    group: str
    name: str
    setting: Setting
    differentiated: bool = True

    @abstractmethod
    def contenders(self) -> Sequence[Contender]:
        """Everybody, peers first."""

    @abstractmethod
    def leaves(self, layout: str) -> Leaves:
        """The inputs in a layout; the gradients are taken with respect to those that require one."""

    def upstream(self, layout: str, out: Tensor) -> Tensor:
        """The gradient that arrives at the result."""
        del layout
        return torch.ones_like(out)

    @abstractmethod
    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The part of the result, and of the gradients if there are some, that is compared; no layout shows in it."""

    @abstractmethod
    def exact(self, backward: bool) -> Outcome:
        """The sample in float64, from the formulas."""

    @abstractmethod
    def plain(self, backward: bool) -> Outcome:
        """The sample by plain torch operations in the dtype of the run: what errors are measured in."""

    def flops(self, backward: bool) -> float | None:
        """Useful floating-point operations of a step; None where bytes are what counts."""
        del backward
        return None

    def bytes(self, backward: bool) -> float | None:
        """Bytes that a step has to move; None where operations are what counts."""
        del backward
        return None

    def written(self, backward: bool) -> float:
        """Bytes among them that are written to new memory."""
        del backward
        return 0.0

    def scratch(self) -> float:
        """Bytes that a step cannot do without beyond its results."""
        return 0.0


def step(contest: Contest, contender: Contender, backward: bool) -> tuple[Callable[[], object], Callable[[], Leaves]]:
    """What happens untimed before each step, and the step, which returns the result and the gradients."""
    leaves = contest.leaves(contender.layout)
    if not backward:
        leaves = tuple(x.detach() for x in leaves)
    function = contender.make(leaves)
    current = [leaves]

    def renew() -> None:
        if contender.consumes:
            current[0] = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in leaves)

    def run() -> Leaves:
        if not backward:
            with torch.no_grad():
                return (function(*current[0]),)
        out = function(*current[0])
        differentiated = [x for x in current[0] if x.requires_grad]
        upstream = contest.upstream(contender.layout, out)
        return (out.detach(), *torch.autograd.grad(out, differentiated, upstream))

    return renew, run
