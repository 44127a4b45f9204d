"""Collators: what datasets hand over becomes a batch, in torch's DataLoader too."""

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from maskops import PackedBatch, PaddedBatch
from maskops.data import PackedCollator, PaddedCollator, prepare

SEQUENCES = [[5, 6, 7], [8], [9, 10]]


def items(**fields: list[Any]) -> list[dict[str, Any]]:
    named = {"input_ids": SEQUENCES, **fields}
    return [{name: values[number] for name, values in named.items()} for number in range(3)]


@pytest.mark.parametrize(
    "given",
    [
        SEQUENCES,
        [torch.tensor(sequence) for sequence in SEQUENCES],
        [np.array(sequence) for sequence in SEQUENCES],
        items(),
        items(labels=[None, None, None]),
        prepare(SEQUENCES),
    ],
    ids=["lists", "tensors", "arrays", "dicts", "no labels", "documents"],
)
def test_items(given: Any) -> None:
    given = [given[number] for number in range(3)]
    packed = PackedCollator(capacity=8, max_sequences=4, max_seqlen=5, position_start=2, pad_token_id=1)(given)
    assert isinstance(packed, PackedBatch)
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 1, 1] and packed.lengths.tolist() == [3, 1, 2, 0]
    assert packed.max_seqlen == 5 and packed.position_ids.tolist() == [2, 3, 4, 2, 2, 3, 1, 1]
    assert packed.labels is None and packed.first_positions is None
    padded = PaddedCollator(0, side="left", multiple_of=4)(given)
    assert isinstance(padded, PaddedBatch)
    assert padded.input_ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [0, 0, 9, 10]]
    inputs = PaddedCollator(0, length=3, output="transformers")(given)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    row = PackedCollator(output="transformers", options={"cu_seqlens": False})(given)
    assert sorted(row) == ["input_ids", "labels", "position_ids", "shift_labels", "use_cache"]


def labels_of(given: list[dict[str, Any]], **options: Any) -> list[int]:
    batch = PackedCollator(**options)(given)
    assert isinstance(batch, PackedBatch) and batch.labels is not None
    return batch.labels.tolist()


def test_labels_and_masks() -> None:
    labels = [[-100, 6, 7], [8], [-100, 10]]
    completion, assistant = [[0, 1, 1], [True], torch.tensor([True, False])], [[0, 0, 1], [1], [1, 1]]
    assert labels_of(items(labels=labels)) == [-100, 6, 7, 8, -100, 10]
    assert labels_of(items(label_ids=labels)) == [-100, 6, 7, 8, -100, 10]
    assert labels_of(items(completion_mask=completion)) == [-100, 6, 7, 8, 9, -100]
    both = items(completion_mask=completion, assistant_masks=assistant)
    assert labels_of(both) == [-100, -100, 7, 8, 9, -100]
    assert labels_of(items(labels=labels, assistant_masks=assistant)) == [-100, -100, 7, 8, -100, 10]
    assert labels_of(items(labels=labels, text=["a", "b", "c"]), ignore=["text"]) == [-100, 6, 7, 8, -100, 10]


def test_padding_of_a_tokenizer_is_left_out() -> None:
    given = [
        {"input_ids": [0, 0, 5, 0], "attention_mask": [0, 0, 1, 1], "labels": [1, 2, 3, 4]},
        {"input_ids": [7, 0], "attention_mask": [1, 0], "labels": [5, 6]},
    ]
    batch = PackedCollator()(given)
    assert isinstance(batch, PackedBatch) and batch.labels is not None
    assert batch.input_ids.tolist() == [5, 0, 7] and batch.labels.tolist() == [3, 4, 5]  # the real 0 stays


def test_rows_that_are_packed_already() -> None:
    given = [
        {"input_ids": [1, 2, 3], "seq_lengths": [2, 1], "first_position": 4},
        {"input_ids": [4, 5], "seq_lengths": [2], "first_position": 0},
    ]
    batch = PackedCollator()(given)
    assert isinstance(batch, PackedBatch)
    assert batch.lengths.tolist() == [2, 1, 2] and batch.position_ids.tolist() == [4, 5, 0, 0, 1]
    assert batch.shift_labels.tolist() == [2, -100, -100, 5, -100]
    given[0]["attention_mask"] = [1, 0, 1]
    given[0]["labels"], given[1]["labels"] = [1, 2, 3], [4, 5]
    masked = PaddedCollator(0)(given)
    assert isinstance(masked, PaddedBatch) and masked.labels is not None
    assert masked.input_ids.tolist() == [[1, 0], [3, 0], [4, 5]] and masked.labels.tolist()[1] == [3, -100]


@pytest.mark.parametrize("classes", [[2, 0, 1], [0.5, 1.5, 0.0], [torch.tensor(2), np.int64(0), 1]])
def test_labels_of_sequences(classes: list[Any]) -> None:
    found = PaddedCollator(0, output="transformers")(items(label=classes))
    assert found["labels"].tolist() == [float(x) for x in classes]
    assert found["labels"].is_floating_point() == isinstance(classes[0], float)


@pytest.mark.parametrize("make", [list, torch.tensor, np.array], ids=["lists", "tensors", "arrays"])
def test_a_label_for_each_class(make: Any) -> None:
    classes = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    found = PaddedCollator(0, output="transformers")(items(labels=[make(row) for row in classes]))
    assert found["labels"].tolist() == classes and found["labels"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"^labels='causal', and the batch has sequence_labels"):
        PackedCollator(output="transformers")(items(labels=classes))


def test_token_types_of_one_kind_say_nothing() -> None:
    given = items(token_type_ids=[[0, 0, 0], torch.tensor([0]), [0, 0]])
    for collator in (PackedCollator(output="transformers"), PaddedCollator(0, output="transformers")):
        assert {name: str(value) for name, value in collator(given).items()} == {
            name: str(value) for name, value in collator(items()).items()
        }
    others = items(token_type_ids=[[0, 0, 1], [0], [0, 0]])
    assert PaddedCollator(0, ignore=["token_type_ids"])(others).input_ids.tolist()[0] == [5, 6, 7]


def test_refusals_name_the_item_and_the_field() -> None:
    masks = [[1, 1, 1], [1], [1, 2]]
    for given, error, text in [
        (
            items(labels=[[1, 2], [3], [4, 5]]),
            ValueError,
            r"items\[0\]\['labels'\] has 2 elements, items\[0\]\['input_ids'"
            r"\] has 3 tokens: give one for each token",
        ),
        (
            items(completion_mask=[[1, 1, 1], [1, 1], [1, 1]]),
            ValueError,
            r"items\[1\]\['completion_mask'\] has 2 elements",
        ),
        (items(attention_mask=masks), ValueError, r"items\[2\]\['attention_mask'\]\[1\]=2: a mask holds 0 and 1"),
        (
            items(labels=[[1, 2, 3], None, [4, 5]]),
            ValueError,
            r"items\[1\] has no labels for its tokens, items\[0\] has",
        ),
        (
            items(label=[None, None, 1]),
            ValueError,
            r"items\[0\] has no label for the sequence",
        ),
        (items(label=[1, 2, 3], labels=SEQUENCES), ValueError, r"items\[0\] has the fields 'labels' and 'label': give"),
        (items(text=["a", "b", "c"]), ValueError, r"items\[0\] has the field 'text', which no batch has a place for"),
        ([{"tokens": [1]}], ValueError, r"items\[0\] has the fields \['tokens'\]: expected 'input_ids' among them"),
        (
            items(seq_lengths=[[1, 1], [1], [2]]),
            ValueError,
            r"items\[0\]\['seq_lengths'\] sums to 2, items\[0\]\['input_",
        ),
        (
            items(seq_lengths=[[1, 2], [1], [2]], label=[1, 2, 3]),
            ValueError,
            r"items\[0\] has one label for 2 sequences",
        ),
        ([[1], ["a"]], TypeError, r"items\[1\] is a list of str, expected a list or a tensor of token ids"),
        ([[1], torch.ones(1, 2).int()], ValueError, r"items\[1\] has shape \(1, 2\), expected \(length,\)"),
        (["text"], TypeError, r"items\[0\] is str, expected a list or a tensor of token ids"),
        (
            items(token_type_ids=[[0, 0, 1], [0], [0, 0]]),
            ValueError,
            r"items\[0\]\['token_type_ids'\] has 1: no batch has a place for types other than 0; to leave them out "
            r"give the collator ignore=\('token_type_ids',\)$",
        ),
        (
            items(token_type_ids=[[0, 0], [0], [0, 0]]),
            ValueError,
            r"items\[0\]\['token_type_ids'\] has 2 elements",
        ),
        (
            items(labels=[[1.0, 0.0], [1.0, 1.0], [0.0]]),
            ValueError,
            r"items\[2\] has 1 labels, one for each class, items\[0\] has 2 labels, one for each class: give the same",
        ),
        (
            items(label=[1, [1.0, 1.0], 0]),
            ValueError,
            r"items\[1\] has 2 labels, one for each class, items\[0\] has one label: give the same number",
        ),
        (
            items(labels=[[1.0, 0.0, -100.0], [1.0], [1.0, 1.0]]),
            TypeError,
            r"items\[0\]\['labels'\] has dtype torch.float32 and holds -100: labels of tokens are integers$",
        ),
    ]:
        for collator in (PackedCollator(), PaddedCollator(0)):
            with pytest.raises(error, match=f"^{text}"):
                collator(given)
    for given, text in [
        ([[1], [5, 6]], r"items\[1\]\['input_ids'\] holds 6: expected 0 to 5$"),
        ([[1], [-1]], r"items\[1\]\['input_ids'\] holds -1: expected 0 to 5$"),
        ([{"input_ids": [1, 2], "labels": [-100, 6]}], r"items\[0\]\['labels'\] holds 6: expected 0 to 5, or -100$"),
    ]:
        with pytest.raises(ValueError, match=f"^{text}"):
            PaddedCollator(0, vocab_size=6)(given)
        PackedCollator(vocab_size=7 if "-1:" not in text else None)(given)
    for make, text in [
        (lambda: PaddedCollator(0, multiple_of=0), "multiple_of=0: expected 1 or more"),
        (lambda: PaddedCollator(0, length=-1), "length=-1: expected 0 or more"),
        (lambda: PaddedCollator(None), "pad_token_id is None: expected an integer"),  # type: ignore[arg-type]
        (lambda: PackedCollator(capacity="8"), "capacity is '8': expected an integer"),  # type: ignore[arg-type]
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{text}$"):
            make()
    with pytest.raises(ValueError, match=r"^output='dict': expected 'batch' or 'transformers'$"):
        PackedCollator(output="dict")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^side='top': expected 'right' or 'left'$"):
        PaddedCollator(0, side="top")  # type: ignore[arg-type]


@pytest.mark.parametrize("output", ["batch", "transformers"])
def test_in_workers_of_a_loader(output: Any) -> None:
    documents = prepare([list(range(length)) for length in (3, 0, 5, 2, 1, 6)], bos=1, eos=2)
    for collator in (PackedCollator(output=output), PaddedCollator(0, output=output)):
        assert pickle.loads(pickle.dumps(collator)) == collator
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")  # there is no accelerator to pin for
            loader = DataLoader(
                documents,  # type: ignore[arg-type]
                batch_size=2,
                num_workers=1,
                collate_fn=collator,
                pin_memory=True,
                multiprocessing_context="fork",
            )
            found = list(loader)
        expected = [collator([documents[number] for number in (at, at + 1)]) for at in (0, 2, 4)]
        for mine, other in zip(found, expected, strict=True):
            if output == "batch":
                assert type(mine) is type(other)
                mine, other = mine.transformers_inputs(), other.transformers_inputs()
            assert mine.keys() == other.keys()
            for name, value in other.items():
                assert torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value
