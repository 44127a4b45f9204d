"""What only the decode kernel has: splits of the keys, threads, instruction sets, row tiles."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension, masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = 512  # KEYS_PER_TASK of csrc/cpu/decode.cpp

pytestmark = pytest.mark.skipif(
    extension.reason() is not None, reason=f"the extension is not there: {extension.reason()}"
)


def draw(*sizes: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def paged(x: Tensor, page_size: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """The cache in pages that lie in any order, and its block table."""
    batch, heads, capacity, width = x.shape
    pages = capacity // page_size
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(seed))
    pool = torch.empty(batch * pages, heads, page_size, width, dtype=x.dtype)
    pool[table] = x.view(batch, heads, pages, page_size, width).transpose(1, 2).flatten(0, 1)
    return pool, table.view(batch, pages)


def features(batch: int, heads: int) -> dict[str, Any]:
    return {"alibi_slopes": draw(batch, heads, seed=8).abs() / 64, "sinks": draw(heads, seed=9), "softcap": 3.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "head_dim", "value_dim"),
    [
        (1, 1, 1, 64, 32),
        (2, 1, 1, 32, 64),
        (3, 1, 1, 31, 128),
        (4, 1, 1, 128, 160),
        (5, 1, 2, 96, 33),
        (7, 1, 11, 16, 17),
    ],
)
def test_every_instruction_set(
    instruction_set: str, heads: int, kv_heads: int, q_len: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """One row to more than a tile of rows, over several splits of the keys, in place and copied."""
    lengths = torch.tensor([2 * SPLIT + 77, SPLIT, 3])
    capacity = 3 * SPLIT
    valid = (torch.arange(capacity) < lengths[:, None])[:, None, :, None]
    k, v = (
        torch.where(valid, draw(3, kv_heads, capacity, width, seed=width, dtype=dtype), math.nan)
        for width in (head_dim, value_dim)
    )
    q = draw(3, heads, q_len, head_dim, seed=1, dtype=dtype)
    for mask, more in ((None, {}), (masks.causal() & masks.sliding_window(900, 0), features(3, heads))):
        out, lse = maskops.decode_attention(q, k, v, lengths, mask, return_lse=True, backend="cpu", **more)
        expected = maskops.decode_attention(
            q.double(), k.double(), v.double(), lengths, mask, return_lse=True, backend="reference", **more
        )
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]
        torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected[1], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("q_len", [1, 20])
def test_the_same_bits_for_any_number_of_threads_and_in_any_company(q_len: int) -> None:
    """Neither threads nor the rest of the batch nor pages nor the order of the sequences change a bit."""
    lengths = torch.tensor([1500, 4, 1025, 0, 700])
    k, v, q = draw(5, 2, 2048, 64, seed=1), draw(5, 2, 2048, 64, seed=2), draw(5, 8, q_len, 64, seed=3)
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(maskops.decode_attention(q, k, v, lengths, return_lse=True, backend="cpu"))
            results.append(
                maskops.decode_attention(
                    q, k_pages, v_pages, lengths, block_table=table, return_lse=True, backend="cpu"
                )
            )
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    order = torch.tensor([2, 0, 4])
    alone = maskops.decode_attention(q[order], k, v, lengths[order], batch_index=order, backend="cpu")
    assert torch.equal(alone, results[0][0][order])


def test_splits_merge_to_the_whole() -> None:
    """Two parts of the keys, merged by their lse, are the whole."""
    k, v, q = draw(2, 2, 1300, 32, seed=1), draw(2, 2, 1300, 32, seed=2), draw(2, 4, 1, 32, seed=3)
    lengths = torch.tensor([1300, 600])
    whole = maskops.decode_attention(q, k, v, lengths, return_lse=True, backend="cpu")
    for cut in (1, 511, 512, 513, 900, 1300):
        head = maskops.decode_attention(q, k, v, lengths.clamp(max=cut), return_lse=True, backend="cpu")
        tail = maskops.decode_attention(
            q, k, v, lengths, leftpad=torch.tensor([cut, cut]), return_lse=True, backend="cpu"
        )
        for one, other in zip(maskops.merge_attention(*head, *tail), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_every_number_of_keys() -> None:
    """Blocks, tiles of keys and vectors end anywhere; the keys behind them hold NaN."""
    k, v, q = draw(140, 1, 150, 32, seed=1), draw(140, 1, 150, 32, seed=2), draw(140, 3, 1, 32, seed=3)
    lengths = torch.arange(140)
    valid = (torch.arange(150) < lengths[:, None])[:, None, :, None]
    k, v = torch.where(valid, k, math.nan), torch.where(valid, v, math.nan)
    expected = maskops.decode_attention(q.double(), k.double(), v.double(), lengths, backend="reference")
    out = maskops.decode_attention(q, k, v, lengths, backend="cpu")
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    window = maskops.decode_attention(q, k, v, lengths, masks.sliding_window(37, 0), backend="cpu")
    cut = maskops.decode_attention(q, k, v, lengths, leftpad=(lengths - 38).clamp(min=0), backend="cpu")
    torch.testing.assert_close(window, cut, atol=2e-6, rtol=1e-5)


def test_only_visited_keys_are_read() -> None:
    """A window and the first tokens: everything between them may hold NaN."""
    k, v, q = draw(1, 1, 2000, 16, seed=1), draw(1, 1, 2000, 16, seed=2), draw(1, 2, 3, 16, seed=3)
    mask = masks.causal() & (masks.sliding_window(50, 0) | masks.prefix(4))
    out = maskops.decode_attention(q, k, v, torch.tensor([1900]), mask, backend="cpu")
    k[:, :, 4:1847], v[:, :, 4:1847] = math.nan, math.nan
    assert torch.equal(maskops.decode_attention(q, k, v, torch.tensor([1900]), mask, backend="cpu"), out)
    assert out.isfinite().all()


@pytest.mark.parametrize("first_rows", [1, 2, 3, 4, 5])
def test_rows_do_not_touch_each_others_keys(first_rows: int) -> None:
    """A plan may give the rows of one tile windows far apart; a value that is not finite stays with who sees it."""
    k, v, q = draw(1, 1, 300, 16, seed=1), draw(1, 1, 300, 16, seed=2), draw(1, 1, 8, 16, seed=3)
    start = torch.where(torch.arange(8) < first_rows, 0, 50).to(torch.int32).view(1, 1, 8)
    plan = masks.full().spans(8, 300)._replace(start=start, end=start + 20)
    expected = maskops.decode_attention(q, k, v, torch.tensor([300]), plan, backend="reference")
    for place, touched in ((10, slice(0, first_rows)), (60, slice(first_rows, 8))):
        poisoned = v.clone()
        poisoned[:, :, place] = math.nan
        out = maskops.decode_attention(q, k, poisoned, torch.tensor([300]), plan, backend="cpu")
        kept = torch.ones(8, dtype=torch.bool)
        kept[touched] = False
        assert out[:, :, ~kept].isnan().all()
        torch.testing.assert_close(out[:, :, kept], expected[:, :, kept])


@pytest.mark.parametrize(("heads", "kv_heads", "q_len"), [(4, 2, 1), (2, 2, 8), (8, 1, 1), (3, 1, 2)])
def test_span_attention_of_few_rows(instruction_set: str, heads: int, kv_heads: int, q_len: int) -> None:
    """Where there are few queries and many keys, ``attention`` runs on the kernel of decode, with its gradients."""
    q = draw(3, heads, q_len, 24, seed=1).requires_grad_()
    k, v = (draw(3, kv_heads, 700, 24, seed=seed).requires_grad_() for seed in (2, 3))
    lengths = torch.tensor([700, 0, 130])
    layout = masks.key_padding(lengths)
    dense = torch.rand(1, heads, q_len, 700, generator=torch.Generator().manual_seed(4)) > 0.3
    sides: list[tuple[masks.Mask, dict[str, Any]]] = [
        (layout & masks.causal(), {}),
        (layout & masks.causal() & masks.sliding_window(40, 0), features(3, heads)),
        (layout & masks.dense(dense), {"sinks": draw(heads, seed=9)}),
    ]
    for mask, more in sides:
        results = []
        for backend in ("cpu", "reference"):
            out, lse = maskops.attention(q, k, v, mask, return_lse=True, backend=backend, **more)
            loss = (out * draw(*out.shape, seed=5)).sum() + lse[[0, 2]].sum()
            results.append([out, lse, *torch.autograd.grad(loss, (q, k, v))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_packed_attention_of_few_rows() -> None:
    """A new token for each of several packed sequences, with slopes that go by the sequence."""
    q = draw(4, 2, 16, seed=1)
    k, v = draw(900, 2, 16, seed=2), draw(900, 2, 16, seed=3)
    k[850:], v[850:] = math.nan, math.nan
    offsets_q, offsets_k = torch.tensor([0, 1, 2, 2, 4]), torch.tensor([0, 300, 310, 400, 850])
    results = [
        maskops.varlen_attention(
            q, k, v, offsets_q, offsets_k, masks.causal(), alibi_slopes=slopes, return_lse=True, backend=backend
        )
        for slopes in (torch.tensor([0.5, 0.25]), draw(4, 2, seed=5).abs())
        for backend in ("cpu", "reference")
    ]
    for ours, theirs in ((results[0], results[1]), (results[2], results[3])):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [(1, 3), (1, 4, 3), (2, 3), (3, 3)])
def test_a_last_document_of_three_rows_reaches_no_other(rows: tuple[int, ...]) -> None:
    """Rows are taken four at a time, from wherever a document begins; what the last one holds stays in it."""
    keys = 64 * len(rows)
    q, k, v = draw(sum(rows), 2, 64, seed=1), draw(keys, 2, 64, seed=2), draw(keys, 2, 64, seed=3)
    offsets = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (rows, [64] * len(rows))]
    before, poisoned = sum(rows[:-1]), v.clone()
    poisoned[-64:] = math.nan
    out, lse = maskops.varlen_attention(q, k, v, *offsets, return_lse=True, backend="cpu")
    again, lse_again = maskops.varlen_attention(q, k, poisoned, *offsets, return_lse=True, backend="cpu")
    assert torch.equal(out[:before], again[:before]) and torch.equal(lse, lse_again)
    assert again[before:].isnan().all()


def test_scores_that_underflow_and_overflow() -> None:
    """The largest score sets the scale, wherever among the splits it lies."""
    for place in (0, 511, 512, 1200):
        k, v, q = torch.zeros(1, 1, 1300, 8), draw(1, 1, 1300, 8, seed=2), torch.full((1, 1, 1, 8), 10.0)
        k[0, 0, place] = 100.0
        out, lse = maskops.decode_attention(
            q, k, v, torch.tensor([1300]), softmax_scale=1.0, return_lse=True, backend="cpu"
        )
        assert torch.equal(out[0, 0, 0], v[0, 0, place]) and float(lse) == 8000.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 64, 96])
def test_results_are_rounded_to_nearest(width: int, dtype: torch.dtype) -> None:
    """The mean of the values of two keys with equal scores is exact in float32, so it has one right rounding."""
    v = draw(1, 1, 2, width, seed=0, dtype=dtype)
    q, k = torch.zeros(1, 4, 1, 4, dtype=dtype), torch.zeros(1, 1, 2, 4, dtype=dtype)
    expected = v.float().mean(2, keepdim=True).to(dtype).expand(1, 4, 1, width)
    assert torch.equal(maskops.decode_attention(q, k, v, torch.tensor([2]), backend="cpu"), expected)


def test_operators_refuse_what_does_not_fit() -> None:
    """The C boundary: whatever reaches the operators without the public functions, nothing is read out of bounds."""
    none = torch.empty(0, dtype=torch.int32)
    q, cache, lengths = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 6, 8), torch.tensor([6, 2])
    spans = masks.causal().spans(1, 6)
    base: dict[str, Any] = {
        "q": q, "k_cache": cache, "v_cache": cache, "lengths": lengths, "leftpad": none, "block_table": none,
        "batch_index": none, "start": none, "end": none, "key_valid": none, "dense": none, "diagonal": none,
        "alibi_slopes": none, "sinks": none, "softmax_scale": 1.0, "softcap": 0.0,
    }  # fmt: skip
    plan = {"start": spans.start, "end": spans.end, "key_valid": spans.key_valid}
    for change in (
        {"q": q[0]},
        {"q": q.bfloat16()},
        {"q": q[..., :7]},
        {"q": q[:, :3]},
        {"q": torch.zeros(2, 4, 8, 1).transpose(2, 3).expand(2, 4, 1, 8)[..., ::2]},
        {"v_cache": cache[:, :, :5]},
        {"v_cache": cache.half()},
        {"k_cache": cache.transpose(2, 3), "v_cache": cache.transpose(2, 3)},
        {"k_cache": cache[:1], "v_cache": cache[:1]},
        {"lengths": lengths[:1]},
        {"lengths": lengths.float()},
        {"lengths": torch.tensor([7, 2])},
        {"leftpad": torch.tensor([1])},
        {"leftpad": torch.tensor([0, -1])},
        {"batch_index": torch.tensor([0])},
        {"batch_index": torch.tensor([0, 2])},
        {"batch_index": torch.tensor([0, 1]), "block_table": torch.zeros(2, 1, dtype=torch.int32)},
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
        {"block_table": torch.zeros(2, 1)},
        {"block_table": torch.tensor([[0], [2]])},
        plan | {"start": spans.start.long()},
        plan | {"end": spans.end[:, :, :0]},
        plan | {"key_valid": spans.key_valid[:, :5]},
        plan | {"start": spans.start.expand(3, 1, 1), "end": spans.end},
        plan | {"start": torch.zeros(1, 3, 1, dtype=torch.int32), "end": torch.zeros(1, 3, 1, dtype=torch.int32)},
        {"dense": torch.ones(1, 3, 1, 6, dtype=torch.bool)},
        {"dense": torch.ones(1, 1, 1, 6)},
        {"alibi_slopes": torch.ones(1, 4)},
        {"alibi_slopes": torch.ones(1, 3), "diagonal": torch.zeros(1, 1, dtype=torch.int32)},
        {"sinks": torch.ones(3)},
        {"sinks": torch.ones(4).double()},
    ):
        with pytest.raises(ValueError, match=r"decode: |maskops: |expected 0"):
            torch.ops.maskops.decode_forward(*(base | change).values())
    new = torch.ones(2, 2, 1, 8)
    appended: dict[str, Any] = {
        "k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new, "lengths": torch.tensor([5, 2]),
        "block_table": none, "batch_index": none,
    }  # fmt: skip
    for change in (
        {"k": new.half()},
        {"k": new[..., :7]},
        {"k": new[:, :1]},
        {"v": new.expand(2, 2, 2, 8)},
        {"k": new[0]},
        {"lengths": torch.tensor([6, 2])},
        {"lengths": torch.tensor([2**63 - 1, 2])},
        {"lengths": torch.tensor([-(2**63), 2])},
        {"batch_index": torch.tensor([1, 1]), "lengths": torch.tensor([2, 2])},
        {"k_cache": cache[:1].expand(2, -1, -1, -1)},
        {"k_cache": cache.int(), "v_cache": cache.int(), "k": new.int(), "v": new.int()},
    ):
        with pytest.raises(ValueError, match=r"append_kv: |decode: |maskops: |expected 0|exceeds|both append"):
            torch.ops.maskops.append_kv(*(appended | change).values())
    assert (cache == 0).all()


def test_spans_of_any_integers() -> None:
    """A plan whose bounds lie is cut to the keys that are there."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-(2**31), -7, 0, 3, 40, 2**31 - 1], dtype=torch.int32)
    lengths = torch.tensor([40, 17])
    k, v, q = draw(2, 1, 40, 16, seed=1), draw(2, 1, 40, 16, seed=2), draw(2, 2, 3, 16, seed=3)
    spans = (masks.causal() & (masks.sliding_window(4, 0) | masks.prefix(2))).spans(3, 40, batch=2, positions=True)
    for _ in range(30):
        start, end = (extremes[torch.randint(6, (2, 2, 3), generator=generator)] for _ in range(2))
        positions = extremes[torch.randint(6, (3, 2, 3), generator=generator)]
        plan = spans._replace(start=start, end=end, key_valid=spans.key_valid.expand(2, -1), positions=positions)
        out = maskops.decode_attention(q, k, v, lengths, plan, alibi_slopes=torch.zeros(2), backend="cpu")
        assert out.isfinite().all()


def test_operators_pass_the_checks_of_torch() -> None:
    """Schemas, fakes and functionalisation, by torch's own checker."""
    none = torch.empty(0, dtype=torch.int32)
    q, cache, lengths = draw(2, 4, 1, 8, seed=1), draw(2, 2, 6, 8, seed=2), torch.tensor([5, 2])
    torch.library.opcheck(
        torch.ops.maskops.decode_forward.default,
        (q.transpose(1, 2).contiguous().transpose(1, 2), cache, cache.clone(), lengths, *[none] * 10, 0.5, 0.0),
    )
    new = draw(2, 2, 1, 8, seed=3)
    torch.library.opcheck(
        torch.ops.maskops.append_kv.default, (cache.clone(), cache.clone(), new, new, lengths, none, none)
    )


def test_autograd_hears_of_an_append() -> None:
    cache = torch.zeros(1, 1, 4, 2)
    scale = torch.ones((), requires_grad=True)
    loss = (cache * scale).sum()
    new = torch.ones(1, 1, 1, 2)
    maskops.append_kv(cache, cache.clone(), new, new, torch.tensor([0]), backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inference = torch.zeros(1, 1, 4, 2)
        maskops.append_kv(inference, inference.clone(), new, new, torch.tensor([0]), backend="cpu")
        assert (inference[:, :, 0] == 1).all()
