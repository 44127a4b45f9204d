"""A cache on the backend `cuda`, emulated where there is no device: appending, and attention over it."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch

import maskops
from maskops import backend as backends
from maskops import extension, masks
from tests.served import DEVICE
from tests.test_decode import (
    FEATURES,
    assert_within_budget,
    attend,
    check_feature,
    check_shapes,
    make_cache,
    queries,
)
from tools import emulation

NAME = "cuda"
pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def served() -> None:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, paged: bool) -> None:
    check_feature(NAME, name, paged, (3,) if paged else (1,))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "head_dim", "value_dim", "dtype"),
    [
        (8, 1, 1, 128, 64, torch.bfloat16),
        (6, 2, 1, 80, 24, torch.float16),
        (10, 2, 2, 33, 7, torch.float32),
        (5, 1, 1, 70, 300, torch.float32),
        (40, 1, 1, 8, 136, torch.bfloat16),
        (4, 2, 16, 1, 1, torch.float32),
        (4, 2, 17, 16, 16, torch.bfloat16),
    ],
)
def test_shapes(heads: int, kv_heads: int, q_len: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Groups of every number of rows, more rows and more columns than a block has, prompts, odd pages."""
    check_shapes(NAME, heads, kv_heads, q_len, head_dim, value_dim, dtype)


EDGES = [0, 1, 63, 64, 65, 256, 257, 640, 700, 1036]


@pytest.mark.parametrize("name", ["plain", "first tokens and window", "sinks", "everything"])
def test_splits_of_the_keys(name: str) -> None:
    """Four shares of the keys of every sequence, some of nothing, with ends anywhere in tiles and in odd pages."""
    features = FEATURES[name]
    features = features._replace(leftpad=[0, 0, 5, 64, 1, 256, 200, 639, 0, 3] if features.leftpad else None)
    cache = make_cache(EDGES, 1036, page_size=7, head_dim=8, value_dim=8, leftpad=features.leftpad)
    q = queries(len(EDGES), 6, 2, 8)
    results = attend(NAME, cache, q, features, paged=True)
    assert_within_budget(results, cache, q, features, torch.float32)


def test_the_same_bits_in_any_company() -> None:
    """Neither pages nor the rest of the batch nor its order change a bit, whatever splits there are."""
    cache = make_cache(EDGES, 1036, page_size=7, head_dim=8, value_dim=8)
    q, lengths = queries(len(EDGES), 4, 1, 8), cache.lengths
    keywords: dict[str, Any] = {"return_lse": True, "backend": NAME}
    whole = maskops.decode_attention(q, *cache.contiguous(), lengths, **keywords)
    pages = maskops.decode_attention(q, *cache.paged(), lengths, block_table=cache.block_table, **keywords)
    chosen = torch.tensor([8, 3, 9, 0, 5])
    alone = maskops.decode_attention(q[chosen], *cache.contiguous(), lengths[chosen], batch_index=chosen, **keywords)
    for x, y, z in zip(whole, pages, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x[chosen], z)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "splits"),
    [
        pytest.param(4, 2, 1, 32, id="few heads"),
        pytest.param(64, 64, 1, 8, id="blocks enough without"),
        pytest.param(128, 2, 8, 4, id="many rows"),
    ],
)
def test_parts_of_the_result_are_bounded(heads: int, kv_heads: int, q_len: int, splits: int) -> None:
    """However long the cache: a sequence has no more splits than fill a device, nor parts of more than 4096 rows."""
    if not extension.cuda_is_emulated():
        pytest.skip("the emulation of CUDA is not loaded")
    largest = ctypes.CDLL(str(emulation.library())).maskops_emulated_largest_allocation
    largest.restype = ctypes.c_int64
    k, v = torch.zeros(2, kv_heads, 8192, 4), torch.zeros(2, kv_heads, 8192, 16)
    q, lengths = queries(2, heads, q_len, 4), torch.tensor([3, 70])
    largest()
    maskops.decode_attention(q, k, v, lengths, backend=NAME)
    assert largest() == splits * 2 * heads * q_len * 16


def test_masks_with_holes() -> None:
    """Keys that no row sees are not read, wherever they lie."""
    cache = make_cache([437, 12], 600)
    q = queries(2, 4, 3)
    allowed = torch.rand(2, 4, 3, 600, generator=torch.Generator().manual_seed(0)) < 0.1
    allowed[0, :, 1] = False
    allowed[..., 100:300] = False
    mask = masks.dense(allowed)
    k, v = (x.nan_to_num() for x in cache.contiguous())
    wanted = maskops.attention(q, k, v, masks.key_padding(cache.lengths) & mask, return_lse=True, backend="reference")
    unseen = ~allowed.flatten(1, 2).any(1)[:, None, :, None]
    k, v = (torch.where(unseen, math.nan, x) for x in cache.contiguous())
    found = maskops.decode_attention(q, k, v, cache.lengths, mask, return_lse=True, backend=NAME)
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_those_who_see_it(value: float) -> None:
    """A key or a value of the newest token reaches no query before it, nor another sequence."""
    cache = make_cache([70, 70], 70, head_dim=8, value_dim=8)
    q, lengths = queries(2, 2, 3, 8), cache.lengths
    expected = maskops.decode_attention(q, *cache.contiguous(), lengths, masks.causal(), backend=NAME)
    for poisoned in (0, 1):
        caches = [x.clone() for x in cache.contiguous()]
        caches[poisoned][0, :, 69, 3] = value
        out = maskops.decode_attention(q, *caches, lengths, masks.causal(), backend=NAME)
        assert not out[0, :, 2].isfinite().all()
        assert torch.equal(out[0, :, :2], expected[0, :, :2]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "capacity", "value_dim"),
    [(0, 2, 1, 1, 8, 4), (2, 0, 0, 1, 8, 4), (2, 2, 1, 3, 0, 4), (2, 2, 1, 1, 600, 0)],
)
def test_nothing_to_do(batch: int, heads: int, kv_heads: int, q_len: int, capacity: int, value_dim: int) -> None:
    q = torch.randn(batch, heads, q_len, 4)
    k, v = torch.zeros(batch, kv_heads, capacity, 4), torch.zeros(batch, kv_heads, capacity, value_dim)
    lengths = torch.full((batch,), capacity)
    out, lse = maskops.decode_attention(q, k, v, lengths, masks.causal(), return_lse=True, backend=NAME)
    assert out.shape == (batch, heads, q_len, value_dim) and (out == 0).all()
    expected = torch.full((batch, heads, q_len), math.log(capacity) if capacity else -math.inf)
    torch.testing.assert_close(lse, expected)


def test_any_integers_stay_inside_the_cache() -> None:
    """On a device nobody looks at them before the kernel does."""
    absent = torch.empty(0)
    whole = torch.full((6, 1, 4, 8), math.nan)
    cache = whole[2:4]
    cache.fill_(1.0)
    table = torch.tensor([[0, -1, 5], [1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    for lengths in (torch.tensor([12, -5]), torch.tensor([2**40, 2**62]), torch.tensor([-(2**63), 7])):
        for q_len in (1, 20):
            q = torch.randn(2, 1, q_len, 8)
            out, _ = torch.ops.maskops.decode_forward_cuda(
                q, cache, cache, lengths, torch.tensor([-3, 2**50]), table, *(absent,) * 8, 1.0, 0.0
            )
            assert out.isfinite().all()


# ---- appending -------------------------------------------------------------------------------------------------------


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
