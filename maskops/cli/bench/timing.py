"""Interleaved timing: every round runs every variant once, so that a slow minute hits all of them alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Runner = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry a round.

    Attributes:
        seconds: The rounds, in order: entry `i` of two timings of one run was taken at about the same moment.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median: 0.03 reads as plus or minus 3 %."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def speedup_over(self, baseline: "Timing") -> float:
        """Median over the rounds of how many times faster this is than `baseline` in the same round."""
        return statistics.median(base / own for base, own in zip(baseline.seconds, self.seconds, strict=True))


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the cyclic garbage collector from running in the middle of something."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what was asked of it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(runner: Runner, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    runner()
    synchronise(device)
    return time.perf_counter() - started


def interleave(
    runners: Sequence[Runner],
    device: torch.device,
    *,
    budget: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
    warm_up: bool = True,
    on_round: Callable[[float], None] | None = None,
) -> list[Timing]:
    """Times the runners against one another.

    Args:
        runners: What to time.
        device: The device that does the work.
        budget: Stop after the round that passes this many seconds, warm-up included ...
        min_rounds: ... but never before this many rounds,
        max_rounds: nor after more than this many.
        warm_up: Run everything once first, untimed.
        on_round: Called after each round with the seconds it took.

    Returns:
        One `Timing` a runner, in order, all of the same number of rounds.
    """
    started = time.perf_counter()
    if warm_up:
        for runner in runners:
            once(runner, device)
    seconds: list[list[float]] = [[] for _ in runners]
    with without_collector():
        for number in range(max_rounds):
            if number >= min_rounds and time.perf_counter() - started > budget:
                break
            begun = time.perf_counter()
            # In another order each round: nobody always inherits the cache and the heap of the same neighbour.
            order = random.Random(number).sample(range(len(runners)), len(runners))
            for chosen in order:
                seconds[chosen].append(once(runners[chosen], device))
            if on_round is not None:
                on_round(time.perf_counter() - begun)
    return [Timing(tuple(entry)) for entry in seconds]
