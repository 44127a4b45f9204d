"""CUDA graphs: forward and backward of each op are captured once and replayed on other values.

Whatever waits for the device, asks the host for a value or allocates by one fails while it is captured. On the
processor a stand-in runs the same tests: it keeps the outputs where they were, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.backend import BACKENDS
from tests import test_gpu_smoke as smoke
from tests.served import AT_HOME, DEVICE

pytestmark = pytest.mark.devices

# What is interpreted or emulated runs no stream: the stand-in would only take its time.
# A replay draws other numbers than the next call does: dropout has no place here.
WORK = [(name, backend) for name, backend in smoke.WORK if backend in AT_HOME and "dropout" not in name]


class Recorded:
    """The outputs of a function, which `replay` computes anew in place from what its inputs hold by then."""

    def __init__(self, function: Callable[[], list[Tensor]]) -> None:
        self._function = function
        if DEVICE == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, and leaves what is made once where it is
                    function()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.outputs = function()
        else:
            self.outputs = function()

    def replay(self) -> list[Tensor]:
        if DEVICE == "cuda":
            self._graph.replay()
        else:
            for old, new in zip(self.outputs, self._function(), strict=True):
                old.copy_(new)
        return self.outputs


def step(name: str, backend: str, leaves: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    """Outputs and, where there are some, gradients of one of the problems of the smoke test."""
    _, compute = smoke.PROBLEMS[name]

    def run() -> list[Tensor]:
        outputs = compute(backend, leaves)
        found = [x.detach() for x in outputs]
        if outputs[0].requires_grad:
            found += torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs])
        return found

    return run


@pytest.mark.parametrize("dtype", smoke.DTYPES.values(), ids=smoke.DTYPES)
@pytest.mark.parametrize(("name", "backend"), WORK, ids=[f"{name}-{backend}" for name, backend in WORK])
def test_replays_compute_what_calls_do(name: str, backend: str, dtype: torch.dtype) -> None:
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(f"{backend}: {reason}")
    sizes, _ = smoke.PROBLEMS[name]
    generator = torch.Generator().manual_seed(5)
    leaves = {key: torch.randn(size, generator=generator).to(dtype).requires_grad_() for key, size in sizes.items()}
    for key in ("bias", "sinks", "alibi_slopes"):
        if key in leaves:
            leaves[key] = leaves[key].detach().float().requires_grad_()
    run = step(name, backend, leaves)
    recorded = Recorded(run)
    for _ in range(2):
        with torch.no_grad():
            for x in leaves.values():
                x.copy_(torch.randn(x.shape, generator=generator))
        replayed = [x.clone() for x in recorded.replay()]
        for one, other in zip(replayed, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", smoke.DTYPES.values(), ids=smoke.DTYPES)
@pytest.mark.parametrize("backend", [backend for backend in smoke.served("attention") if backend in AT_HOME])
def test_a_graph_serves_other_lengths(backend: str, dtype: torch.dtype) -> None:
    """Lengths are tensors: a replay plans anew from what they hold by then, padded with the last offset."""
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(f"{backend}: {reason}")
    offsets = torch.tensor([0, 60, 60, 100], dtype=torch.int32)
    q, k, v = (torch.randn(120, 2, 32).to(dtype).requires_grad_() for _ in range(3))

    def run() -> list[Tensor]:
        mask = masks.documents(cu_seqlens=offsets) & masks.causal()
        out = maskops.varlen_attention(q, k, v, mask=mask.spans(120, 120, device=q.device), backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    recorded = Recorded(run)
    for lengths in ([0, 1, 2, 3], [0, 120, 120, 120], [0, 40, 80, 120]):
        offsets.copy_(torch.tensor(lengths, dtype=torch.int32))
        replayed = [x.clone() for x in recorded.replay()]
        for one, other in zip(replayed, run(), strict=True):
            assert torch.equal(one, other)
