"""What the processor can do at most: arithmetic in registers, streams through memory, pages that are touched first."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from maskops import extension

STEADY = 0.05
"""Limits that differ by more than this share before and after a measurement make it worthless."""

_ROUNDS = 3_000_000
_NUMEL = 48 << 20
"""Floats of a stream: six times the largest last-level cache that these machines have."""

_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """The best of some repeats, all threads together.

    Attributes:
        multiply_add: GFLOP/s in registers alone, in float32.
        read: GB/s of reading what fits no cache.
        copy: GB/s of copying it, read and written bytes together.
        touch: GB/s of writing to memory that the system has just granted, in huge pages where it has some.
    """

    multiply_add: float
    read: float
    copy: float
    touch: float

    def best(self, other: Limits) -> Limits:
        """The higher of both, each."""
        return Limits(*map(max, astuple(self), astuple(other)))

    def moved(self, other: Limits) -> dict[str, float]:
        """By what share each differs from that of another measurement."""
        names = ("multiply_add", "read", "copy", "touch")
        return {name: abs(getattr(self, name) / getattr(other, name) - 1.0) for name in names}


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
        self._source = torch.ones(numel)
        self._target = torch.zeros(numel)

    def measure(self) -> Limits:
        """All four; a fifth of a second."""
        # Parts that begin at the alignment that streaming stores want.
        part = self._source.numel() // self._threads // 64 * 64
        size = 4 * part * self._threads
        parts = [
            tuple(x[thread * part : (thread + 1) * part] for x in (self._target, self._source))
            for thread in range(self._threads)
        ]
        whole = 4 * self._source.numel()
        operations = self._threads * extension.limit_multiply_add(1) * self._rounds
        with ThreadPoolExecutor(self._threads) as pool:

            def together(work: Callable[[int], object]) -> float:
                return min(_together(pool, self._threads, work) for _ in range(_REPEATS))

            registers = together(lambda thread: extension.limit_multiply_add(self._rounds))
            read = together(lambda thread: extension.limit_read(parts[thread][1]))
            copy = together(lambda thread: extension.limit_copy(*parts[thread]))
        return Limits(
            multiply_add=operations / registers * 1e-9,
            read=max(size / read, whole / _best(self._source.sum)) * 1e-9,
            copy=2 * max(size / copy, whole / _best(lambda: self._target.copy_(self._source))) * 1e-9,
            touch=whole / min(_touch(whole) for _ in range(2)) * 1e-9,
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


def _best(work: Callable[[], object]) -> float:
    def seconds() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return min(seconds() for _ in range(_REPEATS))


def _touch(size: int) -> float:
    """Seconds of writing to so many fresh bytes, in huge pages where the system grants them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    fresh: Tensor = torch.frombuffer(memory, dtype=torch.float32)
    begun = time.perf_counter()
    fresh.zero_()
    return time.perf_counter() - begun
