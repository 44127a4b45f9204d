"""Checks of any attention function against a float64 oracle: numbers, realised mask, poison, invariances.

The function under test is called as ``fn(q, k, v, allowed, *, softmax_scale)``: q (batch, heads, q_len, head_dim),
k (batch, kv_heads, k_len, head_dim), v (batch, kv_heads, k_len, value_dim), allowed bool (batch, heads|1, q_len, k_len)
with True = attend. It returns out (batch, heads, q_len, value_dim), or the pair (out, lse) with lse (batch, heads,
q_len), natural logarithm. Cases with features pass them as further keywords.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops.testing.cases import Case

Function = Callable[..., Any]

PARTS = ("numbers", "readout", "poison", "invariances")
SLACK = 4.0
"""The one constant of the error budget: so many eps of the largest value are always allowed."""

_READOUT_WIDTH = 64


class Budget(NamedTuple):
    """How far a result is from the oracle, and how far it may be.

    Attributes:
        error: largest absolute difference to the oracle; infinite where a result is not finite and should be.
        plain_error: the same for plain PyTorch in the same dtype.
        limit: ``2 * plain_error + SLACK * eps * magnitude``.
    """

    error: float
    plain_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def error_budget(
    actual: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype, magnitude: float | None = None
) -> Budget:
    """The one tolerance of this package: twice the error of plain PyTorch, and a few roundings.

    Args:
        actual: the result under test.
        plain: the result of plain PyTorch operations in ``dtype``.
        oracle: the result in float64. Where it is infinite (the lse of an empty row) the others must equal it.
        dtype: the dtype of the computation, whose eps counts.
        magnitude: what a rounding is relative to; ``max|oracle|`` where it is not given. Gradients share the largest
            of them and of the incoming one: where a row sees a single key, dq and dk are differences that cancel to 0,
            and their own size does not tell how large their terms were.
    """
    if oracle.numel() == 0:
        return Budget(0.0, 0.0, 0.0)
    finite = oracle.isfinite()
    if magnitude is None:
        magnitude = float(torch.where(finite, oracle, 0.0).abs().max())

    def distance(x: Tensor) -> float:
        difference = torch.where(finite, (x.double() - oracle).abs(), torch.where(x.double() == oracle, 0.0, math.inf))
        # A maximum ignores NaN in no useful way: NaN is an error of its own.
        return float(torch.where(difference.isnan(), math.inf, difference).max())

    plain_error = distance(plain)
    return Budget(distance(actual), plain_error, 2.0 * plain_error + SLACK * torch.finfo(dtype).eps * magnitude)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """What ``check`` found. Print it, look at ``findings``, or call ``raise_if_failed``.

    ``is_differentiable`` is False where outputs came without a gradient, so that none was checked.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    is_differentiable: bool = True

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    def raise_if_failed(self) -> None:
        """Raises an AssertionError that lists the failed checks."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        failed = [finding for finding in self.findings if not finding.passed]
        dtype = str(self.case.dtype).removeprefix("torch.")
        head = f"{self.case.name} ({dtype}): {len(self.findings) - len(failed)} of {len(self.findings)} checks passed"
        if not self.is_differentiable:
            head += ", forward only"
        if failed:
            head += f"; the case is there for: {self.case.intent}"
        return "\n".join([head, *(f"  {finding}" for finding in failed or self.findings)])


class _Problem(NamedTuple):
    """Inputs in float64, with values that the dtype of the case can hold. ``distance``: |diagonal - key|, for ALiBi."""

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor
    extras: Mapping[str, Any]
    distance: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    additive: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as a handful of dense PyTorch operations, in the dtype of q: the oracle in float64.

    Args:
        q: (batch, heads, q_len, head_dim).
        k: (batch, kv_heads, k_len, head_dim).
        v: (batch, kv_heads, k_len, value_dim).
        allowed: bool, broadcastable to (batch, heads, q_len, k_len).
        softmax_scale: factor of the scores.
        softcap: 0 for none.
        additive: added to the scores after the softcap, broadcastable as ``allowed``.
        sinks: (heads,).

    Returns:
        out (batch, heads, q_len, value_dim) and lse (batch, heads, q_len), which leaves sinks out.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if additive is not None:
        allowed = allowed & (additive > -math.inf)
        scores = scores + torch.where(allowed, additive, 0.0).to(scores.dtype)
    row_used = allowed.any(-1, keepdim=True)
    scores = torch.where(allowed | ~row_used, scores, -math.inf)
    lse = torch.where(row_used.squeeze(-1), torch.logsumexp(scores, -1), -math.inf)
    logits = scores
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, column], -1)
    weights = torch.softmax(logits, -1)[..., : scores.shape[-1]]
    return torch.where(row_used, weights, 0.0) @ v, lse


def _problem(case: Case, device: torch.device | str) -> _Problem:
    q, k, v = case.inputs(device)
    extras = case.extras(device)
    allowed = case.allowed(device)
    distance = None
    if case.alibi:
        mask = case.mask(device)
        if mask is None:
            raise ValueError(f"case {case.name!r} uses ALiBi without a mask, which gives rows their positions")
        diagonal = mask.spans(case.q_len, case.k_len, batch=case.batch, device=device, positions=True).diag
        distance = (diagonal[:, None, :, None] - torch.arange(case.k_len, device=device)).abs().double()
    generator = torch.Generator().manual_seed(4)
    grad_out = torch.randn(*q.shape[:3], v.shape[3], generator=generator, dtype=torch.float64).to(case.dtype)
    grad_lse = torch.randn(*q.shape[:3], generator=generator, dtype=torch.float32)
    return _Problem(q, k, v, allowed, extras, distance, grad_out.double().to(device), grad_lse.double().to(device))


def _additive(extras: Mapping[str, Any], distance: Tensor | None) -> Tensor | None:
    """What bias and ALiBi add to the scores."""
    bias: Tensor | None = extras.get("bias")
    if distance is None:
        return bias
    slopes: Tensor = extras["alibi_slopes"]
    penalty = -slopes[..., None, None] * distance.to(slopes.dtype)
    return penalty if bias is None else bias + penalty


class _WrongShapeError(Exception):
    """Carries the finding after which there is nothing left to compare."""


class _Result(NamedTuple):
    """Outputs and gradients by name, and whether a gradient came in at the lse."""

    tensors: dict[str, Tensor]
    lse_has_gradient: bool


def _outputs(
    fn: Function, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    result = fn(q, k, v, allowed, **keywords)
    out, lse = (result, None) if isinstance(result, Tensor) else result
    for name, x, shape in (("out", out, (*q.shape[:3], v.shape[3])), ("lse", lse, q.shape[:3])):
        if x is not None and x.shape != shape:
            raise _WrongShapeError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    return out, lse


def _run(fn: Function, case: Case, problem: _Problem) -> _Result:
    """Runs the function under test forward and backward, in the case's dtype."""
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    inputs = {name: x.to(case.dtype).detach().requires_grad_() for name, x in inputs.items()}
    extras = dict(problem.extras)
    for name, extra in extras.items():
        if isinstance(extra, Tensor):
            inputs[name] = extras[name] = extra.to(_at_least_single(case.dtype)).detach().requires_grad_()
    out, lse = _outputs(
        fn, inputs["q"], inputs["k"], inputs["v"], problem.allowed, softmax_scale=case.softmax_scale, **extras
    )
    outputs = {"out": out} if lse is None else {"out": out, "lse": lse}
    tensors = {name: x.detach() for name, x in outputs.items()}
    if not out.requires_grad:
        return _Result(tensors, False)
    received = {"out": problem.grad_out.to(out.dtype)}
    if lse is not None and lse.requires_grad:
        received["lse"] = problem.grad_lse.to(lse.dtype)
    grads = torch.autograd.grad(
        [outputs[name] for name in received], list(inputs.values()), list(received.values()), allow_unused=True
    )
    for name, x, grad in zip(inputs, inputs.values(), grads, strict=True):
        tensors[f"d{name}"] = torch.full_like(x, math.nan) if grad is None else grad
    return _Result(tensors, "lse" in received)


def _run_plain(case: Case, problem: _Problem, dtype: torch.dtype, with_lse: bool) -> dict[str, Tensor]:
    """``plain_attention`` in ``dtype`` with its gradients, under the names of ``_run``."""
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    inputs = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
    extras = dict(problem.extras)
    for name, extra in extras.items():
        if isinstance(extra, Tensor):
            inputs[name] = extras[name] = extra.to(_at_least_single(dtype)).detach().requires_grad_()
    out, lse = plain_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        problem.allowed,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        additive=_additive(extras, problem.distance),
        sinks=extras.get("sinks"),
    )
    outputs, received = [out], [problem.grad_out.to(out.dtype)]
    if with_lse:
        outputs.append(lse)
        received.append(problem.grad_lse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, list(inputs.values()), received)
    results = {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **results}


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compare(prefix: str, case: Case, result: _Result, problem: _Problem) -> Iterator[Finding]:
    """Holds outputs and gradients to the error budget, and what must be exactly zero to that."""
    oracle = _run_plain(case, problem, torch.float64, result.lse_has_gradient)
    plain = _run_plain(case, problem, case.dtype, result.lse_has_gradient)
    gradients = [problem.grad_out, *(oracle[name] for name in ("dq", "dk", "dv"))]
    largest_gradient = max((float(x.abs().max()) for x in gradients if x.numel()), default=0.0)
    for name, actual in result.tensors.items():
        magnitude = None
        if name.startswith("d"):  # those of a bias or of slopes are sums of the same differences, and may be larger
            own = float(oracle[name].abs().max()) if oracle[name].numel() else 0.0
            # Roundings of a sum that cancels add up like steps of a random walk.
            terms = 1.0
            if name in ("dbias", "dalibi_slopes"):
                terms = max(terms, problem.allowed.numel() / max(oracle[name].numel(), 1))
            factor = terms**0.5
            if name == "dalibi_slopes" and problem.distance is not None and problem.distance.numel():
                factor *= max(1.0, float(problem.distance.max()))
            magnitude = max(largest_gradient * factor, own)
        budget = error_budget(actual, plain[name], oracle[name], case.dtype, magnitude)
        detail = f"error {budget.error:.3g}, limit {budget.limit:.3g} (plain torch {budget.plain_error:.3g})"
        if not budget.passed:
            difference = (actual.double() - oracle[name]).abs().nan_to_num(nan=math.inf)
            place = torch.unravel_index(difference.argmax(), actual.shape)
            detail += f", worst at {tuple(int(index) for index in place)}"
        yield Finding(f"{prefix}{name}", budget.passed, detail)

    additive = _additive(problem.extras, problem.distance)
    allowed = problem.allowed if additive is None else problem.allowed & (additive > -math.inf)
    allowed = allowed.expand(*problem.q.shape[:3], -1)
    row_used = allowed.any(-1)
    key_used = allowed.any(-2).unflatten(1, (problem.k.shape[1], -1)).any(2) if problem.k.shape[1] else allowed.any(-2)
    for name, used in (("out", row_used), ("dq", row_used), ("dk", key_used), ("dv", key_used)):
        if name in result.tensors and not used.all():
            wrong = int((result.tensors[name][~used] != 0).any(-1).sum())
            detail = f"{wrong} of {int((~used).sum())} {'rows' if used is row_used else 'keys'} are not exactly 0"
            yield Finding(f"{prefix}{name} where nothing is seen", wrong == 0, detail)


def _check_numbers(fn: Function, case: Case, problem: _Problem) -> Iterator[Finding]:
    result = _run(fn, case, problem)
    yield from _compare("", case, result, problem)
    if "lse" in result.tensors and "dq" in result.tensors:
        # Whoever merges by a detached lse loses part of the gradient, and nothing else here would notice.
        detail = (
            "it carries one" if result.lse_has_gradient else "out carries a gradient, lse none, so none was checked"
        )
        yield Finding("gradient of lse", result.lse_has_gradient, detail)


def _check_poison(fn: Function, case: Case, problem: _Problem) -> Iterator[Finding]:
    """NaN wherever nothing may be read: results must be those of the clean problem."""
    row_used, key_used = problem.allowed.any(-1), problem.allowed.any(-2).any(1)
    bias = problem.extras.get("bias")
    bias_used = None if bias is None else _used_of(bias, problem.allowed.expand(*problem.q.shape[:3], -1))
    if all(bool(used.all()) for used in (row_used, key_used, bias_used) if used is not None):
        return
    # With one mask for all heads a row is empty for all heads; otherwise q stays clean where one head uses it.
    rows = row_used.expand(*problem.q.shape[:3])[..., None]
    keys = key_used[:, None, :, None]
    poisoned = problem._replace(
        q=torch.where(rows, problem.q, math.nan),
        k=torch.where(keys, problem.k, math.nan),
        v=torch.where(keys, problem.v, math.nan),
        grad_out=torch.where(rows, problem.grad_out, math.nan),
        grad_lse=torch.where(rows[..., 0], problem.grad_lse, math.nan),
    )
    clean = problem._replace(
        q=torch.where(rows, problem.q, 0.0), k=torch.where(keys, problem.k, 0.0), v=torch.where(keys, problem.v, 0.0)
    )
    clean = clean._replace(
        grad_out=torch.where(rows, problem.grad_out, 0.0), grad_lse=torch.where(rows[..., 0], problem.grad_lse, 0.0)
    )
    if bias is not None and bias_used is not None:
        poisoned, clean = (
            x._replace(extras={**x.extras, "bias": torch.where(bias_used, bias, hidden)})
            for x, hidden in ((poisoned, math.nan), (clean, 0.0))
        )
    yield from _compare("poison: ", case, _run(fn, case, poisoned), clean)


def _used_of(bias: Tensor, allowed: Tensor) -> Tensor:
    """Which elements of a bias some allowed pair reads; ``allowed`` (batch, heads, q_len, k_len)."""
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    for dimension, size in enumerate(sizes):
        if size == 1:
            allowed = allowed.any(dimension, keepdim=True)
    return allowed.reshape(bias.shape)


def _read_out(fn: Function, case: Case, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """The weights that the function gives to every key, (batch, heads, q_len, k_len): v is slices of the identity."""
    batch, kv_heads, k_len, _ = k.shape
    slices = []
    for begin in range(0, k_len, _READOUT_WIDTH):
        v = torch.zeros(batch, kv_heads, k_len, _READOUT_WIDTH, dtype=case.dtype, device=k.device)
        width = min(_READOUT_WIDTH, k_len - begin)
        index = torch.arange(width, device=k.device)
        v[:, :, begin + index, index] = 1.0
        out, _ = _outputs(fn, q, k, v, allowed, softmax_scale=1.0)
        slices.append(out.detach()[..., :width])
    return torch.cat(slices, -1)


def _check_readout(fn: Function, case: Case, problem: _Problem) -> Iterator[Finding]:
    """Reads the realised mask out of the function: with q = k = 0 a row weighs each of its n keys 1/n, others 0."""
    if case.features or case.k_len == 0 or problem.q.numel() == 0:
        return
    allowed = problem.allowed.expand(*problem.q.shape[:3], -1)
    device = problem.q.device
    q_shape = (*problem.q.shape[:3], _READOUT_WIDTH)
    k_shape = (*problem.k.shape[:3], _READOUT_WIDTH)
    q = torch.zeros(q_shape, dtype=case.dtype, device=device)
    k = torch.zeros(k_shape, dtype=case.dtype, device=device)
    weights = _read_out(fn, case, q, k, problem.allowed)
    wrong = (weights != 0) != allowed
    detail = f"{int(wrong.sum())} of {wrong.numel()} pairs differ"
    if wrong.any():
        batch, head, row, _ = (int(index) for index in wrong.nonzero()[0])
        seen, expected = (_ranges(x[batch, head, row]) for x in (weights != 0, allowed))
        detail += f"; batch {batch}, head {head}, row {row} sees keys {seen}, expected {expected}"
    yield Finding("mask read out", not wrong.any(), detail)
    count = allowed.sum(-1, keepdim=True).double()
    error = float(torch.where(allowed, weights.double() * count - 1.0, 0.0).abs().max())
    limit = SLACK * torch.finfo(case.dtype).eps
    yield Finding("weights of equal keys", error <= limit, f"relative error {error:.3g}, limit {limit:.3g}")

    # Each key says where it is, its low and its high digit, and each row asks for one: the addresses of K are right.
    places = torch.arange(case.k_len, device=device)
    rows = torch.arange(case.q_len, device=device)
    for digit, values in (("low", places % _READOUT_WIDTH), ("high", places // _READOUT_WIDTH)):
        asked = (rows * 7 + 3) % (int(values.max()) + 1)
        k = torch.nn.functional.one_hot(values, _READOUT_WIDTH).to(case.dtype).expand(k_shape).contiguous()
        q = torch.nn.functional.one_hot(asked, _READOUT_WIDTH).to(case.dtype).mul(8.0).expand(q_shape).contiguous()
        weights = _read_out(fn, case, q, k, problem.allowed)
        identity = torch.eye(case.k_len, dtype=torch.float64, device=device).expand(*k_shape[:2], -1, -1)
        oracle, plain = (
            plain_attention(q.to(dtype), k.to(dtype), identity.to(dtype), problem.allowed, softmax_scale=1.0)[0]
            for dtype in (torch.float64, case.dtype)
        )
        budget = error_budget(weights, plain, oracle, case.dtype)
        yield Finding(
            f"keys read out, {digit} digit", budget.passed, f"error {budget.error:.3g}, limit {budget.limit:.3g}"
        )


def _ranges(row: Tensor) -> str:
    """The True places of a row as half-open ranges."""
    edges = torch.diff(torch.nn.functional.pad(row.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
    return " ".join(f"[{begin}, {end})" for begin, end in zip(edges[::2], edges[1::2], strict=True)) or "none"


def _check_invariances(fn: Function, case: Case, problem: _Problem) -> Iterator[Finding]:
    """Relations between results of the function itself. Skipped where a bias or ALiBi ties rows to their places."""
    if case.bias_shape is not None or case.alibi or problem.q.numel() == 0 or problem.k.numel() == 0:
        return
    keywords = dict(problem.extras)
    for name, extra in keywords.items():
        if isinstance(extra, Tensor):
            keywords[name] = extra.to(_at_least_single(case.dtype))
    keywords["softmax_scale"] = case.softmax_scale
    q, k, v = (x.to(case.dtype) for x in (problem.q, problem.k, problem.v))
    allowed = problem.allowed

    def run(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = _outputs(fn, q, k, v, allowed.contiguous(), **keywords)
        return out.detach(), None if lse is None else lse.detach()

    whole, lse = run(q, k, v, allowed)
    plain, oracle = (
        plain_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            allowed,
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            sinks=keywords.get("sinks"),
        )[0]
        for dtype in (case.dtype, torch.float64)
    )
    # Both sides may be as far from the oracle as the budget allows, in opposite directions.
    limit = 2.0 * error_budget(whole, plain, oracle, case.dtype).limit

    def equal(name: str, left: Tensor, right: Tensor) -> Finding:
        difference = (left.double() - right.double()).abs().nan_to_num(nan=math.inf)
        error = float(difference.max()) if difference.numel() else 0.0
        return Finding(name, error <= limit, f"difference {error:.3g}, limit {limit:.3g}")

    if case.batch > 1:
        order = list(reversed(range(case.batch)))
        yield equal("batch reversed", run(q[order], k[order], v[order], allowed[order])[0], whole[order])
    if case.kv_heads != case.heads:
        group = case.heads // case.kv_heads
        repeated = run(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), allowed)[0]
        yield equal("repeated heads", repeated, whole)
    if case.sequences:
        parts = torch.zeros_like(whole)
        for row, row_end, key, key_end in case.sequences:
            if row < row_end and key < key_end:
                parts[:, :, row:row_end] = run(
                    q[:, :, row:row_end],
                    k[:, :, key:key_end],
                    v[:, :, key:key_end],
                    allowed[:, :, row:row_end, key:key_end],
                )[0]
        yield equal("each sequence alone", parts, whole)
    if lse is not None and not case.sinks:
        middle = torch.arange(case.k_len, device=q.device) < case.k_len // 2
        (left, left_lse), (right, right_lse) = (run(q, k, v, allowed & half) for half in (middle, ~middle))
        assert left_lse is not None and right_lse is not None
        total = torch.logaddexp(left_lse, right_lse)
        shares = ((x - total).exp().nan_to_num(nan=0.0) for x in (left_lse, right_lse))
        merged = sum(part * share[..., None] for part, share in zip((left, right), shares, strict=True))
        yield equal("keys split and merged", torch.as_tensor(merged), whole)
        yield equal("lse split and merged", total.nan_to_num(neginf=0.0), lse.nan_to_num(neginf=0.0))


_CHECKS: Mapping[str, Callable[[Function, Case, _Problem], Iterator[Finding]]] = {
    "numbers": _check_numbers,
    "readout": _check_readout,
    "poison": _check_poison,
    "invariances": _check_invariances,
}


def check(fn: Function, case: Case, *, parts: Collection[str] = PARTS, device: torch.device | str = "cpu") -> Report:
    """Checks an attention function on one case against a float64 oracle.

    Args:
        fn: called as ``fn(q, k, v, allowed, *, softmax_scale)`` (see the module); gradients are checked where its
            output carries one. An lse that is returned must then carry one too; none need be returned. Cases with
            features give it those as further keywords.
        case: one of ``maskops.testing.cases()``.
        parts: which checks to make.

            * ``"numbers"``: outputs and gradients, within twice the error of plain PyTorch in the same dtype plus a
              few roundings; rows without a key, and the gradients of keys that nobody sees, exactly 0.
            * ``"readout"``: the mask that the function realises, pair by pair, and its addressing of keys.
            * ``"poison"``: NaN in keys that nobody sees, in rows that see nothing, in the gradients that arrive there,
              and in a bias where the mask hides all its pairs, reaches no result. (torch's own
              scaled_dot_product_attention does not promise this.)
            * ``"invariances"``: reversed batch, repeated heads, each packed sequence alone, keys split and merged.
        device: where to run.

    Returns:
        A report; ``report.raise_if_failed()`` turns failures into an AssertionError.
    """
    unknown = [part for part in parts if part not in _CHECKS]
    if unknown:
        raise ValueError(f"parts holds {unknown[0]!r}: expected some of {', '.join(map(repr, _CHECKS))}")
    problem = _problem(case, device)
    findings: list[Finding] = []
    try:
        for part in PARTS:
            if part in parts:
                findings.extend(_CHECKS[part](fn, case, problem))
    except _WrongShapeError as wrong:
        findings.append(Finding("shape", False, str(wrong)))
    names = {finding.name.removeprefix("poison: ") for finding in findings}
    return Report(case, findings, is_differentiable="dq" in names or "out" not in names)
