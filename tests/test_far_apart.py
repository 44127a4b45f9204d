"""Elements that lie more than 2^31 elements apart, on every backend: an offset in 32 bits reads elsewhere.

On a processor the tensors are views of a sparse file, of which only the pages that are touched take memory; on a device
they are there whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from tests.served import AT_HOME, DEVICE, for_devices

pytestmark = pytest.mark.devices

FAR = 2**29 + 24
"""Elements between neighbours; a few of these strides go beyond 2^31, and are no multiple of it."""

Place = Callable[[Tensor, Sequence[int]], Tensor]


@pytest.fixture(params=sorted({*AT_HOME, *for_devices("attention")} - {"reference"}))
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if reasons := maskops.backend.BACKENDS[name].refusals_of(DEVICE):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return name


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Copies of tensors with the strides that are asked for."""
    files: list[Path] = []

    def placed(x: Tensor, strides: Sequence[int]) -> Tensor:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        assert reach > 2**31
        if DEVICE == "cpu":
            files.append(tmp_path / str(len(files)))
            storage = torch.from_file(str(files[-1]), shared=True, size=reach, dtype=x.dtype)
        else:
            storage = torch.empty_strided((reach,), (1,), dtype=x.dtype, device=x.device)
        return storage.as_strided(x.shape, strides).copy_(x)

    yield placed
    for file in files:
        file.unlink()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], received: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(list(outputs), list(leaves), list(received))
    return [*(x.detach() for x in outputs), *found]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(x, y), index


DIMENSIONS = {"batch": 0, "heads": 1, "rows": 2}


def apart_along(dimension: int, place: Place) -> Callable[[Tensor], Tensor]:
    """Places (batch, heads, rows, width) tensors whose last element along a dimension is far from the first."""

    def apart(x: Tensor) -> Tensor:
        strides = list(x.stride())
        strides[dimension] = (2**31 // (x.shape[dimension] - 1) // 8 + 3) * 8  # rows at multiples of 16 bytes
        return place(x, strides)

    return apart


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_attention(backend: str, dimension: str, place: Place) -> None:
    """Forward and backward: q, k, v, the gradient that comes in, a bias."""
    clean = {"q": draw(2, 2, 10, 8), "k": draw(2, 2, 10, 8, seed=1), "v": draw(2, 2, 10, 8, seed=2)}
    clean["bias"] = draw(2, 2, 10, 10)
    grad = draw(2, 2, 10, 8, seed=3)
    mask = masks.causal() & masks.padding(torch.tensor([10, 7]))
    apart = apart_along(DIMENSIONS[dimension], place)

    def results(tensors: dict[str, Tensor], received: Tensor) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out = maskops.attention(**leaves, mask=mask, backend=backend)
        return gradients([out], list(leaves.values()), [received])

    same(results({name: apart(x) for name, x in clean.items()}, apart(grad)), results(clean, grad))


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_decode(backend: str, dimension: str, place: Place) -> None:
    """A cache in place, pages of one, and keys written into it."""
    k, v, q, new = draw(2, 2, 12, 8), draw(2, 2, 12, 8, seed=1), draw(2, 4, 2, 8), draw(2, 2, 3, 8)
    lengths, table = torch.tensor([9, 5]), torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    apart = [apart_along(DIMENSIONS[dimension], place)(x) for x in (k, v)]
    with maskops.use_backend(backend, fallback="error"):
        same([maskops.decode_attention(q, *apart, lengths)], [maskops.decode_attention(q, k, v, lengths)])
        found = maskops.decode_attention(q, *apart, lengths + 9, block_table=table)
        same([found], [maskops.decode_attention(q, k, v, lengths + 9, block_table=table)])
        maskops.append_kv(*apart, new, new, lengths)
        maskops.append_kv(k, v, new, new, lengths)
    same(apart, (k, v))


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
def test_cross_entropy(backend: str, probabilities: bool, place: Place) -> None:
    logits, far = draw(6, 40), (FAR, 1)
    target = logits.roll(1, 0).softmax(1) if probabilities else torch.tensor([3, -100, 39, 0, 17, 8])

    def results(x: Tensor, y: Tensor, received: Tensor, inplace: bool = False) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        leaves = [leaf, y.detach().requires_grad_()] if probabilities else [leaf]
        with maskops.use_backend(backend, fallback="error"):
            found = maskops.cross_entropy(
                leaf,
                leaves[-1] if probabilities else y,
                reduction="none",
                return_lse=True,
                inplace_backward=inplace,
            )
        return gradients([found.loss, found.lse], leaves, [received, received])

    received = draw(6)
    expected = results(logits, target, received)
    same(results(place(logits, far), target, received), expected)
    same(results(logits, place(target, far if probabilities else (FAR,)), received), expected)
    if not probabilities:
        x = place(logits, far)
        same(results(x, target, received, inplace=True), expected)
        same([x], expected[2:])  # the gradients are where the logits were


@pytest.mark.parametrize("dim", [0, 1])
def test_softmax(backend: str, dim: int, place: Place) -> None:
    """Along the dimension whose elements lie apart, and across it."""
    x, allowed, received = draw(6, 40), draw(6, 40, seed=1) > 0, draw(6, 40, seed=2)

    def results(x: Tensor, allowed: Tensor, received: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        with maskops.use_backend(backend, fallback="error"):
            weights = maskops.masked_softmax(leaf, allowed, dim)
        return gradients([weights], [leaf], [received])

    expected = results(x, allowed, received)
    same(results(place(x, (FAR, 1)), allowed, received), expected)
    same(results(x, place(allowed, (FAR, 1)), received), expected)
    same(results(x, allowed, place(received, (FAR, 1))), expected)


def test_rows_of_a_large_source(place: Place) -> None:
    """Rows are moved by their bytes; only `cuda` has kernels for that."""
    if reasons := maskops.backend.BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    rows, width = 2**21 + 9, 1024
    written = torch.tensor([0, 2**20, rows - 1])
    ends = place(torch.zeros(2, dtype=torch.uint8), (rows * width - 1,))
    source = ends.as_strided((rows, width), (width, 1))
    content = torch.arange(3 * width).view(3, width).to(torch.uint8)
    for at, row in zip(written.tolist(), content, strict=True):
        source[at] = row
    found = torch.ops.maskops.gather_rows(source, written.flip(0))
    assert torch.equal(found, content.flip(0))
