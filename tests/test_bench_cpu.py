"""`bench cpu`: tiny contests from end to end, and what figures hang on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from maskops import extension
from maskops.cli.bench import chart as charts
from maskops.cli.bench import machine, others
from maskops.cli.bench.contests.contest import Contender, Contest, Setting
from maskops.cli.bench.cpu import attention, chart, command, helper, limits, losses, measure, report, rounds
from maskops.cli.bench.cpu.contest import HUGE_PAGES, Entry, Goal, Line
from maskops.cli.bench.timing import Timing
from maskops.cli.main import main
from maskops.testing.check import SLACK

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=f"extension: {extension.reason()}")

CPU = torch.device("cpu")
TINY = Setting(CPU, torch.float32, small=True)
PACE = rounds.Pace(
    budget=0.0, min_rounds=2, max_rounds=2, stretch=9.0, discards=1, patience=9.0, compiled=True, late=9.0
)
STEADY = dict(zip(limits.LIMITS, (100.0, 200.0, 10.0, 20.0, 5.0, 30.0, 40.0), strict=True))


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1000.0, 2.0, 3.0))


def tiny(contest: Contest, mode: Any = "training", limit: Any = None) -> Entry:
    ours = [each.name for each in contest.contenders() if each.ours]
    theirs = tuple(each.name for each in contest.contenders() if not each.ours)
    lines = tuple(Line(name, name, (Goal(theirs, 1.0),), limit) for name in ours)
    return Entry("group", lambda: contest, lines, mode)


def of_attention(lengths: list[int], **keywords: Any) -> attention.Attention:
    return attention.Attention("", "", dataclasses.replace(TINY, dtype=keywords.pop("dtype", torch.float32)), lengths,
                               heads=4, head_dim=8, **keywords)  # fmt: skip


@pytest.mark.parametrize(
    "make, mode, limit",
    [
        (lambda: of_attention([6, 6]), "training", "multiply-add"),
        (lambda: of_attention([6, 6], causal=False, kv_heads=2), "forward", "multiply-add"),
        (lambda: of_attention([600], window=40), "forward", "multiply-add"),
        (lambda: of_attention([5, 9, 2], dtype=torch.bfloat16), "training", "multiply-add"),
        (lambda: attention.Decode(TINY, 2, 4, 2, 16, 8, False, ""), "forward", "read"),
        (lambda: losses.Loss(TINY, 16, 40, 0.75, ""), "training", "copy + touch"),
        (lambda: losses.LinearLoss(dataclasses.replace(TINY, dtype=torch.bfloat16), 16, 8, 40, 0.5, ""), "training",
         "multiply-add"),
        (lambda: losses.Softmax(TINY, 2, 2, 8, True, ""), "training", "copy + touch"),
        (lambda: losses.Softmax(TINY, 2, 2, 8, False, ""), "graph", "copy"),
    ],
)  # fmt: skip
def test_every_contender_computes_the_same(make: Any, mode: Any, limit: Any) -> None:
    result = measure.measure(tiny(make(), mode, limit), PACE, lambda names: STEADY, None)
    for row in result.rows:
        assert row.problem is None, row
        assert row.timing is not None and len(row.timing.seconds) == 2
        assert row.error is None if row.name == losses.UNMASKED else (row.error is not None and row.error <= 2.0)
    for outcome in result.outcomes:
        assert outcome.share is not None and outcome.share > 0.0
        assert outcome.best.ratio is not None and outcome.reached[0].peer is not None


class Doubled(Contest):
    """Twice a tensor."""

    group, name, setting = "group", "doubled", TINY

    def __init__(self, *contenders: Contender) -> None:
        self._contenders = contenders
        self._x = torch.linspace(0.0, 1.0, 1 << 14).requires_grad_()

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

    def written(self, backward: bool) -> float:
        return 5e8


def _failing(leaves: Any) -> Any:
    raise NotImplementedError("this machine\nhas none")


OURS = Contender("ours", lambda leaves: lambda x: x + x, ours=True)
PEER = Contender("peer", lambda leaves: lambda x: x * 2.0)
WRONG = Contender("wrong", lambda leaves: lambda x: x * 2.01)
REFUSED = Contender("refused", _failing)
COMPILED = Contender("compiled", lambda leaves: lambda x: x * 2.0, compiles=True)


class StandIn:
    """A helper whose runs take as long as it says."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prepare(self, entry: Entry, contender: str) -> measure.Row:
        self.asked.append(f"prepare {contender}")
        return measure.Row(contender, False, memory=4, floor=2)

    def run(self, contender: str, warms: bool) -> float:
        self.asked.append(f"run {contender}")
        return 1.0


def doubled(*goals: Goal, contenders: tuple[Contender, ...] = (OURS, PEER, WRONG, REFUSED, COMPILED)) -> Entry:
    lines = (Line("twice", "ours", goals, "copy + touch", 0.5, memory=1e-9),)
    return Entry("group", lambda: Doubled(*contenders), lines)


def executed(*chosen: Entry, pace: measure.Pace = PACE) -> report.CpuReport:
    return command.execute(chosen, pace, lambda names: STEADY, StandIn(), mode="quick", seed=0)


def test_goals_are_held_against_the_quickest_that_is_right(tmp_path: Path) -> None:
    slow = Goal(("peer" + HUGE_PAGES,), 3.0, 4.0)
    entry = doubled(Goal(("peer", "peer" + HUGE_PAGES, "wrong", "refused"), 1e-6), slow, Goal(("compiled",), 1e6))
    found = executed(entry, pace=dataclasses.replace(PACE, compiled=False))
    first, second, third = found.results[0].outcomes[0].reached
    assert first.peer == "peer" and first.met and third.ratio is None and third.met is None
    rows_of = {row.name: row for row in found.results[0].rows}
    ours = rows_of["ours"].timing
    assert ours is not None and second.met and second.ratio == measure.ratios(ours, Timing((1.0,) * 2)).median
    assert rows_of["wrong"].problem is not None and rows_of["wrong"].problem.startswith("WRONG: ")
    assert rows_of["refused"].problem == "refused: NotImplementedError: this machine has none"
    assert rows_of["ours"].floor == (1 << 16) and rows_of["peer" + HUGE_PAGES].memory == 4
    share = found.results[0].outcomes[0].share
    # Bytes over the copy, and those that are new over what the system grants.
    assert share == pytest.approx((1.0 / 20.0 + 0.5 / 5.0) * sum(1 / seconds for seconds in ours.seconds) / 2)
    assert [text.split(": ")[2] for text in found.problems()] == ["wrong"]
    text = report.render(found)
    assert "PROBLEMS" in text and "WRONG" in text and "compiled: not measured" in text
    if rows_of["ours"].memory:  # which a system may not tell
        assert "the floor of memory, wanted 1e-09x" in text
    found.write_json(tmp_path / "x.json")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["kind"] == "cpu" and stored["results"][0]["outcomes"][0]["reached"][1]["goal"]["aim"] == 4.0
    assert stored["results"][0]["rows"][0]["timing"]["median"] > 0.0

    missed = executed(doubled(Goal(("peer",), 1e6), contenders=(OURS, PEER)))
    assert missed.problems() == [] and "peer, wanted 1e+06x" in report.render(missed)
    assert executed(
        doubled(Goal(("peer",), 1.0), contenders=(dataclasses.replace(OURS, make=_failing), PEER))
    ).problems()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    assert charts.available() is None, "the chart needs matplotlib: pip install matplotlib"
    entries = [doubled(Goal(("peer",), 1e-6, 2.0), Goal(("peer",), 1e6), contenders=(OURS, PEER))]
    chart.draw(executed(*entries, dataclasses.replace(entries[0], mode="training")), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def timed(
    seconds: dict[str, float], pace: rounds.Pace, copies: list[float] | None = None, ticks: float = 0.0, **keywords: Any
) -> Any:
    """Rounds of stand-ins, "a" ours, with a limit that takes these values one after another; and who ran when.

    A clock goes on by so many times the seconds that the stand-ins say they took.
    """
    turns: list[str] = []
    values = iter(copies or [])
    clock = [0.0]

    def run(name: str) -> Any:
        def take() -> float:
            turns.append(name)
            clock[0] += ticks * seconds[name]
            return seconds[name]

        return take

    who = rounds.Contenders({name: run(name) for name in seconds}, frozenset("a"), **keywords)
    gauge = (lambda names: {"copy": next(values)}) if copies else lambda names: {"copy": 20.0}
    with mock.patch.object(rounds.time, "perf_counter", side_effect=lambda: clock[0]):
        found = rounds.rounds(who, pace, gauge, {"copy"})
    return found, turns


def test_rounds_between_limits_that_moved_do_not_count() -> None:
    pace = dataclasses.replace(PACE, budget=9.0, max_rounds=3, stretch=0.0, discards=2)
    found, turns = timed({"a": 0.1, "b": 0.2}, pace, [20.0, 20.5, 25.0, 24.5, 30.0, 30.0])
    # A round a stretch: the second and the fourth fall away, and the fourth round that counts is not needed.
    assert [stretch.kept for stretch in found.stretches] == [True, False, True, False, True]
    assert found.stretches[1].moved == pytest.approx(25.0 / 20.5 - 1.0) and len(turns) == 10
    assert [len(timing.seconds) for timing in found.timings.values()] == [3, 3] and found.problem is None
    assert [stretch.before["copy"] for stretch in found.around()] == [20.0, 25.0, 30.0]

    found, turns = timed({"a": 0.1, "b": 0.2}, pace, [20.0, 30.0, 20.0, 20.0, 30.0, 20.0, 20.0])
    assert not found.timings and len(found.stretches) == 4 and len(turns) == 8  # two are made up for, not a third
    assert found.problem == (
        "unsteady: copy moved by more than 5% around 3 of 4 stretches of rounds (50% in the middle of them)"
    )
    # Rounds of 0.3 s: stretches of four, and after one that is lost of two.
    patient = dataclasses.replace(pace, stretch=1.1, max_rounds=6)
    found, _ = timed({"a": 0.1, "b": 0.2}, patient, [20.0, 30.0, 30.0, 30.0, 30.0], ticks=1.0)
    assert [stretch.rounds for stretch in found.stretches] == [4, 2, 2, 2]
    hurried = dataclasses.replace(pace, patience=0.0)
    assert timed({"a": 0.1}, hurried, [20.0, 30.0], ticks=1.0)[0].problem is not None
    assert limits.moved({"copy": 30.0, "read": 1.0}, {"copy": 20.0, "read": 9.0}, {"copy"}) == pytest.approx(0.5)
    assert limits.best({"copy": 30.0, "read": 1.0}, {"copy": 20.0, "read": 9.0}) == {"copy": 30.0, "read": 9.0}


def test_a_row_under_which_the_machine_moved_says_so_and_has_no_speed() -> None:
    copies = iter(range(10, 10_000, 10))
    entry = doubled(Goal(("peer",), 1.0), contenders=(OURS, PEER))
    moving = command.execute([entry], PACE, lambda names: {**STEADY, "copy": next(copies)}, None, mode="quick", seed=0)
    (outcome,) = moving.results[0].outcomes
    assert outcome.reached[0].ratio is None and outcome.share is None and outcome.best.ratio is None
    assert all(row.timing is None and row.memory is not None for row in moving.results[0].rows)
    text = report.render(moving)
    assert "unsteady: copy moved" in text and "UNSTEADY" in text and "MOVED" in text
    assert "0 goals measured" in text and moving.problems() == []


def test_each_round_is_held_against_the_limit_around_it() -> None:
    pace = dataclasses.replace(PACE, budget=9.0, max_rounds=3, stretch=0.0, discards=3)
    copies = iter([10.0, 10.0, 40.0, 40.0, 40.0, 40.0])
    gauge = lambda names: {**STEADY, "copy": next(copies)}  # noqa: E731
    result = measure.measure(doubled(Goal(("peer",), 1.0), contenders=(OURS, PEER)), pace, gauge, None)
    assert [stretch.kept for stretch in result.stretches] == [True, False, True, True]
    ours = next(row.timing for row in result.rows if row.ours)
    assert ours is not None and result.outcomes[0].share is not None
    floors = [1.0 / copy + 0.5 / 5.0 for copy in (10.0, 40.0, 40.0)]
    shares = sorted(floor / seconds for floor, seconds in zip(floors, ours.seconds, strict=True))
    assert result.outcomes[0].share == pytest.approx(shares[1])
    assert result.outcomes[0].reached[0].rounds == 3 and set(result.stretches[0].before) == set(STEADY)
    assert measure.needed(doubled()) == ({"copy"}, {"touch"})
    assert measure.needed(dataclasses.replace(doubled(), lines=(Line("", "", (), None),))) == ({"multiply_add"}, set())


def test_everybody_gets_the_same_share_of_the_time() -> None:
    pace = dataclasses.replace(PACE, budget=1.0, max_rounds=9)

    def counts(seconds: dict[str, float], **keywords: Any) -> list[int]:
        found, turns = timed(seconds, pace, **keywords)
        assert {turns[index] for index in range(len(seconds))} == set(seconds)
        assert all(len(stretch.before) == 1 for stretch in found.stretches)
        return [len(found.timings[name].seconds) for name in seconds]

    # Each may take a third of a second; b has used its share after the rounds that everybody gets, c after two more.
    assert counts({"a": 0.01, "b": 0.9, "c": 0.2}) == [2, 2, 2]
    assert counts({"a": 0.01, "b": 0.9, "c": 0.1}) == [4, 2, 4]
    # b is clearly beaten by d, and nobody asks for it by name.
    slow = {"a": 0.01, "b": 0.9, "c": 0.8, "d": 0.3}
    assert counts(slow, wanted=frozenset("c")) == [2, 1, 2, 2]
    each = measure.ratios(Timing((1.0, 2.0, 9.0)), Timing((3.0, 8.0)))
    assert each == Timing((3.0, 4.0)) and each.median == 3.5


def test_inputs_that_are_overwritten_come_back() -> None:
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x
            return x * 2.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            with torch.no_grad():
                return ctx.x.copy_(grad * 2.0)

    contender = Contender("in place", lambda leaves: Overwriting.apply, ours=True, consumes=True)
    contest = Doubled(contender)
    row, runner = measure.checked(contest, contender, "training", (contest.exact(True), contest.plain(True)))
    assert row.problem is None and runner is not None and row.floor == 1 << 16  # the result; the gradient is no new one
    runner.seconds()
    runner.renew()
    assert torch.equal(runner.run()[0], 2.0 * contest.leaves("")[0].detach())


def test_memory_is_that_of_the_run_before_unless_a_row_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(extension, "release_memory", lambda: happened.append("release") or 0)

    def make(leaves: Any) -> Any:
        happened.clear()
        return lambda x: happened.append("run") or x + x

    for releases, expected in ((False, ["run", "run"]), (True, ["release", "run", "release", "run"])):
        contender = Contender("ours", make, ours=True, releases=releases)
        runner = measure.Runner(Doubled(contender), contender, "forward")
        runner.seconds()
        assert happened == expected[len(expected) // 2 :]
        happened.clear()
        runner.warms = True  # as a run with much memory does
        runner.seconds()
        assert happened == expected
    # A buffer that is kept is no result: nothing of it is new.
    loss = losses.Loss(TINY, 16, 40, 0.0, "")
    for name, floor in ((losses.REUSED, 4), (losses.OURS, 4 + 4 * 16 * 40)):
        contender = next(each for each in loss.contenders() if each.name == name)
        row, _ = measure.checked(loss, contender, "training", (loss.exact(True), loss.plain(True)))
        assert row.problem is None and row.floor == floor


def test_a_peer_that_rounds_worse_is_still_the_one_to_beat() -> None:
    """Errors are in units of plain torch's error and a few roundings, here of the largest result alone."""
    unit = 0.5 * SLACK * torch.finfo(torch.float32).eps * 2.0

    def off(units: float, ours: bool) -> Contender:
        return Contender(f"off by {units}", lambda leaves: lambda x: x * 2.0 + units * unit, ours=ours)

    found = {}
    for ours, units in ((True, 3.0), (False, 3.0), (False, 5.0)):
        contest = Doubled(off(units, ours))
        row, _ = measure.checked(contest, contest.contenders()[0], "forward", (contest.exact(False),) * 2)
        assert row.error == pytest.approx(units, rel=0.2)
        found[ours, units] = row.problem
    assert found[False, 3.0] is None and str(found[True, 3.0]).startswith("WRONG: 3")
    assert str(found[False, 5.0]).startswith("WRONG: 5")


def test_the_helper_answers_line_by_line() -> None:
    entry = doubled(Goal(("peer",), 1.0), contenders=(OURS, PEER))
    questions = [
        {"prepare": ["group", "forward", "twice"], "contender": "peer"},
        {"run": "peer", "warms": True},
        {"prepare": ["group", "forward", "twice"], "contender": "ours"},
    ]
    answers = io.StringIO()
    helper.serve([entry], io.StringIO("\n".join(map(json.dumps, questions))), answers)
    first, second, third = map(json.loads, answers.getvalue().splitlines())
    assert measure.Row(**first).name == "peer" and second["seconds"] > 0.0 and third["ours"]

    code = (
        "import os, sys\n"
        "for line in sys.stdin:\n"
        "    prepared = '\"prepare\"' in line\n"
        "    answer = '{\"name\": \"' + os.environ['THP_MEM_ALLOC_ENABLE'] + '\", \"ours\": false}'\n"
        "    print(answer if prepared else '{\"seconds\": 2.5}', flush=True)\n"
        "    if not prepared: break"
    )
    with helper.Helper(0, 1) as other:
        other._line = [sys.executable, "-c", code]
        assert other.prepare(entry, "peer") == measure.Row("1", False) and other.run("peer", False) == 2.5
        with pytest.raises((RuntimeError, BrokenPipeError)):
            other.run("peer", False)


@pytest.mark.parametrize("instruction_set", extension.instruction_sets())
def test_loops_that_measure_the_machine_do_their_work(instruction_set: str) -> None:
    before = extension.instruction_set()
    assert before is not None
    try:
        extension.select_instruction_set(instruction_set)
        source = torch.arange(1.0, 1100.0)
        target = torch.zeros(1104)
        ways = extension.limit_read_ways()
        assert len(ways) > 1
        assert all(extension.limit_read(source[:n], way) == source[:n].sum() for way in ways for n in (0, 7, 64, 1099))
        extension.limit_copy(target[: len(source)], source)
        assert torch.equal(target[: len(source)], source) and not target[len(source) :].any()
        assert extension.limit_multiply_add(10) == 10 * extension.limit_multiply_add(1) > 0
        assert extension.limit_multiply_add(0) == 0
        pairs = extension.limit_multiply_pairs(10) / extension.limit_multiply_add(10)
        assert pairs in (1.0, 2.0) and (pairs == 1.0 or instruction_set == "avx512")
        gauge = limits.Gauge(3, numel=1 << 14, rounds=2000, least=0.0)
        found = gauge.measure()
        assert set(found) == set(limits.LIMITS) and all(value > 0.0 for value in found.values())
        again = gauge.measure({"copy"})
        assert set(again) == {"copy"} and again["copy"] > 0.0
    finally:
        extension.select_instruction_set(before)


def test_options_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = limits.Gauge(1, numel=1 << 12, rounds=10, least=0.0)
    monkeypatch.setattr(command, "Gauge", lambda threads: small)
    monkeypatch.setitem(command.PACES, "quick", PACE)
    path = tmp_path / "x.json"
    line = ["bench", "cpu", "--quick", "--only", "calls, tiny shapes, forward: masked", "--threads", "1"]
    assert main([*line, "--json", str(path)]) == 0
    assert f"numbers: {path}" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["results"]) == 1
    kept: list[int] = []
    monkeypatch.setattr(report.CpuReport, "write_json", lambda self, path: kept.append(len(self.results)))
    entry = doubled(Goal(("peer",), 1.0), contenders=(OURS, PEER))
    command.execute([entry, entry], PACE, lambda names: STEADY, None, mode="quick", seed=0, path=path)
    assert kept == [1, 2]  # what an interrupted run leaves behind
    wrong = doubled(Goal(("wrong",), 1.0), contenders=(OURS, WRONG))
    monkeypatch.setattr(command, "entries", lambda seed: [dataclasses.replace(wrong, quick=True)])
    assert main(["bench", "cpu", "--quick"]) == 1
    assert main(["bench", "cpu", "--only", "no such thing"]) == 2
    assert "no line of the table has this in its name" in capsys.readouterr().err
    for given, message in (
        (
            ["--device", "cuda"],
            "--device goes with bench text and bench train, not with bench cpu: it measures",
        ),
        (
            ["--dtype", "bfloat16"],
            "--dtype goes with bench text and bench train and bench gpu, not with bench cpu",
        ),
        (["--huge-pages"], "--huge-pages goes with bench text and bench train, not with bench cpu: its table runs"),
        (["--model", "minilm"], "--model goes with bench text, not with bench cpu\n"),
    ):
        assert main(["bench", "cpu", *given]) == 2
        assert capsys.readouterr().err.startswith(message)


def test_a_late_run_takes_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    paces: list[rounds.Pace] = []
    monkeypatch.setattr(
        command, "measure", lambda entry, pace, gauge, helper: paces.append(pace) or mock.Mock(unsteady=False)
    )
    for late, budget in ((9e9, 7.0), (0.0, 0.0)):
        pace = dataclasses.replace(PACE, budget=7.0, patience=7.0, late=late)
        command.execute([doubled()], pace, lambda names: STEADY, None, mode="quick", seed=0)
        assert paces[-1].budget == paces[-1].patience == budget
    hurried = command.PACES["full"].hurried()
    assert hurried.min_rounds == rounds.FEWEST < command.PACES["full"].min_rounds and hurried.budget == 0.0


def test_what_the_machine_moved_under_is_measured_once_more() -> None:
    entry = doubled(Goal(("peer",), 1.0), contenders=(OURS, PEER))
    other = dataclasses.replace(entry, lines=(Line("other", "ours", (Goal(("peer",), 1.0),), "read"),))
    # Unsteady at first: two stretches, between three measurements of the limits; then it holds still.
    copies = iter([10.0, 20.0, 40.0])
    gauge = lambda names: {**STEADY, "copy": next(copies, 20.0)} if "copy" in names else STEADY  # noqa: E731
    for late, problem in ((9e9, False), (0.0, True)):
        copies = iter([10.0, 20.0, 40.0])
        found = command.execute([entry, other], dataclasses.replace(PACE, late=late), gauge, None, mode="quick", seed=0)
        assert [result.outcomes[0].line.name for result in found.results] == ["twice", "other"]
        assert [result.unsteady for result in found.results] == [problem, False]


def test_an_instruction_set_is_that_of_both_sides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    class ReplacedError(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise ReplacedError

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(extension, "instruction_sets", lambda: ("baseline", "avx2"))
    monkeypatch.setattr(sys, "argv", ["maskops", "bench", "cpu", "--instruction-set", "avx2"])
    with pytest.raises(ReplacedError):
        main(["bench", "cpu", "--instruction-set", "avx2"])
    assert started == [[sys.executable, "-m", "maskops", "bench", "cpu", "--instruction-set", "avx2"]]
    assert os.environ["MASKOPS_BACKEND"] == "cpu:avx2" and os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
    selected: list[str] = []
    monkeypatch.setattr(extension, "select_instruction_set", selected.append)
    assert main(["bench", "cpu", "--instruction-set", "avx2", "--only", "no such thing"]) == 2 and selected == ["avx2"]
    assert main(["bench", "cpu", "--instruction-set", "avx512"]) == 2
    assert "this machine has baseline, avx2" in capsys.readouterr().err


def test_processors_that_others_take_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a /proc of our own: idle time, guests and our descendants are not others'; stolen time is."""
    tick = os.sysconf("SC_CLK_TCK")
    clock = iter((100.0, 104.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def write(user: int, idle: int, steal: int, own: int, child: int, other: int) -> None:
        (tmp_path / "stat").write_text(f"cpu  {user} 0 0 {idle} {idle} 0 0 {steal} {user} 0\ncpu0 1 2\n")
        for number, parent, ticks in ((os.getpid(), 1, own), (7, os.getpid(), child), (8, 7, 0), (9, 1, other)):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            words = " ".join(["S", str(parent), *["0"] * 9, str(ticks), "0", "0", "0", "0"])
            (tmp_path / str(number) / "stat").write_text(f"{number} (a name) (with) brackets) {words}")

    write(user=1000, idle=5000, steal=0, own=300, child=200, other=500)
    (tmp_path / "self").mkdir()
    watched = others.Others(tmp_path)
    write(user=1000 + 6 * tick, idle=9000, steal=2 * tick, own=300 + 3 * tick, child=200 + tick, other=500 + 2 * tick)
    assert watched.taken() == pytest.approx(1.0)
    monkeypatch.undo()
    assert others.Others(tmp_path / "nowhere").taken() == 0.0
    real = others.Others()
    assert real.taken() >= 0.0


def test_work_of_this_process_is_not_that_of_others() -> None:
    watched = others.Others()
    busy_before, own_before = watched._read()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    busy, own = watched._read()
    if busy_before == 0.0:
        pytest.skip("this system has no /proc")
    assert own - own_before == pytest.approx(0.1, abs=0.05) and busy - busy_before > 0.05
