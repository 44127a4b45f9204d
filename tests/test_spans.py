"""RowSpans against its prose: work items, transposed bounds, keys seen, and how much work the list makes."""

import ast
import functools
import itertools
import math
import random
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskops import masks
from maskops.backend import planner
from maskops.spans import KEY_TILE, TILE_ROWS, RowSpans, build_row_spans, tiles_per_batch_element

# ---- the prose, row by row -------------------------------------------------------------------------------------------


def rows_of(spans, b):
    """Per row of batch element b the list of (start, end) of its spans."""
    start, end = spans.start[:, b].t().tolist(), spans.end[:, b].t().tolist()
    return [list(zip(s, e, strict=True)) for s, e in zip(start, end, strict=True)]


def hull(row):
    """[first start, last end) over the spans of a row that are not empty, None for an empty row."""
    live = [(s, e) for s, e in row if e > s]
    return (live[0][0], live[-1][1]) if live else None


def segments_of(rows):
    """[first row, one past the last) of maximal runs whose non-empty hulls overlap from one to the next."""
    cuts, latest = [0], None
    for i, row in enumerate(rows):
        mine = hull(row)
        if mine is None:
            continue
        if latest is not None and not (mine[0] < latest[1] and latest[0] < mine[1]):
            cuts.append(i)
        latest = mine
    return list(itertools.pairwise([*cuts, len(rows)]))


def items_of(rows, capacity):
    """[first row, one past the last) of the work items."""
    if not rows:
        return []

    def keys(segments):
        hulls = [h for a, b in segments for h in map(hull, rows[a:b]) if h is not None]
        return max(h[1] for h in hulls) - min(h[0] for h in hulls) if hulls else 0

    items, group = [], []
    for a, b in segments_of(rows):
        if b - a >= TILE_ROWS:
            if group:
                items.append((group[0][0], group[-1][1]))
            items += [(r, min(r + TILE_ROWS, b)) for r in range(a, b, TILE_ROWS)]
            group = []
        elif group and b - group[0][0] <= TILE_ROWS and keys([*group, (a, b)]) <= 2 * TILE_ROWS:
            group.append((a, b))
        else:
            if group:
                items.append((group[0][0], group[-1][1]))
            group = [(a, b)]
    if group:
        items.append((group[0][0], group[-1][1]))
    if len(items) > capacity:
        return [(r, min(r + TILE_ROWS, len(rows))) for r in range(0, len(rows), TILE_ROWS)]
    return items


def bounds_of(rows, span, key_valid, is_dense):
    """lo, full_lo, full_hi, hi of one item and span."""
    live = [row[span] for row in rows if row[span][1] > row[span][0]]
    if not live:
        return [0, 0, 0, 0]
    low, high = min(s for s, _ in live), max(e for _, e in live)
    full_low, full_high = max(s for s, _ in live), min(e for _, e in live)
    mixed = any(hull(row) is not None and row[span][1] == row[span][0] for row in rows)
    if mixed or full_high <= full_low or not all(key_valid[full_low:full_high]) or is_dense:
        full_low = full_high = high
    return [low, full_low, full_high, high]


def expected_tiles(spans):
    tiles = []
    for b in range(spans.batch):
        rows, valid = rows_of(spans, b), spans.key_valid[b].tolist()
        for first, stop in items_of(rows, tiles_per_batch_element(spans.q_len, spans.k_len)):
            inside = rows[first:stop]
            tile = [b, first, stop - first, sum(e - s for row in inside for s, e in row)]
            for span in range(spans.n_spans):
                tile += bounds_of(inside, span, valid, spans.dense is not None)
            tiles.append(tile)
    return tiles


def expected_key_tiles(spans):
    table = []
    for span in range(spans.n_spans):
        for b in range(spans.batch):
            rows, valid = rows_of(spans, b), spans.key_valid[b].tolist()
            for first in range(0, spans.k_len, KEY_TILE):
                stop = min(first + KEY_TILE, spans.k_len)
                see = [i for i, row in enumerate(rows) if max(row[span][0], first) < min(row[span][1], stop)]
                every = [i for i, row in enumerate(rows) if row[span][0] <= first and row[span][1] >= stop]
                low, high = (see[0], see[-1] + 1) if see else (0, 0)
                contiguous = every and every[-1] - every[0] + 1 == len(every)
                if contiguous and all(valid[first:stop]) and spans.dense is None:
                    table.append([low, every[0], every[-1] + 1, high])
                else:
                    table.append([low, high, high, high])
    return table


def expected_visits(tile, n_spans):
    """Key tiles of one item: overlapping or touching hulls are one range, each counted from its own lo."""
    ranges = sorted((tile[4 + 4 * s], tile[7 + 4 * s]) for s in range(n_spans) if tile[7 + 4 * s] > tile[4 + 4 * s])
    merged = []
    for low, high in ranges:
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return sum(math.ceil((high - low) / KEY_TILE) for low, high in merged)


def check(spans: RowSpans):
    """Everything in the plan that follows from start, end and key_valid."""
    tiles = expected_tiles(spans)
    count = int(spans.tile_count)
    capacity = spans.batch * tiles_per_batch_element(spans.q_len, spans.k_len)
    assert spans.tile_count.shape == (1,) and spans.tile_count.dtype == spans.tiles.dtype == torch.int32
    assert spans.tiles.shape == (capacity, 4 + 4 * spans.n_spans)
    assert count == len(tiles) <= capacity
    assert spans.tiles[:count].tolist() == tiles
    assert not spans.tiles[count:].any()
    assert int(spans.visited_keys()) == sum(expected_visits(tile, spans.n_spans) for tile in tiles)
    assert int(spans.tiles[:, 3].sum(dtype=torch.int64)) == int(spans.cost())
    assert spans.key_tiles is not None and spans.key_tiles.dtype == torch.int32
    n_tiles = math.ceil(spans.k_len / KEY_TILE)
    assert spans.key_tiles.shape == (spans.n_spans, spans.batch, n_tiles, 4)
    assert spans.key_tiles.reshape(-1, 4).tolist() == expected_key_tiles(spans)
    if spans.dense is None:
        covered = torch.zeros(spans.batch, spans.k_len, dtype=torch.bool)
        for b in range(spans.batch):
            for s, e in itertools.chain.from_iterable(rows_of(spans, b)):
                covered[b, s:e] = True
        assert not (spans.key_valid.bool() & ~covered).any()


def random_lengths(generator, total, largest):
    lengths = []
    while sum(lengths) < total:
        lengths.append(min(generator.randrange(0, largest + 1), total - sum(lengths)))
    return lengths


def random_pattern(generator, depth=0):
    kind = generator.randrange(9 if depth < 2 else 5)
    if kind == 0:
        return masks.causal()
    if kind == 1:
        return masks.sliding_window(generator.choice([-1, 0, 3, 40, 200]), generator.choice([-1, 0, 5, 70]))
    if kind == 2:
        return masks.prefix(generator.choice([0, 1, 4, 90]))
    if kind == 3:
        return masks.chunked(generator.choice([1, 7, 64, 100, 300]))
    if kind == 4:
        return masks.full()
    left, right = random_pattern(generator, depth + 1), random_pattern(generator, depth + 1)
    return left & right if kind < 7 else left | right


def random_mask(generator):
    """A mask with its q_len and k_len, sized so that tiles, segments and holes all matter."""
    pattern = random_pattern(generator)
    kind = generator.randrange(9)
    q_len = generator.choice([1, 5, 64, 127, 128, 129, 200, 300, 420])
    if kind == 0:
        return pattern, q_len, generator.choice([0, 1, 63, 64, 65, 200, 500])
    batch = generator.choice([1, 2, 3])
    lengths = torch.tensor([generator.randrange(q_len + 1) for _ in range(batch)])
    if kind == 1:
        return pattern & masks.padding(lengths, side=generator.choice(["left", "right"])), q_len, q_len
    if kind == 2:
        density = generator.choice([0.02, 0.5, 0.97])
        mask = torch.tensor([[int(generator.random() < density) for _ in range(q_len)] for _ in range(batch)])
        return pattern & masks.padding(mask), q_len, q_len
    if kind == 3:
        return pattern & masks.key_padding(lengths), generator.choice([1, 3, 130]), q_len
    if kind == 4:
        keys = torch.ones(batch, q_len, dtype=torch.bool)
        keys[:, torch.tensor([generator.randrange(q_len) for _ in range(3)])] = False
        return pattern & masks.key_padding(keys), generator.choice([1, 3, 130]), q_len
    largest = generator.choice([3, 30, 100, 200, 400])
    parts = random_lengths(generator, generator.choice([q_len, q_len // 2]), largest)
    if kind == 5:
        ids = []
        for number, n in enumerate(parts):
            ids += [generator.choice([number, number, -1])] * n
        ids += [-1] * (q_len - len(ids))
        return pattern & masks.documents(torch.tensor(ids)), q_len, q_len
    cu = torch.tensor([0, *itertools.accumulate(parts)] + [sum(parts)] * generator.randrange(3), dtype=torch.int32)
    if kind == 6:
        k_parts = [generator.randrange(largest + 1) for _ in range(len(cu) - 1)]
        cu_k = torch.tensor([0, *itertools.accumulate(k_parts)])
        k_len = int(cu_k[-1]) + generator.randrange(3)
        lengths = torch.tensor([generator.randrange(50) for _ in k_parts])
        if len(k_parts) > 0:
            pattern = pattern | masks.prefix(lengths)
        return pattern & masks.documents(cu_seqlens=cu, cu_seqlens_k=cu_k), q_len, k_len
    return pattern & masks.documents(cu_seqlens=cu), q_len, q_len


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_follow_the_prose(seed, path):
    generator = random.Random(seed)
    for _ in range(12):
        mask, q_len, k_len = random_mask(generator)
        check(mask.spans(q_len, k_len))


def test_arbitrary_spans_follow_the_prose():
    """Spans that no mask makes: jumping back and forth, so that the capacity can be too small."""
    generator = torch.Generator().manual_seed(1)
    overflowed = 0
    for trial in range(60):
        n_spans, batch = 1 + trial % 3, 1 + trial % 2
        q_len = int(torch.randint(1, 300, (1,), generator=generator))
        k_len = int(torch.randint(1, 700, (1,), generator=generator))
        edges = torch.randint(0, k_len + 1, (2 * n_spans, batch, q_len), generator=generator).sort(dim=0).values
        start, end = edges[0::2].clone(), edges[1::2].clone()
        if trial % 4 == 0:
            end = torch.minimum(start + 2, end)
        end = torch.where(torch.rand(end.shape, generator=generator) < 0.3, start, end)
        holes = torch.rand(batch, k_len, generator=generator) < (0.0, 0.01)[trial % 2]
        spans = build_row_spans(start, end, k_len, key_holes=holes)
        check(spans)
        limit = tiles_per_batch_element(q_len, k_len)
        overflowed += any(len(items_of(rows_of(spans, b), 10**9)) > limit for b in range(batch))
    assert overflowed > 5, "the test must reach the fall back to a plain grid"


def test_dense_empties_every_full_range(path):
    tensor = torch.ones(1, 1, 130, 130, dtype=torch.bool)
    tensor[0, 0, 5, 7] = False
    check(masks.dense(tensor).spans(130, 130))
    check((masks.dense(tensor) & masks.padding(torch.tensor([3, 130]))).spans(130, 130))


def test_known_tiles(path):
    """Numbers worked out by hand."""
    spans = masks.causal().spans(256, 256)
    assert spans.tiles[:2].tolist() == [
        [0, 0, 128, 128 * 129 // 2, 0, 0, 1, 128],
        [0, 128, 128, 128 * 128 + 128 * 129 // 2, 0, 0, 129, 256],
    ]
    assert int(spans.tile_count) == 2
    assert spans.key_tiles is not None
    assert spans.key_tiles[0, 0].tolist() == [
        [0, 63, 256, 256],
        [64, 127, 256, 256],
        [128, 191, 256, 256],
        [192, 255, 256, 256],
    ]
    assert int(spans.visited_keys()) == 2 + 4
    # Three short documents share an item; a long one starts its own.
    cu = torch.tensor([0, 10, 30, 60, 260])
    tiles = masks.documents(cu_seqlens=cu).spans(260, 260).tiles
    assert [tile[:3] for tile in tiles.tolist() if tile[2]] == [[0, 0, 60], [0, 60, 128], [0, 188, 72]]
    assert tiles[0, 4:].tolist() == [0, 60, 60, 60] and tiles[1, 4:].tolist() == [60, 60, 260, 260]


@pytest.mark.parametrize("k_len", [0, 1, 31, 32, 33, 64, 100])
def test_a_dense_mask_as_bits(k_len):
    exact = torch.rand(2, 3, 5, k_len) < 0.5
    exact[..., 31:] |= torch.rand(2, 3, 5, max(k_len - 31, 0)) < 0.5
    spans = masks.dense(exact).spans(5, k_len, bits=True)
    words = spans.dense_bits
    assert words is not None and words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (2, 3, 5, (k_len + 31) // 32)
    for word in range(words.shape[3]):
        for bit in range(32):
            key = 32 * word + bit
            found = words[..., word] >> bit & 1 != 0
            assert torch.equal(found, exact[..., key] if key < k_len else torch.zeros(2, 3, 5, dtype=torch.bool))
    assert masks.dense(exact).spans(5, k_len).dense_bits is None, "processors read the mask itself"
    assert masks.causal().spans(5, k_len, bits=True).dense_bits is None
    compiled = torch.compile(lambda mask: masks.dense(mask).spans(5, k_len, bits=True), fullgraph=True, backend="eager")
    for name, x, y in zip(spans._fields, compiled(exact), spans, strict=True):
        assert (x is None and y is None) or torch.equal(x, y), name


def test_key_tile_visits_merge_overlapping_hulls():
    def visits(*bounds):
        tile = [0, 0, 1, 1]
        for low, high in bounds:
            tile += [low, low, high, high]
        zeros = torch.zeros(len(bounds), 1, 1, dtype=torch.int32)
        one = torch.zeros(1, dtype=torch.int32)
        tiles = torch.tensor([tile], dtype=torch.int32)
        return int(RowSpans(zeros, zeros, zeros[0], tiles, one, None, None, None, None, None).visited_keys())

    assert visits((0, 64)) == 1 and visits((0, 65)) == 2 and visits((60, 70)) == 1
    assert visits((0, 4), (100, 164)) == 2
    assert visits((0, 64), (64, 128)) == 2 and visits((0, 65), (65, 128)) == 2, "touching ranges are one"
    assert visits((0, 64), (32, 96)) == 2
    assert visits((0, 0), (10, 20)) == 1 and visits((10, 20), (0, 0)) == 1 and visits((0, 0), (0, 0)) == 0
    assert visits((200, 300), (0, 10)) == 3, "spans need not be sorted"
    assert visits((0, 200), (10, 20), (150, 260)) == 5, "a range inside another one changes nothing"


def test_as_4d(path):
    spans = (masks.causal() & masks.padding(torch.tensor([3, 1]))).spans(3, 3)
    four = spans.as_4d()
    assert four.shape == (2, 1, 3, 2) and four.dtype == torch.int32
    assert four.tolist() == [[[[0, 1], [0, 2], [0, 3]]], [[[0, 1], [0, 0], [0, 0]]]]


def test_key_tiles_only_for_a_backward_pass(path):
    assert masks.causal().spans(8, 8, grad=False).key_tiles is None
    assert masks.causal().spans(8, 8).key_tiles is not None


# ---- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_capacity_is_never_exceeded_by_documents(seed, path):
    """Lengths chosen to make as many items as possible: alternating around the limits of a tile."""
    generator = random.Random(seed)
    for _ in range(40):
        sizes = generator.choice(
            [(1, 128), (1, 129), (127, 2), (64, 65), (1, 257), (120, 10, 1), (128,), (1,), (300, 1)]
        )
        parts = [generator.choice(sizes) for _ in range(generator.randrange(1, 25))]
        k_sizes = generator.choice([sizes, (1, 300), (0, 200), (255, 2), (600, 0, 1)])
        k_parts = [generator.choice(k_sizes) for _ in parts]
        cu = torch.tensor([0, *itertools.accumulate(parts)])
        cu_k = torch.tensor([0, *itertools.accumulate(k_parts)])
        pattern = generator.choice([masks.causal(), masks.full(), masks.chunked(100), masks.sliding_window(10, 0)])
        mask = pattern & masks.documents(cu_seqlens=cu, cu_seqlens_k=cu_k)
        spans = mask.spans(sum(parts), sum(k_parts), grad=False)
        assert [tile[:3] for tile in expected_tiles(spans)] == spans.tiles[: int(spans.tile_count), :3].tolist()
        unlimited = items_of(rows_of(spans, 0), 10**9)
        assert len(unlimited) == int(spans.tile_count) <= spans.tiles.shape[0]


@pytest.mark.parametrize("q_len,k_len", [(0, 0), (1, 0), (1, 10**6), (5, 5), (128, 128), (129, 7), (10**5, 10**5)])
def test_capacity_is_a_host_number_of_shapes(q_len, k_len):
    expected = min(q_len, 3 * math.ceil(q_len / 128) + math.ceil(2 * k_len / 256) + 2)
    assert tiles_per_batch_element(q_len, k_len) == expected


# ---- how much work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [256, 512, 1024])
def test_first_tokens_and_window_visit_little_more_than_they_use(width, path):
    """Visited pairs: every item computes its visited key tiles, KEY_TILE keys each, for each of its rows."""
    mask = masks.causal() & (masks.sliding_window(width, 0) | masks.prefix(4))
    spans = mask.spans(8192, 8192, grad=False)
    visited = int((spans.key_tile_visits() * KEY_TILE * spans.tiles[:, 2]).sum())
    useful = int(spans.cost())
    assert useful < visited < 2.5 * useful, visited / useful


def docstring_word_counts(limit):
    """Words of docstrings of the standard library, in the order of the files, until there are `limit` of them."""
    counts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module, ast.AsyncFunctionDef)):
                words = len((ast.get_docstring(node) or "").split())
                counts += [words] if words else []
        if len(counts) >= limit:
            break
    return counts[:limit]


@functools.cache
def length_sets():
    generator = random.Random(0)

    def log_normal(median, largest, count):
        return [max(1, min(largest, int(generator.lognormvariate(math.log(median), 1)))) for _ in range(count)]

    return {
        "uniform 16-128": [generator.randrange(16, 129) for _ in range(400)],
        "log-normal median 64 max 512": log_normal(64, 512, 300),
        "log-normal median 256 max 2048": log_normal(256, 2048, 100),
        "docstrings": docstring_word_counts(600),
        "one token then full tiles": [1] + [128] * 200,
    }


def visits_per_sequence(lengths, causal):
    """Key-tile visits of a tiling that restarts at each sequence, in plain Python."""
    visits = 0
    for length in lengths:
        for first in range(0, length, TILE_ROWS):
            keys = min(first + TILE_ROWS, length) if causal else length
            visits += math.ceil(keys / KEY_TILE)
    return visits


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", list(length_sets()))
def test_never_more_visits_than_a_tiling_per_sequence(name, causal, path):
    lengths = length_sets()[name]
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    mask = masks.documents(cu_seqlens=cu) & (masks.causal() if causal else masks.full())
    spans = mask.spans(int(cu[-1]), int(cu[-1]), grad=False)
    ratio = int(spans.visited_keys()) / visits_per_sequence(lengths, causal)
    assert ratio <= 1.0, f"{name}: {ratio:.3f} of the visits of a tiling per sequence"


# ---- traced, fake and meta -------------------------------------------------------------------------------------------


def plans(cu, ids, lengths):
    """One plan for each kind of layout and pattern."""
    sinks = masks.causal() & (masks.sliding_window(3, 0) | masks.prefix(2))
    return [
        (sinks & masks.documents(cu_seqlens=cu)).spans(8, 8, positions=True),
        ((masks.causal() | masks.prefix(lengths)) & masks.documents(ids)).spans(8, 8),
        (masks.causal() & masks.padding(lengths) & masks.chunked(3)).spans(8, 8),
        (masks.causal() & masks.padding((ids >= 0).int())).spans(8, 8),
        masks.key_padding(lengths).spans(2, 8, grad=False),
        masks.dense(torch.ones(1, 1, 8, 8, dtype=torch.bool, device=cu.device)).spans(8, 8),
    ]


def arguments():
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    ids = torch.tensor([[0, 0, 0, 0, -1, -1, -1, -1], [2, 2, 2, 2, 2, 2, 2, -1]])
    return cu, ids, torch.tensor([5, 8])


def test_no_sync_on_fake_tensors(path):
    """FakeTensorMode raises on .item() and nonzero, which is what a host sync is on a device."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = plans(*(mode.from_tensor(x) for x in arguments()))
        for spans in fake:
            spans.visited_keys()
            spans.to_dense()
    for one, real in zip(fake, plans(*arguments()), strict=True):
        for x, y in zip(one, real, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


def test_no_sync_on_meta_tensors():
    for meta, real in zip(plans(*(x.to("meta") for x in arguments())), plans(*arguments()), strict=True):
        assert meta.start.device.type == "meta"
        meta.visited_keys()
        assert [None if x is None else (x.shape, x.dtype) for x in meta] == [
            None if x is None else (x.shape, x.dtype) for x in real
        ]


def test_one_graph_under_compile(path):
    torch._dynamo.reset()
    compiled = torch.compile(plans, fullgraph=True, backend="aot_eager")(*arguments())
    for one, real in zip(compiled, plans(*arguments()), strict=True):
        for x, y in zip(one, real, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.skipif(planner("cpu") is None, reason="the C++ extension is not built, so there is no operator")
def test_one_compiled_graph_for_all_lengths():
    """Shapes become symbolic. The torch path unrolls loops over powers of two of them, so it cannot be one graph."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def plan(cu, q):
        return (masks.causal() & masks.documents(cu_seqlens=cu)).spans(q.shape[0], q.shape[0])

    for total in (260, 300, 511):
        cu = torch.tensor([0, 3, total - 5])
        real = (masks.causal() & masks.documents(cu_seqlens=cu)).spans(total, total)
        for x, y in zip(plan(cu, torch.empty(total)), real, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
    assert graphs == 1
