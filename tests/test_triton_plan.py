"""build_plan on Triton: bit for bit the torch path, in two launches whatever the mask."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops import masks
from maskops.ops.plan import registration
from maskops.ops.plan import triton_kernels as kernels
from maskops.ops.plan.program import parse
from maskops.ops.plan.triton_kernels import Blocks, blocks_of
from tests.test_plan import check_same
from tests.test_spans import random_mask

pytestmark = [
    pytest.mark.skipif(maskops.backends()["triton"] != "available", reason=f"triton: {maskops.backends()['triton']}"),
    pytest.mark.devices,
]

EVERYTHING = {"grad": True, "order": True, "positions": True}


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    """Every plan goes through the kernels, and many blocks of rows and of keys are few rows and keys."""
    monkeypatch.setattr(kernels, "blocks_of", lambda *lengths: Blocks(256, 128))
    calls = []
    original = kernels.build_plan
    monkeypatch.setattr(kernels, "build_plan", lambda *a: calls.append(a[0]) or original(*a))
    with maskops.use_backend("triton"):
        yield
    assert calls, "no plan was made by the kernels"


@pytest.mark.parametrize("seed", range(4))
def test_bit_for_bit_over_random_masks(seed):
    generator = random.Random(7000 + seed)
    planned = 0
    while planned < 2:
        mask, q_len, k_len = random_mask(generator)
        if mask.is_dense:
            continue
        planned += 1
        wanted = {name: generator.random() < 0.7 for name in EVERYTHING}
        check_same(mask, q_len, k_len, **wanted)


@pytest.mark.parametrize("kind", ["sinks", "chunks", "holes", "ids", "layouts"])
def test_bit_for_bit_over_several_blocks(kind):
    generator = random.Random(kind)
    length = 400
    cu = torch.tensor([0, *sorted(generator.sample(range(1, length), 9)), length])
    sinks = masks.causal() & (masks.sliding_window(100, 0) | masks.prefix(4))
    if kind == "sinks":
        cu_k = torch.tensor([0, *sorted(generator.choices(range(length), k=9)), 600])
        check_same(sinks & masks.documents(cu_seqlens=cu, cu_seqlens_k=cu_k), length, 600, **EVERYTHING)
    elif kind == "chunks":
        check_same(masks.chunked(130) & masks.documents(cu_seqlens=cu[:-1].int()), length, length, **EVERYTHING)
        check_same(masks.chunked(7), 40, 12, **EVERYTHING)  # rows that stand before the first key
    elif kind == "holes":
        holes = torch.rand(2, 300) < 0.99
        holes[1, :140] = False  # nothing is seen for more than a block
        check_same(sinks & masks.padding(holes), 300, 300, **EVERYTHING)
    elif kind == "ids":
        ids = torch.arange(300).div(37, rounding_mode="floor").repeat(2, 1)
        ids[0, 20:290] = 3
        ids[1, 150:] = -1
        check_same(masks.documents(ids) & (masks.causal() | masks.prefix(torch.arange(18))), 300, 300, **EVERYTHING)
    else:
        lengths, starts = torch.tensor([200, 131, 0]), torch.tensor([150, 200, 200])
        layouts = masks.padding(lengths) & masks.padding(starts, side="left") & masks.key_padding(190)
        ids = torch.arange(200).div(37, rounding_mode="floor")
        check_same(layouts & masks.documents(ids) & masks.causal(), 200, 200, batch=3, **EVERYTHING)


def test_more_items_than_there_is_room_for_take_a_plain_grid():
    """No mask of ours needs them. Rows that look to and fro do: every other one sees keys far from the one before."""
    rows = 300
    cu = torch.arange(rows + 1)
    far = cu[:-1] // 2 % 2 * 600
    program = "cu_seqlens 0 1 1 span prefix_of 2 prefix_of 3"
    operands = [cu, cu % 2 * 1000, far, far + 1, *[torch.empty(0, dtype=torch.int32)] * 2]
    found = kernels.build_plan(program, *operands, 1, rows, 1000, True, True, True)
    start, end = found[0], found[1]
    expected = registration.build_row_spans(start, end, 1000, order=True)
    assert int(found[4]) == 3, "300 rows in tiles of 128"
    for name, x in zip(("key_valid", "tiles", "tile_count", "key_tiles", "order"), found[2:7], strict=True):
        assert torch.equal(x, getattr(expected, name)), name


def test_keys_between_rows_stay_unseen():
    """Rows that follow each other in one tile of keys, with keys between them that none sees."""
    rows = 5
    cu, of_each = torch.arange(rows + 1), torch.ones(rows, dtype=torch.int64)
    operands = [cu, 10 * cu, 2 * of_each, 4 * of_each, *[torch.empty(0, dtype=torch.int32)] * 2]
    found = kernels.build_plan(
        "cu_seqlens 0 1 1 span prefix_of 2 prefix_of 3", *operands, 1, rows, 50, True, True, True
    )
    expected = registration.build_row_spans(found[0], found[1], 50, order=True)
    assert found[2].nonzero()[:, 1].tolist() == [key for row in range(rows) for key in (10 * row + 2, 10 * row + 3)]
    for name, x in zip(("key_valid", "tiles", "tile_count", "key_tiles", "order"), found[2:7], strict=True):
        assert torch.equal(x, getattr(expected, name)), name


def test_short_documents_share_an_item_while_their_keys_are_few():
    """Twelve of them would fit by their rows."""
    cu = torch.arange(14)
    check_same(masks.documents(cu_seqlens=10 * cu, cu_seqlens_k=60 * cu), 130, 780, **EVERYTHING)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 200)])
def test_empty_and_thin_shapes(shape):
    check_same(masks.causal(), *shape, **EVERYTHING)
    check_same(masks.causal() & masks.key_padding(torch.zeros(0, dtype=torch.int64)), *shape, batch=0, **EVERYTHING)


def test_offsets_beyond_every_length_and_costs_beyond_16_bits(monkeypatch):
    monkeypatch.setattr(kernels, "blocks_of", lambda *lengths: Blocks(1024, 512))
    offset = 2**45
    pattern = masks.prefix(torch.tensor([offset])) & masks.sliding_window(offset, offset) & masks.chunked(offset)
    check_same(pattern & masks.documents(cu_seqlens=torch.tensor([0, 3, 90])), 90, 90, **EVERYTHING)
    check_same(masks.causal(), 130, 1500, grad=False, order=True)


class Operators(TorchDispatchMode):
    """Names of the torch operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "keys"), [(1, 700), (500, 90)])
def test_few_rows_over_many_keys_and_the_other_way_round(rows, keys, monkeypatch):
    """Blocks of rows and of keys are counted apart, whatever their sizes."""
    monkeypatch.setattr(kernels, "blocks_of", lambda *lengths: Blocks(1024, 256) if rows == 500 else Blocks(256, 128))
    holes = torch.rand(2, keys) < 0.9
    check_same(masks.key_padding(holes) & masks.sliding_window(600, 0), rows, keys, **EVERYTHING)
    check_same(masks.key_padding(torch.tensor([keys, keys // 3])) & masks.causal(), rows, keys, **EVERYTHING)


@pytest.mark.parametrize(("rows", "keys"), [(1, 2**17), (2**17, 1)])
def test_scratch_follows_the_rows(rows, keys, monkeypatch):
    """A step of decoding over a long cache plans 32 rows: it takes next to no memory beside the plan itself."""
    monkeypatch.setattr(kernels, "blocks_of", blocks_of)
    grids = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *a, **b: grids.append(grid))
    made = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: made.append(original(*a, **b)) or made[-1])
    operands = [torch.empty(32, dtype=torch.int64, device="meta")]
    operands += [torch.empty(0, dtype=torch.int32, device="meta")] * (registration.MAX_OPERANDS - 1)
    plan = kernels.build_plan("key_lengths 0 span first diag 1", *operands, 32, rows, keys, True, True, True)
    scratch = sum(x.nbytes for x in made) - sum(x.nbytes for x in plan)
    assert 0 < scratch < 2**20 + 160 * 32 * rows
    assert len(grids) == 2 and all(math.prod(grid) <= 32 * (2**17 // 1024 + 1) for grid in grids)


PROGRAMS = {
    "span first diag 1": [],
    "cu_seqlens 0 0 0 span diag -2 diag 1 span first prefix 1": [torch.tensor([0, 3, 5], dtype=torch.int32)],
    "key_lengths 0 padding_right 1 span first prefix_of 2": [torch.tensor([3, 5, 0])] * 3,
    "padding_mask 0 span first diag 1": [torch.rand(3, 5) < 0.5],
    "key_mask 0 ids 1 span chunk_start 2 last": [torch.rand(3, 5) < 0.5, torch.tensor([0, 0, 1, 1, -1])],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_launches_and_nothing_else(program, monkeypatch):
    """Whatever the mask: no torch operator touches the device beside the two kernels."""
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *a, **b: launched.append(kernel))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    operands = [x.clone() for x in PROGRAMS[program]]
    operands += [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    batch = 1 if "cu_seqlens" in program else 3
    with Operators() as operators:
        kernels.build_plan(program, *operands, batch, 5, 5, True, True, True)
    assert launched == [kernels.plan_rows, kernels.plan_lists]
    assert set(operators.names) <= {"aten::empty", "aten::new_empty", "aten::view", "aten::detach"}, (
        "these only make room"
    )


def test_values_that_validation_would_refuse_stay_inside_their_tensors():
    """A device does not look at values; whatever they are, nothing beyond the tensors is read or written."""
    hostile = torch.tensor([0, 9, -5, 2**40, 3, -(2**40), 90])
    empty = [torch.empty(0, dtype=torch.int32)]
    for program, operands in (
        ("cu_seqlens 0 0 0 span diag -3 diag 1", [hostile]),
        ("padding_right 0 span first prefix_of 0", [hostile]),
        ("padding_left 0 key_lengths 0 span chunk_start 3 last", [hostile]),
        ("ids 0 span first prefix_of 1", [hostile[:1].repeat(60), hostile]),
    ):
        batch = 7 if program.startswith("padding") else 1
        filled = operands + empty * (registration.MAX_OPERANDS - len(operands))
        start, end, _, tiles, count, *_ = kernels.build_plan(program, *filled, batch, 60, 60, True, True, True)
        assert int(start.min()) >= 0 and int(end.max()) <= 60 and bool((end >= start).all())
        assert 0 <= int(count) <= tiles.shape[0]


@pytest.mark.parametrize(
    ("program", "operands", "text"),
    [
        ("padding_right 0", (torch.tensor([1]),), "the program has no span"),
        ("circle 0 span first last", (), "the program has an unknown layout"),
        ("span first circle", (), "the program has an unknown word 'circle'"),
        ("span first", (), "a span of the program must leave its start and its end"),
        ("span first max last", (), "takes the maximum or minimum of nothing"),
        ("span diag x last", (), "a number of the program is malformed"),
        ("span first diag", (), "a number is missing in the program"),
        ("span chunk_start 0 last", (), "a chunk has no keys"),
        ("padding_right 6 span first last", (), "the program names an operand that does not exist"),
        ("padding_right 0 span first last", (torch.tensor([1, 2, 3]),), "lengths must have shape"),
        ("padding_mask 0 span first last", (torch.ones(1, 5).int(),), "mask must be"),
        ("key_length 9 span first last", (), "the length of the keys is not in"),
        ("cu_seqlens 0 1 1 span first last", (torch.zeros(3).int(), torch.zeros(2).int()), "must be one packed row"),
        ("ids 0 span first last", (torch.zeros(5).int(),), "ids must be"),
        ("key_lengths 0 span first last", (torch.ones(1),), "operands must be integers or bool"),
        ("span first prefix_of 0", (torch.ones(1, 1).int(),), "lengths of a prefix must have at most one"),
    ],
)
def test_programs_that_no_mask_makes_are_refused(program, operands, text):
    filler = [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    with pytest.raises(ValueError, match=text):
        kernels.build_plan(program, *operands, *filler, 1, 4, 4, True, False, True)


def test_numbers_compile_nothing_anew():
    """Windows and sizes of chunks are arguments; what a kernel is compiled for are the words alone."""
    masks.causal().spans(1, 1)
    one, other = (parse(f"cu_seqlens 0 0 0 span diag -{width} diag 1") for width in (1, 4096))
    assert one.structure() == other.structure() and one.values != other.values
    assert all(kernels.encoded(value) % 2 == 1 and 1 < kernels.encoded(value) < 2**31 for value in (0, 1, -(2**29) + 1))


def test_opcheck():
    operands = [torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([1, 2])]
    operands += [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    arguments = ("cu_seqlens 0 0 0 span first prefix_of 1 span diag -1 diag 1", *operands, 1, 6, 6, True, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.maskops.build_plan_triton.default, arguments, test_utils=tests)
