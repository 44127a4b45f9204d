"""A cache on the backend `cuda`, emulated where there is no device: appending, and attention over it."""

from __future__ import annotations

import pytest
import torch

import maskops
from maskops import backend as backends
from tests.served import DEVICE

NAME = "cuda"
pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def served() -> None:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "paged", "batch_index"])
def test_append(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit what the reference writes, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    batch, kv_heads, new, width, value_width = 3, 2, 5, 8, 3
    shapes = {
        "contiguous": (batch, kv_heads, 16),
        "transposed": (batch, kv_heads, 16),
        "paged": (9, kv_heads, 4),
        "batch_index": (5, kv_heads, 16),
    }
    caches, others = [], []
    for last in (width, value_width):
        cache = torch.randn(*shapes[kind], last, generator=generator).to(dtype)
        if kind == "transposed":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append(cache)
        others.append(cache.clone())
    k, v = (
        torch.randn(batch, new, kv_heads, last, generator=generator).to(dtype).transpose(1, 2)
        for last in (width, value_width)
    )
    lengths = torch.tensor([0, 11, 3])
    keywords: dict[str, torch.Tensor] = {}
    if kind == "paged":
        table = torch.tensor([[8, 1, -5, -5], [5, 7, 3, 2], [0, 4, 99, 99]], dtype=torch.int32)
        keywords["block_table"] = table
    elif kind == "batch_index":
        keywords["batch_index"] = torch.tensor([4, 0, 2])
    maskops.append_kv(*caches, k, v, lengths, backend=NAME, **keywords)
    maskops.append_kv(*others, k, v, lengths, backend="reference", **keywords)
    for cache, other in zip(caches, others, strict=True):
        assert torch.equal(cache, other)


def test_what_lies_outside_of_the_cache_is_not_written() -> None:
    """The operator itself, below the checks of values, which a device makes under maskops.validate() alone."""
    k_cache, v_cache = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    new = torch.ones(2, 1, 2, 8)
    absent = torch.empty(0, dtype=torch.int64)
    for lengths, index in (([3, -1], absent), ([0, 0], torch.tensor([1, 7]))):
        where = torch.tensor(lengths)
        torch.ops.maskops.append_kv_cuda(k_cache, v_cache, new, new, where, absent, index)
    expected = torch.zeros(2, 1, 4, 8)
    expected[0, 0, 3] = expected[1, 0, 0] = expected[1, 0, 1] = 1
    assert torch.equal(k_cache.cpu(), expected) and torch.equal(v_cache.cpu(), expected)


def test_bad_values_are_refused() -> None:
    cache = torch.zeros(1, 1, 4, 8)
    new = torch.ones(1, 1, 2, 8)
    with maskops.validate(), pytest.raises(ValueError, match="exceeds the 4 that a sequence can hold"):
        maskops.append_kv(cache, cache.clone(), new, new, torch.tensor([3]), backend=NAME)
