"""`python -m tests.mutate`: break the kernels one line at a time and show that a test catches each break.

Works on a copy of the project; the binary and the sources under development are not touched. A mutation names a file, a
piece of text that stands in it exactly once, what replaces it, and the tests that must notice.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import mutations
from tests.mutations import ROOT, Mutation

MUTATIONS: tuple[Mutation, ...] = tuple(
    mutation
    for area in pkgutil.iter_modules(mutations.__path__)
    for mutation in importlib.import_module(f"tests.mutations.{area.name}").MUTATIONS
)
"""Those of every file in tests/mutations."""


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    # Optimised as little as the kernels bear, and without nvcc: most of a mutation's time goes into the compiler. What
    # the CUDA kernels do shows where they run, compiled as host code.
    environment = {**os.environ, "PYTHONPATH": str(root), "CXXFLAGS": "-O1", "NVCC": ""}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)


def build(root: Path) -> None:
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root)
    if result.returncode != 0:
        raise RuntimeError(f"the build failed:\n{result.stderr[-3000:]}")
    if not (root / "maskops/_native.so").exists():
        raise RuntimeError(f"the build gave no binary: {(root / 'maskops/_build_report.json').read_text()}")


def tested(tests: tuple[str, ...], root: Path) -> subprocess.CompletedProcess[str]:
    """Runs tests up to the first that fails. What has no CUDA in its name leaves those kernels as host code unbuilt."""
    less = () if any("cuda" in name or "emulation" in name for name in tests) else ("--no-emulation",)
    return run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *less, *tests], root)


def failing_test(mutation: Mutation, root: Path) -> str | None:
    """The first test that fails, or None: the mutation survived."""
    result = tested(mutation.tests, root)
    if result.returncode == 0:
        return None
    if result.returncode != 1:  # neither passed nor failed: a broken run proves nothing, unless the process was killed
        return f"the process ended with {result.returncode}" if result.returncode < 0 else None
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the mutations whose name contains this text")
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT, root, ignore=ignore)
        build(root)
        for tests in sorted({mutation.tests for mutation in chosen}):
            result = tested(tests, root)
            if result.returncode != 0:
                print(f"{' '.join(tests)} fails without a mutation:\n{result.stdout[-2000:]}", file=sys.stderr)
                return 2
        is_broken = False  # the binary: by the mutation before
        for mutation in chosen:
            begin = time.monotonic()
            mutation.apply(root)
            try:
                if mutation.is_in_binary or is_broken:
                    build(root)
                is_broken = mutation.is_in_binary
                caught = failing_test(mutation, root)
            finally:
                mutation.revert(root)
            if caught is None:
                survivors.append(mutation.name)
            verdict = f"caught by {caught}" if caught else "SURVIVED"
            print(f"{mutation.name:48s} {verdict}  [{time.monotonic() - begin:.0f} s]", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
