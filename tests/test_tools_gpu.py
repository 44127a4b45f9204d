"""`make gpu` without a GPU: stages that pass, fail, hang, wish to go on; what is kept of them; its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskops.cli.main import parser
from tools import gpu
from tools.gpu import ROOT, STAGES, Options, Result, Stage, State

NOTHING: dict[str, Any] = {"says": "nothing"}


def options(folder: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {"dry": True, "quick": False, "processes": 2, "folder": folder, "results": folder}
    return Options(**{**values, **changes})


def python(code: str) -> Callable[[Options], gpu.Commands]:
    return lambda options: [[sys.executable, "-c", code]]


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        Stage("bad", "fails", python("print('3 failed, 2 passed in 1.2s'); raise SystemExit(1)")),
        Stage("good", "passes", python("import os; print(os.environ['COLOUR'])"), environment={"COLOUR": "blue"}),
        Stage("absent", "cannot", python(""), lacking=lambda options: "it is not installed"),
        Stage("missing", "no such program", lambda options: [["/no/such/program"]]),
        Stage("lenient", "counts for nothing", python("raise SystemExit(1)"), lenient=True),
    ]
    state = gpu.run(stages, options(tmp_path))
    found = {name: (result.outcome, result.detail) for name, result in state.results.items()}
    assert found["bad"] == (gpu.FAILED, "3 failed, 2 passed in 1.2s")
    assert found["good"] == (gpu.PASSED, "blue")
    assert found["absent"] == (gpu.SKIPPED, "it is not installed")
    assert found["missing"][0] == gpu.FAILED and "No such file" in found["missing"][1]
    assert found["lenient"][0] == gpu.PASSED
    printed = gpu.table(stages, state)
    assert "bad      FAILED" in printed and "it is not installed" in printed
    assert "bad: fails" in capsys.readouterr().out


def test_what_has_passed_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x')"
    stages = [Stage("one", "counts", python(code)), Stage("two", "fails", python(code + "; raise SystemExit(2)"))]
    gpu.run(stages, options(tmp_path))
    gpu.run(stages, options(tmp_path))
    assert count.read_text() == "xxx"  # the one that failed ran twice
    gpu.run(stages[:1], options(tmp_path), again=True)
    assert count.read_text() == "xxxx"
    monkeypatch.setattr(gpu, "fingerprint", lambda: "other sources")
    gpu.run(stages[:1], options(tmp_path))
    assert count.read_text() == "xxxxx"
    assert json.loads((tmp_path / "state.json").read_text())["sources"] == "other sources"


def test_a_stage_that_wants_to_go_on_is_called_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = (
        f"import pathlib; p = pathlib.Path({str(count)!r}); n = int(p.read_text()) if p.exists() else 0; "
        f"p.write_text(str(n + 1)); raise SystemExit({gpu.GO_ON} if n < 2 else 0)"
    )
    stage = Stage("slow", "three parts", python(code))
    assert gpu.run([stage], options(tmp_path)).results["slow"].outcome == gpu.PASSED
    assert count.read_text() == "3"
    never = Stage("never", "no end", python(f"raise SystemExit({gpu.GO_ON})"))
    assert gpu.run([never], options(tmp_path), limit=0.3).results["never"].outcome == gpu.UNFINISHED


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    result = gpu.run_stage(Stage("hangs", "", python(code), limit=1.5), options(tmp_path))
    assert result.outcome == gpu.LATE and result.seconds < 30
    number = int(child.read_text())
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(number, 9)
    pytest.fail("the child of a stage that was ended lives on")


def test_commands_at_a_time_are_as_good_as_the_worst(tmp_path: Path) -> None:
    def commands(*codes: int) -> Callable[[Options], gpu.Commands]:
        return lambda options: [[sys.executable, "-c", f"raise SystemExit({code})"] for code in codes]

    for codes, outcome in (((0, 0), gpu.PASSED), ((0, 3), gpu.UNFINISHED), ((1, 3), gpu.FAILED)):
        assert gpu.run_stage(Stage("x", "", commands(*codes), at_once=True), options(tmp_path)).outcome == outcome


def test_the_state_survives_a_process(tmp_path: Path) -> None:
    state = State(tmp_path / "state.json", "sources")
    state.keep("smoke", Result(gpu.PASSED, 1.5, "7 passed"))
    assert State.read(state.path, "sources").results == state.results
    assert State.read(state.path, "others").results == {}


def test_the_fingerprint_is_that_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "x.cu"
    source.write_text("a")
    (tmp_path / "setup.py").write_text("b")
    first = gpu.fingerprint(tmp_path)
    (tmp_path / "csrc" / "x.o").write_text("an object")
    assert gpu.fingerprint(tmp_path) == first
    source.write_text("c")
    assert gpu.fingerprint(tmp_path) != first
    assert gpu.fingerprint() == gpu.fingerprint()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x\n== 3 failed, 200 passed, 4 skipped in 61.20s (0:01:01) ==\n", "3 failed, 200 passed, 4 skipped in 61.20s"),
        ("7 passed in 0.40s\nlater\n", "7 passed in 0.40s"),
        ("first\nlast words\n\n", "last words"),
        ("", ""),
    ],
)
def test_the_line_that_says_most(text: str, line: str) -> None:
    assert gpu.closing_line(text).startswith(line)


@pytest.mark.parametrize("dry", [True, False])
def test_every_command_is_one_that_exists(tmp_path: Path, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_device_name", lambda options: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    names = set()
    for stage in STAGES:
        assert stage.limit < 600
        for command in stage.commands(options(tmp_path, dry=dry, quick=True)):
            if command[0] != sys.executable:
                assert command[:2] == ["/cuda/bin/compute-sanitizer", "--tool"] and command[2] == stage.name
                command = command[command.index(sys.executable) :]
            if command[1:3] == ["-m", "maskops"]:
                parser().parse_args(command[3:])
            elif command[1:3] == ["-m", "pytest"]:
                files = [word for word in command if word.startswith("tests/")]
                assert all((ROOT / name).exists() for name in files)
                assert files or stage.name == "cpu-suite"
                names.update(files if stage.name.startswith("suite") else [])
                assert ("cuda" in command) == (not dry and stage.name != "cpu-suite")
            else:
                assert command[1] in ("setup.py", "-c")
    assert names == set(gpu._tests_of_devices())
    (measuring,) = next(stage for stage in STAGES if stage.name == "bench").commands(options(tmp_path, dry=False))
    assert measuring[-1].endswith("gpu-nvidia-h100-80gb-hbm3.json")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passing = Stage("smoke", "passes", python("print('fine')"))
    failing = Stage("bench", "fails", python("raise SystemExit(1)"))
    monkeypatch.setattr(gpu, "STAGES", (passing, failing))
    folder = ["--dry-run", "--folder", str(tmp_path)]
    assert gpu.main([*folder, "--stage", "smoke"]) == 0
    assert "smoke  passed" in capsys.readouterr().out
    assert gpu.main(folder) == 1
    assert gpu.main([*folder, "--limit", "-1", "--again"]) == 1  # nothing was begun, and one has failed
    assert str(tmp_path) in capsys.readouterr().out


def test_make_gpu_asks_for_nothing_else() -> None:
    # Without what a make that runs the suite says to the one here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "gpu", "PYTHON=python3"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout.split() == ["python3", "-m", "tools.gpu"]
