"""`python -m tools.compilation`: compiles the device kernels with every Triton that has to work, and with nvcc.

The Triton that is installed, the oldest that is supported, which is put into a folder of the environment once, and the
.cu files, side by side. What was compiled is kept in the environment too, so that a second run is short. Fails where a
kernel goes beyond its budget, and where an allowance of `maskops/cli/bench/compilation/budgets.py` excuses nothing any
more. `--everyday` leaves out what only features need; then nothing is said of allowances.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maskops.cli.bench.compilation.budgets import ALLOWANCES
from tools.environment import ROOT

OLDEST = "3.6.0"


def main() -> int:
    """Compiles everything; 0 if all of it is within the budget."""
    parser = argparse.ArgumentParser(prog="python -m tools.compilation", description=__doc__)
    parser.add_argument("--everyday", action="store_true", help="rows of the tuning tables, no variants of features")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of all runs")
    options = parser.parse_args()
    folder = Path(os.environ.get("VENV") or ROOT / ".venv").resolve()
    given = ["--everyday"] if options.everyday else []
    status, runs = compile_side_by_side([[*given, *arguments] for arguments in variants(folder)], folder / "compiled")
    for reason in () if options.everyday else unneeded(runs):
        print(f"tools.compilation: this allowance excuses nothing any more, delete it: {reason}", file=sys.stderr)
        status = 1
    if options.json is not None and runs:
        options.json.write_text(dump(runs))
    return status


def variants(folder: Path) -> list[list[str]]:
    """Options of `bench compile` for each run: the installed Triton, the oldest, the .cu files."""
    tritons = [["--without-cuda"]]
    if importlib.metadata.version("triton") != OLDEST:
        tritons.append(["--without-cuda", "--triton", str(older_triton(folder))])
    return [*tritons, ["--without-triton"]]


def compile_side_by_side(runs: list[list[str]], cache: Path) -> tuple[int, list[dict[str, Any]]]:
    """Runs `bench compile` with each list of options, all at a time, and prints what each found.

    Returns:
        0 if everything is within the budget, and the figures of the runs.
    """
    # Two at least: who is left at the end has the machine for itself.
    processes = max((os.cpu_count() or 1) // 2, 2)
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for index, arguments in enumerate(runs):
            figures, report = Path(scratch, f"{index}.json"), Path(scratch, f"{index}.txt")
            command = [sys.executable, "-m", "maskops", "bench", "compile", "--processes", str(processes)]
            command += ["--cache", str(cache), "--json", str(figures), *arguments]
            with report.open("w") as output:
                started.append((subprocess.Popen(command, cwd=ROOT, stdout=output), figures, report))
        status, found = 0, []
        for process, figures, report in started:
            status |= process.wait()
            print(report.read_text(), flush=True)
            if figures.exists():
                found.append(json.loads(figures.read_text()))
    return status, found


def older_triton(folder: Path) -> Path:
    """The folder with the oldest Triton that is supported, installed there unless it is."""
    target = folder / f"triton-{OLDEST}"
    if not target.exists():
        # Under another name until it is complete: an installation that was broken off does not look like one.
        partial = folder / f"triton-{OLDEST}.partial"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
        subprocess.run([*pip, "--no-deps", "--target", str(partial), f"triton=={OLDEST}"], check=True)
        partial.rename(target)
    return target


def unneeded(runs: list[dict[str, Any]]) -> list[str]:
    """Reasons of the allowances that no kernel of any run needed."""
    used = {allowed["reason"] for run in runs for kernel in run["kernels"] for allowed in kernel.get("allowed", ())}
    return sorted({allowance.reason for allowance in ALLOWANCES} - used)


def dump(runs: list[dict[str, Any]]) -> str:
    """The runs as JSON with one line for each kernel."""
    texts = []
    for run in runs:
        head = json.dumps({name: value for name, value in run.items() if name != "kernels"})[:-1]
        kernels = ",\n".join(json.dumps(kernel) for kernel in run["kernels"])
        texts.append(f'{head}, "kernels": [\n{kernels}]}}')
    return '{"runs": [\n' + ",\n".join(texts) + "]}\n"


if __name__ == "__main__":
    sys.exit(main())
