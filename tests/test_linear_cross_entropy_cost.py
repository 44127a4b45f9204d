"""What maskops.linear_cross_entropy computes and holds at once: products of kept tokens alone, logits of a chunk."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskops.ops.linear_cross_entropy import chunks
from tests.linear_cross_entropy_oracle import (
    IGNORE,
    Problem,
)

pytestmark = pytest.mark.devices


class Recorder(TorchDispatchMode):
    """Multiplications of all matrix products, and the most bytes that were alive at once of what was allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        # Processors that multiply bfloat16 do so for the gradients of such inputs; all else is multiplied in float32.
        self.widths = {torch.bfloat16} if chunks.multiplies_bfloat16() else set()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            assert left.dtype == right.dtype and left.dtype in self.widths
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        elif func.overloadpacket is torch.ops.maskops.matmul_into:
            left, right = args[:2]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.seen:
                    self.seen.add(key)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        return results


def record(problem: Problem, incoming: Tensor | None = None, *, gradients: bool = True) -> Recorder:
    nothing = torch.empty(0)
    assert problem.bias is not None
    with Recorder() as recorder:
        results = chunks.linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.bias,
            problem.target,
            nothing,
            *(nothing if incoming is None else incoming, nothing, nothing, nothing),
            *(IGNORE, 0.0, 0.0, 0.0, 1.0, False, False, True),
            *[gradients] * 3,
        )
    del results
    return recorder


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipped_tokens_cost_no_product(on_cpu: None, dtype: torch.dtype) -> None:
    problem = Problem((400,), 64, 1000, dtype)
    kept = int((problem.target != IGNORE).sum())
    assert 0 < kept < 400
    assert record(problem, gradients=False).products == kept * 64 * 1000
    assert record(problem, torch.ones(400)).products == 3 * kept * 64 * 1000


@pytest.mark.processor
def test_tokens_without_an_incoming_gradient_cost_no_product(on_cpu: None) -> None:
    problem = Problem((40,), ignored=0.0)
    problem.hidden[1] = math.nan
    leaves = problem.leaves()
    losses = problem.score(leaves, reduction="none")
    grads = torch.autograd.grad(losses[0] + losses[2], leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert (grads[0] != 0).any(1).nonzero().flatten().tolist() == [0, 2]


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_a_chunk(on_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 64 * 1000 * 4)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 16)
    monkeypatch.setattr(chunks, "_TILE_BYTES", 100 * 64 * 4)
    problem = Problem((1000,), 64, 1000, dtype, ignored=0.0)
    chunk, tile, rows = 64 * 1000 * 4, 100 * 64 * 4, 64 * 64 * 4
    small = 40 * 1000  # values of tokens and of words
    assert record(problem, gradients=False).peak <= chunk + 2 * tile + 2 * rows + small
    grads = dtype.itemsize * 64 * (1000 + 1000)
    sums = 0 if dtype == torch.float32 else 4 * 64 * 1000
    # Products of bfloat16: the gradient of the chunk's logits, and the chunk's share of the gradient of the weight.
    narrow = chunk // 2 + 2 * 64 * 1000 if dtype == torch.bfloat16 and chunks.multiplies_bfloat16() else 0
    assert record(problem, torch.ones(1000)).peak <= chunk + 2 * tile + 3 * rows + small + grads + sums + narrow


def test_the_vocabulary_does_not_make_chunks_too_small() -> None:
    assert chunks._Rows(torch.ones(1000, dtype=torch.bool), 2**20).step == 125
    assert chunks._Rows(torch.ones(1000, dtype=torch.bool), 10).step == 1000
    assert chunks._Rows(torch.ones(0, dtype=torch.bool), 10).chunks == []
