"""What masked_softmax is tested against: its definition in float64, softmax by softmax, and inputs of every kind."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.testing import error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def needs_extension() -> None:
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")


def definition(x: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights and lse in x's dtype, softmax by softmax; shares no code with the package."""
    rows, visible = x.movedim(dim, -1), allowed.expand(x.shape).movedim(dim, -1)
    weights, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:-1], -INF)
    for index in itertools.product(*map(range, rows.shape[:-1])):
        values = rows[index][visible[index]]
        if values.numel() and values.max() > -INF:
            shifted = torch.exp(values - values.max())
            weights[index][visible[index]] = shifted / shifted.sum()
            lse[index] = values.max() + torch.log(shifted.sum())
    return weights.movedim(-1, dim), lse


def wide_softmax(x: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same of finite scores by torch, in float64: quicker than softmax by softmax."""
    scores = x.double().masked_fill(~allowed, -INF)
    return torch.softmax(scores, dim).nan_to_num(0.0), scores.logsumexp(dim)


def gradient_of(weights: Tensor, grad_weights: Tensor, grad_lse: Tensor, dim: int) -> Tensor:
    inner = (weights * grad_weights).sum(dim, keepdim=True)
    return weights * (grad_weights - inner + grad_lse.unsqueeze(dim))


def noise(*sizes: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def coins(*sizes: int, seed: int = 0, share: float = 0.6) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < share


UNREADABLE = 6
"""How many kinds of arguments `unreadable` makes."""


def unreadable(place: int, device: str = "cpu") -> tuple[Any, ...]:
    """Arguments that an operator must refuse, because the kernels rely on it for their memory accesses.

    Only a direct call of the operator can bring them about.
    """
    x = noise(2, 4, 5)
    plan = masks.causal().spans(4, 5, grad=False, device=device)
    absent = torch.empty(0, dtype=torch.int32)
    spans: list[Tensor] = [plan.start, plan.end, plan.key_valid]
    mask, dim = absent, 2
    if place == 0:
        mask, spans = coins(2, 4, 4), [absent] * 3
    elif place == 1:
        mask, spans = torch.ones(2, 4, 5), [absent] * 3
    elif place == 2:
        dim = 1
    elif place == 3:
        spans[0] = spans[0][:, :, :3]
    elif place == 4:
        spans[2] = spans[2][:, :4]
    else:
        dim = 3
    return (x, mask, *spans, dim, False)


def check(x: Tensor, mask: Any, allowed: Tensor, dim: int = -1) -> None:
    """Weights, lse and the gradient of both, within the error budget. ``allowed``: what the mask means."""
    dim %= x.dim()
    x = x.detach()
    leaf = x.requires_grad_()
    weights, lse = maskops.masked_softmax(leaf, mask, dim, return_lse=True)
    assert weights.shape == x.shape and weights.dtype == x.dtype and weights.is_contiguous()
    assert lse.shape == (*x.shape[:dim], *x.shape[dim + 1 :])
    assert lse.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    allowed = allowed.expand(x.shape)
    oracle_weights, oracle_lse = wide_softmax(x.detach(), allowed, dim)
    plain_x = x.detach().masked_fill(~allowed, -INF)
    plain = torch.softmax(plain_x, dim).nan_to_num(0.0)
    budget = error_budget(weights.detach(), plain, oracle_weights, x.dtype)
    assert budget.passed, ("weights", budget)
    assert not weights.detach()[~allowed].any()
    budget = error_budget(lse.detach(), plain_x.float().logsumexp(dim), oracle_lse, torch.float32)
    assert budget.passed, ("lse", budget)

    grad_weights = noise(*x.shape, seed=1, scale=1.0).to(x.dtype)
    grad_lse = noise(*lse.shape, seed=2, scale=1.0).to(lse.dtype)
    (grad,) = torch.autograd.grad((weights, lse), leaf, (grad_weights, grad_lse))
    assert grad.shape == x.shape and grad.dtype == x.dtype
    oracle = gradient_of(oracle_weights, grad_weights.double(), grad_lse.double(), dim)
    plain_grad = gradient_of(plain.float(), grad_weights.float(), grad_lse.float(), dim).to(x.dtype)
    magnitude = max(float(grad_weights.abs().max()), float(grad_lse.abs().max())) if x.numel() else None
    budget = error_budget(grad, plain_grad, oracle, x.dtype, magnitude)
    assert budget.passed, ("gradient", budget)
    assert not grad[~allowed].any()


def strided(kind: str) -> tuple[Tensor, Tensor]:
    """x (4, 6, 40) and a mask of its sizes, with strides of a kind."""
    x, mask = noise(4, 6, 40), coins(4, 6, 40)
    if kind == "transposed":
        return noise(40, 6, 4).permute(2, 1, 0), mask
    if kind == "outer dimensions swapped":
        return noise(6, 4, 40).transpose(0, 1), mask
    if kind == "every second element":
        return noise(4, 6, 80)[:, :, ::2], mask
    if kind == "rows with a gap":
        return noise(4, 6, 50)[:, :, 3:43], coins(4, 7, 41)[:, 1:, :40]
    if kind == "expanded":
        return noise(4, 1, 40).expand(4, 6, 40), mask
    if kind == "expanded along the row":
        return noise(4, 6, 1).expand(4, 6, 40), mask
    if kind == "mask transposed":
        return x, coins(40, 6, 4).permute(2, 1, 0)
    if kind == "mask with gaps":
        return x, coins(8, 12, 120)[::2, ::2, ::3]
    if kind == "mask expanded over rows":
        return x, coins(4, 1, 40).expand(4, 6, 40)
    if kind == "mask expanded along rows":
        return x, coins(4, 6, 1).expand(4, 6, 40)
    return x, coins(40).expand(4, 6, 40)


LENGTHS = torch.tensor([70, 33])
HOLES = coins(2, 70, share=0.8)
