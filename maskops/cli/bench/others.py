"""Processors that other programs took while something ran: what a result cannot be trusted above a little of."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IDLE = (3, 4)
"""Columns of /proc/stat in which a processor had nothing to do: idle, and waiting for a disk."""

_GUESTS = (8, 9)
"""Columns that are contained in others."""


class Others:
    """From its making on: processors that were busy, less what this process and its descendants used.

    Time that a hypervisor took away counts as taken by others. The load average, by contrast, remembers for minutes
    what has long ended, the run before among it.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._started = time.perf_counter()
        self._busy, self._own = self._read()

    def taken(self) -> float:
        """Processors taken so far, on average; 0 where the system does not tell."""
        busy, own = self._read()
        seconds = time.perf_counter() - self._started
        if seconds <= 0.0:
            return 0.0
        return max((busy - self._busy) - (own - self._own), 0.0) / seconds

    def _read(self) -> tuple[float, float]:
        """Seconds that all processors were busy, and those of this process and its descendants."""
        try:
            first = (self._proc / "stat").read_text(encoding="ascii").partition("\n")[0]
        except OSError:
            return 0.0, 0.0
        columns = [int(word) for word in first.split()[1:]]
        tick = os.sysconf("SC_CLK_TCK")
        left_out = (*_IDLE, *_GUESTS)
        busy = sum(ticks for column, ticks in enumerate(columns) if column not in left_out)
        return busy / tick, _own_ticks(self._proc) / tick


def _own_ticks(proc: Path) -> int:
    """Of this process, its descendants, and those of them that have ended."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name of the command, in brackets, may hold blanks and brackets itself.
            words = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        number = int(entry.name)
        parents[number] = int(words[1])
        ticks[number] = sum(map(int, words[11:15]))
    family = {os.getpid()}
    grown = True
    while grown:
        grown = False
        for number, parent in parents.items():
            if parent in family and number not in family:
                family.add(number)
                grown = True
    return sum(ticks.get(number, 0) for number in family)
