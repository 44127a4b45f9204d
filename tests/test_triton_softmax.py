"""maskops.masked_softmax by Triton: the cases of the other backends, and each way in which the kernels walk tensors."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops import masks
from maskops.ops import triton_language
from maskops.ops.softmax import triton_kernels
from maskops.spans import build_row_spans
from tests.served import DEVICE, running_on
from tests.softmax_oracle import (
    HOLES,
    LENGTHS,
    UNREADABLE,
    check,
    coins,
    definition,
    gradient_of,
    noise,
    strided,
    unreadable,
)

pytestmark = pytest.mark.devices

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with running_on("triton"):
        yield


@pytest.fixture(params=["kept", "streamed"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Softmaxes that fit on the chip, and chips so small that nothing does."""
    if request.param == "streamed":
        monkeypatch.setattr(triton_kernels, "_KEPT", 32)
        monkeypatch.setattr(triton_kernels, "_STREAMED_PLACES", 2)
        small = triton_kernels.tuning.Config({"BLOCK_V": 128}, 1, 2, "model: small")
        monkeypatch.setattr(triton_kernels, "_config", lambda *_: small)
    return str(request.param)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5,), SINGLE), ((2, 3, 37), HALF), ((2, 2, 3, 2, 5), BRAIN)],
    ids=str,
)
def test_every_dimension(where: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for dim in range(len(shape)):
        x, mask = noise(*shape, seed=dim).to(dtype), coins(*shape, seed=dim)
        check(x, mask, mask, dim)
        check(x, None, torch.tensor(True), dim - len(shape))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_wide_tiles(where: str, dtype: torch.dtype) -> None:
    """Sizes and strides of whole groups, in rows and in lanes, with masks of every kind of stride."""
    rows = 4 if where == "streamed" else 16
    x = noise(2, rows, 48).to(dtype)
    of_two = (coins(2, rows, 48), coins(48, rows, 2).permute(2, 1, 0))
    for mask in of_two if where == "streamed" else (*of_two, coins(1, rows, 1), coins(2, 1, 48)):
        for dim in (1, 2):
            check(x, mask, mask, dim)


@pytest.mark.parametrize("kind", ["every second element", "rows with a gap", "expanded", "mask with gaps"])
def test_strides(kind: str) -> None:
    x, mask = strided(kind)
    for dim in range(3):
        check(x, mask, mask, dim)


def test_more_dimensions_than_are_walked() -> None:
    x = noise(2, 3, 2, 3, 2, 3, 2).permute(5, 3, 1, 6, 4, 2, 0)
    mask = coins(2, 3, 2, 1, 2, 3, 2).permute(5, 3, 1, 6, 4, 2, 0).expand(x.shape)
    for dim in (0, 3, 6):
        check(x, mask, mask, dim)


def test_strides_of_the_operator() -> None:
    """The kernels walk any strides; the public function copies some of them first, for speed."""
    absent = torch.empty(0, dtype=torch.int32)
    x, mask = noise(40, 6, 4).permute(2, 1, 0), coins(80, 6, 4)[::2].permute(2, 1, 0)
    for dim in range(3):
        weights, lse = torch.ops.maskops.masked_softmax_forward_triton(x, mask, absent, absent, absent, dim, True)
        oracle, oracle_lse = definition(x.double(), mask, dim)
        assert torch.allclose(weights.double(), oracle, atol=1e-6) and torch.allclose(lse.double(), oracle_lse)
        grad_weights = noise(40, 12, 4, seed=3)[:, ::2].permute(2, 1, 0)
        grad = torch.ops.maskops.masked_softmax_backward_triton(
            grad_weights, torch.empty(0), weights, absent, absent, absent, dim
        )
        expected = gradient_of(oracle, grad_weights.double(), torch.zeros_like(oracle_lse), dim)
        assert torch.allclose(grad.double(), expected, atol=1e-6)


MASKS: dict[str, masks.Mask] = {
    "causal": masks.causal(),
    "padding with holes": masks.padding(HOLES) & masks.causal(),
    "no keys": masks.key_padding(torch.tensor([70, 0])),
    "first tokens and window": masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(4)) & masks.padding(HOLES),
    "documents": masks.documents(torch.tensor([0] * 20 + [-1] * 3 + [1] * 47)) & masks.causal(),
    "dense and padding": masks.dense(coins(1, 1, 70, 70)) & masks.padding(LENGTHS),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask = MASKS[name]
    dtype = (SINGLE, BRAIN, HALF)[list(MASKS).index(name) % 3]
    x, allowed = noise(2, 1, 70, 70), mask.to_dense(70, 70, batch=2)
    check(x.to(dtype), mask, allowed)


def test_masks_of_streamed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_KEPT", 32)
    mask = masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(4)) & masks.key_padding(HOLES[:, :33])
    check(noise(2, 9, 33).bfloat16(), mask, mask.to_dense(9, 33)[:, 0])


def test_shapes_of_scores() -> None:
    mask = masks.padding(torch.tensor([6, 4])) & masks.causal()
    allowed = mask.to_dense(6, 6)
    check(noise(2, 3, 4, 6, 6), mask, allowed[:, :, None])
    check(noise(6, 6), masks.causal(), masks.causal().to_dense(6, 6)[0, 0])
    packed = masks.documents(cu_seqlens=torch.tensor([0, 2, 5]))
    check(noise(3, 6, 6), packed, packed.to_dense(6, 6)[0])
    check(noise(6, 2, 6).permute(1, 2, 0), mask, allowed[:, 0])


@pytest.mark.processor
def test_hostile_spans_stay_inside(where: str) -> None:
    """Spans that a user made by hand: crossing, out of range, far apart. No access leaves the rows."""
    generator = torch.Generator().manual_seed(0)
    plan = masks.full().spans(20, 70, device=DEVICE)
    x = torch.full((4, 20, 70), NAN)
    x[1:3] = noise(2, 20, 70)
    for _ in range(1):
        start, end = (torch.randint(-100, 200, (3, 1, 20), dtype=torch.int32, generator=generator) for _ in range(2))
        start[0, 0, 0], end[0, 0, 0] = -(2**31), 2**31 - 1
        weights = maskops.masked_softmax(x[1:3], plan._replace(start=start, end=end))
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
        assert (total[:, 0] > 0).all()
        expected = maskops.masked_softmax(x[1:3], plan._replace(start=start, end=end), backend="cpu")
        assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("poison", [NAN, -INF])
@pytest.mark.parametrize("dim", [0, 1])
def test_masked_values_reach_nothing(where: str, dim: int, poison: float) -> None:
    mask = coins(9, 70)
    mask[:, 2], mask[3] = False, False
    x, grad_weights = noise(9, 70), noise(9, 70, seed=1)
    results = []
    for filling in (0.0, poison):
        leaf = x.masked_fill(~mask, filling).requires_grad_()
        weights, lse = maskops.masked_softmax(leaf, mask, dim, return_lse=True)
        nothing = ~mask.any(dim)
        incoming = (grad_weights.masked_fill(~mask, filling), torch.ones(lse.shape).masked_fill(nothing, filling))
        (grad,) = torch.autograd.grad((weights, lse), leaf, incoming)
        results.append((weights, lse, grad))
        assert (lse[nothing] == -INF).all() and not grad[~mask].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_masked_values_under_spans() -> None:
    mask = masks.padding(HOLES) & masks.causal()
    allowed = mask.to_dense(70, 70)[:, 0]
    x = noise(2, 70, 70).masked_fill(~allowed, NAN).requires_grad_()
    weights = maskops.masked_softmax(x, mask)
    assert torch.equal(weights != 0, allowed)
    (grad,) = torch.autograd.grad(weights, x, noise(2, 70, 70, seed=1).masked_fill(~allowed, NAN))
    assert grad.isfinite().all() and not grad[~allowed].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_infinite_and_nan_scores(where: str, dim: int) -> None:
    rows = noise(6, 70)
    rows[0] = -INF  # like nothing visible
    rows[1, 1:] = -INF
    rows[2, 3] = INF
    rows[3, 3] = NAN
    rows[4, 2], rows[4, 4] = INF, NAN
    mask = torch.ones(6, 70, dtype=torch.bool)
    mask[:, 1] = False
    mask[5], rows[5, 0] = False, NAN
    x, mask = (rows, mask) if dim == 1 else (rows.T.contiguous(), mask.T)
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True)
    weights, mask = (weights, mask) if dim == 1 else (weights.T, mask.T)
    assert not weights[~mask].any() and not weights[[0, 5]].any()
    assert weights[1, 0] == 1 and not weights[1, 1:].any()
    assert weights[2:5, mask[2]].isnan().all()
    assert torch.equal(
        lse.nan_to_num(7.0, neginf=-9.0, posinf=9.0)[[0, 2, 3, 4, 5]], torch.tensor([-9.0, 9.0, 7.0, 7.0, -9.0])
    )


def test_range_of_scores() -> None:
    x = torch.tensor([[-3.3e38, 3.3e38, 0.0], [-3e38, -3e38, -3e38], [-200.0, -90.0, 0.0]])
    weights, lse = maskops.masked_softmax(x, None, return_lse=True)
    assert torch.allclose(weights, torch.softmax(x, -1), atol=1e-7) and torch.allclose(lse, torch.logsumexp(x, -1))
    assert (maskops.masked_softmax(torch.full((1000,), 7.0), None) == 0.001).all()


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_long_softmax(dtype: torch.dtype) -> None:
    """Longer than a chip keeps, and ragged: the maximum rises from tile to tile, and in the last element."""
    length = 40001
    x = (noise(3, length) + torch.linspace(-60.0, 10.0, length)).to(dtype)
    x[1, -1], x[2] = 90.0, -80.0
    mask = coins(3, length, share=0.9)
    mask[0, :20000], mask[1, -1] = False, True
    check(x, mask, mask)
    check(x[:, 1:], None, torch.tensor(True))


def test_long_rows_of_spans() -> None:
    start = torch.tensor([[[0, 5, 30000]], [[20000, 39000, 39999]]])
    end = torch.tensor([[[15000, 36000, 30000]], [[40000, 40000, 40000]]])
    spans = build_row_spans(start, end, 40000, key_holes=coins(1, 40000, share=0.1), grad=False)
    check(noise(3, 40000), spans, spans.to_dense()[0, 0])


def test_empty_tensors() -> None:
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        for dim in range(len(shape)):
            x = torch.empty(shape, requires_grad=True)
            weights, lse = maskops.masked_softmax(x, torch.tensor(True), dim, return_lse=True)
            assert weights.shape == shape and lse.tolist() == torch.logsumexp(x, dim).tolist()
            weights.sum().backward()
            assert x.grad is not None and x.grad.shape == shape
    assert maskops.masked_softmax(torch.tensor(3.0), None).tolist() == 1.0


def test_one_launch_a_pass_and_no_look_at_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    monkeypatch.setattr(triton_language, "launch", lambda kernel, *_, **__: launches.append(kernel.__name__))
    with FakeTensorMode():
        for length in (40, 40000):
            x, absent = torch.empty(9, length), torch.empty(0)
            spans = torch.empty(1, 1, 9, dtype=torch.int32), torch.empty(1, 1, 9, dtype=torch.int32)
            plan = (*spans, torch.empty(1, length, dtype=torch.uint8))
            weights, lse = triton_kernels.masked_softmax_forward(x, absent, *plan, 1, True)
            triton_kernels.masked_softmax_backward(x, lse, weights, *plan, 1)
    assert launches == ["forward_tiles", "backward_tiles", "forward_rows", "backward_rows"]


@pytest.mark.processor
@pytest.mark.parametrize("place", range(UNREADABLE))
def test_operator_refuses_what_it_cannot_read(place: int) -> None:
    with pytest.raises(ValueError, match=r"^masked_softmax: "):
        torch.ops.maskops.masked_softmax_forward_triton(*unreadable(place, DEVICE))
