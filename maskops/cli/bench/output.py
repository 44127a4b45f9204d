"""What every run ends with: the report on the terminal, as JSON and as a picture, and the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from maskops.cli.bench import chart


class Deliverable(Protocol):
    """What a run has found."""

    def problems(self) -> list[str]:
        """What makes the run a failure."""

    def write_json(self, path: Path) -> None:
        """Writes every number."""


def deliver(
    report: Deliverable, text: str, options: argparse.Namespace, draw: Callable[[Path], None] | None = None
) -> int:
    """Prints a report, writes what `--json` and `--chart` ask for, and returns the exit status.

    Args:
        report: What was found.
        text: The report as people read it, with a newline at its end.
        options: Of the command line.
        draw: Draws the picture; None where there is none.

    Returns:
        0, or 1 where the report has problems.
    """
    print(text, end="")
    if options.json is not None:
        report.write_json(options.json)
        print(f"\nnumbers: {options.json}")
    if options.chart is not None:
        reason = "this work has none" if draw is None else chart.available()
        if draw is not None and reason is None:
            draw(options.chart)
        print(f"chart: {options.chart}" if reason is None else f"no chart: {reason}")
    return 1 if report.problems() else 0
