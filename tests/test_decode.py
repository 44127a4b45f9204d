"""The key/value cache: appending in place, and attention over it, against plain attention over the gathered cache."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import maskops
from maskops import masks
from maskops.backend import BACKENDS
from maskops.testing import error_budget, plain_attention
from tests.served import AT_HOME

pytestmark = pytest.mark.devices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _serving() -> list[str]:
    """Backends at home on this device that declare the ops and run here; test_triton_decode.py is for the others."""
    return [
        name for name in AT_HOME if "decode_attention" in BACKENDS[name].ops and maskops.backends()[name] == "available"
    ]


@pytest.fixture(params=_serving())
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Cache(NamedTuple):
    """The same keys and values, contiguous and paged; NaN wherever no sequence has a key."""

    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    lengths: Tensor

    def contiguous(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def paged(self) -> tuple[Tensor, Tensor]:
        return self.k_pages, self.v_pages


def make_cache(
    lengths: list[int],
    capacity: int,
    *,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int = 16,
    page_size: int = 8,
    dtype: torch.dtype = torch.float32,
    leftpad: list[int] | None = None,
) -> Cache:
    """A cache filled to ``lengths``; pages lie in an arbitrary order, entries behind the last used one are no page."""
    generator = torch.Generator().manual_seed(5)
    batch = len(lengths)
    pages = -(-capacity // page_size)
    keys = torch.arange(capacity)
    filled = torch.tensor(lengths).reshape(batch)
    begin = torch.tensor(leftpad if leftpad is not None else [0] * batch)
    valid = ((keys >= begin[:, None]) & (keys < filled[:, None]))[:, None, :, None]
    contiguous, paged = [], []
    order = torch.randperm(batch * pages, generator=generator)
    for width in (head_dim, value_dim):
        x = torch.randn(batch, kv_heads, capacity, width, generator=generator).to(dtype)
        x = torch.where(valid, x, math.nan)
        contiguous.append(x)
        padded = torch.full((batch, kv_heads, pages * page_size, width), math.nan, dtype=dtype)
        padded[:, :, :capacity] = x
        chunks = padded.view(batch, kv_heads, pages, page_size, width).transpose(1, 2).flatten(0, 1)
        pool = torch.full((batch * pages, kv_heads, page_size, width), math.nan, dtype=dtype)
        pool[order] = chunks
        paged.append(pool)
    table = order.view(batch, pages).to(torch.int32)
    in_use = torch.arange(pages) < -(-filled[:, None] // page_size)
    table = torch.where(in_use, table, torch.tensor([-1, 2**31 - 1] * pages, dtype=torch.int32)[:pages])
    return Cache(*contiguous, *paged, table, filled.to(torch.int32))


def queries(batch: int, heads: int, q_len: int, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, q_len, head_dim, generator=torch.Generator().manual_seed(6)).to(dtype)


class Features(NamedTuple):
    mask: masks.Mask | None = None
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: bool = False
    sinks: bool = False
    leftpad: list[int] | None = None

    def keywords(self, heads: int) -> dict[str, Any]:
        chosen: dict[str, Any] = {"softcap": self.softcap, "softmax_scale": self.softmax_scale}
        generator = torch.Generator().manual_seed(7)
        if self.alibi:
            chosen["alibi_slopes"] = torch.rand(heads, generator=generator)
        if self.sinks:
            chosen["sinks"] = torch.randn(heads, generator=generator)
        return chosen


LENGTHS = [37, 0, 1, 50, 24]
FEATURES = {
    "plain": Features(),
    "causal": Features(masks.causal()),
    "window": Features(masks.causal() & masks.sliding_window(6, 0)),
    "first tokens and window": Features(masks.causal() & (masks.sliding_window(4, 0) | masks.prefix(2))),
    "chunked": Features(masks.causal() & masks.chunked(16)),
    "softcap": Features(masks.causal(), softcap=1.5, softmax_scale=0.7),
    "alibi": Features(masks.causal(), alibi=True),
    "sinks": Features(masks.causal(), sinks=True),
    "leftpad": Features(masks.causal(), leftpad=[3, 0, 1, 20, 30]),
    "leftpad and prefix": Features(masks.sliding_window(4, 0) | masks.prefix(2), leftpad=[3, 0, 0, 20, 7]),
    "everything": Features(masks.causal() & masks.sliding_window(20, 0), 2.0, 0.5, True, True, [1, 0, 0, 40, 0]),
}


def oracle(cache: Cache, q: Tensor, features: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain attention in ``dtype``, sequence by sequence, over the keys that the sequence has and nothing else."""
    outs, lses = [], []
    heads, q_len = q.shape[1], q.shape[2]
    keywords = features.keywords(heads)
    for b, length in enumerate(cache.lengths.tolist()):
        first = min(features.leftpad[b], length) if features.leftpad is not None else 0
        n = length - first
        k, v = (x[b : b + 1, :, first:length].to(dtype) for x in (cache.k, cache.v))
        allowed = (masks.full() if features.mask is None else features.mask).to_dense(q_len, n)
        additive = None
        if features.alibi:
            distance = (torch.arange(n - q_len, n)[:, None] - torch.arange(n)).abs()
            additive = -keywords["alibi_slopes"].to(dtype)[:, None, None] * distance
        scale = features.softmax_scale if features.softmax_scale is not None else q.shape[3] ** -0.5
        out, lse = plain_attention(
            q[b : b + 1].to(dtype),
            k,
            v,
            allowed.expand(1, 1, q_len, n),
            softmax_scale=scale,
            softcap=features.softcap,
            additive=additive,
            sinks=keywords.get("sinks"),
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def attend(
    backend: str, cache: Cache, q: Tensor, features: Features, paged: bool, **more: Any
) -> tuple[Tensor, Tensor]:
    keywords = features.keywords(q.shape[1]) | more
    if features.leftpad is not None:
        keywords["leftpad"] = torch.tensor(features.leftpad)
    if paged:
        keywords["block_table"] = cache.block_table
    keys, values = cache.paged() if paged else cache.contiguous()
    return maskops.decode_attention(
        q, keys, values, cache.lengths, features.mask, return_lse=True, backend=backend, **keywords
    )


def assert_within_budget(
    actual: tuple[Tensor, Tensor], cache: Cache, q: Tensor, features: Features, dtype: torch.dtype
) -> None:
    exact, plain = (oracle(cache, q, features, x) for x in (torch.float64, dtype))
    for name, x, ordinary, expected in zip(("out", "lse"), actual, plain, exact, strict=True):
        budget = error_budget(x, ordinary, expected, dtype)
        assert budget.passed, (name, budget)


def check_feature(backend: str, name: str, paged: bool, q_lens: tuple[int, ...]) -> None:
    """One feature over sequences of every kind of length, against the oracle; those that see nothing are 0."""
    features = FEATURES[name]
    cache = make_cache(LENGTHS, 50, leftpad=features.leftpad)
    for q_len in q_lens:
        q = queries(len(LENGTHS), 4, q_len)
        out, lse = attend(backend, cache, q, features, paged)
        assert_within_budget((out, lse), cache, q, features, torch.float32)
        empty = [b for b, n in enumerate(LENGTHS) if n <= (features.leftpad[b] if features.leftpad else 0)]
        assert (out[empty] == 0).all() and (lse[empty] == -math.inf).all()


def check_shapes(
    backend: str, heads: int, kv_heads: int, q_len: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """Sizes against the oracle, and pages against a contiguous cache, bit for bit."""
    cache = make_cache([29, 3], 35, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, page_size=5, dtype=dtype)
    q = queries(2, heads, q_len, head_dim, dtype)
    features = FEATURES["causal"]
    results = attend(backend, cache, q, features, paged=True)
    assert_within_budget(results, cache, q, features, dtype)
    assert results[0].dtype == dtype and results[1].dtype == torch.float32
    assert torch.equal(attend(backend, cache, q, features, paged=False)[0], results[0])


# ---- attention over a cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(backend: str, name: str, paged: bool) -> None:
    check_feature(backend, name, paged, (1, 3, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "head_dim", "value_dim"),
    [
        (1, 1, 1, 16, 16),
        (3, 3, 1, 64, 64),
        (8, 1, 1, 128, 64),
        (6, 2, 1, 80, 24),
        (10, 2, 2, 33, 7),
        (2, 2, 7, 1, 1),
        (7, 1, 5, 40, 130),
        (4, 2, 19, 64, 64),
    ],
)
def test_shapes(
    backend: str, heads: int, kv_heads: int, q_len: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    cache = make_cache(
        [29, 3, 75], 75, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, page_size=5, dtype=dtype
    )
    q = queries(3, heads, q_len, head_dim, dtype)
    features = FEATURES["causal"]
    results = [attend(backend, cache, q, features, paged) for paged in (False, True)]
    assert_within_budget(results[0], cache, q, features, dtype)
    assert_within_budget(results[1], cache, q, features, dtype)
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32


@pytest.mark.parametrize("q_len", [1, 9])
def test_rows_of_the_cache(backend: str, q_len: int) -> None:
    """batch_index picks rows, in any order; rows may be read more than once."""
    cache = make_cache(LENGTHS, 50)
    chosen = torch.tensor([3, 0, 3, 4])
    q = queries(4, 4, q_len)
    lengths = cache.lengths[chosen]
    out = maskops.decode_attention(q, cache.k, cache.v, lengths, batch_index=chosen, backend=backend)
    expected = maskops.decode_attention(q, cache.k[chosen], cache.v[chosen], lengths, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("q_len", [2, 9])
def test_strides(backend: str, q_len: int) -> None:
    """A cache (batch, capacity, kv_heads, width) as a view; keys and values in one tensor; q and out in q's order."""
    cache = make_cache(LENGTHS, 50)
    q = queries(5, 4, q_len)
    expected = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, masks.causal(), backend=backend)
    both = torch.cat([cache.k, cache.v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    k, v = both.split(16, -1)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = maskops.decode_attention(strided, k, v, cache.lengths.long(), masks.causal(), backend=backend)
    torch.testing.assert_close(out, expected)
    assert out.stride() == strided.stride()
    wide = torch.stack([q, q], -1)[..., 0]
    assert torch.equal(maskops.decode_attention(wide, k, v, cache.lengths, masks.causal(), backend=backend), out)


@pytest.mark.parametrize("q_len", [1, 9])
def test_plan_is_cut_to_the_lengths(backend: str, q_len: int) -> None:
    """A RowSpans serves as a mask, also one that does not know the lengths."""
    cache = make_cache(LENGTHS, 50, leftpad=[3, 0, 1, 20, 24])
    q = queries(5, 4, q_len)
    leftpad = torch.tensor([3, 0, 1, 20, 24])
    expected = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, leftpad=leftpad, backend=backend)
    for plan in (masks.full().spans(q_len, 50), masks.key_padding(cache.lengths).spans(q_len, 50)):
        out = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, plan, leftpad=leftpad, backend=backend)
        torch.testing.assert_close(out, expected)
    first = masks.full().spans(q_len, 50)
    first = first._replace(end=first.end.clamp(max=5))
    out = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, first, backend=backend, leftpad=leftpad)
    kept = cache.lengths.clamp(max=5)
    torch.testing.assert_close(
        out, maskops.decode_attention(q, cache.k, cache.v, kept, leftpad=leftpad, backend=backend)
    )


@pytest.mark.parametrize("q_len", [3, 11])
def test_masks_with_holes(backend: str, q_len: int) -> None:
    """A dense mask per head, and a mask of keys with holes that hold NaN."""
    cache = make_cache(LENGTHS, 50)
    q = queries(5, 4, q_len)
    clean_k, clean_v = (torch.where(x.isnan(), 0.0, x) for x in cache.contiguous())
    dense = torch.rand(5, 4, q_len, 50, generator=torch.Generator().manual_seed(3)) > 0.5
    holes = torch.arange(50).remainder(7) != 3
    for mask in (masks.dense(dense), masks.causal() & masks.key_padding(holes.expand(5, 50))):
        out, lse = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, mask, return_lse=True, backend=backend)
        expected = maskops.attention(
            q, clean_k, clean_v, masks.key_padding(cache.lengths) & mask, return_lse=True, backend="reference"
        )
        torch.testing.assert_close((out, lse), expected)
    holed = torch.where(holes[:, None], cache.k, math.nan), torch.where(holes[:, None], cache.v, math.nan)
    mask = masks.causal() & masks.key_padding(holes.expand(5, 50))
    assert torch.equal(maskops.decode_attention(q, *holed, cache.lengths, mask, backend=backend), out)


def test_shared_pages(backend: str) -> None:
    """Sequences that begin alike share the pages of the beginning."""
    cache = make_cache([16, 16], 24)
    table = cache.block_table.clone()
    table[1, 0] = table[0, 0]
    lengths = torch.tensor([16, 16])
    k, v = (torch.cat([x[:1, :, :8].expand(2, -1, -1, -1), x[:, :, 8:]], 2) for x in cache.contiguous())
    q = queries(2, 4, 1)
    out = maskops.decode_attention(q, *cache.paged(), lengths, block_table=table, backend=backend)
    torch.testing.assert_close(out, maskops.decode_attention(q, k, v, lengths, backend=backend))


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "capacity"),
    [(0, 2, 1, 1, 8), (2, 0, 0, 1, 8), (2, 2, 1, 0, 8), (2, 2, 1, 1, 0), (2, 2, 1, 3, 0)],
)
def test_nothing_to_do(backend: str, batch: int, heads: int, kv_heads: int, q_len: int, capacity: int) -> None:
    q, cache = torch.randn(batch, heads, q_len, 4), torch.randn(batch, kv_heads, capacity, 4)
    lengths = torch.zeros(batch, dtype=torch.int32)
    for keywords in ({}, {"block_table": torch.zeros(batch, 0 if capacity == 0 else 2, dtype=torch.int32)}):
        out, lse = maskops.decode_attention(
            q, cache, cache, lengths, masks.causal(), return_lse=True, backend=backend, **keywords
        )
        assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()


def test_float64_runs_on_the_reference() -> None:
    cache = make_cache(LENGTHS, 50, dtype=torch.float64)
    q = queries(5, 4, 1, dtype=torch.float64)
    with maskops.use_backend("reference"):
        out, lse = maskops.decode_attention(q, cache.k, cache.v, cache.lengths, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert_within_budget((out, lse), cache, q, FEATURES["plain"], torch.float64)


# ---- appending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["heads first", "keys first", "paged", "paged, keys first"])
def test_append(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Grows a cache token by token and in larger steps; nothing but the new places changes."""
    if dtype not in BACKENDS[backend].ops["append_kv"].dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    full = make_cache([21, 18, 24], 24, head_dim=5, value_dim=3, dtype=dtype)
    new_k, new_v = full.contiguous()
    caches = [torch.full_like(x, 7.0) for x in (full.paged() if "paged" in layout else full.contiguous())]
    if "keys first" in layout:
        caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    expected = [x.clone() for x in caches]
    table = full.block_table if "paged" in layout else None
    lengths = torch.tensor([3, 0, 6])
    for new in (1, 1, 9, 0, 7):
        k, v = (torch.stack([x[b, :, n : n + new] for b, n in enumerate(lengths.tolist())]) for x in (new_k, new_v))
        maskops.append_kv(*caches, k, v.transpose(1, 2).contiguous().transpose(1, 2), lengths, block_table=table,
                          backend=backend)  # fmt: skip
        for target, source in zip(expected, (k, v), strict=True):
            for b, n in enumerate(lengths.tolist()):
                for i in range(new):
                    row, at = (b, n + i) if table is None else (int(table[b, (n + i) // 8]), (n + i) % 8)
                    target[row, :, at] = source[b, :, i]
        for cache, target in zip(caches, expected, strict=True):
            assert torch.equal(cache.nan_to_num(), target.nan_to_num())
        lengths = lengths + new


def test_append_to_rows(backend: str) -> None:
    cache = torch.zeros(4, 2, 6, 3)
    k, v = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 3)
    maskops.append_kv(cache, v_cache := cache.clone(), k, v, torch.tensor([4, 0]), batch_index=torch.tensor([2, 0]),
                      backend=backend)  # fmt: skip
    assert torch.equal(cache[2, :, 4:], k[0]) and torch.equal(cache[0, :, :2], k[1])
    assert torch.equal(v_cache[2, :, 4:], v[0]) and torch.equal(v_cache[0, :, :2], v[1])
    assert int((cache != 0).sum()) == k.numel()


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_decode_step_compiles_once(backend: str, paged: bool) -> None:
    """Appending and attending in one graph: caches grow in place, and growing lengths compile nothing anew."""
    full = make_cache([20, 22, 19], 24)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        table = full.block_table if paged else None
        maskops.append_kv(k_cache, v_cache, k, v, lengths, block_table=table, backend=backend)
        return maskops.decode_attention(
            q, k_cache, v_cache, lengths + k.shape[2], masks.causal(), block_table=table, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    new_k, new_v = full.contiguous()
    # Both caches are views of one tensor, as models keep them.
    pool = torch.stack([x.transpose(1, 2).clone() for x in (full.paged() if paged else full.contiguous())])
    lengths = torch.tensor([3, 1, 9])
    for _ in range(4):
        k, v = (torch.stack([x[b, :, n : n + 1] for b, n in enumerate(lengths.tolist())]) for x in (new_k, new_v))
        q = torch.randn(3, 4, 1, 16)
        eager_pool = pool.clone()
        with torch.no_grad():
            expected = step(q, k, v, *(x.transpose(1, 2) for x in eager_pool), lengths)
            out = compiled(q, k, v, *(x.transpose(1, 2) for x in pool), lengths)
        torch.testing.assert_close(out, expected)
        assert torch.equal(pool.nan_to_num(), eager_pool.nan_to_num())
        lengths = lengths + 1
    assert counter.frame_count == 1
