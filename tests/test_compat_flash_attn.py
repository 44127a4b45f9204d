"""flash-attn 2's functions: their signatures, layouts and semantics, against plain attention in float64."""

import inspect
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import maskops
from maskops.testing import error_budget, plain_attention

_OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {_OPTIONS})",
    "flash_attn_kvpacked_func": f"(q, kv, {_OPTIONS})",
    "flash_attn_qkvpacked_func": f"(qkv, {_OPTIONS})",
    "flash_attn_varlen_func": (
        f"(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_OPTIONS}, block_table=None)"
    ),
    "flash_attn_varlen_kvpacked_func": (f"(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_OPTIONS})"),
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {_OPTIONS})",
}


@pytest.fixture(autouse=True)
def _falling_back_is_fine() -> object:
    """What a backend lacks runs on the reference: the numbers are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", maskops.BackendFallbackWarning)
        yield


def allowed_and_distance(q_len: int, k_len: int, causal: bool, window_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The mask as flash-attn documents it, and |i + k_len - q_len - j|."""
    difference = torch.arange(k_len) - (torch.arange(q_len)[:, None] + k_len - q_len)
    left, right = window_size[0], 0 if causal else window_size[1]
    allowed = torch.ones(q_len, k_len, dtype=torch.bool)
    if left >= 0:
        allowed &= difference >= -left
    if right >= 0:
        allowed &= difference <= right
    return allowed, difference.abs()


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """flash-attn's meaning in plain operations: out (B, Sq, H, Dv) and lse (B, H, Sq)."""
    allowed, distance = allowed_and_distance(q.shape[1], k.shape[1], causal, window_size)
    additive = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype)
        additive = -(slopes if slopes.dim() == 2 else slopes[None])[:, :, None, None] * distance
    out, lse = plain_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        allowed[None, None],
        softmax_scale=1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        softcap=softcap,
        additive=additive,
    )
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name][1:-1]}: 0"))
    parameters = inspect.signature(getattr(maskops, name)).parameters
    assert [(x.name, x.default, x.kind) for x in parameters.values()] == [
        (x.name, x.default, x.kind) for x in expected.parameters.values()
    ]


_ARGUMENTS = {
    "plain": {},
    "scale": {"softmax_scale": 0.2},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window, causal": {"window_size": (2, 5), "causal": True},
    "right window": {"window_size": (-1, 1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])},
    "alibi of each sequence": {"alibi_slopes": torch.rand(3, 4), "causal": True, "window_size": (3, 0)},
}


def check_gradients(
    function: Callable[..., Tensor], expected: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype
) -> None:
    """Output and gradients within the error budget of plain operations in the same dtype."""
    torch.manual_seed(11)
    grad = None

    def run(of: Callable[..., Tensor], in_dtype: torch.dtype) -> list[Tensor]:
        nonlocal grad
        leaves = [x.to(dtype).to(in_dtype).detach().requires_grad_() for x in tensors]
        out = of(*leaves)
        grad = torch.randn(out.shape).to(dtype) if grad is None else grad
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(in_dtype))]

    oracle, own, actual = run(expected, torch.float64), run(expected, dtype), run(function, dtype)
    magnitude = max(float(x.abs().max()) for x in oracle)
    for ours, theirs, exact in zip(actual, own, oracle, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert error_budget(ours, theirs, exact, dtype, magnitude).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", _ARGUMENTS.values(), ids=_ARGUMENTS)
def test_padded(arguments: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    for q_len, k_len, kv_heads in ((5, 7, 2), (7, 5, 4), (1, 6, 1)):
        shapes = ((q_len, 4, 8), (k_len, kv_heads, 8), (k_len, kv_heads, 6))
        tensors = [torch.randn(3, *shape) for shape in shapes]
        check_gradients(
            lambda q, k, v: maskops.flash_attn_func(q, k, v, **arguments),
            lambda q, k, v: plain(q, k, v, **arguments)[0],
            tensors,
            dtype,
        )


CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 2, 5, 12], dtype=torch.int32)


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor:
    parts = []
    slopes = arguments.pop("alibi_slopes", None)
    for number in range(3):
        rows, keys = slice(CU_Q[number], CU_Q[number + 1]), slice(CU_K[number], CU_K[number + 1])
        if slopes is not None:
            arguments["alibi_slopes"] = slopes if slopes.dim() == 1 else slopes[number : number + 1]
        parts.append(plain(q[None, rows], k[None, keys], v[None, keys], **arguments)[0][0])
    return torch.cat((*parts, q.new_zeros(q.shape[0] - int(CU_Q[-1]), *parts[0].shape[1:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", _ARGUMENTS.values(), ids=_ARGUMENTS)
def test_packed(arguments: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(10, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 6)]
    check_gradients(
        lambda q, k, v: maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7, **arguments),
        lambda q, k, v: plain_varlen(q, k, v, **arguments),
        tensors,
        dtype,
    )


def test_tail_of_packed_tensors_reaches_nothing() -> None:
    q, k, v = torch.randn(10, 2, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 8)
    expected = maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7)
    for x, end in ((q, 8), (k, 12), (v, 12)):
        x[end:] = math.nan
    q.requires_grad_()
    out = maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7)
    assert torch.equal(out, expected) and not out[8:].any()
    out.sum().backward()
    assert q.grad is not None and not q.grad[8:].any()


def test_packed_arguments() -> None:
    qkv = torch.randn(2, 6, 3, 4, 8)
    expected = maskops.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(maskops.flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(maskops.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected)
    packed, cu_seqlens = qkv.flatten(0, 1), torch.tensor([0, 6, 12], dtype=torch.int32)
    for out in (
        maskops.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, 6, causal=True),
        maskops.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], cu_seqlens, cu_seqlens, 6, 6, causal=True),
    ):
        torch.testing.assert_close(out, expected.flatten(0, 1))


def test_outputs_are_laid_out_for_the_next_layer() -> None:
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind()
    assert maskops.flash_attn_func(q, k, v).is_contiguous()


def test_three_results() -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)
    out, lse, probabilities = maskops.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected, expected_lse = plain(q, k, v, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert probabilities.shape == (0,)
    out, lse, _ = maskops.flash_attn_varlen_func(
        torch.randn(10, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 6), CU_Q, CU_K, 5, 7, return_attn_probs=True
    )
    assert out.shape == (10, 4, 6) and lse.shape == (4, 10) and lse.dtype == torch.float32
    assert bool((lse[:, 8:] == -math.inf).all())


def test_third_result_tells_what_was_dropped() -> None:
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 6)
    torch.manual_seed(4)
    alone = maskops.flash_attn_func(q, k, v, 0.3, causal=True)
    after = torch.rand(1)
    torch.manual_seed(4)
    out, _, weights = maskops.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    assert torch.equal(out, alone) and torch.equal(torch.rand(1), after)
    assert weights.shape == (2, 4, 40, 50)
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 4, 40))
    assert 0.65 < (weights > 0).sum() / (weights != 0).sum() < 0.75
    kept = weights.clamp(min=0) / 0.7
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", kept, v.repeat_interleave(2, 2)), out)

    q, k, v = torch.randn(10, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 6)
    out, _, weights = maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7, 0.3, return_attn_probs=True)
    assert weights.shape == (3, 4, 5, 7)
    assert not weights[1].any() and not weights[0, :, 3:].any() and not weights[0, :, :, 2:].any()
    kept = weights[2].clamp(min=0) / 0.7
    torch.testing.assert_close(torch.einsum("hqk,khd->qhd", kept, v[5:12].repeat_interleave(2, 1)), out[3:8])


def test_gradient_of_the_lse() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    _, lse, _ = maskops.flash_attn_func(q, k, v, return_attn_probs=True)
    _, expected = plain(q, k, v)
    for actual, exact in zip(
        torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(actual, exact)


def paged(packed: Tensor, block_size: int, table: Tensor, blocks: int) -> Tensor:
    """Packed keys laid out in pages; whatever no sequence holds is NaN."""
    pages = torch.full((blocks, block_size, *packed.shape[1:]), math.nan)
    for number in range(3):
        for place in range(int(CU_K[number + 1] - CU_K[number])):
            pages[table[number, place // block_size], place % block_size] = packed[int(CU_K[number]) + place]
    return pages


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_paged_keys(block_size: int) -> None:
    torch.manual_seed(5)
    columns = -(-7 // block_size)
    table = torch.randperm(3 * columns, dtype=torch.int32).view(3, columns)
    q, k, v = torch.randn(8, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 6)
    expected = maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7, causal=True)
    k_pages, v_pages = (paged(x, block_size, table, 3 * columns).requires_grad_() for x in (k, v))
    out = maskops.flash_attn_varlen_func(q, k_pages, v_pages, CU_Q, CU_K, 5, 7, causal=True, block_table=table)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert bool(k_pages.grad.isfinite().all()) and not k_pages.grad[k_pages.isnan()].any()
    # A page that no sequence reaches may have any number.
    table[0, -(-2 // block_size) :] = 99
    with torch.no_grad():
        again = maskops.flash_attn_varlen_func(q, k_pages, v_pages, CU_Q, CU_K, 5, 7, causal=True, block_table=table)
    assert torch.equal(again, expected)


_Q = torch.zeros(2, 5, 4, 8)
_PACKED = {
    "q": torch.zeros(8, 4, 8),
    "k": torch.zeros(12, 2, 8),
    "v": torch.zeros(12, 2, 8),
    "cu_seqlens_q": CU_Q,
    "cu_seqlens_k": CU_K,
    "max_seqlen_q": 5,
    "max_seqlen_k": 7,
}
_PAGES = {"k": torch.zeros(6, 4, 2, 8), "v": torch.zeros(6, 4, 2, 8)}
_REFUSALS = [
    ("flash_attn_func", {"q": _Q[0]}, ValueError, r"q has shape \(5, 4, 8\): expected 4 dimensions, \(batch, length"),
    ("flash_attn_func", {"k": None}, TypeError, r"k: expected a tensor \(batch, length, heads, head_dim\), got None"),
    ("flash_attn_func", {"window_size": 3}, ValueError, r"window_size is 3: expected \(left, right\)"),
    ("flash_attn_func", {"window_size": (0.5, 1)}, TypeError, r"window_size is \(0.5, 1\): expected two ints"),
    ("flash_attn_func", {"softcap": "1"}, TypeError, "softcap is a str: expected a float"),
    (
        "flash_attn_func",
        {"alibi_slopes": torch.zeros(3)},
        ValueError,
        r"alibi_slopes has shape \(3,\): expected \(4,\)",
    ),
    ("flash_attn_func", {"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0: expected a probability in \[0, 1\)"),
    ("flash_attn_func", {"softmax_scale": math.nan}, ValueError, "softmax_scale is nan: expected a finite number"),
    ("flash_attn_kvpacked_func", {"kv": _Q}, ValueError, r"kv has shape \(2, 5, 4, 8\): expected 5 dimensions"),
    ("flash_attn_qkvpacked_func", {"qkv": torch.zeros(2, 5, 2, 4, 8)}, ValueError, r"qkv .*\(batch, length, 3, heads"),
    ("flash_attn_varlen_qkvpacked_func", {"cu_seqlens": None}, TypeError, "cu_seqlens: expected a tensor"),
    ("flash_attn_varlen_func", {"cu_seqlens_k": None}, TypeError, r"cu_seqlens_k: expected a tensor \(batch \+ 1,\)"),
    ("flash_attn_varlen_func", {"cu_seqlens_q": CU_Q.flip(0)}, ValueError, "cu_seqlens_q"),
    ("flash_attn_varlen_func", {"q": _Q}, ValueError, r"q has shape .*: expected 3 dimensions, \(total_q, heads"),
    (
        "flash_attn_varlen_func",
        {"block_table": torch.zeros(3, 2, dtype=torch.int32)},
        ValueError,
        r"k has shape \(12, 2, 8\): expected 4 dimensions, .* because block_table is given",
    ),
    (
        "flash_attn_varlen_func",
        _PAGES | {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
        ValueError,
        "block_table has 1 blocks of 4 keys for sequence 2, whose length is 7",
    ),
    (
        "flash_attn_varlen_func",
        _PAGES | {"block_table": torch.tensor([[0, 0], [6, 0], [0, 0]])},
        ValueError,
        r"block_table\[1, 0\]=6: expected 0 to 5, k has 6 blocks",
    ),
    (
        "flash_attn_varlen_func",
        _PAGES | {"block_table": torch.zeros(2, 2, dtype=torch.int32)},
        ValueError,
        r"block_table has shape \(2, 2\): expected \(batch, blocks of a sequence\), with batch 3",
    ),
    (
        "flash_attn_varlen_func",
        _PAGES | {"block_table": torch.zeros(3, 2)},
        TypeError,
        "block_table is torch.float32: expected int32 or int64",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), _REFUSALS)
def test_refusals(name: str, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults = {
        "flash_attn_func": {"q": _Q, "k": _Q, "v": _Q},
        "flash_attn_kvpacked_func": {"q": _Q},
        "flash_attn_qkvpacked_func": {},
        "flash_attn_varlen_qkvpacked_func": {"qkv": torch.zeros(8, 3, 4, 8), "max_seqlen": 5},
        "flash_attn_varlen_func": _PACKED,
    }[name]
    with pytest.raises(error, match=message):
        getattr(maskops, name)(**(defaults | arguments))


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(8, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 6)
    function = torch.compile(
        lambda *x: maskops.flash_attn_varlen_func(*x, 5, 7, causal=True, window_size=(3, 0)),
        fullgraph=True,
        backend="eager",
    )
    expected = maskops.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 7, causal=True, window_size=(3, 0))
    torch.testing.assert_close(function(q, k, v, CU_Q, CU_K), expected)
