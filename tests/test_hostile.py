"""Integers at the boundary of the C++ operators that no mask of this package makes: refused or clamped, never followed.

The operators are called past the public functions and their checks. What a fuzzer has found stays here as a case.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension, masks
from maskops.ops.attention.registration import Features, filled, operator_arguments
from maskops.spans import RowSpans
from tools.fuzz import graph

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))

INT32_MAX = 2**31 - 1
ROOT = Path(__file__).parent.parent


def forward(q: Tensor, k: Tensor, v: Tensor, spans: RowSpans) -> tuple[Tensor, Tensor]:
    plan = filled(operator_arguments(spans, Features(), "cpu"), q)
    out, lse = torch.ops.maskops.attention_forward(q, k, v, *plan)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: RowSpans
) -> tuple[Tensor, Tensor, Tensor]:
    plan = filled(operator_arguments(spans, Features(), "cpu"), q)
    dq, dk, dv, *_ = torch.ops.maskops.attention_backward(
        grad, torch.empty(0), q, k, v, out, lse, *plan, False, False, False
    )
    return dq, dk, dv


def test_rows_that_see_more_than_their_tile_says() -> None:
    """The backward pass has room for the keys of the work list; a row's keys beyond them stay out."""
    q = torch.randn(1, 2, 128, 16)
    spans = masks.full().spans(128, 4096)
    k, v = torch.randn(2, 1, 2, 4096, 16)
    out, lse = forward(q, k, v, spans)
    grad = torch.randn_like(out)
    _, dk, dv = backward(grad, q, k, v, out, lse, spans)
    tiles = spans.tiles.clone()
    tiles[0, 4:] = torch.tensor([1024, 1024, 1088, 1088])
    _, few_dk, few_dv = backward(grad, q, k, v, out, lse, spans._replace(tiles=tiles))
    for few, whole in ((few_dk, dk), (few_dv, dv)):
        torch.testing.assert_close(few[:, :, 1024:1088], whole[:, :, 1024:1088])
        assert not few[:, :, :1024].any() and not few[:, :, 1088:].any()


@pytest.mark.parametrize("value", [-(2**31), -5, 2**20, INT32_MAX])
@pytest.mark.parametrize("name", ["start", "end"])
def test_spans_outside_the_keys(name: str, value: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 8)
    spans = masks.causal().spans(70, 70)
    bounds = getattr(spans, name).clone()
    bounds[0, 0, 3::5] = value
    hostile = spans._replace(**{name: bounds})
    clamped = spans._replace(**{name: bounds.clamp(0, 70)})
    results = []
    for plan in (hostile, clamped):
        out, lse = forward(q, k, v, plan)
        results.append([out, lse, *backward(torch.ones_like(out), q, k, v, out, lse, plan)])
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("cost", [-1, -(2**31), INT32_MAX])
def test_a_cost_that_is_none(cost: int) -> None:
    """The cost of an item decides how many threads are worth their while, and nothing else."""
    q, k, v = torch.randn(3, 1, 2, 300, 8)
    spans = masks.causal().spans(300, 300)
    tiles = spans.tiles.clone()
    tiles[:, 3] = cost
    results = []
    for plan in (spans, spans._replace(tiles=tiles)):
        out, lse = forward(q, k, v, plan)
        results.append([out, lse, *backward(torch.ones_like(out), q, k, v, out, lse, plan)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "items",
    [
        [(0, 0, 1), (0, 1, INT32_MAX), (0, -(2**31), INT32_MAX), (0, -1, 71)],  # sums that wrap around
        [(0, 0, 129)],  # more rows than a tile has
        [(0, 0, 70), (0, 70, 1)],
        [(0, 0, -1)],
        [(1, 0, 70)],
        [(0, 5, 65)],
    ],
)
def test_work_lists_that_do_not_cover_the_rows(items: list[tuple[int, int, int]]) -> None:
    rows = 140 if items[0][2] == 129 else 70
    q = torch.randn(1, 1, rows, 8)
    spans = masks.full().spans(rows, rows)
    tiles = torch.zeros(len(items), 8, dtype=torch.int32)
    for index, (batch, first, count) in enumerate(items):
        tiles[index] = torch.tensor([batch, first, count, 1, 0, 0, rows, rows])
    hostile = spans._replace(tiles=tiles, tile_count=torch.tensor([len(items)], dtype=torch.int32))
    with pytest.raises(ValueError, match="the work list does not cover the rows of q"):
        forward(q, q, q, hostile)


@pytest.mark.parametrize("count", [-1, 1000, INT32_MAX])
def test_more_items_than_the_work_list_has(count: int) -> None:
    q = torch.randn(1, 1, 16, 8)
    spans = masks.full().spans(16, 16)
    with pytest.raises(ValueError, match="tile_count exceeds the work list"):
        forward(q, q, q, spans._replace(tile_count=torch.tensor([count], dtype=torch.int32)))


def plan(program: str, *operands: Tensor, batch: int = 1, q_len: int = 16, k_len: int = 16) -> tuple[Tensor, ...]:
    absent = torch.empty(0, dtype=torch.int32)
    passed = [*operands, *[absent] * (6 - len(operands))]
    results: tuple[Tensor, ...] = torch.ops.maskops.build_plan(program, *passed, batch, q_len, k_len, True, False, True)
    return results


def test_offsets_of_keys_that_nobody_checked() -> None:
    """Only a program that says that the keys have offsets of their own may name another operand for them."""
    queries = torch.tensor([0, 16], dtype=torch.int32)
    keys = torch.tensor([-(2**30), 2**30], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens without cu_seqlens_k"):
        plan("cu_seqlens 0 1 0 span first last", queries, keys)
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[0\]=-1073741824: must be 0"):
        plan("cu_seqlens 0 1 1 span first last", queries, keys)


def test_an_item_whose_rows_see_nothing_beside_a_mask_with_holes() -> None:
    """A full range of no row was looked up in the counts of the keys that are there."""
    present = torch.zeros(1, 512, dtype=torch.uint8)
    present[:, 3:100] = 1
    present[:, 50] = 0
    start, end, _, tiles, count, *_ = plan("padding_mask 0 span first last", present, q_len=512, k_len=512)
    assert count.item() == 4
    assert tiles[:4, :4].tolist() == [[0, 0, 128, 96 * 97], [0, 128, 128, 0], [0, 256, 128, 0], [0, 384, 128, 0]]
    assert tiles[:4, 4:].tolist() == [[3, 100, 100, 100], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not (end - start)[:, :, 100:].any()


def test_a_batch_beyond_every_memory() -> None:
    """Empty rows, so that no allocation stops it."""
    with pytest.raises(ValueError, match="a length is negative or too large"):
        plan("span first last", batch=2**62, q_len=0, k_len=0)


def test_a_cache_of_values_without_columns() -> None:
    """Copies of no bytes from no memory."""
    k_cache, v_cache = torch.zeros(2, 1, 8, 4), torch.zeros(2, 1, 8, 0)
    lengths = torch.tensor([0, 3])
    maskops.append_kv(k_cache, v_cache, torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 0), lengths)
    assert k_cache.sum((1, 3)).tolist() == [[4.0, 4, 0, 0, 0, 0, 0, 0], [0.0, 0, 0, 4, 4, 0, 0, 0]]


def test_a_cache_of_keys_without_columns() -> None:
    """Every score is 0, so the output is the mean of the values; q has no memory to be read (the sanitizers ask)."""
    q, keys = torch.randn(2, 2, 1, 0), torch.randn(2, 2, 9, 0)
    values, absent = torch.randn(2, 2, 9, 32), [torch.empty(0)] * 10
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (q.to(dtype), keys.to(dtype), values.to(dtype), torch.tensor([9, 9]), *absent, 1.0, 0.0)
        out, _ = torch.ops.maskops.decode_forward(*arguments)
        torch.testing.assert_close(out.float(), values.mean(2, keepdim=True), atol=2e-2, rtol=0)


def test_masks_broadcast_in_the_operator_of_softmax() -> None:
    """Nobody expands them before it; what does not broadcast is refused, and so is anything else that would have to."""
    x, nothing = torch.randn(2, 3, 4, 5), torch.empty(0, dtype=torch.uint8)
    forward = torch.ops.maskops.masked_softmax_forward
    for shape in ((5,), (1,), (4, 1), (3, 1, 5), (2, 1, 4, 5), (2, 3, 4, 5)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
        weights, _ = forward(x, mask, nothing, nothing, nothing, 3, False)
        expected, _ = forward(x, mask.expand(x.shape), nothing, nothing, nothing, 3, False)
        assert torch.equal(weights, expected)
    for shape in ((4,), (2, 5), (1, 2, 3, 4, 5), (2, 3, 1, 4)):
        with pytest.raises(ValueError, match="broadcasts"):
            forward(x, torch.ones(shape, dtype=torch.bool), nothing, nothing, nothing, 3, False)
    with pytest.raises(ValueError, match="the sizes of x"):
        torch.ops.maskops.masked_softmax_backward(x[0], nothing, x, nothing, nothing, nothing, 3)


def test_a_matrix_beyond_every_memory() -> None:
    """The product of its sizes is no int64 (the sanitizers ask whether anybody computes it)."""
    with pytest.raises(RuntimeError):
        torch.ops.maskops.empty_matrix(torch.empty(0), 2**62, 2**62)


@pytest.mark.parametrize("seen", [0, 5])
def test_packed_values_without_columns(seen: int) -> None:
    """Also of rows that see no key, whose results are cleared: there is no memory of theirs (the sanitizers ask)."""
    q, k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 0)
    offsets = torch.tensor([0, 5])
    keys = torch.tensor([0, seen])
    out, lse, kept = torch.ops.maskops.attention_packed_saving(q, k, v, offsets, keys, "span first last", 0.5)
    assert out.shape == (5, 2, 0) and bool(lse.isfinite().all()) == (seen > 0)
    grads = torch.ops.maskops.attention_packed_backward(out, q, k, v, out, lse, kept, "span first last", 0.5)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_at_odd_addresses(dtype: torch.dtype) -> None:
    """Two bytes are all the alignment that halves have, also where a kernel takes them in pairs."""
    q, k, v = (torch.randn(2, 2, length, 65, dtype=dtype)[..., 1:] for length in (1, 40, 40))
    lengths = torch.tensor([40, 17])
    out = maskops.decode_attention(q, k, v, lengths, backend="cpu")
    expected = maskops.decode_attention(q.float(), k.float(), v.float(), lengths, backend="reference")
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("which", ["lse", "grad_lse"])
def test_a_log_sum_exp_of_another_shape(which: str) -> None:
    """As many elements as there are rows, but one of them in memory."""
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 16, 8)
    arguments = filled(operator_arguments(masks.full().spans(1, 16), Features(softmax_scale=0.3), "cpu"), q)
    out, lse = torch.ops.maskops.attention_forward(q, k, k, *arguments)
    wrong = torch.zeros(1).as_strided((1, 1, 4), (4, 1, 0))
    grad_lse, lse = (torch.empty(0), wrong) if which == "lse" else (wrong, lse)
    with pytest.raises(ValueError, match=r"lse and its gradient must be contiguous float32 \(batch, heads, q_len\)"):
        torch.ops.maskops.attention_backward(
            torch.ones_like(out), grad_lse, q, k, k, out, lse, *arguments, False, False, False
        )


def test_a_prompt_over_a_cache_of_values_without_columns() -> None:
    """Copies of no bytes, where many queries gather the keys of a cache."""
    q, k_cache, v_cache = torch.randn(1, 8, 70, 16), torch.randn(1, 1, 90, 16), torch.zeros(1, 1, 90, 0)
    assert maskops.decode_attention(q, k_cache, v_cache, torch.tensor([80]), backend="cpu").shape == (1, 8, 70, 0)


def test_every_operator_is_fuzzed() -> None:
    """Those of the processor, by name: integers, shapes and strides that nobody would pass meet each of them."""
    sources = [path.read_text() for path in (ROOT / "csrc/ops").glob("*.cpp")]
    names = [name for text in sources for name in re.findall(r'implement<&\w+>\(\s*"(\w+)"\)', text)]
    targets = "".join(path.read_text() for path in (ROOT / "fuzz").glob("*.cpp"))
    assert len(names) >= 25
    assert [name for name in names if f'"{name}"' not in targets] == []


def test_the_fuzzers_compile() -> None:
    """All of them as one source, for the parser alone: who changes an interface need not build them."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    sources = [f"-include{path}" for path in sorted((ROOT / "fuzz").glob("*.cpp"))]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *sources, "-xc++", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = graph(Path("build"), ROOT, "address").splitlines()
    compiled = [line for line in lines if ": compile " in line]
    assert any("csrc/ops/matmul.cpp" in line for line in compiled)
    assert not [line for line in compiled if "csrc/ops/cuda/" in line]  # their kernels are not there
