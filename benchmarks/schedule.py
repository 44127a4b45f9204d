"""`python -m benchmarks.schedule`: do the schedules of the kernels keep many cores busy?

A machine with few cores can tell: the schedule of each kernel is asked for the tasks that so many threads would share,
every task is run and timed on one thread, and the threads are then played, each taking the next task when it
is free, as in `run_tasks`. The makespan is what the last thread needs; ideal is an even share of all tasks. What many
cores do to one another (memory, clock) is not in it, nor what waking them costs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import maskops
from maskops import extension, masks
from maskops.cli.bench import corpus
from maskops.cli.bench.machine import describe
from maskops.cli.bench.others import Others
from maskops.cli.bench.report import aligned

THREADS = (8, 32, 64, 192)
ENOUGH_MS = 0.5
"""A thread's share of the work from which on an even distribution is expected: a few tasks each."""


@dataclass(frozen=True)
class Case:
    """One call; `work` makes the call again and again from the same tensors."""

    name: str
    work: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Result:
    """How one call went on some threads, times in milliseconds."""

    name: str
    threads: int
    workers: int
    tasks: int
    longest: float
    ideal: float
    makespan: float

    @property
    def ratio(self) -> float:
        """Makespan over ideal, which no schedule of these tasks undercuts by more than its longest task."""
        return self.makespan / self.ideal

    @property
    def enough(self) -> bool:
        """Whether there is work enough for all threads."""
        return self.ideal >= ENOUGH_MS and self.workers == self.threads


def makespan(nanoseconds: list[int], workers: int) -> int:
    """When the last of the workers ends, each taking the next task in order as soon as it is free."""
    free = [0] * workers
    for cost in nanoseconds:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


TURN_KEYS, TURN_SHARE = 64, 0.4
"""Keys that a task of a chain keeps for itself at a time, and for how much of its time: two products of five."""


def chained_makespan(tasks: list[extension.TaskTime], workers: int) -> float:
    """As `makespan`; a task of a chain follows the one before it through the keys of both, and ends after it."""
    free = [0.0] * workers
    last: dict[int, tuple[float, float]] = {}  # when the next task of a chain can begin and end
    for task in tasks:
        begin, earliest = free[0], 0.0
        if task.chain in last:
            begin, earliest = max(begin, last[task.chain][0]), last[task.chain][1]
        end = max(begin + task.nanoseconds, earliest)
        if task.chain >= 0:
            last[task.chain] = begin + TURN_SHARE * task.nanoseconds * TURN_KEYS / max(task.keys, TURN_KEYS), end
        heapq.heapreplace(free, end)
    return max(free)


def measure(name: str, call: Callable[[], object], threads: int, repeats: int) -> Result:
    """Tasks of a call as `threads` threads would get them, each with the least time that it took."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [extension.trace_tasks(call) for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)
    if len({len(run) for run in runs}) != 1:
        raise RuntimeError(f"{name}: runs of the same call differ in their tasks")
    regions: dict[int, list[extension.TaskTime]] = {}
    for task in zip(*runs, strict=True):
        regions.setdefault(task[0].region, []).append(min(task, key=lambda time: time.nanoseconds))
    workers = {time.region: min(threads, time.most_workers) for time in runs[0]}
    costs = [task.nanoseconds for tasks in regions.values() for task in tasks]
    return Result(
        name,
        threads,
        max(workers.values()),
        len(costs),
        max(costs) / 1e6,
        sum(costs) / threads / 1e6,
        sum(chained_makespan(tasks, workers[region]) for region, tasks in regions.items()) / 1e6,
    )


def packed(
    lengths: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mask: maskops.masks.Mask | None,
    backward: bool = False,
) -> Callable[[], Callable[[], object]]:
    """Attention over documents one behind the other, or the gradients of its inputs."""

    def work() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        sizes = [(sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads)]
        q, k, v = (torch.randn(size, generator=generator) for size in sizes)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        if backward:
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = maskops.varlen_attention(q, k, v, offsets, offsets, mask, backend="cpu")
            gradient = torch.randn(out.shape, generator=generator)
            return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)
        return lambda: maskops.varlen_attention(q, k, v, offsets, offsets, mask, backend="cpu")

    return work


def few_queries(batch: int, q_len: int, k_len: int) -> Callable[[], Callable[[], object]]:
    """Attention of the last queries of sequences to all of their keys; one query is what decoding does."""

    def work() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(batch, 32, q_len, 64, generator=generator)
        k, v = (torch.randn(batch, 8, k_len, 64, generator=generator) for _ in range(2))
        return lambda: maskops.attention(q, k, v, masks.causal(), backend="cpu")

    return work


def loss(rows: int, vocabulary: int) -> Callable[[], Callable[[], object]]:
    """Cross-entropy of few rows."""

    def work() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, vocabulary, generator=generator)
        target = torch.randint(vocabulary, (rows,), generator=generator)
        return lambda: maskops.cross_entropy(logits, target)

    return work


def distributions() -> Iterator[tuple[str, list[int]]]:
    """Lengths of documents under the names that the table gives them."""
    chance = random.Random(0)
    text = corpus.read(vocabulary=2, min_length=16, max_length=2048, characters=600_000, seed=0, seconds=30)
    yield "docstrings", text.lengths[:160]
    yield "log-normal, median 256", [min(2048, max(8, int(chance.lognormvariate(5.545, 0.8)))) for _ in range(32)]
    yield "uniform 16-128", [chance.randint(16, 128) for _ in range(256)]
    yield "one 4096 and 64 of 128", [128] * 32 + [4096] + [128] * 32
    yield "one 4096", [4096]
    yield "eight 512", [512] * 8


def cases() -> Iterator[Case]:
    """Everything that is measured."""
    for name, lengths in distributions():
        for mask_name, mask in (("full", None), ("causal", masks.causal())):
            for heads, kv_heads in ((12, 12), (32, 8)):
                title = f"{name}, {mask_name}, heads {heads}/{kv_heads}"
                for backward in (False, True):
                    work = packed(lengths, heads=heads, kv_heads=kv_heads, head_dim=64, mask=mask, backward=backward)
                    yield Case(f"{title}, {'backward' if backward else 'forward'}", work)
    for batch, q_len, k_len in ((1, 1, 32768), (16, 1, 8192), (1, 64, 32768), (1, 256, 16384)):
        yield Case(
            f"{q_len} queries of {batch} over {k_len} keys, heads 32/8, forward", few_queries(batch, q_len, k_len)
        )
    for rows, vocabulary in ((4096, 32000), (64, 151936), (4, 151936)):
        yield Case(f"cross-entropy of {rows} rows over {vocabulary} words, forward", loss(rows, vocabulary))


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each call and number of threads, and how many hold the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose names hold this text")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each call; a task counts with its shortest")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    others = Others()
    torch.set_num_threads(1)
    results = []
    for case in cases():
        if options.only not in case.name:
            continue
        call = case.work()
        call()
        results += [measure(case.name, call, threads, options.repeats) for threads in options.threads]
    rows = [["", "threads", "tasks", "longest ms", "ideal ms", "makespan / ideal", ""]]
    for result in results:
        enough = "" if result.enough else f"bound {max(result.longest, result.ideal) / result.ideal:.2f}"
        rows.append(
            [
                result.name if result.threads == options.threads[0] else "",
                str(result.threads),
                str(result.tasks),
                f"{result.longest:.3f}",
                f"{result.ideal:.3f}",
                f"{result.ratio:.3f}",
                enough,
            ]
        )
    print("\n".join(aligned(rows, indent="")))
    ratios = sorted(result.ratio for result in results if result.enough)
    if ratios:
        good = sum(ratio <= 1.05 for ratio in ratios)
        print(f"work enough ({ENOUGH_MS} ms a thread): {good} of {len(ratios)} within 1.05, worst {ratios[-1]:.3f}")
    if options.json is not None:
        host = describe(torch.device("cpu"), torch.float32)
        machine = host.__dict__ | {"peaks": host.peaks.__dict__, "load": others.taken()}
        found = [asdict(result) | {"ratio": result.ratio, "enough": result.enough} for result in results]
        options.json.write_text(
            json.dumps({"machine": machine, "enough_ms": ENOUGH_MS, "rows": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
