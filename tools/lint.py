"""`python -m tools.lint`: style, types and the format of the C++ sources. `--fix` repairs what can be repaired."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh"}


def cpp_sources() -> list[str]:
    """The C++ sources and headers, fragments that are included once per instruction set among them."""
    paths = sorted(path for folder in ("csrc", "fuzz", "tools", "tests") for path in (ROOT / folder).rglob("*"))
    return [str(path.relative_to(ROOT)) for path in paths if path.suffix in SUFFIXES]


def commands(fix: bool) -> dict[str, list[str]]:
    """What is run, by the name of the tool; ruff and mypy through the interpreter that runs this."""
    python = [sys.executable, "-m"]
    return {
        "ruff check": [*python, "ruff", "check", *(["--fix"] if fix else []), "."],
        "ruff format": [*python, "ruff", "format", *([] if fix else ["--check"]), "."],
        "mypy": [*python, "mypy"],
        "clang-format": [str(clang_format()), *(["-i"] if fix else ["--dry-run", "-Werror"]), *cpp_sources()],
    }


def clang_format() -> Path:
    """The program inside the package: the script beside it may belong to the Python that this environment builds on."""
    package = importlib.util.find_spec("clang_format")
    folder = Path(package.origin).parent if package is not None and package.origin is not None else Path()
    return folder / "data" / "bin" / "clang-format"


def installed(command: list[str]) -> bool:
    """Whether the tool of a command is in this environment."""
    if command[1] == "-m":
        return importlib.util.find_spec(command[2]) is not None
    return Path(command[0]).exists()


def main(arguments: list[str] | None = None) -> int:
    """Runs every check, whatever the ones before it said; 1 if any failed or is not installed."""
    parser = argparse.ArgumentParser(prog="python -m tools.lint", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="reformat and repair instead of only reporting")
    options = parser.parse_args(arguments)
    failed = []
    for name, command in commands(options.fix).items():
        print(f"== {name}", flush=True)
        if not installed(command):
            print(f"{name} is not installed: {sys.executable} -m pip install -e '.[dev]'", file=sys.stderr)
            failed.append(name)
        elif subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            failed.append(name)
    print(f"lint: failed: {', '.join(failed)}" if failed else "lint: everything passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
