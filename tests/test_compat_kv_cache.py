"""flash_attn_with_kvcache: what it appends, rotates and attends to, against plain operations on each sequence."""

import inspect
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

import maskops
from maskops.testing import error_budget, plain_attention

_SIGNATURE = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
)
BATCH, CAPACITY, HEADS, DIM, WIDTH = 2, 24, 4, 16, 6


@pytest.fixture(autouse=True)
def _falling_back_is_fine() -> object:
    """What a backend lacks runs on the reference: the numbers are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", maskops.BackendFallbackWarning)
        yield


def test_signature_is_that_of_flash_attn() -> None:
    expected = inspect.signature(eval(f"lambda {_SIGNATURE}: 0")).parameters.values()
    parameters = inspect.signature(maskops.flash_attn_with_kvcache).parameters.values()
    assert [(x.name, x.default, x.kind) for x in parameters] == [(x.name, x.default, x.kind) for x in expected]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotation as a product of complex numbers; x (length, heads, dim), positions (length,)."""
    half = cos.shape[1]
    turned = x[..., : 2 * half]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[positions][:, None]
    pairs = torch.view_as_real(product)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., 2 * half :]), -1)


class Problem:
    """Arguments of one call, and what it must do, sequence by sequence in float64."""

    def __init__(
        self,
        q_len: int,
        *,
        new: int | None = None,
        pages: int | None = None,
        batch_index: bool = False,
        leftpad: bool = False,
        rotary: int = 0,
        interleaved: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> None:
        rows = 2 * BATCH if batch_index else BATCH
        self.lengths = torch.tensor([9, 17], dtype=torch.int32)
        self.first = torch.tensor([3, 0], dtype=torch.int32) if leftpad else torch.zeros(BATCH, dtype=torch.int32)
        self.index = torch.tensor([2, 0]) if batch_index else torch.arange(BATCH)
        self.dtype, self.options = dtype, options
        # What the cache holds beyond the lengths is no number, so that nothing can have read it.
        caches = [torch.randn(rows, CAPACITY, 2, width).to(dtype) for width in (DIM, WIDTH)]
        for cache, row in itertools.product(caches, range(BATCH)):
            cache[self.index[row], self.lengths[row] :] = math.nan
            cache[self.index[row], : self.first[row]] = math.nan
        self.before = [cache.clone() for cache in caches]
        self.table = None
        if pages is not None:
            columns = CAPACITY // pages
            self.table = torch.randperm(BATCH * columns + 3, dtype=torch.int32)[: BATCH * columns].view(BATCH, columns)
            paged = [torch.randn(BATCH * columns + 3, pages, 2, width).to(dtype) for width in (DIM, WIDTH)]
            for cache, pool in zip(caches, paged, strict=True):
                pool[self.table.flatten().long()] = cache.reshape(BATCH * columns, pages, 2, -1)
            caches = paged
        self.k_cache, self.v_cache = caches
        self.q = torch.randn(BATCH, q_len, HEADS, DIM).to(dtype)
        self.k = None if new is None else torch.randn(BATCH, new, 2, DIM).to(dtype)
        self.v = None if new is None else torch.randn(BATCH, new, 2, WIDTH).to(dtype)
        self.cos = self.sin = None
        if rotary:
            angles = torch.rand(CAPACITY + q_len, rotary // 2) * 6
            self.cos, self.sin = angles.cos(), angles.sin()
        self.interleaved = interleaved

    def run(self) -> tuple[Tensor, Tensor]:
        result = maskops.flash_attn_with_kvcache(
            self.q,
            self.k_cache,
            self.v_cache,
            self.k,
            self.v,
            self.cos,
            self.sin,
            self.lengths,
            self.index.int() if bool((self.index != torch.arange(BATCH)).any()) else None,
            self.first if self.first.any() else None,
            self.table,
            rotary_interleaved=self.interleaved,
            return_softmax_lse=True,
            **self.options,
        )
        assert isinstance(result, tuple)
        return result

    def caches_after(self) -> list[Tensor]:
        """The caches as (rows, capacity, heads, width), whatever they lie in."""
        if self.table is None:
            return [self.k_cache, self.v_cache]
        return [pool[self.table.long()].flatten(1, 2) for pool in (self.k_cache, self.v_cache)]

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        causal = bool(self.options.get("causal", False))
        left, right = self.options.get("window_size", (-1, -1))
        right = 0 if causal else right
        caches = [cache.to(dtype) for cache in self.before]
        outs, lses = [], []
        for row in range(BATCH):
            where, held = int(self.index[row]), int(self.lengths[row])
            q, total = self.q[row].to(dtype), held
            if self.k is not None:
                k, v = self.k[row].to(dtype), self.v[row].to(dtype)
                if self.cos is not None:
                    cos, sin = self.cos.to(dtype), self.sin.to(dtype)
                    k = rotated(k, cos, sin, held + torch.arange(k.shape[0]), self.interleaved)
                    moves = causal or left >= 0 or right >= 0
                    q = rotated(q, cos, sin, held + torch.arange(q.shape[0]) * int(moves), self.interleaved)
                total = held + k.shape[0]
                caches[0][where, held:total], caches[1][where, held:total] = k, v
            first = int(self.first[row])
            keys, values = (cache[where, first:total].transpose(0, 1)[None] for cache in caches)
            difference = torch.arange(total - first) - (torch.arange(q.shape[0])[:, None] + total - first - q.shape[0])
            allowed = torch.ones_like(difference, dtype=torch.bool)
            allowed &= difference >= -left if left >= 0 else True
            allowed &= difference <= right if right >= 0 else True
            slopes = self.options.get("alibi_slopes")
            additive = None
            if slopes is not None:
                slopes = slopes if slopes.dim() == 1 else slopes[row]
                additive = (-slopes.to(dtype)[:, None, None] * difference.abs())[None]
            out, lse = plain_attention(
                q.transpose(0, 1)[None],
                keys,
                values,
                allowed[None, None],
                softmax_scale=self.options.get("softmax_scale", 1 / math.sqrt(DIM)),
                softcap=max(self.options.get("softcap", 0.0), 0.0),
                additive=additive,
            )
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.stack(outs), torch.stack(lses), caches

    def check(self) -> None:
        out, lse = self.run()
        exact, plain = self.expected(torch.float64), self.expected(torch.float32)
        assert out.dtype == self.dtype and lse.dtype == torch.float32
        plain_out = plain[0].to(self.dtype)
        assert error_budget(out, plain_out, exact[0], self.dtype).passed
        # Rotated queries and keys are rounded to the dtype of the cache before they meet.
        lse_dtype = torch.float32 if self.cos is None else self.dtype
        assert error_budget(lse, plain[1], exact[1], lse_dtype).passed
        for actual, before, wanted in zip(self.caches_after(), self.before, exact[2], strict=True):
            changed = wanted.nan_to_num() != before.double().nan_to_num()
            torch.testing.assert_close(actual[~changed], before[~changed], rtol=0, atol=0, equal_nan=True)
            tolerance = 4 * torch.finfo(self.dtype).eps
            torch.testing.assert_close(actual.double()[changed], wanted[changed], rtol=tolerance, atol=tolerance)


_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 2)},
    "all": {
        "causal": True,
        "window_size": (6, -1),
        "softcap": 2.0,
        "softmax_scale": 0.3,
        "alibi_slopes": torch.tensor([[0.5, 0.2, 0.1, 0.05], [0.4, 0.3, 0.2, 0.1]]),
    },
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.05]), "softcap": -1.0, "num_splits": 3},
}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("layout", [{}, {"pages": 8}, {"batch_index": True}, {"leftpad": True}, {"pages": 1}], ids=str)
def test_reads_a_cache(options: dict[str, object], layout: dict[str, object]) -> None:
    torch.manual_seed(0)
    for q_len in (1, 4):
        Problem(q_len, **layout, **options).check()


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("rotary", [0, 4, 16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_appends_and_rotates(options: dict[str, object], rotary: int, interleaved: bool) -> None:
    torch.manual_seed(1)
    for q_len, new, layout in ((1, 1, {}), (4, 4, {"pages": 8}), (4, 2, {"batch_index": True, "leftpad": True})):
        Problem(q_len, new=new, rotary=rotary, interleaved=interleaved, **layout, **options).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    Problem(3, new=3, rotary=16, causal=True, dtype=dtype).check()


def test_lengths_as_a_number_or_none() -> None:
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 5, 2, 8)
    whole = maskops.flash_attn_func(q, cache, cache)
    torch.testing.assert_close(maskops.flash_attn_with_kvcache(q, cache, cache), whole)
    torch.testing.assert_close(maskops.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5), whole)
    some = maskops.flash_attn_func(q, cache[:, :3], cache[:, :3])
    torch.testing.assert_close(maskops.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=3), some)


def test_decoding_equals_one_pass() -> None:
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    k_cache, v_cache = torch.zeros(2, 2, 9, 2, 8).unbind()
    parts = [
        maskops.flash_attn_with_kvcache(
            q[:, at : at + n], k_cache, v_cache, k[:, at : at + n], v[:, at : at + n], cache_seqlens=at, causal=True
        )
        for at, n in ((0, 3), (3, 1), (4, 1), (5, 1))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), maskops.flash_attn_func(q, k, v, causal=True))
    assert torch.equal(k_cache[:, :6], k) and not k_cache[:, 6:].any()


_ROTARY = torch.zeros(8, 4)
_NEW = {"k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 1, 2, 8)}
_REFUSALS = [
    ({"k": _NEW["k"]}, ValueError, "k is given without v: give both or none"),
    ({"v": _NEW["v"]}, ValueError, "v is given without k: give both or none"),
    (_NEW, ValueError, "k is given without cache_seqlens"),
    (
        _NEW | {"cache_seqlens": 5},
        ValueError,
        r"cache_seqlens\[0\]=5: expected 0 to 4, since 1 are appended",
    ),
    ({"cache_seqlens": 6}, ValueError, r"cache_seqlens\[0\]=6: expected 0 to 5, the capacity is 5"),
    ({"cache_seqlens": torch.tensor([1, -1])}, ValueError, r"cache_seqlens\[1\]=-1: expected 0 to 5"),
    ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens is torch.float32: expected int32 or int64"),
    ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens is a list: expected an int or a tensor"),
    ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, ValueError, r"cache_seqlens has shape \(3,\): expected \(b"),
    ({"rotary_cos": _ROTARY}, ValueError, "rotary_cos is given without rotary_sin: give both or none"),
    ({"rotary_cos": _ROTARY, "rotary_sin": _ROTARY}, ValueError, "rotary_cos is given without k"),
    (
        _NEW | {"rotary_cos": _ROTARY[:2], "rotary_sin": _ROTARY[:2], "cache_seqlens": 2},
        ValueError,
        "rotary_cos has 2 positions: the new keys and queries reach 3",
    ),
    (
        _NEW | {"rotary_cos": torch.zeros(8, 5), "rotary_sin": torch.zeros(8, 5), "cache_seqlens": 2},
        ValueError,
        "rotates 10 dimensions: q has head_dim 8",
    ),
    (
        _NEW | {"rotary_cos": _ROTARY, "rotary_sin": _ROTARY[:3], "cache_seqlens": 2},
        ValueError,
        r"rotary_cos has shape \(8, 4\), rotary_sin \(3, 4\)",
    ),
    ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, r"cache_batch_idx\[1\]=2: expected 0 to 1"),
    ({"cache_leftpad": torch.tensor([0, 9])}, ValueError, r"cache_leftpad\[1\]=9: expected 0 to 5"),
    (
        {"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.zeros(2, 1, dtype=torch.int32)},
        ValueError,
        "cache_batch_idx goes with a contiguous cache, block_table with pages",
    ),
    ({"num_splits": None}, ValueError, "num_splits is None: expected 0"),
    ({"num_splits": -1}, ValueError, "num_splits is -1: expected 0"),
    ({"window_size": (1, 2, 3)}, ValueError, r"window_size is \(1, 2, 3\): expected \(left, right\)"),
    ({"q": torch.zeros(2, 4, 8)}, ValueError, r"q has shape \(2, 4, 8\): expected 4 dimensions"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes has shape \(3,\)"),
    ({"q": torch.zeros(2, 1, 4, 8, requires_grad=True)}, ValueError, "q requires a gradient"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), _REFUSALS)
def test_refusals(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults = {"q": torch.zeros(2, 1, 4, 8), "k_cache": torch.zeros(2, 5, 2, 8), "v_cache": torch.zeros(2, 5, 2, 8)}
    with pytest.raises(error, match=message):
        maskops.flash_attn_with_kvcache(**(defaults | arguments))
