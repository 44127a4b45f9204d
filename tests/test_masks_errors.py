"""What masks refuse, when they are made and when they are planned, and in which words."""

import pytest
import torch

import maskops
from maskops import masks
from maskops.layouts import values_can_be_read

FLOATS = torch.ones(2)
REFUSALS_WHEN_MADE = [
    (lambda: masks.sliding_window(-2, 0), ValueError, "sliding_window: left=-2: expected 0 or more, or -1 or None"),
    (lambda: masks.sliding_window(1.5, 0), TypeError, "sliding_window: left is float, expected an int or None"),
    (lambda: masks.sliding_window(1, True), TypeError, "sliding_window: right is bool, expected an int or None"),
    (lambda: masks.prefix(-1), ValueError, "prefix: lengths=-1 is negative"),
    (lambda: masks.prefix(True), TypeError, "prefix: lengths is bool"),
    (lambda: masks.prefix(1.0), TypeError, "prefix: lengths: expected a tensor .* got float"),
    (lambda: masks.prefix(FLOATS), TypeError, "prefix: lengths has dtype torch.float32, expected integers"),
    (lambda: masks.prefix(torch.ones(2, 2).int()), ValueError, r"prefix: lengths has shape \(2, 2\), expected"),
    (lambda: masks.chunked(0), ValueError, "chunked: size=0: expected 1 or more"),
    (lambda: masks.chunked(2.0), TypeError, "chunked: size is float, expected an int"),
    (lambda: masks.padding([1, 2]), TypeError, "padding: lengths: expected a tensor .* got list"),
    (lambda: masks.padding(FLOATS), TypeError, "padding: lengths has dtype torch.float32, expected integers"),
    (lambda: masks.padding(FLOATS.bool()), TypeError, "padding: lengths has dtype torch.bool, expected integers"),
    (lambda: masks.padding(torch.ones(2, 2)), TypeError, "padding: mask has dtype torch.float32, expected bool or int"),
    (lambda: masks.padding(torch.ones(1, 1, 2).int()), ValueError, r"padding: lengths has shape \(1, 1, 2\)"),
    (
        lambda: masks.padding(torch.ones(2).int(), side="up"),
        ValueError,
        "padding: side='up': expected 'right' or 'left'",
    ),
    (lambda: masks.key_padding(-3), ValueError, "key_padding: lengths=-3 is negative"),
    (lambda: masks.key_padding(True), TypeError, "key_padding: lengths is bool"),
    (lambda: masks.key_padding(FLOATS), TypeError, "key_padding: lengths has dtype torch.float32"),
    (lambda: masks.documents(), ValueError, "documents: give exactly one of ids and cu_seqlens"),
    (
        lambda: masks.documents(torch.ones(2).int(), cu_seqlens=torch.ones(2).int()),
        ValueError,
        "documents: give exactly one of ids and cu_seqlens",
    ),
    (
        lambda: masks.documents(torch.ones(2).int(), cu_seqlens_k=torch.ones(2).int()),
        ValueError,
        "documents: cu_seqlens_k goes with cu_seqlens",
    ),
    (lambda: masks.documents(FLOATS), TypeError, "documents: ids has dtype torch.float32, expected integers"),
    (lambda: masks.documents(cu_seqlens=FLOATS), TypeError, "documents: cu_seqlens has dtype torch.float32"),
    (lambda: masks.documents(cu_seqlens=torch.ones(2, 2).int()), ValueError, r"cu_seqlens has shape \(2, 2\)"),
    (lambda: masks.documents(cu_seqlens=torch.ones(0).int()), ValueError, "documents: cu_seqlens is empty"),
    (
        lambda: masks.documents(cu_seqlens=torch.zeros(2).int(), cu_seqlens_k=torch.zeros(3).int()),
        ValueError,
        "cu_seqlens has 2 elements, cu_seqlens_k has 3",
    ),
    (
        lambda: masks.dense(torch.ones(8, 512, dtype=torch.bool)),
        ValueError,
        r"mask has shape \(8, 512\), expected .*: for padding use masks.padding\(mask\)",
    ),
    (lambda: masks.dense(torch.ones(1, 1, 2, 2)), TypeError, "dense: mask has dtype torch.float32, .* bias="),
    (lambda: masks.dense([[True]]), TypeError, "dense: mask: expected a bool tensor, got list"),
    (
        lambda: masks.causal() | masks.padding(torch.ones(2).int()),
        ValueError,
        r"a layout cannot stand under \|: padding\(lengths\) .* \(a \| b\) & padding",
    ),
    (
        lambda: (masks.causal() & masks.key_padding(3)) | masks.causal(),
        ValueError,
        r"a layout cannot stand under \|",
    ),
    (lambda: masks.causal() & 3, TypeError, "unsupported operand"),
    (lambda: masks.causal() | torch.ones(2), TypeError, "unsupported operand"),
]


@pytest.mark.parametrize("make,error,text", REFUSALS_WHEN_MADE)
def test_refused_when_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSALS_OF_SHAPES = [
    (lambda: masks.causal(), (-1, 4), {}, "q_len=-1: expected 0 to"),
    (lambda: masks.causal(), (4, 2**31), {}, "k_len=2147483648: expected 0 to"),
    (lambda: masks.causal(), (4, 4), {"batch": -1}, "batch=-1 is negative"),
    (
        lambda: masks.padding(ints(1, 2)),
        (2, 10),
        {},
        r"q_len=2 and k_len=10: to mask keys only use masks.key_padding",
    ),
    (
        lambda: masks.padding(torch.ones(2, 5).int()),
        (4, 4),
        {},
        r"padding: mask has shape \(2, 5\), expected .* k_len=4",
    ),
    (lambda: masks.key_padding(torch.ones(2, 5).int()), (3, 4), {}, r"key_padding: mask has shape \(2, 5\)"),
    (lambda: masks.key_padding(5), (3, 4), {}, "key_padding: lengths=5 is more than k_len=4"),
    (lambda: masks.padding(ints(1, 2)), (4, 4), {"batch": 3}, "padding: lengths has batch 2, q has batch 3"),
    (
        lambda: masks.padding(ints(1, 2)) & masks.key_padding(ints(1, 2, 3)),
        (4, 4),
        {},
        "key_padding: lengths has batch 3, padding: lengths has batch 2",
    ),
    (lambda: masks.prefix(ints(1, 2)), (4, 4), {"batch": 3}, "prefix: lengths has batch 2, q has batch 3"),
    (
        lambda: masks.prefix(ints(1, 2)) & masks.documents(cu_seqlens=ints(0, 1, 2, 3)),
        (4, 4),
        {},
        "prefix: lengths has 2 elements, cu_seqlens describes 3 sequences",
    ),
    (lambda: masks.documents(ints(0, 0, 1)), (4, 4), {}, r"documents: ids has shape \(3,\), so q_len and k_len must"),
    (lambda: masks.documents(ints(0, 0, 1)), (1, 3), {}, "must both be 3, got q_len=1 and k_len=3: .*cu_seqlens_k"),
    (lambda: masks.documents(cu_seqlens=ints(0, 3)), (3, 4), {}, "q_len=3 and k_len=4: give cu_seqlens_k"),
    (
        lambda: masks.documents(cu_seqlens=ints(0, 3)),
        (4, 4),
        {"batch": 2},
        "cu_seqlens describes one packed row, so the batch must be 1; got 2",
    ),
    (
        lambda: masks.documents(cu_seqlens=ints(0, 3)) & masks.padding(ints(1, 2)),
        (4, 4),
        {},
        "the batch must be 1; that of padding: lengths is 2",
    ),
    (
        lambda: masks.dense(torch.ones(1, 1, 3, 4, dtype=torch.bool)),
        (4, 4),
        {},
        r"dense: mask has shape \(1, 1, 3, 4\), expected \(batch\|1, heads\|1, 4, 4\)",
    ),
    (
        lambda: masks.padding(ints(1, 2)) & masks.prefix(ints(1).to("meta")),
        (4, 4),
        {},
        r"prefix: lengths is on meta, the plan on cpu: move it with .to\('cpu'\)",
    ),
    (lambda: masks.padding(ints(1, 2)), (4, 4), {"device": "meta"}, "padding: lengths is on cpu, the plan on meta"),
]


@pytest.mark.parametrize("make,lengths,keywords,text", REFUSALS_OF_SHAPES)
def test_shapes_that_do_not_fit(make, lengths, keywords, text, path):
    with pytest.raises(ValueError, match=text):
        make().spans(*lengths, **keywords)


@pytest.mark.parametrize(
    "lengths,keywords,text",
    [
        ((5.0, 5), {}, "q_len is float, expected an int"),
        ((5, "5"), {}, "k_len is str, expected an int"),
        ((5, True), {}, "k_len is bool, expected an int"),
        ((5, 5), {"batch": 1.0}, "batch is float, expected an int or None"),
    ],
)
def test_lengths_that_are_no_ints(lengths, keywords, text, path):
    with pytest.raises(TypeError, match=f"^{text}$"):
        masks.causal().spans(*lengths, **keywords)


REFUSALS_OF_VALUES = [
    (lambda: masks.padding(ints(1, 9)), 8, r"^padding: lengths\[1\]=9 is more than k_len=8$"),
    (lambda: masks.padding(ints(-1, 9), side="left"), 8, r"^padding: lengths\[0\]=-1 is negative$"),
    (lambda: masks.key_padding(ints(1, -4)), 8, r"^key_padding: lengths\[1\]=-4 is negative$"),
    (
        lambda: masks.key_padding(torch.tensor([2**40])),
        8,
        r"^key_padding: lengths\[0\]=1099511627776 is more than k_len",
    ),
    (
        lambda: masks.padding(torch.tensor([[1, 1, 0], [1, 2, 2]])),
        3,
        r"^padding: mask\[1, 1\]=2: a mask holds 0 and 1; for document ids use masks.documents\(ids\)$",
    ),
    (lambda: masks.key_padding(torch.tensor([[0, -1, 0]])), 3, r"^key_padding: mask\[0, 1\]=-1: a mask holds 0 and 1"),
    (lambda: masks.documents(cu_seqlens=ints(2, 3)), 8, r"^documents: cu_seqlens\[0\]=2: must be 0$"),
    (
        lambda: masks.documents(cu_seqlens=ints(0, 30, 52, 40)),
        60,
        r"^documents: cu_seqlens\[3\]=40 < cu_seqlens\[2\]=52: cumulative lengths never decrease$",
    ),
    (
        lambda: masks.documents(cu_seqlens=ints(0, 30, 52, 60), cu_seqlens_k=ints(0, 30, 52, 40)),
        60,
        r"^documents: cu_seqlens_k\[3\]=40 < cu_seqlens_k\[2\]=52: cumulative lengths never decrease$",
    ),
    (lambda: masks.documents(cu_seqlens=ints(0, 5, 9)), 8, r"^documents: cu_seqlens\[-1\]=9 is more than q_len=8$"),
    (
        lambda: masks.documents(cu_seqlens=ints(0, 5, 8), cu_seqlens_k=ints(0, 5, 9)),
        8,
        r"^documents: cu_seqlens_k\[-1\]=9 is more than k_len=8$",
    ),
    (lambda: masks.documents(ints(0, -2, 1)), 3, r"^documents: ids\[1\]=-2 is negative \(only -1 marks padding\)$"),
    (
        lambda: masks.documents(ints(0, 1, 0)),
        3,
        r"^documents: ids\[2\]=0 returns after ids\[1\]=1: the rows of a document must be contiguous$",
    ),
    (
        lambda: masks.documents(torch.tensor([[0, 0, 0, 0], [4, 4, -1, 4]])),
        4,
        r"^documents: ids\[1, 3\]=4 returns after ids\[1, 2\]=-1: the rows of a document must be contiguous$",
    ),
    (lambda: masks.documents(ints(5, 9, 7, 3, 9)), 5, r"^documents: ids\[4\]=9 returns after ids\[3\]=3"),
    (lambda: masks.prefix(ints(1, 2, -3)), 4, r"^prefix: lengths\[2\]=-3 is negative$"),
    (
        lambda: masks.prefix(ints(1, 2)) & masks.documents(ints(0, 1, 2)),
        3,
        r"^prefix: lengths has 2 elements, documents\(ids\) holds 3 sequences$",
    ),
]


@pytest.mark.parametrize("make,length,text", REFUSALS_OF_VALUES)
def test_values_that_describe_no_layout(make, length, text, path):
    with pytest.raises(ValueError, match=text):
        make().spans(length, length)


def test_a_document_may_reappear_in_another_row(path):
    masks.documents(torch.tensor([[0, 1, 1], [1, 0, 0], [2, 2, 2]])).spans(3, 3)


def test_more_prefix_lengths_than_documents_are_legal(path):
    """Capacity-padded lengths: ids cannot tell how many sequences there are without a sync."""
    mask = masks.prefix(ints(1, 2, 7, 7)) & masks.documents(ints(0, 0, 1, 1, -1))
    assert mask.spans(5, 5).end[0, 0].tolist() == [1, 1, 4, 4, 0]


def test_values_on_other_devices_are_read_only_under_validate():
    """Reading them would wait for the device."""
    device = torch.device("cuda")
    assert not values_can_be_read([], device)
    with maskops.validate():
        assert values_can_be_read([], device)
        assert not values_can_be_read([], torch.device("meta"))
