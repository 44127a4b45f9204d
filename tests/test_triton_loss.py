"""maskops.cross_entropy by Triton: the cases of the other backends, and what streaming in groups can break."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops.ops import triton_language
from maskops.ops.cross_entropy import api, triton_kernels
from maskops.ops.triton_rows import group_of
from tests.cross_entropy_oracle import (
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    check_case,
    distributions,
    gradient,
    problem,
)
from tests.served import running_on
from tests.test_cross_entropy_numerics import confident_oracle, confident_problem

pytestmark = pytest.mark.devices

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with running_on("triton"):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a group a lane of one warp, so that short rows have several."""
    monkeypatch.setattr(triton_kernels, "_columns_of", lambda config, vocabulary, group: (32 * group, 1))


SCORING: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {
    "plain": (SINGLE, 33, {}),
    "one column": (BRAIN, 1, {"label_smoothing": 0.1}),
    "smoothing only": (HALF, 300, {"label_smoothing": 1.0}),
    "z loss": (HALF, 301, {"z_loss": 1e-2}),
    "softcap": (BRAIN, 299, {"softcap": 5.0}),
    "everything": (SINGLE, 290, {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 7.0, "logit_scale": 1.5}),
    "class weights": (BRAIN, 297, {"class_weights": torch.linspace(0.0, 2.0, 297), "label_smoothing": 0.1}),
}


@pytest.mark.parametrize(("dtype", "vocabulary", "options"), SCORING.values(), ids=SCORING)
def test_scoring(small_tiles: None, dtype: torch.dtype, vocabulary: int, options: dict[str, Any]) -> None:
    check_case(*problem((3,), vocabulary, dtype), **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "target_dtype"), [(SINGLE, HALF), (BRAIN, SINGLE)], ids=str)
def test_probabilities(small_tiles: None, dtype: torch.dtype, target_dtype: torch.dtype, weighted: bool) -> None:
    logits, _ = problem((3,), 203, dtype)
    options: dict[str, Any] = {"label_smoothing": 0.2, "softcap": 7.0, "logit_scale": 1.5} if weighted else {}
    weights = torch.linspace(0.0, 2.0, 203) if weighted else None
    check_case(logits, distributions(logits).to(target_dtype), class_weights=weights, **options)


@pytest.mark.parametrize("shift", [False, True])
def test_masks_and_reductions(small_tiles: None, shift: bool) -> None:
    logits, _ = problem((3, 5), 10)
    options: dict[str, Any] = {"mask": MASK.bool(), "token_weights": WEIGHTS, "shift": shift}
    check_case(logits, distributions(logits), class_weights=torch.rand(10), **options)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_a_vocabulary_of_50257(dtype: torch.dtype) -> None:
    """Rows of which no two begin alike, in the tiles of the table."""
    logits, target = problem((3,), 50257, dtype)
    check_case(logits, target.clamp(min=0), label_smoothing=0.1)


@pytest.mark.parametrize(("begin", "columns"), [(1, 7), (0, 16), (3, 131)])
def test_rows_anywhere_in_memory(small_tiles: None, begin: int, columns: int) -> None:
    """Groups that do not begin with the row, rows within one group, and gradients that are laid out otherwise."""
    wide, _ = problem((4,), 150, BRAIN)
    target = torch.tensor([0, columns - 1, IGNORE, columns // 2])
    check_case(wide[:, begin : begin + columns], target)
    aligned = torch.empty(4, 152, dtype=BRAIN)[:, :columns].copy_(wide[:, :columns])
    check_case(aligned, distributions(wide)[:, begin : begin + columns])


TRANSFORMS: tuple[dict[str, float], ...] = ({}, {"logit_scale": 0.37}, {"logit_scale": 3.3, "softcap": 50.0})


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_confident_rows_keep_their_relative_accuracy(dtype: torch.dtype, transform: dict[str, float]) -> None:
    margins = [0.0, 10.82, 16.12] + ([] if "softcap" in transform else [27.63, 40.0])
    cases = [confident_problem(margin, dtype, 700, **transform) for margin in margins]
    logits, target = (torch.cat([case[part][1::4] for case in cases]) for part in (0, 1))
    loss, entropy, grad = confident_oracle(logits, target, **transform)
    x = logits.clone().requires_grad_()
    ours = maskops.cross_entropy(x, target, reduction="none", return_entropy=True, **transform)
    assert isinstance(ours, maskops.CrossEntropyOutput) and ours.entropy is not None
    actual = torch.autograd.grad(ours.loss.sum(), x)[0].gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(ours.loss.detach().double(), loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours.entropy.detach().double(), entropy, rtol=2e-6, atol=0.0)
    rounding = 1e-6 if dtype == SINGLE else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), grad, rtol=rounding, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("soft", [False, True])
def test_skipped_rows_are_never_read(small_tiles: None, soft: bool, value: float) -> None:
    """Nor are their probabilities, nor incoming gradients; everything that belongs to them is written."""
    logits, target = problem((4,), 40, BRAIN)
    target[:] = torch.tensor([3, IGNORE, IGNORE, 39])
    kept = target != IGNORE
    results = []
    for filling in (value, 0.25):
        x = logits.masked_fill(~kept[:, None], filling).requires_grad_()
        t = distributions(logits).masked_fill(~kept[:, None], filling).requires_grad_()
        given = (x, t) if soft else (x,)
        outputs = maskops.cross_entropy(
            x, t if soft else target, mask=kept, label_smoothing=0.1, reduction="none", **RETURNS
        )
        poison = torch.where(kept, 1.0, filling)
        results.append((*outputs, *torch.autograd.grad(outputs[:4], given, [poison] * 4)))
    for dirty, clean in zip(*results, strict=True):
        assert torch.equal(dirty, clean)
        assert bool((dirty[~kept] == (-1 if dirty.dtype == torch.int64 else 0)).all())


def test_rows_without_an_incoming_gradient_are_not_read_in_backward() -> None:
    logits, target = problem((3,), 40)
    logits[1] = math.nan
    logits.requires_grad_()
    losses = maskops.cross_entropy(logits, target.clamp(min=0), reduction="none")
    (grad,) = torch.autograd.grad(losses[0] + losses[2], logits)
    assert bool((grad[1] == 0).all()) and bool((grad[[0, 2]] != 0).all())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_banned_columns(small_tiles: None, softcap: float) -> None:
    logits, target = problem((3,), 190)
    banned = torch.rand(3, 190, generator=torch.Generator().manual_seed(3)) < 0.4
    banned[torch.arange(3), target.clamp(min=0)] = False
    logits = logits.masked_fill(banned, -math.inf)
    check_case(logits, target, label_smoothing=0.2, softcap=softcap)
    logits.requires_grad_()
    outputs = maskops.cross_entropy(logits, target, label_smoothing=0.2, softcap=softcap, **RETURNS)
    assert bool((gradient(outputs, logits)[banned] == 0).all())


def test_a_banned_target_has_infinite_loss() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 4] = -math.inf
    outputs = maskops.cross_entropy(logits, torch.tensor([4]), **RETURNS)
    assert outputs.loss == math.inf and outputs.logprobs == -math.inf
    assert outputs.lse.item() == pytest.approx(math.log(19)) and outputs.entropy.item() == pytest.approx(math.log(19))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 199])
def test_a_kept_row_does_not_hide_what_is_not_finite(small_tiles: None, at: int, value: float) -> None:
    logits = torch.zeros(2, 200)
    logits[0, at] = value
    for target in (torch.tensor([at, 1]), torch.tensor([(at + 1) % 200, 1])):
        outputs = maskops.cross_entropy(logits, target, reduction="none", return_lse=True, return_entropy=True)
        for values in outputs[:4]:
            assert values is None or (not values[0].isfinite() and values[1].isfinite())


@pytest.mark.parametrize("offset", [-3e38, 3e38])
def test_extreme_logits(small_tiles: None, offset: float) -> None:
    outputs = maskops.cross_entropy(torch.full((1, 270), offset), torch.tensor([69]), **RETURNS)
    assert bool(outputs.loss.isfinite()) and outputs.argmax == 0
    logits = torch.zeros(2, 270)
    logits[:, 5] = 2000.0
    assert maskops.cross_entropy(logits, torch.tensor([6, 5]), reduction="none").tolist() == [2000.0, 0.0]


@pytest.mark.parametrize("vocabulary", [3, 200])
def test_argmax_is_the_first_of_equals(small_tiles: None, vocabulary: int) -> None:
    logits = torch.randint(3, (5, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = -math.inf
    outputs = maskops.cross_entropy(logits, torch.zeros(5, dtype=torch.int64), softcap=1e-3, return_argmax=True)
    assert isinstance(outputs, maskops.CrossEntropyOutput) and outputs.argmax is not None
    assert torch.equal(outputs.argmax, logits.argmax(1))


@pytest.mark.processor
def test_labels_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are an error where values are looked at, and no address anywhere."""
    logits = torch.full((6, 24), math.nan)
    logits[2:4] = 0.0
    target = torch.tensor([2**40, -7])
    with pytest.raises(ValueError, match=r"row 0 of the logits is scored against is 1099511627776, outside"):
        maskops.cross_entropy(logits[2:4], target)
    monkeypatch.setattr(api, "values_can_be_read", lambda *_: False)
    x = logits[2:4].requires_grad_()
    losses = maskops.cross_entropy(x, target, reduction="none", return_argmax=True)
    assert isinstance(losses, maskops.CrossEntropyOutput)
    torch.testing.assert_close(losses.loss, torch.full((2,), math.log(24.0)))
    assert bool(torch.autograd.grad(losses.loss.sum(), x)[0].isfinite().all())


def test_gradients_in_place() -> None:
    logits, target = problem((5,), 75, BRAIN)
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        scaled = leaf * 1.0
        loss = maskops.cross_entropy(scaled, target, label_smoothing=0.1, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append(grad)
        assert torch.equal(scaled, grad) == inplace
    assert torch.equal(*results)


def test_two_launches_a_pass_and_no_look_at_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    monkeypatch.setattr(triton_language, "launch", lambda kernel, *_, **__: launches.append(kernel.__name__))
    with FakeTensorMode():
        logits, target = torch.empty(9, 50), torch.empty(9, dtype=torch.int64)
        absent = torch.empty(0)
        numbers = (IGNORE, 0.1, 0.0, 0.0, 1.0)
        scores = triton_kernels.cross_entropy_forward(logits, target, absent, absent, False, *numbers, True, True)
        loss, lse, logprobs, entropy, _, statistics = scores
        saved = (lse, logprobs, entropy, statistics)
        triton_kernels.cross_entropy_backward(
            loss, absent, absent, absent, logits, target, absent, absent, *saved, False, False, *numbers
        )
    assert launches == ["sum_rows", "score_rows", "find_coefficients", "write_gradients"]


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    logits, target = problem((5,), 301, dtype)
    target = target.clamp(min=0)
    whole = maskops.cross_entropy(logits, target, reduction="none")
    for row in (0, 3):
        alone = maskops.cross_entropy(logits[row : row + 1].clone(), target[row : row + 1], reduction="none")
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=2e-7, atol=0.0)


def test_groups_are_of_16_bytes() -> None:
    assert [group_of(dtype) for dtype in (SINGLE, BRAIN, HALF)] == [4, 8, 8]


@pytest.mark.parametrize("place", range(6))
def test_operator_refuses_what_it_cannot_read(place: int) -> None:
    logits, target = problem((4,), 12)
    weights, probabilities = torch.empty(0), torch.empty(0)
    given: list[Tensor] = [logits, target, weights, probabilities]
    given[(0, 1, 1, 2, 3, 0)[place]] = (
        logits.t(), target[:3], target.float(), torch.ones(11), torch.ones(4, 11), logits[0],
    )[place]  # fmt: skip
    with pytest.raises(ValueError, match=r"^cross_entropy: "):
        torch.ops.maskops.cross_entropy_forward_triton(*given, False, IGNORE, 0.0, 0.0, 0.0, 1.0, False, False)
