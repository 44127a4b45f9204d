"""The testing kit judges right: it accepts torch's SDPA and rejects bugs that were planted."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from maskops import masks, testing
from maskops.testing.check import SLACK
from maskops.testing.own import spans_of

CASES = {case.name: case for case in testing.cases("attention")}
# torch reads padding and empty rows, and a NaN there spreads; all else it does right.
WITHOUT_POISON = ("numbers", "readout", "invariances")


def torch_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=softmax_scale, enable_gqa=True)


def careful_torch_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    """torch's attention with everything replaced that it should not read."""
    row_used, key_used = allowed.any(-1, keepdim=True), allowed.any(2).any(1)[:, None, :, None]
    q, k, v = torch.where(row_used, q, 0.0), torch.where(key_used, k, 0.0), torch.where(key_used, v, 0.0)
    out = torch_attention(q, k, v, allowed | ~row_used, softmax_scale=softmax_scale)
    return torch.where(row_used, out, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accepts_torch(case: testing.Case, dtype: torch.dtype) -> None:
    case = case.with_dtype(dtype)
    testing.check(torch_attention, case, parts=WITHOUT_POISON).raise_if_failed()
    testing.check(careful_torch_attention, case, parts=("poison",)).raise_if_failed()


def window_off_by_one(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    """Every row sees one key too many on the left."""
    left = torch.nn.functional.pad(allowed[..., 1:], (0, 1))
    return torch_attention(q, k, v, allowed | left, softmax_scale=softmax_scale)


def causal_top_left(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    """Ignores the mask for a triangle that starts at the first key."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)


def finite_mask_value(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    """Hides keys with -1e9, so that a row without keys becomes the mean of all values."""
    hidden = torch.where(allowed, 0.0, -1e9).to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=softmax_scale, enable_gqa=True)


def reads_the_tail(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    """Multiplies values that nobody sees by zero."""
    row_used = allowed.any(-1, keepdim=True)
    q = torch.where(row_used, q, 0.0)
    k = torch.where(allowed.any(2).any(1)[:, None, :, None], k, 0.0)
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * softmax_scale
    weights = scores.masked_fill(~allowed & row_used, -math.inf).softmax(-1)
    return torch.where(row_used, weights @ v.repeat_interleave(group, 1), 0.0)


class OneHeadOfTheGroup(torch.autograd.Function):
    """Attention whose dK comes from the first query head of each group alone."""

    @staticmethod
    def forward(ctx, q, k, v, allowed, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, allowed)
        ctx.scale = scale
        return torch_attention(q, k, v, allowed, softmax_scale=scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, allowed = (x.detach() for x in ctx.saved_tensors)
        with torch.enable_grad():
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            out = torch_attention(q, k, v, allowed, softmax_scale=ctx.scale)
        dq, _, dv = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        first = torch.arange(q.shape[1]) % (q.shape[1] // k.shape[1]) == 0
        (dk,) = torch.autograd.grad(out, k, grad * first[:, None, None])
        return dq, dk, dv, None, None


def missing_dk(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
    out: Tensor = OneHeadOfTheGroup.apply(q, k, v, allowed, softmax_scale)  # type: ignore[no-untyped-call]
    return out


@pytest.mark.parametrize(
    ("fn", "case", "parts", "findings"),
    [
        (window_off_by_one, "window", WITHOUT_POISON, {"out", "mask read out"}),
        (causal_top_left, "causal, fewer queries", WITHOUT_POISON, {"out", "mask read out"}),
        (finite_mask_value, "padding right", WITHOUT_POISON, {"out where nothing is seen", "mask read out"}),
        (reads_the_tail, "documents with a tail", testing.PARTS, {"poison: out"}),
        (missing_dk, "multi-query", WITHOUT_POISON, {"dk"}),
    ],
    ids=["off-by-one window", "top-left causal", "-1e9", "NaN in the tail", "missing dK"],
)
def test_rejects_planted_bugs(fn, case, parts, findings) -> None:  # type: ignore[no-untyped-def]
    report = testing.check(fn, CASES[case], parts=parts)
    failed = {finding.name for finding in report.findings if not finding.passed}
    assert findings <= failed, report
    with pytest.raises(AssertionError, match=case):
        report.raise_if_failed()
    # The bug is in what it names, not everywhere.
    if fn is reads_the_tail:
        assert all(name.startswith("poison") for name in failed), report
    if fn is missing_dk:
        assert failed == {"dk"}, report


def test_raw_torch_fails_on_poison_alone() -> None:
    report = testing.check(torch_attention, CASES["padding right"])
    assert {finding.name.split(":")[0] for finding in report.findings if not finding.passed} == {"poison"}


def test_report_reads_well() -> None:
    report = testing.check(window_off_by_one, CASES["window"], parts=("readout",))
    assert "window (float32): 0 of 4 checks passed; the case is there for: both ends move" in str(report)
    assert "382 of 80802 pairs differ; batch 0, head 0, row 10 sees keys [0, 15), expected [1, 15)" in str(report)
    passed = testing.check(torch_attention, CASES["window"])
    assert str(passed).startswith("window (float32):") and "FAIL" not in str(passed) and "limit" in str(passed)
    passed.raise_if_failed()


def test_forward_only() -> None:
    def forward_only(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> Tensor:
        with torch.no_grad():
            return torch_attention(q, k, v, allowed, softmax_scale=softmax_scale)

    report = testing.check(forward_only, CASES["causal"])
    assert report.passed and not report.is_differentiable and "forward only" in str(report)


def test_wrong_shape_is_a_finding() -> None:
    report = testing.check(lambda q, k, v, allowed, *, softmax_scale: q[:, :1], CASES["full"], parts=("numbers",))
    assert "out has shape (2, 1, 72, 16), expected (2, 4, 72, 16)" in str(report)


def test_wrong_lse_is_a_finding() -> None:
    def base_two(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = testing.plain_attention(q, k, v, allowed, softmax_scale=softmax_scale)
        return out, lse / math.log(2.0)

    report = testing.check(base_two, CASES["causal"], parts=("numbers", "invariances"))
    assert {"lse", "lse split and merged"} <= {finding.name for finding in report.findings if not finding.passed}


def test_an_lse_without_a_gradient_is_a_finding() -> None:
    def detached(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> tuple[Tensor, Tensor]:
        out, lse = testing.plain_attention(q, k, v, allowed, softmax_scale=softmax_scale)
        return out, lse.detach()

    def without(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, softmax_scale: float) -> tuple[Tensor, None]:
        return testing.plain_attention(q, k, v, allowed, softmax_scale=softmax_scale)[0], None

    def forward_only(*arguments: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return testing.plain_attention(*arguments, softmax_scale=softmax_scale)

    report = testing.check(detached, CASES["causal"])
    assert {finding.name for finding in report.findings if not finding.passed} == {"gradient of lse"}
    assert "FAIL gradient of lse: out carries a gradient, lse none, so none was checked" in str(report)
    report = testing.check(testing.plain_attention, CASES["causal"], parts=("numbers",))
    assert report.passed and "ok   gradient of lse: it carries one" in str(report)
    for fn in (without, forward_only):
        report = testing.check(fn, CASES["causal"], parts=("numbers",))
        assert report.passed and "gradient of lse" not in str(report)


def test_budget() -> None:
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    budget = testing.error_budget(oracle + 3 * eps, oracle + eps, oracle, torch.float32)
    assert budget.passed and math.isclose(budget.limit, 2 * eps + SLACK * eps * 2.0, rel_tol=1e-6)
    assert not testing.error_budget(oracle + 11 * eps, oracle + eps, oracle, torch.float32).passed
    assert not testing.error_budget(oracle * math.nan, oracle, oracle, torch.float32).passed
    empty_row = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
    assert testing.error_budget(empty_row, empty_row, empty_row, torch.float32).passed
    assert not testing.error_budget(empty_row.nan_to_num(), empty_row, empty_row, torch.float32).passed


def test_cases() -> None:
    names = [case.name for case in testing.cases("attention", features=True)]
    assert len(names) == len(set(names)) > len(CASES) > 30
    assert all(case.intent for case in CASES.values())
    with pytest.raises(ValueError, match="op is 'convolution': there are cases for 'attention'"):
        testing.cases("convolution")
    with pytest.raises(ValueError, match="parts holds 'speed': expected some of 'numbers', 'readout'"):
        testing.check(torch_attention, CASES["full"], parts=("speed",))


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.name != "dense"], ids=lambda case: case.name)
def test_spans_of_a_mask(case: testing.Case) -> None:
    allowed = case.allowed()
    assert torch.equal(spans_of(allowed).to_dense(), allowed)


def test_plain_attention_is_torch() -> None:
    q, k, v = (torch.randn(2, 4, 30, 8, dtype=torch.float64) for _ in range(3))
    allowed = masks.causal().to_dense(30, 30)
    out, lse = testing.plain_attention(q, k, v, allowed, softmax_scale=0.3)
    assert torch.allclose(out, scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~allowed, -math.inf)
    assert torch.allclose(lse, scores.logsumexp(-1))
