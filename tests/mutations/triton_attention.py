"""Span attention and the key/value cache on Triton, forward."""

from tests.mutations import Mutation

FEATURES = "maskops/ops/attention/triton_kernels/features.py"
FORWARD = "maskops/ops/attention/triton_kernels/forward.py"
DECODE = "maskops/ops/decode/triton_kernels/forward.py"
PLACES = "maskops/ops/decode/triton_kernels/places.py"
APPEND = "maskops/ops/decode/triton_kernels/append.py"


def _attention(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_triton_attention.py::{name}" for name in names)


def _decode(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_triton_decode.py::{name}" for name in names)


MUTATIONS = (
    Mutation("triton attention: one key too many", FEATURES, "(key[None, :] < rows.ends[0][:, None])",
             "(key[None, :] <= rows.ends[0][:, None])", _attention("test_case[causal]")),
    Mutation("triton attention: key head of another group", FORWARD, "kv_head = unit.head // group",
             "kv_head = unit.head % group", _attention("test_case[multi-query]", "test_case[full]")),
    Mutation("triton attention: the sum is not rescaled", FORWARD, "row_sum * decay + tl.sum(weights, 1)",
             "row_sum + tl.sum(weights, 1)", _attention("test_case[full]")),
    Mutation("triton attention: sign in the lse", FEATURES, "(row_max + tl.log2(row_sum)) * LN2",
             "(row_max - tl.log2(row_sum)) * LN2", _attention("test_case[full]")),
    Mutation("triton attention: unseen values are loaded", FORWARD,
             "V + first_key.to(tl.int64) * v_row_stride, v_row_stride, is_read, PARTIAL",
             "V + first_key.to(tl.int64) * v_row_stride, v_row_stride, key < k_len, PARTIAL",
             ("tests/test_nonfinite_neighbours.py", "-k", "triton and v")),
    Mutation("triton attention: a full tile twice", FEATURES, "tl.where(number >= walk.before[0], walk.fulls[0], 0)",
             "tl.where(number > walk.before[0], walk.fulls[0], 0)", _attention("test_splits_of_the_keys[full]")),
    Mutation("triton attention: spans that merge count twice", FEATURES,
             "visited = tl.maximum(visited, behind + after * BLOCK_P)", "visited = visited * 1",
             _attention("test_splits_of_the_keys[two spans]")),
    Mutation("triton attention: a ragged tile is full", FEATURES,
             "tl.maximum(full_high - (first + before * BLOCK_P), 0) // BLOCK_N",
             "tl.cdiv(tl.maximum(full_high - (first + before * BLOCK_P), 0), BLOCK_N)",
             _attention("test_case[causal]")),
    Mutation("triton attention: parts of an item are alike", FEATURES, "skipped = part * BLOCK_M", "skipped = part * 0",
             _attention("test_case[full]")),
    Mutation("triton attention: empty rows are not selected", FORWARD,
             "is_empty = (row_sum == 0.0) | (rows.is_live == 0)", "is_empty = row_sum == 0.0",
             _attention("test_empty_rows_take_no_part")),
    Mutation("triton attention: weights of the merge in another base", FORWARD,
             "weight = tl.exp2((lse - shift) * LOG2E)", "weight = tl.exp2(lse - shift)",
             _attention("test_splits_of_the_keys[full]")),
    Mutation("triton attention: one sink for all heads", FORWARD,
             "sink = tl.load(SINKS + unit.head * sinks_head_stride)", "sink = tl.load(SINKS)",
             _attention("test_case[sinks]")),
    Mutation("triton attention: units left out on the way back", FORWARD, "this, programs - 1 - this)",
             "this, programs - this)", _attention("test_case[full]")),
    Mutation("triton attention: bits of the next key", FEATURES, "shifts = first_key % 32 + tl.arange(0, PER_WORD)",
             "shifts = first_key % 32 + 1 + tl.arange(0, PER_WORD)", _attention("test_case[dense]")),
    Mutation("triton attention: distances with a sign", FEATURES, "return tl.abs(diagonal - key).to(tl.float32)",
             "return (diagonal - key).to(tl.float32)", _attention("test_case[dense for all heads]")),
    Mutation("triton attention: draws of two keys", FEATURES, "words = tl.philox(seed, in_sequence >> 2,",
             "words = tl.philox(seed, in_sequence >> 1,",
             _attention("test_dropout_is_that_of_every_backend[documents]")),
    Mutation("triton attention: batch elements drop alike", FEATURES, "ordinal + batch * (tl.load(LAST_ORDINAL) + 1)",
             "ordinal + batch * 0", _attention("test_dropout_is_that_of_every_backend[shared plan]")),
    Mutation("triton decode: a share without its last tile", DECODE, "n_tiles * (split + 1) // splits",
             "(n_tiles * (split + 1) - 1) // splits", _decode("test_splits_of_the_keys[plain]")),
    Mutation("triton decode: key number instead of slot", PLACES, "slot = key - index * page_size", "slot = key * 1",
             _decode("test_features[plain-paged]")),
    Mutation("triton decode: heads of another group", DECODE, "head = kv_head * GROUP + row % GROUP",
             "head = kv_head + row % GROUP * (heads // GROUP)", _decode("test_features[plain-contiguous]")),
    Mutation("triton decode: padding on the left is read", DECODE,
             "low = tl.minimum(tl.maximum(skipped, 0), high).to(tl.int32)", "low = high * 0",
             _decode("test_features[leftpad-contiguous]")),
    Mutation("triton decode: keys that nobody sees are read", DECODE,
             "is_read = tl.load(KEY_VALID + batch * key_valid_stride + key, mask=is_read, other=0) != 0",
             "is_read = is_read & (key >= 0)", _decode("test_masks_with_holes")),
    Mutation("triton cache: appended one place too far", APPEND, ".to(tl.int64) + new_key\n",
             ".to(tl.int64) + new_key + 1\n", _decode("test_append_to_rows")),
)  # fmt: skip
