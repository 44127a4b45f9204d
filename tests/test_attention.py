"""Span attention: every backend on every case of the testing kit, and what the kit does not say."""

import ctypes
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import extension, masks, testing
from maskops.ops.attention.registration import Features, filled, operator_arguments
from tests.served import AT_HOME, DEVICE, kernels_here

pytestmark = pytest.mark.devices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = testing.cases("attention", features=True)


@pytest.fixture(params=AT_HOME)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs here."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", AT_HOME)
def test_case(backend: str, case: testing.Case, dtype: torch.dtype) -> None:
    case = case.with_dtype(dtype)
    if reasons := testing.refusals(backend, case, DEVICE):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    # What a mask means does not depend on the dtype, so the mask is read out once.
    parts = testing.PARTS if dtype == torch.float32 else ("numbers", "poison")
    report = testing.check(testing.attention_on(backend, case), case, parts=parts, device=DEVICE)
    assert report.is_differentiable
    report.raise_if_failed()


@pytest.mark.parametrize("backend", AT_HOME)
def test_backend_is_not_merely_skipped(backend: str) -> None:
    served = sum(not testing.refusals(backend, case.with_dtype(dtype), DEVICE) for case in CASES for dtype in DTYPES)
    expected = 3 * len(CASES)
    assert served >= expected, f"{backend} serves {served} cases here: {maskops.backends()[backend]}"


@pytest.mark.processor
@pytest.mark.parametrize(
    "name", ["causal", "first tokens and window", "documents with a tail", "wide values", "softcap"]
)
def test_instruction_sets(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    before = extension.instruction_set()
    assert before is not None, maskops.backends()["cpu"]
    try:
        for instruction_set in extension.instruction_sets():
            extension.select_instruction_set(instruction_set)
            for dtype in DTYPES:
                report = testing.check(testing.attention_on("cpu", case), case.with_dtype(dtype), parts=("numbers",))
                assert report.passed, f"{instruction_set}: {report}"
    finally:
        extension.select_instruction_set(before)


@pytest.mark.processor
def test_memory_of_the_extension_is_poisoned() -> None:
    """The suite sees unwritten outputs only as long as new memory holds NaN, however it is allocated."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    for elements in (100, 1_000_000):
        used = torch.full((elements,), 7.0)
        del used
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        handle, data = ctypes.c_void_p(), ctypes.c_void_p()
        sizes, strides = (ctypes.c_int64 * 1)(elements), (ctypes.c_int64 * 1)(1)
        library.aoti_torch_empty_strided(ctypes.c_int64(1), sizes, strides, 6, 0, 0, ctypes.byref(handle))
        library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
        values = (ctypes.c_float * elements).from_address(data.value or 0)
        assert all(math.isnan(value) for value in values[:50])
        library.aoti_torch_delete_tensor_object(handle)


PATTERNS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.sliding_window(3, 1),
    "left window": masks.causal() & masks.sliding_window(2, None),
    "prefix": masks.causal() | masks.prefix(2),
    "chunked": masks.chunked(3),
    "two spans": masks.causal() & (masks.sliding_window(2, 0) | masks.prefix(2)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_realised_masks_exhaustively(backend: str, pattern: str) -> None:
    """All small shapes, and those around the sizes of tiles: weights are 1/n where the mask allows, else 0."""
    mask = PATTERNS[pattern]
    small = [(q_len, k_len) for q_len in range(1, 8) for k_len in range(1, 8)]
    edges = [(q_len, k_len) for q_len in (1, 127, 130) for k_len in (63, 65, 129, 200)]
    for q_len, k_len in small + edges:
        q, k = torch.zeros(2, 1, q_len, 3), torch.zeros(2, 1, k_len, 3)
        lengths = torch.tensor([k_len, k_len // 2])
        layouts = [masks.full(), masks.key_padding(lengths)]
        if q_len == k_len:
            layouts += [masks.padding(lengths), masks.padding(lengths, side="left")]
            layouts.append(masks.documents(torch.arange(k_len) // 4))
        for layout in layouts:
            described = layout & mask
            allowed = described.to_dense(q_len, k_len, batch=2)
            v = torch.eye(k_len).expand(2, 1, k_len, k_len)
            weights = maskops.attention(q, k, v, described, backend=backend)
            expected = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
            assert torch.equal(weights != 0, allowed), (described, q_len, k_len)
            assert torch.allclose(weights, expected, rtol=1e-6, atol=0.0), (described, q_len, k_len)


def forward_backward(q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask, backend: str) -> list[Tensor]:
    out, lse = maskops.attention(q, k, v, mask, return_lse=True, backend=backend)
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out).cumsum(2), torch.ones_like(lse)))
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.processor
@pytest.mark.parametrize("long", [5, 9, 17])
def test_documents_that_pad_vectors_most(long: int) -> None:
    """One row, then a vector and a row: nothing leaves more lanes of the CPU's vectors unused."""
    cu_seqlens = torch.tensor([0] + [1, long] * 30).cumsum(0)
    total = int(cu_seqlens[-1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, total, 7, generator=generator).requires_grad_() for _ in range(3))
    mask = masks.documents(cu_seqlens=cu_seqlens)
    expected = forward_backward(q, k, v, mask, "reference")
    in_use = extension.instruction_set()
    for name in extension.instruction_sets():
        extension.select_instruction_set(name)
        try:
            results = forward_backward(q, k, v, mask, "cpu")
        finally:
            extension.select_instruction_set(str(in_use))
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 48])
def test_results_are_rounded_to_nearest(width: int, dtype: torch.dtype) -> None:
    """The mean of the values of two keys with equal scores is exact in float32, so it has one right rounding."""
    v = torch.randn(1, 1, 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k = torch.zeros(1, 1, 40, 4, dtype=dtype), torch.zeros(1, 1, 2, 4, dtype=dtype)
    expected = v.float().mean(2, keepdim=True).to(dtype).expand(1, 1, 40, width)
    for backend in kernels_here():
        assert torch.equal(maskops.attention(q, k, v, backend=backend), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_at_every_offset_of_a_window(side: str) -> None:
    """Kernels run the keys that a whole tile sees without mask code; here that range takes every offset in a tile."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 200, 4, generator=generator).requires_grad_() for _ in range(3))
    for width in range(66):
        mask = masks.sliding_window(width, None) if side == "left" else masks.sliding_window(None, width)
        expected = forward_backward(q, k, v, mask, "reference")
        for backend in kernels_here():
            for ours, theirs in zip(forward_backward(q, k, v, mask, backend), expected, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (width, backend)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "mask"),
    [
        (1, 1, 1, 700, masks.causal()),
        (1, 2, 1, 600, masks.documents(cu_seqlens=torch.tensor([0, 300, 301, 430, 600])) & masks.causal()),
        (3, 4, 2, 130, masks.padding(torch.tensor([130, 7, 65]))),
    ],
    ids=["one head", "packed", "padded"],
)
def test_same_bits_with_any_number_of_threads(
    batch: int, heads: int, kv_heads: int, length: int, mask: masks.Mask, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, length, 32, generator=generator).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    results = {}
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results[threads] = forward_backward(q, k, v, mask, kernels_here()[0])
    finally:
        torch.set_num_threads(1)
    for threads, result in results.items():
        for name, one, many in zip(("out", "lse", "dq", "dk", "dv"), results[1], result, strict=True):
            assert torch.equal(one, many), f"{name} with {threads} threads"


class RecordedOperators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_strided_views_come_back_in_their_order(backend: str) -> None:
    fused = torch.randn(2, 11, 3, 4, 8)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    out = maskops.attention(q, k, v, masks.causal(), backend=backend)
    assert out.stride() == (11 * 32, 8, 32, 1)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    expected = maskops.attention(*(x.contiguous() for x in (q, k, v)), masks.causal(), backend=backend)
    assert expected.is_contiguous()
    assert torch.allclose(out, expected, atol=1e-6)

    # An expanded head: a stride of 0 counts as the largest, so heads lie outermost.
    expanded = torch.randn(2, 1, 11, 8).expand(2, 4, 11, 8)
    out = maskops.attention(expanded, k, v, backend=backend)
    assert out.stride() == (11 * 8, 2 * 11 * 8, 8, 1)
    assert torch.allclose(out, maskops.attention(expanded.contiguous(), k, v, backend=backend), atol=1e-6)

    # A last dimension that is not contiguous.
    columns = torch.randn(2, 4, 8, 11).transpose(2, 3)
    out = maskops.attention(columns, k, v, backend=backend)
    assert torch.allclose(out, maskops.attention(columns.contiguous(), k, v, backend=backend), atol=1e-6)


def test_kernels_take_views_without_a_copy() -> None:
    fused = torch.randn(2, 11, 3, 4, 8, requires_grad=True)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    plan = masks.causal().spans(11, 11, batch=2, grad=False)
    for backend in kernels_here():
        with RecordedOperators() as recorded:
            out = maskops.attention(q, k, v, plan, backend=backend)
        assert recorded.names == ["attention_forward", "detach", "detach"] or recorded.names == ["attention_forward"]
        with RecordedOperators() as recorded:
            torch.autograd.grad(out, (q, k, v), torch.ones(2, 11, 4, 8).transpose(1, 2))
        assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(recorded.names), recorded.names


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "k_len"),
    [(0, 2, 1, 5, 5), (2, 0, 0, 5, 5), (2, 2, 1, 0, 5), (2, 2, 1, 5, 0), (2, 2, 1, 0, 0)],
)
def test_empty(backend: str, batch: int, heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
    q = torch.randn(batch, heads, q_len, 4, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, k_len, 4, requires_grad=True) for _ in range(2))
    out, lse = maskops.attention(q, k, v, masks.causal(), return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -math.inf).all()
    for x, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.full_like(out, math.nan)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 0, 5, 0, 0], [1, 1, 1]])
def test_packed_equals_separate(backend: str, lengths: list[int]) -> None:
    total = sum(lengths) + 2
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(total, 4, 8, requires_grad=True)
    k, v = (torch.randn(total, 2, 8, requires_grad=True) for _ in range(2))
    out, lse = maskops.varlen_attention(q, k, v, offsets, mask=masks.causal(), return_lse=True, backend=backend)
    assert out.shape == (total, 4, 8) and out.is_contiguous() and lse.shape == (4, total)
    grads = torch.autograd.grad(out.sum(), (q, k, v))

    expected = torch.zeros_like(out) + 0.0 * (q.sum() + k.sum() + v.sum())
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        rows = slice(begin, begin + length)
        part = maskops.attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), masks.causal(), backend="reference"
        )
        expected[rows] = part[0].transpose(0, 1)
    assert torch.allclose(out, expected, atol=1e-6)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.allclose(grad, wanted, atol=1e-5)
    assert (lse[:, sum(lengths) :] == -math.inf).all()

    plan = (masks.documents(cu_seqlens=offsets) & masks.causal()).spans(total, total)
    again = maskops.varlen_attention(q, k, v, mask=plan, backend=backend)
    assert torch.equal(again, out)
    # Offsets padded with their last value describe the same sequences.
    padded = torch.cat([offsets, offsets[-1:].expand(3)])
    assert torch.equal(maskops.varlen_attention(q, k, v, padded, mask=masks.causal(), backend=backend), out)


def test_other_offsets_for_keys(backend: str) -> None:
    q, k, v = torch.randn(5, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 3)
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 6, 9])
    out = maskops.varlen_attention(q, k, v, cu_q, cu_k, backend=backend)
    first, last = (
        maskops.attention(*(x[rows].transpose(0, 1)[None] for x, rows in parts), backend="reference")
        for parts in (
            ((q, slice(0, 2)), (k, slice(0, 4)), (v, slice(0, 4))),
            ((q, slice(2, 5)), (k, slice(6, 9)), (v, slice(6, 9))),
        )
    )
    assert torch.allclose(out, torch.cat([first, last], 2)[0].transpose(0, 1), atol=1e-6)


def test_non_finite_values_stay_in_their_document(backend: str) -> None:
    """Both documents fill tiles of their own, so not even a tile is shared."""
    x = torch.randn(1, 2, 400, 8)
    mask = masks.documents(cu_seqlens=torch.tensor([0, 200, 400]))
    clean = maskops.attention(x, x, x, mask, backend=backend)
    x = x.clone()
    x[:, :, 250] = math.inf
    x.requires_grad_()
    out = maskops.attention(x, x, x, mask, backend=backend)
    assert torch.equal(out[:, :, :200], clean[:, :, :200])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[:, :, :200].isfinite().all() and not grad[:, :, 200:].isfinite().all()


@pytest.mark.processor
@pytest.mark.parametrize("lengths", [[1, 2, 3, 5, 7, 6, 16, 4], [3] * 12, [9, 20, 2, 33]])
def test_non_finite_values_stay_in_their_document_of_a_vector(lengths: list[int]) -> None:
    """Short documents share a vector of the CPU kernels, and their weights for each other's values are 0."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(cu_seqlens[-1]), 2, 24, generator=generator)
    in_use = extension.instruction_set()
    for name in extension.instruction_sets():
        extension.select_instruction_set(name)
        try:
            clean = maskops.varlen_attention(x, x, x, cu_seqlens, backend="cpu")
            for first, last in itertools.pairwise(cu_seqlens.tolist()):
                spoiled = x.clone()
                spoiled[first:last] = math.nan
                out = maskops.varlen_attention(spoiled, spoiled, spoiled, cu_seqlens, backend="cpu")
                others = torch.ones(len(x), dtype=torch.bool)
                others[first:last] = False
                assert torch.equal(out[others], clean[others]), name
                assert out[first:last].isnan().all(), name
        finally:
            extension.select_instruction_set(str(in_use))


@pytest.mark.processor
@pytest.mark.parametrize("lengths", [[3] * 12, [3, 5, 4, 9], [20, 3, 2, 70, 4]])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradients_that_are_not_finite_stay_in_their_document_of_a_vector(
    lengths: list[int], mask: masks.Mask | None, softcap: float
) -> None:
    """Whichever of the inputs holds them."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(int(cu_seqlens[-1]), heads, 24, generator=generator) for heads in (2, 1, 1, 2)]

    def gradients(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        out = maskops.varlen_attention(q, k, v, cu_seqlens, mask=mask, softcap=softcap, backend="cpu")
        return torch.autograd.grad(out, (q, k, v), grad_out)

    in_use = extension.instruction_set()
    for name in extension.instruction_sets():
        extension.select_instruction_set(name)
        try:
            clean = gradients(*inputs)
            for (first, last), at, value in itertools.product(
                itertools.pairwise(cu_seqlens.tolist()), range(4), (math.nan, math.inf)
            ):
                spoiled = [x.clone() for x in inputs]
                spoiled[at][first:last] = value
                others = torch.ones(len(inputs[0]), dtype=torch.bool)
                others[first:last] = False
                found = gradients(*spoiled)
                assert all(torch.equal(x[others], y[others]) for x, y in zip(found, clean, strict=True)), (name, at)
                assert any(not x[first:last].isfinite().all() for x in found), (name, at)
        finally:
            extension.select_instruction_set(str(in_use))


def test_each_output_alone_has_its_gradient(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    out, lse = maskops.attention(q, k, v, masks.causal(), return_lse=True, backend=backend)
    scores = (q @ k.transpose(2, 3) / 2.0).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
    for actual, expected in ((lse, scores.logsumexp(-1)), (out, scores.softmax(-1) @ v)):
        weights = torch.randn_like(expected)
        grads = torch.autograd.grad(actual, (q, k, v), weights, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(expected, (q, k, v), weights, retain_graph=True, allow_unused=True)
        for grad, want in zip(grads, wanted, strict=True):
            assert torch.allclose(
                torch.zeros(1) if grad is None else grad, torch.zeros(1) if want is None else want, atol=1e-6
            )


def test_one_tensor_in_all_roles(backend: str) -> None:
    x = torch.randn(1, 2, 9, 4, requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    (grad,) = torch.autograd.grad(maskops.attention(x, x, x, masks.causal(), backend=backend).sum(), x)
    grads = torch.autograd.grad(maskops.attention(*copies, masks.causal(), backend=backend).sum(), copies)
    assert torch.allclose(grad, torch.stack(grads).sum(0), atol=1e-6)


def test_plan_is_the_mask(backend: str) -> None:
    q, k, v = (torch.randn(3, 2, 20, 4) for _ in range(3))
    for mask in (masks.causal(), masks.padding(torch.tensor([20, 0, 7]))):
        plan = mask.spans(20, 20)
        expected = maskops.attention(q, k, v, mask, backend=backend)
        assert torch.equal(maskops.attention(q, k, v, plan, backend=backend), expected)


def test_autocast(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = maskops.attention(q, k.bfloat16(), v, return_lse=True, backend=backend)
        assert maskops.attention(*(x.double() for x in (q, k, v)), backend="reference").dtype == torch.float64
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = maskops.attention(*(x.bfloat16() for x in (q, k, v)), backend=backend)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("backend", AT_HOME)
@pytest.mark.parametrize("size", [(0, 2, 8, 5), (2, 2, 8, 0)])
def test_empty_views_of_any_stride(backend: str, size: tuple[int, ...]) -> None:
    """contiguous() leaves them as they are, for there is nothing to copy."""
    q = torch.randn(size).transpose(2, 3).requires_grad_()
    out = maskops.attention(q, q, q, backend=backend)
    (grad,) = torch.autograd.grad(out, q, torch.randn(size).transpose(2, 3))
    assert out.shape == grad.shape == q.shape


@pytest.mark.processor
def test_strides_that_the_kernel_cannot_read_are_named() -> None:
    q = torch.randn(1, 2, 5, 8)
    spans = masks.full().spans(5, 5)
    plan = filled(operator_arguments(spans, Features(), "cpu"), q)
    out, lse = torch.ops.maskops.attention_forward(q, q, q, *plan)
    for grad_out, text in (
        (torch.randn(1, 2, 8, 5).transpose(2, 3), "the last dimension of out and its gradient must be contiguous"),
        (torch.randn(1, 2, 5, 7), "out and its gradient must have the shape and dtype of the output"),
    ):
        arguments = (grad_out, torch.empty(0), q, q, q, out, lse, *plan, False, False, False)
        with pytest.raises(ValueError, match=text):
            torch.ops.maskops.attention_backward(*arguments)


@pytest.mark.processor
@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_meta_tensors_get_shapes_and_strides(backend: str | None) -> None:
    q, k, v = (torch.randn(2, 7, heads, dim).transpose(1, 2) for heads, dim in ((4, 8), (2, 8), (2, 3)))
    lengths = torch.tensor([7, 3])
    eager = maskops.attention(q, k, v, masks.padding(lengths) & masks.causal(), return_lse=True)
    leaves = [x.to("meta").requires_grad_() for x in (q, k, v)]
    assert leaves[0].stride() == q.stride()
    mask = masks.padding(lengths.to("meta")) & masks.causal()
    outputs = maskops.attention(*leaves, mask, return_lse=True, backend=backend)
    for x, expected in zip(outputs, eager, strict=True):
        assert x.is_meta and x.shape == expected.shape and x.dtype == expected.dtype
        assert x.stride() == expected.stride()
    grads = torch.autograd.grad(outputs[0].sum(), leaves)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    x, offsets = torch.empty(7, 4, 8, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    assert maskops.varlen_attention(x, x, x, offsets, backend=backend).shape == x.shape


def test_scale() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    for backend in ["reference", *kernels_here()]:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)
        assert torch.allclose(maskops.attention(q, k, v, softmax_scale=0.7, backend=backend), expected, atol=1e-6)


def test_no_double_backward_in_a_kernel() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    for backend in kernels_here():
        (grad,) = torch.autograd.grad(maskops.attention(q, k, v, backend=backend).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no double backward in a kernel.*backend='reference'"):
            grad.sum().backward()
    (grad,) = torch.autograd.grad(maskops.attention(q, k, v, backend="reference").sum(), q, create_graph=True)
    grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp loads its decompositions
def test_function_transforms(backend: str) -> None:
    x = torch.randn(2, 2, 9, 4)

    def loss(x: Tensor) -> Tensor:
        return maskops.attention(x, x, x, masks.causal(), backend=backend).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(x), expected, atol=1e-6)
    if backend == "reference":
        _, tangent = torch.func.jvp(loss, (x,), (x,))
        assert torch.allclose(tangent, (expected * x).sum(), rtol=1e-4)
    else:
        # Never a tangent of 0 that nobody computed.
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            torch.func.jvp(loss, (x,), (x,))


def test_checkpointing(backend: str) -> None:
    plan = masks.causal().spans(9, 9)
    x = torch.randn(1, 2, 9, 4, requires_grad=True)

    def layer(x: Tensor, plan: maskops.RowSpans) -> Tensor:
        return maskops.attention(x, x, x, plan, backend=backend)

    (expected,) = torch.autograd.grad(layer(x, plan).sum(), x)
    out = torch.utils.checkpoint.checkpoint(layer, x, plan, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, expected)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.processor
def test_gradients_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = draw(2, 2, 4, 2), draw(2, 1, 5, 2), draw(2, 1, 5, 1)
    bias, slopes, sinks = draw(1, 2, 4, 5), draw(2, 2), draw(2)
    mask = masks.causal() & masks.key_padding(torch.tensor([5, 2]))

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, bias, slopes, sinks = args
        out, lse = maskops.attention(
            q,
            k,
            v,
            mask,
            bias=bias,
            alibi_slopes=slopes,
            sinks=sinks,
            softcap=2.0,
            return_lse=True,
            backend="reference",
        )
        # An empty row's lse is -inf, which no difference quotient can use.
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, slopes, sinks))
    # Fast mode: one random direction instead of every pair of elements.
    assert torch.autograd.gradgradcheck(lambda *args: run(*args)[0], (q, k, v, bias, slopes, sinks), fast_mode=True)


def test_reference_under_fake_tensors() -> None:
    """No value is read: the whole path runs without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.randn(2, 9, 4, 8).transpose(1, 2)
        for backend in ["reference", *kernels_here()]:
            mask = masks.padding(torch.ones(2, dtype=torch.int64)) & masks.causal()
            out, lse = maskops.attention(q, q[:, :2], q[:, :2], mask, return_lse=True, backend=backend)
            assert out.shape == (2, 4, 9, 8) and out.stride() == (288, 8, 32, 1) and lse.shape == (2, 4, 9)
        out = maskops.attention(q, q, q, dropout_p=0.5, alibi_slopes=torch.ones(4), backend="reference")
        assert out.shape == (2, 4, 9, 8)
