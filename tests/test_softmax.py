"""maskops.masked_softmax against its definition in float64, on every backend."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import extension, masks
from maskops.spans import build_row_spans
from tests.served import AT_HOME, each_of
from tests.softmax_oracle import (
    DTYPES,
    HOLES,
    INF,
    LENGTHS,
    NAN,
    check,
    coins,
    definition,
    gradient_of,
    needs_extension,
    noise,
    strided,
)

pytestmark = pytest.mark.devices

backend = each_of(AT_HOME)


# ---- bool masks -----------------------------------------------------------------------------------------------------

# Ragged and whole groups of every instruction set, along the softmax and across it.
SHAPES = ((1,), (5,), (64,), (3, 7), (2, 33), (2, 3, 17), (2, 130, 3), (3, 5, 70), (2, 1, 9, 1), (2, 2, 3, 2, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dimension(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for dim in range(len(shape)):
        check(noise(*shape, seed=dim).to(dtype), (mask := coins(*shape, seed=dim)), mask, dim)
        check(noise(*shape, seed=dim).to(dtype), None, torch.tensor(True), dim - len(shape))


def test_every_broadcast_of_small_shapes(backend: str) -> None:
    count = 0
    for n_dims in (0, 1, 2, 3):
        for shape in itertools.product((1, 3), repeat=n_dims):
            for taken in range(n_dims + 1):
                for sizes in itertools.product((1, 2, 3), repeat=taken):
                    mask, x = coins(*sizes, seed=count), noise(*shape, seed=count)
                    try:
                        allowed = mask.expand(shape)
                    except RuntimeError:
                        with pytest.raises(ValueError, match="must broadcast to x without enlarging it"):
                            maskops.masked_softmax(x, mask)
                        continue
                    for dim in range(max(n_dims, 1)):
                        weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True)
                        at_least_1d = x.reshape(shape or (1,)).double()
                        oracle, oracle_lse = definition(at_least_1d, allowed.reshape(at_least_1d.shape), dim)
                        assert torch.allclose(weights.double(), oracle.reshape(shape), atol=1e-6)
                        assert torch.allclose(lse.double(), oracle_lse, atol=1e-5)
                        count += 1
    assert count > 150


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_integers_count_as_bool(backend: str, dtype: torch.dtype) -> None:
    mask = coins(2, 1, 1, 9)
    check(noise(2, 3, 4, 9), mask.to(dtype), mask)


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "outer dimensions swapped",
        "every second element",
        "rows with a gap",
        "expanded",
        "expanded along the row",
        "mask transposed",
        "mask with gaps",
        "mask expanded over rows",
        "mask expanded along rows",
        "mask of one row",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend: str, kind: str, dtype: torch.dtype) -> None:
    x, mask = strided(kind)
    if dtype != x.dtype:
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if "expanded" not in kind else x.to(dtype)
    for dim in range(3):
        check(x, mask, mask, dim)


@pytest.mark.processor
def test_strides_of_the_operator() -> None:
    """The kernel walks any strides; the public function copies some of them first, for speed."""
    needs_extension()
    absent = torch.empty(0, dtype=torch.int32)
    x, mask = noise(40, 6, 4).permute(2, 1, 0), coins(80, 6, 4)[::2].permute(2, 1, 0)
    for dim in range(3):
        weights, lse = torch.ops.maskops.masked_softmax_forward(x, mask, absent, absent, absent, dim, True)
        oracle, oracle_lse = definition(x.double(), mask, dim)
        assert torch.allclose(weights.double(), oracle, atol=1e-6) and torch.allclose(lse.double(), oracle_lse)
        grad_weights = noise(40, 12, 4, seed=3)[:, ::2].permute(2, 1, 0)
        grad = torch.ops.maskops.masked_softmax_backward(
            grad_weights, torch.empty(0), weights, absent, absent, absent, dim
        )
        expected = gradient_of(oracle, grad_weights.double(), torch.zeros_like(oracle_lse), dim)
        assert torch.allclose(grad.double(), expected, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest bool tensor that any operation made, in bytes of its storage."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bool:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.processor
def test_broadcast_mask_is_not_materialised() -> None:
    needs_extension()
    x, mask = noise(4, 3, 20, 30).requires_grad_(), coins(4, 1, 1, 30)
    for given in (mask, mask.to(torch.uint8), mask.expand(4, 3, 20, 30)):
        with Largest() as largest:
            maskops.masked_softmax(x, given, backend="cpu").sum().backward()
        assert 0 < largest.nbytes <= mask.numel()


# ---- masks of queries and keys --------------------------------------------------------------------------------------

MASKS: dict[str, masks.Mask] = {
    "full": masks.full(),
    "causal": masks.causal(),
    "padding and causal": masks.padding(LENGTHS) & masks.causal(),
    "padding on the left": masks.padding(LENGTHS, side="left"),
    "padding with holes": masks.padding(HOLES) & masks.causal(),
    "keys with holes": masks.key_padding(HOLES),
    "no keys": masks.key_padding(torch.tensor([70, 0])),
    "first tokens and window": masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(4)) & masks.padding(HOLES),
    "documents": masks.documents(torch.tensor([0] * 20 + [-1] * 3 + [1] * 47)) & masks.causal(),
    "dense": masks.dense(coins(2, 3, 70, 70)),
    "dense and padding": masks.dense(coins(1, 1, 70, 70)) & masks.padding(LENGTHS),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(backend: str, name: str) -> None:
    mask = MASKS[name]
    x, allowed = noise(2, 3, 70, 70), mask.to_dense(70, 70, batch=2)
    check(x, mask, allowed)
    check(x.bfloat16(), mask.spans(70, 70), allowed)
    for dim in (0, 1, 2):
        check(x, mask, allowed, dim)


def test_shapes_of_scores(backend: str) -> None:
    mask = masks.padding(torch.tensor([6, 4])) & masks.causal()
    allowed = mask.to_dense(6, 6)
    check(noise(2, 6, 6), mask, allowed[:, 0])
    check(noise(2, 3, 4, 6, 6), mask, allowed[:, :, None])
    check(noise(6, 6), masks.causal(), masks.causal().to_dense(6, 6)[0, 0])
    check(noise(3, 2, 6), masks.causal(), masks.causal().to_dense(2, 6)[0])
    dense = masks.dense(coins(2, 3, 6, 6))
    check(noise(2, 3, 4, 6, 6), dense, dense.to_dense(6, 6)[:, :, None])
    packed = masks.documents(cu_seqlens=torch.tensor([0, 2, 5]))
    check(noise(3, 6, 6), packed, packed.to_dense(6, 6)[0])
    check(noise(1, 3, 6, 6), packed, packed.to_dense(6, 6))
    # Rows whose elements are apart in memory.
    check(noise(2, 6, 12)[..., ::2], mask, allowed[:, 0])
    check(noise(6, 2, 6).permute(1, 2, 0), mask, allowed[:, 0])


def test_empty_tensors(backend: str) -> None:
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        for dim in range(len(shape)):
            x = torch.empty(shape, requires_grad=True)
            weights, lse = maskops.masked_softmax(x, torch.tensor(True), dim, return_lse=True)
            assert weights.shape == shape and weights.is_contiguous()
            assert lse.tolist() == torch.logsumexp(x, dim).tolist()
            weights.sum().backward()
            assert x.grad is not None and x.grad.shape == shape
    weights = maskops.masked_softmax(torch.empty(2, 3, 0, 5), masks.causal())
    assert weights.shape == (2, 3, 0, 5)
    assert maskops.masked_softmax(torch.tensor(3.0), None).tolist() == 1.0


@pytest.mark.processor
def test_hostile_spans_stay_inside() -> None:
    """Spans that a user made by hand: crossing, out of range, far apart. No access leaves the rows."""
    needs_extension()
    generator = torch.Generator().manual_seed(0)
    plan = masks.full().spans(40, 70)
    x = noise(2, 40, 70)
    for _ in range(20):
        start, end = (torch.randint(-100, 200, (3, 1, 40), dtype=torch.int32, generator=generator) for _ in range(2))
        start[0, 0, 0], end[0, 0, 0] = -(2**31), 2**31 - 1
        weights = maskops.masked_softmax(x, plan._replace(start=start, end=end), backend="cpu")
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
        assert (total[:, 0] > 0).all()


# ---- what masked and special values do ------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_masked_values_reach_nothing(backend: str, dim: int, poison: float) -> None:
    mask = coins(5, 9, 70)
    mask[1], mask[:, 2], mask[:, :, 3] = False, False, False
    x, grad_weights = noise(5, 9, 70), noise(5, 9, 70, seed=1)
    clean, dirty = x.clone().requires_grad_(), x.masked_fill(~mask, poison).requires_grad_()
    expected = maskops.masked_softmax(clean, mask, dim, return_lse=True)
    actual = maskops.masked_softmax(dirty, mask, dim, return_lse=True)
    nothing = ~mask.any(dim)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert (actual[1][nothing] == -INF).all()
    grad_lse = noise(*nothing.shape, seed=2)
    (grad,) = torch.autograd.grad(expected, clean, (grad_weights, grad_lse))
    poisoned = (grad_weights.masked_fill(~mask, poison), grad_lse.masked_fill(nothing, poison))
    (dirty_grad,) = torch.autograd.grad(actual, dirty, poisoned)
    assert torch.equal(grad, dirty_grad) and not grad[~mask].any()


def test_masked_values_under_spans(backend: str) -> None:
    mask = masks.padding(HOLES) & masks.causal()
    allowed = mask.to_dense(70, 70)[:, 0]
    x = noise(2, 70, 70).masked_fill(~allowed, NAN).requires_grad_()
    weights = maskops.masked_softmax(x, mask)
    assert torch.equal(weights != 0, allowed)
    (grad,) = torch.autograd.grad(weights, x, noise(2, 70, 70, seed=1).masked_fill(~allowed, NAN))
    assert grad.isfinite().all() and not grad[~allowed].any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [5, 70, 40000])
def test_infinite_and_nan_scores(backend: str, length: int, dim: int) -> None:
    rows = noise(6, length)
    rows[0] = -INF  # like nothing visible
    rows[1, 1:] = -INF
    rows[2, 3] = INF
    rows[3, 3] = NAN
    rows[4, 2], rows[4, 4] = INF, NAN
    mask = torch.ones(6, length, dtype=torch.bool)
    mask[:, 1] = False
    mask[5], rows[5, 0] = False, NAN
    x, mask = (rows, mask) if dim == 1 else (rows.T.contiguous(), mask.T)
    x.requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True)
    (grad,) = torch.autograd.grad(weights, x, torch.ones_like(weights))
    weights, grad, mask = (t if dim == 1 else t.T for t in (weights.detach(), grad, mask))
    assert not weights[~mask].any() and not grad[~mask].any()
    assert not weights[[0, 5]].any() and not grad[[0, 5]].any()
    assert weights[1, 0] == 1 and not weights[1, 1:].any()
    torch_weights = torch.softmax(rows[2:5, mask[2]], -1)
    assert torch_weights.isnan().all() and weights[2:5, mask[2]].isnan().all()
    assert torch.equal(
        lse.detach().nan_to_num(7.0, neginf=-9.0, posinf=9.0)[[0, 2, 3, 4, 5]], torch.tensor([-9.0, 9, 7, 7, -9])
    )


def test_range_of_scores(backend: str) -> None:
    x = torch.tensor([[-3.3e38, 3.3e38, 0.0], [-3e38, -3e38, -3e38], [-200.0, -90.0, 0.0]])
    weights, lse = maskops.masked_softmax(x, None, return_lse=True)
    assert torch.allclose(weights, torch.softmax(x, -1), atol=1e-7) and torch.allclose(lse, torch.logsumexp(x, -1))
    assert (maskops.masked_softmax(torch.full((1000,), 7.0), None) == 0.001).all()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_softmax(backend: str, dim: int, dtype: torch.dtype) -> None:
    """Longer than what the kernel keeps: the maximum rises from block to block, and in the last element."""
    length = 40000
    x = (noise(3, length) + torch.linspace(-60.0, 10.0, length)).to(dtype)
    x[1, -1], x[2] = 90.0, -80.0
    mask = coins(3, length, share=0.9)
    mask[0, :20000], mask[1, -1] = False, True
    if dim == 0:
        x, mask = x.T.contiguous(), mask.T.contiguous()
    check(x, mask, mask, dim)
    check(x, None, torch.tensor(True), dim)


def test_long_rows_of_spans(backend: str) -> None:
    start = torch.tensor([[[0, 5, 30000]], [[20000, 39000, 39999]]])
    end = torch.tensor([[[15000, 36000, 30000]], [[40000, 40000, 40000]]])
    spans = build_row_spans(start, end, 40000, key_holes=coins(1, 40000, share=0.1), grad=False)
    check(noise(3, 40000), spans, spans.to_dense()[0, 0])


# ---- the same answer ------------------------------------------------------------------------------------------------


def results(x: Tensor, mask: Any, dim: int) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True, backend="cpu")
    return (weights, lse, *torch.autograd.grad((weights, lse), x, (noise(*x.shape, seed=1), torch.ones_like(lse))))


@pytest.mark.processor
def test_threads_give_the_same_bits() -> None:
    needs_extension()
    mask = masks.padding(torch.tensor([300, 5])) & masks.causal()
    inputs = [(noise(2, 3, 300, 300), m, dim) for dim in (3, 2, 0) for m in (coins(2, 1, 300, 300), mask)]
    before = torch.get_num_threads()
    try:
        for arguments in inputs:
            torch.set_num_threads(1)
            one = results(*arguments)
            torch.set_num_threads(3)
            for a, b in zip(one, results(*arguments), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.processor
def test_instruction_sets_agree() -> None:
    needs_extension()
    widest = extension.instruction_set()
    assert widest is not None
    try:
        for dtype in DTYPES:
            for dim in (0, 1, 2):
                x, mask = noise(3, 37, 75).to(dtype), coins(3, 1, 75)
                extension.select_instruction_set(widest)
                expected = results(x, mask, dim)
                for name in extension.instruction_sets():
                    extension.select_instruction_set(name)
                    for a, b in zip(results(x, mask, dim), expected, strict=True):
                        assert torch.allclose(a.double(), b.double(), rtol=0.0, atol=8 * torch.finfo(a.dtype).eps), name
    finally:
        extension.select_instruction_set(widest)
