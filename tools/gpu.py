"""Verifies and measures everything on a machine with a GPU: `make gpu`, or `python3 -m tools.gpu [--stage NAME]`.

Needs no network and no virtual environment: a python3 with torch, Triton and pytest, and nvcc for the CUDA half. Each
stage ends in less than ten minutes, by itself or by its time limit; what has passed is kept in a file and not done
again until a source changes; a stage that fails does not stop the others. A run that is cut off goes on where it was.

`--dry-run` goes through the same stages on a machine without a GPU: the same commands with tiny shapes on the
processor, and of the suite only its selection.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "maskops", "tests", "tools", "setup.py", "pyproject.toml")
PASSED, FAILED, LATE, SKIPPED, UNFINISHED = "passed", "FAILED", "TIMED OUT", "skipped", "unfinished"
GO_ON = 3
"""Exit status of a command that did a part of its work and wants to be called again."""

_CALLS_AGAIN = 12
_CLOSING = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+ in [\d.:hms ()]+)", re.M)
"""The closing line of pytest."""


@dataclass(frozen=True)
class Options:
    """How a run differs from another.

    Attributes:
        dry: On the processor, tiny.
        quick: The quick benchmark.
        processes: That compile or test at a time.
        folder: State and logs.
        results: Where the figures are written.
        python: The interpreter of all commands.
    """

    dry: bool
    quick: bool
    processes: int
    folder: Path
    results: Path
    python: str = sys.executable


Commands = list[list[str]]


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: What `--stage` takes.
        says: What it is for, a few words.
        commands: Run one after another, or all at a time.
        limit: Seconds, after which everything it started is ended.
        at_once: Whether the commands run at a time.
        environment: Variables of the commands.
        lacking: Why this machine cannot do it, None if it can.
        lenient: Exit statuses of its commands mean nothing: what they leave behind is what counts.
    """

    name: str
    says: str
    commands: Callable[[Options], Commands]
    limit: float = 590.0
    at_once: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    lacking: Callable[[Options], str | None] = lambda options: None
    lenient: bool = False


@dataclass(frozen=True)
class Result:
    """How a stage ended, after how many seconds, and the line of its log that says most."""

    outcome: str
    seconds: float
    detail: str


# ---- stages ----------------------------------------------------------------------------------------------------------


def _pytest(options: Options, *arguments: str, parallel: bool = True) -> list[str]:
    """With the plugins that are asked for alone: what else is installed is not under test, nor are its warnings."""
    command = [options.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-W", "default", "-W", "error::maskops.BackendFallbackWarning"]
    if parallel and importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist.plugin", "-n", str(options.processes)]
    return [*command, *arguments]


def _on_device(options: Options, *arguments: str, parallel: bool = True) -> list[str]:
    if options.dry:
        return _pytest(options, "--device", "meta", "--collect-only", *arguments, parallel=False)
    return _pytest(options, "--device", "cuda", *arguments, parallel=parallel)


def _tests_of_devices() -> list[str]:
    """Files with tests that are for every device."""
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if "mark.devices" in path.read_text(encoding="utf-8")]


def _part(chosen: str) -> list[str]:
    """The files of one stage of the suite."""
    attention, losses = re.compile("attention|decode"), re.compile("cross_entropy|loss|softmax")
    files = _tests_of_devices()
    parts = {
        "attention": [name for name in files if attention.search(name)],
        "losses": [name for name in files if losses.search(name) and not attention.search(name)],
    }
    parts["rest"] = [name for name in files if not any(name in part for part in parts.values())]
    return parts[chosen]


def _suite(part: str) -> Callable[[Options], Commands]:
    return lambda options: [_on_device(options, *_part(part))]


def _build(options: Options) -> Commands:
    wanted = "['cpu']" if options.dry else "['cpu', 'triton', 'cuda']"
    # Without its kernels a machine would pass what it has not run.
    check = (
        "import maskops; found = maskops.backends(); print(found); "
        f"assert all(found[name] == 'available' for name in {wanted}), found"
    )
    return [[options.python, "setup.py", "-q", "build_ext", "--inplace"], [options.python, "-c", check]]


def _smoke(options: Options) -> Commands:
    if options.dry:
        return [_pytest(options, "-m", "gpu_smoke", "tests/test_gpu_smoke.py", parallel=False)]
    return [_on_device(options, "-m", "gpu_smoke", *_tests_of_devices())]


def _precompile_suite(options: Options) -> Commands:
    return [_on_device(options, "--precompile", *_tests_of_devices())]


def _bench(options: Options, *arguments: str) -> list[str]:
    command = [options.python, "-m", "maskops", "bench", "gpu", *arguments]
    return [*command, *(["--dry-run", "--only", "softmax"] if options.dry else ["--quick"] if options.quick else [])]


def _precompile_bench(options: Options) -> Commands:
    count = 1 if options.dry else options.processes
    return [_bench(options, "--precompile", f"{part}/{count}") for part in range(count)]


def _measure(options: Options) -> Commands:
    path = options.results / _file_name("gpu", _device_name(options))
    return [_bench(options, "--resume", "--limit", "420", "--json", str(path))]


def _graphs(options: Options) -> Commands:
    if options.dry:
        return [_pytest(options, "tests/test_graphs.py", parallel=False)]
    return [_on_device(options, "tests/test_graphs.py", parallel=False)]


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def _no_sanitizer(options: Options) -> str | None:
    if options.dry:
        return "a dry run has no device to watch"
    return None if _sanitizer() else "compute-sanitizer is not installed"


def _watched(tool: str) -> Callable[[Options], Commands]:
    def commands(options: Options) -> Commands:
        inner = _on_device(options, "-m", "gpu_smoke", "tests/test_gpu_smoke.py", parallel=False)
        return [[str(_sanitizer()), "--tool", tool, "--error-exitcode", "9", *inner]]

    return commands


def _cpu_suite(options: Options) -> Commands:
    return [_pytest(options, *(["tests/test_gpu_smoke.py"] if options.dry else []), parallel=not options.dry)]


def _cpu_bench(options: Options) -> Commands:
    path = options.results / _file_name("cpu", _processor_name())
    return [[options.python, "-m", "maskops", "bench", "--json", str(path)]]


def _not_dry(options: Options) -> str | None:
    return "a dry run times nothing" if options.dry else None


_HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
# Every allocation by itself, so that an access behind its end is one outside of all of them.
_APART = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

STAGES = (
    Stage("build", "the extension in place, both halves", _build, environment={"MASKOPS_BUILD": "require"}),
    Stage("smoke", "one small case of each op, backend and pass", _smoke, limit=300.0),
    Stage("precompile-suite", "Triton kernels of the suite, compiled only", _precompile_suite, lenient=True),
    Stage("precompile-bench", "kernels of the benchmark, compiled only", _precompile_bench, at_once=True, lenient=True),
    Stage("suite-attention", "the suite on the device: attention, decode", _suite("attention")),
    Stage("suite-losses", "the suite on the device: losses, softmax", _suite("losses")),
    Stage("suite-rest", "the suite on the device: all the rest", _suite("rest")),
    Stage("graphs", "forward and backward captured, replayed", _graphs, limit=300.0),
    Stage("memcheck", "accesses out of bounds", _watched("memcheck"), lacking=_no_sanitizer, environment=_APART),
    Stage("racecheck", "races in shared memory", _watched("racecheck"), lacking=_no_sanitizer),
    Stage("synccheck", "barriers", _watched("synccheck"), lacking=_no_sanitizer),
    Stage("bench", "every kernel against the best peer", _measure),
    Stage("cpu-suite", "the suite on this machine's processor", _cpu_suite, environment=_HIDDEN),
    Stage("cpu-bench", "the benchmark on this machine's processor", _cpu_bench, environment=_HIDDEN, lacking=_not_dry),
)


def _file_name(kind: str, device: str) -> str:
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _device_name(options: Options) -> str:
    if options.dry:
        return "dry run"
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([options.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "processor")


# ---- running ---------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, options: Options) -> Result:
    """Runs a stage to its end, its failure or its time limit; a command that wants to go on is called again."""
    if reason := stage.lacking(options):
        return Result(SKIPPED, 0.0, reason)
    started = time.monotonic()
    log = options.folder / f"{stage.name}.log"
    outcome = FAILED
    with log.open("w", encoding="utf-8") as stream:
        try:
            commands = stage.commands(options)
            groups = [commands] if stage.at_once else [[command] for command in commands]
            for group in groups:
                left = stage.limit - (time.monotonic() - started)
                outcome = _run(group, stage.environment, stream.fileno(), left)
                if stage.lenient and outcome in (FAILED, UNFINISHED):
                    outcome = PASSED
                if outcome != PASSED:
                    break
        except (OSError, subprocess.SubprocessError) as error:
            stream.write(f"\n{type(error).__name__}: {error}\n")
    return Result(outcome, time.monotonic() - started, closing_line(log.read_text(encoding="utf-8", errors="replace")))


def _run(commands: Commands, environment: dict[str, str], log: int, limit: float) -> str:
    """Runs commands at a time; how the worst of them ended."""
    variables = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", **environment}
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        for command in commands
    ]
    deadline = time.monotonic() + limit
    try:
        codes = [process.wait(max(deadline - time.monotonic(), 0.0)) for process in running]
    except subprocess.TimeoutExpired:
        return LATE
    finally:
        for process in running:
            end_group(process)
    if all(code == 0 for code in codes):
        return PASSED
    return UNFINISHED if set(codes) <= {0, GO_ON} else FAILED


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and everything that it has started and left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            # It leads a group of its own, so that this number is that of the group as long as a member lives.
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def closing_line(text: str) -> str:
    """The line of a log that says most: pytest's last one, else the last one that is not empty."""
    counts = _CLOSING.findall(text)
    if counts:
        return str(counts[-1]).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


# ---- state -----------------------------------------------------------------------------------------------------------


def fingerprint(root: Path = ROOT) -> str:
    """Changes with any source that a stage runs."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".toml") and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass
class State:
    """What is known about each stage, and of which sources."""

    path: Path
    sources: str
    results: dict[str, Result] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, sources: str) -> State:
        """What an earlier run has left; nothing if it was of other sources."""
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["sources"] == sources:
                return cls(path, sources, {name: Result(**entry) for name, entry in stored["stages"].items()})
        return cls(path, sources)

    def keep(self, name: str, result: Result) -> None:
        """Writes a result down before the next stage begins."""
        self.results[name] = result
        stages = {key: dataclasses.asdict(value) for key, value in self.results.items()}
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"sources": self.sources, "stages": stages}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def run(stages: Sequence[Stage], options: Options, *, again: bool = False, limit: float | None = None) -> State:
    """Runs the stages that have not passed yet, in order.

    Args:
        stages: The chosen ones.
        options: How.
        again: Those that have passed, too.
        limit: No stage begins after so many seconds.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    state = State.read(options.folder / "state.json", fingerprint())
    started = time.monotonic()
    for stage in stages:
        known = state.results.get(stage.name)
        if known is not None and known.outcome == PASSED and not again:
            continue
        for _ in range(_CALLS_AGAIN):
            if limit is not None and time.monotonic() - started > limit:
                return state
            print(f"{stage.name}: {stage.says}", flush=True)
            result = run_stage(stage, options)
            state.keep(stage.name, result)
            print(f"  {result.outcome} after {result.seconds:.0f} s: {result.detail}", flush=True)
            if result.outcome != UNFINISHED:
                break
    return state


def table(stages: Iterable[Stage], state: State) -> str:
    """A line a stage."""
    rows = [("stage", "outcome", "s", "")]
    for stage in stages:
        result = state.results.get(stage.name, Result("not run", 0.0, ""))
        rows.append((stage.name, result.outcome, f"{result.seconds:.0f}", result.detail))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:{widths[0]}}  {outcome:{widths[1]}}  {seconds:>{widths[2]}}  {detail}".rstrip()
        for name, outcome, seconds, detail in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for; 0 if every stage of it passed or was skipped for a reason."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.gpu", description=__doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", choices=names, help="only this one (may be given again)")
    parser.add_argument("--again", action="store_true", help="stages that have passed, too")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no stage after so long")
    parser.add_argument("--quick", action="store_true", help="the quick benchmark")
    parser.add_argument("--dry-run", action="store_true", help="without a device")
    parser.add_argument("--processes", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 2)), metavar="N")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="state and logs")
    parser.add_argument("--results", type=Path, help="figures (default: benchmarks/results; of a dry run, the folder)")
    options = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if options.stage is None or stage.name in options.stage]
    results = options.results or (options.folder if options.dry_run else ROOT / "benchmarks" / "results")
    settings = Options(options.dry_run, options.quick, options.processes, options.folder, results)
    state = run(chosen, settings, again=options.again, limit=options.limit)
    print(f"\n{table(chosen, state)}\n\nlogs and state: {settings.folder}")
    ended = [state.results.get(stage.name) for stage in chosen]
    return 0 if all(result is not None and result.outcome in (PASSED, SKIPPED) for result in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
