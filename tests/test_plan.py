"""build_plan against the torch path, bit for bit, and what the operator refuses."""

import random
import unittest.mock

import pytest
import torch

import maskops
from maskops import lowering, masks
from maskops.backend import planner
from maskops.ops.plan import registration
from tests.served import DEVICE
from tests.test_spans import random_mask

pytestmark = pytest.mark.skipif(
    planner("cpu") is None, reason="the C++ extension is not built, so there is no operator"
)


def by_torch(mask, q_len, k_len, batch=None, grad=True, order=False, positions=False, bits=False, device=None):
    plan_batch, device = lowering.check_structure(mask, q_len, k_len, batch, device, positions)
    with unittest.mock.patch.object(registration, "mask_compiler", return_value=None):
        request = lowering.Request(q_len, k_len, plan_batch, device, grad, order, positions, bits)
        return lowering.spans_by_torch(mask, request)


def check_same(mask, q_len, k_len, **keywords):
    keywords["device"] = DEVICE
    one, other = mask.spans(q_len, k_len, **keywords), by_torch(mask, q_len, k_len, **keywords)
    for name, x, y in zip(one._fields, one, other, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape and (name == "dense" or x.is_contiguous()), (mask, name)
            assert torch.equal(x, y), f"{mask} ({q_len} x {k_len}): {name}\n{x}\n{y}"


@pytest.mark.parametrize("seed", range(10))
def test_bit_for_bit_over_random_masks(seed):
    generator = random.Random(1000 + seed)
    for _ in range(60):
        mask, q_len, k_len = random_mask(generator)
        wanted = {"grad": generator.random() < 0.8, "positions": generator.random() < 0.5}
        check_same(mask, q_len, k_len, order=generator.random() < 0.3, **wanted)


@pytest.mark.parametrize("length", [511, 512, 513, 1500])
def test_bit_for_bit_over_several_blocks_of_rows(length):
    generator = random.Random(length)
    cuts = sorted(generator.sample(range(1, length), 9))
    cu = torch.tensor([0, *cuts, length])
    k_cuts = sorted(generator.choices(range(2 * length), k=9))
    cu_k = torch.tensor([0, *k_cuts, 2 * length])
    sinks = masks.causal() & (masks.sliding_window(100, 0) | masks.prefix(4))
    check_same(sinks & masks.documents(cu_seqlens=cu, cu_seqlens_k=cu_k), length, 2 * length, positions=True)
    check_same(masks.chunked(130) & masks.documents(cu_seqlens=cu), length, length, positions=True)
    holes = torch.tensor([[generator.random() < 0.99 for _ in range(length)] for _ in range(2)])
    check_same(sinks & masks.padding(holes), length, length, positions=True)
    check_same(masks.causal() & masks.key_padding(holes), 7, length)


def test_bit_for_bit_with_several_layouts_and_operands():
    lengths, starts = torch.tensor([200, 131, 0]), torch.tensor([150, 200, 200])
    ids = torch.arange(200).div(37, rounding_mode="floor")
    mask = masks.padding(lengths) & masks.padding(starts, side="left") & masks.documents(ids) & masks.key_padding(190)
    check_same(mask & masks.causal(), 200, 200, batch=3, positions=True)
    check_same(mask & (masks.causal() | masks.prefix(torch.arange(18))), 200, 200, batch=3, positions=True)


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**45])
def test_offsets_beyond_every_length_mean_unbounded(offset):
    for pattern in (
        masks.sliding_window(offset, 0),
        masks.sliding_window(0, offset),
        masks.chunked(offset),
        masks.prefix(offset) & masks.sliding_window(offset, offset),
        masks.prefix(torch.tensor([offset])),
    ):
        check_same(pattern & masks.documents(cu_seqlens=torch.tensor([0, 3, 90])), 90, 90)
        check_same(pattern, 130, 7)
        check_same(pattern, 7, 130)


def test_costs_beyond_16_and_31_bits():
    check_same(masks.causal(), 130, 70_000)
    spans = masks.full().spans(128, 2**24, grad=False)
    assert int(spans.cost()) == 2**31, "the sum is 64 bits wide"
    assert spans.tiles[0, :4].tolist() == [0, 0, 128, 2**31 - 1], "the column of the work list saturates"


def test_more_operands_than_the_operator_has_take_the_torch_path():
    mask = masks.causal()
    for number in range(registration.MAX_OPERANDS + 1):
        mask = mask & masks.key_padding(torch.tensor([9 - number, 10]))
    spans = mask.spans(10, 10)
    assert spans.end[0, 0].tolist()[-1] == 9 - registration.MAX_OPERANDS and spans.end[0, 1].tolist()[-1] == 10


def test_spans_go_through_the_operator(monkeypatch):
    """Otherwise every comparison of this file would compare the torch path with itself."""
    calls = []
    original = registration.build_plan
    monkeypatch.setattr(registration, "build_plan", lambda *a, **b: calls.append(a[1]) or original(*a, **b))
    lengths = torch.tensor([3, 5])
    masks.causal().spans(4, 4)
    (masks.causal() & (masks.sliding_window(2, 0) | masks.prefix(lengths)) & masks.padding(lengths)).spans(5, 5)
    (masks.chunked(4) & masks.documents(cu_seqlens=torch.tensor([0, 4]))).spans(5, 5)
    masks.dense(torch.ones(1, 1, 2, 2, dtype=torch.bool)).spans(2, 2)
    x = torch.zeros(5, 1, 1)
    maskops.varlen_attention(x, x, x, torch.tensor([0, 4]), torch.tensor([0, 5]), mask=masks.causal(), softcap=9.0)
    assert calls == [
        "span first diag 1",
        "padding_right 1 span diag -2 diag 1 span first diag 1 prefix_of 0 min",
        "cu_seqlens 0 0 0 span chunk_start 4 chunk_end 4",
        "varlen 0 1 1 span first diag 1",
    ]


def test_opcheck():
    operands = [torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([1, 2])]
    operands += [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    program = "cu_seqlens 0 0 0 span first prefix_of 1 span diag -1 diag 1"
    for grad, positions in ((True, True), (False, False)):
        arguments = (program, *operands, 1, 6, 6, grad, positions, positions)
        torch.library.opcheck(torch.ops.maskops.build_plan.default, arguments)


def run(program, *operands, batch=1, q_len=4, k_len=4):
    filler = [torch.empty(0, dtype=torch.int32)] * (registration.MAX_OPERANDS - len(operands))
    return torch.ops.maskops.build_plan.default(program, *operands, *filler, batch, q_len, k_len, True, False, True)


@pytest.mark.parametrize(
    ("program", "operands", "text"),
    [
        ("", (), "the program has no span"),
        ("padding_right 0", (torch.tensor([1]),), "the program has no span"),
        ("circle 0 span first last", (), "the program has an unknown layout"),
        ("span first circle", (), "the program has an unknown word 'circle'"),
        ("span first", (), "a span of the program must leave its start and its end"),
        ("span first last last", (), "a span of the program must leave its start and its end"),
        ("span first max last", (), "takes the maximum or minimum of nothing"),
        ("span diag x last", (), "a number of the program is malformed"),
        ("span first diag", (), "a number is missing in the program"),
        ("span chunk_start 0 last", (), "a chunk has no keys"),
        ("padding_right 6 span first last", (), "the program names an operand that does not exist"),
        ("span first prefix_of -1", (), "the program names an operand that does not exist"),
        ("padding_right 0 span first last", (torch.tensor([1, 2, 3]),), "lengths must have shape"),
        ("padding_mask 0 span first last", (torch.ones(1, 5).int(),), "mask must be"),
        ("key_mask 0 span first last", (torch.ones(5).int(),), "mask must be"),
        ("key_length 9 span first last", (), "the length of the keys is not in"),
        ("cu_seqlens 0 1 1 span first last", (torch.zeros(3).int(), torch.zeros(2).int()), "must be one packed row"),
        ("cu_seqlens 0 0 0 span first last", (torch.zeros(0).int(),), "must be one packed row"),
        ("ids 0 span first last", (torch.zeros(5).int(),), "ids must be"),
        ("key_lengths 0 span first last", (torch.ones(1),), "operands must be bool, uint8, int32 or int64"),
        ("key_lengths 0 span first last", (torch.ones(1, 1, 1).int(),), "operands have at most two dimensions"),
        ("key_mask 0 span first last", (torch.ones(4, 8).int()[:1, ::2],), "operands must be contiguous"),
        ("span first prefix_of 0", (torch.ones(1, 1).int(),), "lengths of a prefix must have at most one"),
    ],
)
def test_programs_that_no_mask_makes_are_refused(program, operands, text):
    with pytest.raises(ValueError, match=text):
        run(program, *operands)


def test_lengths_beyond_int32_arithmetic_are_refused():
    with pytest.raises(ValueError, match="a length is negative or too large"):
        run("span first last", q_len=1, k_len=registration.MAX_LENGTH)
    with pytest.raises(ValueError, match="a length is negative or too large"):
        run("span first last", q_len=-1)


def test_values_are_checked_by_a_compiled_graph():
    """Under torch.compile the Python checks cannot run; the operator makes them."""

    @torch.compile(fullgraph=True, backend="eager")
    def plan(cu):
        return masks.documents(cu_seqlens=cu).spans(8, 8)

    plan(torch.tensor([0, 3, 8]))
    with pytest.raises(ValueError, match=r"^documents: cu_seqlens\[2\]=1 < cu_seqlens\[1\]=3"):
        plan(torch.tensor([0, 3, 1]))

    @torch.compile(fullgraph=True, backend="eager")
    def attend(x, cu):
        return maskops.varlen_attention(x, x, x, cu)

    attend(torch.zeros(8, 1, 1), torch.tensor([0, 3, 8]))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q\[2\]=1 < cu_seqlens_q\[1\]=3"):
        attend(torch.zeros(8, 1, 1), torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q\[-1\]=9 is more than the 8 rows of q$"):
        attend(torch.zeros(8, 1, 1), torch.tensor([0, 3, 9]))


def test_the_operator_decides_about_lengths_that_were_traced():
    """Comparing a traced length with the limit would refuse to trace one that is open."""

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def plan(x):
        return masks.causal().spans(1, x.shape[0], grad=False).end

    assert plan(torch.zeros(5)).item() == 5
    with pytest.raises(ValueError, match="a length is negative or too large"):
        plan(torch.zeros(1).expand(registration.MAX_LENGTH))
