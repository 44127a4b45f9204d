"""The table: which work, against whom, what is wanted. B=8, H=12, D=64, float32 where nothing else is said."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from maskops.cli.bench.contests.contest import Contest, Setting
from maskops.cli.bench.cpu.attention import (
    BOOL_MASK,
    CHUNKS,
    HEADS_AS_ROWS,
    LOOPS,
    OURS,
    PLANNED,
    PRODUCTS,
    SDPA,
    UPCAST,
    UPCAST_LOOPS,
    VARLEN,
    Attention,
    Decode,
)
from maskops.cli.bench.cpu.contest import HUGE_PAGES, Entry, Goal, LimitName, Line, Mode
from maskops.cli.bench.cpu.losses import (
    CHUNKED,
    CHUNKS_OF_256,
    COMPILED,
    EAGER,
    FIRST_TOUCH,
    GATHERED,
    IN_PLACE,
    REUSED,
    UNMASKED,
    LinearLoss,
    Loss,
    Softmax,
)
from maskops.cli.bench.cpu.losses import UPCAST as UPCAST_EAGER

CPU = torch.device("cpu")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS_OF: dict[torch.dtype, LimitName] = {torch.bfloat16: "multiply-add bf16"}
"""Limits of products in dtypes that some processors multiply themselves."""


def uniform(count: int = 64, seed: int = 0) -> list[int]:
    """Lengths from 16 to 128, each as likely."""
    chance = random.Random(seed)
    return [chance.randint(16, 128) for _ in range(count)]


def lognormal(count: int = 64, seed: int = 0) -> list[int]:
    """Lengths around a median of 64, one in six above 174, none above 512."""
    chance = random.Random(seed)
    return [min(max(round(chance.lognormvariate(4.1589, 1.0)), 1), 512) for _ in range(count)]


def entries(seed: int = 0) -> Iterator[Entry]:
    """The whole table in its order."""
    yield from _attention(seed)
    yield from _packed(seed)
    yield from _decode(seed)
    yield from _training(seed)
    yield from _losses(seed)
    yield from _linear_losses(seed)
    yield from _softmax(seed)
    yield from _calls(seed)


def _of_attention(
    name: str,
    lengths: Sequence[int],
    goals: Sequence[Goal],
    *,
    seed: int,
    group: str = "attention",
    dtype: torch.dtype = torch.float32,
    share: float | None = None,
    mode: Mode = "forward",
    also: Sequence[str] = (),
    quick: bool = False,
    heads: int = 12,
    head_dim: int = 64,
    **keywords: Any,
) -> Entry:
    """One line of attention, its limit the multiplications."""

    def make() -> Contest:
        setting = Setting(CPU, dtype, seed=seed)
        return Attention(group, name, setting, lengths, heads=heads, head_dim=head_dim, **keywords)

    line = Line(name, OURS, tuple(goals), PRODUCTS_OF.get(dtype, "multiply-add"), share)
    return Entry(group, make, (line,), mode, tuple(also), quick=quick)


def _attention(seed: int) -> Iterator[Entry]:
    make = functools.partial(_of_attention, seed=seed)
    batch = [512] * 8
    yield make("dense 512", batch, [Goal((SDPA,), 1.3)], share=0.85, causal=False, quick=True)
    yield make("causal 512", batch, [Goal((SDPA,), 2.1, 2.4)], quick=True)
    yield make("causal 4096", [4096] * 8, [Goal((SDPA,), 1.25, 1.35)])
    yield make(
        "window of 512, 4096",
        [4096] * 8,
        [Goal((BOOL_MASK, *CHUNKS), 2.0), Goal((BOOL_MASK,), 10.0)],
        share=0.85,
        window=511,
    )
    for length, at_least, aim in ((16, 2.5, 4.0), (32, 1.8, 2.5), (64, 1.6, 2.0)):
        lengths = [length] * (4096 // length)
        name = f"{len(lengths)} sequences of {length}"
        yield make(name, lengths, [Goal((SDPA,), at_least, aim)], causal=False, quick=length == 32)
    for head_dim in (64, 128):
        name = f"32/8 heads of {head_dim}, causal 512"
        goals = [Goal((SDPA,), 2.1, 2.4)]
        yield make(name, batch, goals, heads=32, kv_heads=8, head_dim=head_dim, quick=head_dim == 128)


def _packed(seed: int) -> Iterator[Entry]:
    make = functools.partial(_of_attention, seed=seed, group="packed attention", causal=False)
    yield make("64 of 16 to 128", uniform(seed=seed), [Goal(LOOPS, 2.0, 2.5)], quick=True)
    yield make("64 log-normal, median 64, to 512", lognormal(seed=seed), [Goal(LOOPS, 1.8, 2.2)])
    for name, dtype in HALVES.items():
        goals = [Goal((*LOOPS, *UPCAST_LOOPS), 1.5, 2.0)]
        title = f"64 of 16 to 128, {name}"
        yield make(title, uniform(seed=seed), goals, dtype=dtype, quick=dtype == torch.bfloat16)


def _decode(seed: int) -> Iterator[Entry]:
    yield _of_decode("12 heads of 64", (12, 12, 64), Goal((SDPA,), 1.35), (PRODUCTS,), seed=seed)
    # Heads of 128, as large models have them, beside those of 64 as everywhere in the table.
    for head_dim in (64, 128):
        name, sizes, also = f"32/8 heads of {head_dim}", (32, 8, head_dim), (HEADS_AS_ROWS, PRODUCTS)
        yield _of_decode(name, sizes, Goal((SDPA,), 2.4), also, seed=seed)
        name, goal = f"{name}, bfloat16", Goal((SDPA, UPCAST), 3.0)
        yield _of_decode(name, sizes, goal, also, seed=seed, dtype=torch.bfloat16)


def _of_decode(
    name: str,
    sizes: tuple[int, int, int],
    goal: Goal,
    also: tuple[str, ...],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Entry:
    """One query over 4096 keys; `sizes` are query heads, key heads and their width."""
    heads, kv_heads, head_dim = sizes
    make = functools.partial(Decode, Setting(CPU, dtype, seed=seed), 8, heads, kv_heads, 4096, head_dim, False, name)
    line = Line(name, OURS, (goal,), "read", 0.95)
    return Entry("decode, 4096 keys", make, (line,), also=also, quick=head_dim == 64)


def _training(seed: int) -> Iterator[Entry]:
    make = functools.partial(_of_attention, seed=seed, mode="training", group="attention")
    batch = [512] * 8
    yield make("dense 512", batch, [Goal((SDPA,), 1.3)], share=0.8, causal=False)
    yield make("causal 512", batch, [Goal((SDPA,), 2.3)], share=0.8, quick=True)
    yield make("64 of 16 to 128, causal", uniform(seed=seed), [Goal(LOOPS, 1.9, 2.4)], quick=True)
    for name, dtype in HALVES.items():
        goals = [Goal((*LOOPS, *UPCAST_LOOPS), 1.5, 2.0)]
        yield make(f"64 of 16 to 128, causal, {name}", uniform(seed=seed), goals, dtype=dtype)


def _losses(seed: int) -> Iterator[Entry]:
    def loss(rows: int, vocabulary: int, ignored: float, dtype: torch.dtype = torch.float32) -> Callable[[], Contest]:
        return functools.partial(_loss, Setting(CPU, dtype, seed=seed), rows, vocabulary, ignored)

    def against(eager: float, huge_pages: float | None, compiled: float) -> tuple[Goal, ...]:
        found = [Goal((EAGER,), eager), Goal((COMPILED,), compiled)]
        if huge_pages is not None:
            found.insert(1, Goal((EAGER + HUGE_PAGES,), huge_pages))
        return tuple(found)

    group, whole = "cross-entropy", "4096 x 32000"
    line = Line(whole, OURS, against(10.0, 4.4, 2.9), "read", 0.85)
    yield Entry(group, loss(4096, 32000, 0.0), (line,), quick=True)
    lines: tuple[Line, ...] = (
        Line(f"{whole}, fresh gradient", OURS, against(5.0, 2.5, 3.0), "copy", 1.0),
        Line(f"{whole}, fresh gradient, first touch", FIRST_TOUCH, against(5.0, 2.5, 3.0), "copy + touch", 1.0),
        Line(f"{whole}, in place", IN_PLACE, against(15.0, 6.0, 10.0), "copy", 0.8),
        Line(f"{whole}, reused buffer", REUSED, against(15.0, 6.0, 10.0), "copy", 0.8),
    )
    yield Entry(group, loss(4096, 32000, 0.0), lines, "training", quick=True)
    wide = "1024 x 151936, bfloat16"
    line = Line(wide, OURS, against(7.0, None, 2.0), "read")
    yield Entry(group, loss(1024, 151936, 0.0, torch.bfloat16), (line,))
    goals = against(6.0, None, 4.0)
    lines = (Line(wide, OURS, goals, "copy"), Line(f"{wide}, first touch", FIRST_TOUCH, goals, "copy + touch"))
    yield Entry(group, loss(1024, 151936, 0.0, torch.bfloat16), lines, "training")
    masked = f"{whole}, 75 % masked"
    line = Line(masked, OURS, (Goal((GATHERED,), 10.0), Goal((UNMASKED,), 3.3, 3.9)), "read")
    yield Entry(group, loss(4096, 32000, 0.75), (line,), quick=True)
    goals = (Goal((GATHERED,), 10.0),)
    lines = (Line(masked, OURS, goals, "copy"), Line(f"{masked}, first touch", FIRST_TOUCH, goals, "copy + touch"))
    yield Entry(group, loss(4096, 32000, 0.75), lines, "training")


@functools.lru_cache(maxsize=1)
def _loss(setting: Setting, rows: int, vocabulary: int, ignored: float) -> Contest:
    """Kept for the next entry: its values, and what they should give, take seconds to make."""
    return Loss(setting, rows, vocabulary, ignored, "")


def _linear_losses(seed: int) -> Iterator[Entry]:
    group = "linear cross-entropy"
    for ignored in (0.0, 0.75):
        # Where all rows count, gathering them is eager with a copy.
        peers = (EAGER, CHUNKED, CHUNKS_OF_256, *((GATHERED,) if ignored else ()))
        name = f"2048 x 1024 x 32000, {ignored:.0%} ignored"
        line = Line(name, OURS, (Goal(peers, 1.1, 1.3),), "multiply-add", memory=1.3)
        make = functools.partial(LinearLoss, Setting(CPU, torch.float32, seed=seed), 2048, 1024, 32000, ignored, name)
        yield Entry(group, make, (line,), "training")
    name = "512 x 1024 x 32000, bfloat16"
    line = Line(name, OURS, (Goal((CHUNKS_OF_256, UPCAST_EAGER), 1.0, 1.3),), "multiply-add bf16")
    make = functools.partial(LinearLoss, Setting(CPU, torch.bfloat16, seed=seed), 512, 1024, 32000, 0.0, name)
    yield Entry(group, make, (line,), "training", quick=True)


def _softmax(seed: int) -> Iterator[Entry]:
    for causal, at_least in ((False, 2.0), (True, 3.0)):
        name = f"16 x 12 x 512 x 512, {'causal' if causal else 'padding'}"
        goals = (Goal((EAGER, COMPILED), at_least),)
        lines = (
            Line(name, OURS, goals, "copy", 1.0),
            Line(f"{name}, first touch", FIRST_TOUCH, goals, "copy + touch", 1.0),
        )
        make = functools.partial(Softmax, Setting(CPU, torch.float32, seed=seed), 16, 12, 512, causal, name)
        yield Entry("masked softmax", make, lines, quick=causal)


def _calls(seed: int) -> Iterator[Entry]:
    """Tiny shapes, where the call is all there is: at most 1.5 times the time of a peer's call, and twice with a graph.

    The peer of a loss is torch's loss, that of a softmax what people write.
    """
    setting = Setting(CPU, torch.float32, seed=seed)
    attention = functools.partial(Attention, "", "", setting, [8], heads=2, head_dim=16)
    for mode, most in (("forward", 1.5), ("graph", 2.0)):
        for name, make, peer, ours in (
            ("attention", functools.partial(attention, causal=False), SDPA, (OURS, PLANNED, VARLEN)),
            ("attention, causal", functools.partial(attention, causal=True), SDPA, (OURS, PLANNED, VARLEN)),
            ("cross-entropy", functools.partial(Loss, setting, 4, 32, 0.0, ""), EAGER, (OURS,)),
            ("masked softmax", functools.partial(Softmax, setting, 1, 2, 8, True, ""), EAGER, (OURS,)),
            ("decode", functools.partial(Decode, setting, 1, 2, 2, 64, 16, False, ""), SDPA, (OURS,)),
        ):
            if (name, mode) == ("decode", "graph"):
                continue
            goal = Goal((peer,), 1.0 / most, 1.0)
            lines = tuple(Line(f"{name}{each.removeprefix(OURS)}", each, (goal,)) for each in ours)
            yield Entry("calls, tiny shapes", make, lines, mode, calls=200, quick=True)  # type: ignore[arg-type]
