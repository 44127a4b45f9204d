"""maskops.cross_entropy against a token-by-token oracle in float64, on every backend."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import extension
from maskops.testing import error_budget

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    available = maskops.backends()[name]
    if available != "available":
        pytest.skip(f"{name}: {available}")
    with maskops.use_backend(name, fallback="error" if name != "reference" else "warn"):
        yield name


def needs_extension() -> None:
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")


class Outputs(NamedTuple):
    loss: Tensor
    lse: Tensor
    logprobs: Tensor
    entropy: Tensor
    argmax: Tensor


def sequences_of(target: Tensor, cu_seqlens: Tensor | None) -> list[range]:
    """The flat token indices of every sequence."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        return [range(a, b) for a, b in itertools.pairwise(offsets)]
    length = target.shape[-1] if target.dim() else 1
    return [range(a, a + length) for a in range(0, target.numel(), length or 1)]


def token_by_token(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,
    num_items: int | Tensor | None = None,
    shift: bool = False,
) -> Outputs:
    """The definition, as loops over tokens in the dtype of the logits; shares no code with the package."""
    matrix, labels = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).tolist()
    kept_mask = [True] * len(labels) if mask is None else mask.reshape(-1).bool().tolist()
    weights = [1.0] * len(labels) if token_weights is None else token_weights.reshape(-1).tolist()
    zero = matrix.new_zeros(())
    loss, lse, logprobs, entropy = ([zero] * len(labels) for _ in range(4))
    argmax = [-1] * len(labels)
    means, kept_rows, kept_weights = [], [], []
    for sequence in sequences_of(target, cu_seqlens):
        rows, row_weights = [], []
        for row in sequence:
            token = row + 1 if shift else row
            if token not in sequence or labels[token] == ignore_index or not kept_mask[token] or weights[token] == 0:
                continue
            z = matrix[row] * logit_scale
            banned = z == -math.inf
            if softcap:
                z = torch.where(banned, z, softcap * torch.tanh(z / softcap))
            shift_by = z.detach().max()
            normaliser = shift_by + torch.log(torch.exp(z - shift_by).sum())
            logp = (z - normaliser)[~banned]
            nll = normaliser - z[labels[token]]
            value = (1.0 - label_smoothing) * nll + z_loss * normaliser**2
            if label_smoothing:
                value = value + label_smoothing * -logp.mean()
            loss[row] = weights[token] * value
            lse[row], logprobs[row] = normaliser, -nll
            entropy[row] = -(logp.exp() * logp).sum()
            argmax[row] = int(matrix[row].argmax())
            rows.append(row)
            row_weights.append(weights[token])
        kept_rows += rows
        kept_weights += row_weights
        if rows:
            total = sum((loss[row] for row in rows), zero)
            means.append(total / sum(row_weights) if sum(row_weights) else zero)
    total = sum((loss[row] for row in kept_rows), zero)
    if reduction == "none":
        result = torch.stack(loss) if loss else zero.new_zeros(0)
        result = result.reshape(target.shape)
    elif reduction == "sum":
        result = total
    elif reduction == "sequence_mean":
        result = sum(means, zero) / max(len(means), 1)
    else:
        denominator = sum(kept_weights) if num_items is None else float(num_items)
        result = total / denominator if denominator else zero
    stacked = [
        torch.stack(values).reshape(target.shape) if values else zero.new_zeros(target.shape)
        for values in (lse, logprobs, entropy)
    ]
    return Outputs(result, *stacked, torch.tensor(argmax, dtype=torch.int64).reshape(target.shape))


RETURNS = {"return_lse": True, "return_logprobs": True, "return_entropy": True, "return_argmax": True}


def gradient(outputs: Any, logits: Tensor) -> Tensor:
    """Gradient of a sum in which every differentiable output has a share that differs from token to token."""
    total = outputs.loss.sum() if outputs.loss.dim() == 0 else (outputs.loss * ramp(outputs.loss, 1.0)).sum()
    for factor, value in zip((0.3, -0.4, 0.25), (outputs.lse, outputs.logprobs, outputs.entropy), strict=True):
        total = total + (value * ramp(value, factor)).sum()
    if not total.requires_grad:  # the oracle where no token is kept
        return torch.zeros_like(logits)
    return torch.autograd.grad(total, logits)[0]


def ramp(like: Tensor, factor: float) -> Tensor:
    return factor * torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


def check_case(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Outputs and the gradient of all of them together, within the error budget against plain float32."""
    wide = logits.detach().double().requires_grad_()
    oracle = token_by_token(wide, target, **options)
    plain_logits = logits.detach().float().requires_grad_()
    plain = token_by_token(plain_logits, target, **options)
    ours_logits = logits.detach().requires_grad_()
    ours = maskops.cross_entropy(ours_logits, target, **options, **RETURNS)
    for name in ("loss", "lse", "logprobs", "entropy"):
        actual, expected = getattr(ours, name), getattr(oracle, name)
        assert actual.shape == expected.shape
        assert actual.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        # The parts of a loss are as large as the normaliser, whatever they cancel to.
        magnitude = (
            max(1.0, float(expected.detach().abs().max()), float(oracle.lse.detach().abs().max()))
            if (expected.numel())
            else None
        )
        budget = error_budget(
            actual.detach(), getattr(plain, name).detach(), expected.detach(), torch.float32, magnitude
        )
        assert budget.passed, (name, budget)
    assert torch.equal(ours.argmax, oracle.argmax)
    expected_gradient = gradient(oracle, wide)
    plain_gradient = gradient(plain, plain_logits).to(logits.dtype)
    actual_gradient = gradient(ours, ours_logits)
    assert actual_gradient.shape == logits.shape and actual_gradient.dtype == logits.dtype
    budget = error_budget(actual_gradient, plain_gradient, expected_gradient, logits.dtype)
    assert budget.passed, budget


def problem(
    rows: tuple[int, ...] = (12,), vocabulary: int = 33, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(*rows, vocabulary, generator=generator)
    target = torch.randint(vocabulary, rows, generator=generator)
    target[torch.rand(rows, generator=generator) < 0.25] = IGNORE
    return logits.to(dtype), target


SCORING = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing only": {"label_smoothing": 1.0},
    "z loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.6},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 7.0, "logit_scale": 1.5},
}


@pytest.mark.parametrize("scoring", SCORING.values(), ids=SCORING.keys())
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring(backend: str, dtype: torch.dtype, vocabulary: int, scoring: dict[str, float]) -> None:
    check_case(*problem((6,), vocabulary, dtype), **scoring)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(backend: str, dtype: torch.dtype) -> None:
    check_case(*problem((3,), 50257, dtype), label_smoothing=0.1, softcap=30.0)
    check_case(*problem((3,), 50257, dtype, seed=1))


@pytest.mark.parametrize("target_at", [0, 15, 16, 63, 64, 127, 128, 199])
def test_target_in_every_part_of_a_row(backend: str, target_at: int) -> None:
    logits, _ = problem((2,), 200)
    check_case(logits, torch.tensor([target_at, 199 - target_at]), label_smoothing=0.1)


@pytest.mark.parametrize("vocabulary", [33000, 70, 3])
@pytest.mark.parametrize("softcap", [30.0, 1.0])
def test_softcap_with_a_ragged_tail(backend: str, vocabulary: int, softcap: float) -> None:
    """Padding of the last block must not enter as exp(-softcap): logits near -60 show it (a bug of other kernels)."""
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) - 60.0
    check_case(logits, torch.tensor([0, vocabulary - 1, vocabulary // 2]), softcap=softcap)


MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])
WEIGHTS = torch.tensor([[0.5, 2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 1.0, 1.0, 4.0, -0.5]])
MASKING = {
    "labels": {},
    "bool mask": {"mask": MASK.bool()},
    "integer mask": {"mask": MASK},
    "weights": {"token_weights": WEIGHTS},
    "integer weights": {"token_weights": MASK * 2},
    "both": {"mask": MASK.bool(), "token_weights": WEIGHTS.double()},
}
REDUCTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "sequence mean": {"reduction": "sequence_mean"},
    "num items": {"num_items": 7},
    "num items tensor": {"num_items": torch.tensor(5)},
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING.keys())
def test_padded(backend: str, masking: dict[str, Any], reduction: dict[str, Any], shift: bool) -> None:
    check_case(*problem((3, 5), 10), **masking, **reduction, shift=shift)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize(
    "offsets", [[0, 5, 6, 15], [0, 0, 4, 4, 4, 12, 12], [0, 15], [0], [0, 0], [0, 1, 2, 3, 4]], ids=str
)
def test_packed(backend: str, offsets: list[int], reduction: dict[str, Any], shift: bool) -> None:
    logits, target = problem((15,), 10)
    options = {**reduction, "shift": shift, "token_weights": WEIGHTS.reshape(-1)}
    for dtype in (torch.int32, torch.int64):
        check_case(logits, target, cu_seqlens=torch.tensor(offsets, dtype=dtype), **options)
    check_case(
        logits.reshape(3, 5, 10),
        target.reshape(3, 5),
        cu_seqlens=torch.tensor(offsets),
        **{**options, "token_weights": WEIGHTS},
    )


def test_packed_equals_padded(backend: str) -> None:
    logits, target = problem((3, 6), 20)
    lengths = [6, 2, 4]
    inside = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = maskops.cross_entropy(logits, target, mask=inside, shift=True, reduction="sequence_mean")
    packed = maskops.cross_entropy(
        logits[inside], target[inside], cu_seqlens=torch.tensor([0, 6, 8, 12]), shift=True, reduction="sequence_mean"
    )
    assert padded.item() == pytest.approx(packed.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(backend: str, dtype: torch.dtype) -> None:
    logits, target = problem((20,), 50, dtype)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            ours = maskops.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
            theirs = F.cross_entropy(logits.double(), target, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)


def test_float64() -> None:
    with maskops.use_backend("reference"):
        logits, target = problem((4, 3), 11, torch.float64)
        logits.requires_grad_()
        loss = maskops.cross_entropy(logits, target)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, 11), target.reshape(-1)))

        def scored(x: Tensor) -> tuple[Tensor, ...]:
            options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0, "return_lse": True}
            return tuple(maskops.cross_entropy(x, target, **options, return_entropy=True, return_logprobs=True)[:4])

        assert torch.autograd.gradcheck(scored, (logits,))
        assert torch.autograd.gradgradcheck(lambda x: scored(x)[0], (logits,))


@pytest.mark.parametrize("ignore_index", [-1, 0, 3, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ignore_index_and_target_dtype(backend: str, dtype: torch.dtype, ignore_index: int) -> None:
    logits, target = problem((9,), 5)
    target = target.masked_fill(target == IGNORE, ignore_index).to(dtype)
    check_case(logits, target, ignore_index=ignore_index)


def test_confident_rows_keep_their_relative_accuracy() -> None:
    """Where the target's probability is near 1, lse - z_y is a difference that cancels (8 % wrong in plain float32)."""
    needs_extension()
    vocabulary = 1000
    logits = torch.zeros(4, vocabulary)
    target = torch.tensor([0, 999, 500, 128])
    for row, margin in enumerate((17.7, 20.0, 25.0, 60.0)):  # p = 0.99998, ...
        logits[row, target[row]] = margin
    logits += torch.tensor([[0.0], [3.0], [-11.0], [100.0]])
    wide = logits.double().requires_grad_()
    # In float64 lse - z_y would cancel as well at a margin of 60.
    others = torch.stack([torch.cat([x[:y], x[y + 1 :]]).logsumexp(0) for x, y in zip(wide, target, strict=True)])
    expected = F.softplus(others - wide[torch.arange(4), target], threshold=1e9)
    expected_gradient = torch.autograd.grad(expected.sum(), wide)[0]
    for name in extension.instruction_sets():
        with instruction_set(name), maskops.use_backend("cpu", fallback="error"):
            ours_logits = logits.clone().requires_grad_()
            ours = maskops.cross_entropy(ours_logits, target, reduction="none", return_entropy=True)
            assert isinstance(ours, maskops.CrossEntropyOutput)
            torch.testing.assert_close(ours.loss.double(), expected, rtol=1e-6, atol=0.0)
            actual = torch.autograd.grad(ours.loss.sum(), ours_logits)[0]
            at_target = (torch.arange(4), target)
            torch.testing.assert_close(actual[at_target].double(), expected_gradient[at_target], rtol=1e-6, atol=0.0)
            log_p = (wide - (wide[at_target] + expected)[:, None]).index_put(at_target, -expected)
            expected_entropy = -(log_p.exp() * log_p).sum(1)
            assert ours.entropy is not None
            torch.testing.assert_close(ours.entropy.double(), expected_entropy.detach(), rtol=2e-6, atol=0.0)


class instruction_set:  # noqa: N801
    """Runs the kernels of one instruction set inside a ``with`` block."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = extension.instruction_set()
        extension.select_instruction_set(self.name)

    def __exit__(self, *exception: object) -> None:
        assert self.before is not None
        extension.select_instruction_set(self.before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    needs_extension()
    assert extension.instruction_sets()
    for name in extension.instruction_sets():
        with instruction_set(name), maskops.use_backend("cpu", fallback="error"):
            for vocabulary in (5, 64, 700):
                check_case(*problem((5,), vocabulary, dtype))
                check_case(*problem((5,), vocabulary, dtype), label_smoothing=0.1, softcap=9.0, z_loss=0.01)


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


@pytest.mark.parametrize("kind", ["labels", "mask", "weights", "cancelling weights", "num_items"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_nothing_to_score(backend: str, kind: str, reduction: str) -> None:
    logits, target = problem((2, 4), 9)
    target, options = target.clamp(min=0), {}
    if kind == "labels":
        target = torch.full_like(target, IGNORE)
    elif kind == "mask":
        options["mask"] = torch.zeros(2, 4, dtype=torch.bool)
    elif kind == "weights":
        options["token_weights"] = torch.zeros(2, 4)
    elif kind == "num_items":
        target = torch.full_like(target, IGNORE)
        if reduction == "mean":
            options["num_items"] = torch.tensor(0)
    elif reduction in ("mean", "sequence_mean"):
        options["token_weights"] = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 2.0, 0.0, -2.0]])
    else:
        options["token_weights"] = torch.zeros(2, 4)
    if kind != "cancelling weights":
        logits.fill_(math.nan)
    logits.requires_grad_()
    loss = maskops.cross_entropy(logits, target, reduction=reduction, **options)
    assert bool((loss == 0).all())
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((grad == 0).all())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_empty_batch(backend: str, shape: tuple[int, ...], shift: bool) -> None:
    logits = torch.zeros(*shape, 7, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum", "none", *(["sequence_mean"] if len(shape) == 2 else [])):
        outputs = maskops.cross_entropy(logits, target, shift=shift, reduction=reduction, **RETURNS)
        assert outputs.loss.shape == (shape if reduction == "none" else ())
        assert bool((outputs.loss == 0).all()) and outputs.argmax.shape == shape
        assert torch.autograd.grad(outputs.loss.sum(), logits)[0].shape == logits.shape


def test_a_single_token_without_dimensions(backend: str) -> None:
    logits = torch.randn(6)
    loss = maskops.cross_entropy(logits, torch.tensor(2), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(2)))


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


@pytest.mark.parametrize("vocabulary", [3, 64, 200])
def test_argmax_is_the_first_of_equals(backend: str, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (40, vocabulary), generator=generator).float()
    target = torch.randint(vocabulary, (40,), generator=generator)
    outputs = maskops.cross_entropy(logits, target, softcap=1e-3, return_argmax=True)
    assert isinstance(outputs, maskops.CrossEntropyOutput)
    assert torch.equal(outputs.argmax, logits.argmax(1))
    assert outputs.lse is None and outputs.logprobs is None and outputs.entropy is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_logits(backend: str, dtype: torch.dtype) -> None:
    wide, target = problem((4, 6), 50, dtype)
    target = target.clamp(max=29)
    check_case(wide[..., 7:37], target)  # one stride between rows: no copy
    check_case(wide[:, ::2, 7:37], target[:, ::2])
    check_case(wide.transpose(0, 1)[..., :30], target.transpose(0, 1))  # no single stride
    check_case(wide[..., :30].transpose(0, 2).contiguous().transpose(0, 2), target)  # columns apart
    check_case(wide[:1, :1, :30].expand(4, 6, 30), target)
    check_case(wide[0, :3, :30], target[0, ::2])  # labels apart


def test_strided_logits_are_not_copied() -> None:
    needs_extension()
    wide = torch.randn(300, 1100)
    target = torch.randint(1000, (300,))
    with maskops.use_backend("cpu", fallback="error"):
        with torch.profiler.profile(profile_memory=True) as profile:
            maskops.cross_entropy(wide[:, 50:1050], target, shift=True)
    allocated = max(event.cpu_memory_usage for event in profile.events())
    assert allocated < 300 * 1000  # bytes; a copy would be 1.2 MB


def test_rows_do_not_depend_on_their_neighbours() -> None:
    needs_extension()
    logits, target = problem((64,), 300)
    whole = maskops.cross_entropy(logits, target, reduction="none")
    for row in (0, 17, 63):
        alone = maskops.cross_entropy(logits[row : row + 1].clone(), target[row : row + 1], reduction="none")
        assert torch.equal(alone, whole[row : row + 1])


def test_backward_twice(backend: str) -> None:
    logits, target = problem((6,), 50)
    logits.requires_grad_()
    loss = maskops.cross_entropy(logits, target, label_smoothing=0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(first, second)


def test_large_gradients_stream_past_the_caches() -> None:
    """Above 32 MiB other stores are used: aligned ones, with ragged ends, whatever the alignment of a row."""
    needs_extension()
    for dtype, rows, vocabulary in ((torch.float32, 85, 100_003), (torch.bfloat16, 170, 100_003)):
        logits, target = problem((rows,), vocabulary, dtype)
        target[:4] = torch.tensor([0, vocabulary - 1, 5, IGNORE])
        some = [0, 1, 2, 3, 4, 5, 6, 7, rows - 1]
        with maskops.use_backend("cpu", fallback="error"):
            x = logits.requires_grad_()
            (whole,) = torch.autograd.grad(maskops.cross_entropy(x, target, reduction="sum"), x)
            y = logits.detach()[some].requires_grad_()
            (part,) = torch.autograd.grad(maskops.cross_entropy(y, target[some], reduction="sum"), y)
        assert torch.equal(whole[some], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend: str, dtype: torch.dtype) -> None:
    weight, target = problem((6,), 50, dtype)
    weight.requires_grad_()
    expected = torch.autograd.grad(maskops.cross_entropy(weight * 2, target), weight)[0]
    logits = weight * 2
    address = logits.data_ptr()
    held: list[Tensor] = []
    logits.register_hook(held.append)
    before = logits.detach().clone()
    loss = maskops.cross_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    if backend == "cpu":
        assert held[0].data_ptr() == address
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
    else:
        assert torch.equal(logits.detach(), before)


def test_inplace_backward_of_rows_that_share_memory(backend: str) -> None:
    row, _ = problem((1,), 30)
    row.requires_grad_()
    target = torch.tensor([1, 2, 3])
    loss = maskops.cross_entropy(row.expand(3, 30), target, inplace_backward=True)
    expected = torch.autograd.grad(F.cross_entropy(row.expand(3, 30), target), row, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, row)[0], expected, rtol=1e-5, atol=1e-7)


def test_another_op_that_saved_the_logits_notices_an_inplace_backward() -> None:
    needs_extension()
    logits, target = problem((6,), 50)
    logits = (logits.requires_grad_() * 1).sigmoid()  # sigmoid saves its result
    with maskops.use_backend("cpu", fallback="error"):
        loss = maskops.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    needs_extension()
    logits, target = problem((6,), 50)
    logits.requires_grad_()
    with maskops.use_backend("cpu", fallback="error"):
        (grad,) = torch.autograd.grad(maskops.cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no double backward in a kernel.*use_backend\('reference'\)"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp loads its decompositions
def test_functional_gradients(backend: str) -> None:
    logits, target = problem((6,), 50)
    expected = torch.autograd.grad(maskops.cross_entropy(logits.requires_grad_(), target), logits)[0]
    logits = logits.detach()
    assert torch.equal(torch.func.grad(maskops.cross_entropy)(logits, target), expected)
    if backend == "cpu":  # never a tangent of 0 that nobody computed
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            torch.func.jvp(lambda x: maskops.cross_entropy(x, target), (logits,), (logits,))
    else:
        _, tangent = torch.func.jvp(lambda x: maskops.cross_entropy(x, target), (logits,), (logits,))
        torch.testing.assert_close(tangent, (expected * logits).sum(), rtol=1e-4, atol=1e-5)


def test_no_gradient_asked(backend: str) -> None:
    logits, target = problem((6,), 50)
    assert not maskops.cross_entropy(logits, target).requires_grad
    with torch.no_grad():
        assert not maskops.cross_entropy(logits.requires_grad_(), target).requires_grad
    outputs = maskops.cross_entropy(logits, target, return_argmax=True)
    assert isinstance(outputs, maskops.CrossEntropyOutput)
    assert outputs.loss.requires_grad and outputs.argmax is not None and not outputs.argmax.requires_grad


COMPILED = {
    "plain": {},
    "padded": {"shift": True, "label_smoothing": 0.1, "token_weights": WEIGHTS, "reduction": "sequence_mean"},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 12]), "shift": True, "reduction": "sequence_mean", "mask": MASK},
    "outputs": {**RETURNS, "num_items": torch.tensor(4), "softcap": 5.0},
    "in place": {"inplace_backward": True},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_as_one_graph(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    logits, target = problem((3, 5), 30)
    logits.requires_grad_()

    def scored(x: Tensor) -> Tensor:
        outputs = maskops.cross_entropy(x * 1.0, target, **options)
        return outputs if isinstance(outputs, Tensor) else outputs.loss + outputs.entropy.sum() + outputs.lse.sum()

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    results = [(loss := fn(logits), *torch.autograd.grad(loss, logits)) for fn in (scored, compiled)]
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-6, atol=1e-6)


def test_compiles_with_inductor_and_dynamic_shapes(backend: str) -> None:
    torch._dynamo.reset()

    def scored(x: Tensor, target: Tensor) -> Tensor:
        return maskops.cross_entropy(x, target, shift=True)

    compiled = torch.compile(scored, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        logits, target = problem((2, rows), 30)
        logits.requires_grad_()
        results = [(loss := fn(logits, target), *torch.autograd.grad(loss, logits)) for fn in (scored, compiled)]
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


def test_needs_no_value_of_a_tensor(backend: str) -> None:
    """Under fake tensors a look at a value would raise; so would a wait for a device."""
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(3, 5, 30, requires_grad=True)
        target = torch.empty(3, 5, dtype=torch.int64)
        outputs = maskops.cross_entropy(
            logits,
            target,
            mask=target > 0,
            token_weights=torch.empty(3, 5),
            cu_seqlens=torch.empty(4, dtype=torch.int32),
            num_items=torch.empty((), dtype=torch.int64),
            shift=True,
            label_smoothing=0.1,
            **RETURNS,
        )
        (grad,) = torch.autograd.grad(outputs.loss + outputs.entropy.sum(), logits)
    assert outputs.lse.shape == (3, 5) and grad.shape == (3, 5, 30)


@pytest.mark.parametrize("extras", [False, True])
def test_operators_are_registered_properly(extras: bool) -> None:
    needs_extension()
    logits, target = problem((6,), 30)
    numbers = (IGNORE, 0.1 if extras else 0.0, 0.01, 5.0 if extras else 0.0, 1.0)
    ops = torch.ops.maskops
    torch.library.opcheck(ops.cross_entropy_forward.default, (logits, target, *numbers, extras, extras))
    loss, lse, logprobs, entropy, _, columns = ops.cross_entropy_forward(logits, target, *numbers, extras, extras)
    nothing = torch.empty(0)
    grads = (torch.ones_like(loss), nothing, nothing, torch.ones_like(loss) if extras else nothing)
    saved = (target, lse, logprobs, entropy, columns)
    torch.library.opcheck(ops.cross_entropy_backward.default, (*grads, logits, *saved, *numbers))
    torch.library.opcheck(ops.cross_entropy_backward_.default, (*grads, logits.clone(), *saved, *numbers))
