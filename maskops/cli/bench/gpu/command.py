"""`python -m maskops bench gpu`: the order of events and the exit status."""

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from maskops.cli.bench import machine
from maskops.cli.bench.contests.contest import Setting
from maskops.cli.bench.gpu.measure import Device, measure
from maskops.cli.bench.gpu.precompile import precompile
from maskops.cli.bench.gpu.report import Report, render
from maskops.cli.bench.gpu.schedule import Entry, contests
from maskops.cli.bench.progress import Progress

UNFINISHED = 3
"""Exit status of a run that stopped at its time limit: the same command goes on with `--resume`."""

_QUERY = "driver_version,clocks.max.sm,power.limit,temperature.gpu"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this work alone."""
    group = parser.add_argument_group("gpu")
    group.add_argument("--dry-run", action="store_true", help="tiny shapes on the processor: the run would work")
    group.add_argument("--resume", action="store_true", help="keep what the file of --json holds of this run")
    group.add_argument(
        "--precompile", metavar="K/N", help="only compile, what every Nth contest from number K on needs"
    )
    group.add_argument("--limit", type=float, metavar="SECONDS", help="stop before the next contest after so long")


def run(options: argparse.Namespace) -> int:
    """Runs the contests; 0 if every row is right and maskops refused nothing, 3 if the time was over before the end."""
    if not options.dry_run and not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device here; --dry-run goes through it on the processor", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = names[options.dtype or ("float32" if options.dry_run else "bfloat16")]
    setting = Setting(device, dtype, small=options.dry_run, seed=options.seed)
    mode = "dry run" if options.dry_run else "quick" if options.quick else "full"
    chosen = [
        entry
        for entry in contests(setting)
        if options.only in f"{entry.group}: {entry.name}" and (mode != "quick" or entry.quick)
    ]
    if options.precompile:
        part, _, parts = options.precompile.partition("/")
        failed = precompile(chosen, int(part), int(parts))
        print("\n".join([f"precompiled {len(chosen[int(part) :: int(parts)])} contests", *failed]))
        return 1 if failed else 0
    report = Report(
        machine=machine.describe(device, dtype),
        details=details(device),
        settings={"mode": mode, "dtype": str(dtype).removeprefix("torch."), "seed": options.seed, "only": options.only},
    )
    if options.resume and options.json is not None:
        report.resume(options.json)
    report.finished = execute(report, chosen, setting, path=options.json, limit=options.limit)
    if options.json is not None:
        report.write(options.json)
    print(render(report), end="")
    if options.json is not None:
        print(f"\nnumbers: {options.json}")
    if not report.finished:
        return UNFINISHED
    return 1 if report.problems() else 0


def execute(
    report: Report, chosen: list[Entry], setting: Setting, *, path: Path | None = None, limit: float | None = None
) -> bool:
    """Runs the contests that the report lacks and stores it after each; whether it came to the end.

    Args:
        report: What is there already; grows.
        chosen: The contests.
        setting: Where they run.
        path: File of the report.
        limit: No contest begins after so many seconds.
    """
    started = time.perf_counter()
    device = Device(setting.device)
    budget, min_rounds, max_rounds = (0.0, 2, 2) if setting.small else (0.6, 7, 60)

    def store() -> None:
        if path is not None:
            report.write(path)

    with Progress(float(len(chosen))) as progress:
        for entry in chosen:
            progress.stage(f"{entry.group}: {entry.name}")
            missing = [mode for mode in (False, True) if not report.has(entry.group, entry.name, mode)]
            contest = None
            for backward in missing:
                if limit is not None and time.perf_counter() - started > limit:
                    return False
                contest = contest or entry.make(entry.name)
                if backward and not contest.differentiated:
                    continue
                # Graphs and guards of other shapes only slow the next ones down, and count towards a limit.
                torch.compiler.reset()
                place = [entry.group, entry.name, "training" if backward else "forward"]

                def begin(contender: str, place: list[str] = place) -> None:
                    report.begun = [*place, contender]
                    store()

                table = measure(
                    contest,
                    backward=backward,
                    device=device,
                    budget=budget,
                    min_rounds=min_rounds,
                    max_rounds=max_rounds,
                    crashed=[name for *where, name in report.crashed if where == place],
                    on_contender=begin,
                )
                report.tables.append(table)
                report.begun = None
                store()
            progress.advance(1.0)
    return True


def details(device: torch.device) -> dict[str, str]:
    """What the driver and torch say about a device, in words; {} for a processor."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    found = {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["Triton"] = triton.__version__
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if answer.returncode == 0:
            names = ("driver", "highest clock", "power limit", "temperature")
            found.update(zip(names, (word.strip() for word in answer.stdout.strip().split(",")), strict=False))
    return found
