"""masked_softmax on problems that nobody chose: any dimension, broadcast masks, masks of maskops, strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

import maskops
from maskops import masks
from tests.fuzz import STRIDES, Property, dtypes, strided
from tests.softmax_oracle import check, coins, noise

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Problem(NamedTuple):
    sizes: tuple[int, ...]
    dim: int
    mask_sizes: tuple[int, ...] | None  # None: a mask of maskops
    side: str
    share: float
    dtype: torch.dtype
    seed: int
    scale: float
    strides: str


@st.composite
def problems(draw: Draw) -> Problem:
    size = st.sampled_from((0, 1, 2, 3, 7, 16, 17, 33, 65))
    sizes = tuple(draw(st.lists(size, min_size=1, max_size=3)))
    dim = draw(st.integers(-len(sizes), len(sizes) - 1))
    mask_sizes: tuple[int, ...] | None = tuple(draw(st.sampled_from((1, n))) for n in sizes)
    if len(sizes) == 3 and dim in (-1, 2) and draw(st.booleans()):
        mask_sizes = None
    return Problem(
        sizes,
        dim,
        mask_sizes,
        draw(st.sampled_from(("right", "left"))),
        draw(st.sampled_from((0.0, 0.2, 0.8, 1.0))),
        draw(dtypes),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from((0.0, 3.0, 40.0))),
        draw(st.sampled_from(STRIDES)),
    )


def check_softmax(problem: Problem) -> None:
    x = noise(*problem.sizes, seed=problem.seed, scale=problem.scale).to(problem.dtype)
    mask: Any
    if problem.mask_sizes is not None:
        mask = coins(*problem.mask_sizes, seed=problem.seed + 1, share=problem.share)
        allowed = mask.expand(problem.sizes)
    else:
        batch, q_len, k_len = problem.sizes
        lengths = torch.randint(0, k_len + 1, (batch,), generator=torch.Generator().manual_seed(problem.seed))
        mask = masks.causal() & masks.key_padding(lengths)
        allowed = mask.to_dense(q_len, k_len, batch=batch)[:, 0].expand(problem.sizes)
    with maskops.use_backend("cpu", fallback="error"):
        check(strided(x, problem.strides), mask, allowed, problem.dim)


PROPERTIES = {"masked_softmax": Property(problems(), check_softmax)}

test_masked_softmax = PROPERTIES["masked_softmax"].test(50)
