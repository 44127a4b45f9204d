"""The key/value cache on Triton, interpreted: the cases of test_decode.py that its kernels could get wrong."""

import math

import pytest
import torch

import maskops
from maskops import masks
from maskops.ops.decode.triton_kernels import append, forward
from tests.test_decode import (
    FEATURES,
    assert_within_budget,
    attend,
    check_feature,
    check_shapes,
    make_cache,
    queries,
)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, paged: bool) -> None:
    check_feature("triton", name, paged, (3,) if paged else (1,))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "head_dim", "value_dim", "dtype"),
    [
        (8, 1, 1, 128, 64, torch.bfloat16),
        (6, 2, 1, 80, 24, torch.float16),
        (10, 2, 2, 33, 7, torch.float32),
        (2, 2, 7, 1, 1, torch.float32),
        (4, 2, 19, 64, 64, torch.bfloat16),
    ],
)
def test_shapes(
    heads: int, kv_heads: int, q_len: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:  # fmt: skip
    check_shapes("triton", heads, kv_heads, q_len, head_dim, value_dim, dtype)


@pytest.mark.parametrize("name", ["plain", "first tokens and window", "everything"])
def test_splits_of_the_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of keys in programs of their own, some of them of nothing, merge to the whole."""
    monkeypatch.setattr(forward, "KEYS_OF_A_SPLIT", 40)
    features = FEATURES[name]
    cache = make_cache([99, 0, 1, 40, 24], 120, leftpad=features.leftpad)
    q = queries(5, 4, 2)
    results = attend("triton", cache, q, features, paged=True)
    assert_within_budget(results, cache, q, features, torch.float32)


def test_masks_with_holes() -> None:
    cache = make_cache([37, 12], 40)
    q = queries(2, 4, 3)
    allowed = torch.rand(2, 4, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    allowed[0, :, 1] = False
    mask = masks.dense(allowed)
    clean_k, clean_v = (x.nan_to_num() for x in cache.contiguous())
    expected = maskops.attention(
        q, clean_k, clean_v, masks.key_padding(cache.lengths) & mask, return_lse=True, backend="reference"
    )
    # Keys below the length that no row sees are as unread as those beyond it.
    unseen = ~allowed.flatten(1, 2).any(1)[:, None, :, None]
    k, v = (torch.where(unseen, math.nan, x) for x in cache.contiguous())
    results = maskops.decode_attention(q, k, v, cache.lengths, mask, return_lse=True, backend="triton")
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_rows_and_strides() -> None:
    cache = make_cache([30, 7, 19, 4], 30)
    chosen, lengths = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([19, 30])
    q = queries(2, 4, 2).transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in cache.contiguous())
    out = maskops.decode_attention(q, k, v, lengths, masks.causal(), batch_index=chosen, backend="triton")
    expected = maskops.decode_attention(
        q, cache.k[chosen], cache.v[chosen], lengths, masks.causal(), backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.stride() == q.stride()


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "capacity"), [(0, 2, 1, 1, 8), (2, 0, 0, 1, 8), (2, 2, 1, 3, 0)]
)
def test_nothing_to_do(batch: int, heads: int, kv_heads: int, q_len: int, capacity: int) -> None:
    q, cache = torch.randn(batch, heads, q_len, 4), torch.randn(batch, kv_heads, capacity, 4)
    lengths = torch.zeros(batch, dtype=torch.int32)
    out, lse = maskops.decode_attention(q, cache, cache, lengths, masks.causal(), return_lse=True, backend="triton")
    assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()
    new = torch.randn(batch, kv_heads, 0, 4)
    maskops.append_kv(cache, cache.clone(), new, new, lengths, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_append(paged: bool, dtype: torch.dtype) -> None:
    """Nothing but the new places changes."""
    full = make_cache([21, 18, 24], 24, head_dim=5, value_dim=300 if paged else 3, dtype=dtype)
    new_k, new_v = full.contiguous()
    caches = [torch.full_like(x, 7.0) for x in (full.paged() if paged else full.contiguous())]
    caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    expected = [x.clone() for x in caches]
    table = full.block_table if paged else None
    lengths = torch.tensor([3, 0, 1])
    for new in (1, 17):
        k, v = (torch.stack([x[b, :, n : n + new] for b, n in enumerate(lengths.tolist())]) for x in (new_k, new_v))
        maskops.append_kv(
            *caches, k, v.transpose(1, 2).contiguous().transpose(1, 2), lengths, block_table=table, backend="triton"
        )
        maskops.append_kv(*expected, k, v, lengths, block_table=table, backend="reference")
        for cache, target in zip(caches, expected, strict=True):
            assert torch.equal(cache.nan_to_num(), target.nan_to_num())
        lengths = lengths + new


def test_append_to_rows() -> None:
    cache = torch.zeros(4, 2, 6, 3)
    k, v = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 3)
    v_cache, rows = cache.clone(), torch.tensor([2, 0])
    maskops.append_kv(cache, v_cache, k, v, torch.tensor([4, 0]), batch_index=rows, backend="triton")
    assert torch.equal(cache[2, :, 4:], k[0]) and torch.equal(cache[0, :, :2], k[1])
    assert torch.equal(v_cache[2, :, 4:], v[0]) and torch.equal(v_cache[0, :, :2], v[1])
    assert int((cache != 0).sum()) == k.numel()


def test_any_integers_stay_inside_the_cache() -> None:
    """On a device nobody looks at them before the kernel does."""
    absent = torch.empty(0)
    whole = torch.full((6, 1, 4, 8), math.nan)
    cache = whole[2:4]
    cache.fill_(1.0)
    table = torch.tensor([[0, -1, 5], [1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    q, new = torch.randn(2, 1, 1, 8), torch.full((2, 1, 3, 8), 2.0)
    for lengths in (torch.tensor([12, -5]), torch.tensor([2**40, 2**62]), torch.tensor([-(2**63), 7])):
        out, _ = torch.ops.maskops.decode_forward_triton(
            q, cache, cache, lengths, torch.tensor([-3, 2**50]), table, *(absent,) * 8, 1.0, 0.0
        )
        assert (out.isfinite()).all()
        torch.ops.maskops.append_kv_triton(cache, cache.clone(), new, new, lengths, table, absent)
    assert whole[:2].isnan().all() and whole[4:].isnan().all()


def test_operators_refuse_what_does_not_fit() -> None:
    absent, q, cache = torch.empty(0), torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    lengths = torch.tensor([3, 9])
    decode, append = torch.ops.maskops.decode_forward_triton, torch.ops.maskops.append_kv_triton
    for text, changed in {
        "head dimension": {0: q[..., :5].contiguous()},
        "dtype of the cache": {0: q.half()},
        "heads of the cache": {0: q[:, :3]},
        "lengths must have batch": {3: lengths[:1]},
        "a row for each sequence": {1: cache[:1], 2: cache[:1]},
        "leftpad must": {4: lengths[:1]},
        "for another shape": {7: torch.zeros(1, 2, 3, dtype=torch.int32)},
        "dense must be": {10: torch.zeros(1, 1, 1, 3, dtype=torch.bool)},
        "alibi_slopes must": {12: torch.zeros(1, 3)},
        "sinks must": {13: torch.zeros(3)},
    }.items():
        arguments = [q, cache, cache, lengths, *(absent,) * 10]
        for place, value in changed.items():
            arguments[place] = value
        with pytest.raises(ValueError, match=text):
            decode(*arguments, 1.0, 0.0)
    new = torch.randn(2, 2, 1, 8)
    with pytest.raises(ValueError, match="k and v must be"):
        append(cache, cache.clone(), new[..., :3], new, lengths, absent, absent)
    with pytest.raises(ValueError, match="must not be expanded"):
        append(cache[:1].expand(2, 2, 9, 8), cache.clone(), new, new, lengths, absent, absent)


def test_no_grid_is_too_long_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million keys at once: only the first dimension of a grid has more than 65535 programs."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(append, "launch", lambda kernel, grid, *arguments, **keywords: grids.append(grid))
    cache, new = torch.zeros(1, 2, 2**20 + 1, 1), torch.ones(1, 2, 2**20 + 1, 1)
    maskops.append_kv(cache, cache.clone(), new, new, torch.tensor([0]), backend="triton")
    assert len(grids) == 1
    assert math.prod(grids[0]) == 2 * (2**16 + 1) and max(grids[0][1:], default=1) < 2**16
