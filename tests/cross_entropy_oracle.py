"""What the tests of cross-entropy share: a token-by-token oracle, problems, and the check of a whole case."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import maskops
from maskops import extension
from maskops.testing import error_budget
from tests.served import AT_HOME

BACKENDS = AT_HOME


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


IGNORE = -100


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
    class_weights: Tensor | None = None,
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
    matrix = logits.reshape(-1, logits.shape[-1])
    soft = target.is_floating_point()
    probabilities = target.reshape(-1, target.shape[-1]).to(matrix.dtype) if soft else matrix
    tokens = target[..., 0].detach() if soft else target
    labels = [0] * tokens.numel() if soft else target.reshape(-1).tolist()
    factors = matrix.new_ones(matrix.shape[1]) if class_weights is None else class_weights.to(matrix.dtype)
    kept_mask = [True] * len(labels) if mask is None else mask.reshape(-1).bool().tolist()
    weights = [1.0] * len(labels) if token_weights is None else token_weights.reshape(-1).tolist()
    zero = matrix.new_zeros(())
    loss, lse, logprobs, entropy = ([zero] * len(labels) for _ in range(4))
    argmax = [-1] * len(labels)
    means, kept_rows, kept_weights = [], [], []
    for sequence in sequences_of(tokens, cu_seqlens):
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
            surprise, share = normaliser - z, weights[token]
            if soft:
                there = ~(banned & (probabilities[token] == 0))  # neither 0 * inf nor its gradient
                logprob = -(probabilities[token] * surprise)[there].sum()
                value = (factors * probabilities[token] * surprise)[there].sum()
            else:
                logprob = -surprise[labels[token]]
                value = factors[labels[token]] * surprise[labels[token]]
                share = share * float(factors[labels[token]])
            value = (1.0 - label_smoothing) * value + z_loss * normaliser**2
            if label_smoothing:
                value = value + label_smoothing * (factors * surprise)[~banned].mean()
            loss[row] = weights[token] * value
            lse[row], logprobs[row] = normaliser, logprob
            entropy[row] = -(logp.exp() * logp).sum()
            argmax[row] = int(matrix[row].argmax())
            rows.append(row)
            row_weights.append(share)
        kept_rows += rows
        kept_weights += row_weights
        if rows:
            total = sum((loss[row] for row in rows), zero)
            means.append(total / sum(row_weights) if sum(row_weights) else zero)
    total = sum((loss[row] for row in kept_rows), zero)
    if reduction == "none":
        result = torch.stack(loss) if loss else zero.new_zeros(0)
        result = result.reshape(tokens.shape)
    elif reduction == "sum":
        result = total
    elif reduction == "sequence_mean":
        result = sum(means, zero) / max(len(means), 1)
    else:
        denominator = sum(kept_weights) if num_items is None else float(num_items)
        result = total / denominator if denominator else zero
    stacked = [
        torch.stack(values).reshape(tokens.shape) if values else zero.new_zeros(tokens.shape)
        for values in (lse, logprobs, entropy)
    ]
    return Outputs(result, *stacked, torch.tensor(argmax, dtype=torch.int64).reshape(tokens.shape))


RETURNS = {"return_lse": True, "return_logprobs": True, "return_entropy": True, "return_argmax": True}


def gradients(outputs: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum in which every differentiable output has a share that differs from token to token."""
    total = outputs.loss.sum() if outputs.loss.dim() == 0 else (outputs.loss * ramp(outputs.loss, 1.0)).sum()
    for factor, value in zip((0.3, -0.4, 0.25), (outputs.lse, outputs.logprobs, outputs.entropy), strict=True):
        total = total + (value * ramp(value, factor)).sum()
    if not total.requires_grad:  # the oracle where no token is kept
        return tuple(torch.zeros_like(value) for value in inputs)
    return torch.autograd.grad(total, inputs)


def gradient(outputs: Any, logits: Tensor) -> Tensor:
    return gradients(outputs, logits)[0]


def ramp(like: Tensor, factor: float) -> Tensor:
    return factor * torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


def check_case(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Outputs and the gradient of all of them together, within the error budget against plain float32."""

    def inputs(*dtypes: torch.dtype) -> list[Tensor]:
        """The logits, and the target if it holds probabilities; then they are differentiated, too."""
        given = [logits, target] if target.is_floating_point() else [logits]
        return [x.detach().to(dtype).requires_grad_() for x, dtype in zip(given, dtypes, strict=False)]

    wide = inputs(torch.float64, torch.float64)
    oracle = token_by_token(*[*wide, target][:2], **options)
    plain_inputs = inputs(torch.float32, torch.float32)
    plain = token_by_token(*[*plain_inputs, target][:2], **options)
    own = inputs(logits.dtype, target.dtype)
    ours = maskops.cross_entropy(*[*own, target][:2], **options, **RETURNS)
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
    expected = gradients(oracle, *wide)
    for actual, plainly, exact in zip(gradients(ours, *own), gradients(plain, *plain_inputs), expected, strict=True):
        assert actual.shape == exact.shape
        budget = error_budget(actual, plainly.to(actual.dtype), exact, actual.dtype)
        assert budget.passed, budget


def distributions(logits: Tensor, seed: int = 0) -> Tensor:
    """Target probabilities for every row of the logits: smooth ones, one-hot ones, some that do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.softmax(2.0 * torch.randn(logits.shape, generator=generator), -1)
    columns = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    one_hot = torch.zeros(logits.shape).scatter(-1, columns[..., None], 1.0)
    kind = torch.randint(4, (*logits.shape[:-1], 1), generator=generator)
    return torch.where(kind == 0, one_hot, torch.where(kind == 1, 0.6 * target, target)).to(logits.dtype)


def problem(
    rows: tuple[int, ...] = (12,), vocabulary: int = 33, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(*rows, vocabulary, generator=generator)
    target = torch.randint(vocabulary, rows, generator=generator)
    target[torch.rand(rows, generator=generator) < 0.25] = IGNORE
    return logits.to(dtype), target


MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])


WEIGHTS = torch.tensor([[0.5, 2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 1.0, 1.0, 4.0, -0.5]])


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
