"""Masks against a definition in plain Python, row by row and key by key, on every small shape."""

import io
import itertools

import pytest
import torch

from maskops import masks

# ---- the definition --------------------------------------------------------------------------------------------------
#
# A specification is a nested tuple. `build` makes a mask of it and `allowed`, independently, an answer.


def sequences_of(spec, b, batch, q_len, k_len):
    """The sequences of batch element b under one layout: (q rows, k keys, ordinal), ranges of any step-1 kind."""
    kind, *args = spec
    if kind == "padding":
        lengths, side = args
        n = lengths[b % len(lengths)]
        rows = range(n) if side == "right" else range(q_len - n, q_len)
        return [(rows, rows, b)], None, None
    if kind in ("padding_mask", "key_mask"):
        row = args[0][b % len(args[0])]
        real = [j for j, x in enumerate(row) if x]
        hull = range(real[0], real[-1] + 1) if real else range(0)
        holes = {j for j, x in enumerate(row) if not x}
        if kind == "key_mask":
            return [(range(q_len), hull, b)], set(), holes
        return [(hull, hull, b)], holes, holes
    if kind == "key_padding":
        lengths = args[0]
        n = lengths if isinstance(lengths, int) else lengths[b % len(lengths)]
        return [(range(q_len), range(n), b)], None, None
    if kind == "cu":
        cu_q, cu_k = args[0], args[1] or args[0]
        pairs = zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
        return [(range(*q), range(*k), n) for n, (q, k) in enumerate(pairs)], None, None
    assert kind == "ids"
    rows_of_ids = args[0] if isinstance(args[0][0], (list, tuple)) else [args[0]] * batch
    found, ordinal = [], 0
    for element, ids in enumerate(rows_of_ids):
        position = 0
        for value, group in itertools.groupby(ids):
            size = len(list(group))
            if value >= 0:
                if element == b % len(rows_of_ids) or len(rows_of_ids) == 1:
                    found.append((range(position, position + size), range(position, position + size), ordinal))
                ordinal += 1
            position += size
    return found, None, None


def layouts_in(spec):
    if spec[0] == "and":
        return [layout for part in spec[1:] for layout in layouts_in(part)]
    return [spec] if spec[0] in ("padding", "padding_mask", "key_mask", "key_padding", "cu", "ids") else []


def row_of(spec, b, i, batch, q_len, k_len):
    """(q_start, q_end, k_start, k_end, ordinal, key holes) of query row i, or None outside every sequence."""
    q_start, q_end, k_start, k_end, ordinal, holes, counted = 0, q_len, 0, k_len, b, set(), False
    for layout in layouts_in(spec):
        sequences, row_holes, key_holes = sequences_of(layout, b, batch, q_len, k_len)
        mine = [s for s in sequences if i in s[0]]
        if not mine or (row_holes and i in row_holes):
            return None
        rows, keys, number = mine[0]
        q_start, q_end = max(q_start, rows.start), min(q_end, rows.stop)
        k_start, k_end = max(k_start, keys.start), min(k_end, keys.stop)
        if layout[0] in ("cu", "ids") and not counted:
            ordinal, counted = number, True
        holes = holes | (key_holes or set())
    return q_start, q_end, k_start, max(k_start, k_end), ordinal, holes


def pattern_allows(spec, row, b, h, i, j):
    _, q_end, k_start, k_end, ordinal, _ = row
    kind, *args = spec
    diag = k_end - q_end + i
    if kind == "and":
        return all(pattern_allows(part, row, b, h, i, j) for part in args if not layouts_in(part) or part[0] == "and")
    if kind == "or":
        return any(pattern_allows(part, row, b, h, i, j) for part in args)
    if kind == "full":
        return True
    if kind == "causal":
        return j <= diag
    if kind == "window":
        left, right = args
        return (left in (None, -1) or j >= diag - left) and (right in (None, -1) or j <= diag + right)
    if kind == "prefix":
        lengths = args[0]
        n = lengths if isinstance(lengths, int) else lengths[ordinal if len(lengths) > 1 else 0]
        return j < k_start + n
    if kind == "chunked":
        return (j - k_start) // args[0] == (diag - k_start) // args[0]
    assert kind == "dense"
    tensor = args[0]
    return bool(tensor[b % tensor.shape[0], h % tensor.shape[1], i, j])


def allowed(spec, b, h, i, j, batch, q_len, k_len):
    row = row_of(spec, b, i, batch, q_len, k_len)
    if row is None or not row[2] <= j < row[3] or j in row[5]:
        return False
    return spec in layouts_in(spec) or pattern_allows(spec, row, b, h, i, j)


def brute_force(spec, batch, q_len, k_len, heads=1):
    answer = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(batch), range(heads), range(q_len), range(k_len)):
        answer[b, h, i, j] = allowed(spec, b, h, i, j, batch, q_len, k_len)
    return answer


def build(spec):
    kind, *args = spec
    if kind in ("and", "or"):
        mask = build(args[0])
        for part in args[1:]:
            mask = mask & build(part) if kind == "and" else mask | build(part)
        return mask
    if kind == "prefix":
        return masks.prefix(args[0] if isinstance(args[0], int) else torch.tensor(args[0]))
    if kind == "padding":
        return masks.padding(torch.tensor(args[0], dtype=torch.int32), side=args[1])
    if kind == "padding_mask":
        return masks.padding(torch.tensor(args[0]))
    if kind == "key_mask":
        return masks.key_padding(torch.tensor(args[0], dtype=torch.bool))
    if kind == "key_padding":
        return masks.key_padding(args[0] if isinstance(args[0], int) else torch.tensor(args[0]))
    if kind == "cu":
        keys = None if args[1] is None else torch.tensor(args[1], dtype=torch.int32)
        return masks.documents(cu_seqlens=torch.tensor(args[0], dtype=torch.int32), cu_seqlens_k=keys)
    if kind == "ids":
        return masks.documents(torch.tensor(args[0]))
    constructor = {"window": "sliding_window"}.get(kind, kind)
    return getattr(masks, constructor)(*args)


def check_row_spans(mask, expected, batch, q_len, k_len):
    """Everything about start, end and key_valid that SPEC-like prose says, against the expected bool."""
    spans = mask.spans(q_len, k_len, batch=batch)
    assert spans.start.dtype == spans.end.dtype == torch.int32 and spans.key_valid.dtype == torch.uint8
    assert spans.start.shape == spans.end.shape == (spans.n_spans, spans.batch, q_len)
    assert spans.batch in (1, batch) and spans.k_len == k_len
    assert (
        bool((spans.start <= spans.end).all()) and bool((spans.start >= 0).all()) and bool((spans.end <= k_len).all())
    )
    assert bool((spans.start[1:] >= spans.end[:-1]).all()), "spans of a row are sorted and disjoint"
    dense = spans.to_dense().expand(batch, -1, -1, -1)
    assert torch.equal(dense, expected), mask
    seen = expected.any(1).any(1)
    assert torch.equal(spans.key_valid.bool().expand(batch, -1), seen), f"{mask}: key_valid"
    assert int(spans.cost()) == int((spans.end.long() - spans.start.long()).sum())
    return spans


PATTERNS = [
    ("full",),
    ("causal",),
    ("window", 2, 0),
    ("window", 1, 1),
    ("window", -1, 2),
    ("window", 0, None),
    ("window", None, -1),
    ("prefix", 2),
    ("prefix", 0),
    ("prefix", 99),
    ("chunked", 1),
    ("chunked", 3),
    ("and", ("causal",), ("window", 2, 0)),
    ("and", ("causal",), ("chunked", 3)),
    ("or", ("causal",), ("prefix", 3)),
    ("or", ("full",), ("window", 1, 0)),
    ("or", ("window", 0, 1), ("prefix", 1)),
    ("and", ("causal",), ("or", ("window", 2, 0), ("prefix", 2))),
    ("or", ("window", 1, 0), ("window", 3, 0)),
    ("or", ("window", 0, 0), ("chunked", 3), ("prefix", 1)),
    ("and", ("or", ("window", 1, 0), ("prefix", 2)), ("or", ("chunked", 2), ("window", 0, 1))),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_on_every_small_shape(pattern, path):
    mask = build(pattern)
    for q_len, k_len in [*itertools.product(range(6), range(6)), (3, 11), (11, 4)]:
        check_row_spans(mask, brute_force(pattern, 1, q_len, k_len), 1, q_len, k_len)


SQUARE_LAYOUTS = [
    ("padding", [0, 3, 7], "right"),
    ("padding", [7, 0, 4], "left"),
    ("padding_mask", [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0]]),
    ("padding_mask", [[0] * 7, [1] * 7, [1, 0, 0, 0, 0, 0, 1]]),
    ("key_mask", [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1, 1], [0] * 7]),
    ("key_padding", [2, 0, 7]),
    ("key_padding", 5),
    ("ids", [0, 0, 0, 1, 1, 2, 2]),
    ("ids", [[3, 3, -1, -1, 1, 1, 1], [-1, -1, 0, 0, 2, 5, 5], [-1] * 7]),
    ("and", ("padding", [6, 3, 7], "right"), ("ids", [0, 0, 0, 1, 1, 2, 2])),
    ("and", ("padding", [6, 3, 7], "right"), ("padding", [5, 5, 5], "left"), ("key_padding", [4, 7, 7])),
    ("and", ("padding_mask", [[1, 0, 1, 1, 0, 0, 0]]), ("key_mask", [[1, 1, 0, 1, 1, 1, 1]])),
]
PACKED_LAYOUTS = [
    ("cu", [0, 3, 3, 7], None),
    ("cu", [0, 0, 2, 5, 5, 5], None),
    ("cu", [0], None),
    ("cu", [0, 0], None),
    ("cu", [0, 2, 5, 7], [0, 4, 4, 7]),
    ("cu", [0, 0, 5, 7], [0, 3, 4, 6]),
    ("and", ("cu", [0, 3, 7], None), ("key_padding", 5)),
]


@pytest.mark.parametrize("layout", SQUARE_LAYOUTS, ids=str)
def test_padded_layouts_with_every_pattern(layout, path):
    for pattern in PATTERNS:
        spec = ("and", pattern, layout)
        check_row_spans(build(spec), brute_force(spec, 3, 7, 7), 3, 7, 7)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS, ids=str)
def test_packed_layouts_with_every_pattern(layout, path):
    for pattern in PATTERNS:
        spec = ("and", layout, pattern)
        check_row_spans(build(spec), brute_force(spec, 1, 7, 7), 1, 7, 7)


@pytest.mark.parametrize(
    "lengths,layout",
    [
        ([2, 0, 3], ("key_padding", [5, 1, 9])),
        ([1, 2, 4], ("padding", [5, 1, 7], "right")),
        ([1, 2, 0, 4], ("ids", [[0, 0, 0, 1, 1, -1, 2], [-1, 5, 5, 5, 5, -1, -1]])),
        ([1, 0, 3], ("cu", [0, 2, 2, 6], [0, 3, 5, 9])),
        ([2], ("cu", [0, 2, 2, 6], [0, 3, 5, 9])),
        ([2], ("padding", [5, 1, 7], "right")),
    ],
    ids=str,
)
def test_prefix_lengths_follow_the_ordinals(lengths, layout, path):
    q_len, k_len = (7, 9) if layout[0] in ("cu", "key_padding") else (7, 7)
    batch = {"cu": 1, "ids": 2}.get(layout[0], 3)
    for pattern in [("prefix", lengths), ("or", ("causal",), ("prefix", lengths))]:
        spec = ("and", pattern, layout)
        check_row_spans(build(spec), brute_force(spec, batch, q_len, k_len), batch, q_len, k_len)


def test_prefix_lengths_without_a_layout_follow_the_batch(path):
    spec = ("or", ("causal",), ("prefix", [0, 2, 4]))
    check_row_spans(build(spec), brute_force(spec, 3, 4, 5), 3, 4, 5)
    assert build(spec).spans(4, 5).batch == 3


def test_one_row_of_ids_counts_its_documents_in_every_batch_element(path):
    spec = ("and", ("prefix", [1, 2, 0, 1]), ("ids", [0, 0, 1, 1]))
    mask = build(spec)
    dense = mask.to_dense(4, 4, batch=2)
    assert dense[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
    ]


@pytest.mark.parametrize("q_len", [1, 2, 6])
def test_cache_of_capacity_10_filled_to_6(q_len, path):
    for layout in (("key_padding", 6), ("key_padding", [6, 6]), ("key_mask", [[1] * 6 + [0] * 4])):
        for pattern in PATTERNS:
            spec = ("and", pattern, layout)
            check_row_spans(build(spec), brute_force(spec, 2, q_len, 10), 2, q_len, 10)
    mask = masks.causal() & masks.key_padding(6)
    spans = mask.spans(q_len, 10)
    assert spans.start[0, 0].tolist() == [0] * q_len
    assert spans.end[0, 0].tolist() == list(range(6 - q_len + 1, 7))
    assert spans.key_valid.tolist() == [[1] * 6 + [0] * 4]


def test_cross_attention_with_equal_lengths_is_not_padding(path):
    lengths = torch.tensor([2, 5])
    cross = masks.key_padding(lengths).to_dense(5, 5)
    assert torch.equal(cross[0, 0], (torch.arange(5) < 2).expand(5, 5)), "every query row is real"
    own = masks.padding(lengths).to_dense(5, 5)
    assert not own[0, 0, 2:].any()


def test_packed_means_what_padded_means(path):
    """A packed document has the rows of the same document alone in a padded batch."""
    lengths = [3, 1, 5, 2]
    cu = torch.tensor([0, 3, 4, 9, 11])
    for pattern in PATTERNS:
        packed = (build(pattern) & masks.documents(cu_seqlens=cu)).to_dense(11, 11)[0, 0]
        padded = (build(pattern) & masks.padding(torch.tensor(lengths))).to_dense(5, 5)
        for n, length in enumerate(lengths):
            begin, end = int(cu[n]), int(cu[n + 1])
            assert torch.equal(packed[begin:end, begin:end], padded[n, 0, :length, :length])
        assert int(packed.sum()) == int(padded.sum())


@pytest.mark.parametrize("ids_dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_types(ids_dtype, path):
    ids = torch.tensor([1, 1, 0, 0, 7], dtype=ids_dtype)
    assert torch.equal(masks.documents(ids).to_dense(5, 5)[0, 0], ids.unsqueeze(0) == ids.unsqueeze(1))
    lengths = torch.tensor([2, 4], dtype=ids_dtype)
    assert masks.padding(lengths).spans(4, 4).cost() == 4 + 16
    assert (masks.prefix(lengths) & masks.key_padding(lengths)).spans(1, 4).cost() == 6
    assert masks.padding(torch.tensor([[1, 0], [1, 1]], dtype=ids_dtype)).spans(2, 2).cost() == 1 + 4


def test_large_document_ids_are_not_confused(path):
    ids = torch.tensor([2**40, 2**40, 2**40 + 2**32, 0])
    assert torch.equal(masks.documents(ids).to_dense(4, 4)[0, 0], ids.unsqueeze(0) == ids.unsqueeze(1))


def test_strided_tensors(path):
    wide = torch.tensor([[0, 9], [2, 9], [5, 9]])
    assert masks.documents(cu_seqlens=wide[:, 0]).spans(5, 5).cost() == 4 + 9
    mask = torch.tensor([[True, True], [True, False], [False, False]]).t()
    assert torch.equal(masks.padding(mask).to_dense(3, 3)[:, 0].any(1), mask)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [("full",), *SQUARE_LAYOUTS], ids=str)
def test_positions_padded(layout, path):
    check_positions(layout, 3, 7, 7)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS, ids=str)
def test_positions_packed(layout, path):
    check_positions(layout, 1, 7, 8 if layout[0] == "cu" and layout[2] else 7)


def check_positions(layout, batch, q_len, k_len):
    spans = (masks.causal() & build(layout)).spans(q_len, k_len, batch=batch, positions=True)
    assert spans.positions is not None and spans.positions.dtype == torch.int32
    assert spans.positions.shape == (3, batch, q_len)
    for b, i in itertools.product(range(batch), range(q_len)):
        without_holes = tuple(part for part in layouts_in(layout) if "mask" not in part[0])
        row = row_of(layout, b, i, batch, q_len, k_len)
        if row is None:
            if len(without_holes) == len(layouts_in(layout)):
                assert spans.positions[:, b, i].tolist() == [0, 0, -1]
            continue
        _, q_end, k_start, k_end, ordinal, _ = row
        assert spans.positions[:, b, i].tolist() == [k_end - q_end + i, k_start, ordinal]
    assert torch.equal(spans.diag, spans.positions[0])


def test_positions_are_absent_unless_asked_for(path):
    spans = masks.causal().spans(4, 4)
    assert spans.positions is None
    with pytest.raises(ValueError, match=r"no positions: build it with mask.spans\(..., positions=True\)"):
        _ = spans.diag


# ---- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (3, 2)], ids=str)
def test_dense_is_exact_in_every_combination(shape, path):
    generator = torch.Generator().manual_seed(3)
    tensor = torch.rand(*shape, 7, 7, generator=generator) < 0.4
    tensor[:, :, 2] = False
    other = torch.rand(1, 1, 7, 7, generator=generator) < 0.3
    dense = ("dense", tensor)
    for spec in [
        dense,
        ("and", dense, ("causal",)),
        ("or", dense, ("causal",)),
        ("and", ("window", 2, 1), ("or", dense, ("chunked", 3), ("prefix", 1))),
        ("and", ("or", ("window", 1, 0), dense), ("dense", other)),
        ("and", ("or", ("window", 1, 0), dense), ("padding", [5, 0, 7], "right")),
        ("and", dense, ("padding_mask", [[1, 0, 1, 1, 0, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 0, 1]])),
        ("and", dense, ("prefix", [3, 1, 4])),
    ]:
        batch = 3
        expected = brute_force(spec, batch, 7, 7, heads=shape[1])
        mask = build(spec)
        assert mask.is_dense and mask.n_spans == 1
        spans = check_row_spans(mask, expected, batch, 7, 7)
        assert spans.dense is not None and torch.equal(spans.dense.expand(batch, shape[1], 7, 7), expected)
        for b, i in itertools.product(range(batch), range(7)):
            keys = expected[b, :, i].any(0).nonzero().flatten().tolist()
            hull = [keys[0], keys[-1] + 1] if keys else [0, 0]
            at = min(b, spans.batch - 1)
            assert [int(spans.start[0, at, i]), int(spans.end[0, at, i])] == hull


# ---- algebra ---------------------------------------------------------------------------------------------------------


def test_normal_form_merges_to_one_span():
    assert (masks.causal() & masks.sliding_window(5, 0)).n_spans == 1
    assert (masks.causal() | masks.prefix(3)).n_spans == 1
    assert (masks.sliding_window(5, 0) | masks.causal()).n_spans == 1
    assert (masks.prefix(torch.tensor([1, 2])) | masks.causal()).n_spans == 1
    assert ((masks.causal() | masks.prefix(3)) & masks.sliding_window(4, -1)).n_spans == 1
    assert (masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(4))).n_spans == 2
    assert (masks.causal() & masks.sliding_window(5, 0)).conjuncts == masks.sliding_window(5, 0).conjuncts
    both = masks.sliding_window(3, 2) | masks.sliding_window(5, 2)
    assert both.conjuncts == masks.sliding_window(5, 2).conjuncts


def test_full_is_neutral_and_absorbing():
    for mask in (masks.causal(), masks.sliding_window(1, 2), masks.prefix(2) | masks.chunked(3)):
        assert (mask & masks.full()).conjuncts == mask.conjuncts == (masks.full() & mask).conjuncts
        assert (masks.causal() | masks.full()).conjuncts == masks.full().conjuncts


def test_operands_are_shared_between_sides():
    lengths = torch.tensor([1, 2])
    mask = masks.causal() & masks.prefix(lengths) & (masks.prefix(lengths) | masks.prefix(torch.tensor([2, 0])))
    assert len(mask.operands) == 2
    expected = ("and", ("causal",), ("prefix", [1, 2]), ("or", ("prefix", [1, 2]), ("prefix", [2, 0])))
    assert torch.equal(mask.to_dense(4, 4), brute_force(expected, 2, 4, 4))


def test_the_plan_has_batch_one_when_nothing_depends_on_the_batch_element(path):
    assert masks.causal().spans(4, 4, batch=8).batch == 1
    assert (masks.causal() & masks.key_padding(3)).spans(4, 4, batch=8).batch == 1
    assert masks.causal().spans(4, 4, batch=8, positions=True).batch == 8
    assert masks.padding(torch.tensor([1, 2])).spans(4, 4).batch == 2
    assert masks.causal().to_dense(3, 4, batch=5).shape == (5, 1, 3, 4)


@pytest.mark.parametrize("batch,q_len,k_len", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_shapes(batch, q_len, k_len, path):
    several = [
        masks.causal(),
        masks.causal() & (masks.sliding_window(1, 0) | masks.prefix(1)),
        masks.key_padding(torch.zeros(batch, dtype=torch.int32)),
        masks.key_padding(torch.ones(batch, k_len, dtype=torch.bool)),
        masks.dense(torch.ones(1, 1, q_len, k_len, dtype=torch.bool)),
        masks.prefix(torch.ones(batch, dtype=torch.int32)),
    ]
    if q_len == k_len:
        several += [
            masks.padding(torch.zeros(batch, dtype=torch.int32)),
            masks.padding(torch.ones(batch, k_len, dtype=torch.bool)),
            masks.documents(torch.zeros(batch, k_len, dtype=torch.int32)),
            masks.documents(torch.zeros(k_len, dtype=torch.int32)),
        ]
    for mask in several:
        spans = mask.spans(q_len, k_len, batch=batch, positions=True)
        assert spans.to_dense().expand(batch, -1, -1, -1).shape == (batch, 1, q_len, k_len)
        assert int(spans.tiles[:, 2].sum()) == spans.batch * q_len
        assert int(spans.visited_keys()) == int(spans.cost() > 0)


def test_show(path):
    out = io.StringIO()
    (masks.causal() & masks.padding(torch.tensor([2, 3]))).show(3, 3, file=out)
    assert out.getvalue().splitlines() == [
        "causal() & padding(lengths): 3 query rows (down) x 3 keys (across)",
        "batch element 0, head 0:",
        "#..",
        "##.",
        "...",
        "batch element 1, head 0:",
        "#..",
        "##.",
        "###",
    ]
    out = io.StringIO()
    masks.causal().show(128, 128, file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("a character is 2 rows x 2 keys") and len(lines) == 65
    assert lines[1] == "+" + "." * 63 and lines[64] == "#" * 63 + "+"


def test_repr_reads_like_the_expression():
    mask = (masks.causal() | masks.prefix(3)) & masks.documents(cu_seqlens=torch.tensor([0, 4]))
    assert repr(mask) == "(causal() | prefix(3)) & documents(cu_seqlens)"
