"""What a run of `bench compile` found, as a table for people and as JSON for programs."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskops.cli.bench.compilation.budgets import Verdict
from maskops.cli.bench.compilation.result import Result

SCHEMA = 1
"""Version of the JSON's layout."""

_HEAD = ("", "regs", "spill B", "hot", "smem KB", "blocks", "products", "loads in hot loops", "loop", "/128x64", "s")
_EXPLANATION = """\
regs: registers of a thread. spill B: bytes of spill stores in the whole kernel, hot: spills in hot loops. blocks: on a
multiprocessor at a time. products, loads: instructions in hot loops, loads with their width in bytes. loop:
instructions of one pass of each hot loop. /128x64: warp instructions for 128 x 64 scores in the cheapest of them."""


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        triton: Version of Triton, or why there is none.
        nvcc: Version of nvcc, or why no .cu file was compiled.
        commit: Of the checkout.
        verdicts: Every compilation and what is wrong with it.
        seconds: Of the run.
    """

    triton: str
    nvcc: str
    commit: str
    verdicts: tuple[Verdict, ...]
    seconds: float

    def problems(self) -> list[str]:
        """A line for each violation that nothing excuses."""
        return [
            f"{verdict.result.name}, {verdict.result.architecture}: {problem.text}"
            for verdict in self.verdicts
            for problem in verdict.problems
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "schema": SCHEMA,
            "triton": self.triton,
            "nvcc": self.nvcc,
            "commit": self.commit,
            "seconds": round(self.seconds, 1),
            "kernels": [
                {
                    **verdict.result.as_json(),
                    **({"problems": [asdict(problem) for problem in verdict.problems]} if verdict.problems else {}),
                    **({"allowed": excused(verdict)} if verdict.allowed else {}),
                }
                for verdict in self.verdicts
            ],
        }

    def write_json(self, path: Path) -> None:
        """Writes `as_json`."""
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def excused(verdict: Verdict) -> list[dict[str, str]]:
    """What is wrong with a kernel and allowed to remain, with the reasons."""
    return [{**asdict(problem), "reason": allowance.reason} for problem, allowance in verdict.allowed]


def render(report: Report) -> str:
    """The report as text."""
    return "\n".join(_lines(report)) + "\n"


def line(result: Result) -> tuple[str, ...]:
    """The cells of one result."""
    if result.error:
        return (result.name, *[""] * 9, f"{result.seconds:.1f}")
    products: dict[str, int] = {}
    loads: dict[str, int] = {}
    for loop in result.loops:
        for total, part in ((products, loop.tensor_cores), (loads, loop.loads)):
            for name, number in part.items():
                total[name] = total.get(name, 0) + number
    return (
        result.name,
        str(result.registers),
        str(result.spill_stores),
        " + ".join(str(loop.spills) for loop in result.loops) if result.hot_spills else "0",
        f"{result.shared / 1024:.0f}",
        "" if result.blocks is None else str(result.blocks),
        " ".join(f"{name} {number}" for name, number in products.items()),
        " ".join(f"{name} x{number}" for name, number in loads.items()),
        " + ".join(str(loop.instructions) for loop in result.loops),
        "" if result.issue is None else f"{result.issue:.0f}",
        f"{result.seconds:.1f}",
    )


def _lines(report: Report) -> Iterator[str]:
    yield f"maskops bench compile: commit {report.commit}, Triton {report.triton}, nvcc {report.nvcc}"
    architectures = dict.fromkeys(verdict.result.architecture for verdict in report.verdicts)
    for architecture in architectures:
        of_it = [verdict.result for verdict in report.verdicts if verdict.result.architecture == architecture]
        yield f"\n{architecture}"
        table = [_HEAD, *map(line, of_it)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
        texts = (0, 6, 7, 8)
        for row in table:
            cells = (
                cell.ljust(width) if column in texts else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  ".join(cells).rstrip()
    yield f"\n{_EXPLANATION}"
    allowed = [
        f"  {verdict.result.name}, {verdict.result.architecture}: {problem.text}: {allowance.reason}"
        for verdict in report.verdicts
        for problem, allowance in verdict.allowed
    ]
    if allowed:
        yield "\nallowed to remain:"
        yield from allowed
    wrong = report.problems()
    if wrong:
        yield "\nbeyond the budget:"
        yield from (f"  {text}" for text in wrong)
    count = len(report.verdicts)
    yield f"\n{count} kernels in {report.seconds:.0f} s, {len(wrong)} problems, {len(allowed)} allowed"
