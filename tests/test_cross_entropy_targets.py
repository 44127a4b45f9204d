"""Class weights and target probabilities of maskops.cross_entropy, against torch and against the oracle."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import extension
from tests.cross_entropy_oracle import (
    BACKENDS,
    DTYPES,
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    check_case,
    distributions,
    gradients,
    instruction_set,
    needs_extension,
    problem,
)
from tests.served import each_of

pytestmark = pytest.mark.devices

backend = each_of(BACKENDS)


def factors(vocabulary: int) -> Tensor:
    """Class weights, one of them 0."""
    values = torch.rand(vocabulary, generator=torch.Generator().manual_seed(5)) + 0.25
    values[vocabulary // 3] = 0.0
    return values


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "class weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(backend: str, reduction: str, smoothing: float, weighted: bool, soft: bool) -> None:
    """Value, denominator and both gradients, as torch.nn.functional.cross_entropy has them."""
    logits, target = problem((12,), 70)
    target = distributions(logits) if soft else target
    weight = factors(70) if weighted else None
    results = []
    for double in (False, True):
        x, t = logits.clone().requires_grad_(), target.clone()
        given = [x, t.requires_grad_()] if soft else [x]
        if double:
            w = None if weight is None else weight.double()
            loss = F.cross_entropy(
                x.double(), t.double() if soft else t, w, reduction=reduction, label_smoothing=smoothing
            )
        else:
            loss = maskops.cross_entropy(x, t, class_weights=weight, reduction=reduction, label_smoothing=smoothing)
        upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results.append((loss.detach().float(), *torch.autograd.grad(loss, given, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-6)


SCORING: dict[str, dict[str, float]] = {
    "plain": {},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 7.0, "logit_scale": 1.5},
}


@pytest.mark.parametrize("kind", ["probabilities", "class weights", "both"])
@pytest.mark.parametrize("scoring", SCORING.values(), ids=SCORING.keys())
@pytest.mark.parametrize("vocabulary", [1, 7, 333])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring(backend: str, dtype: torch.dtype, vocabulary: int, scoring: dict[str, float], kind: str) -> None:
    logits, target = problem((6,), vocabulary, dtype)
    target = target if kind == "class weights" else distributions(logits)
    check_case(logits, target, class_weights=None if kind == "probabilities" else factors(vocabulary), **scoring)


@pytest.mark.parametrize("target_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_mix(backend: str, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    logits, _ = problem((5,), 77, dtype)
    target = distributions(logits).to(target_dtype)
    check_case(logits, target, class_weights=factors(77).to(target_dtype))


REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "sequence mean": {"reduction": "sequence_mean"},
    "num items": {"num_items": torch.tensor(5)},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize("kind", ["probabilities", "class weights", "both"])
def test_masks_and_reductions(backend: str, kind: str, reduction: dict[str, Any], shift: bool, layout: str) -> None:
    logits, target = problem((3, 5), 10)
    if kind != "class weights":
        target = distributions(logits)
    options: dict[str, Any] = {**reduction, "shift": shift, "mask": MASK.bool(), "token_weights": WEIGHTS}
    if kind != "probabilities":
        options["class_weights"] = factors(10)
    if layout == "packed":
        options["cu_seqlens"] = torch.tensor([0, 0, 6, 7, 13, 13])
    check_case(logits, target, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shift", [False, True])
def test_skipped_probabilities_are_never_read(backend: str, shift: bool, value: float) -> None:
    logits, _ = problem((3, 5), 40)
    target = distributions(logits)
    mask, weights = MASK.bool(), WEIGHTS
    kept_targets = mask & (weights != 0)
    if shift:
        kept_targets[:, 0] = False
    kept_rows = F.pad(kept_targets[:, 1:], (0, 1)) if shift else kept_targets
    results = []
    for filling in (value, 0.25):
        x = logits.masked_fill(~kept_rows[..., None], filling).requires_grad_()
        t = target.masked_fill(~kept_targets[..., None], filling).requires_grad_()
        outputs = maskops.cross_entropy(
            x, t, mask=mask, token_weights=weights, shift=shift, label_smoothing=0.1, reduction="none", **RETURNS
        )
        poison = torch.where(kept_rows, 1.0, filling)
        results.append((*outputs, *torch.autograd.grad([*outputs[:4]], [x, t], [poison] * 4)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert bool((results[0][5][~kept_rows] == 0).all()) and bool((results[0][6][~kept_targets] == 0).all())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_banned_columns(backend: str, weighted: bool, softcap: float, smoothing: float) -> None:
    """A column of -inf that the target gives no probability: no loss, no gradient, for either input."""
    logits, target = problem((6,), 90)
    banned = torch.rand(6, 90, generator=torch.Generator().manual_seed(3)) < 0.4
    banned[torch.arange(6), target.clamp(min=0)] = False
    logits = logits.masked_fill(banned, -math.inf)
    soft = distributions(logits).nan_to_num().masked_fill(banned, 0.0)
    options: dict[str, Any] = {"softcap": softcap, "label_smoothing": smoothing}
    if weighted:
        options["class_weights"] = factors(90)
        check_case(logits, target, **options)
    check_case(logits, soft, **options)
    x, t = logits.requires_grad_(), soft.requires_grad_()
    outputs = maskops.cross_entropy(x, t, **options, **RETURNS)
    for grad in gradients(outputs, x, t):
        assert bool(grad.isfinite().all()) and bool((grad[banned] == 0).all())


def test_a_banned_column_with_a_probability_costs_infinitely(backend: str) -> None:
    logits = torch.zeros(3, 20)
    logits[:, 4] = -math.inf
    target = torch.zeros(3, 20)
    target[:, 3] = 1.0
    target[1:, 4] = 0.5
    weights = torch.ones(20)
    losses = maskops.cross_entropy(logits, target, reduction="none", return_logprobs=True)
    assert isinstance(losses, maskops.CrossEntropyOutput) and losses.logprobs is not None
    assert losses.loss.isinf().tolist() == [False, True, True] and torch.equal(losses.logprobs, -losses.loss)
    # But not where its weight is 0.
    weights[4] = 0.0
    losses = maskops.cross_entropy(logits, target, class_weights=weights, reduction="none", return_logprobs=True)
    assert isinstance(losses, maskops.CrossEntropyOutput) and losses.logprobs is not None
    torch.testing.assert_close(losses.loss, torch.full((3,), math.log(19.0)))
    assert losses.logprobs.isinf().tolist() == [False, True, True]
    labels = torch.full((3,), 4)
    assert bool((maskops.cross_entropy(logits, labels, class_weights=weights, reduction="none") == 0).all())
    assert maskops.cross_entropy(logits, labels).isinf()
    assert maskops.cross_entropy(logits, labels, label_smoothing=1.0).item() == pytest.approx(math.log(19.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_distributions_keep_their_relative_accuracy(backend: str, dtype: torch.dtype) -> None:
    """One-hot, and all but: whatever small is left of loss and gradient at the column near 1 is right."""
    names = extension.instruction_sets() if backend == "cpu" else (None,)
    for margin in (10.82, 16.12, 27.63):
        logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
        logits[:, 123] = margin + math.log(500.0)
        logits = logits.to(dtype)
        target = torch.zeros(3, 500)
        target[:, 123] = 1.0
        target[1, 123], target[1, 7] = 1.0 - 2.0**-20, 2.0**-20
        target[2, 123] = 0.5
        x = logits.double().requires_grad_()
        t = target.double()
        others = (x - x[:, 123:124]).index_fill(1, torch.tensor([123]), -math.inf)
        nll = F.softplus(others.logsumexp(1), threshold=1e9)
        away = (x[:, 123:124] - x).index_fill(1, torch.tensor([123]), 0.0)
        expected = t.sum(1) * nll + (t * away).sum(1)
        (grad,) = torch.autograd.grad(expected.sum(), x)
        for name in names:
            if name is None:
                ours = _loss_and_gradient(logits, target)
            else:
                with instruction_set(name):
                    ours = _loss_and_gradient(logits, target)
            torch.testing.assert_close(ours[0].double(), expected.detach(), rtol=1e-6, atol=0.0)
            # The gradient of `away` cancels in float64, too, where p is within 1e-12 of 1.
            rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
            tiny = 1e-7 if dtype == torch.float16 else 1e-15
            torch.testing.assert_close(ours[1][:, 123].double(), grad[:, 123], rtol=rounding, atol=tiny)


def _loss_and_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    losses = maskops.cross_entropy(x, target, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@pytest.mark.processor
def test_instruction_sets_agree() -> None:
    needs_extension()
    for name in extension.instruction_sets():
        with instruction_set(name), maskops.use_backend("cpu", fallback="error"):
            for dtype in DTYPES:
                logits, target = problem((4,), 700, dtype)
                options: dict[str, Any] = {"label_smoothing": 0.1, "class_weights": factors(700)}
                check_case(logits, distributions(logits), **options, softcap=9.0)
                check_case(logits, target, **options)


@pytest.mark.processor
def test_threads_do_not_change_a_bit() -> None:
    needs_extension()
    logits, _ = problem((300,), 517)
    target = distributions(logits)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            with maskops.use_backend("cpu", fallback="error"):
                x, t = logits.clone().requires_grad_(), target.clone().requires_grad_()
                outputs = maskops.cross_entropy(x, t, class_weights=factors(517), label_smoothing=0.1, **RETURNS)
                results.append((*outputs, *gradients(outputs, x, t)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.processor
def test_large_gradients_stream_past_the_caches() -> None:
    needs_extension()
    logits, _ = problem((85,), 100_003)
    target = distributions(logits)
    some = [0, 5, 84]
    with maskops.use_backend("cpu", fallback="error"):
        results = []
        for chosen in (slice(None), some):
            x, t = logits[chosen].requires_grad_(), target[chosen].requires_grad_()
            loss = maskops.cross_entropy(x, t, reduction="sum", label_smoothing=0.1)
            results.append(torch.autograd.grad(loss, (x, t)))
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[some], part)


def test_strides(backend: str) -> None:
    wide, _ = problem((4, 6), 50)
    target = distributions(wide)
    check_case(wide[..., 7:37], target[..., 3:33])
    check_case(wide[:, ::2, 7:37], target.transpose(0, 1)[::2, :, :30].transpose(0, 1))
    check_case(wide[..., :30], target[..., :30].transpose(0, 2).contiguous().transpose(0, 2), shift=True)
    check_case(wide[0, 0, :30], target[0, 0, 20:])
    check_case(wide, target[:1, :1].expand(4, 6, 50), class_weights=factors(100)[::2])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty_batch(backend: str, shape: tuple[int, ...], shift: bool) -> None:
    logits, target = torch.zeros(*shape, 7, requires_grad=True), torch.zeros(*shape, 7, requires_grad=True)
    loss = maskops.cross_entropy(logits, target, class_weights=factors(7), label_smoothing=0.1, shift=shift)
    assert loss == 0 and [g.shape for g in torch.autograd.grad(loss, (logits, target))] == [(*shape, 7)] * 2


def test_weights_that_sum_to_0(backend: str) -> None:
    logits, target = problem((6,), 9)
    logits.requires_grad_()
    for reduction in ({}, {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 2, 6])}):
        loss = maskops.cross_entropy(logits, target, class_weights=torch.zeros(9), label_smoothing=0.1, **reduction)
        assert loss == 0 and bool((torch.autograd.grad(loss, logits)[0] == 0).all())


def test_gradients_of_one_input(backend: str) -> None:
    """Either, both, or the same tensor as logits and target."""
    logits, _ = problem((6,), 50)
    target = distributions(logits)
    both = [logits.clone().requires_grad_(), target.clone().requires_grad_()]
    expected = torch.autograd.grad(maskops.cross_entropy(*both), both)
    for which in (0, 1):
        given = [value.detach() for value in both]
        given[which].requires_grad_()
        assert torch.equal(torch.autograd.grad(maskops.cross_entropy(*given), given[which])[0], expected[which])
    x = logits.clone().requires_grad_()
    parts = [logits.clone().requires_grad_(), logits.clone().requires_grad_()]
    expected = torch.autograd.grad(maskops.cross_entropy(*parts), parts)
    assert torch.equal(torch.autograd.grad(maskops.cross_entropy(x, x), x)[0], expected[0] + expected[1])


@pytest.mark.parametrize("target_grad", [False, True])
def test_inplace_backward(backend: str, target_grad: bool) -> None:
    weight, _ = problem((6,), 50)
    target = distributions(weight).requires_grad_(target_grad)
    inputs = [weight.requires_grad_(), target] if target_grad else [weight.requires_grad_()]
    expected = torch.autograd.grad(maskops.cross_entropy(weight * 2, target), inputs)
    actual = torch.autograd.grad(maskops.cross_entropy(weight * 2, target, inplace_backward=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.processor
def test_double_backward_is_refused() -> None:
    needs_extension()
    logits, _ = problem((6,), 50)
    inputs = logits.requires_grad_(), distributions(logits.detach()).requires_grad_()
    with maskops.use_backend("cpu", fallback="error"):
        grads = torch.autograd.grad(maskops.cross_entropy(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward in a kernel"):
        grads[1].sum().backward()


def test_float64() -> None:
    with maskops.use_backend("reference"):
        logits, labels = problem((4,), 6, torch.float64)
        target = distributions(logits)
        weights = factors(6).double()

        def scored(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            options: dict[str, Any] = {"label_smoothing": 0.1, "class_weights": weights, "return_logprobs": True}
            outputs = maskops.cross_entropy(x, t, **options)
            assert isinstance(outputs, maskops.CrossEntropyOutput) and outputs.logprobs is not None
            return outputs.loss, outputs.logprobs

        inputs = logits.requires_grad_(), target.requires_grad_()
        assert torch.autograd.gradcheck(scored, inputs)
        assert torch.autograd.gradgradcheck(scored, inputs)
        ours = maskops.cross_entropy(logits, labels, class_weights=weights, label_smoothing=0.3)
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weights, label_smoothing=0.3))


@pytest.mark.parametrize("same", [False, True])
def test_compiles_as_one_graph(backend: str, same: bool) -> None:
    torch._dynamo.reset()
    logits, _ = problem((3, 5), 30)
    inputs = [logits.requires_grad_(), logits if same else distributions(logits.detach()).requires_grad_()]
    options: dict[str, Any] = {"class_weights": factors(30), "label_smoothing": 0.1, "shift": True, "mask": MASK.bool()}

    def scored(x: Tensor, t: Tensor) -> Tensor:
        return maskops.cross_entropy(x, t, **options)

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    distinct = inputs[:1] if same else inputs
    results = [(loss := fn(*inputs), *torch.autograd.grad(loss, distinct)) for fn in (scored, compiled)]
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-6, atol=1e-6)


def test_exports(backend: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return maskops.cross_entropy(x, t), maskops.cross_entropy(x, y, class_weights=w, label_smoothing=0.1)

    logits, target = problem((6,), 30)
    inputs = logits, distributions(logits), target, factors(30)
    exported = torch.export.export(Model(), inputs).module()
    for ours, eager in zip(exported(*inputs), Model()(*inputs), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.processor
def test_operators_are_registered_properly() -> None:
    needs_extension()
    logits, labels = problem((6,), 30)
    labels[-1] = IGNORE
    probabilities, weights, ops = distributions(logits), factors(30), torch.ops.maskops
    for targets, shift in (((weights, probabilities), True), ((weights, torch.empty(0)), False)):
        numbers = (IGNORE, 0.1, 0.01, 5.0, 1.0)
        arguments = (logits, labels, *targets, shift, *numbers, True, True)
        torch.library.opcheck(ops.cross_entropy_forward.default, arguments)
        loss, lse, logprobs, entropy, _, statistics = ops.cross_entropy_forward(*arguments)
        saved = (labels, *targets, lse, logprobs, entropy, statistics, shift)
        grads = (torch.ones_like(loss), torch.empty(0), torch.ones_like(loss), torch.ones_like(loss))
        for wanted in (False, True):
            torch.library.opcheck(ops.cross_entropy_backward.default, (*grads, logits, *saved, wanted, *numbers))
        torch.library.opcheck(ops.cross_entropy_backward_.default, (*grads, logits.clone(), *saved, *numbers))
