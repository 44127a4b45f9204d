"""Batch samplers: every document once, ranks alike and with as many batches, resumable, in three libraries."""

import functools
import json
import random
import sys
import types
from collections import Counter
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from maskops import data
from maskops.data.sharding import RankedBatches

LENGTHS = [min(64, 1 + int(random.Random(number).lognormvariate(2.2, 1))) for number in range(300)]
KINDS = ("packing", "chunks", "bucket", "padded", "packed")


def sampler(kind: str, lengths: list[int] = LENGTHS, packed_for: int = 1, **arguments: Any) -> RankedBatches:
    if kind == "packing":
        return data.PackingSampler(data.pack(lengths, 64, ranks=packed_for), **arguments)
    if kind == "chunks":
        return data.PackingSampler(data.pack(lengths, 64, "chunks", ranks=packed_for), **arguments)
    if kind == "bucket":
        return data.LengthBucketSampler(lengths, 8, mega_batch=3, **arguments)
    return data.TokenBudgetSampler(lengths, 128, counted=kind, mega_batch=3, **arguments)  # type: ignore[arg-type]


def documents(batches: Any) -> list[int]:
    return [item.document if isinstance(item, data.Piece) else item for batch in batches for item in batch]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 64), max_size=80),
    kind=st.sampled_from(KINDS),
    world=st.integers(1, 4),
    share=st.integers(1, 2),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
    last=st.sampled_from(("repeat", "drop")),
)
def test_ranks_share_an_epoch(
    lengths: list[int], kind: str, world: int, share: int, seed: int, epoch: int, last: str
) -> None:
    ranks = [
        sampler(kind, lengths, packed_for=world * share, rank=rank, world_size=world, seed=seed, last=last)
        for rank in range(world)
    ]
    for one in ranks:
        one.set_epoch(epoch)
    dealt = [list(one) for one in ranks]
    assert {len(batches) for batches in dealt} == {len(ranks[0])}
    assert all(batch for batches in dealt for batch in batches)
    seen = [item for batches in dealt for batch in batches for item in batch]
    missing = len(lengths) if kind != "chunks" else sum(map(len, ranks[0].packing.bins))  # type: ignore[attr-defined]
    assert len(seen) == missing + ranks[0].repeated - ranks[0].dropped
    counts = Counter(seen)
    if last == "drop":
        assert set(counts.values()) <= {1}
    elif kind != "chunks":
        assert sorted(counts) == list(range(len(lengths)))
    alone = sampler(
        kind,
        lengths,
        packed_for=world * share,
        rank=0,
        world_size=1,
        seed=seed,
        last=last,
        **({} if kind in ("packing", "chunks") else {"ranks": world}),
    )
    alone.set_epoch(epoch)
    if kind not in ("packing", "chunks") or world * share > 1:
        assert list(alone) == [batches[step] for step in range(len(dealt[0])) for batches in dealt]


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_differ_and_resume(kind: str) -> None:
    whole = sampler(kind)
    epochs = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
        assert list(whole) == epochs[-1]
        assert len(whole) == len(epochs[-1])
    assert epochs[0] != epochs[1]
    assert sorted(documents(epochs[0])) == sorted(documents(epochs[1]))
    first = sampler(kind)
    first.set_epoch(1)
    iterator = iter(first)
    head = [next(iterator) for _ in range(5)]
    again = sampler(kind)
    again.load_state_dict(first.state_dict())
    again.set_epoch(1)
    assert head + list(again) == epochs[1]
    assert list(again) == epochs[1]
    again.load_state_dict(first.state_dict(batches=2))
    assert list(again) == epochs[1][2:]
    again.load_state_dict(first.state_dict())
    again.set_epoch(0)
    assert list(again) == epochs[0]
    with pytest.raises(ValueError, match="the state was saved with seed=0, here it is 1"):
        sampler(kind, seed=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_other_batches_is_refused(kind: str) -> None:
    state = json.loads(json.dumps(sampler(kind, rank=0, world_size=1).state_dict()))
    sampler(kind).load_state_dict(state)
    others = {
        "world_size=1, here it is 2": sampler(kind, rank=0, world_size=2, packed_for=2 if kind == "packing" else 1),
        "last='repeat', here it is 'drop'": sampler(kind, last="drop"),
        "checksum of the": sampler(kind, [*LENGTHS[1:], LENGTHS[0]]),
        "sampler='[A-Za-z]*', here": sampler("bucket" if kind != "bucket" else "packing"),
    }
    for message, other in others.items():
        name = "ranks=1" if message.startswith("world") else message
        with pytest.raises(ValueError, match=f"the state was saved with .*({message}|{name})"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="not one of this class"):
        sampler(kind).load_state_dict({"epoch": 0, "position": 0})


def test_iterators_have_their_own_positions() -> None:
    one = sampler("bucket")
    whole = list(one)
    first, second = iter(one), iter(one)
    mixed = [(next(first), next(second)) for _ in range(5)]
    assert [batch for batch, _ in mixed] == [batch for _, batch in mixed] == whole[:5]
    assert list(first) == whole[5:]
    next(second)
    assert one.state_dict()["position"] == 6
    one.load_state_dict(one.state_dict())
    assert len(one) == len(whole) == 6 + len(list(one))


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_rank_is_refused_where_accelerate_deals(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def processes(count: int) -> None:
        state = types.SimpleNamespace(PartialState=types.SimpleNamespace(_shared_state={"num_processes": count}))
        monkeypatch.setitem(sys.modules, "accelerate.state", state)  # type: ignore[arg-type]

    processes(2)
    with pytest.raises(ValueError, match=r"rank: accelerate runs 2 processes.* rank=0, world_size=1 and ranks=2"):
        sampler(kind)
    assert len(sampler(kind, rank=0, world_size=1)) > 0
    with pytest.raises(ValueError, match="rank: accelerate runs 2 processes"):
        data.StreamingPacker([], 8)
    processes(1)
    assert sampler(kind).world_size == 1


def test_an_iteration_that_was_left_begins_anew() -> None:
    one = sampler("bucket")
    first = next(iter(one))
    assert next(iter(one)) == first


def test_packing_between_epochs() -> None:
    packing = data.pack(LENGTHS, 64, ranks=2, seed=3)
    for between in ("reorder", "repack", "same"):
        one = data.PackingSampler(packing, rank=0, world_size=1, between_epochs=between)  # type: ignore[arg-type]
        assert list(one) == packing.bins
        one.set_epoch(1)
        batches = list(one)
        if between == "reorder":
            assert batches != packing.bins
            steps = [[packing.bins[at], packing.bins[at + 1]] for at in range(0, len(packing.bins), 2)]
            assert sorted([batches[at], batches[at + 1]] for at in range(0, len(batches), 2)) == sorted(steps)
        elif between == "repack":
            assert batches == data.pack(LENGTHS, 64, ranks=2, seed=4).bins
        else:
            assert batches == packing.bins


def test_buckets_and_budgets() -> None:
    bucket = list(data.LengthBucketSampler(LENGTHS, 8))
    waste = [sum(max(LENGTHS[i] for i in batch) - LENGTHS[number] for number in batch) for batch in bucket]
    assert sum(waste) < 0.25 * sum(LENGTHS)
    assert [len(batch) for batch in bucket].count(8) == len(LENGTHS) // 8
    for kind, cost in (("padded", lambda sizes: len(sizes) * max(sizes)), ("packed", sum)):
        one = data.TokenBudgetSampler(LENGTHS, 128, counted=kind)  # type: ignore[arg-type]
        batches = [[LENGTHS[number] for number in batch] for batch in one]
        assert all(cost(sizes) <= 128 for sizes in batches)
        assert sum(map(cost, batches)) > 0.85 * 128 * len(batches)
    few = data.TokenBudgetSampler([1] * 10, 128, max_documents=4)
    assert sorted(map(len, few)) == [2, 4, 4]


def test_ranks_of_a_step_are_alike() -> None:
    lengths = [random.Random(number).randint(1, 1000) for number in range(2_000)]
    batches = list(data.LengthBucketSampler(lengths, 4, ranks=4))
    spread = []
    for start in range(0, len(batches), 4):
        work = [data.attention_work([lengths[number] for number in batch]) for batch in batches[start : start + 4]]
        spread.append(4 * max(work) / sum(work))
    assert sum(spread) / len(spread) < 1.2
    order = [lengths[batch[0]] for batch in batches[::4]]
    assert 0.3 < sum(first > second for first, second in pairwise(order)) / len(order) < 0.7


def test_pieces_are_cut_and_joined() -> None:
    documents = [
        {"input_ids": [10 * number + place for place in range(length)], "labels": [7] * length, "name": "x"}
        for number, length in enumerate((5, 0, 9))
    ]
    packing = data.pack([5, 0, 9], 4, "chunks", seed=None)
    pieces = data.PieceDataset(documents)
    items = pieces.__getitems__(packing.bins[1])
    assert [item["input_ids"].tolist() for item in items] == [[4], [], [20, 21, 22]]
    assert [item["labels"].tolist() for item in items] == [[7], [], [7, 7, 7]]
    assert items[0]["first_position"] == 0 and items[0]["name"] == "x"
    continuing = data.PieceDataset(data.prepare([[1] * 5, [], [2] * 9]), positions="continue")
    assert [item["first_position"] for item in continuing.__getitems__(packing.bins[1])] == [4, 0, 0]
    assert continuing[2]["input_ids"].tolist() == [2] * 9
    joined = data.PieceDataset(documents, isolate=False).__getitems__(packing.bins[1])
    assert [{name: value.tolist() for name, value in item.items()} for item in joined] == [
        {"input_ids": [4, 20, 21, 22], "labels": [7] * 4}
    ]
    assert len(pieces) == 3
    with pytest.raises(IndexError, match=r"documents\[0\] has 5 tokens, the piece is 3 to 9"):
        pieces[data.Piece(0, 3, 9)]
    with pytest.raises(ValueError, match="positions='continue': with isolate=False"):
        data.PieceDataset(documents, positions="continue", isolate=False)
    with pytest.raises(ValueError, match=r"item 1 has the fields \['input_ids'\], item 0"):
        data.PieceDataset([{"input_ids": [1], "labels": [1]}, [2]], isolate=False).__getitems__([0, 1])


def test_pieces_cut_masks_and_floats_as_they_are() -> None:
    documents = [
        {
            "input_ids": list(range(7)),
            "completion_mask": torch.arange(7) > 4,
            "assistant_masks": [True] * 3 + [False] * 4,
            "weights": [0.5 * place for place in range(7)],
        }
    ]
    packing = data.pack([7], 4, "chunks", seed=None)
    items = [item for items in packing.bins for item in data.PieceDataset(documents).__getitems__(items)]
    assert items[1]["input_ids"].tolist() == [4, 5, 6]
    assert torch.equal(items[1]["completion_mask"], torch.tensor([False, True, True]))
    assert [items[1]["assistant_masks"], items[1]["weights"]] == [[False] * 3, [2.0, 2.5, 3.0]]
    del items[0]["weights"], items[1]["weights"]
    batch = data.PackedCollator()(items)
    assert isinstance(batch, data.PackedBatch) and batch.labels is not None
    assert batch.labels.tolist() == [-100] * 7
    joined = data.PieceDataset(documents, isolate=False).__getitems__(packing.bins[1])
    assert joined[0]["completion_mask"].dtype == torch.bool
    assert joined[0]["weights"].tolist() == [2.0, 2.5, 3.0]


def test_pieces_know_whether_they_are_joined() -> None:
    for isolate in (True, False):
        packing = data.pack([3, 3], 4, "chunks", seed=None, isolate=isolate)
        loader = DataLoader(
            data.PieceDataset([[1] * 3, [2] * 3]),
            batch_sampler=data.PackingSampler(packing),
            collate_fn=data.PackedCollator(),
        )
        assert [batch.lengths.tolist() for batch in loader] == ([[3, 1], [2]] if isolate else [[4], [2]])
    with pytest.raises(ValueError, match="positions='continue': packed with isolate=False"):
        data.PieceDataset([[1] * 3, [2] * 3], positions="continue").__getitems__(packing.bins[0])


@functools.cache
def token_documents() -> data.Documents:
    return data.prepare([[number % 50] * length for number, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["packing", "chunks", "packed"])
def test_dataloader(kind: str, workers: int) -> None:
    one = sampler(kind)
    dataset: Any = data.PieceDataset(token_documents()) if kind == "chunks" else token_documents()
    loader = DataLoader(dataset, batch_sampler=one, collate_fn=data.PackedCollator(), num_workers=workers)
    assert len(loader) == len(one)
    batches = list(loader)
    assert len(batches) == len(one)
    assert sum(int(batch.lengths.sum()) for batch in batches) == sum(LENGTHS)
    tokens = torch.cat([batch.input_ids for batch in batches])
    expected = torch.cat(token_documents().sequences)
    assert torch.equal(tokens.sort().values, expected.sort().values)


@pytest.mark.parametrize("even", [True, False])
def test_accelerate_deals_as_we_do(even: bool) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader", reason="accelerate is not installed")
    packing = data.pack(LENGTHS, 64, ranks=2)
    dealt = []
    for process in range(2):
        ours = data.PackingSampler(packing, rank=process, world_size=2)
        loader = DataLoader(
            token_documents(),  # type: ignore[arg-type]
            batch_sampler=data.PackingSampler(packing, rank=0, world_size=1),
            collate_fn=data.PackedCollator(),
        )
        shard = accelerate.prepare_data_loader(
            loader, num_processes=2, process_index=process, put_on_device=False, even_batches=even
        )
        for epoch in range(2):
            shard.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert len(shard) == len(ours)
            batches = list(shard)
            expected = [data.PackedCollator()([token_documents()[number] for number in batch]) for batch in ours]
            assert len(batches) == len(expected)
            for batch, wanted in zip(batches, expected, strict=True):
                assert torch.equal(batch.input_ids, wanted.input_ids)
            dealt += batches if epoch == 0 else []
    assert sum(int(batch.lengths.sum()) for batch in dealt) == sum(LENGTHS)


def test_accelerator_prepare_in_one_process() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    loader = DataLoader(
        token_documents(),  # type: ignore[arg-type]
        batch_sampler=data.LengthBucketSampler(LENGTHS, 8),
        collate_fn=data.PaddedCollator(pad_token_id=0),
    )
    prepared = accelerate.Accelerator(cpu=True).prepare(loader)
    assert accelerate.state.PartialState._shared_state["num_processes"] == 1  # what the default rank looks at
    assert len(prepared) == len(loader)
    assert sum(int(batch.lengths.sum()) for batch in prepared) == sum(LENGTHS)


def test_trainer_sees_every_bin_and_resumes(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    packing = data.pack(LENGTHS[:60], 64, ranks=1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    seen: list[list[int]] = []

    class Trainer(transformers.Trainer):  # type: ignore[misc]  # has no types
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(
                self.train_dataset, batch_sampler=data.PackingSampler(packing), collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            seen.append(inputs["input_ids"].flatten().tolist())
            return super().training_step(model, inputs, *rest)

    def train(resume: bool, steps: int) -> None:
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, max_steps=steps, save_steps=4, report_to=[], use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", save_only_model=False,
        )  # fmt: skip
        trainer = Trainer(
            model=transformers.LlamaForCausalLM(config),
            args=arguments,
            train_dataset=token_documents(),
            data_collator=data.PackedCollator(output="transformers"),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)

    steps = len(packing.bins)
    train(resume=False, steps=2 * steps)
    whole, seen[:] = list(seen), []
    assert len(whole) == 2 * steps
    once = sorted(token_documents().tokens[: sum(LENGTHS[:60])].tolist())
    assert sorted(chain(*whole[:steps])) == once == sorted(chain(*whole[steps:]))
    assert whole[:steps] != whole[steps:]
    train(resume=True, steps=2 * steps)
    assert seen == whole[4:]


def test_errors_name_the_argument() -> None:
    packing = data.pack(LENGTHS, 64, ranks=3)
    with pytest.raises(ValueError, match="ranks=3: expected a multiple of world_size=2"):
        data.PackingSampler(packing, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank=0, world_size=None: give both or neither"):
        data.PackingSampler(packing, rank=0)
    with pytest.raises(ValueError, match="rank=2: expected 0 to 1"):
        data.LengthBucketSampler(LENGTHS, 8, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"lengths\[1\]=9 is more than max_tokens=8"):
        data.TokenBudgetSampler([1, 9], 8)
    with pytest.raises(ValueError, match="counted='both': expected 'padded' or 'packed'"):
        data.TokenBudgetSampler([1], 8, counted="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last='keep': expected 'repeat' or 'drop'"):
        data.LengthBucketSampler([1], 8, last="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between_epochs='mix'"):
        data.PackingSampler(packing, between_epochs="mix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents=0"):
        data.LengthBucketSampler([1], 0)
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        data.LengthBucketSampler([1], 1, seed=1.5)  # type: ignore[arg-type]
