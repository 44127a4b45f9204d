"""The leak test on models of transformers: what their own attention does, and maskops beside it; the command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import maskops
from benchmarks import audit as benchmark
from maskops.cli.main import main
from maskops.testing.leak import BatchAudit

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
zoo = pytest.importorskip("tests.transformers_models", reason="transformers is an optional extra")

LENGTHS = (6, 3, 8)


def verdicts(report: maskops.AuditReport) -> dict[str, str]:
    return {batch.name: batch.verdict for batch in report.batches}


@pytest.mark.parametrize(
    "name, attention, expected",
    [
        ("llama", "sdpa", {"padded right": "clean", "packed": "LEAKS", "packed, no cache": "clean"}),
        ("gpt2", "sdpa", {"padded left": "clean", "packed": "LEAKS", "packed, no cache": "clean"}),
        ("gpt-oss", "eager", {"padded left": "clean", "packed": "LEAKS", "packed, no cache": "LEAKS"}),
        ("gemma3", "eager", {"padded right": "clean", "packed, padded tail": "LEAKS", "packed, 4-D mask": "clean"}),
        ("bert", "sdpa", {"padded right": "clean", "packed": "LEAKS", "packed, 4-D mask": "clean"}),
        ("modernbert", "sdpa", {"padded left": "clean", "packed, cu_seq_lens": "LEAKS"}),
        ("lfm2", "eager", {"padded right": "clean", "packed, 4-D mask": "LEAKS"}),
        ("bart", "eager", {"padded right": "clean", "padded left": "WRONG", "packed, cu_seq_lens": "LEAKS"}),
    ],
)
def test_what_transformers_does_by_itself(name: str, attention: str, expected: dict[str, str]) -> None:
    report = maskops.audit(zoo.model(name, attention), lengths=LENGTHS, arrivals=list(expected), per_layer=False)
    assert verdicts(report) == expected, str(report)
    assert report.implementation == attention and report.dtype == "float32"
    assert report.leaks is any("LEAKS" in verdict for verdict in expected.values())


@pytest.mark.parametrize("name", ["gpt-oss", "modernbert"])
def test_the_same_model_with_maskops_attached_is_clean(name: str) -> None:
    model = zoo.FAMILIES[name].build("eager")
    arrivals = ["packed", "packed, padded tail", "packed, several rows"]
    with maskops.attach(model, probe=False):
        report = maskops.audit(model, lengths=LENGTHS, arrivals=arrivals)
    assert set(verdicts(report).values()) == {"clean"}, str(report)
    assert maskops.audit(model, lengths=LENGTHS, arrivals=["packed"], per_layer=False).leaks


def test_a_mistake_in_one_layer_is_found_there() -> None:
    """One layer of a model that is otherwise right loses its mask."""
    model = zoo.FAMILIES["qwen3"].build("eager")

    def without_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 1, 1)}

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(without_mask, with_kwargs=True)
    (found,) = maskops.audit(model, lengths=LENGTHS, arrivals=["packed, no cache"]).batches
    handle.remove()
    assert found.enters == ("model.layers.1",) and found.findings[0].layers == ("model.layers.1.self_attn",)
    assert "model.layers.1.self_attn" in str(found.findings[0])


def one(model: Any, batch: Any) -> BatchAudit:
    return maskops.audit(model, batch).batches[0]


def test_an_encoder_decoder_is_told_where_it_leaks() -> None:
    model = zoo.model("t5", "eager")
    (found,) = maskops.audit(model, lengths=LENGTHS, arrivals=["packed, cu_seq_lens"]).batches
    assert found.enters == tuple(f"{part}.block.{number}" for part in ("encoder", "decoder") for number in range(2))
    assert found.findings[0].layers[0] == "encoder.block.0.layer.0.SelfAttention"
    assert "decoder.block.1.layer.1.EncDecAttention" in found.findings[0].layers


def test_ids_at_padding_that_decide_positions_are_no_leak() -> None:
    """RoBERTa counts positions by ids; heads for classification find the last token by them."""
    ids = torch.randint(4, zoo.VOCABULARY, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = one(zoo.model("roberta"), {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask})
    assert not found.findings and any("ids at padding decide" in note for note in found.notes)
    head = transformers.LlamaForSequenceClassification(zoo.FAMILIES["llama"].build().config)
    mask = mask.flip(1)
    found = one(head, {"input_ids": torch.where(mask > 0, ids, 0), "attention_mask": mask})
    assert not found.findings and found.measured == "logits" and found.order is None
    assert any("ids at padding decide" in note for note in found.notes)


@pytest.mark.parametrize("way", ["rows by position_ids", "rows by cu", "packed + tail by cu", "padded left"])
def test_padding_that_looks_like_a_document_is_padding(way: str) -> None:
    """Offsets count the places between documents of two rows; positions restart at each of them."""
    model = zoo.FAMILIES["roberta"].build("eager")
    with maskops.attach(model, probe=False):
        found = one(model, zoo.arrive(way, "roberta", zoo.documents("roberta", (5, 1, 9, 4))).inputs)
    assert found.lengths == (5, 1, 9, 4) and found.padding > 0 and not found.findings, found


def test_a_classifier_of_packed_documents() -> None:
    """One row of logits a document, and one more for the places after the last."""
    head = transformers.LlamaForSequenceClassification(zoo.FAMILIES["llama"].build().config)
    sequences = [torch.randint(4, zoo.VOCABULARY, (length,)) for length in (6, 0, 3, 8)]
    batch = maskops.PackedBatch.from_sequences(sequences, capacity=20)
    with maskops.attach(head, probe=False):
        found = one(head, batch)
        assert not found.findings and found.lengths == (6, 3, 8) and found.documents == (0, 2, 3)
        assert found.measured == "logits" and found.alone is not None and found.alone.change.tokens == 3
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(1, 20, \.\.\.\)"):
        one(head, batch)


def test_a_batch_with_a_cache_and_labels() -> None:
    """The cache is written to by each call, and each call gets it as it was."""
    model = zoo.model("llama", "eager")
    ids = torch.randint(4, zoo.VOCABULARY, (2, 9))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4]).past_key_values
    batch = {"input_ids": ids[:, 4:], "labels": ids[:, 4:], "past_key_values": cache}
    found = one(model, batch)
    assert cache.get_seq_length() == 4
    assert not [finding for finding in found.findings if finding.kind != "alone"], found
    assert any("could not be run alone" in note for note in found.notes) or found.alone is not None


def test_the_table_of_all_families_is_made_from_reports() -> None:
    found = list(benchmark.rows(["bert"]))
    assert [row["attention"] for row in found] == ["eager", "sdpa", "maskops"]
    for row in found[:2]:
        error, is_wrong = benchmark.cell(row, ("packed",))
        assert is_wrong and error > 0.1 and benchmark.cell(row, ("padded right", "padded left"))[1] is False
        assert row["batches"]["packed"]["enters"] == ["encoder.layer.0", "encoder.layer.1"]
        assert benchmark.cell(row, ("packed, no cache",)) is None  # an encoder keeps none
    assert not benchmark.cell(found[2], tuple(found[2]["batches"]))[1]
    lines = benchmark.table([*found, {"model": "bloom", "attention": "maskops", "refused": "no"}]).splitlines()
    assert " !" in lines[1] and " !" not in lines[3] and lines[4].split() == ["bloom", "maskops", *["refused"] * 6]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    path = tmp_path_factory.mktemp("model")
    zoo.FAMILIES["llama"].build("eager").save_pretrained(path)
    words = {word: number for number, word in enumerate(("[PAD]", "[BOS]", "[EOS]", "[UNK]", *"abcdefgh"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are not looked up over a network that a test machine may not have."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_command_says_what_leaks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    base = ["audit", str(folder), "--lengths", "5,3"]
    assert main([*base, "--batches", "packed, no cache,padded right"]) == 0
    out = capsys.readouterr().out
    assert "clean in 2 batches" in out and "packed, no cache" in out
    some = ["--batches", "packed,packed, several rows"]
    assert main([*base, *some, "--implementation", "sdpa", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "attention sdpa, float32: LEAKS in 1 of 2 batches" in out and "model.layers.0.self_attn" in out
    stored = json.loads(file.read_text())
    assert stored["leaks"] is True and stored["implementation"] == "sdpa"
    assert next(batch for batch in stored["batches"] if batch["name"] == "packed")["lengths"] == [5, 3]
    assert main([*base, *some, "--attach", "--dtype", "bfloat16", "--json"]) == 0
    attached = json.loads(capsys.readouterr().out)
    assert attached["implementation"] == "maskops" and attached["dtype"] == "bfloat16" and not attached["leaks"]


def test_the_command_reads_documents(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("a b c d\n\ne f\ng h a\n")
    assert main(["audit", str(folder), "--text", str(file), "--batches", "packed", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["batches"][0]["lengths"] == [4, 2, 3]
    file.write_text("a b\n")
    assert main(["audit", str(folder), "--text", str(file)]) == 2
    assert "expected two lines of text or more, got 1" in capsys.readouterr().err


def test_the_command_says_what_it_could_not_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["audit", "nobody/no-such-model"]) == 2
    assert "cannot be downloaded now" in capsys.readouterr().err
    assert main(["audit", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["audit", str(folder), "--json", str(tmp_path / "none" / "report.json")]) == 2
    assert main(["audit", str(folder), "--json", str(tmp_path)]) == 2
    assert main(["audit", str(folder), "--device", "nowhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    for wrong in (["--lengths", "5"], ["--lengths", "five"], ["--batches", "folded"]):
        with pytest.raises(SystemExit) as stopped:
            main(["audit", str(folder), *wrong])
        assert stopped.value.code == 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["audit", str(folder)]) == 2
    assert "transformers is not installed" in capsys.readouterr().err
