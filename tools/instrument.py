"""Sources and flags of the builds that watch the kernels: sanitizers, fuzzers, coverage. They never touch the binary.

Each works on a copy in which constants that keep small problems on one thread, or out of the streaming stores, are so
small that the suite's problems get there too. Results do not depend on them: that is one of the things under test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THRESHOLDS = re.compile(
    r"^constexpr (?:double|int64_t|int) (\w*(?:PER_WORKER|WORKER_BYTES|STREAM_BYTES)\w*) = [^;]+;", re.M
)
"""How the schedules in csrc/cpu name what makes another thread, or a store past the caches, worth its while."""

LEFT_OUT = (
    *(".git", ".venv", "build", "dist", "__pycache__", "*.so", "*.egg-info", "results", ".hypothesis"),
    "torch_maskops-*",  # what a source distribution is made from lies beside the sources for a moment
)
# Frames and lines for the reports; vector code that is not optimised at all would take minutes.
READABLE = "-O1 -g1 -fno-omit-frame-pointer -Wno-uninitialized -Wno-maybe-uninitialized"
ADDRESS = (
    f"{READABLE} -fsanitize=address,undefined -fsanitize=float-cast-overflow -fno-sanitize-recover=undefined "
    "-fno-sanitize=vptr"
)
THREAD = f"{READABLE} -fsanitize=thread"


def lowered(text: str) -> str:
    """A source with its thresholds at 1, so that every problem is shared between threads and streamed."""
    return THRESHOLDS.sub(lambda match: match.group(0).split(" = ")[0] + " = 1;", text)


def copy_project(target: Path) -> None:
    """The project in another folder, thresholds lowered. Files that are there and equal keep their dates."""
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    found = 0
    for folder, folders, files in os.walk(ROOT):
        skipped = ignored(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in skipped]
        for name in files:
            source = Path(folder) / name
            if name in skipped or source.name == "_build_report.json":
                continue
            content = source.read_bytes()
            if source.suffix == ".cpp" and source.parent.name == "cpu":
                text = content.decode()
                found += len(THRESHOLDS.findall(text))
                content = lowered(text).encode()
            place = target / source.relative_to(ROOT)
            if not place.exists() or place.read_bytes() != content:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
    if found < 3:
        raise RuntimeError(
            f"csrc/cpu holds {found} thresholds that match {THRESHOLDS.pattern}: rename one or the other"
        )


def build_extension(root: Path, flags: str, link: str = "") -> None:
    """Builds the extension of the copy in ``root``; RuntimeError with the compiler's words if that fails."""
    environment = {**os.environ, "CXXFLAGS": flags, "MASKOPS_BUILD": "require", "NVCC": ""}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"the build with {flags} failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


def runtime(name: str) -> str:
    """The library of a sanitizer that has to be loaded before Python, e.g. ``libasan.so``."""
    compiler = os.environ.get("CXX") or "g++"
    output = subprocess.run([*compiler.split(), f"-print-file-name={name}"], capture_output=True, text=True).stdout
    path = Path(output.strip())
    if not path.is_absolute():
        raise RuntimeError(f"{compiler} has no {name}: the sanitizers need GCC with its runtime libraries")
    return str(path.resolve())
