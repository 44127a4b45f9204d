"""`python -m benchmarks.decode`: one new token a sequence over a cache, against what torch offers, interleaved.

Decoding is bound by reading the cache, so the figure beside the time is the cache's bytes per second; the limit of
reading is measured in the same process. Full caches, so that torch has no padding to compute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.cli.bench.cpu.limits import Gauge
from maskops.cli.bench.machine import describe
from maskops.cli.bench.others import Others
from maskops.cli.bench.report import aligned
from maskops.cli.bench.timing import interleave

CPU = torch.device("cpu")


class Shape(NamedTuple):
    """A cache and the heads that read it."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int


SHAPES = (
    Shape(1, 32, 8, 128, 4096),
    Shape(8, 32, 8, 128, 4096),
    Shape(1, 32, 8, 64, 32768),
    Shape(1, 12, 12, 64, 16384),
    Shape(8, 12, 12, 64, 4096),
)


def problem(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (shape.batch, shape.heads, 1, shape.head_dim),
        *[(shape.batch, shape.kv_heads, shape.keys, shape.head_dim)] * 2,
    )
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v


def by_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched products, the heads of a group as rows."""
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    weights = torch.softmax(rows @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ v).flatten(1, 2).unsqueeze(2)


def variants(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What torch offers, and last maskops on a contiguous and on a paged cache."""
    group = q.shape[1] // k.shape[1]
    # One query each and no mask: the heads of a group are as good as queries.
    rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
    yield "SDPA", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
    if group > 1:
        yield "SDPA, heads as rows", lambda: F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)
    yield "two matrix products", lambda: by_matrices(q, k, v)
    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32)
    yield "maskops", lambda: maskops.decode_attention(q, k, v, lengths, backend="cpu")
    pages = [x.unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v)]
    table = torch.arange(pages[0].shape[0], dtype=torch.int32).view(q.shape[0], -1)
    yield (
        "maskops, pages of 16",
        lambda: maskops.decode_attention(q, pages[0], pages[1], lengths, block_table=table, backend="cpu"),
    )


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Largest difference to float64, of the first sequence."""
    oracle = by_matrices(*(x[:1].double() for x in (q, k, v)))
    return float((out[:1].double() - oracle).abs().max())


def main(arguments: list[str] | None = None) -> None:
    """Prints a table for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape (default: 3)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    others = Others()
    gauge = Gauge(torch.get_num_threads())
    limit = gauge.measure({"read"})["read"]
    results = []
    rows = [["", "", "ms", "±", "GB/s", "error", "maskops is faster"]]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            q, k, v = problem(shape, dtype)
            named = list(variants(q, k, v))
            errors = [error(runner(), q, k, v) for _, runner in named]
            timings = interleave([runner for _, runner in named], CPU, budget=options.seconds, min_rounds=5)
            ours = timings[[name for name, _ in named].index("maskops")]
            size = 2 * k.numel() * k.element_size()
            title = (
                f"{str(dtype).removeprefix('torch.')}, batch {shape.batch}, heads {shape.heads}/{shape.kv_heads} of "
                f"{shape.head_dim}, {shape.keys} keys"
            )
            for (name, _), timing, apart in zip(named, timings, errors, strict=True):
                ratio = ours.speedup_over(timing)
                rows.append(
                    [
                        title,
                        name,
                        f"{timing.median * 1e3:.2f}",
                        f"{timing.spread:.0%}",
                        f"{size / timing.median / 1e9:.1f}",
                        f"{apart:.1e}",
                        "" if name == "maskops" else f"{ratio:.2f}x",
                    ]
                )
                title = ""
                results.append(
                    {
                        "dtype": str(dtype),
                        "shape": shape._asdict(),
                        "variant": name,
                        "seconds": timing.seconds,
                        "bytes": size,
                        "error": apart,
                    }
                )
    host = describe(CPU, torch.float32)
    print(f"{host.device}, {host.threads} threads, {host.instruction_set}; torch {host.torch}, maskops {host.commit}")
    limits = [limit, gauge.measure({"read"})["read"]]
    print(f"limit of reading: {limits[0]:.1f} GB/s before, {limits[1]:.1f} GB/s after")
    taken = others.taken()
    print(f"other programs kept {taken:.1f} processors busy (trust speeds only near 0)")
    print("\n".join(aligned(rows, indent="")))
    if options.json is not None:
        options.json.write_text(
            json.dumps(
                {
                    "machine": host.__dict__ | {"peaks": host.peaks.__dict__, "load": taken, "limit_read": limits},
                    "rows": results,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
