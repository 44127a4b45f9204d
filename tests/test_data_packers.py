"""Packing: every document once, no budget exceeded, and on lengths like real ones the cost of ranks balanced."""

import json
import pickle
import random
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskops import data
from maskops.data import balance
from maskops.data.bins import rank_correlation, straggler_ratios
from maskops.data.first_fit import BestFitPlacer, FirstFitPlacer
from maskops.data.limits import Limits
from maskops.data.packers import Strategy, make_placer

STRATEGIES = get_args(Strategy)
WHOLE = [strategy for strategy in STRATEGIES if strategy != "chunks"]


def real_lengths(count: int, seed: int, capacity: int = 2048) -> list[int]:
    """Lengths as of docstrings, whose corpus takes too long to read here: median 30, a tail of exponent 1.25."""
    chance = random.Random(seed)
    return [min(capacity, 5 + int(chance.lognormvariate(3.1, 1.0) * chance.paretovariate(1.7))) for _ in range(count)]


def numbers(packing: data.Packing) -> list[int]:
    return sorted(item for items in packing.bins for item in items if not isinstance(item, data.Piece))


@pytest.mark.parametrize("seed", range(5))
def test_balanced_meets_every_goal_at_once(seed: int) -> None:
    packing = data.pack(real_lengths(20_000, seed), 2048, ranks=8, seed=seed)
    report = packing.report()
    assert numbers(packing) == list(range(20_000))
    assert report.fill >= 0.99
    assert report.attention_straggler <= 1.05
    assert report.flops_straggler <= 1.05
    assert abs(report.length_correlation) < 0.05
    assert report.buffer <= 1000


def test_classical_strategies_leave_ranks_waiting() -> None:
    lengths = real_lengths(20_000, 0)
    for strategy in ("first_fit", "best_fit_decreasing"):
        report = data.pack(lengths, 2048, strategy, ranks=8).report()
        assert report.fill >= 0.99
        assert report.attention_straggler > 2


SHAPES = {
    "uniform": lambda chance: chance.randint(1, 512),
    "wide": lambda chance: min(2048, int(chance.lognormvariate(5, 1.2)) + 1),
    "equal": lambda chance: 128,
    "two kinds": lambda chance: chance.choice((20, 900)) + chance.randint(0, 40),
    "heavy": lambda chance: min(2048, int(10 * chance.paretovariate(1.0))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_on_other_lengths(shape: str) -> None:
    chance = random.Random(shape)
    lengths = [SHAPES[shape](chance) for _ in range(4_000)]
    report = data.pack(lengths, 2048, ranks=4).report()
    assert report.fill >= data.pack(lengths, 2048, "best_fit_decreasing").fill - 0.015
    assert report.attention_straggler <= 1.08
    assert abs(report.length_correlation) < 0.08


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=120),
    strategy=st.sampled_from(WHOLE),
    ranks=st.integers(1, 5),
    seed=st.none() | st.integers(0, 3),
    max_segments=st.none() | st.integers(1, 6),
    work=st.none() | st.integers(1600, 2500),
    buffer=st.sampled_from((0.001, 0.05, 1.0)),
)
def test_every_document_once_within_every_budget(
    lengths: list[int],
    strategy: Strategy,
    ranks: int,
    seed: int | None,
    max_segments: int | None,
    work: int | None,
    buffer: float,
) -> None:
    arguments: dict[str, Any] = {"ranks": ranks, "seed": seed, "max_segments": max_segments, "buffer": buffer}
    packing = data.pack(lengths, 60, strategy, max_attention_work=work, **arguments)
    assert numbers(packing) == list(range(len(lengths)))
    assert len(packing.bins) == packing.steps * ranks
    assert all(packing.bins[step * ranks] for step in range(packing.steps))
    for number, items in enumerate(packing.bins):
        sizes = [lengths[item] for item in items if isinstance(item, int)]
        assert packing.segments(number) == sizes
        assert sum(sizes) <= 60
        assert max_segments is None or len(sizes) <= max_segments
        assert work is None or data.attention_work(sizes) <= work
    again = data.pack(torch.tensor(lengths, dtype=torch.int32), 60, strategy, max_attention_work=work, **arguments)
    assert again.bins == packing.bins


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), max_size=60),
    seed=st.none() | st.integers(0, 3),
    max_segments=st.none() | st.integers(1, 4),
    isolate=st.booleans(),
)
def test_chunks_cut_the_stream(lengths: list[int], seed: int | None, max_segments: int | None, isolate: bool) -> None:
    packing = data.pack(lengths, 32, "chunks", seed=seed, max_segments=max_segments, isolate=isolate)
    pieces = [item for items in packing.bins for item in items if isinstance(item, data.Piece)]
    order = list(dict.fromkeys(piece.document for piece in pieces))
    assert sorted(order) == list(range(len(lengths)))
    assert seed is not None or order == sorted(order)
    stream = [(piece.document, token) for piece in pieces for token in range(piece.start, piece.stop)]
    assert stream == [(document, token) for document in order for token in range(lengths[document])]
    filled = [sum(piece.stop - piece.start for piece in items) for items in packing.bins]
    if max_segments is None:
        assert all(tokens == 32 for tokens in filled[:-1])
    assert all(tokens <= 32 for tokens in filled)
    assert max_segments is None or all(len(items) <= max_segments for items in packing.bins)
    for number, tokens in enumerate(filled):
        sizes = packing.segments(number)
        assert sum(sizes) == tokens and (isolate or len(sizes) == 1)


def test_first_fit_by_brute_force() -> None:
    lengths = [random.Random(0).randint(0, 50) for _ in range(300)]
    rooms: list[int] = []
    expected: list[list[int]] = []
    for number, length in enumerate(lengths):
        place = next((place for place, room in enumerate(rooms) if room >= length), len(rooms))
        if place == len(rooms):
            rooms.append(64)
            expected.append([])
        rooms[place] -= length
        expected[place].append(number)
    assert data.pack(lengths, 64, "first_fit", seed=None).bins == expected


def test_best_fit_by_brute_force() -> None:
    lengths = [random.Random(1).randint(0, 50) for _ in range(300)]
    rooms: list[int] = []
    expected: list[list[int]] = []
    for number in sorted(range(300), key=lambda number: -lengths[number]):
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[number]]
        place = min(fitting, key=lambda place: (rooms[place], place), default=len(rooms))
        if place == len(rooms):
            rooms.append(64)
            expected.append([])
        rooms[place] -= lengths[number]
        expected[place].append(number)
    assert data.pack(lengths, 64, "best_fit_decreasing", seed=None).bins == expected


def test_budgets_close_bins_and_open_the_next() -> None:
    assert data.pack([30, 20, 15], 60, "first_fit", seed=None, max_attention_work=1000).bins == [[0], [1, 2]]
    for strategy in WHOLE:
        packing = data.pack([5] * 600, 600, strategy, ranks=2, max_segments=3)
        assert [len(items) for items in packing.bins] == [3] * 200


def test_a_tight_budget_of_work_by_brute_force() -> None:
    """The first bin, and the fullest one, that has both the room and the work left."""
    chance = random.Random(2)
    lengths = [min(32, int(chance.paretovariate(0.8))) for _ in range(400)]
    by_length = sorted(range(400), key=lambda number: -lengths[number])
    limits = Limits(64, max_attention_work=1024)
    for placer, order in ((FirstFitPlacer(limits, None), range(400)), (BestFitPlacer(limits, None), by_length)):
        best = isinstance(placer, BestFitPlacer)
        bins: list[list[int]] = []
        for number in order:
            rooms = [64 - sum(lengths[item] for item in items) for items in bins]
            fitting = [
                place
                for place, items in enumerate(bins)
                if rooms[place] >= lengths[number]
                and data.attention_work([lengths[item] for item in (*items, number)]) <= 1024
            ]
            place = min(fitting, key=lambda place: (rooms[place] if best else 0, place), default=len(bins))
            bins += [[]] if place == len(bins) else []
            bins[place].append(number)
        for number, length in enumerate(lengths):
            assert placer.add(number, length) == []
        assert placer.finish() == bins


def test_steps_whose_work_is_used_up_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank a step that is asked for a seat has one: asking those without is what made tight budgets slow."""
    asked: list[bool] = []
    seats = balance._Step.seats

    def counted(step: Any, convoy: Any) -> list[int] | None:
        found = seats(step, convoy)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(balance._Step, "seats", counted)
    packing = data.pack(real_lengths(1_000, 0, 1024), 2048, max_attention_work=1024**2, max_segments=30)
    assert numbers(packing) == list(range(1_000))
    assert asked and all(asked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_packing_is_pickled(strategy: Strategy) -> None:
    packing = data.pack([3, 9, 4, 1, 7], 10, strategy, ranks=2, seed=1, max_segments=2)
    again = pickle.loads(pickle.dumps(packing))
    assert again.bins == packing.bins
    assert again.repack(5).bins == packing.repack(5).bins


def test_seeds_change_the_order_and_nothing_else() -> None:
    lengths = real_lengths(500, 0)
    for strategy in STRATEGIES:
        packings = [data.pack(lengths, 2048, strategy, ranks=2, seed=seed) for seed in (0, 1)]
        assert packings[0].bins != packings[1].bins
        assert packings[0].repack(1).bins == packings[1].bins


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("held", [3, 17, 64])
def test_placers_are_bounded_and_go_on_where_they_stopped(strategy: Strategy, held: int) -> None:
    chance = random.Random(held)
    lengths = [chance.choice((0, 1, chance.randint(2, 60))) for _ in range(400)]

    def placer() -> Any:
        return make_placer(strategy, Limits(60, max_segments=12), ranks=3, buffer=held, seed=5)

    whole, cut = placer(), placer()
    seen: list[Any] = []
    inside = 0
    for number, length in enumerate(lengths):
        if number % 37 == 0:
            state = json.loads(json.dumps(cut.state_dict()))
            cut = placer()
            cut.load_state_dict(state)
        bins = whole.add(number, length)
        assert cut.add(number, length) == bins
        seen += bins
        inside += 1 - sum(map(len, bins))
        if strategy != "chunks":
            assert inside <= held
    bins = whole.finish()
    assert cut.finish() == bins
    seen += bins
    documents = Counter(item.document if isinstance(item, data.Piece) else item for items in seen for item in items)
    assert sorted(documents) == list(range(400))
    assert strategy == "chunks" or set(documents.values()) == {1}


def test_the_last_step_is_shared_by_the_ranks() -> None:
    packing = data.pack([10] * 20, 100, ranks=4)
    assert [len(items) for items in packing.bins] == [5, 5, 5, 5]
    assert packing.fill == 0.5
    assert data.pack([10] * 3, 100, ranks=4).steps == 1
    assert data.pack([], 100, ranks=4).bins == []
    assert data.pack([0, 0], 100, ranks=1).report().attention_straggler == 1


def test_the_report_by_hand() -> None:
    packing = data.Packing(bins=[[0, 1], [2], [3], []], lengths=[3, 1, 4, 2], capacity=5, ranks=2, strategy="mine")
    report = packing.report(shape=data.ModelShape(vocabulary=0))
    assert (report.documents, report.tokens, report.bins, report.steps, report.max_segments) == (4, 10, 3, 2, 2)
    assert report.fill == pytest.approx(10 / 15)
    assert report.padding_waste == pytest.approx(0.5)
    # Steps: 9 + 1 beside 16, then 4 beside nothing.
    assert report.attention_straggler == pytest.approx((16 / 13 + 2) / 2)
    assert report.attention_straggler_worst == pytest.approx(2)
    assert report.length_correlation == pytest.approx(-0.2581988897)
    assert json.loads(json.dumps(report.to_dict()))["strategy"] == "mine"
    for part in ("mine", "fill 0.6667", "50.00%", "1.615"):
        assert part in str(report)
    assert packing.of_rank(1) == [[2], []]
    held = data.pack([1] * 40, 4, ranks=2, buffer=0.75).report()
    assert (held.buffer, held.buffer_share) == (30, 0.75)
    assert "buffer of 30 documents (75.0%)" in str(held)
    assert packing.report(ranks=1).steps == 4


def test_straggler_ratios() -> None:
    assert straggler_ratios([1, 1, 2, 0, 0, 0, 3], 2) == [1, 2, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_rank_correlation_is_the_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    columns = list(zip(*pairs, strict=True)) if pairs else [(), ()]
    ranks = [[sum(x < y for x in column) + sum(x == y for x in column) / 2 for y in column] for column in columns]
    found = rank_correlation(*columns)
    if min(map(len, map(set, columns))) < 2:
        assert found == 0
    else:
        assert found == pytest.approx(float(torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1]), abs=1e-12)


def test_cost_by_hand() -> None:
    shape = data.ModelShape(
        layers=2, hidden=8, intermediate=12, vocabulary=10, heads=2, key_value_heads=1, head_dim=4, gated=True
    )
    per_token = 2 * (2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) + 8 * 10)
    per_pair = 2 * (2 * 2 * 4 + 2 * 2 * 4)
    assert data.flops([3, 0, 2], shape, training=False) == 5 * per_token + (6 + 3) * per_pair
    assert data.flops([3, 0, 2], shape) == 3 * data.flops([3, 0, 2], shape, training=False)
    bidirectional = data.ModelShape(**{**vars(shape), "causal": False, "gated": False})
    assert data.flops([3], bidirectional, training=False) == 3 * (per_token - 2 * 2 * 8 * 12) + 9 * per_pair
    assert data.attention_work([3, 0, 2]) == 13


def test_errors_name_the_argument_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"document 1 \(and 1 more\) has 11 tokens, more than capacity=10: .*prepare"):
        data.pack([1, 11, 2, 12], 10)
    with pytest.raises(ValueError, match=r"document 2 has 9 tokens, an attention work of 81, more than max_att.*=80"):
        data.pack([1, 2, 9], 10, max_attention_work=80)
    with pytest.raises(ValueError, match=r"strategy='worst_fit': expected one of 'balanced', 'first_fit'"):
        data.pack([1], 10, "worst_fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"isolate=False: .* only 'chunks'"):
        data.pack([1], 10, isolate=False)
    with pytest.raises(ValueError, match=r"max_attention_work: .*'chunks'"):
        data.pack([1], 10, "chunks", max_attention_work=10)
    with pytest.raises(ValueError, match=r"lengths\[1\]=-2 is negative"):
        data.pack([1, -2], 10)
    with pytest.raises(TypeError, match=r"lengths\[0\] is \[1, 2\]: expected a length"):
        data.pack([[1, 2], [3]], 10)
    with pytest.raises(TypeError, match=r"lengths\[0\] is 1.0"):
        data.pack(torch.tensor([1.0, 2.5]), 10)
    with pytest.raises(ValueError, match=r"lengths has shape \(2, 1\)"):
        data.pack(torch.tensor([[1], [2]]), 10)
    with pytest.raises(TypeError, match="lengths: expected a list"):
        data.pack(7, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity=0: expected 1 or more"):
        data.pack([1], 0)
    with pytest.raises(TypeError, match=r"capacity is 1\.5"):
        data.pack([1], 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_segments=0"):
        data.pack([1], 2, max_segments=0)
    for value in (True, torch.tensor([True])):
        with pytest.raises(TypeError, match=r"lengths\[0\] is True: expected a length"):
            data.pack([value] if value is True else value, 2)
    with pytest.raises(TypeError, match=r"ranks is True: expected an integer"):
        data.pack([1], 2, ranks=True)
    with pytest.raises(TypeError, match=r"seed is 'a': expected an integer"):
        data.pack([1], 2, seed="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed=-1: expected 0 or more"):
        data.pack([1], 2, seed=-1)
    with pytest.raises(TypeError, match=r"buffer is 'a': expected a share"):
        data.pack([1], 2, buffer="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"buffer=0: expected a share"):
        data.pack([1], 2, buffer=0)
    with pytest.raises(ValueError, match="rank=2: this packing has 2 ranks"):
        data.pack([1], 2, ranks=2).of_rank(2)
    with pytest.raises(ValueError, match=r"not made by data\.pack"):
        data.Packing(bins=[[0]], lengths=[1], capacity=1).repack(0)
