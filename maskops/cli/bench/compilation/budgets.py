"""What must not be in a compiled kernel, and by name what may stay for a reason."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from maskops.cli.bench.compilation.result import TRITON, Result
from maskops.tuning import SHARED_MEMORY

NARROW = 2
"""Bytes of a global load that no hot loop of a Triton kernel may have: one element at a time."""


@dataclass(frozen=True)
class Problem:
    """One violation; `kind` is what an Allowance names, `number` how many spills or loads there are."""

    kind: str
    text: str
    number: int = 0


@dataclass(frozen=True)
class Allowance:
    """Something that may stay.

    Attributes:
        name: Of the compilations, with ``*`` for anything.
        kind: Of the problem: ``"spills"``, ``"serialised"``, ``"narrow loads"``, ``"no tensor cores"``,
            ``"shared memory"``.
        reason: Why it stays.
        architecture: Where, ``*`` for everywhere.
        triton: Versions of Triton for which it holds, by prefix; all without any.
        most: Spills or loads in hot loops that it excuses, so that it does not hide what comes on top of them.
    """

    name: str
    kind: str
    reason: str
    architecture: str = "*"
    triton: tuple[str, ...] = ()
    most: int = 0

    def covers(self, result: Result, problem: Problem, version: str) -> bool:
        """Whether it excuses this problem of a result of this version of Triton."""
        return (
            problem.kind == self.kind
            and problem.number <= self.most
            and fnmatchcase(result.name, self.name)
            and fnmatchcase(result.architecture, self.architecture)
            and (not self.triton or version.startswith(self.triton))
        )


_NO_TRITON = "serves cards without Triton, correct before fast: a few values that live across the loop do not fit"
_PAIRS = "a row of the bias may end anywhere, so partial tiles load it pair by pair"
_RARE = "runs on rows with a large log-sum-exp alone, and ends at once without any"

ALLOWANCES: tuple[Allowance, ...] = (
    Allowance("attention forward half * bias", "narrow loads", f"{_PAIRS}; full tiles load it wide", most=32),
    Allowance("attention grad_bias half * bias", "narrow loads", f"{_PAIRS}, and so does its gradient", most=32),
    Allowance("attention renewed_sums half *", "narrow loads", f"{_PAIRS}; {_RARE}", most=32),
    Allowance("attention renewed_sums half *", "spills", _RARE, most=100),
    Allowance(
        "attention forward half 128 bias", "spills", "two words a loop, which Triton 3.9 keeps", "sm_80", ("3.6",), 4
    ),
    Allowance(
        "attention forward half 256 bias",
        "spills",
        "tiles of half the rows spill nothing and take twice the instructions; Triton 3.9 keeps it all",
        "sm_90",
        ("3.6",),
        41,
    ),
    Allowance(
        "attention grad_bias half 64 bias",
        "spills",
        "five tiles live across the loop, and smaller ones would leave the tiles of the plan",
        "sm_80",
        most=35,
    ),
    Allowance("attention_extras.cu: bias_kernel", "spills", f"the gradient of a bias {_NO_TRITON}", most=160),
    Allowance("attention_forward.cu: forward_kernel*", "spills", f"attention forward {_NO_TRITON}", most=8),
    Allowance("attention_queries.cu: queries_kernel*", "spills", f"the gradient of queries {_NO_TRITON}", most=8),
)


@dataclass(frozen=True)
class Verdict:
    """A result, what is wrong with it, and what is wrong but allowed."""

    result: Result
    problems: tuple[Problem, ...]
    allowed: tuple[tuple[Problem, Allowance], ...]


def problems(result: Result) -> list[Problem]:
    """Everything that goes beyond the budget, allowed or not."""
    if result.error:
        return [Problem("error", result.error)]
    found = []
    # Local memory that ptxas does not call a spill is an array that a loop over a few features indexes.
    if result.hot_spills and result.spill_stores:
        text = f"{result.hot_spills} spills in a hot loop ({result.spill_stores} bytes in the whole kernel)"
        found.append(Problem("spills", text, result.hot_spills))
    if result.notes:
        codes = ", ".join(sorted({match for note in result.notes for match in re.findall(r"C75\d\d", note)}))
        found.append(Problem("serialised", f"ptxas serialises wgmma: {codes}"))
    narrow = sum(number for loop in result.loops for load, number in loop.loads.items() if load == f"LDG.{NARROW}")
    # A CUDA kernel chooses its loads by the alignment of a call, so that all widths stand side by side in it.
    if narrow and result.source == TRITON:
        found.append(Problem("narrow loads", f"{narrow} loads of {NARROW} bytes in a hot loop", narrow))
    if result.dots and not any(loop.tensor_cores for loop in result.loops):
        found.append(Problem("no tensor cores", "16-bit products without tensor cores"))
    limit = SHARED_MEMORY[result.architecture]
    if result.shared > limit:
        found.append(Problem("shared memory", f"{result.shared} bytes of shared memory, {limit} are there"))
    return found


def judge(results: Iterable[Result], version: str, allowances: Sequence[Allowance] = ALLOWANCES) -> list[Verdict]:
    """Holds results against the budget. An error is never allowed."""
    verdicts = []
    for result in results:
        wrong, allowed = [], []
        for problem in problems(result):
            excuse = next((item for item in allowances if item.covers(result, problem, version)), None)
            if excuse is None or problem.kind == "error":
                wrong.append(problem)
            else:
                allowed.append((problem, excuse))
        verdicts.append(Verdict(result, tuple(wrong), tuple(allowed)))
    return verdicts
