"""`python -m tools.coverage`: how many lines of the C++ kernels the suite runs; fails under 95 %.

Builds a copy with gcov's counters and runs the files of the suite that call kernels, once on every instruction set that
the machine has. A line counts as one line however many instruction sets and types it is compiled for; it is covered
when any of them ran it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tools.instrument import ROOT, build_extension, copy_project
from tools.sanitize import files

ENOUGH = 95.0
FOLDERS = ("csrc/cpu", "csrc/ops")
RUN = """
import sys, pytest
from maskops import extension
extension.select_instruction_set(sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def instruction_sets(root: Path) -> list[str]:
    """What this machine has, narrowest first."""
    code = "from maskops import extension; print(*extension.instruction_sets())"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.split()


def run_suite(root: Path, tests: list[str], sets: list[str]) -> None:
    """Runs the tests on each instruction set, a process each; the counters add up in the files beside the objects."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    for name in sets:
        command = [sys.executable, "-c", RUN, name, *tests]
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        print(f"{name}: {result.stdout.splitlines()[-1] if result.stdout else result.stderr[-300:]}", flush=True)


def counts(root: Path) -> dict[str, dict[int, int]]:
    """File of the project -> line -> how often it ran."""
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    gcov = shutil.which("gcov")
    if gcov is None:
        raise RuntimeError("gcov is not installed; it comes with GCC")
    for notes in sorted((root / "build").rglob("*.gcno")):
        command = [gcov, "--json-format", "--stdout", str(notes)]
        output = subprocess.run(command, cwd=notes.parent, capture_output=True, text=True, check=True).stdout
        for text in filter(None, output.splitlines()):
            for file in json.loads(text)["files"]:
                path = Path(os.path.normpath(notes.parent / file["file"]))
                if not path.is_relative_to(root) or not str(path.relative_to(root)).startswith(FOLDERS):
                    continue
                for line in file["lines"]:
                    lines[str(path.relative_to(root))][line["line_number"]] += line["count"]
    return lines


def ranges(numbers: list[int]) -> str:
    """1 2 3 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 1 where less than ``ENOUGH`` percent of the lines ran."""
    parser = argparse.ArgumentParser(prog="python -m tools.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", action="append", help="only this instruction set, once or several times")
    parser.add_argument("tests", nargs="*", help="test files; by default all that call kernels")
    options = parser.parse_args(arguments)
    root = ROOT / "build" / "coverage" / "project"
    copy_project(root)
    os.environ["CXX"] = f"{os.environ.get('CXX') or 'g++'} --coverage"  # in compiling and in linking
    build_extension(root, "-O1 -Wno-uninitialized -Wno-maybe-uninitialized")
    for old in (root / "build").rglob("*.gcda"):
        old.unlink()
    run_suite(root, options.tests or files(root), options.set or instruction_sets(root))
    lines = counts(root)
    total = covered = 0
    for name, found in sorted(lines.items()):
        missed = [line for line, count in found.items() if count == 0]
        total, covered = total + len(found), covered + len(found) - len(missed)
        share = 100.0 * (len(found) - len(missed)) / max(len(found), 1)
        print(f"{name:40s} {share:5.1f} % of {len(found)} lines{'; not run: ' + ranges(missed) if missed else ''}")
    figure = 100.0 * covered / max(total, 1)
    print(f"coverage of the kernels: {figure:.1f} % of {total} lines ({ENOUGH:.0f} % wanted)")
    return 0 if total > 0 and figure >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
