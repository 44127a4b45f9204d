"""What linear_cross_entropy is tested against: cross-entropy over explicit logits in float64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.testing import error_budget

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RETURNS = {"return_lse": True, "return_logprobs": True, "return_entropy": True, "return_argmax": True}
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])
WEIGHTS = torch.tensor([[0.5, 2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 1.0, 1.0, 4.0, -0.5]])


class Problem:
    """A linear layer and targets."""

    def __init__(
        self,
        rows: tuple[int, ...] = (3, 5),
        width: int = 16,
        vocabulary: int = 33,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        ignored: float = 0.25,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(*rows, width, generator=generator).to(dtype)
        self.weight = torch.randn(vocabulary, width, generator=generator).to(weight_dtype or dtype)
        self.bias: Tensor | None = torch.randn(vocabulary, generator=generator).to(weight_dtype or dtype)
        self.target = torch.randint(vocabulary, rows, generator=generator)
        self.target[torch.rand(rows, generator=generator) < ignored] = IGNORE

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]

    def score(self, leaves: list[Tensor], **options: Any) -> Any:
        bias = leaves[2] if len(leaves) > 2 else None
        return maskops.linear_cross_entropy(leaves[0], leaves[1], self.target, bias=bias, **options)

    def explicit(self, leaves: list[Tensor], **options: Any) -> Any:
        """Cross-entropy over explicit logits, on the reference; skipped rows stay out of the product."""
        skipped = torch.zeros_like(self.target, dtype=torch.bool)
        if options.get("mask") is None and not options.get("shift"):
            skipped = self.target == options.get("ignore_index", IGNORE)
        logits = F.linear(torch.where(skipped[..., None], 0.0, leaves[0]), *leaves[1:])
        with maskops.use_backend("reference"):
            return maskops.cross_entropy(logits, self.target, **options)


def ramp(like: Tensor, factor: float) -> Tensor:
    return factor * torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


def gradients(outputs: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every differentiable output has a share that differs from token to token."""
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    total = torch.zeros((), dtype=torch.float64)
    for factor, value in zip((1.0, 0.3, -0.4, 0.25), outputs[:4], strict=False):
        if value is not None and value.requires_grad:
            total = total + (value * ramp(value, factor)).sum()
    return torch.autograd.grad(total, leaves)


def check(problem: Problem, **options: Any) -> None:
    """Outputs and gradients within the error budget against plain float32, relative to float64."""
    runs = []
    for run, dtype in ((problem.score, None), (problem.explicit, torch.float32), (problem.explicit, torch.float64)):
        leaves = problem.leaves(dtype)
        outputs = run(leaves, **options)
        runs.append((outputs if isinstance(outputs, tuple) else (outputs,), gradients(outputs, leaves)))
    (ours, our_grads), (plain, plain_grads), (oracle, oracle_grads) = runs
    scale = max((float(out.detach().abs().max()) for out in oracle[:2] if out is not None and out.numel()), default=1.0)
    for name, actual, approximate, expected in zip(
        ("loss", "lse", "logprobs", "entropy", "argmax"), ours, plain, oracle, strict=False
    ):
        if expected is None:
            assert actual is None
            continue
        assert actual.shape == expected.shape, name
        if name == "argmax":
            assert torch.equal(actual, expected)
            continue
        assert actual.dtype == torch.float32
        values = (actual.detach(), approximate.detach(), expected.detach())
        budget = error_budget(*values, torch.float32, max(1.0, scale))
        assert budget.passed, (name, budget)
    # One of the gradients may be a sum that cancels: its parts are as large as the others.
    largest = max((float(grad.abs().max()) for grad in oracle_grads if grad.numel()), default=1.0)
    for leaf, actual, approximate, expected in zip(problem.leaves(), our_grads, plain_grads, oracle_grads, strict=True):
        assert actual.dtype == leaf.dtype and actual.shape == leaf.shape
        budget = error_budget(actual, approximate.to(leaf.dtype), expected, leaf.dtype, largest)
        assert budget.passed, budget
