"""What the processor can do at most: arithmetic in registers, streams through memory, pages that are touched first."""

from __future__ import annotations

import functools
import mmap
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from maskops import extension

STEADY = 0.05
"""Limits that differ by more than this share before and after a measurement make it worthless."""

_ROUNDS = 3_000_000
_NUMEL = 48 << 20
"""Floats of a stream: six times the largest last-level cache that these machines have."""

_REPEATS = 16
"""Of which the best counts: with half of them two measurements in a row differ by more than `STEADY` by chance."""

_PRODUCT = 768
"""Rows, columns and depth of a matrix product that stays in the caches."""

_LEAST_SECONDS = 0.2
_HUGE_PAGE = 2 << 20

Limits = Mapping[str, float]
"""What was measured at one moment, by its name in `LIMITS`."""

LIMITS = ("multiply_add", "multiply_pairs", "read", "copy", "touch", "huge_read", "huge_copy")
"""What can be measured, each the best of some repeats, all threads together.

    multiply_add: GFLOP/s in registers alone, in float32.
    multiply_pairs: GFLOP/s of bfloat16 that adds up in float32: in registers, by instructions for vectors, or by a
        matrix product of torch, where that knows quicker ones.
    read: GB/s of reading what fits no cache, in memory as torch's allocator gives it: no kernel chooses the pages of
        its inputs. The best of several ways to read, with and without asking for memory beforehand.
    copy: GB/s of copying it, read and written bytes together.
    touch: GB/s at which the system grants memory, in huge pages where it has some: what writing to fresh memory takes
        beyond writing there again.
    huge_read, huge_copy: Reading and copying in huge pages, for comparison.
"""


def best(one: Limits, other: Limits) -> Limits:
    """The higher of both, each."""
    return {name: max(value, other[name]) for name, value in one.items()}


def moved(one: Limits, other: Limits, names: Collection[str]) -> float:
    """By what share the limits with these names differ, at most."""
    pairs = [sorted((one[name], other[name])) for name in names]
    return max((high / low - 1.0 for low, high in pairs), default=0.0)


class Gauge:
    """Measures the limits again and again with the same buffers.

    Our own loops run on threads of their own, without the interpreter's lock; where torch's streams are quicker, theirs
    count.

    Args:
        threads: How many.
        numel: Floats of a stream.
        rounds: Of the loop in registers.
        least: Seconds that each loop is repeated for: what disturbs the machine for a moment is not its limit.
    """

    def __init__(
        self, threads: int, *, numel: int = _NUMEL, rounds: int = _ROUNDS, least: float = _LEAST_SECONDS
    ) -> None:
        self._threads, self._rounds, self._least = threads, rounds, least
        self._source, self._target, self._size = torch.ones(numel), torch.zeros(numel), 4 * numel

    def measure(self, wanted: Collection[str] = LIMITS) -> Limits:
        """Measures the limits with these names."""
        with ThreadPoolExecutor(self._threads) as pool:
            _together(pool, self._threads, _keep_to_a_processor)
            return {name: getattr(self, f"_{name}")(pool) for name in sorted(wanted)}

    def _multiply_add(self, pool: ThreadPoolExecutor) -> float:
        return self._in_registers(pool, extension.limit_multiply_add)

    def _multiply_pairs(self, pool: ThreadPoolExecutor) -> float:
        own = self._in_registers(pool, extension.limit_multiply_pairs)
        left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=torch.bfloat16) for _ in range(2))
        torch.mm(left, right)
        operations = 2e-9 * _PRODUCT**3
        # Some processors make torch take seconds over this: one product says whether more are worth it.
        if operations / _alone(lambda: torch.mm(left, right)) < 0.5 * own:
            return own
        return max(own, operations / self._best(None, lambda _: torch.mm(left, right)))

    def _in_registers(self, pool: ThreadPoolExecutor, work: Callable[[int], float]) -> float:
        operations = self._threads * work(1) * self._rounds
        return operations / self._best(pool, lambda thread: work(self._rounds)) * 1e-9

    def _read(self, pool: ThreadPoolExecutor) -> float:
        return max(
            self._own_read(pool, self._source), self._size / self._best(None, lambda _: self._source.sum()) * 1e-9
        )

    def _copy(self, pool: ThreadPoolExecutor) -> float:
        theirs = 2 * self._size / self._best(None, lambda _: self._target.copy_(self._source)) * 1e-9
        return max(self._own_copy(pool, self._target, self._source), theirs)

    def _touch(self, pool: ThreadPoolExecutor) -> float:
        del pool  # the threads of torch write, as they do for whoever asks it for memory
        pairs: list[tuple[float, float]] = []
        begun = time.perf_counter()
        # The first may take what the host of a virtual machine has to find; so does nobody who runs more than once.
        while len(pairs) < 3 or time.perf_counter() - begun < self._least:
            pairs.append(_touched(self._size))
        first, again = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
        # Never nothing, whatever the clock says: it is divided by.
        return self._size / max(first - again, 0.01 * first) * 1e-9

    def _huge_read(self, pool: ThreadPoolExecutor) -> float:
        return self._own_read(pool, _in_huge_pages(self._size // 4).fill_(1.0))

    def _huge_copy(self, pool: ThreadPoolExecutor) -> float:
        source, target = (_in_huge_pages(self._size // 4).fill_(1.0) for _ in range(2))
        return self._own_copy(pool, target, source)

    def _own_read(self, pool: ThreadPoolExecutor, source: Tensor) -> float:
        spans = self._spans()

        def work(way: int) -> Callable[[int], object]:
            return lambda thread: extension.limit_read(_part(source, spans[thread]), way)

        seconds = self._best(pool, *[work(way) for way in extension.limit_read_ways()])
        return 4 * sum(map(len, spans)) / seconds * 1e-9

    def _own_copy(self, pool: ThreadPoolExecutor, target: Tensor, source: Tensor) -> float:
        spans = self._spans()
        seconds = self._best(
            pool, lambda thread: extension.limit_copy(_part(target, spans[thread]), _part(source, spans[thread]))
        )
        return 8 * sum(map(len, spans)) / seconds * 1e-9

    def _best(self, pool: ThreadPoolExecutor | None, *ways: Callable[[int], object]) -> float:
        """Seconds of the quickest repeat of the quickest way, on our threads or on those of torch."""
        found: list[float] = []
        begun = time.perf_counter()
        while len(found) < _REPEATS * len(ways) or time.perf_counter() - begun < self._least:
            for work in ways:
                found.append(
                    _alone(functools.partial(work, 0)) if pool is None else _together(pool, self._threads, work)
                )
        return min(found)

    def _spans(self) -> list[range]:
        """A part for each thread, that begins at the alignment that streaming stores want."""
        part = self._source.numel() // self._threads // 64 * 64
        return [range(thread * part, (thread + 1) * part) for thread in range(self._threads)]


def _together(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]) -> float:
    """Seconds from the first thread's beginning to the last one's end, all begun at once."""
    barrier = threading.Barrier(threads)

    def one(thread: int) -> tuple[float, float]:
        barrier.wait()
        begun = time.perf_counter()
        work(thread)
        return begun, time.perf_counter()

    times = list(pool.map(one, range(threads)))
    return max(end for _, end in times) - min(begun for begun, _ in times)


def _part(x: Tensor, places: range) -> Tensor:
    return x[places.start : places.stop]


def _keep_to_a_processor(thread: int) -> None:
    """Two threads that wake on one processor stay there for longer than a measurement takes."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[thread % len(allowed)]})  # of the calling thread alone


def _alone(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _touched(size: int) -> tuple[float, float]:
    """Seconds of writing to so many fresh bytes, in huge pages where the system grants them, and of doing so again."""
    fresh = _in_huge_pages(size // 4)
    begun = time.perf_counter()
    fresh.zero_()
    between = time.perf_counter()
    fresh.zero_()
    return between - begun, time.perf_counter() - between


def _in_huge_pages(numel: int) -> Tensor:
    """Fresh float32 memory, aligned to a huge page; in pages that the system has where it grants none."""
    # Private: memory that could be shared with a child takes small pages.
    memory = mmap.mmap(-1, 4 * numel + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole: Tensor = torch.frombuffer(memory, dtype=torch.float32)
    begin = -whole.data_ptr() % _HUGE_PAGE // 4
    return whole[begin : begin + numel]
