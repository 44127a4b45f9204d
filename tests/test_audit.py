"""The leak test: what it finds in models whose mistakes are known, and that it finds nothing where there is nothing."""

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskops
from maskops.testing.leak import ARRIVALS, BatchAudit
from maskops.testing.leak.documents import streams_of
from maskops.testing.leak.perturb import separating_sets
from tests.audited_models import Decoder, packed, padded

CORRECT: tuple[str, ...] = ()


def audited(model: Any, batch: Any, **options: Any) -> BatchAudit:
    return maskops.audit(model, batch, **options).batches[0]


# ---- what it finds --------------------------------------------------------------------------------------------------


def test_a_model_that_keeps_documents_apart_is_clean() -> None:
    for batch in (packed(6, 3, 5), packed(4, 4, rows=2), padded(6, 3, 5)):
        report = maskops.audit(Decoder(CORRECT, CORRECT), batch)
        found = report.batches[0]
        assert not report.leaks and not report.findings, str(report)
        assert found.causal and found.measured == "logits"
        assert found.alone is not None and found.alone.change.max_abs < 1e-5
        assert found.order is not None and found.order.max_abs <= found.tolerance
        assert "clean" in str(report)


@pytest.mark.parametrize("layer", range(3))
def test_a_leak_in_one_layer_is_found_in_that_layer(layer: int) -> None:
    forgets = [CORRECT] * 3
    forgets[layer] = ("documents",)
    report = maskops.audit(Decoder(*forgets), packed(6, 3, 5))
    found = report.batches[0]
    assert report.leaks and found.enters == (f"blocks.{layer}",)
    assert found.findings[0].layers == (f"blocks.{layer}.attention",)
    assert [name for name, leaks in ((each.name, each.leaks) for each in found.layers) if not leaks] == [
        f"blocks.{other}" for other in range(3) if other != layer
    ]
    assert f"blocks.{layer}.attention" in str(report)


def test_each_leaking_layer_is_named_whatever_leaked_before() -> None:
    found = audited(Decoder(("documents",), CORRECT, ("documents",)), packed(6, 3, 5))
    assert found.enters == ("blocks.0", "blocks.2")
    assert audited(Decoder(("documents",)), packed(6, 3), per_layer=False).layers == ()


def test_a_leak_between_layers_is_named() -> None:
    class Mixed(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + hidden.cumsum(1)

    model = Decoder(CORRECT, CORRECT)
    model.embedding = nn.Sequential(model.embedding, Mixed())  # type: ignore[assignment]
    found = audited(model, packed(6, 3, 5))
    assert found.findings[0].layers == ("embedding.1",) and found.enters == ("embedding.1",)


def test_pairs_of_a_causal_leak_are_those_of_earlier_and_later() -> None:
    found = audited(Decoder(("documents",)), packed(6, 3, 5))
    assert {(leak.source, leak.target) for leak in found.leaks} == {(0, 1), (0, 2), (1, 2)}
    assert found.asked == (0, 1, 2)
    worst = found.worst
    assert worst is not None and worst.change.max_abs == max(leak.change.max_abs for leak in found.leaks)
    for leak in found.leaks:
        assert leak.change.kl is not None and leak.change.kl > 0 and leak.change.nll is not None
        assert leak.change.tokens == found.lengths[leak.target]


def test_sizes_are_those_of_the_definitions() -> None:
    """Of the documents alone, which can be computed here: largest difference, divergence, likelihood, flips."""
    model, batch = Decoder(("documents",)), packed(6, 3)
    found = audited(model, batch)
    with torch.no_grad():
        together = model(**batch)[0].double().log_softmax(-1)
        ids = batch["input_ids"][0]
        alone = torch.cat([model(ids[None, :6])[0], model(ids[None, 6:])[0]]).double().log_softmax(-1)
        logits = model(**batch)[0]
        singles = torch.cat([model(ids[None, :6])[0], model(ids[None, 6:])[0]])
    assert found.alone is not None
    change = found.alone.change
    assert change.max_abs == pytest.approx(float((logits - singles).abs().max()))
    assert change.kl == pytest.approx(float((alone.exp() * (alone - together)).sum(-1).mean()))
    assert change.flipped == pytest.approx(float((alone.argmax(-1) != together.argmax(-1)).double().mean()))
    predicting = [0, 1, 2, 3, 4, 6, 7]
    targets = [1, 2, 3, 4, 5, 7, 8]
    negative = [-float(each[predicting, ids[targets]].mean()) for each in (alone, together)]
    assert (found.alone.nll_alone, found.alone.nll_batch) == (pytest.approx(negative[0]), pytest.approx(negative[1]))
    assert change.nll == pytest.approx(negative[1] - negative[0])
    assert found.alone.worst == 1


def test_padding_that_is_seen_is_found() -> None:
    batch = padded(6, 3, 5)
    batch = {name: value.flip(1) for name, value in batch.items()}  # on the left, where later tokens see it
    found = audited(Decoder(CORRECT, ("padding",)), batch)
    kinds = {finding.kind for finding in found.findings}
    assert "padding" in kinds and "leak" not in kinds and found.leaking
    assert {leak.source for leak in found.leaks} == {"padding"} and found.enters == ("blocks.1",)
    assert {leak.target for leak in found.leaks} == {1, 2}


def test_a_model_that_sees_later_tokens_is_found_when_it_should_be_causal() -> None:
    model = Decoder(("order",))
    found = audited(model, packed(6, 3), causal=True)
    assert [finding.kind for finding in found.findings] == ["order"] and found.leaking
    free = audited(model, packed(6, 3))
    assert free.causal is False and not free.findings


def test_later_tokens_that_are_seen_in_the_batch_alone_are_found() -> None:
    class Cheating(Decoder):
        def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None, **others: Any) -> Tensor:
            for block in self.blocks:
                block.attention.forgets = ("order",) if seq_idx is not None else ()
            return super().forward(input_ids, seq_idx)

    found = audited(Cheating(CORRECT), packed(6, 3))
    assert found.causal and {finding.kind for finding in found.findings} == {"order", "alone"}


def test_a_mask_that_a_narrow_dtype_clamps_leaks_in_that_dtype() -> None:
    """-1e9 is -65504 in float16, which scores of that size overcome; bfloat16 and float32 hold it."""
    for dtype, leaks in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        torch.manual_seed(0)
        model = Decoder(CORRECT, scale=1.5e4).to(dtype)
        report = maskops.audit(model, packed(4, 3, 5, 2))
        assert report.leaks is leaks, f"{dtype}\n{report}"
        assert report.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leak_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    found = audited(Decoder(CORRECT, ("documents",)).to(dtype), packed(6, 3, 5))
    assert found.enters == ("blocks.1",)
    assert not audited(Decoder(CORRECT, CORRECT).to(dtype), packed(6, 3, 5)).findings


def test_not_a_number_is_found() -> None:
    class Broken(Decoder):
        def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
            logits = super().forward(input_ids, **others)
            logits[:, 7] = float("nan")
            return logits

    found = audited(Broken(CORRECT), packed(6, 3))
    assert "not finite" in {finding.kind for finding in found.findings} and found.verdict.startswith("NaN")
    assert "NaN at 1 places of document 1" in str(found.findings[0])


def test_what_does_not_match_alone_is_found_without_a_leak() -> None:
    class Counting(Decoder):
        """Adds the place in the row, where it should add that in the document."""

        def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
            return super().forward(input_ids, **others) + torch.arange(input_ids.shape[1])[:, None] / 100

    report = maskops.audit(Counting(CORRECT), packed(6, 3))
    assert [finding.kind for finding in report.findings] == ["alone"] and not report.leaks
    assert "position ids" in report.findings[0].problem and report.batches[0].verdict == "WRONG"


@pytest.mark.parametrize(
    "positions, is_wrong",
    [([0, 1, 2, 3, 0, 1, 2], False), ([0, 1, 2, 3, 4, 5, 6], True), ([5, 6, 7, 8, 0, 1, 2], False)],
    ids=["restart", "go on", "a piece of a document"],
)
def test_positions_that_do_not_restart_are_found(positions: list[int], is_wrong: bool) -> None:
    class Placed(Decoder):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **others: Any) -> Tensor:
            places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
            return super().forward(input_ids, **others) + places[..., None] / 10

    found = audited(Placed(CORRECT), {**packed(4, 3), "position_ids": torch.tensor([positions])})
    assert [finding.kind for finding in found.findings] == (["alone"] if is_wrong else [])


# ---- many documents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 2, 5, 6, 7, 20, 36, 100])
def test_sets_tell_every_pair_apart(items: int) -> None:
    sets = separating_sets(items)
    for first, second in itertools.permutations(range(items), 2):
        assert any(first in chosen and second not in chosen for chosen in sets), (first, second)
    if items > 5:
        assert len(sets) < items


def test_many_documents_take_few_calls_and_one_leak_among_them_is_found() -> None:
    class Whispering(Decoder):
        """Document 3 hears document 8, and nobody else hears anybody."""

        def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None, **others: Any) -> Tensor:
            logits = super().forward(input_ids, seq_idx)
            if seq_idx is None:
                return logits
            heard = logits[seq_idx == 8].mean() / 10
            return torch.where((seq_idx == 3).unsqueeze(-1), logits + heard, logits)

    batch = packed(*[3] * 12)
    found = audited(Whispering(CORRECT), batch)
    assert [(leak.source, leak.target) for leak in found.leaks] == [(8, 3)]
    clean = audited(Decoder(CORRECT), batch)
    assert not clean.findings
    assert clean.calls == 1 + 2 + 12 + 2 + len(separating_sets(12)) + 1


# ---- what it leaves as it was ---------------------------------------------------------------------------------------


def test_model_random_state_and_batch_are_as_before() -> None:
    model = Decoder(("documents",), CORRECT)
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    batch = packed(6, 3)
    before = {name: value.clone() for name, value in batch.items()}
    state = torch.get_rng_state()
    first = maskops.audit(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(batch[name], before[name]) for name in before) and torch.is_grad_enabled()
    assert maskops.audit(model, batch).to_dict() == first.to_dict()
    assert maskops.audit(model, batch, seed=1).to_dict() != first.to_dict()


def test_hooks_are_gone_when_the_model_raises() -> None:
    class Fragile(Decoder):
        calls = 0

        def forward(self, *args: Any, **others: Any) -> Tensor:
            self.calls += 1
            if any(block._forward_hooks for block in self.blocks):
                raise RuntimeError("watched")
            return super().forward(*args, **others)

    model = Fragile(("documents",))
    model.train()
    with pytest.raises(RuntimeError, match="watched"):
        maskops.audit(model, packed(6, 3))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.training and model.blocks[0].training


# ---- what it reads from a batch -------------------------------------------------------------------------------------

_IDS = torch.zeros(1, 8, dtype=torch.int64)
_ROWS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "inputs, expected",
    [
        pytest.param({"input_ids": _ROWS}, [[0, 0, 0, 0], [1, 1, 1, 1]], id="rows"),
        pytest.param(
            {"input_ids": _ROWS, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])},
            [[-1, 0, 0, 0], [1, 1, 1, 1]],
            id="left padding",
        ),
        pytest.param(
            {"input_ids": _IDS, "position_ids": torch.tensor([[2, 3, 4, 2, 3, 4, 5, 2]])},
            [[0, 0, 0, 1, 1, 1, 1, 2]],
            id="positions from 2",
        ),
        pytest.param(
            {"input_ids": _IDS, "position_ids": torch.tensor([[5, 6, 7, 0, 1, 3, 4, 5]])},
            [[0, 0, 0, 1, 1, 2, 2, 2]],
            id="mid-document and a jump",
        ),
        pytest.param(
            {"input_ids": _ROWS, "position_ids": torch.tensor([[0, 1, 0, 1]])},
            [[0, 0, 1, 1], [2, 2, 3, 3]],
            id="positions of one row for all",
        ),
        pytest.param(
            {
                "input_ids": _IDS,
                "position_ids": torch.tensor([[1, 1, 0, 1, 9, 3, 4, 1]]),
                "attention_mask": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]]),
            },
            [[-1, -1, 0, 0, -1, 0, 0, -1]],
            id="a hole that positions count",
        ),
        pytest.param(
            {
                "input_ids": _IDS,
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
                "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]),
            },
            [[0, 0, 0, 1, 1, -1, -1, -1]],
            id="a padded tail",
        ),
        pytest.param(
            {"input_ids": _IDS, "attention_mask": torch.tensor([[1, 1, 2, 2, 2, 3, 0, 0]])},
            [[0, 0, 1, 1, 1, 2, -1, -1]],
            id="segments",
        ),
        pytest.param(
            {"input_ids": _IDS, "cu_seq_lens_q": torch.tensor([0, 3, 3, 6], dtype=torch.int32)},
            [[0, 0, 0, 2, 2, 2, -1, -1]],
            id="offsets with an empty document and a tail",
        ),
        pytest.param(
            {"input_ids": _ROWS, "cu_seqlens": torch.tensor([0, 3, 4, 8])},
            [[0, 0, 0, 1], [2, 2, 2, 2]],
            id="offsets over two rows",
        ),
        pytest.param(
            {"input_ids": _IDS, "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]], dtype=torch.int32)},
            [[0, 0, 1, 1, 1, 2, 2, 2]],
            id="seq_idx",
        ),
        pytest.param(
            {"input_ids": _IDS, "position_ids": torch.arange(8).expand(3, 1, 8)}, [[0] * 8], id="positions of images"
        ),
        pytest.param(
            {"input_ids": _IDS, "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]).expand(4, 1, 8)},
            [[0, 0, 0, 0, 1, 1, 1, 1]],
            id="positions of images beside those of text",
        ),
        pytest.param(
            {
                "input_ids": _IDS,
                "attention_mask": torch.block_diag(torch.ones(3, 3), torch.ones(5, 5).tril())[None, None].bool(),
            },
            [[0, 0, 0, 1, 1, 1, 1, 1]],
            id="4-D bool",
        ),
        pytest.param(
            {
                "input_ids": _IDS,
                "attention_mask": (1 - torch.block_diag(torch.ones(3, 3), torch.ones(5, 5).tril()))[None, None] * -1e38,
            },
            [[0, 0, 0, 1, 1, 1, 1, 1]],
            id="4-D additive",
        ),
        pytest.param(
            {"src": torch.zeros(2, 4, 3), "src_key_padding_mask": torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]).bool()},
            [[0, 0, 0, -1], [1, 1, 1, 1]],
            id="torch's padding mask",
        ),
    ],
)
def test_documents_are_read_from_the_batch(inputs: dict[str, Tensor], expected: list[list[int]]) -> None:
    (stream,) = streams_of(inputs)
    assert stream.documents.tolist() == expected


def test_documents_of_an_encoder_and_a_decoder() -> None:
    inputs = {
        "input_ids": _IDS,
        "decoder_input_ids": _IDS[:, :5],
        "cu_seq_lens_k": torch.tensor([0, 3, 8]),
        "cu_seq_lens_q": torch.tensor([0, 4, 5]),
    }
    encoder, decoder = streams_of(inputs)
    assert encoder.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] and decoder.documents.tolist() == [[0, 0, 0, 0, 1]]


def test_documents_can_be_given() -> None:
    batch = {"input_ids": packed(6, 3)["input_ids"]}
    ids = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2])
    found = audited(lambda input_ids: Decoder(CORRECT)(input_ids), batch, documents=ids)
    assert found.lengths == (4, 3) and found.padding == 2
    assert {(leak.source, leak.target) for leak in audited(Decoder(CORRECT), batch, documents=ids).leaks} == {(0, 1)}


def test_batches_of_this_package() -> None:
    sequences = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    batch = maskops.PackedBatch.from_sequences(sequences, capacity=12)

    def call(model: Any, inputs: dict[str, Any]) -> Tensor:
        out: Tensor = model(inputs["input_ids"], seq_idx=batch.sequence_ids[None])
        return out

    found = audited(Decoder(("documents",)), batch, call=call)
    assert found.lengths == (4, 2, 3) and found.padding == 3 and found.leaking
    rows = maskops.data.pad(sequences, pad_token_id=0)
    assert not audited(Decoder(CORRECT), rows).findings


# ---- other models ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_torch_modules_of_vectors() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    batch = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": torch.arange(5) >= torch.tensor([[3], [5]])}
    clean = maskops.audit(encoder, batch)
    assert not clean.findings and clean.batches[0].measured == "hidden states" and clean.batches[0].padding == 2, clean

    def forgetting(model: Any, inputs: dict[str, Any]) -> Tensor:
        out: Tensor = model(inputs["src"])
        return out

    found = audited(encoder, batch, call=forgetting)
    assert {leak.source for leak in found.leaks} == {"padding"}
    assert found.findings[0].layers[0] == "layers.0.self_attn"


def test_outputs_with_one_row_for_each_document() -> None:
    class Pooled(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
            logits = super().forward(input_ids, attention_mask=attention_mask)
            return {"loss": None, "logits": logits[:, -1] if self.training is None else logits.mean(1)}

    found = audited(Pooled(("order",)), {"input_ids": packed(4)["input_ids"].expand(3, 4)})
    assert not found.findings and found.measured == "logits" and found.order is None
    padding = audited(Pooled(("order",)), padded(6, 3, 5))
    assert {finding.kind for finding in padding.findings} == {"padding", "alone"}  # the mean goes over padding


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, options, error, message",
    [
        ({"pixels": torch.zeros(2, 3)}, {}, ValueError, "none of its entries .pixels. is a tensor of tokens"),
        ({"input_ids": _IDS}, {"documents": torch.zeros(1, 7).long()}, ValueError, r"\(1, 7\), expected \(1, 8\)"),
        ({"input_ids": _IDS}, {"documents": torch.zeros(1, 8)}, TypeError, "tensor of integers"),
        ({"input_ids": _IDS}, {"lengths": [3, 4]}, ValueError, "lengths: only for documents that are made"),
        ({"input_ids": _IDS, "cu_seqlens": torch.tensor([0, 9])}, {}, ValueError, "end at or before 8"),
        ({"input_ids": _IDS, "attention_mask": torch.zeros(1, 8)}, {}, ValueError, "every place is padding"),
        ([[1, 2]], {}, ValueError, "two documents or more"),
        ("text", {}, TypeError, "expected a dict of the model's inputs"),
        (None, {"lengths": [3]}, ValueError, "two documents or more"),
        (None, {"arrivals": ["folded"]}, ValueError, "'folded' is unknown"),
    ],
)
def test_errors_name_what_is_wrong(batch: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        maskops.audit(Decoder(CORRECT), batch, **options)


def test_an_output_that_has_no_rows_of_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \(1, 9, \.\.\.\)"):
        maskops.audit(lambda input_ids: torch.zeros(3, 2), {"input_ids": packed(9)["input_ids"]})
    with pytest.raises(ValueError, match="no single embedding"):
        maskops.audit(nn.Linear(2, 2))


def test_documents_are_made_for_a_model_that_takes_them() -> None:
    report = maskops.audit(Decoder(CORRECT), lengths=[5, 3])
    assert report["padded right"].verdict == "clean" and not report.findings
    assert report["packed"].refused is not None and "position_ids" in report["packed"].refused
    assert {batch.name for batch in report.batches} <= set(ARRIVALS)


def test_a_report_of_many_documents_lists_the_worst_pairs() -> None:
    report = maskops.audit(Decoder(("documents",)), packed(*[2] * 14))
    text = str(report)
    assert "largest changes" in text and "and " in text.splitlines()[-2] + text.splitlines()[-1]
    assert len(report.batches[0].asked) == 14 and max(map(len, text.splitlines())) < 260


def test_special_tokens_are_neither_replaced_nor_drawn() -> None:
    seen: list[Tensor] = []

    class Noting(Decoder):
        def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
            seen.append(input_ids.clone())
            return super().forward(input_ids, **others)

    batch = packed(6, 3, 1)
    batch["input_ids"] = torch.tensor([[10, 11, 7, 12, 13, 14, 15, 16, 7, 7]])
    model = Noting(CORRECT)
    model.config = type("Config", (), {"to_dict": lambda self: {"text_config": {"image_token_id": 9}}})()
    report = maskops.audit(model, batch, special_ids=range(3, 8))
    whole = [ids for ids in seen if ids.shape == (1, 10)]
    changed = [ids != batch["input_ids"] for ids in whole]
    assert any(bool(each.any()) for each in changed)
    for ids, each in zip(whole, changed, strict=True):
        assert not each[0, [2, 8, 9]].any() and not torch.isin(ids[each], torch.tensor([3, 4, 5, 6, 7, 9])).any()
    assert all(bool(each[0, [0, 1, 3, 4, 5]].all() or not each[0, :5].any()) for each in changed)
    assert any("document 2 holds special tokens alone" in note for note in report.batches[0].notes)


def test_reports_are_json_whatever_the_model_gives() -> None:
    class Broken(Decoder):
        def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
            logits = super().forward(input_ids, **others)
            return logits * 0 / 0

    text = json.dumps(maskops.audit(Broken(CORRECT), packed(6, 3)).to_dict(), allow_nan=False)
    assert '"inf"' in text or '"nan"' in text


def test_a_model_that_changes_by_itself_is_not_judged() -> None:
    class Drifting(Decoder):
        calls = 0

        def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
            self.calls += 1
            return super().forward(input_ids, **others) + 0.01 * self.calls

    with pytest.raises(ValueError, match=r"not deterministic: the same batch again changes outputs by 0\.01"):
        maskops.audit(Drifting(CORRECT), packed(6, 3))
    report = maskops.audit(Drifting(CORRECT), lengths=[5, 3])
    assert not report.findings and all("not deterministic" in str(batch.refused) for batch in report.batches[:1])
    assert not maskops.audit(Drifting(CORRECT), packed(6, 3), tolerance=10.0).leaks


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_is_a_bound(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance=.*expected a finite number"):
        maskops.audit(Decoder(CORRECT), packed(6, 3), tolerance=tolerance)


@pytest.mark.parametrize("error", [AssertionError, ZeroDivisionError])
def test_a_batch_that_ends_in_an_error_is_refused_and_the_others_are_measured(error: type[Exception]) -> None:
    class Asserting(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
            if attention_mask is not None and not bool(attention_mask[:, 0].all()):
                raise error("padded left")
            return super().forward(input_ids)

    report = maskops.audit(Asserting(CORRECT), lengths=[5, 3])
    assert report["padded left"].refused == f"{error.__name__}: padded left"
    assert report["padded right"].verdict == "clean"


def test_a_document_that_turns_another_into_nan_leaks() -> None:
    class Poisonous(Decoder):
        def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None, **others: Any) -> Tensor:
            logits = super().forward(input_ids, seq_idx)
            if seq_idx is not None and int(input_ids[0, 0]) != token:
                logits[0, 7] = float("nan")
            return logits

    batch = packed(6, 3)
    token = int(batch["input_ids"][0, 0])
    found = audited(Poisonous(CORRECT), batch)
    assert [(leak.source, leak.target) for leak in found.leaks] == [(0, 1)]
    assert found.leaks[0].change.max_abs == float("inf") and found.leaks[0].change.flipped == pytest.approx(1 / 3)
