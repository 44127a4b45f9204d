"""PackedBatch and PaddedBatch: everything that follows from lengths, against plain Python loops."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

import maskops
from maskops import PackedBatch, PaddedBatch, data, masks
from maskops.data import IGNORE_INDEX, pad, shift_labels

Items = list[tuple[list[int], list[int], int]]
"""Token ids, labels and the first position of each sequence."""


@st.composite
def sequences(draw: st.DrawFn) -> Items:
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7]), max_size=5))
    token = st.integers(0, 9)
    return [
        (
            draw(st.lists(token, min_size=length, max_size=length)),
            draw(st.lists(st.sampled_from([IGNORE_INDEX, 1, 2, 3]), min_size=length, max_size=length)),
            draw(st.sampled_from([0, 0, 4])),
        )
        for length in lengths
    ]


def targets_of(tokens: list[int], labels: list[int] | None) -> list[int]:
    """What each position of one sequence is scored against."""
    source = tokens if labels is None else labels
    return [*source[1:], IGNORE_INDEX] if source else []


def attends(pattern: str, first: int, second: int) -> bool:
    return pattern == "full" or second <= first


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(sequences(), st.integers(0, 3), st.integers(0, 2), st.booleans(), st.sampled_from([0, 2]))
def test_packed_batches_against_loops(items: Items, tail: int, unused: int, has_labels: bool, start: int) -> None:
    tokens, labels, firsts = ([item[place] for item in items] for place in range(3))
    lengths = [len(sequence) for sequence in tokens]
    total = sum(lengths)
    batch = PackedBatch.from_sequences(
        tokens,
        labels if has_labels else None,
        total + tail,
        max_sequences=len(items) + unused,
        max_seqlen=max(lengths, default=0) + unused,
        first_positions=firsts,
        position_start=start,
        pad_token_id=8,
    )
    assert batch.input_ids.tolist() == [token for sequence in tokens for token in sequence] + [8] * tail
    assert batch.lengths.tolist() == lengths + [0] * unused and batch.lengths.dtype == torch.int32
    cumulative = [sum(lengths[:count]) for count in range(len(items) + 1)]
    assert batch.cu_seqlens.tolist() == cumulative + [total] * unused and batch.cu_seqlens.dtype == torch.int32
    ids = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * tail
    assert batch.sequence_ids.tolist() == ids
    assert batch.segment_ids.tolist() == [number + 1 for number in ids]
    positions = [start + first + place for first, n in zip(firsts, lengths, strict=True) for place in range(n)]
    assert batch.position_ids.tolist() == positions + [max(0, start - 1)] * tail
    shifted = [x for s, y in zip(tokens, labels, strict=True) for x in targets_of(s, y if has_labels else None)]
    assert batch.shift_labels.tolist() == shifted + [IGNORE_INDEX] * tail
    assert batch.row_mask.tolist() == [[True] * total + [False] * tail]

    for name, pattern in (("causal", None), ("full", masks.full())):
        dense = batch.dense_mask(pattern)
        size = total + tail
        expected = [[ids[i] == ids[j] >= 0 and attends(name, i, j) for j in range(size)] for i in range(size)]
        assert dense.shape == (1, 1, size, size) and dense[0, 0].tolist() == expected
    assert torch.equal(batch.spans().to_dense(), batch.dense_mask())

    inputs = batch.transformers_inputs(attention_mask="dense", seq_idx=True)
    # Models of transformers shift by one place without a look at boundaries.
    by_model = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    assert torch.equal(by_model, inputs["shift_labels"])
    assert inputs["shift_labels"].tolist() == [batch.shift_labels.tolist()]
    covered = inputs["cu_seq_lens_q"]
    assert covered is inputs["cu_seq_lens_k"] and covered.dtype == torch.int32
    assert int(covered[-1]) == total + tail and inputs["max_length_q"] >= int(covered.diff().max() if len(ids) else 0)
    assert (inputs["attention_mask"] == 0).any(-1).all() and inputs["seq_idx"].tolist() == [ids]

    if has_labels and total:
        # The operator shifts by itself where it is asked to: both say the same.
        logits = torch.randn(total + tail, 10)
        options: Any = {"cu_seqlens": batch.cu_seqlens, "reduction": "sum"}
        by_operator = maskops.cross_entropy(logits, batch.labels, shift=True, **options)
        torch.testing.assert_close(maskops.cross_entropy(logits, batch.shift_labels, reduction="sum"), by_operator)

    for side in ("right", "left"):
        padded = batch.to_padded(padding_value=9, side=side)
        assert padded.side == side and padded.input_ids.shape == (len(items) + unused, batch.max_seqlen)
        back = padded.to_packed()
        for name in ("input_ids", "lengths", "labels", "position_ids", "shift_labels"):
            mine, other = getattr(batch, name), getattr(back, name)
            assert (mine is None and other is None) or mine[: other.shape[0]].tolist() == other.tolist(), name


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sequences(),
    st.sampled_from(["right", "left"]),
    st.integers(0, 2),
    st.sampled_from([1, 4]),
    st.booleans(),
    st.sampled_from([0, 2]),
)
def test_padded_batches_against_loops(
    items: Items, side: Any, more: int, multiple: int, has_labels: bool, start: int
) -> None:
    tokens, labels, firsts = ([item[place] for item in items] for place in range(3))
    longest = max(map(len, tokens), default=0)
    batch = pad(
        tokens,
        labels if has_labels else None,
        pad_token_id=3,  # also the id of real tokens
        side=side,
        length=longest + more if more else None,
        multiple_of=multiple,
        first_positions=firsts,
        position_start=start,
    )
    width = -(-(longest + more) // multiple) * multiple

    def row(values: list[int], filler: int) -> list[int]:
        rest = [filler] * (width - len(values))
        return values + rest if side == "right" else rest + values

    assert batch.input_ids.tolist() == [row(sequence, 3) for sequence in tokens]
    if tokens and not more and multiple == 1:
        by_torch = pad_sequence([torch.tensor(s).long() for s in tokens], True, 3.0, padding_side=side)
        assert torch.equal(batch.input_ids, by_torch)
    assert batch.attention_mask.int().tolist() == [row([1] * len(sequence), 0) for sequence in tokens]
    assert batch.sequence_ids.tolist() == [row([n] * len(sequence), -1) for n, sequence in enumerate(tokens)]
    places = [[start + first + place for place in range(len(s))] for s, first in zip(tokens, firsts, strict=True)]
    assert batch.position_ids.tolist() == [row(place, max(0, start - 1)) for place in places]
    shifted = [targets_of(s, y if has_labels else None) for s, y in zip(tokens, labels, strict=True)]
    assert batch.shift_labels.tolist() == [row(target, IGNORE_INDEX) for target in shifted]
    assert (batch.labels is not None) == has_labels
    if has_labels:
        assert batch.labels.tolist() == [row(label, IGNORE_INDEX) for label in labels]
    for name, pattern in (("causal", None), ("full", masks.full())):
        real = batch.attention_mask.tolist()
        expected = [
            [[real[n][i] and real[n][j] and attends(name, i, j) for j in range(width)] for i in range(width)]
            for n in range(len(tokens))
        ]
        dense = batch.dense_mask(pattern)
        assert dense.expand(len(tokens), 1, width, width)[:, 0].tolist() == expected
    inputs = batch.transformers_inputs(shift_labels=True)
    by_model = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    assert torch.equal(by_model, inputs["shift_labels"])
    assert torch.equal(inputs["attention_mask"] != 0, batch.attention_mask)
    packed = batch.to_packed()
    assert packed.sequence_ids.tolist() == [n for n, sequence in enumerate(tokens) for _ in sequence]
    assert packed.to_padded(padding_value=3, side=side).input_ids.tolist() == batch.input_ids[:, :].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_moves_are_exact_and_padding_reaches_nothing(side: Any) -> None:
    batch = PackedBatch.from_sequences([[1, 2, 3], [], [4], [5, 6]], capacity=8, max_sequences=5, max_seqlen=4)
    values = torch.randn(8, 2, dtype=torch.float64)
    values[6:] = float("nan")
    values.requires_grad_()
    padded = batch.to_padded(values, -1.0, side=side)
    real = batch.to_padded(side=side).attention_mask
    assert padded.shape == (5, 4, 2) and (padded[~real] == -1).all() and torch.equal(padded[real], values[:6])
    poisoned = torch.where(real[..., None], padded, float("nan"))
    back = batch.to_packed(poisoned, side=side)
    assert torch.equal(back[:6], values[:6]) and not back[6:].any()
    incoming = torch.randn(8, 2, dtype=torch.float64)
    incoming[6:] = float("nan")
    (gradient,) = torch.autograd.grad(back, values, incoming)
    assert torch.equal(gradient[:6], incoming[:6]) and not gradient[6:].any()

    rows = batch.to_padded(side=side)
    cells = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    room = rows.to_packed(torch.where(real[..., None], cells, float("nan")), capacity=9)
    assert torch.equal(room[:6], cells[real]) and not room[6:].any()
    packed = rows.to_packed(cells)
    assert torch.equal(packed, cells[real])
    assert torch.equal(rows.to_packed(capacity=9).shift_labels[:6], rows.to_packed().shift_labels)
    again = rows.to_padded(room, 7.0)
    assert torch.equal(again[real], cells[real]) and (again[~real] == 7).all()
    (gradient,) = torch.autograd.grad(again, cells, torch.ones_like(again))
    assert torch.equal(gradient, real[..., None].expand_as(gradient).double())


def batches() -> list[Any]:
    one = {"first_positions": [0, 3, 0], "position_start": 2, "sequence_labels": [1, 0, 1]}
    tokens = [[1, 2], [3], []]
    return [
        PackedBatch.from_sequences(tokens, capacity=4),
        PackedBatch.from_sequences(tokens, tokens, max_sequences=4, **one),
        pad(tokens, pad_token_id=0),
        pad(tokens, tokens, pad_token_id=0, side="left", **one),
    ]


def fields(batch: Any) -> dict[str, Any]:
    named = (*type(batch).TENSORS, "max_seqlen", "position_start", "shift_labels", "position_ids")
    return {name: getattr(batch, name) for name in named}


def assert_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    for (name, mine), other in zip(fields(first).items(), fields(second).values(), strict=True):
        equal = torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
        assert equal, name


@pytest.mark.parametrize("number", range(4))
def test_housekeeping(number: int) -> None:
    batch = batches()[number]
    buffer = io.BytesIO()
    torch.save(batch, buffer)
    buffer.seek(0)
    assert_equal(batch, torch.load(buffer, weights_only=True))
    for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), batch.to("cpu", non_blocking=True)):
        assert_equal(batch, copied)
    leaves, spec = pytree.tree_flatten(batch)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) == (2 if number in (0, 2) else 5)
    assert_equal(batch, pytree.tree_unflatten(leaves, spec))
    assert spec == pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert str(pytree.tree_flatten_with_path(batch)[0][0][0][-1]) == ".input_ids"
    shapes = pytree.tree_map(lambda tensor: tuple(tensor.shape), batch)  # gives no tensors: nothing may check them
    assert shapes.lengths == tuple(batch.lengths.shape)
    assert batch.to("meta").input_ids.device.type == "meta"
    assert batch.to("meta").shift_labels.shape == batch.input_ids.shape
    assert "meta" in repr(batch.to("meta")) and "3 tokens" in repr(batch)


def test_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the thread of a DataLoader asks for it; here is no device to pin for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    for batch in batches():
        pinned = torch.utils.data._utils.pin_memory.pin_memory({"batch": batch})["batch"]
        assert type(pinned) is type(batch) and torch.equal(pinned.input_ids, batch.input_ids + 1)
        assert pinned.lengths is not batch.lengths and pinned.max_seqlen == batch.max_seqlen


def test_narrow_lengths() -> None:
    ids = torch.arange(600).view(2, 300)  # wider than these integers count
    batch = PaddedBatch(ids, torch.tensor([3, 1], dtype=torch.uint8), "left")
    assert batch.position_ids[:, -3:].tolist() == [[0, 1, 2], [0, 0, 0]] and not batch.position_ids[:, :-3].any()
    assert batch.attention_mask.sum(1).tolist() == [3, 1] and batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.to_packed().input_ids.tolist() == [297, 298, 299, 599]
    packed = PackedBatch(torch.arange(4), torch.tensor([3, 1], dtype=torch.uint8), 3)
    assert packed.to_padded(padding_value=9, side="left").input_ids.tolist() == [[0, 1, 2], [9, 9, 3]]
    assert packed.to_packed(packed.to_padded(packed.input_ids, side="left"), side="left").tolist() == [0, 1, 2, 3]


def test_narrow_integers_become_wide() -> None:
    lengths = torch.tensor([100, 56], dtype=torch.uint8)
    labels = torch.zeros(200, dtype=torch.uint8)
    packed = PackedBatch(torch.zeros(200, dtype=torch.int16), lengths, 256, labels)
    assert packed.lengths.dtype == torch.int32 and packed.input_ids.dtype == packed.labels.dtype == torch.int64
    assert packed.to_padded().labels[1, 56:].eq(IGNORE_INDEX).all()
    padded = PaddedBatch(torch.zeros(2, 256, dtype=torch.int64), lengths, "left")
    assert padded.lengths.tolist() == [100, 56] and padded.attention_mask.sum(1).tolist() == [100, 56]


def test_exported_programs_take_batches(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, batch: PackedBatch) -> torch.Tensor:
            return batch.shift_labels + batch.position_ids

    batch = batches()[1]
    program = torch.export.export(Model(), (batch,))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert torch.equal(loaded.module()(batch), Model()(batch))


@pytest.mark.parametrize("number", [1, 3])
def test_batches_in_compiled_code(number: int) -> None:
    batch = batches()[number]

    def step(batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return batch.shift_labels, batch.position_ids, batch.cu_seqlens

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(batch)
    assert all(torch.equal(a, b) for a, b in zip(found, step(batch), strict=True))


def test_room_makes_one_graph() -> None:
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=False)
    def step(batch: PackedBatch) -> torch.Tensor:
        return batch.shift_labels + batch.position_ids + batch.cu_seqlens.sum() + batch.to_padded(batch.input_ids).sum()

    for tokens in ([[1, 2, 3]], [[1], [2, 3], []], [[4, 5], [6]]):
        batch = PackedBatch.from_sequences(tokens, capacity=8, max_sequences=4, max_seqlen=6)
        step(batch)
    assert graphs == 1


def test_room_makes_fixed_inputs_of_transformers() -> None:
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=False)
    def step(inputs: dict[str, Any]) -> torch.Tensor:
        return inputs["cu_seq_lens_q"] * inputs["max_length_q"] + inputs["labels"].sum()

    ends = []
    for tokens in ([[1, 2, 3], [4, 5, 6], [7, 8]], [[1], [2, 3]], [[1]], []):  # full, partly full, with a long tail
        batch = PackedBatch.from_sequences(tokens, capacity=8, max_sequences=4, max_seqlen=3)
        inputs = batch.transformers_inputs()
        assert inputs["max_length_q"] == inputs["max_length_k"] == 8
        step(inputs)
        ends.append(inputs["cu_seq_lens_q"].tolist())
    assert ends == [[0, 3, 6, 8, 8, 8], [0, 1, 3, 3, 3, 8], [0, 1, 1, 1, 1, 8], [0, 0, 0, 0, 0, 8]] and graphs == 1
    # Without room there is no tail, and the longest is known.
    inputs = PackedBatch.from_sequences([[1], [2, 3]]).transformers_inputs()
    assert inputs["cu_seq_lens_k"].tolist() == [0, 1, 3] and inputs["max_length_k"] == 2
    inputs = pad([[1], [2, 3]], pad_token_id=0).to_packed().transformers_inputs()
    assert inputs["cu_seq_lens_k"].tolist() == [0, 1, 3] and inputs["max_length_k"] == 2
    inputs = pad([[1], [2, 3]], pad_token_id=0).to_packed(capacity=3).transformers_inputs()
    assert inputs["cu_seq_lens_k"].tolist() == [0, 1, 3, 3] and inputs["max_length_k"] == 3


def test_meaning_of_shift_labels() -> None:
    labels, ids = torch.tensor([5, 6, 7, 8], dtype=torch.uint8), torch.tensor([0, 0, 1, -1])
    assert shift_labels(labels, ids).tolist() == [6, -100, -100, -100]
    assert shift_labels(labels, ids, ignore_index=0).tolist() == [6, 0, 0, 0]
    assert shift_labels(labels[:0], ids[:0]).tolist() == []
    with pytest.raises(ValueError, match=r"^labels has shape \(4,\), sequence_ids \(3,\): expected \(..., length\)"):
        shift_labels(labels, ids[:3])
    with pytest.raises(TypeError, match=r"^labels has dtype torch.float32, expected integers$"):
        shift_labels(labels.float(), ids)
    with pytest.raises(TypeError, match=r"^sequence_ids: expected a tensor \(..., length\), got list$"):
        shift_labels(labels, [0, 0, 1, -1])


def test_labels_for_models_that_do_not_shift_them() -> None:
    tokens, labels = [[1, 2], [3]], [[4, 5], [6]]
    packed = PackedBatch.from_sequences(tokens, labels)
    assert packed.transformers_inputs(labels="aligned")["labels"].tolist() == [[4, 5, 6]]
    assert packed.transformers_inputs()["labels"].tolist() == [[-100, 5, -100]]
    assert "labels" not in packed.transformers_inputs(labels=None)
    padded = pad(tokens, labels, pad_token_id=0, side="left")
    assert padded.transformers_inputs(labels="aligned")["labels"].tolist() == [[4, 5], [-100, 6]]
    assert padded.transformers_inputs()["labels"].tolist() == [[-100, 5], [-100, -100]]
    assert "labels" not in padded.transformers_inputs(labels=None)
    classified = pad(tokens, pad_token_id=0, sequence_labels=[2, 0])
    assert classified.transformers_inputs()["labels"].tolist() == [2, 0]
    assert classified.to_packed().transformers_inputs(labels="sequences")["labels"].tolist() == [2, 0]
    with pytest.raises(
        ValueError, match=r"^labels='causal', and the batch has sequence_labels: .* not for 2\. Use data\."
    ):
        classified.to_packed().transformers_inputs()
    assert "labels" not in classified.to_packed().transformers_inputs(labels=None)
    room = PackedBatch.from_sequences(tokens, sequence_labels=torch.tensor([0.5, 1.5]), max_sequences=3)
    assert room.sequence_labels[:2].tolist() == [0.5, 1.5] and room.sequence_labels[2].isnan()
    assert PackedBatch.from_sequences(tokens, sequence_labels=[1, 2], max_sequences=3).sequence_labels[2] == -100


def test_additive_masks() -> None:
    packed = PackedBatch.from_sequences([[1, 2], [3]], capacity=4)
    mask = packed.transformers_inputs(attention_mask="dense", mask_dtype=torch.float16)["attention_mask"]
    lowest = torch.finfo(torch.float16).min
    assert mask[0, 0].tolist() == [
        [0, lowest, lowest, lowest], [0, 0, lowest, lowest], [lowest, lowest, 0, lowest], [lowest, lowest, lowest, 0]
    ]  # fmt: skip
    padded = pad([[1, 2], [3]], pad_token_id=0)
    allowed = padded.transformers_inputs(attention_mask="dense", pattern=masks.full(), mask_dtype=torch.bool)
    allowed = allowed["attention_mask"]
    assert allowed[:, 0].tolist() == [[[True, True], [True, True]], [[True, False], [False, True]]]


def test_refusals() -> None:
    tokens = [[1, 2, 3], [4]]
    lengths = torch.tensor([3, 1])
    row = torch.arange(4)
    for make, error, text in [
        (lambda: PackedBatch(row[None], lengths, 3), ValueError, r"input_ids has shape \(1, 4\), expected \(total,\)"),
        (lambda: PackedBatch(row, lengths.float(), 3), TypeError, "lengths has dtype torch.float32, expected integers"),
        (lambda: PackedBatch(row, lengths, 2), ValueError, r"lengths\[0\]=3 is more than max_seqlen=2"),
        (lambda: PackedBatch(row, -lengths, 2), ValueError, r"lengths\[0\]=-3 is negative"),
        (lambda: PackedBatch(row[:3], lengths, 3), ValueError, "lengths sum to 4, more than the 3 places of input_ids"),
        (lambda: PackedBatch(row, lengths, 3, row[:2]), ValueError, r"labels has shape \(2,\), expected \(4,\), that"),
        (lambda: PackedBatch(row, lengths, 3, position_start=-1), ValueError, "position_start=-1 is negative"),
        (lambda: PackedBatch([1], lengths, 3), TypeError, r"input_ids: expected a tensor \(total,\), got list"),
        (lambda: PackedBatch(row, lengths.to("meta"), 3), ValueError, "lengths is on meta, input_ids on cpu"),
        (lambda: PaddedBatch(row, lengths), ValueError, r"input_ids has shape \(4,\), expected \(batch, length\)"),
        (lambda: PaddedBatch(row[None], lengths), ValueError, "lengths has 2 elements, input_ids 1 rows"),
        (lambda: PaddedBatch(row[None], lengths[:1], "top"), ValueError, "side='top': expected 'right' or 'left'"),
        (lambda: pad(tokens, pad_token_id=0, length=2), ValueError, r"sequences\[0\] has 3 tokens, more than length=2"),
        (lambda: pad(tokens, pad_token_id=0, multiple_of=0), ValueError, "multiple_of=0: expected 1 or more"),
        (lambda: pad(tokens, [[1], [2]], pad_token_id=0), ValueError, r"labels\[0\] has 1 labels, sequences\[0\] 3"),
        (lambda: pad(tokens, pad_token_id=0, length=-1), ValueError, "length=-1: expected 0 or more"),
        (lambda: pad(tokens, pad_token_id=0, length=2.5), TypeError, "length is 2.5: expected an integer"),  # type: ignore[arg-type]
        (lambda: pad(tokens, pad_token_id=None), TypeError, "pad_token_id is None: expected an integer"),  # type: ignore[arg-type]
        (
            lambda: PackedBatch.from_sequences(tokens, capacity="8"),  # type: ignore[arg-type]
            TypeError,
            "capacity is '8': expected an integer",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens, max_sequences=-1),
            ValueError,
            "max_sequences=-1: expected 0 or more",
        ),
        (lambda: pad(["ab"], pad_token_id=0), TypeError, r"sequences\[0\] is str, expected a list or a tensor of"),
        (lambda: pad([["a", "b"]], pad_token_id=0), TypeError, r"sequences\[0\] is a list of str, expected a list or"),
        (lambda: pad([[True]], pad_token_id=0), TypeError, r"sequences\[0\] has dtype torch.bool, expected integers"),
        (
            lambda: pad(tokens, pad_token_id=0, first_positions=[1]),
            ValueError,
            r"first_positions has shape \(1,\)",
        ),
        (lambda: pad(tokens, pad_token_id=0, first_positions=[0, -1]), ValueError, r"first_positions\[1\]=-1 is neg"),
        (
            lambda: PackedBatch.from_sequences(tokens, max_sequences=1),
            ValueError,
            "sequences holds 2 sequences, more than max_sequences=1",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens, max_seqlen=2),
            ValueError,
            r"sequences\[0\] has 3 tokens, more than max_seqlen=2",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens).to_packed(torch.zeros(2, 4)),
            ValueError,
            r"padded has shape \(2, 4\), expected \(2, 3, ...\)",
        ),
        (
            lambda: pad(tokens, pad_token_id=0).to_packed(capacity=3),
            ValueError,
            "the batch holds 4 tokens, more than capacity=3",
        ),
        (
            lambda: pad(tokens, pad_token_id=0).to_padded(torch.zeros(3)),
            ValueError,
            r"packed has shape \(3,\), expected \(4, ...\) or more rows, the sum",
        ),
        (
            lambda: pad(tokens, pad_token_id=0).to_packed(torch.zeros(2, 2)),
            ValueError,
            r"padded has shape \(2, 2\), expected \(2, 3, ...\), the shape of input_ids",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens).transformers_inputs(labels="shifted"),
            ValueError,
            "labels='shifted': expected 'causal', 'aligned', 'sequences' or None",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens).transformers_inputs(labels="sequences"),
            ValueError,
            "labels='sequences': the batch has no sequence_labels",
        ),
        (
            lambda: PackedBatch(torch.arange(5), lengths, 3, has_room=False),
            ValueError,
            "lengths sum to 4, input_ids has 5 places, and has_room=False",
        ),
        (
            lambda: PackedBatch.from_sequences(tokens).transformers_inputs(attention_mask="2d"),
            ValueError,
            "attention_mask='2d': expected 'dense' or None",
        ),
        (
            lambda: pad(tokens, pad_token_id=0).transformers_inputs(attention_mask="dense", mask_dtype=torch.int64),
            ValueError,
            "mask_dtype=torch.int64: expected torch.bool or a floating point dtype",
        ),
    ]:
        with pytest.raises(error, match=f"^{text}"):
            make()


def test_what_does_not_go_with_a_batch_is_named() -> None:
    batch = PackedBatch.from_sequences([[1, 2, 3], [], [4, 5]], capacity=6)
    batch.check(logits=torch.zeros(6, 9), labels=torch.zeros(1, 6), hidden=torch.zeros(1, 6, 4))
    PackedBatch.from_sequences([[1]]).check(logits=torch.zeros(1, 9))
    padded = pad([[1, 2, 3], [4, 5]], pad_token_id=0)
    padded.check(logits=torch.zeros(2, 3, 9), labels=padded.shift_labels)
    for values, shape, text in [
        ({"logits": torch.zeros(4, 9)}, (4, 9), "; sequence 2, places 3 to 4, is the first that it lacks"),
        ({"labels": torch.zeros(1, 2)}, (1, 2), "; sequence 0, places 0 to 2, is the first that it lacks"),
        ({"logits": torch.zeros(7, 9)}, (7, 9), "; the last sequence, 2, ends with place 4"),
        ({"logits": torch.zeros(5, 9)}, (5, 9), "; the last sequence, 2, ends with place 4"),
        ({"logits": torch.zeros(3, 3, 9)}, (3, 3, 9), "; it is padded: give batch.to_packed(logits)"),
        ({"labels": batch.shift_labels, "weights": torch.zeros(())}, (), ""),
    ]:
        name = list(values)[-1]
        with pytest.raises(ValueError, match=f"^{name} ") as raised:
            batch.check(**values)
        assert (
            str(raised.value) == f"{name} has shape {shape}, expected (6, ...), one row for each place of batch{text}"
        )
    for value, text in [
        (torch.zeros(1, 3, 9), "; sequence 1 is the first that it lacks"),
        (torch.zeros(2, 2), "; sequence 0, of 3 tokens, is the first that is cut off"),
        (torch.zeros(2, 4), ""),
        (torch.zeros(5, 9), "; it is packed: give batch.to_padded(logits)"),
    ]:
        with pytest.raises(ValueError, match=r"^logits ") as raised:
            padded.check(logits=value)
        shape = tuple(value.shape)
        assert (
            str(raised.value)
            == f"logits has shape {shape}, expected (2, 3, ...), a row for each sequence of batch{text}"
        )
    with pytest.raises(
        ValueError, match=r"^labels has shape \(2,\), expected \(6, ...\), one row for each place of batch$"
    ):
        batch.to("meta").check(labels=torch.zeros(2))
    with pytest.raises(TypeError, match=r"^logits: expected a tensor \(total, ...\), got list$"):
        batch.check(logits=[1])


def test_a_label_for_each_class() -> None:
    classes = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    padded = pad([[1, 2], [3]], pad_token_id=0, sequence_labels=classes)
    assert torch.equal(padded.transformers_inputs()["labels"], classes)
    room = PackedBatch.from_sequences([[1, 2], [3]], max_sequences=3, sequence_labels=classes.tolist())
    assert torch.equal(room.sequence_labels[:2], classes) and room.sequence_labels[2].isnan().all()
    with pytest.raises(
        ValueError, match=r"^sequence_labels has shape \(2, 3\), expected \(1,\): one for each sequence$"
    ):
        pad([[1]], pad_token_id=0, sequence_labels=classes)


def test_names_of_the_package() -> None:
    assert all(hasattr(data, name) for name in data.__all__)
