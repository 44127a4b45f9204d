"""Bias, dense masks, ALiBi, sinks and dropout: what the cases of the testing kit do not say, on every backend."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension, masks, testing
from maskops.ops.attention import reference
from maskops.ops.attention.registration import Features, filled, operator_arguments
from tests.served import AT_HOME, DEVICE, kernels_here

pytestmark = pytest.mark.devices

CASES = {case.name: case for case in testing.cases("attention", features=True)}


@pytest.fixture(params=AT_HOME)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs here."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    return name


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def results(mask: Any, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype, **keywords: Any) -> list[Tensor]:
    """Outputs and the gradients of all tensors, which are cast to ``dtype`` first; always the same dropout."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        out, lse = maskops.attention(**leaves, mask=mask, return_lse=True, backend=backend, **keywords)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    received = (weights, torch.ones_like(lse).cumsum(-1) / lse.shape[-1])
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), list(leaves.values()), received)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape and torch.equal(ours.isfinite(), theirs.isfinite()), index
        difference = torch.where(theirs.isfinite(), ours.double() - theirs.double(), 0.0).abs()
        largest = torch.where(theirs.isfinite(), theirs.double(), 0.0).abs().max() if theirs.numel() else 0.0
        assert not (difference > tolerance * (1.0 + largest)).any(), (index, float(difference.max()))


# ---- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 4), (1, 37), (1, 70))), ids=str)
def test_every_broadcast_of_a_bias(backend: str, sizes: tuple[int, ...]) -> None:
    tensors = {"q": draw(2, 4, 37, 5), "k": draw(2, 2, 70, 5), "v": draw(2, 2, 70, 3), "bias": draw(*sizes)}
    mask = masks.causal() & masks.key_padding(torch.tensor([70, 41]))
    actual = results(mask, tensors, backend, torch.float32)
    assert_close(actual, results(mask, tensors, "reference", torch.float64))


def test_a_bias_of_any_strides_and_dtype(backend: str) -> None:
    tensors = {"q": draw(1, 3, 21, 4), "k": draw(1, 1, 40, 4), "v": draw(1, 1, 40, 4)}
    # As T5 makes it: (rows, keys, heads), seen from the heads.
    table = draw(21, 40, 3)
    for bias in (table.permute(2, 0, 1), table.permute(2, 0, 1)[None].expand(1, 3, 21, 40), table[..., 0]):
        expected = results(masks.causal(), {**tensors, "bias": bias}, "reference", torch.float64)
        assert_close(results(masks.causal(), {**tensors, "bias": bias}, backend, torch.float32), expected)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            leaf = bias.detach().to(dtype).requires_grad_()
            inputs = {name: x.detach() for name, x in tensors.items()}
            out = maskops.attention(**inputs, mask=masks.causal(), bias=leaf, backend=backend)
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            rounded = leaf.detach().double().requires_grad_()
            inputs = {name: x.double() for name, x in inputs.items()}
            wanted = maskops.attention(**inputs, mask=masks.causal(), bias=rounded, backend="reference")
            (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), rounded)
            assert grad.dtype == dtype
            assert torch.allclose(out.double(), wanted, atol=1e-5)
            assert torch.allclose(grad.double(), wanted_grad, atol=max(1e-5, float(torch.finfo(dtype).eps)))


def test_a_bias_may_hold_anything_where_the_mask_hides_it(backend: str) -> None:
    tensors = {"q": draw(1, 2, 50, 4), "k": draw(1, 2, 50, 4), "v": draw(1, 2, 50, 4)}
    allowed = torch.rand(1, 2, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    hidden = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(2500).view(50, 50) % 3]
    for described in (masks.causal(), masks.dense(allowed), masks.documents(cu_seqlens=torch.tensor([0, 20, 33, 47]))):
        seen = described.to_dense(50, 50)
        clean = draw(1, 2, 50, 50).detach()
        bias = torch.where(seen, clean, hidden)
        actual = results(described, {**tensors, "bias": bias}, backend, torch.float32)
        expected = results(described, {**tensors, "bias": clean}, "reference", torch.float64)
        assert_close(actual, expected)
        assert not actual[-1][~seen.expand(1, 2, 50, 50)].any()


def test_the_lowest_finite_bias_hides_nothing(backend: str) -> None:
    """What models add in the place of -inf: a row where it is everywhere is the mean of all values, as in torch."""
    q, k, v = (draw(1, 2, 20, 4).detach() for _ in range(3))
    bias = torch.zeros(20, 20)
    bias[3] = torch.finfo(torch.float32).min
    bias[5, 7:] = torch.finfo(torch.float32).min
    bias[9] = -math.inf
    out, lse = maskops.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.index_fill(0, torch.tensor(9), 0.0)
    )
    kept = [row for row in range(20) if row != 9]
    assert torch.allclose(out[:, :, kept], expected[:, :, kept], atol=1e-6)
    assert (out[:, :, 9] == 0).all() and (lse[:, :, 9] == -math.inf).all()
    assert lse[0, 0, 3] == torch.finfo(torch.float32).min


@pytest.fixture(params=["reference", *extension.instruction_sets()])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend; the kernels with each of the instruction sets in turn."""
    in_use = extension.instruction_set()
    if request.param == "reference":
        yield "reference"
        return
    try:
        extension.select_instruction_set(request.param)
        yield "cpu"
    finally:
        extension.select_instruction_set(in_use)


def assert_absorbed(mask: Any, tensors: dict[str, Tensor], name: str, large: float, engine: str, **extra: Any) -> None:
    """Gradients where ``large`` in a tensor absorbs the scores that float32 adds to it, as 1e30 does in float64."""
    exact = {key: x.detach().double() for key, x in tensors.items()}
    exact[name] = torch.where(tensors[name].double() == large, math.copysign(1e30, large), exact[name])
    expected = results(mask, exact, "reference", torch.float64, **extra)
    actual = results(mask, tensors, engine, torch.float32, **extra)
    is_large = expected[1].abs() > 1e20
    assert is_large[expected[1].isfinite()].any() and not is_large.all()
    assert torch.allclose(actual[1][is_large].abs(), torch.tensor(abs(large)))
    for result in (expected, actual):
        result[1] = result[1].masked_fill(is_large, 0.0)
    assert_close(actual, expected)


@pytest.mark.parametrize("large", [torch.finfo(torch.float32).min, -1e9, 1e9])
@pytest.mark.parametrize("sizes", [(2, 4, 37, 150), (1, 1, 37, 150), (2, 1, 1, 150), (1, 4, 37, 1)], ids=str)
def test_gradients_of_rows_under_a_large_bias(sizes: tuple[int, ...], large: float, engine: str) -> None:
    """Their log-sum-exp is too coarse to hold the logarithm of the number of keys: they are means all the same."""
    tensors = {"q": draw(2, 4, 37, 5), "k": draw(2, 2, 150, 5), "v": draw(2, 2, 150, 3)}
    bias = draw(*sizes).detach()
    if sizes[2] == 1:
        bias[1] = large  # every row of the second batch element
    else:
        bias[:, :, ::3] = large
        bias[:, :, 1::3, 100:] = large
    mask = masks.causal() & masks.key_padding(torch.tensor([150, 141]))
    assert_absorbed(mask, {**tensors, "bias": bias}, "bias", large, engine)
    assert_absorbed(mask, {**tensors, "bias": bias}, "bias", large, engine, softcap=2.5, dropout_p=0.25)


@pytest.mark.parametrize("large", [torch.finfo(torch.float32).min, -1e9, 1e9])
@pytest.mark.parametrize("sizes", [(1, 4, 90, 90), (1, 1, 90, 90)], ids=str)
def test_gradients_of_packed_rows_under_a_large_bias(sizes: tuple[int, ...], large: float, engine: str) -> None:
    tensors = {"q": draw(1, 4, 90, 5), "k": draw(1, 2, 90, 5), "v": draw(1, 2, 90, 3), "bias": draw(*sizes).detach()}
    tensors["bias"][:, :, ::3] = large
    for mask in (
        masks.documents(cu_seqlens=torch.tensor([0, 3, 9, 10, 12, 70, 90])) & masks.causal(),
        masks.causal() & (masks.sliding_window(9, 0) | masks.prefix(6)),
    ):
        assert_absorbed(mask, tensors, "bias", large, engine)


@pytest.mark.parametrize("large", [1e9, -1e9])
def test_gradients_of_rows_under_a_large_slope(large: float, engine: str) -> None:
    """Two keys at the same distance share a row, of which the diagonal, at no distance, is hidden."""
    tensors = {"q": draw(1, 2, 41, 4), "k": draw(1, 2, 41, 4), "v": draw(1, 2, 41, 4)}
    window = masks.sliding_window(1, 1) & masks.dense(~torch.eye(41, dtype=torch.bool)[None, None])
    tensors["alibi_slopes"] = torch.tensor([0.5, large])
    assert_absorbed(window, tensors, "alibi_slopes", large, engine)


def test_a_row_that_a_bias_empties_may_hold_anything(backend: str) -> None:
    tensors = {"q": draw(1, 2, 20, 4), "k": draw(1, 2, 30, 4), "v": draw(1, 2, 30, 4), "bias": torch.zeros(20, 30)}
    tensors["bias"][7] = -math.inf
    expected = results(None, tensors, "reference", torch.float64)
    tensors["q"] = tensors["q"].detach().index_fill(2, torch.tensor(7), math.nan)
    actual = results(None, tensors, backend, torch.float32)
    assert_close(actual, expected)
    assert not actual[0][:, :, 7].any() and not actual[2][:, :, 7].any() and not actual[5][7].any()


def test_a_bias_under_autocast_is_that_of_torch(backend: str) -> None:
    q, k, v, bias = draw(1, 2, 9, 4), draw(1, 2, 9, 4), draw(1, 2, 9, 4), draw(1, 1, 9, 9)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = maskops.attention(q, k, v, bias=bias * 3, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), bias)
    rounded = (bias.detach() * 3).bfloat16()
    exact = maskops.attention(*(x.bfloat16() for x in (q, k, v)), bias=rounded, backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact)
    assert grad.dtype == torch.float32


def test_only_wanted_gradients_are_computed() -> None:
    q, bias, slopes, sinks = draw(1, 2, 9, 4), draw(2, 9, 9), draw(2), draw(2)
    for backend in kernels_here():
        out = maskops.attention(q, q, q, bias=bias.detach(), alibi_slopes=slopes, sinks=sinks.detach(), backend=backend)
        assert torch.autograd.grad(out.sum(), (q, slopes))[1].shape == (2,)
        # None of q, k and v: what is left needs a gradient all the same.
        fixed = q.detach()
        out = maskops.attention(fixed, fixed, fixed, bias=bias, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
        wanted = maskops.attention(fixed, fixed, fixed, bias=bias, backend="reference")
        assert torch.allclose(grad, torch.autograd.grad(wanted.square().sum(), bias)[0], atol=1e-6)


@pytest.mark.parametrize(("q_len", "k_len", "batch", "heads"), [(0, 5, 2, 2), (5, 0, 2, 2), (5, 5, 0, 2), (5, 5, 2, 0)])
def test_nothing_at_all(backend: str, q_len: int, k_len: int, batch: int, heads: int) -> None:
    tensors = {
        "q": draw(batch, heads, q_len, 4),
        "k": draw(batch, 2, k_len, 4),
        "v": draw(batch, 2, k_len, 4),
        "bias": draw(1, 1, 1, k_len),
        "alibi_slopes": draw(batch, heads),
        "sinks": draw(heads),
    }
    for x in results(masks.causal(), tensors, backend, torch.float32, dropout_p=0.5):
        assert not x[x.isfinite()].any()


# ---- ALiBi and sinks -------------------------------------------------------------------------------------------------


def test_slopes_of_packed_sequences(backend: str) -> None:
    """(sequences, heads) packed is (batch, heads) padded; an empty sequence has its slopes too."""
    lengths = torch.tensor([11, 0, 5, 19])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    x, slopes = draw(4, 20, 2, 6), draw(4, 2)
    rows = torch.cat([torch.arange(n) + 20 * i for i, n in enumerate(lengths.tolist())])
    packed = x.flatten(0, 1)[rows]
    out = maskops.varlen_attention(
        packed, packed, packed, offsets, mask=masks.causal(), alibi_slopes=slopes, backend=backend
    )
    grads = torch.autograd.grad(out.square().sum(), (x, slopes), retain_graph=True)
    padded = x.transpose(1, 2)
    mask = masks.padding(lengths) & masks.causal()
    expected = maskops.attention(padded, padded, padded, mask, alibi_slopes=slopes, backend="reference")
    wanted = torch.autograd.grad(expected.square().sum(), (x, slopes))
    assert torch.allclose(out, expected.transpose(1, 2).flatten(0, 1)[rows], atol=1e-6)
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.allclose(grad, want, atol=1e-4)
    assert not grads[1][1].any()

    shared, every = (
        maskops.varlen_attention(packed, packed, packed, offsets, alibi_slopes=x, backend=backend)
        for x in (slopes[0], slopes[:1].expand(4, 2))
    )
    assert torch.equal(shared, every)

    plan = (masks.documents(cu_seqlens=offsets) & masks.causal()).spans(35, 35, positions=True)
    again = maskops.varlen_attention(packed, packed, packed, mask=plan, alibi_slopes=slopes, backend=backend)
    assert torch.equal(again, out)
    message = r"^alibi_slopes has shape \(3, 2\): expected \(2,\) or one row for each of the 4 sequences of the plan"
    with pytest.raises(ValueError, match=message):
        maskops.varlen_attention(packed, packed, packed, mask=plan, alibi_slopes=slopes[:3], backend=backend)


@pytest.mark.processor
@pytest.mark.parametrize("value", [-(2**31), -2, 2**20, 2**31 - 1])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_hostile_positions(row: int, value: int) -> None:
    """No place in the slopes but their own, whatever the positions say."""
    if not kernels_here():
        pytest.skip("no kernel runs here")
    q = draw(1, 2, 30, 4).detach()
    plan = masks.causal().spans(30, 30, positions=True)
    assert plan.positions is not None
    positions = plan.positions.clone()
    positions[row, :, 3::4] = value
    features = Features(
        alibi_slopes=torch.rand(3, 2), seed=torch.tensor(3), slopes_by_sequence=True, softmax_scale=1.0, dropout_p=0.5
    )
    arguments = filled(operator_arguments(plan._replace(positions=positions), features, "cpu"), q)
    if row == 2 and value > 0:
        with pytest.raises(ValueError, match=r"alibi_slopes has 3 rows, the plan has \d+ sequences"):
            torch.ops.maskops.attention_forward(q, q, q, *arguments)
        return
    out, lse = torch.ops.maskops.attention_forward(q, q, q, *arguments)
    assert out.isfinite().all()
    grads = torch.ops.maskops.attention_backward(out, torch.empty(0), q, q, q, out, lse, *arguments, False, True, False)
    assert all(grad.isfinite().all() for grad in grads)


def test_sinks_of_any_size(backend: str) -> None:
    tensors = {"q": draw(1, 6, 12, 4), "k": draw(1, 2, 12, 4), "v": draw(1, 2, 12, 4)}
    tensors["sinks"] = torch.tensor([-math.inf, -200.0, -3.0, 3.0, 200.0, 80.0])
    actual = results(masks.sliding_window(4, 0), tensors, backend, torch.float32)
    assert_close(actual, results(masks.sliding_window(4, 0), tensors, "reference", torch.float64))
    assert (actual[0][:, 4] == 0).all()


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """The vectors of the authors (Random123, kat_vectors, philox4x32 7)."""
    tensor = torch.tensor
    digits_of_pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for seed, counter, expected in (
        (0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, (0xFFFFFFFF,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        ((0x299F31D0 << 32) + 0xA4093822, digits_of_pi, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ):
        words = tuple(tensor(word) for word in counter)
        assert tuple(map(int, reference.philox(tensor(seed), words))) == expected  # type: ignore[arg-type]


def dropped(q: Tensor, k: Tensor, mask: Any, p: float, backend: str) -> Tensor:
    """Which pairs dropout drops: v is the identity, so the output is the weights."""
    v = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    torch.manual_seed(7)
    out = maskops.attention(q, k, v, mask, dropout_p=p, backend=backend)
    assert isinstance(out, Tensor)
    return out == 0


def test_dropout(backend: str) -> None:
    q, k = torch.zeros(2, 3, 50, 4), torch.zeros(2, 3, 50, 4)
    gone = dropped(q, k, None, 0.3, backend)
    assert abs(float(gone.float().mean()) - 0.3) < 0.02
    for lag in range(1, 5):  # neighbours, which share a draw, drop independently: 0.3 ** 2 = 0.09 of both
        assert abs(float((gone[..., lag:] & gone[..., :-lag]).float().mean()) - 0.09) < 0.01
    assert torch.equal(gone, dropped(q, k, None, 0.3, backend))
    assert torch.equal(gone, dropped(q, k, None, 0.3, "reference"))
    # Heads and batch elements drop different pairs, also under a plan that they share.
    assert not torch.equal(gone[0], gone[1]) and not torch.equal(gone[:, 0], gone[:, 1])
    v = torch.randn(2, 3, 50, 4)
    plan = masks.full().spans(50, 50, positions=True)
    assert plan.batch == 1
    torch.manual_seed(7)
    shared = maskops.attention(q, k, v, plan, dropout_p=0.3, backend=backend)
    torch.manual_seed(7)
    assert torch.equal(shared, maskops.attention(q, k, v, dropout_p=0.3, backend=backend))

    # What is kept is scaled up, and the lse knows nothing of dropout.
    torch.manual_seed(7)
    eye = torch.eye(50).expand(2, 3, 50, 50)
    out, lse = maskops.attention(q, k, eye, dropout_p=0.3, return_lse=True, backend=backend)
    assert torch.allclose(out[~gone], torch.tensor(1 / (50 * 0.7)))
    assert torch.allclose(lse, torch.tensor(50.0).log())
    # All but certain: everything is dropped, and nothing divided by zero.
    assert dropped(q, k, None, 1 - 2**-53, backend).all()


def test_dropout_does_not_depend_on_layout(backend: str) -> None:
    lengths = torch.tensor([20, 7, 13])
    total = int(lengths.sum())
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    zeros = torch.zeros(1, 2, total, 4)
    packed = dropped(zeros, zeros, masks.documents(cu_seqlens=offsets) & masks.causal(), 0.4, backend)
    padded = torch.zeros(3, 2, 24, 4)
    right = dropped(padded, padded, masks.padding(lengths) & masks.causal(), 0.4, backend)
    left = dropped(padded, padded, masks.padding(lengths, side="left") & masks.causal(), 0.4, backend)
    for sequence, length in enumerate(lengths.tolist()):
        rows = slice(int(offsets[sequence]), int(offsets[sequence]) + length)
        expected = packed[0, :, rows, rows]
        assert torch.equal(right[sequence, :, :length, :length], expected)
        assert torch.equal(left[sequence, :, 24 - length :, 24 - length :], expected)


DROPOUT_MASKS = {
    "full": masks.full(),
    "documents": masks.documents(cu_seqlens=torch.tensor([0, 3, 9, 10, 12, 33, 34, 37, 90])) & masks.causal(),
    "two spans": masks.causal() & (masks.sliding_window(9, 0) | masks.prefix(6)),
    "left": masks.padding(torch.tensor([99, 30]), side="left"),
}


@pytest.mark.parametrize("name", DROPOUT_MASKS)
def test_gradients_under_dropout(name: str) -> None:
    batch = 1 if name == "documents" else 2
    tensors = {"q": draw(batch, 4, 99, 6), "k": draw(batch, 2, 99, 6), "v": draw(batch, 2, 99, 10)}
    expected = results(DROPOUT_MASKS[name], tensors, "reference", torch.float64, dropout_p=0.35)
    for backend in kernels_here():
        assert_close(results(DROPOUT_MASKS[name], tensors, backend, torch.float32, dropout_p=0.35), expected)


# ---- together --------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"softcap": 2.5, "dropout_p": 0.25}


def everything(batch: int, length: int, bias: tuple[int, ...], heads: int = 4, kv_heads: int = 2) -> dict[str, Tensor]:
    return {
        "q": draw(batch, heads, length, 9),
        "k": draw(batch, kv_heads, length, 9),
        "v": draw(batch, kv_heads, length, 12),
        "bias": draw(*bias),
        "alibi_slopes": draw(heads).detach().abs() * 0.1,
        "sinks": draw(heads, seed=5),
    }


def everywhere(length: int) -> masks.Mask:
    allowed = torch.rand(1, 4, length, length, generator=torch.Generator().manual_seed(2)) < 0.7
    return masks.dense(allowed) & masks.padding(torch.tensor([length, length // 2])) & masks.causal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [(2, 4, 75, 75), (1, 4, 75, 75), (1, 1, 1, 75)], ids=str)
def test_everything_at_once(bias: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = {name: x.detach().to(dtype) for name, x in everything(2, 75, bias).items()}
    expected = results(everywhere(75), tensors, "reference", torch.float64, **EVERYTHING)
    for backend in kernels_here():
        actual = results(everywhere(75), tensors, backend, dtype, **EVERYTHING)
        assert_close(actual, expected, max(2e-5, 2 * float(torch.finfo(dtype).eps)))


@pytest.mark.processor
@pytest.mark.parametrize("name", ["dense", "two spans with features", "everything", "bias, packed"])
def test_instruction_sets(name: str) -> None:
    in_use = extension.instruction_set()
    assert in_use is not None, maskops.backends()["cpu"]
    tensors = everything(2, 75, (1, 4, 75, 75))
    expected = results(everywhere(75), tensors, "reference", torch.float64, **EVERYTHING)
    try:
        for instruction_set in extension.instruction_sets():
            extension.select_instruction_set(instruction_set)
            for dtype in (torch.float32, torch.bfloat16):
                case = CASES[name].with_dtype(dtype)
                report = testing.check(testing.attention_on("cpu", case), case, parts=("numbers", "poison"))
                assert report.passed, f"{instruction_set}: {report}"
            assert_close(results(everywhere(75), tensors, "cpu", torch.float32, **EVERYTHING), expected)
    finally:
        extension.select_instruction_set(in_use)


@pytest.mark.processor
@pytest.mark.parametrize("bias", [(2, 6, 150, 150), (1, 6, 150, 150), (2, 1, 1, 150), (1, 1, 150, 1)], ids=str)
def test_same_bits_with_any_number_of_threads(bias: tuple[int, ...]) -> None:
    tensors = everything(2, 150, bias, heads=6)
    mask = masks.padding(torch.tensor([150, 101])) & masks.causal()
    by_threads = {}
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            by_threads[threads] = results(mask, tensors, kernels_here()[0], torch.float32, **EVERYTHING)
    finally:
        torch.set_num_threads(1)
    for threads, result in by_threads.items():
        for index, (one, many) in enumerate(zip(by_threads[1], result, strict=True)):
            assert torch.equal(one, many), f"result {index} with {threads} threads"


def test_packed_features_are_those_of_each_sequence(backend: str) -> None:
    """Positions, bias and dropout of a document are its own, wherever it lies."""
    lengths = [17, 40, 1, 9]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    total = int(offsets[-1])
    q, k, v = (draw(total, 2, 5, seed=i).detach() for i in range(3))
    bias, slopes, sinks = draw(2, total, total).detach(), draw(4, 2).detach(), draw(2).detach()
    torch.manual_seed(7)
    together = maskops.varlen_attention(
        q,
        k,
        v,
        offsets,
        mask=masks.causal(),
        bias=bias,
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=0.3,
        backend=backend,
    )
    for index, (begin, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        rows = slice(begin, begin + length)
        # The sequence alone, with empty ones before it: its ordinal counts.
        alone = torch.tensor([0] * (index + 1) + [length] * (4 - index))
        torch.manual_seed(7)
        part = maskops.varlen_attention(
            q[rows],
            k[rows],
            v[rows],
            alone,
            mask=masks.causal(),
            bias=bias[:, rows, rows],
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_p=0.3,
            backend=backend,
        )
        assert torch.allclose(together[rows], part, atol=1e-6)
