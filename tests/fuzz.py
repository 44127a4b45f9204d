"""`python -m tests.fuzz [NAME ...] --seconds 900`: the properties of tests/test_fuzz_*.py for as long as one likes.

The suite tries a few cases of each, the same every time. This tries new ones until the time is over, counts them, and
prints the smallest case that breaks a property, which then becomes a case of the suite.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
LENGTHS = (0, 1, 2, 3, 5, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129)
"""Ends of vectors (W and W + 1 of every instruction set), of blocks of keys, and of tiles."""

lengths = st.sampled_from(LENGTHS) | st.integers(0, 140)
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


@dataclass(frozen=True)
class Property:
    """What holds for every problem of a strategy: ``check`` raises where it does not."""

    problems: SearchStrategy[Any]
    check: Callable[[Any], None]

    def test(self, examples: int) -> Callable[[], None]:
        """A test of the suite: the same few problems every time, nothing kept on disk."""

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=SLOW_IS_FINE,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
        )
        @given(self.problems)
        def run(problem: Any) -> None:
            self.check(problem)

        return run

    def search(self, seconds: float, first_seed: int) -> int:
        """Tries new problems until the time is over; returns how many."""
        cases, begin = 0, time.monotonic()

        def count(problem: Any) -> None:
            nonlocal cases
            cases += 1
            self.check(problem)

        while time.monotonic() - begin < seconds:
            one_round = settings(max_examples=200, deadline=None, database=None, suppress_health_check=SLOW_IS_FINE)
            seed(first_seed + cases)(one_round(given(self.problems)(count)))()
        return cases


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values, differentiably, at other places in memory, with NaN between them. The last dimension has to stay
    contiguous except for "last", which the public functions copy.
    """
    if how == "dense" or x.dim() < 3:
        return x
    if how == "transposed":  # (B, S, H, D) seen as (B, H, S, D)
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.nn.functional.pad(x, (3, 2, 1, 1), value=float("nan"))  # "sliced"
    return wide[..., 1 : x.shape[-2] + 1, 3 : x.shape[-1] + 3]


STRIDES = ("dense", "transposed", "last", "sliced")


def main() -> int:
    names = sorted(path.stem.removeprefix("test_fuzz_") for path in Path(__file__).parent.glob("test_fuzz_*.py"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(names)}; all by default")
    parser.add_argument("--seconds", type=float, default=900.0, help="for each property")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names or names:
        for title, found in importlib.import_module(f"tests.test_fuzz_{name}").PROPERTIES.items():
            cases = found.search(options.seconds, options.seed)
            print(f"{title}: {cases} cases, seed {options.seed}: nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
