"""`python -m tools.fuzz`: the C++ operators under integers, shapes and strides that nobody would pass.

Builds ``fuzz/`` with the operators under AddressSanitizer and UndefinedBehaviorSanitizer, without torch, and runs each
target for some seconds. With GCC the driver in ``fuzz/driver.cpp`` does the search, with clang libFuzzer does.

``python -m tools.fuzz attention --seconds 900`` searches longer, ``python -m tools.fuzz attention --input FILE`` runs
one case again, ``--sanitizer thread`` looks for data races between the threads of a call instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from tools.instrument import ADDRESS, ROOT, THREAD, copy_project

PROGRAM = "maskops-fuzz"
SANITIZERS = {"address": ADDRESS, "thread": THREAD}


def compiler() -> str:
    """The compiler; the one of the extension's build."""
    return os.environ.get("CXX") or "g++"


def is_clang() -> bool:
    """Whether the compiler brings libFuzzer."""
    return "clang" in subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True).stdout


def graph(build: Path, source: Path, sanitizer: str) -> str:
    """The build.ninja of the fuzzers. Only the operators count their edges, not the harness."""
    flags = f"-std=c++17 {SANITIZERS[sanitizer]} -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra"
    guided, link = "", "-Wl,--wrap=aligned_alloc -pthread"
    if is_clang():
        flags += " -fsanitize=fuzzer-no-link -DMASKOPS_LIBFUZZER"
        link += " -fsanitize=fuzzer"
    elif sanitizer == "address":  # the threads of the other one would share the counters
        guided = "-fsanitize-coverage=trace-pc"
    lines = [
        f"flags = {flags} -Wno-psabi",
        f"rule compile\n  command = {compiler()} $flags $guided -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler()} $flags $in -o $out {link}",
    ]
    objects = []
    of_devices = (source / "csrc/ops/cuda").glob("*.cpp")
    operators = set((source / "csrc").rglob("*.cpp")) - set(of_devices)
    for path in sorted([*operators, *(source / "fuzz").glob("*.cpp")]):
        objects.append(build / path.relative_to(source).with_suffix(".o"))
        lines.append(f"build {objects[-1]}: compile {path}")
        if path.is_relative_to(source / "csrc"):
            lines.append(f"  guided = {guided}")
    lines.append(f"build {build.parent / PROGRAM}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n"


def build(sanitizer: str, place: Path | None = None) -> Path:
    """Builds the fuzzers and returns the program; ``place`` holds the copy of the project and the objects."""
    place = place or ROOT / "build" / f"fuzz-{sanitizer}"
    source = place / "project"
    if place.is_relative_to(ROOT):
        copy_project(source)
    place.mkdir(parents=True, exist_ok=True)
    (place / "build.ninja").write_text(graph(place / "objects", source, sanitizer))
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    result = subprocess.run([*ninja, "-C", str(place)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the fuzzers do not build:\n{result.stdout[-6000:]}")
    return place / PROGRAM


def targets() -> list[str]:
    """Names of the targets, one file each."""
    names = [path.stem for path in (ROOT / "fuzz").glob("*.cpp") if "void fuzz_" in path.read_text()]
    return sorted(names)


def command(program: Path, target: str, seconds: float, seed: int, case: str | None) -> list[str]:
    """How a target is run. Sanitizers of threads need addresses where they expect them."""
    prefix = ["setarch", platform.machine(), "-R"] if "fuzz-thread" in str(program) else []
    if case is not None:
        return [*prefix, str(program), *([] if is_clang() else [target]), case]
    if is_clang():
        return [*prefix, str(program), f"-max_total_time={int(seconds)}", f"-seed={seed}"]
    return [*prefix, str(program), target, "--seconds", str(seconds), "--seed", str(seed)]


def main(arguments: list[str] | None = None) -> int:
    """Builds and searches; 1 where a target found something."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="names of files in fuzz/ that are targets; all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--sanitizer", choices=list(SANITIZERS), default="address")
    parser.add_argument("--input", help="run the one case in this file instead of searching")
    options = parser.parse_args(arguments)
    if platform.system() != "Linux":
        print("fuzz: the harness needs the linker of Linux", file=sys.stderr)
        return 2
    program = build(options.sanitizer)
    found = []
    for target in options.targets or targets():
        environment = {**os.environ, "FUZZ_TARGET": target}
        environment.setdefault("ASAN_OPTIONS", "detect_leaks=0")  # the harness counts what an operator keeps
        run = command(program, target, options.seconds, options.seed, options.input)
        if subprocess.run(run, cwd=program.parent, env=environment).returncode != 0:
            found.append(target)
    if found:
        print(f"fuzz: found something in {', '.join(found)}; inputs lie in {program.parent}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
