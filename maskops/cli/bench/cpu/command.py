"""`python -m maskops bench cpu`: how much is measured, the order of events, and the instruction set of both sides."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import maskops
from maskops import extension
from maskops.backend import ENVIRONMENT_VARIABLE
from maskops.cli.bench import machine, output
from maskops.cli.bench.cpu import chart
from maskops.cli.bench.cpu.contest import MODES, Entry
from maskops.cli.bench.cpu.helper import Helper
from maskops.cli.bench.cpu.limits import LIMITS, Gauge
from maskops.cli.bench.cpu.measure import Helper as HelperLike
from maskops.cli.bench.cpu.measure import Result, measure
from maskops.cli.bench.cpu.report import CpuReport, render
from maskops.cli.bench.cpu.rounds import GaugeLike, Pace
from maskops.cli.bench.cpu.rows import entries
from maskops.cli.bench.others import Others
from maskops.cli.bench.progress import Progress

PACES = {
    "full": Pace(
        budget=6.0, min_rounds=5, max_rounds=60, stretch=1.5, discards=8, patience=20.0, compiled=True, late=600.0
    ),
    "quick": Pace(
        budget=0.8, min_rounds=3, max_rounds=20, stretch=0.5, discards=4, patience=6.0, compiled=False, late=70.0
    ),
}
"""A full run stays below a quarter of an hour on two cores, a quick one below two minutes: late entries are short."""

_CAPABILITIES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "ALL",
    },
}
"""What keeps torch and its libraries to an instruction set; they read it when they are loaded."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this work alone."""
    group = parser.add_argument_group("cpu")
    group.add_argument(
        "--instruction-set",
        choices=list(_CAPABILITIES),
        help="maskops and torch both with this one, which the processor must have (default: the widest of both)",
    )


def environment(instruction_set: str) -> dict[str, str]:
    """What a process needs to have before it starts for both sides to use an instruction set."""
    # Of torch.compile: what it keeps was compiled for one instruction set, and crashes torch under a lower one.
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{instruction_set}")
    return {
        ENVIRONMENT_VARIABLE: f"cpu:{instruction_set}",
        "TORCHINDUCTOR_CACHE_DIR": cache,
        **_CAPABILITIES[instruction_set],
    }


def run(options: argparse.Namespace) -> int:
    """Measures the table; 0 if every row is right and maskops refused nothing, 2 if there is nothing to measure."""
    if (reason := extension.reason()) is not None:
        print(f"bench cpu: {reason}", file=sys.stderr)
        return 2
    if options.instruction_set is not None:
        if options.instruction_set not in extension.instruction_sets():
            have = ", ".join(extension.instruction_sets())
            print(f"--instruction-set {options.instruction_set}: this machine has {have}", file=sys.stderr)
            return 2
        wanted = environment(options.instruction_set)
        if any(os.environ.get(name) != value for name, value in wanted.items()):
            sys.stdout.flush()
            os.environ.update(wanted)
            os.execv(sys.executable, [sys.executable, "-m", "maskops", *sys.argv[1:]])
        # At once, and not at the first call: the limits are those of this instruction set too.
        extension.select_instruction_set(options.instruction_set)
    mode = "quick" if options.quick else "full"
    chosen = select(list(entries(options.seed)), options.only, quick=options.quick)
    if not chosen:
        print(f"--only {options.only!r}: no line of the table has this in its name", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    with (
        contextlib.nullcontext() if asked else maskops.use_backend(fallback="error"),
        Helper(options.seed, torch.get_num_threads()) as helper,
    ):
        gauge = Gauge(torch.get_num_threads())
        report = execute(chosen, PACES[mode], gauge.measure, helper, mode=mode, seed=options.seed, path=options.json)

    def draw(path: Path) -> None:
        chart.draw(report, path)

    return output.deliver(report, render(report), options, draw)


def select(table: Sequence[Entry], only: str, *, quick: bool) -> list[Entry]:
    """The entries of a run, with the lines whose "group, mode: name" contains the text."""
    found = []
    for entry in table:
        if quick and not entry.quick:
            continue
        place = f"{entry.group}, {MODES[entry.mode]}"
        lines = tuple(line for line in entry.lines if only in f"{place}: {line.name}")
        if lines:
            found.append(dataclasses.replace(entry, lines=lines))
    return found


def execute(
    chosen: Sequence[Entry],
    pace: Pace,
    gauge: GaugeLike,
    helper: HelperLike | None,
    *,
    mode: str,
    seed: int,
    path: Path | None = None,
) -> CpuReport:
    """Measures the entries one after another.

    Args:
        chosen: The entries.
        pace: How long each.
        gauge: Measures the machine's limits.
        helper: For contenders that want huge pages.
        mode: Name of the pace.
        seed: Of the values.
        path: Where what was found so far is kept after each entry: a run that is interrupted is not lost.
    """
    started, others = time.perf_counter(), Others()
    found: dict[int, Result] = {}

    def report() -> CpuReport:
        return CpuReport(
            mode=mode,
            machine=dataclasses.replace(host, load=others.taken()),
            settings={"dtype": "float32", "seed": seed, **dataclasses.asdict(pace)},
            limits=limits,
            results=tuple(found[place] for place in sorted(found)),
            seconds=time.perf_counter() - started,
        )

    with Progress(float(len(chosen))) as progress:
        progress.stage("measuring what plain torch reaches")
        host = machine.describe(torch.device("cpu"), torch.float32)
        limits = gauge(LIMITS)
        for place in in_order(chosen):
            entry = chosen[place]
            progress.stage(f"{entry.group}, {MODES[entry.mode]}: {entry.lines[0].name}")
            late = time.perf_counter() - started > pace.late
            found[place] = measure(entry, pace.hurried() if late else pace, gauge, helper)
            if path is not None:
                report().write_json(path)
            progress.advance(1.0)
        # Once more where the machine moved all the time, while there is time: it may have come to rest.
        for place, result in sorted(found.items()):
            if result.unsteady and time.perf_counter() - started < pace.late:
                progress.stage(f"once more: {result.group}, {MODES[result.mode]}: {chosen[place].lines[0].name}")
                again = measure(chosen[place], pace, gauge, helper)
                # What was thrown away stays in the report.
                found[place] = dataclasses.replace(again, stretches=(*result.stretches, *again.stretches))
                if path is not None:
                    report().write_json(path)
    return report()


def in_order(chosen: Sequence[Entry]) -> list[int]:
    """Which entry is measured when: calls of microseconds first, in a process whose heap and caches are new."""
    return sorted(range(len(chosen)), key=lambda place: chosen[place].calls == 1)
