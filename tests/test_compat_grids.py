"""The grids of shapes, dtypes and features on which torch tests its attention and flash-attn tests its own.

Facts about them (sizes, dtypes, tolerances) are taken over, nothing else. A part that takes seconds is always run; the
rest is marked ``grid``: ``python -m pytest -m grid``. Where a grid is a product of many lists, flash-attn's of a
hundred thousand cases, every combination of lengths and head_dim occurs, and the other features go round so that each
of their values meets all lengths; batch and heads are smaller.
"""

import itertools
import math
import os
import random
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maskops
from maskops.testing import plain_attention
from tests.test_compat_flash_attn import plain

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _falling_back_is_fine() -> object:
    """What a backend lacks runs on the reference: the numbers are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", maskops.BackendFallbackWarning)
        yield


@pytest.fixture(autouse=True)
def _large_cases_take_every_core(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if request.node.get_closest_marker("grid") is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before)
    yield
    torch.set_num_threads(before)


def marked(cases: Iterator[tuple[object, ...]], always: object) -> list[object]:
    """Cases for which ``always`` is true run in every session, the others with ``-m grid``."""
    listed = list(cases)
    assert any(always(*case) for case in listed)
    return [pytest.param(*case, marks=() if always(*case) else pytest.mark.grid) for case in listed]


# ---- torch: fused against math on the CPU ----------------------------------------------------------------------------

_TOLERANCE = {
    torch.float64: (1e-5, 5e-6),
    torch.float32: (1e-5, 5e-6),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (1e-2, 1e-2),
}
_GRADIENT_TOLERANCE = _TOLERANCE | {torch.float16: (1e-1, 1e-1)}


def compare_with_math(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, train: bool) -> None:
    """Output and gradients against torch's math backend in float32 at least, within torch's tolerances."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    mine, theirs = ([x.to(kind).detach().requires_grad_(train) for x in (q, k, v)] for kind in (dtype, wide))
    out = maskops.scaled_dot_product_attention(*mine, attn_mask, is_causal=is_causal)
    mask = attn_mask.to(wide) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*theirs, mask, is_causal=is_causal)
    atol, rtol = _TOLERANCE[dtype]
    torch.testing.assert_close(out, expected.to(dtype), atol=atol, rtol=rtol)
    if train:
        out.sum().backward()
        expected.sum().backward()
        atol, rtol = _GRADIENT_TOLERANCE[dtype]
        for ours, exact in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours.grad, exact.grad.to(dtype), atol=atol, rtol=rtol)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "dtype, batch, length, heads, head_dim, causal, train",
    marked(
        itertools.product(_DTYPES, (2, 12), (267, 1030), (1, 3), (8, 16), (True, False), (True, False)),
        always=lambda _, batch, length, heads, head_dim, causal, train: (
            (batch, length, heads) == (2, 267, 1) and train == causal == (head_dim == 8)
        ),
    ),
)
def test_torch_fused_against_math(
    dtype: torch.dtype, batch: int, length: int, heads: int, head_dim: int, causal: bool, train: bool
) -> None:
    torch.manual_seed(0)
    # One projection, split: what a model hands over.
    packed = torch.randn(batch, length, 3, heads, head_dim).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    compare_with_math(q, k, v, None, causal, train)


@pytest.mark.parametrize(
    "dtype, batch, q_len, k_len, heads, dimensions, is_bool, train, causal",
    marked(
        (
            case
            for case in itertools.product(
                _DTYPES,
                (2, 12),
                (11, 514, 1030),
                (17, 514),
                (1, 3),
                (2, 4),
                (False, True),
                (True, False),
                (False, True),
            )
            if not case[-1] or case[5:7] == (2, False)  # without a mask its shape does not matter
        ),
        always=lambda dtype, batch, q_len, k_len, heads, dimensions, is_bool, train, causal: (
            batch == 2 and (q_len, k_len) in ((11, 17), (514, 17)) and heads == 3 and train
        ),
    ),
)
def test_torch_masked_against_math(
    dtype: torch.dtype,
    batch: int,
    q_len: int,
    k_len: int,
    heads: int,
    dimensions: int,
    is_bool: bool,
    train: bool,
    causal: bool,
) -> None:
    """torch's grid has a mask or is_causal; here ``causal`` stands for the second, without a mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, n, heads, 8).to(dtype).transpose(1, 2) for n in (q_len, k_len, k_len))
    shape = (q_len, k_len) if dimensions == 2 else (batch, heads, q_len, k_len)
    attn_mask = torch.randint(0, 2, shape).bool() if is_bool else torch.randn(shape).to(dtype)
    compare_with_math(q, k, v, None if causal else attn_mask, causal, train)


@pytest.mark.parametrize(
    "dtype, q_len, k_len, head_dim, causal, scale, group",
    marked(
        itertools.product(
            (torch.bfloat16, torch.float16),
            (4, 143, 587),
            (4, 127, 579),
            (8, 21, 64, 203, 256),
            (True, False),
            (None, "l1"),
            (1, 2),
        ),
        always=lambda dtype, q_len, k_len, head_dim, causal, scale, group: (
            (q_len, k_len) in ((4, 4), (143, 127)) and head_dim in (21, 203) and causal == (group == 2) and scale
        ),
    ),
)
def test_torch_flash_shapes(
    dtype: torch.dtype, q_len: int, k_len: int, head_dim: int, causal: bool, scale: str | None, group: int
) -> None:
    """The lengths and head dimensions on which torch tests its fused kernels of other devices, with their rule."""
    torch.manual_seed(0)
    shapes = ((4, q_len), (4 // group, k_len), (4 // group, k_len))
    tensors = [torch.randn(1, *shape, head_dim).to(dtype) for shape in shapes]
    factor = 1 / head_dim if scale == "l1" else 1 / math.sqrt(head_dim)
    allowed = torch.ones(q_len, k_len, dtype=torch.bool).tril() if causal else torch.ones(1, 1, dtype=torch.bool)

    def run(function: object, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return maskops.scaled_dot_product_attention(q, k, v, None, 0.0, causal, factor, group > 1)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, allowed[None, None], softmax_scale=factor)[0]

    assert_no_worse(run(ours, dtype), run(theirs, dtype), run(theirs, torch.float32), factor=2.0, gradient_factor=3.0)


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def assert_no_worse(
    actual: list[Tensor], low: list[Tensor], exact: list[Tensor], *, factor: float, gradient_factor: float
) -> None:
    """flash-attn's rule: the error is at most a multiple of that of plain operations in the same dtype."""
    for place, (ours, theirs, wide) in enumerate(zip(actual, low, exact, strict=True)):
        assert ours.dtype == theirs.dtype and bool(ours.isfinite().all())
        if wide.numel() == 0:
            continue
        error, plain_error = ((x.to(wide.dtype) - wide).abs().max().item() for x in (ours, theirs))
        rounding = 2 * ((wide + 0.3 - 0.3) - wide).abs().max().item() + torch.finfo(ours.dtype).eps * 1e-2
        assert error <= (factor if place == 0 else gradient_factor) * plain_error + rounding


_LENGTHS = (
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
    (2048, 2048),
)
_HEAD_DIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
_HEADS = {"mha": (6, 6), "mqa": (6, 1), "gqa": (6, 3)}


def going_round(seed: int, *lists: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    """Endless combinations in which each list is gone through in an order of its own, again and again."""
    chooser = random.Random(seed)
    rounds: list[list[object]] = [[] for _ in lists]
    while True:
        for values, rest in zip(lists, rounds, strict=True):
            if not rest:
                rest.extend(chooser.sample(values, len(values)))
        yield tuple(rest.pop() for rest in rounds)


def flash_cases(lengths: tuple[tuple[int, int], ...], seed: int) -> Iterator[tuple[object, ...]]:
    features = going_round(
        seed,
        (torch.float16, torch.bfloat16),
        tuple(_HEADS),
        (False, True),  # alibi
        (False, True),  # local
        (False, True, True),  # causal
        (0.0, 50.0),
    )
    for (q_len, k_len), head_dim in itertools.product(lengths, _HEAD_DIMS):
        yield q_len, k_len, head_dim, *next(features)


def small(q_len: int, k_len: int, head_dim: int, *_: object) -> bool:
    return q_len * k_len < 30_000 and head_dim in (32, 59, 128)


_FLASH = "q_len, k_len, head_dim, dtype, kind, alibi, local, causal, softcap"


def flash_options(
    k_len: int, batch: int, heads: int, alibi: bool, local: bool, causal: bool, softcap: float
) -> dict[str, object]:
    window = tuple(torch.randint(0, k_len, (2,)).tolist()) if local else (-1, -1)
    slopes = torch.rand(batch, heads) * 0.3 if alibi else None
    return {"causal": causal, "window_size": window, "softcap": softcap, "alibi_slopes": slopes}


@pytest.mark.parametrize(_FLASH, marked(flash_cases(_LENGTHS, 1), small))
def test_flash_attn_output(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
    alibi: bool,
    local: bool,
    causal: bool,
    softcap: float,
) -> None:
    torch.manual_seed(0)
    heads, kv_heads = _HEADS[kind] if q_len < 2048 else (2, 1)
    shapes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    tensors = [torch.randn(1, *shape, head_dim).to(dtype) for shape in shapes]
    if softcap:
        tensors[0] = tensors[0] * (softcap / 4)  # so that the cap is felt
    options = flash_options(k_len, 1, heads, alibi, local, causal, softcap)
    grad = torch.randn(1, q_len, heads, head_dim)

    def run(function: object, in_dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(in_dtype).requires_grad_() for x in tensors]
        out = function(*leaves, **options)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(in_dtype))]

    assert_no_worse(
        run(maskops.flash_attn_func, dtype),
        run(plain, dtype),
        run(plain, torch.float32),
        factor=2.0,
        gradient_factor=3.0,
    )


@pytest.mark.parametrize(_FLASH, marked(flash_cases((*_LENGTHS[:6], (1, 239), (3, 799), (799, 3), (1, 147)), 2), small))
def test_flash_attn_varlen_output(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
    alibi: bool,
    local: bool,
    causal: bool,
    softcap: float,
) -> None:
    """Sequences of random lengths up to the given ones, one of them empty; each against itself alone."""
    torch.manual_seed(0)
    heads, kv_heads = _HEADS[kind]
    lengths = [(torch.randint(0, n + 1, (3,)) if n > 20 else torch.full((3,), n)) for n in (q_len, k_len)]
    lengths[1][1] = 0
    cu_q, cu_k = (F.pad(x.cumsum(0), (1, 0)).int() for x in lengths)
    sizes = ((int(cu_q[-1]), heads), (int(cu_k[-1]), kv_heads), (int(cu_k[-1]), kv_heads))
    tensors = [torch.randn(*size, head_dim).to(dtype) for size in sizes]
    options = flash_options(k_len, 3, heads, alibi, local, causal, softcap)
    slopes = options.pop("alibi_slopes")
    grad = torch.randn(sizes[0][0], heads, head_dim)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for number in range(3):
            rows, keys = slice(cu_q[number], cu_q[number + 1]), slice(cu_k[number], cu_k[number + 1])
            if keys.start == keys.stop:
                parts.append(q[rows] * 0)
                continue
            own = None if slopes is None else slopes[number]
            parts.append(plain(q[None, rows], k[None, keys], v[None, keys], alibi_slopes=own, **options)[0][0])
        return torch.cat(parts)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return maskops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, q_len, k_len, alibi_slopes=slopes, **options)

    def run(function: object, in_dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(in_dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(in_dtype))]

    assert_no_worse(
        run(packed, dtype), run(one_by_one, dtype), run(one_by_one, torch.float32), factor=2.0, gradient_factor=3.0
    )


_CACHE_LENGTHS = (
    (1, 128),
    (1, 339),
    (3, 1024),
    (64, 800),
    (64, 256),
    (3, 799),
    (64, 2048),
    (16, 20000),
    (1, 131072),
    (16, 131072),
    (128, 128),
)


def cache_cases() -> Iterator[tuple[object, ...]]:
    features = going_round(
        3,
        (torch.float16, torch.bfloat16),
        tuple(_HEADS),
        (None, None, 256),  # size of a page
        (False, True),  # rows of the cache by index
        (False, True),  # left padding
        (0.0, 0.5, 1.0),  # share of the dimensions that is rotated
        (False, True),  # interleaved
        (False, True),  # as many new keys as queries
        (False, True),  # causal
        (False, True),  # local
        (False, True),  # alibi
        (True, True, False),  # new keys
        (1, 0),
    )
    for (q_len, k_len), head_dim, _ in itertools.product(_CACHE_LENGTHS, (59, 128), range(4)):
        yield q_len, k_len, head_dim, *next(features)


@pytest.mark.parametrize(
    "q_len, k_len, head_dim, dtype, kind, page, indexed, padded, rotary, interleaved, equal, causal, local, alibi, "
    "new, splits",
    marked(cache_cases(), lambda q_len, k_len, head_dim, *_: q_len * k_len < 20_000 and head_dim == 59),
)
def test_flash_attn_kvcache(
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
    page: int | None,
    indexed: bool,
    padded: bool,
    rotary: float,
    interleaved: bool,
    equal: bool,
    causal: bool,
    local: bool,
    alibi: bool,
    new: bool,
    splits: int,
) -> None:
    torch.manual_seed(0)
    batch, (heads, kv_heads) = 2, _HEADS[kind] if k_len < 20_000 else (2, 1)
    indexed, padded = (False, False) if page else (indexed, padded)
    k_len = -(-k_len // page) * page if page else k_len
    rows = 2 * batch if indexed else batch
    q = torch.randn(batch, q_len, heads, head_dim).to(dtype)
    caches = [torch.randn(rows, k_len, kv_heads, head_dim).to(dtype) for _ in range(2)]
    count = q_len if equal else int(torch.randint(1, q_len + 1, ()))
    fresh = [torch.randn(batch, count, kv_heads, head_dim).to(dtype) for _ in range(2)] if new else [None, None]
    low, high = (min(q_len, k_len - q_len), k_len - q_len) if new else (1, k_len)
    lengths = torch.randint(low, high + 1, (batch,)).int()
    index = torch.randperm(rows)[:batch].int() if indexed else None
    first = (torch.rand(batch) * lengths).int() if padded else None
    width = int(rotary * head_dim) // 16 * 16 if new else 0
    cos = sin = None
    if width:
        angles = torch.rand(k_len + q_len, width // 2) * 2 * math.pi
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    options = flash_options(k_len, batch, heads, alibi, local, causal, 0.0)

    given, table = [x.clone() for x in caches], None
    if page:
        table = torch.randperm(3 * batch * (k_len // page))[: batch * (k_len // page)].view(batch, -1).int()
        given = [x.new_full((3 * batch * (k_len // page), page, kv_heads, head_dim), math.nan) for x in caches]
        for pages, cache in zip(given, caches, strict=True):
            pages[table.flatten().long()] = cache.view(-1, page, kv_heads, head_dim)
    out = maskops.flash_attn_with_kvcache(
        q,
        *given,
        *fresh,
        cos,
        sin,
        lengths,
        index,
        first,
        table,
        rotary_interleaved=interleaved,
        num_splits=splits,
        **options,
    )
    slopes = options.pop("alibi_slopes")

    def turned(x: Tensor, at: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        a, b = (
            (x[..., 0:width:2], x[..., 1:width:2])
            if interleaved
            else (x[..., : width // 2], x[..., width // 2 : width])
        )
        c, s = cos[at].to(x.dtype)[:, None], sin[at].to(x.dtype)[:, None]
        a, b = a * c - b * s, a * s + b * c
        both = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return torch.cat((both, x[..., width:]), -1)

    def expected(in_dtype: torch.dtype) -> Tensor:
        parts = []
        for row in range(batch):
            held, start = int(lengths[row]), 0 if first is None else int(first[row])
            keys, values = (x[row if index is None else int(index[row]), start:held].to(in_dtype) for x in caches)
            queries = q[row].to(in_dtype)
            if new:
                moves = causal or local
                queries = turned(queries, held + torch.arange(q_len) * int(moves))
                keys = torch.cat((keys, turned(fresh[0][row].to(in_dtype), held + torch.arange(count))))
                values = torch.cat((values, fresh[1][row].to(in_dtype)))
            own = None if slopes is None else slopes[row]
            parts.append(plain(queries[None], keys[None], values[None], alibi_slopes=own, **options)[0])
        return torch.cat(parts)

    assert_no_worse([out], [expected(dtype)], [expected(torch.float32)], factor=3.0, gradient_factor=3.0)
