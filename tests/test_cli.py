"""The command line: the benchmark end to end on a tiny corpus, its parts, `info` and `verify`."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import maskops
from maskops import extension, testing
from maskops.cli import info
from maskops.cli.bench import batches, chart, command, corpus, jobs, machine, measure, progress, sweep, timing, variants
from maskops.cli.bench.report import Report, aligned, render
from maskops.cli.main import main

CPU = torch.device("cpu")
SETTINGS = jobs.Settings(
    batch_size=3,
    vocabulary=31,
    width=16,
    heads=2,
    layers=1,
    max_length=24,
    dtype=torch.float32,
    device=CPU,
    seed=0,
)
TINY = command.Plan(
    characters=10**9,
    read_seconds=60.0,
    min_length=3,
    max_length=SETTINGS.max_length,
    micro_batches=2,
    batch_size=SETTINGS.batch_size,
    vocabulary=SETTINGS.vocabulary,
    width=SETTINGS.width,
    heads=SETTINGS.heads,
    layers=SETTINGS.layers,
    checked_documents=4,
    checked_length=12,
    budgets={"attention": (0.0, 0.0), "loss": (0.0, 0.0), "step": (0.0, 0.0)},
    min_rounds=2,
    fills=(0.3, 1.0),
    sweep_count=4,
    sweep_longest=16,
    sweep_budget=0.0,
    compiled=False,
    limit=60.0,
)
SOURCE = '''
"""A module about {word} with a docstring of {word} that is a little longer than the others, and then some more."""

class Thing:
    """A thing of {word}."""

    if True:
        async def act(self):
            """Acts on {word}, whatever {word} may be, in as many words as it takes to say so."""
            def inner():
                """Too short"""

x = lambda: "no docstring"
'''
needs_extension = pytest.mark.skipif(extension.reason() is not None, reason=f"extension: {extension.reason()}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    files = []
    for word in ("apples", "pears", "plums", "nuts", "kale", "leeks"):
        files.append(folder / f"{word}.py")
        files[-1].write_text(SOURCE.format(word=word))
    (folder / "broken.py").write_text("def (")
    files.append(folder / "broken.py")
    return corpus.read(
        vocabulary=SETTINGS.vocabulary,
        min_length=5,
        max_length=SETTINGS.max_length,
        characters=10**9,
        seed=0,
        seconds=60.0,
        tokenizer=corpus.split_words(),
        files=files,
    )


def execute(text: corpus.Corpus, *rows: variants.Variant) -> Report:
    with pytest.MonkeyPatch.context() as patch, maskops.use_backend(fallback="error"):
        patch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1.0, 2.0, 3.0))
        return command.execute(
            TINY, mode="tiny", device=CPU, dtype=torch.float32, seed=0, text=text, rows=rows or variants.VARIANTS
        )


@pytest.fixture(scope="module")
def report(text: corpus.Corpus) -> Report:
    return execute(text)


@needs_extension
def test_bench_from_documents_to_json_table_and_chart(report: Report, tmp_path: Path) -> None:
    assert report.problems() == []
    assert [(table.job, table.backward) for table in report.tables] == [
        (job, backward) for job in ("attention", "loss", "step") for backward in (False, True)
    ]
    for table in report.tables:
        names = [row.name for row in table.rows]
        assert names[-2:] == ["maskops padded", "maskops packed"]
        assert table.rows[0].habit
        assert table.baseline in names[:-2]
        for row in table.rows:
            assert row.timing is not None and row.tokens_per_second is not None and row.speedup is not None
            assert len(row.timing.seconds) == TINY.min_rounds
            assert row.error is not None and 0.0 <= row.error <= measure.WRONG_ABOVE
    assert "bucketed by length, is_causal" in [row.name for row in report.table("step", True).rows]
    assert report.table("loss", False).loss == pytest.approx(report.table("loss", True).loss)
    assert [point.fill for point in report.sweep] == list(TINY.fills)
    for shares in report.shares:
        assert shares.gemm + shares.attention + shares.loss + shares.rest == pytest.approx(1.0)
        assert min(shares.gemm, shares.attention, shares.loss) > 0.0
        assert shares.ceiling >= 1.0

    report.write_json(tmp_path / "run.json")
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["schema"] == 1
    row = stored["tables"][-1]["rows"][-1]
    assert row["name"] == "maskops packed"
    assert row["timing"]["median"] == pytest.approx(sum(row["timing"]["seconds"]) / 2, rel=1e-3)
    assert stored["machine"]["torch"] == torch.__version__

    printed = render(report)
    assert "padded, dense mask  (what people do)" in printed
    assert "word pieces" in printed and "PROBLEMS" not in printed
    lines = [line for line in printed.splitlines() if not line.lstrip().startswith("command")]  # pytest's own, here
    assert max(map(len, lines)) <= 120

    assert chart.available() is None, "the chart needs matplotlib: pip install matplotlib"
    chart.draw(report, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def ignores_causality(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    parts = zip(*(tensor.split(list(lengths)) for tensor in (q, k, v)), strict=True)
    views = ([part.transpose(0, 1) for part in document] for document in parts)
    return torch.cat([F.scaled_dot_product_attention(*view).transpose(0, 1) for view in views])


def refuses(batch: batches.Batch) -> None:
    raise ValueError("no such luck\nsecond line")


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
def test_a_wrong_variant_prints_wrong_and_no_speed(text: corpus.Corpus) -> None:
    leaky = dataclasses.replace(
        variants.PLAIN,
        name="leaky",
        attention=dataclasses.replace(variants.LOOP, attend=ignores_causality),
        ours=True,
    )
    halved = dataclasses.replace(
        variants.PLAIN, name="halved loss", loss=lambda logits, targets: variants.torch_loss(logits, targets) / 2
    )
    absent = dataclasses.replace(
        variants.PLAIN, name="absent", attention=dataclasses.replace(variants.LOOP, prepare=refuses), ours=True
    )
    report = execute(text, variants.PLAIN, leaky, halved, absent)
    for job in ("attention", "step"):
        row = next(row for row in report.table(job, True).rows if row.name == "leaky")
        assert row.problem is not None and row.problem.startswith("WRONG")
        assert row.timing is None and row.speedup is None and row.tokens_per_second is None
        row = next(row for row in report.table(job, True).rows if row.name == "absent")
        assert row.problem == "refused: ValueError: no such luck"
    row = next(row for row in report.table("loss", True).rows if row.name == "halved loss")
    assert row.problem is not None and row.problem.startswith("WRONG")
    assert any("leaky" in problem for problem in report.problems())
    printed = render(report)
    assert re.search(r"^leaky +WRONG: [\d.e+]+ times torch's error$", printed, re.MULTILINE)
    assert "PROBLEMS" in printed
    assert [row.name for row in report.sweep[0].table.rows] == [variants.PLAIN.name]


def test_losses_that_disagree_on_the_timed_documents_are_wrong(text: corpus.Corpus) -> None:
    late = dataclasses.replace(
        variants.PLAIN, name="late", loss=lambda logits, targets: variants.torch_loss(logits, targets) * 1.01
    )
    rows = [measure.Row(variant.name, False, False, error=1.0) for variant in (variants.PLAIN, late)]
    table = measure.measure(
        jobs.JOBS[1],
        [variants.PLAIN, late],
        text.documents,
        SETTINGS,
        backward=False,
        budget=0.0,
        min_rounds=1,
        checked=rows,
    )
    assert table.rows[0].problem is None
    assert table.rows[1].problem is not None and table.rows[1].problem.startswith("WRONG: loss")


def test_error_multiple_is_two_at_the_limit_of_the_budget() -> None:
    exact = {"out": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    plain = {"out": torch.tensor([1.0, 2.0 + 1e-3], dtype=torch.float64)}
    budget = testing.error_budget(plain["out"], plain["out"], exact["out"], torch.float32)
    at_limit = {"out": exact["out"] + torch.tensor([budget.limit, 0.0], dtype=torch.float64)}
    assert measure.error_multiple(at_limit, plain, exact, torch.float32) == pytest.approx(2.0)
    assert measure.error_multiple(exact, plain, exact, torch.float32) == 0.0
    assert measure.error_multiple({}, plain, exact, torch.float32) == float("inf")
    not_a_number = {"out": torch.tensor([1.0, float("nan")], dtype=torch.float64)}
    assert measure.error_multiple(not_a_number, plain, exact, torch.float32) == float("inf")


@needs_extension
def test_the_command_writes_what_it_is_asked_for(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[command.Plan, dict[str, object]]] = []

    def stored(plan: command.Plan, **keywords: object) -> Report:
        asked.append((plan, keywords))
        return report

    monkeypatch.setattr(command, "execute", stored)
    files = [str(tmp_path / name) for name in ("a.json", "a.png")]
    assert main(["bench", "text", "--json", files[0], "--chart", files[1], "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"numbers: {files[0]}" in printed and f"chart: {files[1]}" in printed
    assert Path(files[0]).exists() and Path(files[1]).exists()
    threads = torch.get_num_threads()
    assert main(["bench", "--full", "--dtype", "bfloat16", "--threads", str(threads)]) == 0
    assert asked == [
        (command.QUICK, {"mode": "quick", "device": CPU, "dtype": torch.float32, "seed": 5}),
        (command.FULL, {"mode": "full", "device": CPU, "dtype": torch.bfloat16, "seed": 0}),
    ]

    monkeypatch.setattr(chart, "available", lambda: "matplotlib is not installed")
    capsys.readouterr()
    assert main(["bench", "--chart", str(tmp_path / "b.png")]) == 0
    assert "no chart: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "b.png").exists()

    wrong = dataclasses.replace(report.tables[0].rows[0], problem="WRONG: by far", timing=None)
    table = dataclasses.replace(report.tables[0], rows=(wrong, *report.tables[0].rows[1:]))
    failing = dataclasses.replace(report, tables=(table, *report.tables[1:]))
    monkeypatch.setattr(command, "execute", lambda plan, **keywords: failing)
    assert main(["bench"]) == 1
    assert "attention: padded, dense mask: WRONG: by far" in capsys.readouterr().out


def test_cuda_without_a_device_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_every_variant_has_its_devices_and_a_name_of_its_own() -> None:
    names = [variant.name for variant in variants.VARIANTS]
    assert len(set(names)) == len(names)
    on_cuda = [v.name for v in variants.chosen("step", torch.device("cuda"), torch.bfloat16, compiled=True)]
    assert {"padded, is_causal, flash", "bucketed, is_causal, cuDNN", "packed, compiled loss"} <= set(on_cuda)
    on_cpu = [v.name for v in variants.chosen("step", CPU, torch.bfloat16, compiled=False)]
    assert "packed, document by document in fp32" in on_cpu
    assert not [name for name in on_cpu if "flash" in name or "compiled" in name]
    assert [v.habit for v in variants.VARIANTS].count(True) == 1


def test_docstrings_are_found_wherever_they_stand(text: corpus.Corpus) -> None:
    # Module, class and method of six files; the inner function's is too short, the broken file is passed over.
    assert len(text.documents) == 18
    assert text.files == 6
    assert all(5 <= length <= SETTINGS.max_length for length in text.lengths)
    assert int(max(document.max() for document in text.documents)) < SETTINGS.vocabulary
    assert 0.5 < text.coverage < 1.0


def test_reading_the_standard_library_is_reproducible() -> None:
    def read(files: list[Path] | None) -> corpus.Corpus:
        return corpus.read(
            vocabulary=64, min_length=8, max_length=64, characters=3000, seed=3, seconds=60.0, files=files
        )

    first, second = read(None), read(corpus.source_files())
    assert first.lengths == second.lengths
    assert all(torch.equal(one, other) for one, other in zip(first.documents, second.documents, strict=True))
    with pytest.raises(ValueError, match="no docstring of at least 8 tokens in 0 files"):
        read([])


def test_word_pieces_keep_the_text() -> None:
    tokenizer = corpus.split_words()
    one, other = tokenizer.encode("def  pad(x):\n    1234"), tokenizer.encode("pad(x)")
    assert one[-1] != one[-2]
    assert len(set(other)) == len(other)
    assert len("".join(corpus._WORD.findall("a  b\n\nc_ü 12345 [::-1]"))) == len("a  b\n\nc_ü 12345 [::-1]")


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_layouts_hold_every_document_once(layout: batches.Layout) -> None:
    documents = [torch.arange(1, length + 1) for length in (5, 2, 9, 3, 3, 7, 4)]
    found = batches.stream(documents, layout, 3, CPU)
    assert sorted(number for batch in found for number in batch.numbers) == list(range(7))
    for batch in found:
        kept = batch.tokens.flatten()[batch.document_rows].split(list(batch.lengths))
        for number, tokens in zip(batch.numbers, kept, strict=True):
            assert torch.equal(tokens, documents[number])
        targets = batch.targets.flatten()[batch.document_rows].split(list(batch.lengths))
        for number, target in zip(batch.numbers, targets, strict=True):
            assert target.tolist() == [*documents[number][1:].tolist(), batches.IGNORED]
        assert len(batch.target_rows) == batch.real - len(batch.numbers)
        assert (batch.targets != batches.IGNORED).sum() == len(batch.target_rows)
        assert batch.cu_seqlens.diff().tolist() == list(batch.lengths)
    if layout == "bucketed":
        assert max(batch.tokens.numel() for batch in found) <= -(-33 // 3)


def test_fill_factors() -> None:
    lengths = [6, 1, 2, 3]
    assert batches.fill(lengths, "padded", 2) == 12 / 18
    assert batches.fill(lengths, "bucketed", 2) == 12 / 13  # [6], [3, 2], [1]
    assert batches.fill(lengths, "packed", 2) == 1.0


@pytest.mark.parametrize("fill", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_lengths_with_a_chosen_fill(fill: float) -> None:
    lengths = sweep.lengths_with_fill(fill, 16, 160)
    assert max(lengths) == 160 and min(lengths) >= 2
    assert sum(lengths) / (16 * 160) == pytest.approx(fill, abs=0.01)
    pieces = sweep.cut_documents([torch.arange(100), torch.arange(50)], lengths)
    assert tuple(map(len, pieces)) == lengths


def test_timing_is_interleaved_and_compares_round_by_round() -> None:
    order: list[str] = []
    timings = timing.interleave(
        [lambda: order.append("a"), lambda: order.append("b")], CPU, budget=0.0, min_rounds=8, max_rounds=9
    )
    rounds = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert len(rounds) == 1 + 8 and rounds[0] == "ab"  # the warm-up
    assert set(rounds) == {"ab", "ba"}
    assert [len(entry.seconds) for entry in timings] == [8, 8]
    base, own = timing.Timing((2.0, 8.0, 3.0)), timing.Timing((1.0, 2.0, 3.0))
    assert own.speedup_over(base) == 2.0
    assert own.median == 2.0 and own.spread == 0.25


def test_a_busy_machine_and_a_single_round_are_said(report: Report) -> None:
    quiet = dataclasses.replace(report, machine=dataclasses.replace(report.machine, load=0.1))
    assert "BUSY" not in render(quiet) and "n=1" not in render(quiet)
    busy = dataclasses.replace(report, machine=dataclasses.replace(report.machine, load=1.5))
    assert "other programs kept 1.5 processors busy" in render(busy)
    rows = tuple(dataclasses.replace(row, timing=timing.Timing((1.0,))) for row in report.tables[0].rows)
    table = dataclasses.replace(report.tables[0], rows=rows)
    assert "n=1" in render(dataclasses.replace(quiet, tables=(table, *report.tables[1:])))


def test_progress_draws_on_a_terminal_only() -> None:
    shown, hidden = io.StringIO(), io.StringIO()
    with progress.Progress(2.0, shown, enabled=True) as bar:
        bar.stage("counting")
        bar.advance(1.0)
        bar.stage("done")
    assert "counting" in shown.getvalue() and " 50 %" in shown.getvalue()
    with progress.Progress(2.0, hidden) as bar:
        bar.stage("counting")
    assert hidden.getvalue() == ""


def test_tables_line_up() -> None:
    lines = list(aligned([["name", "a"], ["x", "10"], ["a long one"]], indent=""))
    assert lines == ["name         a", "x           10", "a long one"]


def test_info_says_what_runs_and_why_something_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = info.describe().splitlines()
    assert lines[0] == f"maskops            {maskops.__version__}"
    assert any(line.startswith("backend reference  available") for line in lines)
    assert any(line.startswith("backend cpu") for line in lines)
    monkeypatch.setattr(extension, "reason", lambda: "no compiler; rebuild with: pip install")
    described = info.describe()
    assert "not loaded: no compiler; rebuild with: pip install" in described
    assert "instruction set" not in described


def test_info_and_verify_as_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    few = testing.cases("attention")[:2]
    monkeypatch.setattr(testing, "cases", lambda op, features: few)
    assert main(["verify"]) == 0
    assert re.search(r"^reference: 2 cases of attention, \d+ checks, 0 cases refused", capsys.readouterr().out, re.M)
    failed = testing.Report(few[0], [testing.Finding("out", False, "far away")])
    monkeypatch.setattr(testing, "check", lambda fn, case, device: failed)
    assert main(["verify"]) == 1
    assert "FAIL out: far away" in capsys.readouterr().err
