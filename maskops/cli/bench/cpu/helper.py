"""A second process whose allocator asks for huge pages: torch reads THP_MEM_ALLOC_ENABLE once, at its first allocation.

It holds the same table, and runs and times a contender whenever it is told to, so that the rounds of both processes
are interleaved. What it is told and what it answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

import torch

from maskops.cli.bench.cpu.contest import Entry
from maskops.cli.bench.cpu.measure import Row, Runner, checked
from maskops.cli.bench.cpu.rows import entries

_SETTLES = 0.005
"""Seconds after which the threads of the other process have stopped looking for work."""


class Helper:
    """The process, seen from outside; started when it is first needed.

    Args:
        seed: Of the values.
        threads: Of torch, there as here.
    """

    def __init__(self, seed: int, threads: int) -> None:
        self._line = [sys.executable, "-m", "maskops.cli.bench.cpu.helper", str(seed), str(threads)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                _pipe(self._process.stdin).close()
            self._process.wait(30)
            _pipe(self._process.stdout).close()

    def prepare(self, entry: Entry, contender: str) -> Row:
        """Runs a contender there for its memory, and keeps it."""
        return Row(**self._ask({"prepare": _keys(entry)[0], "contender": contender}))

    def run(self, contender: str, warms: bool) -> float:
        """Seconds of a run there, after an untimed one if it warms."""
        seconds: float = self._ask({"run": contender, "warms": warms})["seconds"]
        time.sleep(_SETTLES)
        return seconds

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
            self._process = subprocess.Popen(
                self._line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        stdin = _pipe(self._process.stdin)
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = _pipe(self._process.stdout).readline()
        if not answer:
            raise RuntimeError(f"the process for huge pages ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _keys(entry: Entry) -> list[tuple[str, str, str]]:
    """Of an entry, by any of its lines: a run may have left some of them out."""
    return [(entry.group, entry.mode, line.name) for line in entry.lines]


def serve(table: Sequence[Entry], questions: IO[str], answers: IO[str]) -> None:
    """Answers until the questions end; one entry's contenders are kept at a time."""
    known = {key: entry for entry in table for key in _keys(entry)}
    current: tuple[str, ...] = ()
    runners: dict[str, Runner] = {}
    contest: Any = None
    for line in questions:
        question = json.loads(line)
        if "run" in question:
            runners[question["run"]].warms = question["warms"]
            answer: dict[str, Any] = {"seconds": runners[question["run"]].seconds()}
        else:
            key = tuple(question["prepare"])
            entry = known[key]
            if key != current:
                runners.clear()
                contest = None  # before the next one is made: both may not fit
                contest, current = entry.make(), key
            contender = next(each for each in contest.contenders() if each.name == question["contender"])
            row, runner = checked(contest, contender, entry.mode, None)
            if runner is not None:
                runners[contender.name] = runner
            answer = dataclasses.asdict(row)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    # What libraries print must not end up among the answers.
    own, sys.stdout = sys.stdout, sys.stderr
    serve(list(entries(int(sys.argv[1]))), sys.stdin, own)
