"""The table of `bench cpu`: which work, in which shapes, against whom, with which goals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskops import extension
from maskops.cli.bench.contests.attention import AttentionContest
from maskops.cli.bench.contests.contest import Contest, Setting
from maskops.cli.bench.cpu import attention, command, limits, losses, measure, rows
from maskops.cli.bench.cpu.contest import HUGE_PAGES

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=f"extension: {extension.reason()}")

STEADY = dict.fromkeys(limits.LIMITS, 10.0)


@pytest.fixture(autouse=True)
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values take memory and time, and none are needed."""
    monkeypatch.setattr(Setting, "randn", lambda self, *size, stream=0: torch.zeros(1, dtype=self.dtype).expand(size))
    monkeypatch.setattr(attention.Attention, "in_layout", AttentionContest.in_layout)  # whose layouts are views


def test_the_table_names_contenders_that_exist() -> None:
    table = list(rows.entries())
    keys = [(entry.group, entry.mode, line.name) for entry in table for line in entry.lines]
    assert len(set(keys)) == len(keys)
    assert {entry.group for entry in table} == {entry.group for entry in table if entry.quick}
    for entry in table:
        contest = entry.make()
        known = {contender.name: contender for contender in contest.contenders()}
        assert {name.removesuffix(HUGE_PAGES) for name in entry.names()} <= set(known)
        for line in entry.lines:
            assert known[line.ours].ours and line.goals
            floor = measure.limit_seconds(line.limit, contest, entry.mode == "training", STEADY)
            assert (floor is None) == (line.limit is None) and floor != 0.0
            for goal in line.goals:
                assert goal.aim is None or goal.aim >= goal.at_least
                peers = [known[peer.removesuffix(HUGE_PAGES)] for peer in goal.peers]
                assert not any(peer.ours and not peer.partial for peer in peers)


BATCH, BF16, FP16 = (8, 12, 512, 64), torch.bfloat16, torch.float16
LOOPS = ("loop, FLASH", "loop, MATH")
CELLS = (*LOOPS, "loop in float32, FLASH", "loop in float32, MATH")
CHUNKS = ("SDPA, chunks of 128", "SDPA, chunks of 256", "SDPA, chunks of 512")
HUGE, COMPILE = "eager, huge pages", "torch.compile"
LOGITS = ((4096, 32000),)
TOUCHES = ("", ", first touch")
SCORES, SOFTMAX = ((16, 12, 512, 512),), ("eager", COMPILE)
UNIFORM, LOGNORMAL = (((sum(lengths), 12, 64),) * 2 for lengths in (rows.uniform(), rows.lognormal()))
TABLE: dict[tuple[str, str, str], tuple[Any, ...]] = {
    # What is measured, with the shapes of q and k (or of logits, or of what makes them), the dtype, the goals.
    ("attention", "forward", "dense 512"): ((BATCH, BATCH), None, (("SDPA",), 1.3, None)),
    ("attention", "forward", "causal 512"): ((BATCH, BATCH), None, (("SDPA",), 2.1, 2.4)),
    ("attention", "forward", "causal 4096"): (((8, 12, 4096, 64),) * 2, None, (("SDPA",), 1.25, 1.35)),
    ("attention", "forward", "window of 512, 4096"): (
        ((8, 12, 4096, 64),) * 2,
        None,
        (("SDPA, bool mask", *CHUNKS), 2.0, None),
        (("SDPA, bool mask",), 10.0, None),
    ),
    ("attention", "forward", "256 sequences of 16"): (((256, 12, 16, 64),) * 2, None, (("SDPA",), 2.5, 4.0)),
    ("attention", "forward", "128 sequences of 32"): (((128, 12, 32, 64),) * 2, None, (("SDPA",), 1.8, 2.5)),
    ("attention", "forward", "64 sequences of 64"): (((64, 12, 64, 64),) * 2, None, (("SDPA",), 1.6, 2.0)),
    **{
        ("attention", "forward", f"32/8 heads of {width}, causal 512"): (
            ((8, 32, 512, width), (8, 8, 512, width)),
            None,
            (("SDPA",), 2.1, 2.4),
        )
        for width in (64, 128)
    },
    ("packed attention", "forward", "64 of 16 to 128"): (UNIFORM, None, (LOOPS, 2.0, 2.5)),
    ("packed attention", "forward", "64 log-normal, median 64, to 512"): (LOGNORMAL, None, (LOOPS, 1.8, 2.2)),
    ("packed attention", "forward", "64 of 16 to 128, bfloat16"): (UNIFORM, BF16, (CELLS, 1.5, 2.0)),
    ("packed attention", "forward", "64 of 16 to 128, float16"): (UNIFORM, FP16, (CELLS, 1.5, 2.0)),
    ("decode, 4096 keys", "forward", "12 heads of 64"): (
        ((8, 12, 1, 64), (8, 12, 4096, 64)),
        None,
        (("SDPA",), 1.35, None),
    ),
    **{
        ("decode, 4096 keys", "forward", f"32/8 heads of {width}{name}"): (
            ((8, 32, 1, width), (8, 8, 4096, width)),
            dtype,
            (peers, at_least, None),
        )
        for width in (64, 128)
        for name, dtype, peers, at_least in (
            ("", None, ("SDPA",), 2.4),
            (", bfloat16", BF16, ("SDPA", "SDPA in float32"), 3.0),
        )
    },
    ("attention", "training", "dense 512"): ((BATCH, BATCH), None, (("SDPA",), 1.3, None)),
    ("attention", "training", "causal 512"): ((BATCH, BATCH), None, (("SDPA",), 2.3, None)),
    ("attention", "training", "64 of 16 to 128, causal"): (UNIFORM, None, (LOOPS, 1.9, 2.4)),
    ("attention", "training", "64 of 16 to 128, causal, bfloat16"): (UNIFORM, BF16, (CELLS, 1.5, 2.0)),
    ("attention", "training", "64 of 16 to 128, causal, float16"): (UNIFORM, FP16, (CELLS, 1.5, 2.0)),
    ("cross-entropy", "forward", "4096 x 32000"): (
        LOGITS,
        None,
        (("eager",), 10.0, None),
        ((HUGE,), 4.4, None),
        ((COMPILE,), 2.9, None),
    ),
    **{
        ("cross-entropy", "training", f"4096 x 32000, fresh gradient{touch}"): (
            LOGITS,
            None,
            (("eager",), 5.0, None),
            ((HUGE,), 2.5, None),
            ((COMPILE,), 3.0, None),
        )
        for touch in TOUCHES
    },
    **{
        ("cross-entropy", "training", f"4096 x 32000, {way}"): (
            LOGITS,
            None,
            (("eager",), 15.0, None),
            ((HUGE,), 6.0, None),
            ((COMPILE,), 10.0, None),
        )
        for way in ("in place", "reused buffer")
    },
    ("cross-entropy", "forward", "1024 x 151936, bfloat16"): (
        ((1024, 151936),),
        BF16,
        (("eager",), 7.0, None),
        ((COMPILE,), 2.0, None),
    ),
    **{
        ("cross-entropy", "training", f"1024 x 151936, bfloat16{touch}"): (
            ((1024, 151936),),
            BF16,
            (("eager",), 6.0, None),
            ((COMPILE,), 4.0, None),
        )
        for touch in TOUCHES
    },
    ("cross-entropy", "forward", "4096 x 32000, 75 % masked"): (
        LOGITS,
        None,
        (("rows gathered",), 10.0, None),
        (("maskops, unmasked",), 3.3, 3.9),
    ),
    **{
        ("cross-entropy", "training", f"4096 x 32000, 75 % masked{touch}"): (
            LOGITS,
            None,
            (("rows gathered",), 10.0, None),
        )
        for touch in TOUCHES
    },
    ("linear cross-entropy", "training", "2048 x 1024 x 32000, 0% ignored"): (
        ((2048, 1024), (32000, 1024)),
        None,
        (("eager", "torch's chunked", "torch's chunked, 256 rows"), 1.1, 1.3),
    ),
    ("linear cross-entropy", "training", "2048 x 1024 x 32000, 75% ignored"): (
        ((2048, 1024), (32000, 1024)),
        None,
        (("eager", "torch's chunked", "torch's chunked, 256 rows", "rows gathered"), 1.1, 1.3),
    ),
    ("linear cross-entropy", "training", "512 x 1024 x 32000, bfloat16"): (
        ((512, 1024), (32000, 1024)),
        BF16,
        (("torch's chunked, 256 rows", "eager in float32"), 1.0, 1.3),
    ),
    **{
        ("masked softmax", "forward", f"16 x 12 x 512 x 512, {mask}{touch}"): (SCORES, None, (SOFTMAX, at_least, None))
        for mask, at_least in (("padding", 2.0), ("causal", 3.0))
        for touch in TOUCHES
    },
    **{
        ("calls, tiny shapes", mode, name): (None, None, ((peer,), 1 / most, 1.0))
        for mode, most in (("forward", 1.5), ("graph", 2.0))
        for name, peer in (
            *(
                (f"attention{pattern}{way}", "SDPA")
                for pattern in ("", ", causal")
                for way in ("", ", RowSpans", ", varlen")
            ),
            ("cross-entropy", "eager"),
            ("masked softmax", "eager"),
            *((("decode", "SDPA"),) if mode == "forward" else ()),
        )
    },
}


def test_the_table_is_whole() -> None:
    """Every line with its shapes, its dtype, its peers and its goals; nothing else."""
    found = {(entry.group, entry.mode, line.name): (entry, line) for entry in rows.entries() for line in entry.lines}
    assert set(found) == set(TABLE)
    contests: dict[int, Contest] = {}
    for key, (shapes, dtype, *goals) in TABLE.items():
        entry, line = found[key]
        assert [(goal.peers, goal.at_least, goal.aim) for goal in line.goals] == goals, key
        contest = contests.setdefault(id(entry), entry.make())
        layout = next(each.layout for each in contest.contenders() if each.name == line.ours)
        leaves = contest.leaves(layout)
        assert {x.dtype for x in leaves} == {dtype or torch.float32}, key
        assert shapes is None or [x.shape for x in leaves[: len(shapes)]] == list(map(torch.Size, shapes)), key
        assert (line.memory == 1.3) == (key[0] == "linear cross-entropy" and dtype is None)
        assert (line.limit is None) == key[0].startswith("calls"), key
        # Only where the system grants memory in each run does that count; only bfloat16 has products of its own.
        assert (line.limit == "copy + touch") == key[2].endswith("first touch"), key
        assert (line.limit == "multiply-add bf16") == (dtype == BF16 and contest.flops(False) is not None), key
    lengths = rows.uniform()
    assert len(lengths) == 64 and min(lengths) >= 16 and max(lengths) <= 128
    lengths = sorted(rows.lognormal())
    assert len(lengths) == 64 and lengths[-1] <= 512 and 50 < lengths[32] < 80
    window = found["attention", "forward", "window of 512, 4096"][0].make()
    assert isinstance(window, attention.Attention) and window.window == 511 and window.causal
    masked = found["cross-entropy", "forward", "4096 x 32000, 75 % masked"][0].make()
    assert isinstance(masked, losses.Loss) and len(masked.kept) == 1024
    whole = command.select(list(rows.entries()), "", quick=False)
    assert {(entry.group, entry.mode, line.name) for entry in whole for line in entry.lines} == set(TABLE)
    order = [whole[place].calls > 1 for place in command.in_order(whole)]
    assert sorted(command.in_order(whole)) == list(range(len(whole))) and order == sorted(order, reverse=True)
    assert command.PACES["full"].compiled
