"""Packing of streams: each document once, a bounded buffer, ranks in step, and a state to go on from."""

import io
import json
import random
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from maskops import data
from maskops.data.packers import Strategy

STRATEGIES = get_args(Strategy)


def stream(lengths: list[int]) -> list[list[int]]:
    """Documents whose every token is their number."""
    return [[number] * length for number, length in enumerate(lengths)]


def tokens(batch: list[Any]) -> list[list[int]]:
    return [document["input_ids"].tolist() if isinstance(document, dict) else list(document) for document in batch]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=60),
    strategy=st.sampled_from(STRATEGIES),
    world=st.integers(1, 3),
    share=st.integers(1, 2),
    buffer_size=st.integers(12, 20),
    max_segments=st.none() | st.integers(1, 5),
)
def test_ranks_share_a_stream(
    lengths: list[int], strategy: Strategy, world: int, share: int, buffer_size: int, max_segments: int | None
) -> None:
    packers = [
        data.StreamingPacker(
            stream(lengths), 40, buffer_size=buffer_size, strategy=strategy, ranks=world * share, rank=rank,
            world_size=world, max_segments=max_segments,
        )
        for rank in range(world)
    ]  # fmt: skip
    dealt = [[tokens(batch) for batch in packer] for packer in packers]
    assert len({len(batches) for batches in dealt}) == 1
    flat = [batch for batches in dealt for batch in batches]
    assert all(batch and sum(map(len, batch)) <= 40 for batch in flat)
    assert max_segments is None or all(len(batch) <= max_segments for batch in flat)
    repeated = sum(packer.repeated for packer in packers)
    if strategy == "chunks":
        whole = [place for batch in flat for document in batch for place in document]
        assert set(whole) == {number for number, length in enumerate(lengths) if length}
        assert repeated or sorted(whole) == [place for document in stream(lengths) for place in document]
    else:
        seen = [document for batch in flat for document in batch]
        assert len(seen) == len(lengths) + repeated
        assert {tuple(document) for document in seen} == {tuple(document) for document in stream(lengths)}
    assert not any(packer._held or packer._left for packer in packers)


class Source:
    """A stream that counts what was read of it."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents
        self.read = 0

    def __iter__(self) -> Iterator[list[int]]:
        for document in self.documents:
            self.read += 1
            yield document


class ResumingSource(Source):
    """One that can go on by itself."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.documents = self.documents[state["at"] :]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [Source, ResumingSource])
def test_resumes_in_the_middle(strategy: Strategy, kind: type[Source]) -> None:
    chance = random.Random(1)
    documents = stream([chance.randint(0, 30) for _ in range(200)])

    def packer() -> data.StreamingPacker:
        source = kind(documents)
        return data.StreamingPacker(
            source, 40, buffer_size=16, strategy=strategy, ranks=4, rank=1, world_size=2, seed=3
        )

    whole = [tokens(batch) for batch in packer()]
    for stop in (0, 1, 4, 11, len(whole)):
        first = packer()
        iterator = iter(first)
        head = [tokens(next(iterator)) for _ in range(stop)]
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        for state in (torch.load(file, weights_only=True), json.loads(json.dumps(first.state_dict()))):
            again = packer()
            again.load_state_dict(state)
            assert head + [tokens(batch) for batch in again] == whole
        if kind is Source:
            assert [tokens(batch) for batch in again] == whole
    with pytest.raises(ValueError, match="the state was saved with seed=3, here it is 4"):
        data.StreamingPacker(
            documents, 40, buffer_size=16, strategy=strategy, ranks=4, rank=1, world_size=2, seed=4
        ).load_state_dict(first.state_dict())


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_small_buffer_leaves_no_rank_without_documents(ranks: int) -> None:
    packer = data.StreamingPacker([[1]] * 100, 8, buffer_size=2 * ranks, ranks=ranks, rank=0, world_size=1)
    assert sum(map(len, packer)) == 100 + packer.repeated
    assert packer.repeated < 8 * ranks
    with pytest.raises(ValueError, match=f"buffer_size=1: strategy 'balanced' needs {2 * ranks} or more"):
        data.StreamingPacker([[1]] * 100, 8, buffer_size=1, ranks=ranks, rank=0, world_size=1)


def test_chunks_are_joined_without_isolation() -> None:
    documents = [{"input_ids": [number] * 5, "weight": [0.5] * 5, "name": "x"} for number in range(3)]
    packer = data.StreamingPacker(documents, 8, strategy="chunks", isolate=False)
    bins = list(packer)
    assert [[item["input_ids"].tolist() for item in items] for items in bins] == [
        [[0] * 5 + [1] * 3],
        [[1] * 2 + [2] * 5],
    ]
    assert bins[0][0]["weight"].tolist() == [0.5] * 8 and set(bins[0][0]) == {"input_ids", "weight"}
    state = json.loads(json.dumps(packer.state_dict()))
    with pytest.raises(ValueError, match="the state was saved with isolate=False, here it is True"):
        data.StreamingPacker(documents, 8, strategy="chunks").load_state_dict(state)
    with pytest.raises(ValueError, match=r"isolate=False: .* only 'chunks'"):
        data.StreamingPacker(documents, 8, isolate=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_holds_no_more_than_its_buffer(strategy: Strategy) -> None:
    chance = random.Random(2)
    lengths = [min(100, chance.randint(1, 12) * chance.randint(1, 12)) for _ in range(2_000)]
    packer = data.StreamingPacker(stream(lengths), 200, buffer_size=150, strategy=strategy, ranks=2)
    in_bins = most = 0
    for batch in packer:
        in_bins += len(batch)
        most = max(most, len(packer._held))
    # Those of the bins of a step that is not whole yet are held beside the buffer.
    assert most <= 150 + 2 * 60
    assert in_bins >= 2_000
    assert sum(lengths) / (200 * (len(list(packer)))) > (0.9 if strategy != "balanced" else 0.97)


def test_a_stream_is_balanced_as_a_list_is() -> None:
    lengths = [min(512, 3 + int(random.Random(number).lognormvariate(3.5, 1.2))) for number in range(6_000)]
    bins = list(data.StreamingPacker(stream(lengths), 512, buffer_size=300, ranks=4, rank=0, world_size=1))
    packing = data.Packing(
        bins=[[document[0] for document in batch] for batch in bins], lengths=lengths, capacity=512, ranks=4
    )
    report = packing.report()
    assert report.fill > 0.985
    assert report.attention_straggler < 1.06
    assert abs(report.length_correlation) < 0.05


@pytest.mark.parametrize("workers", [0, 1])
def test_dataloader(workers: int) -> None:
    lengths = [number % 23 for number in range(100)]
    packer = data.StreamingPacker(stream(lengths), 64, buffer_size=20)
    loader = DataLoader(packer, batch_size=None, collate_fn=data.PackedCollator(capacity=64), num_workers=workers)
    batches = list(loader)
    assert sum(int(batch.lengths.sum()) for batch in batches) == sum(lengths)
    assert all(batch.total == 64 for batch in batches)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than capacity=8"):
        list(data.StreamingPacker([[1], [2] * 9], 8))
    with pytest.raises(ValueError, match="buffer_size=0"):
        data.StreamingPacker([], 8, buffer_size=0)
    with pytest.raises(ValueError, match="ranks=3: expected a multiple of world_size=2"):
        data.StreamingPacker([], 8, ranks=3, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"document 1 of the stream: a document has the fields \['text'\]: expected"):
        list(data.StreamingPacker([[1], {"text": "x"}], 8))
    with pytest.raises(TypeError, match=r"document 0 of the stream: a document is int: expected token ids"):
        list(data.StreamingPacker([1, 2], 8))
    with pytest.raises(TypeError, match=r"document 0 of the stream: length is 1.5: expected an integer"):
        list(data.StreamingPacker([[1]], 8, length=lambda document: 1.5))  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="seed is 'a'"):
        data.StreamingPacker([], 8, seed="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_workers=2: each worker would pack the whole stream"):
        list(DataLoader(data.StreamingPacker([[1]], 8), batch_size=None, num_workers=2))
