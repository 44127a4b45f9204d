"""`python -m benchmarks.kernels`: one kernel against torch's, dense, without padding, in interleaved rounds.

The work that torch is best at: equal lengths, no mask but causality. Who wins here does not win by skipping padding.
The masked softmax, whose work the mask is, has padding: beside what people write, the quickest that torch offers
without a compiler, which adds a bias of -inf made beforehand.
THP_MEM_ALLOC_ENABLE=1 in the environment lets torch's allocator use huge pages, for both sides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import masks
from maskops.cli.bench.machine import describe
from maskops.cli.bench.others import Others
from maskops.cli.bench.report import aligned
from maskops.cli.bench.timing import Timing, interleave

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Contest:
    """The same computation by torch and by maskops.

    Attributes:
        name: Shape and kind of the work.
        inputs: Leaves; the results are differentiated with respect to them.
        torch, maskops: From the inputs to the result.
        whole: Times the backward pass only together with the forward pass, which may have done a part of it.
    """

    name: str
    inputs: tuple[Tensor, ...]
    torch: Callable[..., Tensor]
    maskops: Callable[..., Tensor]
    whole: bool = False


def contests() -> Iterator[Contest]:
    """Attention B8 H12 S512 D64, softmax of its scores, cross-entropy of 4096 rows over 32,000 words, in float32.

    Also the cross-entropy of a linear layer of 768 inputs, 512 rows, where all count and where a quarter does. Against
    rows that are gathered first: torch alone does no better.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, 12, 512, 64, generator=generator, requires_grad=True) for _ in range(3))
    causal = masks.causal().spans(512, 512, batch=8)
    yield Contest("attention, dense", (q, k, v), F.scaled_dot_product_attention, maskops.attention)
    yield Contest(
        "attention, causal",
        (q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: maskops.attention(q, k, v, causal),
    )
    lengths = torch.linspace(100, 512, 8).long()
    visible = (torch.arange(512) < lengths[:, None])[:, None, None]
    hidden, bias = ~visible, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    scores = torch.randn(8, 12, 512, 512, generator=generator, requires_grad=True)
    for name, theirs in (
        ("masked softmax, masked_fill", lambda scores: torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)),
        ("masked softmax, bias", lambda scores: torch.softmax(scores + bias, -1)),
    ):
        yield Contest(name, (scores,), theirs, lambda scores: maskops.masked_softmax(scores, visible))
    yield Contest(
        "masked softmax over queries",
        (scores,),
        lambda scores: torch.softmax(scores.masked_fill(hidden.transpose(2, 3), -torch.inf), -2),
        lambda scores: maskops.masked_softmax(scores, visible.transpose(2, 3), -2),
    )
    logits = torch.randn(4096, 32000, generator=generator, requires_grad=True)
    target = torch.randint(0, 32000, (4096,), generator=generator)
    yield Contest(
        "cross-entropy",
        (logits,),
        lambda logits: F.cross_entropy(logits, target),
        lambda logits: maskops.cross_entropy(logits, target),
    )
    hidden = torch.randn(512, 768, generator=generator, requires_grad=True)
    weight = torch.randn(32000, 768, generator=generator).mul_(768**-0.5).requires_grad_()
    labels = target[:512]
    kept = torch.rand(512, generator=generator) < 0.25
    masked = labels.masked_fill(~kept, -100)
    yield Contest(
        "linear and cross-entropy",
        (hidden, weight),
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), labels),
        lambda hidden, weight: maskops.linear_cross_entropy(hidden, weight, labels),
        whole=True,
    )
    yield Contest(
        "linear and cross-entropy, 75 % ignored",
        (hidden, weight),
        lambda hidden, weight: F.cross_entropy(F.linear(hidden[kept], weight), labels[kept]),
        lambda hidden, weight: maskops.linear_cross_entropy(hidden, weight, masked),
        whole=True,
    )


def forward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Runs the function without a graph."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Runs the backward pass alone, over a graph that is made once."""
    result = function(*inputs)
    upstream = upstream_of(result)
    return lambda: torch.autograd.grad(result, inputs, upstream, retain_graph=True)


def upstream_of(result: Tensor) -> Tensor:
    """A gradient that differs from element to element: what a softmax passes on of a constant is only its rounding."""
    return torch.rand(result.shape, generator=torch.Generator().manual_seed(1))


def both(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Runs the forward and the backward pass."""
    return lambda: torch.autograd.grad(function(*inputs), inputs)


def difference(contest: Contest) -> float:
    """Largest difference of results and gradients, relative to the largest value of each."""
    pairs = []
    for function in (contest.torch, contest.maskops):
        result = function(*contest.inputs)
        gradients = torch.autograd.grad(result, contest.inputs, upstream_of(result))
        pairs.append((result.detach(), *gradients))
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in zip(*pairs, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Prints the ratios of the medians' rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each pair (default: 6)")
    parser.add_argument("--only", default="", metavar="TEXT", help="pairs whose name contains the text")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    others = Others()
    rows = [["", "torch ms", "±", "maskops ms", "±", "ratio"]]
    results = []
    for contest in contests():
        if options.only not in contest.name:
            continue
        # Equal results first: what is timed is the same computation.
        apart = difference(contest)
        for mode, prepare in (
            ("forward", forward),
            ("forward and backward", both) if contest.whole else ("backward", backward),
        ):
            runners = [prepare(function, contest.inputs) for function in (contest.torch, contest.maskops)]
            theirs, ours = interleave(runners, CPU, budget=options.seconds, min_rounds=5)
            rows.append(_row(f"{contest.name}, {mode}", theirs, ours))
            results.append(
                {
                    "name": f"{contest.name}, {mode}",
                    "torch": theirs.seconds,
                    "maskops": ours.seconds,
                    "ratio": ours.speedup_over(theirs),
                    "difference": apart,
                }
            )
    host = describe(CPU, torch.float32)
    print(f"{host.device}, {host.threads} threads, {host.instruction_set}; torch {host.torch}, maskops {host.commit}")
    print(f"other programs kept {others.taken():.1f} processors busy (trust speeds only near 0)")
    print(f"huge pages {'on' if host.huge_pages else 'off'}; largest relative difference of any result and gradient:")
    print(f"{max(float(result['difference']) for result in results):.1e}")  # type: ignore[arg-type]
    print("\n".join(aligned(rows, indent="")))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": host.__dict__ | {"peaks": None}, "rows": results}, indent=1) + "\n"
        )


def _row(name: str, theirs: Timing, ours: Timing) -> list[str]:
    cells = [f"{theirs.median * 1e3:.2f}", f"{theirs.spread:.0%}", f"{ours.median * 1e3:.2f}", f"{ours.spread:.0%}"]
    return [name, *cells, f"{ours.speedup_over(theirs):.2f}x"]


if __name__ == "__main__":
    main()
