"""Packing and unpacking, against plain Python loops."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskops import masks
from maskops.data import PackedBatch
from maskops.packing import (
    cu_seqlens_from_lengths,
    cu_seqlens_from_mask,
    cu_seqlens_from_position_ids,
    pad_input,
    unpad_input,
)

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]],
    "an empty row": [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]],
    "nothing": [[0, 0, 0, 0]] * 3,
    "everything": [[1, 1, 1, 1]] * 3,
}


def test_cu_seqlens_from_lengths():
    assert cu_seqlens_from_lengths(torch.tensor([3, 0, 2])).tolist() == [0, 3, 3, 5]
    cu = cu_seqlens_from_lengths(torch.zeros(0, dtype=torch.int64))
    assert cu.tolist() == [0] and cu.dtype == torch.int32
    # Sums must not wrap in the dtype of the lengths.
    assert cu_seqlens_from_lengths(torch.full((3,), 200, dtype=torch.uint8)).tolist() == [0, 200, 400, 600]
    with pytest.raises(ValueError, match=r"lengths\[1\]=-2 is negative"):
        cu_seqlens_from_lengths(torch.tensor([1, -2]))
    with pytest.raises(ValueError, match=r"lengths has shape \(2, 2\), expected \(n_sequences,\)"):
        cu_seqlens_from_lengths(torch.ones(2, 2).int())
    with pytest.raises(TypeError, match=r"lengths has dtype torch.float32, expected integers"):
        cu_seqlens_from_lengths(torch.ones(2))


@pytest.mark.parametrize("name", MASKS)
def test_cu_seqlens_from_mask(name):
    mask = torch.tensor(MASKS[name])
    expected = [0]
    for row in MASKS[name]:
        expected.append(expected[-1] + sum(row))
    assert cu_seqlens_from_mask(mask).tolist() == expected == cu_seqlens_from_mask(mask.bool()).tolist()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(12,\)"):
        cu_seqlens_from_mask(mask.flatten())
    with pytest.raises(TypeError, match=r"attention_mask has dtype torch.float32, expected bool or 0/1 integers"):
        cu_seqlens_from_mask(mask.float())
    with pytest.raises(TypeError, match=r"attention_mask: expected a tensor .* got list"):
        cu_seqlens_from_mask(MASKS[name])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 3, 5, 6]),
        ([2, 3, 4, 2, 3], [0, 3, 5]),
        ([3, 4, 5, 0, 1], [0, 3, 5]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([7], [0, 1]),
        ([], [0]),
    ],
    ids=str,
)
def test_cu_seqlens_from_position_ids(positions, expected):
    tensor = torch.tensor(positions, dtype=torch.int64)
    for given in (tensor, tensor.unsqueeze(0), tensor.int()):
        cu = cu_seqlens_from_position_ids(given)
        assert cu.tolist() == expected and cu.dtype == torch.int32
        padded = cu_seqlens_from_position_ids(given, capacity=7)
        assert padded.tolist() == expected + [expected[-1]] * (8 - len(expected)) and padded.dtype == torch.int32


def test_position_ids_that_are_refused():
    with pytest.raises(ValueError, match=r"position_ids jumps from 3 to 5 at index 4: .* give cu_seqlens"):
        cu_seqlens_from_position_ids(torch.tensor([0, 1, 2, 3, 5, 6]))
    with pytest.raises(ValueError, match=r"position_ids has shape \(2, 3\), expected \(L,\) or \(1, L\): .*flatten"):
        cu_seqlens_from_position_ids(torch.zeros(2, 3).int())
    with pytest.raises(ValueError, match="position_ids holds 3 sequences, more than capacity=2"):
        cu_seqlens_from_position_ids(torch.tensor([0, 0, 0]), capacity=2)
    with pytest.raises(TypeError, match=r"position_ids has dtype torch.float32"):
        cu_seqlens_from_position_ids(torch.zeros(3))


@pytest.mark.parametrize("rest", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_unpad_and_pad(name, rest):
    mask = torch.tensor(MASKS[name])
    hidden = torch.randn(3, 4, *rest)
    places = [(b, s) for b in range(3) for s in range(4) if MASKS[name][b][s]]
    packed, indices, cu_seqlens, longest, used = unpad_input(hidden, mask)
    assert packed.shape == (len(places), *rest) and all(torch.equal(packed[n], hidden[p]) for n, p in enumerate(places))
    assert indices.tolist() == [4 * b + s for b, s in places] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == cu_seqlens_from_mask(mask).tolist() and cu_seqlens.dtype == torch.int32
    assert longest == max(map(sum, MASKS[name])) and isinstance(longest, int)
    assert used.tolist() == [sum(row) for row in MASKS[name]] and used.dtype == torch.int32
    back = pad_input(packed, indices, 3, 4)
    assert torch.equal(back, torch.where(mask.bool().view(3, 4, *[1] * len(rest)), hidden, 0))

    fixed, fixed_indices, fixed_cu, fixed_longest, fixed_used = unpad_input(hidden, mask.bool(), capacity=14)
    assert torch.equal(fixed[: len(places)], packed) and not fixed[len(places) :].any() and fixed.shape[0] == 14
    assert fixed_indices.tolist() == indices.tolist() + [12] * (14 - len(places))
    assert torch.equal(fixed_cu, cu_seqlens) and fixed_longest == 4 and torch.equal(fixed_used, used)
    assert torch.equal(pad_input(fixed, fixed_indices, 3, 4), back)


def test_unused_tokens_are_kept_and_not_counted():
    hidden = torch.arange(8.0).view(2, 4)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    packed, indices, cu_seqlens, longest, used = unpad_input(hidden, mask, unused)
    assert packed.tolist() == [0, 1, 2, 4, 7] and indices.tolist() == [0, 1, 2, 4, 7]
    assert cu_seqlens.tolist() == [0, 3, 5] and longest == 3 and used.tolist() == [2, 1]


@pytest.mark.parametrize("capacity", [None, 12, 9])
@pytest.mark.parametrize("name", ["right", "left", "holes", "nothing"])
def test_gradients_and_nan_in_padding(name, capacity):
    real = torch.tensor(MASKS[name]).bool()
    hidden = torch.randn(3, 4, 2, dtype=torch.float64)
    hidden[~real] = float("nan")
    hidden.requires_grad_()
    packed, indices, *_ = unpad_input(hidden, real, capacity=capacity)
    assert not packed.isnan().any()
    incoming = torch.randn_like(packed)
    total = int(real.sum())
    incoming[total:] = float("nan")
    (gradient,) = torch.autograd.grad(packed, hidden, incoming)
    assert torch.equal(gradient[real], incoming[:total]) and not gradient[~real].any() and not gradient.isnan().any()

    source = torch.randn(packed.shape, dtype=torch.float64)
    source[total:] = float("nan")
    source.requires_grad_()
    back = pad_input(source, indices, 3, 4)
    assert not back.isnan().any()
    incoming = torch.randn_like(back)
    incoming[~real] = float("nan")
    (gradient,) = torch.autograd.grad(back, source, incoming)
    assert torch.equal(gradient[:total], incoming[real]) and not gradient[total:].any()


def test_gradcheck():
    mask = torch.tensor(MASKS["holes"])
    hidden = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    indices = unpad_input(hidden, mask)[1]
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, mask)[0], hidden)
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, mask, capacity=9)[0], hidden)
    assert torch.autograd.gradcheck(
        lambda x: pad_input(x, indices, 3, 4), unpad_input(hidden.detach(), mask)[0].requires_grad_()
    )


def test_the_static_form_does_not_sync():
    with FakeTensorMode() as mode:
        hidden = mode.from_tensor(torch.randn(3, 4, 2))
        packed, indices, cu_seqlens, longest, _ = unpad_input(hidden, torch.ones(3, 4, dtype=torch.bool), capacity=12)
        assert packed.shape == (12, 2) and cu_seqlens.shape == (4,) and longest == 4
        assert pad_input(packed, indices, 3, 4).shape == (3, 4, 2)
        assert cu_seqlens_from_position_ids(torch.zeros(5, dtype=torch.int64), capacity=3).shape == (4,)
        cu_seqlens_from_lengths(torch.ones(3, dtype=torch.int32))

    def round_trip(hidden, mask):
        packed, indices, *_ = unpad_input(hidden, mask, capacity=12)
        return pad_input(packed, indices, 3, 4)

    hidden, mask = torch.randn(3, 4, 2), torch.tensor(MASKS["left"])
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, mask), round_trip(hidden, mask))


def test_empty_batches():
    for shape in [(0, 4, 2), (3, 0, 2), (0, 0)]:
        hidden, mask = torch.randn(shape), torch.ones(shape[:2], dtype=torch.bool)
        for capacity in (None, 0, 5):
            packed, indices, cu_seqlens, _, _ = unpad_input(hidden, mask, capacity=capacity)
            assert packed.shape == (capacity or 0, *shape[2:]) and cu_seqlens.tolist() == [0] * (shape[0] + 1)
            assert pad_input(packed, indices, *shape[:2]).shape == shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_masks_that_hold_document_ids_are_refused(dtype):
    """1, 1, 2, 2 would merge two documents without a word."""
    hidden, ids = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 1, 2, 2]], dtype=dtype)
    hint = r"\[1, 2\]=2: a mask holds 0 and 1; for document ids use masks.documents\(ids\)$"
    ones = torch.ones(2, 4, dtype=dtype)
    for capacity in (None, 8):
        with pytest.raises(ValueError, match="^attention_mask" + hint):
            unpad_input(hidden, ids, capacity=capacity)
        with pytest.raises(ValueError, match="^unused_mask" + hint):
            unpad_input(hidden, ones, ids, capacity=capacity)
    with pytest.raises(ValueError, match="^attention_mask" + hint):
        cu_seqlens_from_mask(ids)
    with pytest.raises(ValueError, match=r"^attention_mask\[0, 0\]=-1: a mask holds 0 and 1"):
        cu_seqlens_from_mask(-ones.long())
    # Fake tensors have no values to read, and compiled code reads none.
    with FakeTensorMode() as mode:
        unpad_input(mode.from_tensor(hidden), mode.from_tensor(ids), capacity=8)
    compiled = torch.compile(lambda x, m: unpad_input(x, m, capacity=8)[2], fullgraph=True, backend="aot_eager")
    assert compiled(hidden, ids).tolist() == [0, 3, 7]


@pytest.mark.parametrize("capacity", [None, 5])
def test_pad_takes_indices_of_32_bits(capacity):
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 0]])
    packed, indices, *_ = unpad_input(hidden, mask, capacity=capacity)
    expected = hidden * mask[..., None]
    assert torch.equal(pad_input(packed, indices.int(), 2, 3), expected)
    assert torch.equal(pad_input(packed, indices, 2, 3), expected)


def test_pad_refusals():
    packed = torch.randn(3, 2)
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(TypeError, match=f"^indices has dtype {dtype}, expected int64 or int32$"):
            pad_input(packed, torch.zeros(3, dtype=dtype), 2, 3)
    for dtype in (torch.int32, torch.int64):
        text = r"=%d: expected 0 to 6, batch \* seqlen, for batch=2 and seqlen=3$"
        with pytest.raises(ValueError, match=r"^indices\[2\]" + text % 7):
            pad_input(packed, torch.tensor([0, 6, 7], dtype=dtype), 2, 3)
        with pytest.raises(ValueError, match=r"^indices\[1\]" + text % -1):
            pad_input(packed, torch.tensor([0, -1, 7], dtype=dtype), 2, 3)
    with pytest.raises(TypeError, match=r"^indices: expected a tensor \(total,\), got list$"):
        pad_input(packed, [0, 1, 2], 2, 3)
    with pytest.raises(TypeError, match=r"^hidden_states: expected a tensor \(total, ...\), got list$"):
        pad_input([1.0], torch.zeros(1).long(), 2, 3)


def test_lists_are_named():
    with pytest.raises(TypeError, match=r"^lengths: expected a tensor \(n_sequences,\), got list$"):
        cu_seqlens_from_lengths([1, 2])
    with pytest.raises(TypeError, match=r"^position_ids: expected a tensor \(L,\) or \(1, L\), got list$"):
        cu_seqlens_from_position_ids([0, 1])
    with pytest.raises(TypeError, match=r"^hidden_states: expected a tensor \(batch, length, ...\), got list$"):
        unpad_input([[1.0]], torch.ones(1, 1).int())


def test_unpad_refusals():
    hidden = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\), expected \(2, 3\)"):
        unpad_input(hidden, torch.ones(2, 4).int())
    with pytest.raises(ValueError, match=r"unused_mask has shape \(2, 4\), expected \(2, 3\)"):
        unpad_input(hidden, torch.ones(2, 3).int(), torch.ones(2, 4).int())
    with pytest.raises(TypeError, match=r"attention_mask has dtype torch.float32"):
        unpad_input(hidden, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"attention_mask keeps 6 tokens, more than capacity=5"):
        unpad_input(hidden, torch.ones(2, 3).int(), capacity=5)
    with pytest.raises(ValueError, match="capacity=-1: expected 0 or more"):
        unpad_input(hidden, torch.ones(2, 3).int(), capacity=-1)
    with pytest.raises(ValueError, match=r"hidden_states has shape \(3,\), expected \(batch, length, ...\)"):
        unpad_input(torch.randn(3), torch.ones(3).int())
    with pytest.raises(ValueError, match=r"indices has shape \(2,\), hidden_states \(3, 2\): expected \(total,\)"):
        pad_input(torch.randn(3, 2), torch.zeros(2, dtype=torch.int64), 1, 3)


# ---- PackedBatch -----------------------------------------------------------------------------------------------------

SEQUENCES = [[5, 6, 7], [], [8], [9, 10]]


@pytest.mark.parametrize("capacity", [None, 9])
def test_everything_follows_from_the_lengths(capacity):
    batch = PackedBatch.from_sequences(SEQUENCES, capacity=capacity)
    tail = 0 if capacity is None else 3
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10] + [0] * tail
    assert batch.total == 6 + tail and batch.n_sequences == 4 and batch.max_seqlen == 3
    assert batch.lengths.tolist() == [3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.sequence_ids.tolist() == [0, 0, 0, 2, 3, 3] + [-1] * tail
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1] + [0] * tail
    assert batch.labels is None
    assert batch.shift_labels.tolist() == [6, 7, -100, -100, 10, -100] + [-100] * tail
    assert batch.attention_mask.int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert batch.to_padded(batch.input_ids, -1).tolist() == [[5, 6, 7], [-1, -1, -1], [8, -1, -1], [9, 10, -1]]
    by_cu = (batch.mask & masks.causal()).to_dense(batch.total, batch.total)
    by_ids = (masks.documents(batch.sequence_ids) & masks.causal()).to_dense(batch.total, batch.total)
    assert torch.equal(by_cu, by_ids)
    assert cu_seqlens_from_mask(batch.attention_mask).tolist() == batch.cu_seqlens.tolist()
    with pytest.raises(AttributeError):
        batch.max_seqlen = 4


def test_labels_are_aligned_and_never_cross_a_boundary():
    labels = [[-100, 6, 7], [], [8], [-100, 10]]
    batch = PackedBatch.from_sequences([torch.tensor(s, dtype=torch.int32) for s in SEQUENCES], labels, capacity=8)
    assert batch.labels is not None and batch.labels.tolist() == [-100, 6, 7, 8, -100, 10, -100, -100]
    assert batch.shift_labels.tolist() == [6, 7, -100, -100, 10, -100, -100, -100]
    assert batch.to("cpu").labels.tolist() == batch.labels.tolist()


def test_to_padded_keeps_the_tail_out():
    batch = PackedBatch.from_sequences(SEQUENCES, capacity=9)
    hidden = torch.randn(9, 2, dtype=torch.float64)
    hidden[6:] = float("nan")
    hidden.requires_grad_()
    padded = batch.to_padded(hidden)
    assert padded.shape == (4, 3, 2) and not padded.isnan().any()
    incoming = torch.randn_like(padded)
    incoming[~batch.attention_mask] = float("nan")
    (gradient,) = torch.autograd.grad(padded, hidden, incoming)
    assert torch.equal(gradient[:6], incoming[batch.attention_mask]) and not gradient[6:].any()


def test_empty_packed_batches():
    for sequences in ([], [[]], [[], []]):
        batch = PackedBatch.from_sequences(sequences, capacity=2)
        assert batch.sequence_ids.tolist() == [-1, -1] and batch.position_ids.tolist() == [0, 0]
        assert batch.shift_labels.tolist() == [-100, -100] and batch.max_seqlen == 0
        assert batch.to_padded(batch.input_ids).shape == (len(sequences), 0)
    assert PackedBatch.from_sequences([]).shift_labels.shape == (0,)


def test_packed_batch_refusals():
    with pytest.raises(ValueError, match="sequences hold 6 tokens, more than capacity=5"):
        PackedBatch.from_sequences(SEQUENCES, capacity=5)
    with pytest.raises(ValueError, match=r"^labels holds 1 sequences, sequences 4: give labels for each$"):
        PackedBatch.from_sequences(SEQUENCES, [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"^labels\[2\] has 2 labels, sequences\[2\] 1 tokens: give one label for"):
        PackedBatch.from_sequences(SEQUENCES, [[1, 2, 3], [], [1, 2], [3, 4]])
    with pytest.raises(TypeError, match=r"sequences\[1\] has dtype torch.float32, expected integers"):
        PackedBatch.from_sequences([[1], torch.ones(2)])
    with pytest.raises(TypeError, match=r"sequences\[1\] has dtype torch.float32, expected integers"):
        PackedBatch.from_sequences([[1], [1.7, 2.2]])
    with pytest.raises(TypeError, match=r"labels\[0\] has dtype torch.float32, expected integers"):
        PackedBatch.from_sequences([[1, 2]], [[1, 2.5]])
    with pytest.raises(ValueError, match=r"sequences\[0\] has shape \(1, 2\), expected \(length,\)"):
        PackedBatch.from_sequences([torch.ones(1, 2).int()])
    with pytest.raises(ValueError, match=r"packed has shape \(5,\), expected \(6, ...\)"):
        PackedBatch.from_sequences(SEQUENCES).to_padded(torch.zeros(5))


def test_token_ids_of_arrays():
    for dtype in ("uint16", "int32", "int64"):
        batch = PackedBatch.from_sequences([np.array([5, 60000], dtype=dtype), np.array([], dtype=dtype)])
        assert batch.input_ids.tolist() == [5, 60000] and batch.input_ids.dtype == torch.int64
