"""`python -m tools.compilation`: compiles the device kernels with every Triton that has to work, and with nvcc.

The Triton that is installed, and the oldest that is supported, which is put into a folder of the environment once. What
was compiled is kept there too, so that a second run is short. Fails where a kernel goes beyond its budget, and where an
allowance of `maskops/cli/bench/compilation/budgets.py` excuses nothing any more.
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of all runs")
    options = parser.parse_args()
    folder = Path(os.environ.get("VENV") or ROOT / ".venv").resolve()
    status, runs = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        for index, arguments in enumerate(variants(folder)):
            path = Path(scratch, f"{index}.json")
            cache = folder / "compiled"
            command = [sys.executable, "-m", "maskops", "bench", "compile", "--cache", str(cache), "--json", str(path)]
            status |= subprocess.run([*command, *arguments], cwd=ROOT).returncode
            if not path.exists():
                return status or 1
            runs.append(json.loads(path.read_text()))
    for reason in unneeded(runs):
        print(f"tools.compilation: this allowance excuses nothing any more, delete it: {reason}", file=sys.stderr)
        status = 1
    if options.json is not None:
        options.json.write_text(dump(runs))
    return status


def variants(folder: Path) -> list[list[str]]:
    """Options of `bench compile` for each run: the installed Triton with the .cu files, then the oldest."""
    if importlib.metadata.version("triton") == OLDEST:
        return [[]]
    return [[], ["--triton", str(older_triton(folder)), "--without-cuda"]]


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
    used = {allowed["reason"] for run in runs for kernel in run["kernels"] for allowed in kernel["allowed"]}
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
