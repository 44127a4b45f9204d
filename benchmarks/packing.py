"""`python -m benchmarks.packing`: fill and stragglers of every packing strategy on real lengths, seeds 0 to 4.

The documents are those of benchmarks/padding.py: docstrings of the standard library and of torch. Beside them stand
lengths of other shapes, drawn from a seed.

Predicted before "balanced" was written: convoys of neighbours in a sorted buffer give a straggler ratio of about 1.04,
if rare long documents wait for others of their kind, and about 1.2 if they may not, because then one step in five has a
giant alone; single short documents fill bins to 0.999, so that the steps are the fewest that hold the tokens. Found:
with waiting 1.01 to 1.02, and the fewest steps with every seed. (Where a bin for every rank in the last step would push
the fill below 0.99, up to a quarter of the ranks have none in it; `padding_waste` counts those as padding.)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import torch

from benchmarks.padding import lengths_of_docstrings
from maskops.cli.bench.report import aligned
from maskops.data import pack
from maskops.data.packers import Strategy

DOCUMENTS = 20_000
CAPACITY = 2048
RANKS = 8
SEEDS = range(5)

SHAPES: dict[str, Callable[[random.Random], int]] = {
    "log-normal, sigma 1.2": lambda chance: int(chance.lognormvariate(5, 1.2)) + 1,
    "log-normal, sigma 2": lambda chance: int(chance.lognormvariate(4, 2)) + 1,
    "Pareto, exponent 1": lambda chance: int(10 * chance.paretovariate(1)),
    "uniform to a quarter": lambda chance: chance.randint(1, CAPACITY // 4),
    "uniform to the capacity": lambda chance: chance.randint(1, CAPACITY),
    "a quarter to a half": lambda chance: chance.randint(CAPACITY // 4, CAPACITY // 2),
    "equal, 16 in a bin": lambda chance: CAPACITY // 16,
    "long and short": lambda chance: chance.choice((20, 2000)) + chance.randint(0, 40),
}


def cut(lengths: list[int]) -> list[int]:
    """Lengths of documents that were truncated to the capacity."""
    return [min(length, CAPACITY) for length in lengths]


def measure(lengths: list[int], strategy: Strategy, seed: int, ranks: int = RANKS) -> dict[str, Any]:
    """The report of one packing, with the processor's time, which other programs disturb less than the clock."""
    started = time.process_time()
    packing = pack(lengths, CAPACITY, strategy, ranks=ranks, seed=seed)
    seconds = time.process_time() - started
    least = math.ceil(sum(lengths) / CAPACITY / ranks)
    return {**packing.report().to_dict(), "seed": seed, "processor_seconds": seconds, "least_steps": least}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each packing."""
    lines = [["lengths", "strategy", "seed", "steps", "least", "fill", "straggler", "all FLOPs", "rho", "most", "s"]]
    lines += [
        [
            row["lengths"],
            row["strategy"],
            str(row["seed"]),
            str(row["steps"]),
            str(row["least_steps"]),
            f"{row['fill']:.4f}",
            f"{row['attention_straggler']:.3f}",
            f"{row['flops_straggler']:.3f}",
            f"{row['length_correlation']:+.3f}",
            str(row["max_segments"]),
            f"{row['processor_seconds']:.2f}",
        ]
        for row in rows
    ]
    return "\n".join(aligned(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="name or folder for transformers' AutoTokenizer")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args()
    found, tokenizer = lengths_of_docstrings(arguments.tokenizer)
    rows = []
    for seed in SEEDS:
        # Another sample of the documents for each seed, and another order of them.
        sample = random.Random(seed).sample(cut(found), min(DOCUMENTS, len(found)))
        for strategy in get_args(Strategy):
            rows.append({"lengths": "docstrings", **measure(sample, strategy, seed)})
    for name, draw in SHAPES.items():
        chance = random.Random(0)
        drawn = cut([draw(chance) for _ in range(DOCUMENTS)])
        for strategy in ("balanced", "best_fit_decreasing"):
            rows.append({"lengths": name, **measure(drawn, cast(Strategy, strategy), 0)})
    print(table(rows))
    if arguments.json:
        about = {
            "tokenizer": tokenizer,
            "documents": len(found),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "capacity": CAPACITY,
            "ranks": RANKS,
        }
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
