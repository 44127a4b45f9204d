"""How a batch arrives at a call, and the mask that becomes of it: against loops over pairs, and transformers' own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils  # noqa: E402

from maskops.integrations.transformers import arrival, attach, calls  # noqa: E402

attach.register(None)

PATTERNS = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunks": masking_utils.create_chunked_causal_mask,
    "both ways": masking_utils.create_bidirectional_mask,
    "window both ways": masking_utils.create_bidirectional_sliding_window_mask,
}
SIZE = 3
"""Of windows and chunks."""


class Model(nn.Module):
    """Stands for a PreTrainedModel: its forward makes one mask, with the arguments that models hand on."""

    def __init__(self, pattern: str, implementation: str = "maskops", **config: Any) -> None:
        super().__init__()
        self.pattern = pattern
        layer = {"window": "sliding_attention", "chunks": "chunked_attention"}.get(pattern, "full_attention")
        self.config = LlamaConfig(
            num_hidden_layers=1, sliding_window=SIZE, attention_chunk_size=SIZE, layer_types=[layer], **config
        )
        self.config._attn_implementation = implementation

    def forward(
        self,
        inputs_embeds,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        functions=None,
        **kwargs,
    ):
        create = PATTERNS[self.pattern]
        if encoder_hidden_states is not None:
            return create(
                self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        skip = {} if "both ways" in self.pattern else {"allow_is_causal_skip": False, "position_ids": position_ids}
        skip |= {"allow_is_bidirectional_skip": False} if "both ways" in self.pattern else {}
        skip |= functions or {}
        return create(self.config, inputs_embeds, attention_mask, past_key_values=past_key_values, **skip)


def _hooked(pattern: str) -> Model:
    model = Model(pattern)
    calls.install(model, calls.Steps())
    return model


MODELS = {pattern: _hooked(pattern) for pattern in PATTERNS}
THEIRS = {pattern: Model(pattern, "sdpa") for pattern in PATTERNS}


def _allowed(pattern: str, query: int, key: int, first: int) -> bool:
    """Whether places of one sequence see each other; `first` is the place of its first token."""
    if pattern == "causal":
        return key <= query
    if pattern == "window":
        return query - SIZE < key <= query
    if pattern == "chunks":
        return key <= query and (key - first) // SIZE == (query - first) // SIZE
    return pattern == "both ways" or abs(query - key) <= SIZE


def _numbers(kept: list[int], segments: list[int] | None, positions: list[int] | None) -> list[int]:
    """The document of each token of a row, -1 where it is not kept."""
    found, number, before = [], -1, None
    for place, keep in enumerate(kept):
        if not keep:
            found.append(-1)
            continue
        is_new = before is None
        if before is not None and segments is not None:
            is_new = segments[place] != segments[before]
        if before is not None and positions is not None:
            step = positions[place] - positions[before]
            is_new = is_new or step not in (1, place - before)
        number += is_new
        before = place
        found.append(number)
    return found


def _brute(pattern: str, queries: list[list[int]], keys: list[list[int]] | None = None) -> torch.Tensor:
    """The mask of documents given by their numbers, pair by pair."""
    keys = queries if keys is None else keys
    shape = (len(queries), len(queries[0]), len(keys[0]))
    mask = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[0]):
        for query, number in enumerate(queries[row]):
            for key, other in enumerate(keys[row]):
                if number >= 0 and number == other:
                    mask[row, query, key] = _allowed(pattern, query, key, keys[row].index(number))
    return mask


def _dense(spans, batch: int) -> torch.Tensor:
    return spans.to_dense()[:, 0].expand(batch, -1, -1)


@st.composite
def _batches(draw: st.DrawFn) -> dict[str, Any]:
    """One to three rows of documents with holes between and inside of them, and how they are told apart."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    telling = draw(st.sampled_from(("mask", "segments", "positions", "positions and mask", "nothing")))
    kept, segments, positions = [], [], []
    for _ in range(batch):
        row_kept = draw(st.lists(st.sampled_from((1, 1, 1, 0)), min_size=length, max_size=length))
        if telling in ("positions", "nothing"):
            row_kept = [1] * length
        begins = draw(st.lists(st.sampled_from((0, 0, 0, 1)), min_size=length, max_size=length))
        place, number, start = [], [], draw(st.integers(0, 4))
        segment = 1
        for index, begin in enumerate(begins):
            segment += begin
            start = 0 if begin else start + (1 if index else 0)
            place.append(start if row_kept[index] or telling == "positions" else draw(st.integers(0, 3)))
            number.append(segment if row_kept[index] else 0)
        kept.append(row_kept)
        segments.append(number)
        positions.append(place)
    return {"kept": kept, "segments": segments, "positions": positions, "telling": telling}


@settings(max_examples=120)
@given(batch=_batches(), pattern=st.sampled_from(tuple(PATTERNS)), dtype=st.sampled_from((torch.int64, torch.bool)))
def test_mask_of_a_batch_without_cache(batch, pattern, dtype):
    kept, segments, positions, telling = (batch[key] for key in ("kept", "segments", "positions", "telling"))
    rows, length = len(kept), len(kept[0])
    inputs: dict[str, Any] = {"inputs_embeds": torch.zeros(rows, length, 4)}
    if telling == "segments":
        inputs["attention_mask"] = torch.tensor(segments)
    elif "mask" in telling:
        inputs["attention_mask"] = torch.tensor(kept).to(dtype)
    if "positions" in telling:
        inputs["position_ids"] = torch.tensor(positions)
    numbers = [
        _numbers(
            kept[row],
            segments[row] if telling == "segments" else None,
            positions[row] if "positions" in telling else None,
        )
        for row in range(rows)
    ]
    got = MODELS[pattern](**inputs)
    assert torch.equal(_dense(got, rows), _brute(pattern, numbers))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    tail=st.integers(0, 3),
    rows=st.integers(1, 2),
    pattern=st.sampled_from(tuple(PATTERNS)),
    with_mask=st.booleans(),
)
def test_mask_of_cumulative_lengths(lengths, tail, rows, pattern, with_mask):
    # Every row holds the same documents; what is between the rows, and behind the last, is no document.
    length = max(sum(lengths) + tail, 1)
    tail = length - sum(lengths)
    numbers, offsets = [], [0]
    for _ in range(rows):
        row = [index for index, count in enumerate(lengths) for _ in range(count)]
        numbers.append(row + [-1] * (length - len(row)))
        for count in lengths:
            offsets.append(offsets[-1] + count)
        if len(numbers) < rows:
            offsets.append(len(numbers) * length)
    kept = torch.ones(rows, length, dtype=torch.int64)
    if with_mask:
        for row in range(rows):
            kept[row, length - tail :] = 0
    elif rows > 1 and tail:
        # The slots up to the next row are a document of their own for whoever gives offsets only.
        numbers[0] = [number if number >= 0 else 99 for number in numbers[0]]
    got = MODELS[pattern](
        torch.zeros(rows, length, 4),
        cu_seq_lens_q=torch.tensor(offsets, dtype=torch.int32),
        attention_mask=kept if with_mask else None,
    )
    assert torch.equal(_dense(got, rows), _brute(pattern, numbers))


def _filled(kind: str, model: Model, rows: int, count: int) -> Any:
    """A cache into which `count` tokens have gone, in two pieces."""
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    for piece in (count // 2, count - count // 2):
        if piece:
            states = torch.zeros(rows, 1, piece, 4)
            cache.update(states, states, 0)
    return cache


@settings(max_examples=100)
@given(
    data=st.data(),
    pattern=st.sampled_from(("causal", "window", "chunks")),
    kind=st.sampled_from(("dynamic", "static")),
    filled=st.integers(0, 9),
    q_len=st.integers(1, 6),
    with_mask=st.booleans(),
)
def test_mask_with_a_cache_is_that_of_transformers(data, pattern, kind, filled, q_len, with_mask):
    rows = data.draw(st.integers(1, 2))
    inputs: dict[str, Any] = {"inputs_embeds": torch.zeros(rows, q_len, 4)}
    kept = torch.ones(rows, filled + q_len, dtype=torch.int64)
    if with_mask:
        for row in range(rows):
            kept[row, : data.draw(st.integers(0, filled + q_len - 1))] = 0
            if data.draw(st.booleans()):
                kept[row, data.draw(st.integers(0, filled + q_len - 1))] = 0
        inputs["attention_mask"] = kept
    if data.draw(st.booleans()):
        inputs["position_ids"] = (kept.cumsum(1) - 1).clamp(min=0)[:, filled:]
    got = MODELS[pattern](past_key_values=_filled(kind, MODELS[pattern], rows, filled), **inputs)
    expected = THEIRS[pattern](past_key_values=_filled(kind, MODELS[pattern], rows, filled), **inputs)[:, 0]
    real = kept[:, filled:, None] == 1
    mine = _dense(got, rows)
    assert mine.shape == expected.shape
    assert torch.equal(mine & real, expected & real)
    if q_len > 1:
        assert not (mine & ~real).any()


@settings(max_examples=60)
@given(batch=_batches(), pattern=st.sampled_from(tuple(PATTERNS)))
def test_mask_without_a_call_is_that_of_sdpa(batch, pattern):
    """Registered, but not attached: whatever transformers means."""
    kept, telling = batch["kept"], batch["telling"]
    inputs = {"inputs_embeds": torch.zeros(len(kept), len(kept[0]), 4)}
    if "mask" in telling:
        inputs["attention_mask"] = torch.tensor(kept)
    if telling == "positions":
        inputs["position_ids"] = torch.tensor(batch["positions"])
    got = Model(pattern)(**inputs)
    assert torch.equal(got, THEIRS[pattern](**inputs))


@settings(max_examples=80)
@given(data=st.data(), telling=st.sampled_from(("cu", "segments")), rows=st.integers(1, 2))
def test_cross_attention_of_packed_rows(data, telling, rows):
    count = data.draw(st.integers(1, 4))
    lengths = {
        side: data.draw(
            st.lists(
                st.lists(st.integers(int(telling != "cu"), 4), min_size=count, max_size=count),
                min_size=rows,
                max_size=rows,
            )
        )
        for side in "qk"
    }
    width = {side: max(1, *(sum(row) for row in lengths[side])) for side in "qk"}
    numbers: dict[str, list[list[int]]] = {}
    offsets = {side: [0] for side in "qk"}
    for side in "qk":
        numbers[side] = []
        for row in lengths[side]:
            for size in row:
                offsets[side].append(offsets[side][-1] + size)
            tail = width[side] - sum(row)
            # The slots up to the next row are a document of either side that nobody attends from or to here.
            offsets[side].append(offsets[side][-1] + tail)
            flat = [index for index, size in enumerate(row) for _ in range(size)]
            numbers[side].append(flat + [count] * tail)
    inputs = {
        "inputs_embeds": torch.zeros(rows, width["q"], 4),
        "encoder_hidden_states": torch.zeros(rows, width["k"], 4),
    }
    if telling == "cu":
        inputs |= {f"cu_seq_lens_{side}": torch.tensor(offsets[side]) for side in "qk"}
    else:
        for side in "qk":
            numbers[side] = [[-1 if number == count else number for number in row] for row in numbers[side]]
        inputs["attention_mask"] = torch.tensor(numbers["q"]) + 1
        inputs["encoder_attention_mask"] = torch.tensor(numbers["k"]) + 1
    got = MODELS["both ways"](**inputs)
    assert torch.equal(_dense(got, rows), _brute("both ways", numbers["q"], numbers["k"]))


def test_cross_attention_over_a_padded_encoder():
    kept = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    got = MODELS["both ways"](
        torch.zeros(2, 3, 4), encoder_hidden_states=torch.zeros(2, 5, 4), encoder_attention_mask=kept
    )
    assert torch.equal(_dense(got, 2), (kept == 1)[:, None].expand(2, 3, 5))


_COMBINED = [(kind, pattern) for kind in ("or", "and", "blocks") for pattern in ("causal", "window", "chunks")]
# transformers takes no blocks for masks that look both ways.
_COMBINED += [("or", "both ways"), ("and", "both ways")]


@pytest.mark.parametrize(
    ("kind", "pattern", "telling"),
    [(*pair, telling) for pair in _COMBINED for telling in ("nothing", "mask", "positions")]
    + [(kind, "causal", "cache") for kind in ("or", "and", "blocks")],
)
def test_functions_of_the_user_are_evaluated_pair_by_pair(kind, pattern, telling):
    length = 8
    blocks = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, -1], [0, 0, -1, -1, -1, 2, 2, 2]])

    def same_block(batch, head, query, key):
        return (slots[batch, query] == slots[batch, key]) & (slots[batch, query] >= 0)

    slots = torch.nn.functional.pad(blocks, (0, 8), value=-1)  # as long as the cache
    functions = {"block_sequence_ids": blocks} if kind == "blocks" else {f"{kind}_mask_function": same_block}
    kept, positions = torch.ones(2, length, dtype=torch.int64), torch.arange(length).repeat(2, 1)
    inputs: dict[str, Any] = {"inputs_embeds": torch.zeros(2, length, 4), "functions": functions}
    if telling == "mask":
        kept[0, :2] = kept[1, 5] = 0
        inputs["attention_mask"] = kept
    if telling == "positions":
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [4, 5, 0, 1, 2, 3, 4, 5]])
        inputs["position_ids"] = positions
    if telling == "cache":
        inputs |= {"inputs_embeds": torch.zeros(2, 3, 4), "past_key_values": _filled("static", MODELS["causal"], 2, 5)}
    row_positions = positions.tolist() if telling == "positions" else [None, None]
    numbers = [_numbers(kept[row].tolist(), None, row_positions[row]) for row in range(2)]
    documents = _brute("both ways", numbers)
    same = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
    known = _brute(pattern, numbers)
    expected = known & same if kind == "and" else documents & (known | same)
    got = _dense(MODELS[pattern](**inputs), 2)
    if telling == "cache":
        assert not got[..., length:].any()
        got, expected = got[..., :length], expected[:, 5:]
    assert torch.equal(got, expected)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    pattern=st.sampled_from(("causal", "window", "chunks")),
    telling=st.sampled_from(("positions", "cu", "segments")),
)
def test_packed_tokens_may_fill_an_empty_static_cache(lengths, pattern, telling):
    numbers = [[index for index, count in enumerate(lengths) for _ in range(count)]]
    length = len(numbers[0])
    inputs: dict[str, Any] = {"inputs_embeds": torch.zeros(1, length, 4)}
    if telling == "positions":
        inputs["position_ids"] = torch.cat([torch.arange(count) for count in lengths])[None]
    elif telling == "cu":
        inputs["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0)
    else:
        inputs["attention_mask"] = torch.tensor(numbers) + 1
    got = _dense(MODELS[pattern](past_key_values=StaticCache(MODELS[pattern].config, max_cache_len=20), **inputs), 1)
    assert torch.equal(got[..., :length], _brute(pattern, numbers))
    assert not got[..., length:].any()


def test_which_position_ids_speak_of_the_order_of_tokens():
    row = torch.tensor([0, 1, 0, 1, 2])
    both = row.expand(2, 5)
    images = torch.stack([both + 7, both * 2, both * 3])
    expected = {"(L,)": row, "(1, L)": row[None], "(B, L)": both, "(4, B, L)": torch.stack([both, *images])}
    for shape, positions in expected.items():
        found = arrival.text_positions(positions, 2, 5)
        assert found is not None, shape
        assert torch.equal(found, both), shape
    found = arrival.text_positions(images, 2, 5)
    assert found is not None and torch.equal(found, images)
    for positions in (None, images[:2], both.float(), both[:, :4], row.expand(3, 5)):
        assert arrival.text_positions(positions, 2, 5) is None


def test_places_in_images_are_no_beginnings_of_documents():
    text, image = [(i, i, i) for i in range(2)], [(2, 2 + i, 2 + j) for i in range(2) for j in range(2)]
    picture = [(0, i, j) for i in range(2) for j in range(2)]
    row = [*text, *image, (4, 4, 4), (0, 0, 0), *picture, (2, 2, 2), *text]
    positions = torch.tensor(row).T[:, None]
    found = arrival.text_positions(positions, 1, len(row))
    documents = arrival.of_tokens(found, None, None)
    assert documents is not None
    assert documents.ids[0].tolist() == [0] * 7 + [1] + [2] * 5 + [3] * 2


def test_arguments_of_another_part_are_not_taken_for_ones_own():
    """A model that hands all its keywords to a part for other tokens, as to a tower for images, means its own."""
    offsets, positions = torch.tensor([0, 3, 5]), torch.tensor([[0, 1, 2, 0, 1]])
    told = {"cu_seq_lens_q": offsets, "position_ids": positions}
    model, steps = Model("causal"), calls.Steps()
    text = calls.Call(model, {"input_ids": torch.zeros(1, 5, dtype=torch.int64), **told}, None, steps, frozenset())
    for mine in ({}, {"inputs_embeds": torch.zeros(1, 9, 4)}):
        tower = calls.Call(model, mine | told, text, steps, frozenset())
        assert arrival.cu_seqlens_of_call(tower, "q", (1, 9)) is None
        assert arrival.given_positions(tower, 1, 9) is None
    inner = calls.Call(model, {"inputs_embeds": torch.zeros(1, 5, 4)}, text, steps, frozenset())
    name, found = arrival.cu_seqlens_of_call(inner, "q", (1, 5)) or ("", offsets)
    assert name == "cu_seq_lens_q"
    assert found is offsets
    assert torch.equal(arrival.given_positions(inner, 1, 5), positions)
