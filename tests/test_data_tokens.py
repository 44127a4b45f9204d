"""``prepare`` and ``Documents``: BOS, EOS and what is too long, against plain Python."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskops.data import Documents, Piece, prepare

BOS, EOS = 1, 2
Lists = list[list[int]]


def expected_pieces(
    tokens: list[int], bos: int | None, eos: int | None, add: str, most: int, overlong: str, side: str
) -> Lists:
    """The sequences that one document becomes, by hand."""
    body, before, after = list(tokens), [], []
    if bos is not None:
        if add == "missing" and body[:1] == [bos]:
            body = body[1:]
        before = [bos]
    if eos is not None:
        if add == "missing" and body[-1:] == [eos]:
            body = body[:-1]
        after = [eos]
    whole = before + body + after
    if len(whole) <= most:
        return [whole]
    if overlong == "filter":
        return []
    if overlong == "truncate":
        room = most - len(before) - len(after)
        return [before + (body[:room] if side == "right" else body[len(body) - room :]) + after]
    return [whole[at : at + most] for at in range(0, len(whole), most)]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.sampled_from([BOS, EOS, 5, 6]), max_size=9), max_size=4),
    st.sampled_from([(None, None), (BOS, None), (None, EOS), (BOS, EOS), (EOS, EOS)]),
    st.sampled_from(["always", "missing"]),
    st.sampled_from(["filter", "truncate", "split"]),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["restart", "continue"]),
    st.integers(3, 6),
)
def test_prepare_against_python(
    documents: Lists, special: Any, add: Any, overlong: Any, side: Any, positions: Any, most: int
) -> None:
    bos, eos = special
    options = {"bos": bos, "eos": eos, "add": add, "overlong": overlong, "truncate_side": side, "positions": positions}
    found = prepare(documents, max_length=most, **options)
    pieces = [expected_pieces(tokens, bos, eos, add, most, overlong, side) for tokens in documents]
    assert [sequence.tolist() for sequence in found.sequences] == [piece for parts in pieces for piece in parts]
    assert found.origins == [number for number, parts in enumerate(pieces) for _ in parts]
    begins = [
        sum(map(len, parts[:at])) if positions == "continue" else 0 for parts in pieces for at in range(len(parts))
    ]
    assert found.first_positions == begins
    assert found.lengths == [len(sequence) for sequence in found.sequences]

    report = found.report
    assert report.tokens_in + report.bos_added + report.eos_added - report.tokens_dropped == report.tokens_out
    assert report.tokens_in == sum(map(len, documents)) and report.tokens_out == sum(found.lengths)
    assert report.documents_in == len(documents) == report.documents_out + report.filtered
    assert report.pieces == len(found) and report.documents_out == sum(bool(parts) for parts in pieces)
    assert report.empty == sum(not tokens for tokens in documents)
    assert report.split == sum(len(parts) > 1 for parts in pieces)
    assert (report.truncated == 0) or overlong == "truncate"
    added_bos = sum(bos is not None and parts != [] for parts in pieces)
    assert report.bos_added == added_bos if add == "always" else report.bos_added <= added_bos

    if overlong == "split":
        # Nothing is lost, and each label stands at its token.
        labels = [[10 + place for place in range(len(tokens))] for tokens in documents]
        labelled = prepare(documents, labels, max_length=most, **options)
        assert labelled.labels is not None and [x.tolist() for x in labelled.sequences] == [
            x.tolist() for x in found.sequences
        ]
        for number, tokens in enumerate(documents):
            mine = [at for at, origin in enumerate(labelled.origins) if origin == number]
            joined = [x for at in mine for x in labelled.labels[at].tolist()]
            whole = [x for at in mine for x in labelled.sequences[at].tolist()]
            has_bos = len(joined) > len(labels[number]) and joined[0] == -100
            kept = joined[int(has_bos) : int(has_bos) + len(tokens)]
            assert kept == labels[number] and whole[int(has_bos) :][: len(tokens)] == tokens
            assert joined[int(has_bos) + len(tokens) :] in ([], [eos])


def test_labels_of_bos_and_eos() -> None:
    found = prepare([[5, 6], []], [[-100, 6], []], bos=BOS, eos=EOS)
    assert [x.tolist() for x in found.sequences] == [[1, 5, 6, 2], [1, 2]]
    assert [x.tolist() for x in found.labels or []] == [[-100, -100, 6, 2], [-100, 2]]
    kept = prepare([[1, 5, 2]], [[-100, -100, -100]], bos=BOS, eos=EOS, add="missing")
    assert kept.labels is not None and kept.labels[0].tolist() == [-100, -100, -100]
    assert prepare([[5]], bos=BOS).labels is None


def test_no_end_is_learnt_where_there_is_none() -> None:
    documents = [[5, 6, 7], [5, 6]]
    cut = prepare(documents, bos=BOS, eos=EOS, max_length=4, overlong="truncate")
    assert [x.tolist() for x in cut.sequences] == [[1, 5, 6, 2], [1, 5, 6, 2]]
    assert [x.tolist() for x in cut.labels or []] == [[-100, 5, 6, -100], [-100, 5, 6, 2]]
    left = prepare(
        documents, [[7, 8, 9], [7, 8]], bos=BOS, eos=EOS, max_length=4, overlong="truncate", truncate_side="left"
    )
    assert [x.tolist() for x in left.sequences] == [[1, 6, 7, 2], [1, 5, 6, 2]]
    assert [x.tolist() for x in left.labels or []] == [[-100, 8, 9, 2], [-100, 7, 8, 2]]
    assert prepare(documents, max_length=2, overlong="truncate").labels is None
    # Whether there are labels depends on the arguments alone: shards of one corpus are alike.
    for shard in ([[5] * 9], [[5]], []):
        cut = prepare(shard, eos=EOS, max_length=4, overlong="truncate")
        assert cut.labels is not None
        assert prepare(shard, eos=EOS, max_length=4, overlong="truncate", truncate_side="left").labels is None
        assert prepare(shard, eos=EOS, overlong="truncate").labels is None


def test_documents_are_a_dataset() -> None:
    arrays = [np.array([5, 60000], dtype=np.uint16), torch.tensor([7], dtype=torch.int32), [], torch.tensor([])]
    found = prepare(arrays, max_length=2, eos=EOS, overlong="split", positions="continue")
    assert len(found) == 5 and repr(found) == "Documents(5 sequences, 7 tokens)"
    assert [item["input_ids"].tolist() for item in (found[n] for n in range(5))] == [[5, 60000], [2], [7, 2], [2], [2]]
    assert found[1]["first_position"] == 2 and found[-1]["first_position"] == 0 and "labels" not in found[0]
    item = found[0]["input_ids"]
    item.zero_()
    assert found[0]["input_ids"].tolist() == [5, 60000]  # an item is a copy
    with pytest.raises(IndexError, match=r"documents\[5\]: there are 5 sequences"):
        found[5]
    assert [item["first_position"] for item in found] == [0, 2, 0, 0, 0]
    copied = pickle.loads(pickle.dumps(found))
    assert isinstance(copied, Documents) and copied[1]["input_ids"].tolist() == [2] and copied.report == found.report
    labelled = prepare([[5]], [[6]])
    assert labelled[0]["labels"].tolist() == [6] and repr(labelled) == "Documents(1 sequences, 1 tokens, labels)"
    assert len(prepare([])) == 0 and prepare([]).sequences == []


def test_the_report_says_what_happened() -> None:
    report = prepare([[5] * 4, [], [6]], bos=BOS, eos=EOS, max_length=3, overlong="filter").report
    assert report.to_dict() == {
        "documents_in": 3, "documents_out": 2, "pieces": 2, "empty": 1, "filtered": 1, "truncated": 0, "split": 0,
        "tokens_in": 5, "tokens_out": 5, "tokens_dropped": 4, "bos_added": 2, "eos_added": 2,
    }  # fmt: skip
    assert str(report) == (
        "3 documents in, 2 out as 2 sequences; 1 filtered, 0 truncated, 0 split, 1 empty\n"
        "5 tokens in, 5 out, 4 dropped; 2 BOS and 2 EOS added"
    )


def test_arrays_of_integers_are_not_read_token_by_token() -> None:
    class Counting(np.ndarray):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise AssertionError("one Python object for each token")

    for dtype in ("uint8", "int16", ">u2", "uint32", "int64"):
        array = np.array([5, 200, 7], dtype=dtype).view(Counting)
        array.flags.writeable = False
        assert prepare([array, array[:0]], eos=EOS).tokens.tolist() == [5, 200, 7, 2, 2]
    assert prepare([np.array([5], dtype=np.uint64)]).tokens.tolist() == [5]
    for wrong in (np.array([1.5]), np.array([True])):
        with pytest.raises(TypeError, match=r"^sequences\[0\] has dtype torch\.(float64|bool), expected integers$"):
            prepare([wrong])
    with pytest.raises(ValueError, match=r"^sequences\[0\] has shape \(1, 2\), expected \(length,\)$"):
        prepare([np.array([[1, 2]])])


def test_refusals() -> None:
    documents = prepare([[1], [2]])
    with pytest.raises(
        TypeError, match=r"^documents\[Piece\(document=0, .*\)\]: .* is data\.PieceDataset\(documents\)$"
    ):
        documents[Piece(0, 0, 1)]  # type: ignore[index]
    with pytest.raises(TypeError, match=r"^documents\[slice\(0, 1, None\)\]: expected an integer; of several"):
        documents[0:1]  # type: ignore[index]
    for options, error, text in [
        ({"max_length": "3"}, TypeError, "max_length is '3': expected an integer"),
        ({"eos": [1, 2]}, TypeError, r"eos is \[1, 2\]: expected an integer"),
        ({"eos": -1}, ValueError, "eos=-1: expected 0 or more"),
        ({"bos": 1.0}, TypeError, "bos is 1.0: expected an integer"),
    ]:
        with pytest.raises(error, match=f"^{text}$"):
            prepare([[1]], **options)
    with pytest.raises(
        ValueError, match=r"^sequences\[1\] has 3 tokens, 4 with BOS and EOS, more than max_length=3: cho"
    ):
        prepare([[1], [1, 2, 3]], eos=EOS, max_length=3)
    with pytest.raises(
        ValueError, match=r"^sequences\[0\] has 4 tokens, more than max_length=3: choose overlong='filter'"
    ):
        prepare([[1, 1, 1, 1]], max_length=3)
    with pytest.raises(ValueError, match=r"^max_length=2: expected 3 or more, a token beside BOS and EOS$"):
        prepare([[1]], bos=BOS, eos=EOS, max_length=2)
    with pytest.raises(ValueError, match=r"^overlong='cut': expected 'error', 'filter', 'truncate', 'split'$"):
        prepare([[1]], overlong="cut")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^labels\[0\] has 2 labels, sequences\[0\] 1 tokens: give one label for each"
    ):
        prepare([[1]], [[1, 2]])
    with pytest.raises(TypeError, match=r"^sequences\[0\] is str, expected a list or a tensor of token ids$"):
        prepare(["text"])
