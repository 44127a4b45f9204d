"""build_plan by the CUDA kernels, emulated where there is no device: bit for bit the torch path."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

import maskops
from maskops import backend as backends
from maskops import extension, masks
from maskops.ops.plan import registration
from tests.served import DEVICE
from tests.test_plan import check_same
from tests.test_spans import random_mask
from tools import emulation

pytestmark = pytest.mark.devices

EVERYTHING = {"grad": True, "order": True, "positions": True}


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    if reasons := backends.BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    planned = []
    original = registration.build_plan
    monkeypatch.setattr(registration, "build_plan", lambda *a, **b: planned.append(a[0]) or original(*a, **b))
    with maskops.use_backend("cuda"):
        yield
    assert set(planned) <= {"cuda"}


def test_masks_are_planned_by_the_kernels(monkeypatch):
    """Otherwise every comparison of this file would compare the torch path with itself."""
    names = []
    original = registration.name_of
    monkeypatch.setattr(registration, "name_of", lambda *a: names.append(original(*a)) or names[-1])
    check_same(masks.causal(), 5, 5, **EVERYTHING)
    assert names == ["build_plan_cuda"]


def run(program, *operands, batch=1, q_len=4, k_len=4):
    filler = [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    operator = torch.ops.maskops.build_plan_cuda.default
    return operator(program, *operands, *filler, batch, q_len, k_len, True, True, True)


@pytest.mark.parametrize("seed", range(4))
def test_bit_for_bit_over_random_masks(seed):
    generator = random.Random(9000 + seed)
    for _ in range(20):
        mask, q_len, k_len = random_mask(generator)
        wanted = {name: generator.random() < 0.7 for name in EVERYTHING}
        check_same(mask, q_len, k_len, **wanted)


@pytest.mark.parametrize("length", [1023, 2300])
def test_bit_for_bit_over_several_blocks(length):
    generator = random.Random(length)
    cu = torch.tensor([0, *sorted(generator.sample(range(1, length), 29)), length])
    cu_k = torch.tensor([0, *sorted(generator.choices(range(length), k=29)), length + 500])
    sinks = masks.causal() & (masks.sliding_window(100, 0) | masks.prefix(4))
    check_same(sinks & masks.documents(cu_seqlens=cu, cu_seqlens_k=cu_k), length, length + 500, **EVERYTHING)
    check_same(masks.chunked(130) & masks.documents(cu_seqlens=cu[:-1].int()), length, length, **EVERYTHING)
    holes = torch.rand(2, length) < 0.99
    holes[1, :950] = False  # nothing is seen for more than a block
    check_same(sinks & masks.padding(holes), length, length, **EVERYTHING)
    ids = torch.arange(length).div(37, rounding_mode="floor").repeat(2, 1)
    ids[0, 20 : length - 10] = 3
    ids[1, 150:] = -1
    check_same(masks.documents(ids) & (masks.causal() | masks.prefix(torch.arange(99))), length, length, **EVERYTHING)


def test_several_layouts_and_operands():
    lengths, starts = torch.tensor([200, 131, 0]), torch.tensor([150, 200, 200])
    layouts = masks.padding(lengths) & masks.padding(starts, side="left") & masks.key_padding(190)
    ids = torch.arange(200).div(37, rounding_mode="floor")
    mask = layouts & masks.documents(ids)
    check_same(mask & masks.causal(), 200, 200, batch=3, **EVERYTHING)
    check_same(mask & (masks.causal() | masks.prefix(torch.arange(18))), 200, 200, batch=3, **EVERYTHING)


def test_more_items_than_there_is_room_for_take_a_plain_grid():
    """No mask of ours needs them. Rows that look to and fro do: every other one sees keys far from the one before."""
    rows = 1500
    cu = torch.arange(rows + 1)
    far = cu[:-1] // 2 % 2 * 600
    found = run(
        "cu_seqlens 0 1 1 span prefix_of 2 prefix_of 3", cu, cu % 2 * 1000, far, far + 1, q_len=rows, k_len=1000
    )
    expected = registration.build_row_spans(found[0], found[1], 1000, order=True)
    assert int(found[4]) == 12, "1500 rows in tiles of 128"
    for name, x in zip(("key_valid", "tiles", "tile_count", "key_tiles", "order"), found[2:7], strict=True):
        assert torch.equal(x, getattr(expected, name)), name


def test_a_few_queries_over_many_keys_take_little_room():
    """Rows and keys are shared among blocks apart: scratch goes with the rows, and with keys that have holes."""
    if not extension.cuda_is_emulated():
        pytest.skip("only the library of the emulation says how much room a plan takes")
    scratch = ctypes.CDLL(str(emulation.library())).maskops_plan_scratch
    scratch.restype = ctypes.c_int64

    def bytes_of(batch, q_len, k_len, n_spans=1, has_holes=False):
        return scratch(batch, q_len, k_len, n_spans, int(has_holes))

    assert bytes_of(32, 1, 131072) == bytes_of(32, 1, 64) <= 4096 * 32
    assert bytes_of(32, 32, 131072, n_spans=2) <= 8192 * 32
    # A mask of the keys has a byte for each of them; what is kept of it is a quarter of that.
    assert bytes_of(32, 32, 131072, has_holes=True) <= bytes_of(32, 32, 64) + 32 * 131072 * 0.27
    # Many rows: four numbers for a row and a span that is a run of its own, three more for each row.
    assert bytes_of(1, 131072, 131072) <= 131072 * 32


def test_a_few_queries_over_many_keys():
    holes = torch.rand(2, 3000) < 0.9
    holes[0, 300:1400] = False
    check_same(masks.causal() & masks.key_padding(holes), 3, 3000, **EVERYTHING)
    check_same(masks.sliding_window(700, 0) & masks.key_padding(torch.tensor([2999, 800])), 130, 3000, **EVERYTHING)
    few = torch.ones(2, 3000, dtype=torch.bool)
    few[0, 100] = few[1, 5:9] = False  # far from where the spans end
    check_same(masks.full() & masks.key_padding(few), 3, 3000, **EVERYTHING)
    check_same(masks.sliding_window(2500, 0) & masks.key_padding(few), 3, 3000, **EVERYTHING)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1500)])
def test_empty_and_thin_shapes(shape):
    check_same(masks.causal(), *shape, **EVERYTHING)
    check_same(masks.causal() & masks.key_padding(torch.zeros(0, dtype=torch.int64)), *shape, batch=0, **EVERYTHING)


def test_offsets_beyond_every_length_and_costs_beyond_16_and_31_bits():
    offset = 2**45
    pattern = masks.prefix(torch.tensor([offset])) & masks.sliding_window(offset, offset) & masks.chunked(offset)
    check_same(pattern & masks.documents(cu_seqlens=torch.tensor([0, 3, 90])), 90, 90, **EVERYTHING)
    check_same(masks.causal(), 130, 3000, grad=False, order=True)


def test_more_words_than_a_kernel_takes_are_planned_by_torch():
    """A union of many spans; what the plan says is the same."""
    mask = masks.sliding_window(0, 0)
    for step in range(2, 2 + registration.MAX_SPANS):
        mask = mask | (masks.sliding_window(3 * step, 0) & masks.prefix(3 * step))
    check_same(mask, 70, 70, **EVERYTHING)


def test_values_that_validation_would_refuse_stay_inside_their_tensors():
    hostile = torch.tensor([0, 9, -5, 2**40, 3, -(2**40), 90])
    for program, operands in (
        ("cu_seqlens 0 0 0 span diag -3 diag 1", [hostile]),
        ("padding_right 0 span first prefix_of 0", [hostile]),
        ("padding_left 0 key_lengths 0 span chunk_start 3 last", [hostile]),
        ("ids 0 span first prefix_of 1", [hostile[:1].repeat(60), hostile]),
    ):
        batch = 7 if program.startswith("padding") else 1
        start, end, _, tiles, count, *_ = run(program, *operands, batch=batch, q_len=60, k_len=60)
        assert int(start.min()) >= 0 and int(end.max()) <= 60 and bool((end >= start).all())
        assert 0 <= int(count) <= tiles.shape[0]


@pytest.mark.parametrize(
    ("program", "operands", "text"),
    [
        ("padding_right 0", (torch.tensor([1]),), "the program has no span"),
        ("circle 0 span first last", (), "the program has an unknown layout"),
        ("span first", (), "a span of the program must leave its start and its end"),
        ("padding_right 0 span first last", (torch.tensor([1, 2, 3]),), "lengths must have shape"),
        ("padding_mask 0 span first last", (torch.ones(1, 5).int(),), "mask must be"),
        ("key_length 9 span first last", (), "the length of the keys is not in"),
        ("cu_seqlens 0 1 1 span first last", (torch.zeros(3).int(), torch.zeros(2).int()), "must be one packed row"),
        ("ids 0 span first last", (torch.zeros(5).int(),), "ids must be"),
        ("key_lengths 0 span first last", (torch.ones(1),), "operands must be bool, uint8, int32 or int64"),
        ("span first prefix_of 0", (torch.ones(1, 1).int(),), "lengths of a prefix must have at most one"),
        ("span first last " * 17, (), "longer than a kernel takes"),
    ],
)
def test_programs_that_no_mask_makes_are_refused(program, operands, text):
    with pytest.raises(ValueError, match=text):
        run(program.strip(), *operands)
