"""Decoding, prompts over a cache, and appending to it, on processors."""

from tests.mutations import Mutation

DECODE = ("tests/test_decode_kernel.py", "tests/test_decode.py")
DECODE_ERRORS = ("tests/test_decode_errors.py",)

DECODE_KERNEL = "csrc/cpu/decode.inc"
DECODE_KEYS = "csrc/cpu/decode_keys.inc"
DECODE_PRODUCTS = "csrc/cpu/decode_products.inc"
DECODE_SCHEDULE = "csrc/cpu/decode.cpp"
DECODE_PARAMETERS = "csrc/decode.h"
DECODE_BINDING = "csrc/ops/decode.cpp"
PREFILL = "csrc/cpu/prefill.cpp"

MUTATIONS = (
    Mutation("decode: lengths not respected", DECODE_PARAMETERS, "length[b] > most ? most : length[b]", "most", DECODE),
    Mutation(
        "decode: keys before the first are read",
        DECODE_PARAMETERS,
        "first[b] < 0 ? 0 : first[b]",
        "true ? 0 : first[b]",
        DECODE,
    ),
    Mutation(
        "decode: a window starts one key late",
        DECODE_KERNEL,
        "(position >= splat_int(s.start",
        "(position > splat_int(s.start",
        DECODE,
    ),
    Mutation(
        "decode: a window ends one key late",
        DECODE_KERNEL,
        "(position < splat_int(s.end",
        "(position <= splat_int(s.end",
        DECODE,
    ),
    Mutation(
        "decode: a block counts as whole too early",
        DECODE_KERNEL,
        "last < s.end[span * n_rows + r];",
        "last <= s.end[span * n_rows + r];",
        DECODE,
    ),
    Mutation(
        "decode: keys between two spans are read",
        DECODE_KEYS,
        "run_end = begin < run_begin ? end : larger(run_end, end);",
        "run_end = task.key_end;",
        DECODE,
    ),
    Mutation(
        "decode: a stream begins amid the one before",
        DECODE_KEYS,
        "stream * (in_turns / DECODE_STREAMS);",
        "stream * (in_turns / DECODE_STREAMS - 1);",
        DECODE,
    ),
    Mutation("decode: holes are read", DECODE_KEYS, "n += valid[key] != 0;", "n++;", DECODE),
    Mutation(
        "decode: keys of other rows are read",
        DECODE_KERNEL,
        "(lo >= stop || begin >= hi)",
        "(lo >= stop + 4096)",
        DECODE,
    ),
    Mutation(
        "decode: three rows count as four in the middle",
        DECODE_KERNEL,
        "if (rows == 3 && r + rows < n_rows) rows = 2;",
        "",
        DECODE,
    ),
    Mutation(
        "decode: pages taken in order",
        DECODE_KEYS,
        "const int64_t place = p.place_of(task.batch, page);",
        "const int64_t place = p.place_of(task.batch, 0) + page;",
        DECODE,
    ),
    Mutation(
        "decode: a page too long",
        DECODE_KEYS,
        "if (position >= page_end) {",
        "if (position > page_end) {",
        DECODE,
    ),
    Mutation(
        "decode: sum not rescaled",
        DECODE_KERNEL,
        "vf sum = load(s.sum + r * W) * splat(scale);",
        "vf sum = load(s.sum + r * W);",
        DECODE,
    ),
    Mutation("decode: accumulator not rescaled", DECODE_PRODUCTS, "* splat(scale[r]);", "* splat(1.0f);", DECODE),
    Mutation(
        "decode: parts not rescaled",
        DECODE_KERNEL,
        "const float scale = exp2f(partial[0] - maximum);",
        "const float scale = 1.0f; (void)maximum;",
        DECODE,
    ),
    Mutation(
        "decode: the last part is dropped",
        DECODE_KERNEL,
        "for (int t = 0; t < n_tasks; t++) {",
        "for (int t = 0; t + 1 < n_tasks; t++) {",
        DECODE,
    ),
    Mutation(
        "decode: bfloat16 stays apart",
        DECODE_PRODUCTS,
        "static constexpr ALWAYS_INLINE bool comes_apart(const bfloat16*) { return true; }",
        "static constexpr ALWAYS_INLINE bool comes_apart(const bfloat16*) { return false; }",
        DECODE,
    ),
    Mutation(
        "decode: pairs of the first row",
        DECODE_KERNEL,
        "q_in_pairs = (const T*)s.q + r * q_width;",
        "q_in_pairs = (const T*)s.q;",
        DECODE,
    ),
    Mutation(
        "decode: scale forgotten",
        DECODE_KERNEL,
        "shape.softcap == 0.0f ? shape.softmax_scale * LOG2E",
        "shape.softcap == 0.0f ? 0.5f * LOG2E",
        DECODE,
    ),
    Mutation("decode: softcap forgotten", DECODE_KERNEL, "if (cap != 0.0f) x =", "if (false) x =", DECODE),
    Mutation(
        "decode: sign of the distance",
        DECODE_KERNEL,
        "x -= vmax(distance, -distance) * splat(slope);",
        "x -= distance * splat(slope);",
        DECODE,
    ),
    Mutation(
        "decode: slopes of the first sequence",
        DECODE_KERNEL,
        "slopes_of_row(p.features, task.batch, row), head)",
        "0, head)",
        DECODE,
    ),
    Mutation(
        "decode: a sink of another head",
        DECODE_KERNEL,
        "per_head(p.features.sinks, 0, head)",
        "per_head(p.features.sinks, 0, task.kv_head)",
        DECODE,
    ),
    Mutation(
        "decode: log-sum-exp in base 2", DECODE_KERNEL, "(maximum + log2f(sum)) * LN2", "(maximum + log2f(sum))", DECODE
    ),
    Mutation(
        "decode: empty rows are not 0",
        DECODE_KERNEL,
        "const bool empty = sum == 0.0f;",
        "const bool empty = false;",
        DECODE,
    ),
    Mutation(
        "decode: dense mask of the first head",
        DECODE_KERNEL,
        "head * mask.head_stride",
        "0 * mask.head_stride",
        DECODE,
    ),
    Mutation(
        "decode: a raised maximum rescales nothing",
        DECODE_KERNEL,
        "maximum == before ? 1.0f : exp2_lanes(splat(before - maximum))[0]",
        "1.0f",
        DECODE,
    ),
    Mutation(
        "decode: keys behind the last one keep their weights",
        DECODE_KERNEL,
        "const vf x = lane < splat_int(n - k) ? load(scores + k) : splat(-INFINITY);",
        "const vf x = load(scores + k);",
        DECODE,
    ),
    Mutation(
        "decode: sums of fours of two rows",
        DECODE_PRODUCTS,
        "fold_pairs(fold_fours(rows[4 * i], rows[4 * i + 2]), fold_fours(rows[4 * i + 1], rows[4 * i + 3]));",
        "fold_pairs(fold_fours(rows[4 * i], rows[4 * i + 1]), fold_fours(rows[4 * i + 2], rows[4 * i + 3]));",
        DECODE,
    ),
    Mutation(
        "decode: the last run is dropped",
        DECODE_SCHEDULE,
        "static_cast<int64_t>(runs.size()) - 1, workers,",
        "static_cast<int64_t>(runs.size()) - 2, workers,",
        DECODE,
    ),
    Mutation(
        "decode: splits depend on the batch",
        DECODE_SCHEDULE,
        "(static_cast<int64_t>(key) / DECODE_TASK_KEYS + 1) * DECODE_TASK_KEYS)",
        "key + DECODE_TASK_KEYS / shape.batch)",
        DECODE,
    ),
    Mutation(
        "prefill: spans not cut to the lengths",
        PREFILL,
        "hi = std::min(hi, p.spans.end[at]);",
        "hi = p.spans.end[at];",
        DECODE,
    ),
    Mutation(
        "prefill: pages taken in order",
        PREFILL,
        "p.place_of(batch, key / page_size)",
        "(p.place_of(batch, 0) + key / page_size)",
        DECODE,
    ),
    Mutation(
        "prefill: rows of the cache taken in order",
        PREFILL,
        "in_place = in_place && p.place_of(b, 0) == b;",
        "",
        DECODE,
    ),
    Mutation(
        "append: one key late",
        DECODE_SCHEDULE,
        "const int64_t key = p.lengths[batch] + i, slot",
        "const int64_t key = p.lengths[batch] + i + (p.at.places > 1), slot",
        DECODE,
    ),
    Mutation(
        "append: a page is overrun",
        DECODE_SCHEDULE,
        "std::min(p.new_keys - i, p.at.page_size - slot);",
        "p.new_keys - i;",
        DECODE,
    ),
    Mutation(
        "append: past the capacity",
        DECODE_BINDING,
        "length > places.sizes.capacity - new_keys",
        "length > places.sizes.capacity",
        DECODE_ERRORS,
    ),
    Mutation(
        "append: two rows to one key",
        DECODE_BINDING,
        "other.begin >= one.end) continue;",
        "true) continue;",
        DECODE_ERRORS,
    ),
    Mutation(
        "append: pages unchecked",
        DECODE_BINDING,
        "if (page < 0 || page >= pages) {",
        "if (page < 0 || page > pages) {",
        DECODE_ERRORS,
    ),
    Mutation(
        "decode: rows of the cache unchecked",
        DECODE_BINDING,
        "if (row < 0 || row >= sizes.rows) {",
        "if (row < 0 || row > sizes.rows) {",
        DECODE_ERRORS,
    ),
)
