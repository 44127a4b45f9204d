"""Recurrent layers over a whole batch are those layers over each sequence alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from maskops import PackedBatch
from maskops.data import from_packed_sequence, pad, sequence_states, to_packed_sequence


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 6]), min_size=1, max_size=6).filter(any), st.integers(0, 2))
def test_packed_sequences_are_those_of_torch(lengths: list[int], tail: int) -> None:
    sequences = [list(range(10 * n, 10 * n + length)) for n, length in enumerate(lengths)]
    batch = PackedBatch.from_sequences(sequences, capacity=sum(lengths) + tail)
    found = to_packed_sequence(batch)
    present = [torch.tensor(sequence) for sequence in sequences if sequence]
    expected = pack_sequence(present, enforce_sorted=False)
    assert found.batch_sizes.tolist() == expected.batch_sizes.tolist()
    # Layers permute initial states by these numbers.
    assert sorted(found.sorted_indices.tolist()) == list(range(len(present)))
    # torch's own sort need not keep equal lengths in their order: compare what each side unpacks.
    padded = [torch.nn.utils.rnn.pad_packed_sequence(x, batch_first=True)[0] for x in (found, expected)]
    assert torch.equal(*padded)
    assert from_packed_sequence(found, batch)[: sum(lengths)].tolist() == [x for s in sequences for x in s]
    for packed in (found, expected):
        back = from_packed_sequence(packed)
        assert back.input_ids.tolist() == [x for s in sequences for x in s]
        assert back.lengths.tolist() == [length for length in lengths if length]
        assert back.max_seqlen == max(lengths)


def test_sorted_packed_sequences() -> None:
    rows = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    back = from_packed_sequence(pack_padded_sequence(rows, [3, 2, 1], batch_first=True))
    assert back.input_ids.tolist() == [1, 2, 3, 4, 5, 6] and back.lengths.tolist() == [3, 2, 1]


@pytest.mark.parametrize("side", ["packed", "right", "left"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_over_a_batch_is_the_lstm_over_each_sequence(side: Any, bidirectional: bool) -> None:
    torch.manual_seed(0)
    sequences = [[1, 2, 3], [], [4], [5, 6, 7, 8], [9, 1]]
    if side == "packed":
        batch: Any = PackedBatch.from_sequences(sequences, capacity=13)
    else:
        batch = pad(sequences, pad_token_id=1, side=side, length=5)
    embedding = torch.nn.Embedding(10, 3, dtype=torch.float64)
    lstm = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    parameters = [*embedding.parameters(), *lstm.parameters()]

    output, (last, cell) = lstm(to_packed_sequence(batch, embedding(batch.input_ids)))
    values = from_packed_sequence(output, batch)
    last, cell = sequence_states(batch, last), sequence_states(batch, cell)
    assert values.shape == (*batch.input_ids.shape, 8 if bidirectional else 4)
    real = values[:10] if side == "packed" else batch.to_packed(values)
    outside = values[10:] if side == "packed" else values[~batch.attention_mask]
    assert not outside.any() and not last[:, 1].any() and last.shape[1] == 5

    expected, loss = [], torch.zeros((), dtype=torch.float64)
    for number, sequence in enumerate(sequences):
        if sequence:
            alone, (end, kept) = lstm(embedding(torch.tensor(sequence)))
            expected.append(alone)
            torch.testing.assert_close(last[:, number], end)
            torch.testing.assert_close(cell[:, number], kept)
            loss = loss + (alone**2).sum() + (end**2).sum()
    torch.testing.assert_close(real, torch.cat(expected))
    gradients = torch.autograd.grad(loss, parameters)
    for mine, other in zip(
        torch.autograd.grad((values**2).sum() + (last**2).sum(), parameters), gradients, strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_refusals() -> None:
    batch = PackedBatch.from_sequences([[1, 2], [3]])
    packed = to_packed_sequence(batch, torch.randn(3, 2))
    for call, error, text in [
        (
            lambda: to_packed_sequence(batch, torch.zeros(2, 4)),
            ValueError,
            r"tensor has shape \(2, 4\), expected \(3, ...",
        ),
        (lambda: to_packed_sequence(PackedBatch.from_sequences([[]])), ValueError, "batch has no tokens: a PackedSeq"),
        (
            lambda: from_packed_sequence(packed),
            TypeError,
            r"packed_sequence holds torch.float32 of shape \(3, 2\), exp",
        ),
        (
            lambda: from_packed_sequence(packed, PackedBatch.from_sequences([[1], [2, 3]])),
            ValueError,
            r"packed_sequence has sequences of \[2, 1\] tokens, batch of \[1, 2\]: give the batch that it came from",
        ),
        (
            lambda: sequence_states(batch, torch.zeros(1, 3, 4)),
            ValueError,
            r"states has shape \(1, 3, 4\), expected \(la",
        ),
    ]:
        with pytest.raises(error, match=f"^{text}"):
            call()
