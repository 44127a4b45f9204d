"""scaled_dot_product_attention with torch's signature: torch's answers, and a dense mask that is really spans."""

import gc
import inspect
import itertools
import math
import threading
import warnings

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops.compat import recognise, sdpa
from maskops.testing import error_budget

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _falling_back_is_fine() -> object:
    """What a backend lacks runs on the reference: the numbers are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", maskops.BackendFallbackWarning)
        yield


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """torch's own formula in the dtype of q, with rows that see nothing 0, and both masks if both are given."""
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    sees = (scores > -math.inf).any(-1, keepdim=True)
    return torch.where(sees, torch.softmax(torch.where(sees, scores, 0.0), -1), 0.0) @ v


def assert_close(actual: Tensor, expected: Tensor, *inputs: Tensor | None, **arguments: object) -> None:
    """Within the error budget of this package; ``expected`` is the oracle, the inputs are those of ``plain``."""
    assert actual.shape == expected.shape
    assert error_budget(actual, plain(*inputs, **arguments), expected, actual.dtype).passed


def test_signature_is_that_of_torch() -> None:
    parameters = inspect.signature(maskops.scaled_dot_product_attention).parameters
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert list(parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameters[argument.name].default == default, argument.name
    # torch's stub takes all of them by position too.
    assert {x.kind for x in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (1, 2, 2, 3)], ids=lambda lead: f"{len(lead) + 2}d")
@pytest.mark.parametrize("k_len", [5, 7, 9])
def test_any_dimensions_and_masks(lead: tuple[int, ...], k_len: int) -> None:
    torch.manual_seed(0)
    q_len = 7
    q, k, v = torch.randn(*lead, q_len, 4), torch.randn(*lead, k_len, 4), torch.randn(*lead, k_len, 6)
    window = torch.ones(q_len, k_len, dtype=torch.bool).tril(1).triu(-2)
    attn_masks = [
        None,
        torch.rand(q_len, k_len) > 0.4,
        torch.rand(*lead, q_len, k_len) > 0.5,
        torch.randn(*lead, q_len, k_len),
        torch.randn(q_len, 1),
        torch.rand(k_len) > 0.5,
        torch.rand(q_len, 1) > 0.5,
        window,
        torch.zeros(q_len, k_len).masked_fill(~window, -math.inf),
        torch.zeros(*lead, q_len, k_len).masked_fill(~window, torch.finfo(torch.float32).min),
    ]
    for attn_mask, is_causal in itertools.product(attn_masks, (False, True)):
        out = maskops.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        wide = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        oracle = plain(q.double(), k.double(), v.double(), wide, is_causal)
        assert_close(out, oracle, q, k, v, attn_mask, is_causal)
        if attn_mask is None:  # what torch itself computes, top-left aligned
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["span", "holes", "float", "span float"])
def test_gradients(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)]
    attn_mask = {
        "span": torch.ones(6, 9, dtype=torch.bool).tril(2),
        "holes": torch.rand(2, 4, 6, 9) > 0.5,
        "float": torch.randn(2, 1, 6, 9),
        "span float": torch.zeros(1, 1, 6, 9).masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(2), -math.inf),
    }[kind]
    is_float = attn_mask.is_floating_point()
    grad = torch.randn(2, 4, 6, 5).to(dtype)

    def gradients(function: object, in_dtype: torch.dtype, **arguments: object) -> list[Tensor]:
        q, k, v = (x.to(dtype).to(in_dtype).detach().requires_grad_() for x in tensors)
        mask = attn_mask.to(dtype).to(in_dtype).detach().requires_grad_() if is_float else attn_mask
        out = function(q, k, v, mask, scale=0.3, **arguments)
        out.backward(grad.to(in_dtype))
        return [out.detach(), q.grad, k.grad, v.grad, *([mask.grad] if is_float else [])]

    oracle = gradients(plain, torch.float64)
    magnitude = max(float(x[x.isfinite()].abs().max()) for x in oracle)
    for actual, own, expected in zip(
        gradients(maskops.scaled_dot_product_attention, dtype, enable_gqa=True),
        gradients(plain, dtype),
        oracle,
        strict=True,
    ):
        assert actual.dtype == dtype
        assert error_budget(actual, own, expected, dtype, magnitude).passed


def test_leading_dimensions_broadcast() -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(1, 3, 5, 8), torch.randn(5, 8)
    torch.testing.assert_close(
        maskops.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(q, k.expand(2, 3, 5, 8), v.expand(2, 3, 5, 8)),
    )


@pytest.mark.parametrize("shape", [(4, 6, 8), (2, 4, 6, 8), (2, 3, 4, 6, 8)])
def test_grouped_heads(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    k, v = torch.randn(2, *shape[:-3], 2, 7, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, -3), v.repeat_interleave(2, -3))
    torch.testing.assert_close(maskops.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)


def test_rows_that_see_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    hidden = torch.tensor([True, False, True])[:, None].expand(3, 3)
    low = torch.finfo(torch.float32).min
    for attn_mask in (hidden, torch.zeros(3, 3).masked_fill(~hidden, -math.inf)):
        out = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
        assert not out[:, :, 1].any()
        dq, _, _ = torch.autograd.grad(out.sum(), (q, k, v))
        assert not dq[:, :, 1].any() and dq[:, :, 0].any()
    # A row of the smallest number is an average over all keys in torch, and stays one.
    average = torch.zeros(3, 3).masked_fill(~hidden, low)
    out = maskops.scaled_dot_product_attention(q, k, v, average)
    torch.testing.assert_close(out[:, :, 1], v.mean(2))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, average))


def test_rows_of_the_smallest_number_under_causality() -> None:
    """Left padding: its rows see only keys that a finite number hides, and average over them, as in torch."""
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    low = torch.zeros(1, 1, 6, 6)
    low[..., :2] = torch.finfo(torch.float32).min
    out = maskops.scaled_dot_product_attention(q, k, v, low, is_causal=True)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, low.masked_fill(~causal, -math.inf)))


def test_a_learned_mask_gets_zeros_where_everything_is_dropped() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    learned = torch.randn(6, 6, requires_grad=True)
    out = maskops.scaled_dot_product_attention(q, k, v, learned, dropout_p=1.0)
    (gradient,) = torch.autograd.grad(out.sum(), learned)
    assert not out.any() and not gradient.any()


def test_hidden_keys_may_hold_nan() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4).unbind()
    attn_mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, False]])[:, None, None]
    expected = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
    hidden = ~attn_mask.squeeze(2).unsqueeze(-1)
    k, v = (x.masked_fill(hidden, math.nan) for x in (k, v))
    assert torch.equal(maskops.scaled_dot_product_attention(q, k, v, attn_mask), expected)


def test_mask_and_causal_are_intersected() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    attn_mask = torch.rand(6, 6) > 0.3
    both = attn_mask & torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(
        maskops.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=True),
        maskops.scaled_dot_product_attention(q, k, v, both),
    )


def test_autocast() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4).unbind()
    v = torch.randn(1, 2, 6, 4, dtype=torch.bfloat16)
    attn_mask = torch.randn(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v, attn_mask).dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(q, k, v.float(), attn_mask), atol=3e-2, rtol=3e-2)


def test_dropout() -> None:
    q, k = torch.randn(2, 1, 2, 64, 8, dtype=torch.float32).unbind()
    weights = torch.eye(64).expand(1, 2, 64, 64)
    attn_mask = torch.ones(64, 64, dtype=torch.bool).tril(3)

    def run(dropout_p: float, mask: Tensor = attn_mask) -> Tensor:
        torch.manual_seed(3)
        return maskops.scaled_dot_product_attention(q, k, weights, mask, dropout_p)

    whole, dropped = run(0.0), run(0.25)
    assert torch.equal(dropped, run(0.25))
    seen = attn_mask.expand_as(whole)
    kept = dropped[seen] != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[seen][kept], whole[seen][kept] / 0.75)
    # The same mask with a hole that no plan can say: the same weights are dropped.
    holes = attn_mask.clone()
    holes[40, 5], holes[40, 9] = False, False
    assert torch.equal(run(0.25, holes)[:, :, :40] != 0, dropped[:, :, :40] != 0)
    q.requires_grad_()
    out = maskops.scaled_dot_product_attention(q, k, weights, attn_mask, 1.0)
    assert not out.any() and not torch.autograd.grad(out.sum(), q)[0].any()


def test_empty_tensors() -> None:
    for batch, q_len, k_len in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q, k, v = torch.randn(batch, 2, q_len, 4), torch.randn(batch, 2, k_len, 4), torch.randn(batch, 2, k_len, 5)
        for attn_mask in (None, torch.ones(q_len, k_len, dtype=torch.bool), torch.zeros(q_len, k_len)):
            out = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
            assert out.shape == (batch, 2, q_len, 5) and not out.any()


# ---- recognising spans -----------------------------------------------------------------------------------------------


def reading_of(attn_mask: Tensor, **arguments: object) -> recognise.Reading:
    chosen = {"batch": attn_mask.shape[0], "is_causal": False, "positions": False} | arguments
    return recognise.read([attn_mask], attn_mask.shape[2], attn_mask.shape[3], **chosen)


def runs_at_most_two(attn_mask: Tensor) -> bool:
    seen = attn_mask[:, attn_mask.any(0)] if attn_mask.any() else attn_mask[:, :0]
    return all(row.int().diff(prepend=torch.zeros(1, dtype=torch.int32)).clamp(min=0).sum() <= 2 for row in seen)


def test_recognition_is_exact_for_small_masks() -> None:
    """Masks of two rows of six keys, as they are and under the causal one: exact, or left alone."""
    recognised = 0
    for bits in range(0, 2**12, 37):
        attn_mask = torch.tensor([bits >> place & 1 for place in range(12)], dtype=torch.bool).view(1, 1, 2, 6)
        plan = reading_of(attn_mask).plan
        assert (plan is not None) == runs_at_most_two(attn_mask[0, 0])
        if plan is not None:
            recognised += 1
            assert torch.equal(plan.to_dense(), attn_mask)
            causal = reading_of(attn_mask, is_causal=True).plan
            assert torch.equal(causal.to_dense(), attn_mask & torch.ones(2, 6, dtype=torch.bool).tril())
    assert recognised > 60


def test_what_is_recognised_and_what_is_not() -> None:
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    holes = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=torch.bool)[:, None, None]
    heads = torch.stack((causal[0, 0], ~causal[0, 0]))[None]
    low = torch.finfo(torch.float32).min
    spans = {
        "causal": causal,
        "repeated for each head": causal.expand(3, 4, 5, 5).contiguous(),
        "padding with holes": holes.expand(2, 1, 5, 5),
        "documents": torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None],
        "first keys and a window": (causal & ~causal.tril(-3)) | (torch.arange(5) < 1),
        "0 and -inf": torch.zeros(1, 1, 5, 5).masked_fill(~causal, -math.inf),
        "0 and the smallest number": torch.zeros(1, 1, 5, 5).masked_fill(~causal, low),
        "the same in bfloat16": torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16).masked_fill(
            ~causal, torch.finfo(torch.bfloat16).min
        ),
        "nothing at all": torch.zeros(2, 1, 5, 5, dtype=torch.bool),
    }
    for name, attn_mask in spans.items():
        plan = reading_of(attn_mask).plan
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        assert plan is not None and torch.equal(plan.to_dense().expand(attn_mask.shape), allowed), name
    row_of_low = torch.zeros(1, 1, 5, 5).masked_fill(~causal, low)
    row_of_low[..., 2, :] = low
    others = {
        "three runs": torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)[None, None],
        "heads that differ": heads,
        "a bias": torch.zeros(1, 1, 5, 5).masked_fill(~causal, -1e4),
        "a row of nothing but the smallest number": row_of_low,
        "float16, whose smallest number is not beyond every score": torch.zeros(
            1, 1, 5, 5, dtype=torch.float16
        ).masked_fill(~causal, torch.finfo(torch.float16).min),
    }
    for name, attn_mask in others.items():
        assert reading_of(attn_mask) == (None, (0,)), name


def test_two_masks_are_one_plan() -> None:
    padding = (torch.arange(6) < torch.tensor([[4], [6]]))[:, None, None]
    window = torch.ones(6, 6, dtype=torch.bool).tril(1).triu(-1)[None, None]
    bias = torch.randn(1, 1, 6, 6)
    reading = recognise.read([padding, bias, window], 6, 6, batch=2, is_causal=True, positions=False)
    assert reading.rest == (1,)
    assert torch.equal(reading.plan.to_dense(), padding & window & torch.ones(6, 6, dtype=torch.bool).tril())


class _Count:
    """How often masks were read value by value, and plans built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.built = 0
        for name, original in (("read", recognise._exact_runs), ("built", recognise.build_row_spans)):
            monkeypatch.setattr(recognise, original.__name__, self._counting(name, original))

    def _counting(self, name: str, original: object) -> object:
        def function(*arguments: object, **keywords: object) -> object:
            setattr(self, name, getattr(self, name) + 1)
            return original(*arguments, **keywords)

        return function


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> _Count:
    monkeypatch.setattr(recognise, "_plans", [])
    return _Count(monkeypatch)


def test_a_mask_is_read_once(count: _Count) -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
    attn_mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for _ in range(3):  # a view, made anew for every layer, as models do
        maskops.scaled_dot_product_attention(q, k, v, attn_mask[..., :6, :6])
    assert (count.read, count.built) == (1, 1)
    # Another tensor with the same meaning is read, and its plan is there already.
    maskops.scaled_dot_product_attention(q, k, v, torch.ones(6, 6).tril() > 0)
    assert (count.read, count.built) == (2, 1)
    maskops.scaled_dot_product_attention(q, k, v, attn_mask[..., 1:7, 1:7])
    assert (count.read, count.built) == (3, 1)


def test_a_changed_mask_is_read_again(count: _Count) -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    for make in (
        lambda: torch.ones(6, 6, dtype=torch.bool).tril(),
        lambda: torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf),
    ):
        attn_mask = make()
        for change in (
            lambda x: x,
            lambda x: x.fill_(0).logical_not_() if x.dtype == torch.bool else x.fill_(0),
            lambda x: x.view(-1)[7:9].fill_(0 if x.dtype == torch.bool else -math.inf),
            lambda x: x[2].copy_(x[5]),
            lambda x: x.set_(x.t().contiguous()),
        ):
            change(attn_mask)
            for _ in range(2):
                out = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
                torch.testing.assert_close(out, plain(q, k, v, attn_mask))
    assert count.read >= 10


def test_a_reused_address_is_another_mask() -> None:
    """Same address, same id, version 0: only that the tensor which was read is gone tells them apart."""
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    memory = numpy.zeros((6, 6), dtype=bool)
    seen = []
    for diagonal in range(-2, 6):
        memory[:] = numpy.tri(6, 6, diagonal, dtype=bool)
        attn_mask = torch.from_numpy(memory)
        seen.append((id(attn_mask), attn_mask.data_ptr(), attn_mask._version))
        out = maskops.scaled_dot_product_attention(q, k, v, attn_mask)
        torch.testing.assert_close(out, plain(q, k, v, attn_mask))
        del attn_mask
    assert len(set(seen)) < len(seen)  # else this test tests nothing


def test_readings_do_not_keep_masks_alive() -> None:
    attn_mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    reading_of(attn_mask)
    with_it = len(recognise._readings)
    del attn_mask
    gc.collect()
    reading_of(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert len(recognise._readings) <= with_it
    for size in range(1, 100):
        reading_of(torch.ones(1, 1, size, 3, dtype=torch.bool))
    assert len(recognise._readings) <= 64 and len(recognise._plans) <= 16


def test_masks_of_inference_mode_are_read_each_time() -> None:
    """They have no version counter: a change of them cannot be seen."""
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    with torch.inference_mode():
        attn_mask = torch.ones(6, 6, dtype=torch.bool).tril()
        maskops.scaled_dot_product_attention(q, k, v, attn_mask)
        attn_mask.fill_(True)
        torch.testing.assert_close(maskops.scaled_dot_product_attention(q, k, v, attn_mask), plain(q, k, v))


def test_threads_read_masks_at_once() -> None:
    q, k, v = torch.randn(3, 1, 1, 16, 4).unbind()
    attn_masks = [torch.ones(16, 16, dtype=torch.bool).tril(diagonal) for diagonal in range(-8, 8)]
    expected = [plain(q, k, v, attn_mask) for attn_mask in attn_masks]
    failures = []

    def work(first: int) -> None:
        for step in range(32):
            number = (first + step) % 16
            out = maskops.scaled_dot_product_attention(q, k, v, attn_masks[number])
            if not torch.allclose(out, expected[number], atol=1e-5):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_learned_mask_stays_a_bias() -> None:
    attn_mask = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert not recognise.can_be_read(attn_mask)
    q, k, v = torch.randn(3, 1, 1, 4, 4).unbind()
    maskops.scaled_dot_product_attention(q, k, v, attn_mask)[0, 0, 0, 0].backward()
    assert attn_mask.grad is not None and attn_mask.grad[0, 0, 0].any()


# ---- where values cannot be read -------------------------------------------------------------------------------------


def test_compiled_in_one_graph() -> None:
    lengths = (6, 8)
    torch._dynamo.reset()
    q, k, v = torch.randn(2, 2, lengths[0], 4), *torch.randn(2, 2, 2, lengths[1], 4).unbind()
    function = torch.compile(maskops.scaled_dot_product_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(function(q, k, v, is_causal=True), plain(q, k, v, None, True))
    for attn_mask in (torch.rand(lengths) > 0.4, torch.randn(lengths)):
        torch.testing.assert_close(function(q, k, v, attn_mask), plain(q, k, v, attn_mask))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
        for attn_mask in (torch.ones(6, 6, dtype=torch.bool), torch.randn(2, 1, 1, 6)):
            assert maskops.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=True).shape == q.shape


# ---- refusals --------------------------------------------------------------------------------------------------------

_Q = torch.zeros(2, 4, 5, 8)
_REFUSALS = [
    ({"query": 1}, TypeError, "query is a int: expected a tensor"),
    ({"key": _Q.long()}, TypeError, "key is torch.int64: expected float32, bfloat16, float16 or float64"),
    ({"value": _Q.double()}, TypeError, "value is torch.float64, query is torch.float32: they must have one dtype"),
    ({"query": torch.zeros(8)}, ValueError, r"query has shape \(8,\): expected at least \(length, head_dim\)"),
    ({"query": _Q[..., :3]}, ValueError, "query and key have head_dim 3 and 8: they must be equal, and at least 1"),
    ({"value": _Q[:, :, :3]}, ValueError, "key has 5 keys, value has 3: they must be equal"),
    ({"key": _Q[:, :2], "value": _Q[:, :2]}, ValueError, "do not broadcast: for grouped heads set enable_gqa=True"),
    (
        {"key": _Q[:, :3], "value": _Q[:, :3], "enable_gqa": True},
        ValueError,
        "query has 4 heads, key has 3: expected a mul",
    ),
    (
        {"key": _Q[:, :2], "enable_gqa": True},
        ValueError,
        "key has 2 heads, value has 4: with enable_gqa they must be eq",
    ),
    (
        {"query": _Q[0, 0], "key": _Q[0, 0], "value": _Q[0, 0], "enable_gqa": True},
        ValueError,
        "enable_gqa needs a dimension of heads",
    ),
    ({"attn_mask": torch.zeros(5, 5, dtype=torch.long)}, TypeError, r"attn_mask is torch.int64: .*attn_mask.bool\(\)"),
    (
        {"attn_mask": torch.zeros(2, 5)},
        ValueError,
        r"attn_mask has shape \(2, 5\): expected one that broadcasts to \(2, 4, 5, 5\)",
    ),
    ({"attn_mask": [[True]]}, TypeError, "attn_mask is a list: expected a tensor"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p is 1.5: expected a probability in \[0, 1\]"),
    ({"dropout_p": "much"}, TypeError, "dropout_p is a str: expected a float"),
    ({"scale": math.inf}, ValueError, "scale is inf: expected a finite number"),
    ({"scale": _Q}, TypeError, "scale is a Tensor: expected a float or None"),
    ({"key": _Q.to("meta")}, ValueError, "key is on meta, query on cpu: they must be on one device"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), _REFUSALS)
def test_refusals(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        maskops.scaled_dot_product_attention(**({"query": _Q, "key": _Q, "value": _Q} | arguments))


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(5, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"query is a nested tensor: .*maskops.varlen_attention"):
        maskops.scaled_dot_product_attention(nested, nested, nested)


def test_causal_mask_from_the_top_left() -> None:
    for q_len, k_len in itertools.product(range(1, 5), range(1, 5)):
        allowed = sdpa.causal_from_top_left(q_len, k_len).to_dense(q_len, k_len)[0, 0]
        assert torch.equal(allowed, torch.ones(q_len, k_len, dtype=torch.bool).tril())
