"""`bench gpu` on the processor: tiny contests from end to end, what happens around a device with a stand-in for it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskops.cli.bench import machine
from maskops.cli.bench.contests.contest import Contender, Contest, Setting
from maskops.cli.bench.gpu import command, measure, precompile, report, rivals, schedule
from maskops.cli.bench.timing import Timing
from maskops.cli.main import main

CPU = torch.device("cpu")
SETTING = Setting(CPU, torch.float32, small=True)
DEVICE = measure.Device(CPU)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1000.0, 2.0, 3.0))


def measured(contest: Contest, backward: bool = False, **keywords: Any) -> measure.Table:
    return measure.measure(
        contest, backward=backward, device=DEVICE, budget=0.0, min_rounds=2, max_rounds=2, **keywords
    )


def test_the_whole_way_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flex = rivals._flex  # which traces a second for each mask, compiled or not: once is enough
    monkeypatch.setattr(rivals, "_flex", lambda contest: flex(contest) if contest.window is not None else [])
    path = tmp_path / "gpu.json"
    arguments = ["bench", "gpu", "--dry-run", "--json", str(path)]
    assert main([*arguments, "--limit", "0"]) == command.UNFINISHED
    assert json.loads(path.read_text())["tables"] == []
    assert main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(path.read_text())
    assert stored["finished"] and stored["begun"] is None and stored["machine"]["device"]
    entries = list(schedule.contests(SETTING))
    both = [(entry.group, entry.name, mode) for entry in entries for mode in (False, True) if entry.group != "decode"]
    forward_only = [(entry.group, entry.name, False) for entry in entries if entry.group == "decode"]
    assert {(t["group"], t["name"], t["backward"]) for t in stored["tables"]} == {*both, *forward_only}
    for table in stored["tables"]:
        ours = [row for row in table["rows"] if row["ours"]]
        assert ours and all(row["problem"] is None and row["error"] <= 2.0 for row in ours)
        assert table["best"] is not None
        for row in table["rows"]:
            if row["problem"] is None:
                assert row["timing"]["median"] > 0 and (row["tflops"] or row["gigabytes"]) and row["ratio"] > 0
            else:
                # What no processor has, what is not installed, what FlexAttention cannot differentiate here.
                assert row["problem"].startswith("refused:") and row["timing"] is None
    assert "refused: ModuleNotFoundError" in printed and "NaN" not in printed
    assert "BEST OF MASKOPS AGAINST THE BEST PEER" in printed and f"numbers: {path}" in printed

    # Nothing is measured twice; another run begins anew.
    before = path.stat().st_mtime_ns, stored["tables"]
    assert main([*arguments, "--resume"]) == 0
    assert json.loads(path.read_text())["tables"] == before[1]
    assert main([*arguments, "--resume", "--only", "masked softmax", "--seed", "1"]) == 0
    assert {table["group"] for table in json.loads(path.read_text())["tables"]} == {"masked softmax"}


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    assert "torch sees no CUDA device here; --dry-run" in capsys.readouterr().err


def test_names_of_the_contests_are_their_own() -> None:
    for setting in (SETTING, Setting(torch.device("cuda"), torch.bfloat16)):
        entries = list(schedule.contests(setting))
        names = [(entry.group, entry.name) for entry in entries]
        assert len(set(names)) == len(names)
    assert {entry.group for entry in entries} == {entry.group for entry in entries if entry.quick}
    assert {entry.group for entry in entries} == {entry.group for entry in schedule.contests(SETTING)}


def test_compiling_beforehand_launches_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[tuple[int, ...], bool, int]] = []
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    assert {"grid", "warmup"} <= set(inspect.signature(jit.JITFunction.run).parameters)

    class Kernel:
        def run(self, *args: int, grid: tuple[int, ...], warmup: bool, **keywords: int) -> int:
            calls.append((grid, warmup, keywords["num_warps"]))
            return sum(args)

    monkeypatch.setattr(jit, "JITFunction", Kernel)
    with precompile.without_launches():
        assert Kernel().run(1, 2, grid=(3,), warmup=False, num_warps=4) == 3
    Kernel().run(grid=(3,), warmup=False, num_warps=8)
    assert calls == [((3,), True, 4), ((3,), False, 8)]

    ran: list[str] = []
    once = Contender("once", lambda leaves: lambda x: ran.append("once") or x * 2.0, ours=True, compiles=True)
    never = Contender("never", lambda leaves: lambda x: ran.append("never") or x * 2.0)
    failing = dataclasses.replace(REFUSED, compiles=True)
    entries = [schedule.Entry("group", str(n), lambda name: Doubled(once, never, failing)) for n in range(3)]
    failed = precompile.precompile(entries, 1, 2)
    assert ran == ["once", "once"]  # forward, forward and backward, of one of the three
    assert failed == ["group: 1: refused: NotImplementedError: this device\nhas none"]
    assert main(["bench", "gpu", "--dry-run", "--only", "softmax", "--precompile", "0/1"]) == 0
    assert capsys.readouterr().out == "precompiled 1 contests\n"


def contest(**keywords: Any) -> rivals.Attention:
    return rivals.Attention("group", "name", SETTING, heads=4, head_dim=8, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"lengths": [5, 9, 2]},
        {"lengths": [6, 6], "causal": False},
        {"lengths": [12, 3], "window": 4},
        {"lengths": [7, 7], "allowed": torch.eye(7, dtype=torch.bool)},
    ],
)
def test_useful_work_is_the_visible_pairs(keywords: dict[str, Any]) -> None:
    made = contest(**keywords)
    pairs = 0
    for length in keywords["lengths"]:
        row, key = torch.arange(length)[:, None], torch.arange(length)
        seen = torch.ones(length, length, dtype=torch.bool)
        if "allowed" in keywords:
            seen = keywords["allowed"]
        elif made.causal:
            seen = key <= row
        if made.window is not None:
            seen = seen & (row - key <= made.window)
        pairs += int(seen.sum())
    assert made.pairs == pairs
    assert made.flops(False) == 4 * pairs * 4 * 8 and made.flops(True) == 3.5 * made.flops(False)


def test_layouts_hold_the_same_values() -> None:
    made = contest(lengths=[2, 5, 3], kv_heads=2, rows=2)
    samples = []
    for layout in ("packed", "padded", "rows"):
        q, k, v = made.leaves(layout)
        samples.append(made.sample(layout, (q, q, k, v)))
    for sample in samples:
        assert [x.shape for x in sample.values()] == [(2, 5, 8), (2, 5, 8), (1, 5, 8), (1, 5, 8)]
        assert all(torch.equal(sample[name], samples[0][name]) for name in sample)
    assert [x.shape for x in made.leaves("padded")] == [(3, 4, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8)]
    assert made.leaves("rows")[0].shape == (2, 4, 5, 8)


class Doubled(Contest):
    """Twice a tensor: right, wrong, refused, overwriting, slow."""

    group, name, setting = "group", "doubled", SETTING

    def __init__(self, *contenders: Contender) -> None:
        self._contenders = contenders
        self._x = torch.linspace(0.0, 1.0, 8).requires_grad_()

    def contenders(self) -> tuple[Contender, ...]:
        return self._contenders

    def leaves(self, layout: str) -> tuple[Tensor, ...]:
        return (self._x,)

    def sample(self, layout: str, results: Any) -> dict[str, Tensor]:
        return dict(zip(("out", "dx"), (x.double() for x in results), strict=False))

    def exact(self, backward: bool) -> dict[str, Tensor]:
        found = {"out": 2.0 * self._x.detach().double()}
        return {**found, "dx": torch.full_like(found["out"], 2.0)} if backward else found

    plain = exact

    def bytes(self, backward: bool) -> float:
        return 1e9


def _failing(leaves: Any) -> Any:
    raise NotImplementedError("this device\nhas none")


RIGHT = Contender("right", lambda leaves: lambda x: x * 2.0)
OURS = Contender("ours", lambda leaves: lambda x: x + x, ours=True)
WRONG = Contender("wrong", lambda leaves: lambda x: x * 2.01)
REFUSED = Contender("refused", _failing)
PART = Contender("part", lambda leaves: lambda x: x * 2.0, partial=True)
OVERWRITING = Contender("overwriting", lambda leaves: lambda x: x.mul_(2.0), consumes=True)


def test_rows_say_why_they_have_no_speed() -> None:
    begun: list[str] = []
    made = Doubled(RIGHT, OURS, WRONG, REFUSED, PART, OVERWRITING)
    table = measured(made, crashed=["part"], on_contender=begun.append)
    rows = {row.name: row for row in table.rows}
    assert rows["wrong"].problem is not None and rows["wrong"].problem.startswith("WRONG: ")
    assert rows["refused"].problem == "refused: NotImplementedError: this device has none"
    assert rows["part"].problem is not None and rows["part"].problem.startswith("crashed")
    assert begun == ["right", "ours", "wrong", "refused", "overwriting"]
    assert rows["overwriting"].problem is None and torch.equal(made.leaves("")[0], torch.linspace(0.0, 1.0, 8))
    assert table.best in ("right", "overwriting")
    ours = rows["ours"]
    assert ours.ratio == pytest.approx(rows[str(table.best)].seconds / ours.seconds)
    assert ours.gigabytes == pytest.approx(1.0 / ours.seconds) and ours.tflops is None
    assert measured(Doubled(OURS, PART)).best is None
    both = measured(Doubled(RIGHT, WRONG), backward=True)
    assert both.rows[0].problem is None and both.rows[1].problem is not None


def test_a_slow_contender_is_timed_less_often() -> None:
    rounds: list[list[int]] = []

    class Clock(measure.Device):
        def round(self, steps: Any) -> list[tuple[int, float, float | None]]:
            rounds.append([number for number, _ in steps])
            return [(number, 1.0 if len(rounds) == 1 else 1e-3, 1e-4) for number, _ in steps]

    table = measure.measure(
        Doubled(RIGHT, OURS), backward=False, device=Clock(CPU), budget=60.0, min_rounds=2, max_rounds=4
    )
    assert [sorted(entry) for entry in rounds[2:]] == [[0, 1], [0, 1], [1], [1]]
    assert [len(row.timing.seconds) for row in table.rows if row.timing] == [2, 4]
    assert table.rows[0].host == 1e-4


def test_events_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in: nothing waits between the steps, the cache is flushed before each, the device is asked last."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: object) -> float:
            assert log[-1] == "waits" and isinstance(other, Event)
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("waits"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empties"))
    device = measure.Device(torch.device("meta"))
    monkeypatch.setattr(device, "_flushed", types.SimpleNamespace(zero_=lambda: log.append("flush")))
    steps: Any = [(3, (lambda: log.append("renew"), lambda: log.append("run"))), (5, (lambda: None, lambda: None))]
    found = device.round(steps)
    assert [(number, seconds) for number, seconds, _ in found] == [(3, 2e-3), (5, 2e-3)]
    assert log == ["renew", "flush", "event", "run", "event", "flush", "event", "event", "waits"]
    device.settle()
    assert log[-2:] == ["waits", "empties"]


def made_report(**changes: Any) -> report.Report:
    host = machine.describe(CPU, torch.float32)
    return report.Report(host, {"capability": "9.0"}, {"mode": "full", "dtype": "bfloat16"}, **changes)


def test_a_process_that_ended_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    ended = made_report(begun=["group", "doubled", "forward", "ours"])
    ended.write(path)
    resumed = made_report()
    assert resumed.resume(path) and resumed.crashed == [["group", "doubled", "forward", "ours"]]
    entry = schedule.Entry("group", "doubled", lambda name: Doubled(RIGHT, OURS))
    assert command.execute(resumed, [entry], SETTING, path=path)
    forward, both = resumed.tables
    assert [row.problem is None for row in forward.rows] == [True, False]
    assert [row.problem is None for row in both.rows] == [True, True]
    assert resumed.problems() == ["group: doubled: ours: crashed: it ended the process, or never came back"]
    again = made_report()
    assert again.resume(path) and again.tables == resumed.tables
    other = made_report()
    other.settings["mode"] = "quick"
    assert not other.resume(path) and not other.resume(tmp_path / "none.json")


def row(name: str, seconds: float, tflops: float, **changes: Any) -> measure.Row:
    return measure.Row(
        name, ours=name == "ours", habit=False, partial=False, error=0.5, timing=Timing((seconds,)), tflops=tflops,
        ratio=1.5, **changes
    )  # fmt: skip


def test_the_summary_derives_the_backward_pass() -> None:
    tables = [
        measure.Table("attention", "causal", False, (row("SDPA", 2e-3, 200.0), row("ours", 1e-3, 400.0)), "SDPA"),
        measure.Table("attention", "causal", True, (row("SDPA", 9e-3, 140.0), row("ours", 5e-3, 280.0)), "SDPA"),
    ]
    head, line = report.summary(tables)
    assert line == ["attention: causal", "TFLOP/s", "400", "1.50x", "250", "280", "1.50x", "SDPA"]
    assert head[4] == "backward"
    printed = report.render(made_report(tables=tables, finished=True))
    assert "capability 9.0" in printed and "(not finished)" not in printed
    lines = [line for line in printed.splitlines() if not line.lstrip().startswith("command")]  # pytest's own, here
    assert max(map(len, lines)) <= 140


def test_signatures_of_packed_attention_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    given: dict[str, Any] = {}

    def newer(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        given.update(window=window_size, gqa=enable_gqa)

    def older(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        given.update(is_causal=is_causal)

    window = contest(lengths=[4, 9], window=3, kv_heads=2)
    for signature, made, expected in (
        (newer, window, {"window": (3, 0), "gqa": True}),
        (newer, contest(lengths=[4, 4], causal=False), {"window": (-1, -1), "gqa": False}),
        (older, contest(lengths=[4, 9]), {"is_causal": True}),
    ):
        given.clear()
        monkeypatch.setattr(varlen, "varlen_attn", signature)
        (contender,) = rivals._varlen(made)
        leaves = made.leaves(contender.layout)
        contender.make(leaves)(*leaves)
        assert given == expected
    with pytest.raises(NotImplementedError, match="has no window_size"):
        rivals._varlen(window)[0].make(())


def test_a_file_for_each_device() -> None:
    assert report.file_name("NVIDIA H100 80GB HBM3") == "gpu-nvidia-h100-80gb-hbm3.json"
