"""`pack`: documents into bins of a fixed number of tokens, by one of four strategies."""

from __future__ import annotations

import functools
import random
import time
from typing import Any, Literal, Protocol, get_args

from maskops.data.balance import BalancedPlacer
from maskops.data.bins import Bin, Item, Packing
from maskops.data.first_fit import BestFitPlacer, ChunkPlacer, FirstFitPlacer
from maskops.data.lengths import Lengths, check_count, read_lengths
from maskops.data.limits import Limits

Strategy = Literal["balanced", "first_fit", "best_fit_decreasing", "chunks"]

STEPS_HELD = 3
"""Steps whose documents the buffer of the balanced strategy holds at least: of fewer no step can be chosen."""


class Placer(Protocol):
    """Takes documents one by one and gives bins when they are closed: what a strategy is."""

    def add(self, number: int, length: int) -> list[list[Item]]:
        """Takes a document; returns the bins that were closed."""

    def finish(self) -> list[list[Item]]:
        """The bins of what is left."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called."""


def pack(
    lengths: Lengths,
    capacity: int,
    strategy: Strategy = "balanced",
    *,
    ranks: int = 1,
    seed: int | None = 0,
    max_segments: int | None = None,
    max_attention_work: int | None = None,
    buffer: float = 0.05,
    isolate: bool = True,
) -> Packing:
    """Packs documents into bins of at most ``capacity`` tokens. The same arguments give the same packing everywhere.

    - "balanced": the bins of a step hold the same tokens and the same attention work, so that no rank waits for others.
      Documents come in the order of the seed through a buffer; see `balance.py` for the way.
    - "first_fit": in the order of arrival, each document to the first bin with room.
    - "best_fit_decreasing": the longest first, each to the bin that it leaves the least room in. The fullest bins, and
      the most uneven: hundreds of short documents in one, a long one in another.
    - "chunks": the stream of all documents cut every ``capacity`` tokens. Documents of any length; prepare them with
      an EOS (``data.prepare(..., eos=...)``), which is what ends a document in the stream. Bins hold `Piece`s.

    Where the bounds of "balanced" end: with fewer than some 60 steps the buffer is more than 5 % of the documents, and
    the fewer steps, the less full are the bins and the less random is the order: of 20,000 docstrings, 2048 tokens in a
    bin, 64 ranks have 12 steps, a fill of 0.964, a buffer of 26 % and a correlation of length with step of 0.1. A
    ``max_segments`` or ``max_attention_work`` that binds leaves bins less full, too, with every strategy: 0.91 of the
    same cut at 1024, for one rank and a work of 1024**2. ``Packing.report`` tells all of it.

    Args:
        lengths: tokens of each document: a list, a tensor or an array of integers, zeros allowed.
        capacity: tokens of a bin.
        strategy: see above.
        ranks: bins of a step, one for each process.
        seed: of the order in which documents come and bins leave; None for the order given. "best_fit_decreasing"
            without a seed gives the longest documents first.
        max_segments: documents of a bin, at most.
        max_attention_work: sum of squared lengths of a bin, at most; not for "chunks".
        buffer: share of the documents that "balanced" holds at a time. Three steps' worth are held in any case, which
            is more than 5 % of fewer than 60 steps.
        isolate: whether documents that share a bin are sequences of their own. Without it, which only "chunks" allows,
            a bin is one sequence, as in classical pretraining: documents see each other.

    Raises:
        TypeError: lengths that are no integers.
        ValueError: a document that fits no bin, by tokens or by attention work; an argument out of range.
    """
    started = time.perf_counter()
    sizes = read_lengths(lengths)
    check_count("ranks", ranks)
    if seed is not None:
        seed = check_count("seed", seed, least=0)
    if isinstance(buffer, bool) or not isinstance(buffer, (int, float)):
        raise TypeError(f"buffer is {buffer!r}: expected a share of the documents, a number")
    if not 0 < buffer <= 1:
        raise ValueError(f"buffer={buffer}: expected a share of the documents, more than 0 and at most 1")
    limits = Limits(capacity, max_segments, max_attention_work)
    if strategy != "chunks":
        check_fit(sizes, limits)
    order = list(range(len(sizes)))
    chance = random.Random(0 if seed is None else seed)
    if seed is not None:
        chance.shuffle(order)
    held = len(sizes)
    if strategy == "balanced":
        least = -(-STEPS_HELD * ranks * capacity * len(sizes) // max(1, sum(sizes)))
        held = min(len(sizes), max(int(buffer * len(sizes)), least, least_held(ranks)))
    placer = make_placer(strategy, limits, ranks=ranks, buffer=held, seed=chance.getrandbits(32), isolate=isolate)
    bins: list[Bin] = []
    for number in order:
        bins += placer.add(number, sizes[number])
    bins += placer.finish()
    if seed is not None and strategy in ("first_fit", "best_fit_decreasing"):
        chance.shuffle(bins)  # the first bins have seen all short documents, or hold the longest
    bins += [[] for _ in range(-len(bins) % ranks)]

    # A partial of a function of this module, and not a closure, so that a packing can be pickled.
    again = functools.partial(
        pack,
        sizes,
        capacity,
        strategy,
        ranks=ranks,
        max_segments=max_segments,
        max_attention_work=max_attention_work,
        buffer=buffer,
        isolate=isolate,
    )
    return Packing(
        bins=bins,
        lengths=sizes,
        capacity=capacity,
        ranks=ranks,
        strategy=strategy,
        isolate=isolate,
        seed=seed,
        buffer=held if strategy != "chunks" else 1,
        seconds=time.perf_counter() - started,
        _again=again,
    )


def least_held(ranks: int) -> int:
    """Documents that the buffer of the balanced strategy needs: with fewer, ranks of a step would stay without."""
    return 2 * ranks


def make_placer(
    strategy: Strategy, limits: Limits, *, ranks: int, buffer: int, seed: int, isolate: bool = True
) -> Placer:
    """The placer of a strategy, which holds at most ``buffer`` documents.

    Raises:
        ValueError: a strategy that does not exist, or a budget or an ``isolate`` that it does not know.
    """
    if not isolate and strategy != "chunks":
        raise ValueError(f"isolate=False: documents of strategy {strategy!r} are sequences; only 'chunks' joins them")
    if strategy == "balanced":
        return BalancedPlacer(limits, ranks, buffer, seed)
    if strategy == "first_fit":
        return FirstFitPlacer(limits, buffer)
    if strategy == "best_fit_decreasing":
        return BestFitPlacer(limits, buffer)
    if strategy == "chunks":
        if limits.max_attention_work is not None:
            raise ValueError("max_attention_work: strategy 'chunks' cuts by tokens alone; leave it out")
        return ChunkPlacer(limits, isolate)
    raise ValueError(f"strategy={strategy!r}: expected one of {', '.join(map(repr, get_args(Strategy)))}")


def check_fit(lengths: list[int], limits: Limits) -> None:
    """Raises ValueError for the first document that fits no bin, and says how many there are."""
    largest = limits.largest
    if max(lengths, default=0) > largest:
        too_long = [document for document, length in enumerate(lengths) if length > largest]
        limits.check(too_long[0], lengths[too_long[0]], more=len(too_long) - 1)
