"""`python -m tools.sanitize`: the suite on builds of the extension that watch memory, undefined behaviour and threads.

* ``address``: AddressSanitizer and UndefinedBehaviorSanitizer. Tensors come from the sanitizer's allocator, so that an
  access of one element too many is seen, by a vector load as well. New memory holds 0xff, NaN.
* ``thread``: ThreadSanitizer, with three threads of its own to a call (``tools/threads.cpp``).

Both builds share every problem between threads, however small (``tools/instrument.py``), and work on a copy.
``--prove`` breaks the kernels on purpose and shows that the builds notice: a store beside its buffer, a load past the
end, an overflow, and two threads that write to one place.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools.instrument import ADDRESS, ROOT, THREAD, build_extension, copy_project, runtime

WORKERS = 2
REPORT = re.compile(r"^.*(?:ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer).*$", re.M)

# Every file that calls a kernel directly; the others reach the same kernels through more Python.
KERNELS = (
    "test_attention*.py",
    "test_cross_entropy*.py",
    "test_decode*.py",
    "test_fuzz*.py",
    "test_hostile.py",
    "test_linear_cross_entropy*.py",
    "test_memory.py",
    "test_merge*.py",
    "test_plan.py",
    "test_softmax*.py",
)


@dataclass(frozen=True)
class Build:
    """One of the two.

    Attributes:
        flags: for the compiler.
        runtimes: what has to be loaded before Python.
        options: environment of the runs; {folder} is where reports go.
        tests: which of the tests in these files it runs, as pytest's -k takes it; all by default.
    """

    flags: str
    runtimes: tuple[str, ...]
    options: dict[str, str]
    tests: str = ""


# Leaks: Python and torch keep what lives as long as the process; the fuzzers count what an operator keeps.
_ADDRESS_OPTIONS = (
    "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:allocator_may_return_null=1:"
    "detect_odr_violation=0:log_path={folder}/report"
)
# Without the sanitizer's eyes inside torch and Python, their accesses are not judged, only ours.
_THREAD_OPTIONS = "ignore_noninstrumented_modules=1:halt_on_error=0:exitcode=66:log_path={folder}/report"
BUILDS = {
    "address": Build(
        ADDRESS,
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": _ADDRESS_OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1:log_path={folder}/report"},
    ),
    # Shapes of the others hardly differ in how tasks share memory, and each costs ten times what it does elsewhere.
    "thread": Build(THREAD, ("libtsan.so",), {"TSAN_OPTIONS": _THREAD_OPTIONS}, "thread or hostile"),
}


@dataclass(frozen=True)
class Break:
    """A bug made on purpose: what the builds have to notice."""

    name: str
    build: str
    file: str
    old: str
    new: str
    tests: str


BREAKS = (
    Break(
        "a store one vector beside the buffer",
        "address",
        "csrc/cpu/attention_backward.inc",
        "scratch.sums = floats(owned_keys * (head_width + value_width));",
        "scratch.sums = floats(owned_keys * (head_width + value_width) - W);",
        "tests/test_hostile.py",
    ),
    Break(
        "a load of one element past the end of a row",
        "address",
        "csrc/cpu/cross_entropy.inc",
        "for (; i < n; i++) buffer[i] = to_float(x[i]);\n  for (; i < CE_BLOCK; i++)",
        "for (; i < n; i++) buffer[i] = to_float(x[i + 1]);\n  for (; i < CE_BLOCK; i++)",
        "tests/test_cross_entropy.py",
    ),
    Break(
        "a sum that overflows",
        "address",
        "csrc/cpu/plan_spans.cpp",
        "diag_[i] = base + slope * static_cast<int32_t>(i);",
        "diag_[i] = base + slope * static_cast<int32_t>(i) * INT32_MAX;",
        "tests/test_plan.py",
    ),
    Break(
        "two threads that write to one place",
        "thread",
        "csrc/cpu/attention.cpp",
        "table.attention_backward(p, *task, next, scratch[worker].get());",
        "table.attention_backward(p, *task, next, scratch[0].get()); (void)worker;",
        "tests/test_hostile.py",
    ),
)


def files(root: Path) -> list[str]:
    """The test files that the builds run."""
    return sorted({f"tests/{path.name}" for pattern in KERNELS for path in (root / "tests").glob(pattern)})


def preload(name: str, build: Build, folder: Path) -> str:
    """What LD_PRELOAD is for a build."""
    libraries = [runtime(library) for library in build.runtimes]
    if name == "thread":
        shim = folder / "threads.so"
        compiler = os.environ.get("CXX") or "g++"
        flags = [*build.flags.split(), "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*compiler.split(), *flags, str(ROOT / "tools/threads.cpp"), "-o", str(shim)], check=True)
        libraries.append(str(shim))
    return ":".join(libraries)


def start(name: str, build: Build, root: Path, folder: Path, tests: list[str]) -> subprocess.Popen[str]:
    """pytest on some test files, in the copy, with the sanitizer's runtime."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"}
    environment |= {key: value.format(folder=folder) for key, value in build.options.items()}
    environment["LD_PRELOAD"] = preload(name, build, folder)
    prefix = ["setarch", platform.machine(), "-R"] if name == "thread" else []  # addresses where the sanitizer looks
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", build.tests]
    # The sanitizer of undefined behaviour writes to standard error and ends the process: pytest must not hold it back.
    # CUDA kernels run as host code on stacks of their own, which no sanitizer knows; they are not what is built here.
    command += ["--capture=sys", "--no-emulation", *tests]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(name: str, root: Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests on a build, on two processes; the number that passed, and what was wrong: nothing is ""."""
    build = BUILDS[name]
    passed, wrong = 0, ""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # The longest files first, each to the process that has less so far.
        shares: list[list[str]] = [[] for _ in range(min(WORKERS, len(tests)))]
        sizes = [0] * len(shares)
        for test in sorted(tests, key=lambda test: -(root / test).stat().st_size):
            least = sizes.index(min(sizes))
            shares[least].append(test)
            sizes[least] += (root / test).stat().st_size
        processes = [start(name, build, root, folder, share) for share in shares]
        for process in processes:
            output = process.communicate()[0]
            summary = re.findall(r"(\d+) passed", output)
            passed += int(summary[-1]) if summary else 0
            if process.returncode not in (0, 5):  # 5: none of its tests was chosen
                said = REPORT.search(output)
                shown = output[said.start() :][:6000] if said else output[-3000:]
                wrong += f"{shown}\n(the process ended with {process.returncode})\n"
        for report in sorted(folder.glob("report*")):
            text = report.read_text(errors="replace")
            if REPORT.search(text):
                wrong += text[:6000]
    return passed, wrong


def check(name: str) -> bool:
    """Builds and runs the suite; prints one line, and what was found where something was."""
    begin = time.monotonic()
    root = ROOT / "build" / f"sanitize-{name}" / "project"
    copy_project(root)
    build_extension(root, BUILDS[name].flags)
    built = time.monotonic()
    tests = files(root)
    passed, wrong = run(name, root, tests)
    if wrong:
        print(wrong, file=sys.stderr)
    verdict = "FOUND SOMETHING" if wrong else "nothing found"
    print(
        f"sanitize {name}: {passed} tests of {len(tests)} files passed, {verdict} "
        f"(build {built - begin:.0f} s, tests {time.monotonic() - built:.0f} s)",
        flush=True,
    )
    return not wrong and passed > 0


def prove(chosen: list[str]) -> bool:
    """Breaks a copy on purpose, one bug at a time; True if each was reported by its sanitizer."""
    all_seen = True
    for bug in BREAKS:
        if bug.build not in chosen:
            continue
        root = ROOT / "build" / f"sanitize-{bug.build}" / "project"
        copy_project(root)
        path = root / bug.file
        text = path.read_text()
        if text.count(bug.old) != 1:
            raise ValueError(f"{bug.name}: {bug.old!r} stands {text.count(bug.old)} times in {bug.file}, not once")
        path.write_text(text.replace(bug.old, bug.new))
        try:
            build_extension(root, BUILDS[bug.build].flags)
            _, wrong = run(bug.build, root, [bug.tests])
        finally:
            path.write_text(text)
        report = REPORT.search(wrong)
        all_seen = all_seen and report is not None
        print(f"sanitize {bug.build}: {bug.name}: {report.group(0)[:120] if report else 'NOT SEEN'}", flush=True)
    return all_seen


def main(arguments: list[str] | None = None) -> int:
    """Runs the builds; 1 where one found something, or a proof was not seen."""
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("builds", nargs="*", help=f"some of {', '.join(BUILDS)}; all by default")
    parser.add_argument("--prove", action="store_true", help="break the kernels on purpose instead")
    options = parser.parse_args(arguments)
    chosen = options.builds or list(BUILDS)
    if unknown := [name for name in chosen if name not in BUILDS]:
        parser.error(f"there is no build {unknown[0]!r}")
    if platform.system() != "Linux":
        print("sanitize: needs Linux, where a library can be loaded before Python", file=sys.stderr)
        return 2
    if options.prove:
        return 0 if prove(chosen) else 1
    verdicts = [check(name) for name in chosen]  # the second says what it finds whatever the first has found
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
