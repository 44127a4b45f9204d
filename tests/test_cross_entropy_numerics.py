"""maskops.cross_entropy where floating point is hard: confident rows, banned columns, NaN, threads, vector widths."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import extension
from maskops.ops.cross_entropy import reference, rows
from tests.cross_entropy_oracle import (
    BACKENDS,
    DTYPES,
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    check_case,
    gradient,
    instruction_set,
    needs_extension,
    problem,
    token_by_token,
)
from tests.served import each_of

pytestmark = pytest.mark.devices

backend = each_of(BACKENDS)


TRANSFORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 30.0},
    "both": {"logit_scale": 3.3, "softcap": 50.0},
}


def confident_problem(
    margin: float, dtype: torch.dtype, vocabulary: int, *, softcap: float = 0.0, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Rows in which the target's z exceeds the logsumexp of the others by about ``margin``: p = sigmoid(margin)."""
    generator = torch.Generator().manual_seed(int(margin))
    rows = 6
    z = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    # Where z is far from 0 a rounding of it is large; a softcap has no room for that.
    offsets = torch.tensor([0.0, 3.0, -11.0, 30.0, 100.0, -100.0]) * (0.0 if softcap else 1.0)
    z = z.scatter(1, target[:, None], -math.inf)
    z = z.scatter(1, target[:, None], (z.logsumexp(1) + margin)[:, None]) + offsets[:, None]
    if softcap:
        z = softcap * torch.atanh(z / softcap)
    return (z / logit_scale).to(dtype), target


def confident_oracle(
    logits: Tensor, target: Tensor, *, softcap: float = 0.0, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy, and gradient of the target's logit in float64, where lse - z_y would cancel as well."""
    x = logits.double().requires_grad_()
    z = x * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    column = target[:, None]
    others = (z - z.gather(1, column)).scatter(1, column, -math.inf).logsumexp(1)
    loss = F.softplus(others, threshold=1e9)
    log_p = (z - (z.gather(1, column).squeeze(1) + loss)[:, None]).scatter(1, column, -loss[:, None])
    grad = torch.autograd.grad(loss.sum(), x)[0].gather(1, column).squeeze(1)
    return loss.detach(), -(log_p.exp() * log_p).sum(1).detach(), grad


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("vocabulary", [100, 20_011])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_relative_accuracy(
    backend: str, dtype: torch.dtype, vocabulary: int, transform: dict[str, float]
) -> None:
    """Where p is near 1, lse - z_y cancels: at 0.99998 it is 8 % wrong in float32, at 1 - 1e-7 nothing is left."""
    # p of 1e-5, 0.5, 0.99, 0.99998, 1 - 1e-7 and, where the softcap leaves room for it, 1 - 1e-12.
    margins = [-11.5, 0.0, 4.6, 10.82, 16.12] + ([] if "softcap" in transform else [27.63])
    names = extension.instruction_sets() if backend == "cpu" else (None,)
    for margin in margins:
        logits, target = confident_problem(margin, dtype, vocabulary, **transform)
        loss, entropy, grad = confident_oracle(logits, target, **transform)
        for name in names:
            with contextlib.nullcontext() if name is None else instruction_set(name):
                x = logits.clone().requires_grad_()
                ours = maskops.cross_entropy(x, target, reduction="none", return_entropy=True, **transform)
                actual = torch.autograd.grad(ours.loss.sum(), x)[0].gather(1, target[:, None]).squeeze(1)
            torch.testing.assert_close(ours.loss.detach().double(), loss, rtol=1e-6, atol=0.0)
            torch.testing.assert_close(ours.entropy.detach().double(), entropy, rtol=2e-6, atol=0.0)
            rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
            subnormal = 1e-7 if dtype == torch.float16 else 0.0
            torch.testing.assert_close(actual.double(), grad, rtol=rounding, atol=subnormal)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    needs_extension()
    assert extension.instruction_sets()
    for name in extension.instruction_sets():
        with instruction_set(name), maskops.use_backend("cpu", fallback="error"):
            for vocabulary in (5, 64, 700):
                check_case(*problem((5,), vocabulary, dtype))
                check_case(*problem((5,), vocabulary, dtype), label_smoothing=0.1, softcap=9.0, z_loss=0.01)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    needs_extension()
    logits, target = problem((700,), 517, dtype)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sequence_mean", "shift": True}
    options["cu_seqlens"] = torch.tensor([0, 100, 600, 690])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            with maskops.use_backend("cpu", fallback="error"):
                x = logits.detach().requires_grad_()
                outputs = maskops.cross_entropy(x, target, **options, **RETURNS)
                results.append((*outputs, gradient(outputs, x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.processor
def test_threads_do_not_change_a_bit_of_a_long_sum() -> None:
    needs_extension()
    logits, target = problem((90_001,), 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            weights = torch.linspace(0.1, 2.0, 90_001)
            losses = [
                maskops.cross_entropy(logits, target, token_weights=weights),
                maskops.cross_entropy(logits[None], target[None], reduction="sequence_mean"),
                maskops.cross_entropy(logits, target, reduction="sum"),
            ]
            results.append(torch.stack(losses))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


POISON = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_rows_are_never_read(backend: str, dtype: torch.dtype, value: float) -> None:
    logits, target = problem((3, 5), 40, dtype)
    mask, weights = MASK.bool(), WEIGHTS
    skipped = (target == IGNORE) | ~mask | (weights == 0)
    poisoned = logits.masked_fill(skipped[..., None], value).requires_grad_()
    clean = logits.masked_fill(skipped[..., None], 0.0).requires_grad_()
    options = {"mask": mask, "token_weights": weights, "label_smoothing": 0.1, "reduction": "none", **RETURNS}
    ours, expected = (maskops.cross_entropy(x, target, **options) for x in (poisoned, clean))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
        assert bool((a[skipped] == (-1 if a.dtype == torch.int64 else 0)).all())
    grads = [gradient(outputs, x) for outputs, x in ((ours, poisoned), (expected, clean))]
    assert torch.equal(*grads)
    assert bool((grads[0][skipped] == 0).all())


def test_incoming_gradients_of_skipped_rows_are_never_read(backend: str) -> None:
    logits, target = problem((8,), 40)
    logits.requires_grad_()
    outputs = maskops.cross_entropy(logits, target, reduction="none", **RETURNS)
    poison = torch.where(target == IGNORE, math.nan, 1.0)
    grads = torch.autograd.grad([*outputs[:4]], logits, [poison] * 4)[0]
    assert bool(grads.isfinite().all()) and bool((grads[target == IGNORE] == 0).all())


@pytest.mark.processor
def test_rows_without_an_incoming_gradient_are_not_read_in_backward() -> None:
    needs_extension()
    logits, target = problem((4,), 40)
    logits[1] = math.nan
    logits.requires_grad_()
    with maskops.use_backend("cpu", fallback="error"):
        losses = maskops.cross_entropy(logits, target.clamp(min=0), reduction="none")
    (grad,) = torch.autograd.grad(losses[0] + losses[2], logits)
    assert bool((grad[[1, 3]] == 0).all()) and bool((grad[[0, 2]] != 0).all())


def test_tokens_after_the_last_sequence_are_never_read(backend: str) -> None:
    logits, target = problem((10,), 20)
    target = target.clamp(min=0)
    logits[7:] = math.nan
    target[7:] = 10**6  # not even their labels
    logits.requires_grad_()
    loss = maskops.cross_entropy(logits, target, cu_seqlens=torch.tensor([0, 3, 7]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and bool((grad[7:] == 0).all()) and bool((grad[:7] != 0).any())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_banned_columns(backend: str, softcap: float) -> None:
    """A logit of -inf has probability 0, no share of the smoothing, no entropy and no gradient."""
    logits, target = problem((6,), 90)
    banned = torch.rand(6, 90, generator=torch.Generator().manual_seed(3)) < 0.4
    banned[torch.arange(6), target.clamp(min=0)] = False
    logits = logits.masked_fill(banned, -math.inf)
    check_case(logits, target, label_smoothing=0.2, softcap=softcap)
    logits.requires_grad_()
    outputs = maskops.cross_entropy(logits, target, label_smoothing=0.2, softcap=softcap, **RETURNS)
    assert all(bool(value.isfinite().all()) for value in outputs[:4])
    assert bool((gradient(outputs, logits)[banned] == 0).all())


def test_a_banned_target_has_infinite_loss(backend: str) -> None:
    logits = torch.zeros(1, 20)
    logits[0, 4] = -math.inf
    outputs = maskops.cross_entropy(logits, torch.tensor([4]), **RETURNS)
    assert outputs.loss == math.inf and outputs.logprobs == -math.inf
    assert outputs.lse.item() == pytest.approx(math.log(19)) and outputs.entropy.item() == pytest.approx(math.log(19))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_banned_target_is_pulled_at_all_the_same(backend: str, softcap: float) -> None:
    """The cap leaves -inf as it is, so that the slope there is that of the scale."""
    logits, target = problem((4,), 90)
    logits[torch.arange(4), target.clamp(min=0)] = -math.inf
    soft = logits.nan_to_num(neginf=0.0).softmax(-1)  # gives what is banned a share
    for scored in (target, soft):
        results = []
        for x in (logits.double(), logits.clone()):
            x.requires_grad_()
            function = token_by_token if x.dtype == torch.float64 else maskops.cross_entropy
            loss = function(x, scored, softcap=softcap, logit_scale=1.5, reduction="sum", label_smoothing=0.1)
            results.append(torch.autograd.grad(loss if isinstance(loss, Tensor) else loss.loss, x)[0].float())
        assert bool((results[0] != 0).any()) and bool(results[0].isfinite().all())
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_a_kept_row_does_not_hide_what_is_not_finite(backend: str, at: int, value: float) -> None:
    logits = torch.zeros(2, 100)
    logits[0, at] = value
    for target in (torch.tensor([at, 1]), torch.tensor([(at + 1) % 100, 1])):
        outputs = maskops.cross_entropy(logits, target, reduction="none", return_lse=True, return_entropy=True)
        for values in outputs[:4]:
            assert values is None or (not values[0].isfinite() and values[1].isfinite())


def test_a_nan_with_any_payload_is_not_hidden(backend: str) -> None:
    logits = torch.zeros(1, 100)
    logits.view(torch.int32)[0, 37] = 0x7FC00001
    assert maskops.cross_entropy(logits, torch.tensor([2])).isnan()


@pytest.mark.parametrize("offset", [-3e38, -1e4, 0.0, 1e4, 3e38])
def test_extreme_logits(backend: str, offset: float) -> None:
    logits = torch.full((2, 70), offset)
    outputs = maskops.cross_entropy(logits, torch.tensor([3, 69]), reduction="none", **RETURNS)
    if abs(offset) <= 1e4:
        torch.testing.assert_close(outputs.loss, torch.full((2,), math.log(70.0)), rtol=0.0, atol=1e-3)
    assert bool(outputs.loss.isfinite().all()) and bool((outputs.argmax == 0).all())
    # One column far above the rest, and the target far below: the loss is the distance.
    logits = torch.zeros(1, 70)
    logits[0, 5] = 2000.0
    assert maskops.cross_entropy(logits, torch.tensor([6])).item() == 2000.0
    assert maskops.cross_entropy(logits, torch.tensor([5])).item() == 0.0


@pytest.mark.processor
def test_rows_do_not_depend_on_their_neighbours() -> None:
    needs_extension()
    logits, target = problem((64,), 300)
    whole = maskops.cross_entropy(logits, target, reduction="none")
    for row in (0, 17, 63):
        alone = maskops.cross_entropy(logits[row : row + 1].clone(), target[row : row + 1], reduction="none")
        assert torch.equal(alone, whole[row : row + 1])


class _WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as far as results of operators go."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            assert not isinstance(x, Tensor) or x.dtype != torch.float64, f"{func} made float64"
        return result


@pytest.mark.processor
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_float64(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not every device of a kind has it, nothing is computed in double precision, neither rows nor their sum."""
    logits = torch.randn(6, 33)
    target = torch.tensor([3, -100, 32, 0, 7, 11])
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def loss() -> Tensor:
        with maskops.use_backend("reference"):
            found = maskops.cross_entropy(
                logits, target, cu_seqlens=cu_seqlens, reduction="sequence_mean", label_smoothing=0.1, z_loss=0.1,
                softcap=9.0, token_weights=torch.linspace(0.1, 1, 6), return_entropy=True,
            )  # fmt: skip
        return found[0]

    expected, wide = loss(), rows.wide_dtype
    assert wide(torch.float32, torch.device("cpu")) == wide(torch.float32, torch.device("cuda")) == torch.float64
    for module in (rows, reference):
        monkeypatch.setattr(module, "wide_dtype", lambda dtype, _: wide(dtype, torch.device(device)))
    with _WithoutFloat64():
        torch.testing.assert_close(loss(), expected)
