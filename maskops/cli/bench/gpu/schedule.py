"""What is run: the contests of a full run, of a quick one and of a dry one, each made when its turn comes."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maskops.cli.bench import corpus
from maskops.cli.bench.contests.contest import Contest, Setting
from maskops.cli.bench.gpu.decode import Decode
from maskops.cli.bench.gpu.losses import LinearLoss, Loss, Softmax
from maskops.cli.bench.gpu.rivals import Attention

_MODEL_WIDTH = 2048
_TOKENS = 16384


@dataclass(frozen=True)
class Entry:
    """A contest that can be made.

    Attributes:
        group, name: Its own.
        make: From its name to the contest.
        quick: Whether a quick run holds it.
    """

    group: str
    name: str
    make: Callable[[str], Contest]
    quick: bool = False


def contests(setting: Setting) -> Iterator[Entry]:
    """All of them, in the order of the tables; tiny ones, one of each kind, in a dry run."""
    if setting.small:
        yield from _tiny(setting)
        return
    yield from _dense_and_causal(setting)
    yield from _masked(setting)
    yield from _ragged(setting)
    for vocabulary in (32768, 131072, 50257):
        for ignored in (0.0, 0.75):
            yield _loss(setting, 8192, vocabulary, ignored, quick=vocabulary == 50257 or ignored == 0.0)
    for ignored in (0.0, 0.75):
        yield _linear_loss(setting, 8192, 4096, 131072, ignored, quick=ignored > 0.0)
    for batch, length in ((8, 1024), (2, 4096)):
        yield _softmax(setting, batch, 16, length, quick=length == 1024)
    for batch, capacity in ((8, 4096), (64, 4096), (8, 32768)):
        for ragged in (False, True):
            yield _decode(setting, batch, 32, 8, capacity, 128, ragged, quick=batch == 64 and ragged)


def _attention(
    setting: Setting,
    group: str,
    name: str,
    lengths: Sequence[int] | Callable[[], Sequence[int]],
    head_dim: int,
    *,
    quick: bool = False,
    heads: int | None = None,
    **keywords: Any,
) -> Entry:
    """Lengths that take long to find are found when their turn comes."""

    def make(name: str) -> Contest:
        found = lengths() if callable(lengths) else lengths
        n_heads = heads or _MODEL_WIDTH // head_dim
        return Attention(group, name, setting, found, heads=n_heads, head_dim=head_dim, **keywords)

    return Entry(group, name, make, quick)


def _dense_and_causal(setting: Setting) -> Iterator[Entry]:
    group = "attention, equal lengths"
    for head_dim in (128, 64):
        for causal in (False, True):
            for length in (1024, 2048, 4096, 8192, 16384):
                lengths = [length] * (_TOKENS // length)
                name = f"{'causal' if causal else 'dense'} {length}, D {head_dim}"
                yield _attention(setting, group, name, lengths, head_dim, quick=length in (4096, 16384), causal=causal)
    name = "causal 4096, D 128, 32/8 heads"
    yield _attention(setting, group, name, [4096] * 4, 128, heads=32, kv_heads=8)


def _masked(setting: Setting) -> Iterator[Entry]:
    group = "attention, masks"
    chance = random.Random(setting.seed)
    documents = []
    for _ in range(2):
        documents += _until(_TOKENS // 2, lambda: int(chance.lognormvariate(6.0, 1.0)) + 1, _TOKENS // 2)
    for head_dim in (128, 64):
        name = f"window 1024 at {_TOKENS}, D {head_dim}"
        yield _attention(setting, group, name, [_TOKENS], head_dim, quick=True, window=1023)
        name = f"2 rows of {_TOKENS // 2} by document ids, {len(documents)} documents, D {head_dim}"
        yield _attention(setting, group, name, documents, head_dim, quick=head_dim == 128, rows=2)
    for block in (128, 1):
        name = f"dense mask 4096, half, {'blocks of 128' if block > 1 else 'pair by pair'}, D 128"
        yield _with_mask(setting, name, [4096] * 4, 128, 16, block)


def _with_mask(setting: Setting, name: str, lengths: Sequence[int], head_dim: int, heads: int, block: int) -> Entry:
    """Half of the pairs, block by block; the blocks of the diagonal are always seen, so that every row sees a key."""
    group = "attention, masks"

    def make(name: str) -> Contest:
        size = lengths[0] // block
        generator = torch.Generator().manual_seed(setting.seed)
        chosen = (torch.rand(size, size, generator=generator) < 0.5).fill_diagonal_(True)
        allowed = chosen.repeat_interleave(block, 0).repeat_interleave(block, 1).to(setting.device)
        return Attention(group, name, setting, lengths, heads=heads, head_dim=head_dim, allowed=allowed)

    return Entry(group, name, make, quick=True)


def _ragged(setting: Setting) -> Iterator[Entry]:
    group = "attention, real lengths"

    @functools.cache
    def docstrings() -> list[int]:
        text = corpus.read(
            vocabulary=4096, min_length=16, max_length=4096, characters=2_000_000, seed=setting.seed, seconds=30.0
        )
        found = itertools.cycle(text.lengths)
        return _until(2 * _TOKENS, lambda: next(found), 4096)

    chance = random.Random(setting.seed)
    short = _until(_TOKENS, lambda: chance.randint(16, 128), 128)
    long = _until(2 * _TOKENS, lambda: int(chance.lognormvariate(7.0, 1.0)) + 1, _TOKENS)
    for head_dim in (128, 64):
        name = f"docstrings of the standard library and of torch, D {head_dim}"
        yield _attention(setting, group, name, docstrings, head_dim, quick=True)
        name = f"{len(short)} sequences of 16 to 128, D {head_dim}"
        yield _attention(setting, group, name, short, head_dim, quick=True)
        name = f"{len(long)} log-normal sequences, median 1100, D {head_dim}"
        yield _attention(setting, group, name, long, head_dim, quick=head_dim == 128)


def _until(tokens: int, draw: Callable[[], int], longest: int) -> list[int]:
    """Lengths that add up to so many tokens; the last one is cut."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(draw(), longest, left))
    return lengths


def _loss(setting: Setting, rows: int, vocabulary: int, ignored: float, *, quick: bool = False) -> Entry:
    name = f"{rows} x {vocabulary}, {ignored:.0%} ignored"
    make = functools.partial(Loss, setting, rows, vocabulary, ignored)
    return Entry(Loss.group, name, make, quick)


def _linear_loss(
    setting: Setting, rows: int, width: int, vocabulary: int, ignored: float, *, quick: bool = False
) -> Entry:
    name = f"{rows} x {width} x {vocabulary}, {ignored:.0%} ignored"
    make = functools.partial(LinearLoss, setting, rows, width, vocabulary, ignored)
    return Entry(LinearLoss.group, name, make, quick)


def _softmax(setting: Setting, batch: int, heads: int, length: int, *, quick: bool = False) -> Entry:
    name = f"{batch} x {heads} x {length} x {length}, padding, causal"
    return Entry(Softmax.group, name, functools.partial(Softmax, setting, batch, heads, length), quick)


def _decode(
    setting: Setting,
    batch: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    ragged: bool,
    *,
    quick: bool = False,
) -> Entry:
    filled = "filled to a fifth and more" if ragged else "full"
    name = f"batch {batch}, heads {heads}/{kv_heads} of {head_dim}, {capacity} keys, {filled}"
    make = functools.partial(Decode, setting, batch, heads, kv_heads, capacity, head_dim, ragged)
    return Entry(Decode.group, name, make, quick)


def _tiny(setting: Setting) -> Iterator[Entry]:
    group, width = "attention, equal lengths", 16
    yield _attention(setting, group, "dense 48", [48, 48], width, heads=2, causal=False)
    yield _attention(setting, group, "causal 48, 2/1 heads", [48, 48], width, heads=2, kv_heads=1)
    group = "attention, masks"
    yield _attention(setting, group, "window 8 at 48", [48], width, heads=2, window=7)
    yield _attention(setting, group, "2 rows by document ids", [30, 10, 40], width, heads=2, rows=2)
    yield _with_mask(setting, "dense mask, half", [48, 48], width, 2, 8)
    yield _attention(setting, "attention, real lengths", "3 lengths", lambda: [5, 40, 17], width, heads=2)
    for ignored in (0.0, 0.75):
        yield _loss(setting, 16, 101, ignored)
    yield _linear_loss(setting, 16, 24, 101, 0.75)
    yield _softmax(setting, 2, 2, 24)
    for ragged in (False, True):
        yield _decode(setting, 2, 4, 2, 128, width, ragged)
