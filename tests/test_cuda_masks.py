"""Dense masks compiled by the CUDA kernels, emulated where there is no device: bit for bit the torch path."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import backend as backends
from maskops import extension, masks
from maskops.ops.plan import registration
from tests.served import DEVICE
from tests.test_plan import check_same
from tools import emulation

pytestmark = pytest.mark.devices

EVERYTHING = {"grad": True, "order": True, "bits": True}


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    if reasons := backends.BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    names = []
    original = registration.name_of
    monkeypatch.setattr(registration, "name_of", lambda *a: names.append(original(*a)) or names[-1])
    with maskops.use_backend("cuda"):
        yield
    assert "compile_mask_cuda" in names, "the torch path was compared with itself"


def random_dense(generator, batch, heads, q_len, k_len):
    """A mask with rows and keys that nobody sees, in stretches and at single places."""
    mask = torch.rand(batch, heads, q_len, k_len) < generator.choice([0.003, 0.1, 0.5, 0.99])
    for _ in range(generator.randrange(4)):
        row, rows = generator.randrange(q_len + 1), generator.randrange(200)
        mask[generator.randrange(batch), :, row : row + rows] = generator.random() < 0.3
    for _ in range(generator.randrange(3)):
        key, keys = generator.randrange(k_len + 1), generator.randrange(100)
        mask[..., key : key + keys] = generator.random() < 0.1
    return mask


@pytest.mark.parametrize("seed", range(6))
def test_bit_for_bit_over_random_masks(seed):
    generator = random.Random(500 + seed)
    torch.manual_seed(seed)
    for _ in range(5):
        batch, heads = generator.choice([1, 2, 3]), generator.choice([1, 1, 3])
        q_len = generator.choice([1, 31, 33, 128, 129, 300])
        k_len = generator.choice([1, 31, 32, 33, 64, 100, 500])
        wanted = {name: generator.random() < 0.7 for name in (*EVERYTHING, "positions")}
        check_same(masks.dense(random_dense(generator, batch, heads, q_len, k_len)), q_len, k_len, **wanted)


def strided(name, batch, heads, q_len, k_len):
    generator = random.Random(name)
    if name == "rows closer than keys":
        return random_dense(generator, batch, heads, k_len, q_len).transpose(2, 3)
    if name == "heads innermost":
        return random_dense(generator, q_len, batch, k_len, heads).permute(1, 3, 0, 2)
    if name == "every other key":
        return random_dense(generator, batch, heads, q_len, 2 * k_len)[..., ::2]
    if name == "shifted by a byte":
        return random_dense(generator, batch, heads, q_len, k_len + 1)[..., 1:]
    if name == "shared by the heads":
        return random_dense(generator, batch, 1, q_len, k_len).expand(batch, heads, q_len, k_len)
    if name == "one row for all":
        return random_dense(generator, batch, heads, 1, k_len).expand(batch, heads, q_len, k_len)
    assert name == "one key for all"
    return random_dense(generator, batch, heads, q_len, 1).expand(batch, heads, q_len, k_len)


@pytest.mark.parametrize("k_len", [70, 96])
@pytest.mark.parametrize(
    "name",
    [
        "rows closer than keys",
        "heads innermost",
        "every other key",
        "shifted by a byte",
        "shared by the heads",
        "one row for all",
        "one key for all",
    ],
)
def test_any_strides(name, k_len):
    torch.manual_seed(k_len)
    mask = strided(name, 2, 3, 45, k_len)
    assert mask.shape == (2, 3, 45, k_len)
    check_same(masks.dense(mask), 45, k_len, **EVERYTHING)


def test_several_blocks_of_rows_and_of_keys():
    torch.manual_seed(1)
    mask = torch.rand(1, 1, 950, 2100) < 0.002
    mask[..., 40:920, :] = False  # the row before which sees anything lies more than a block above
    check_same(masks.dense(mask), 950, 2100, **EVERYTHING)
    check_same(masks.dense(torch.ones(1, 1, 950, 1100, dtype=torch.bool).tril(100)), 950, 1100, **EVERYTHING)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (2, 2, 130, 33), (1, 1, 1, 1)])
def test_all_of_it_or_nothing(value, shape):
    check_same(masks.dense(torch.full(shape, value)), *shape[2:], **EVERYTHING)


@pytest.mark.parametrize("shape", [(1, 1, 0, 0), (1, 1, 0, 5), (1, 1, 5, 0), (2, 3, 5, 0), (0, 1, 5, 5), (1, 0, 5, 5)])
def test_empty_shapes(shape):
    check_same(masks.dense(torch.ones(shape, dtype=torch.bool)), *shape[2:], **EVERYTHING)
    if shape[0] == 1:
        check_same(masks.dense(torch.ones(shape, dtype=torch.bool)), *shape[2:], batch=0, positions=True, bits=True)


def test_a_mask_for_all_batch_elements_with_their_positions():
    mask = torch.rand(1, 2, 50, 70) < 0.1
    check_same(masks.dense(mask), 50, 70, batch=3, positions=True, **EVERYTHING)


def test_combined_with_layouts_patterns_and_one_another():
    torch.manual_seed(2)
    one, other = torch.rand(2, 1, 60, 60) < 0.5, torch.rand(1, 3, 60, 60) < 0.5
    lengths = torch.tensor([40, 0])
    for mask in (
        masks.dense(one) & masks.causal(),
        masks.dense(one) & masks.padding(lengths),
        masks.dense(one) & masks.dense(other) & masks.padding(torch.rand(2, 60) < 0.8),
        masks.dense(one) | (masks.dense(other) & masks.sliding_window(5, 5)),
    ):
        check_same(mask, 60, 60, positions=True, **EVERYTHING)


def test_any_byte_that_is_not_0_allows():
    """As torch reads it; a bool tensor over memory of others may hold more than 0 and 1."""
    raw = torch.randint(0, 256, (1, 1, 20, 128), dtype=torch.int32).to(torch.uint8)
    raw[..., ::3] = 0
    found = masks.dense(raw.view(torch.bool)).spans(20, 128, order=True, bits=True)
    wanted = masks.dense(raw != 0).spans(20, 128, order=True, bits=True)
    assert torch.equal(found.dense_bits, wanted.dense_bits) and torch.equal(found.key_valid, wanted.key_valid)


def test_the_mask_itself_is_the_plans():
    """No copy of the largest tensor of a call is made, whoever plans."""
    mask = torch.rand(1, 2, 9, 9) < 0.5
    assert masks.dense(mask).spans(9, 9).dense.data_ptr() == mask.data_ptr()
    with maskops.use_backend("auto"):
        assert masks.dense(mask).spans(9, 9).dense.data_ptr() == mask.data_ptr()


class Operators(TorchDispatchMode):
    """Names of the torch operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_three_launches_and_nothing_else():
    mask = masks.dense(torch.rand(2, 3, 70, 90) < 0.5)
    with Operators() as operators:
        mask.spans(70, 90, **EVERYTHING)
    assert operators.names == ["maskops::compile_mask_cuda"]
    if not extension.cuda_is_emulated():
        return  # a device counts no launches for us
    launches = ctypes.CDLL(str(emulation.library())).maskops_emulated_launches
    launches.restype = ctypes.c_int64
    before = launches()
    mask.spans(70, 90, **EVERYTHING)
    assert launches() - before == 3
    before = launches()
    (masks.causal() & masks.padding(torch.rand(2, 70) < 0.5)).spans(70, 70, order=True)
    assert launches() - before == 2


def test_compiled():
    mask = torch.rand(1, 2, 40, 50) < 0.3
    wanted = masks.dense(mask).spans(40, 50, **EVERYTHING)
    found = torch.compile(lambda x: masks.dense(x).spans(40, 50, **EVERYTHING), fullgraph=True, backend="aot_eager")(
        mask
    )
    for name, x, y in zip(wanted._fields, wanted, found, strict=True):
        assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize(
    ("mask", "batch", "text"),
    [
        (torch.ones(1, 1, 2, 2), 1, "mask must be bool"),
        (torch.ones(2, 2).bool(), 1, "mask must be bool"),
        (torch.ones(2, 1, 2, 2).bool(), 3, "neither 1 nor the plan"),
        (torch.ones(1, 1, 2, 2).bool(), -1, "a length is negative"),
    ],
)
def test_what_no_mask_makes_is_refused(mask, batch, text):
    with pytest.raises(ValueError, match=text):
        torch.ops.maskops.compile_mask_cuda.default(mask, batch, True, True, True)
    masks.dense(torch.ones(1, 1, 1, 1).bool()).spans(1, 1)


def test_opcheck():
    arguments = (torch.rand(2, 2, 20, 40) < 0.5, 2, True, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.maskops.compile_mask_cuda.default, arguments, test_utils=tests)
    masks.dense(torch.ones(1, 1, 1, 1).bool()).spans(1, 1)
