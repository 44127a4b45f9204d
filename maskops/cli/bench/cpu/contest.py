"""What a row of the table is: a contest, who takes part, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from maskops.cli.bench.contests.contest import Contest

Mode = Literal["forward", "graph", "training"]
"""Without autograd; with autograd, which makes a graph; forward and backward."""

MODES: dict[str, str] = {"forward": "forward", "graph": "forward, with autograd", "training": "forward + backward"}

HUGE_PAGES = ", huge pages"
"""Behind the name of a contender: the same in a process whose allocator asks for huge pages."""

LimitName = Literal["multiply-add", "multiply-add bf16", "read", "copy", "copy + touch"]


@dataclass(frozen=True)
class Goal:
    """What is wanted against some peers.

    Attributes:
        peers: Contenders; the quickest of those that are right counts.
        at_least: How many times its speed.
        aim: How many times its speed would be good; None where at_least is all there is.
    """

    peers: tuple[str, ...]
    at_least: float
    aim: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: The work, unique among the lines of a mode.
        ours: The contender that it is about.
        goals: Against whom; all of them are shown.
        limit: What the machine cannot go beyond; None where that is the interpreter.
        share: Which share of the limit is aimed at.
        memory: How many times the floor of memory is allowed; None: it is only shown.
    """

    name: str
    ours: str
    goals: tuple[Goal, ...]
    limit: LimitName | None = None
    share: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Entry:
    """A contest with the lines that come from it: their contenders run in turn.

    Attributes:
        group: Heading.
        make: Makes the contest, whose tensors live until the next one.
        lines: What is shown; contenders that no line names are left out, but for those in `also`.
        mode: What is run.
        also: Peers without a goal of their own, which count towards the best peer.
        calls: Runs in each timing, for what takes microseconds.
        quick: Whether a quick run holds it.
    """

    group: str
    make: Callable[[], Contest]
    lines: tuple[Line, ...]
    mode: Mode = "forward"
    also: tuple[str, ...] = ()
    calls: int = 1
    quick: bool = False

    def names(self) -> tuple[str, ...]:
        """All contenders once, peers first."""
        ours = [line.ours for line in self.lines]
        peers = [peer for line in self.lines for goal in line.goals for peer in goal.peers]
        return tuple(dict.fromkeys([*(peer for peer in (*peers, *self.also) if peer not in ours), *ours]))
