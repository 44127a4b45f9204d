"""What the processor can do at most: arithmetic in registers, streams through memory, pages that are touched first."""

from __future__ import annotations

import functools
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from maskops import extension

STEADY = 0.05
"""Limits that differ by more than this share before and after a measurement make it worthless."""

_ROUNDS = 3_000_000
_NUMEL = 48 << 20
"""Floats of a stream: six times the largest last-level cache that these machines have."""

_REPEATS = 5
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Limits:
    """The best of some repeats, all threads together.

    Attributes:
        multiply_add: GFLOP/s in registers alone, in float32.
        read: GB/s of reading what fits no cache, in memory as torch's allocator gives it: no kernel chooses the pages
            of its inputs.
        copy: GB/s of copying it, read and written bytes together.
        touch: GB/s of writing to memory that the system has just granted, in huge pages where it has some.
        huge_read, huge_copy: The same in huge pages, for comparison.
    """

    multiply_add: float
    read: float
    copy: float
    touch: float
    huge_read: float
    huge_copy: float

    def best(self, other: Limits) -> Limits:
        """The higher of both, each."""
        return Limits(*map(max, astuple(self), astuple(other)))

    def moved(self, other: Limits) -> dict[str, float]:
        """By what share each differs from that of another measurement."""
        return {field.name: abs(getattr(self, field.name) / getattr(other, field.name) - 1.0) for field in fields(self)}


class Gauge:
    """Measures the limits again and again with the same buffers.

    Our own loops run on threads of their own, without the interpreter's lock; where torch's streams are quicker, theirs
    count.

    Args:
        threads: How many.
        numel: Floats of a stream.
        rounds: Of the loop in registers.
    """

    def __init__(self, threads: int, *, numel: int = _NUMEL, rounds: int = _ROUNDS) -> None:
        self._threads, self._rounds = threads, rounds
        self._source, self._target = torch.ones(numel), torch.zeros(numel)
        self._huge_source, self._huge_target = _in_huge_pages(numel).fill_(1.0), _in_huge_pages(numel).zero_()

    def measure(self) -> Limits:
        """All of them; half a second."""
        # Parts that begin at the alignment that streaming stores want.
        part = self._source.numel() // self._threads // 64 * 64
        size = 4 * part * self._threads

        def read(source: Tensor, thread: int) -> None:
            extension.limit_read(source[thread * part : (thread + 1) * part])

        def copy(target: Tensor, source: Tensor, thread: int) -> None:
            span = slice(thread * part, (thread + 1) * part)
            extension.limit_copy(target[span], source[span])

        whole = 4 * self._source.numel()
        operations = self._threads * extension.limit_multiply_add(1) * self._rounds
        with ThreadPoolExecutor(self._threads) as pool:
            _together(pool, self._threads, _keep_to_a_processor)

            def together(work: Callable[[int], object]) -> float:
                return min(_together(pool, self._threads, work) for _ in range(_REPEATS))

            registers = together(lambda thread: extension.limit_multiply_add(self._rounds))
            own_read = together(functools.partial(read, self._source))
            own_copy = together(functools.partial(copy, self._target, self._source))
            huge_read = together(functools.partial(read, self._huge_source))
            huge_copy = together(functools.partial(copy, self._huge_target, self._huge_source))
        return Limits(
            multiply_add=operations / registers * 1e-9,
            read=max(size / own_read, whole / _best(self._source.sum)) * 1e-9,
            copy=2 * max(size / own_copy, whole / _best(lambda: self._target.copy_(self._source))) * 1e-9,
            touch=whole / min(_touch(whole) for _ in range(3)) * 1e-9,
            huge_read=size / huge_read * 1e-9,
            huge_copy=2 * size / huge_copy * 1e-9,
        )


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


def _keep_to_a_processor(thread: int) -> None:
    """Two threads that wake on one processor stay there for longer than a measurement takes."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[thread % len(allowed)]})  # of the calling thread alone


def _best(work: Callable[[], object]) -> float:
    def seconds() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return min(seconds() for _ in range(_REPEATS))


def _touch(size: int) -> float:
    """Seconds of writing to so many fresh bytes, in huge pages where the system grants them."""
    fresh = _in_huge_pages(size // 4)
    begun = time.perf_counter()
    fresh.zero_()
    return time.perf_counter() - begun


def _in_huge_pages(numel: int) -> Tensor:
    """Fresh float32 memory, aligned to a huge page; in pages that the system has where it grants none."""
    # Private: memory that could be shared with a child takes small pages.
    memory = mmap.mmap(-1, 4 * numel + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole: Tensor = torch.frombuffer(memory, dtype=torch.float32)
    begin = -whole.data_ptr() % _HUGE_PAGE // 4
    return whole[begin : begin + numel]
