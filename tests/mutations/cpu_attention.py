"""Attention on processors: limits, running sums, gradients, the vector functions."""

from tests.mutations import Mutation

HOSTILE = ("tests/test_hostile.py",)

LANES = "csrc/cpu/attention_lanes.inc"
FEATURES = "csrc/cpu/attention_features.inc"
FORWARD = "csrc/cpu/attention_forward.inc"
FORWARD_PRODUCTS = "csrc/cpu/attention_forward_products.inc"
BACKWARD = "csrc/cpu/attention_backward.inc"
PRODUCTS = "csrc/cpu/attention_backward_products.inc"
BACKWARD_FEATURES = "csrc/cpu/attention_backward_features.inc"
MERGE = "csrc/cpu/attention_merge.inc"
SCHEDULE = "csrc/cpu/attention.cpp"
FORWARD_SCHEDULE = "csrc/cpu/attention_forward.cpp"
SCHEDULE_TESTS = ("tests/test_schedule.py",)
VECTORS = "csrc/cpu/vec.h"

MUTATIONS = (
    Mutation(
        "a part of the keys begins late",
        FORWARD_SCHEDULE,
        "part.key_begin = part.key_end;",
        "part.key_begin = part.key_end + 1;",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "the last lanes of a block are not merged",
        FORWARD_SCHEDULE,
        "return (lanes + MERGED_LANES - 1) / MERGED_LANES;",
        "return lanes / MERGED_LANES;",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "long sequences are not cut",
        FORWARD_SCHEDULE,
        "std::min(parts_of(weighed), keys / fewest_keys)",
        "1",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "short tasks start alone", FORWARD_SCHEDULE, "share / piece.flops), 1, kv_heads_", "1), 1, 1", SCHEDULE_TESTS
    ),
    Mutation("parts of the keys weigh the same", MERGE, "exp2f((partial[0] - maximum) * unit)", "1.0f", SCHEDULE_TESTS),
    Mutation(
        "maxima of the general path in the wrong base",
        MERGE,
        "shape, p.spans.n_spans) ? LOG2E",
        "shape, 1) ? 1.0f",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "window starts one key late", FORWARD_PRODUCTS, "(position >= load_int(start", "(position > load_int(start"
    ),
    Mutation("window ends one key late", FORWARD_PRODUCTS, "(position < load_int(end", "(position <= load_int(end"),
    Mutation(
        "softcapped or two-span limits off by one",
        LANES,
        "(position < load_int(lanes.end",
        "(position <= load_int(lanes.end",
    ),
    Mutation(
        "full range one key too long", FORWARD_PRODUCTS, "key + M <= panel.full_end)", "key + M <= panel.full_end + 1)"
    ),
    Mutation(
        "full range begins too early in backward",
        LANES,
        "first_key >= panel.full_begin &&",
        "first_key + 1 >= panel.full_begin &&",
    ),
    Mutation("scale forgotten", FEATURES, "shape.softmax_scale : shape", "0.5f : shape"),
    Mutation("scale forgotten on the fast path", FEATURES, ": shape.softmax_scale * LOG2E", ": 0.5f * LOG2E"),
    Mutation("running sum not rescaled", FORWARD_PRODUCTS, "panel.running_sum[v] * rescale[v]", "panel.running_sum[v]"),
    Mutation("accumulator not rescaled", FORWARD_PRODUCTS, " * splat(rows.rescale[lane + i])", ""),
    Mutation(
        "large results not scaled",
        FORWARD_PRODUCTS,
        "stream(result + v * W, acc[i][v] * factor);",
        "stream(result + v * W, acc[i][v]);",
        SCHEDULE_TESTS,
    ),
    Mutation("accumulator never started", FORWARD, "panel.fresh = false;", ""),
    Mutation(
        "key head of a GQA group taken modulo",
        LANES,
        "block.kv_head * group + member",
        "block.kv_head + member * (int)shape.kv_heads",
    ),
    Mutation("row of a GQA lane", LANES, "if (++member == group) {", "if (++member == 1) {"),
    Mutation("first row of a block of GQA lanes", LANES, "first_row + block.lane_begin / group", "first_row"),
    Mutation("the next key head in the same task", LANES, "lanes.head[lane] += group;", ""),
    Mutation(
        "last keys of a run at the wrong place",
        FORWARD_PRODUCTS,
        "SCORE_TILE(4, smaller(done, n - 4))",
        "SCORE_TILE(4, done)",
    ),
    Mutation(
        "values end a key early", FORWARD_PRODUCTS, "lanes.end[at] - first_key);", "lanes.end[at] - first_key - 1);"
    ),
    Mutation("rows whose last keys are not there", FORWARD, "panel.closed = last;", "panel.closed = true;"),
    Mutation(
        "sign of the log-sum-exp",
        BACKWARD,
        "general ? log_sum : log_sum * LOG2E",
        "general ? log_sum : -log_sum * LOG2E",
    ),
    Mutation("log-sum-exp in base 2", FORWARD, "(maximum + log_sum) * splat(LN2)", "(maximum + log_sum)"),
    Mutation("gradient of the log-sum-exp added", BACKWARD, "delta[x] -= p.grad_lse", "delta[x] += p.grad_lse"),
    Mutation("gradient of the log-sum-exp dropped", BACKWARD, "if (p.grad_lse != nullptr)", "if (false)"),
    Mutation("empty rows are not 0", FORWARD, "lanes.empty[lane] || sums[x] == 0.0f;", "false;"),
    Mutation("log-sum-exp of the general path", FORWARD, "maximum + log_sum * splat(LN2)", "maximum + log_sum"),
    Mutation("gradients of empty rows", BACKWARD, "if (log_sum == -INFINITY) {", "if (false) {"),
    Mutation("masked pairs keep their gradient", PRODUCTS, "gradient = allowed ? gradient : (vf){};", ""),
    Mutation("masked pairs keep their probability", PRODUCTS, "weight = allowed ? weight : (vf){};", ""),
    Mutation(
        "a lane at the edge of a tile of keys", PRODUCTS, "stop - key, begin, end);", "stop - key, begin, end - 1);"
    ),
    Mutation("a key at the edge of a tile of lanes", PRODUCTS, "run_end) - first_key);", "run_end) - first_key - 1);"),
    Mutation(
        "a tile of dQ has lanes of two documents",
        PRODUCTS,
        "scratch.lanes->segment_end[panel.lane + lane] - panel.lane;",
        "panel.lanes;",
    ),
    Mutation("a tile of dK has keys of two documents", PRODUCTS, "first[end - 1] >= last[begin]", "false"),
    Mutation("lanes of the head before", BACKWARD, "lanes.head[lane] += heads;", ""),
    Mutation("a task that was taken ahead is lost", SCHEDULE, "next != nullptr ? next : take()", "take()"),
    Mutation("holes are read", LANES, "while (last < limit && key_valid[last]) last++;", "last = limit;"),
    Mutation(
        "dK without the scale",
        BACKWARD,
        "sums.key(key), shape.head_dim, shape.softmax_scale);",
        "sums.key(key), shape.head_dim, 1.0f);",
    ),
    Mutation(
        "dQ without the scale",
        BACKWARD,
        "head_width, shape.head_dim, shape.softmax_scale);",
        "head_width, shape.head_dim, 1.0f);",
    ),
    Mutation("derivative of the softcap", BACKWARD_FEATURES, "if (SOFTCAP) ds = allowed", "if (false) ds = allowed"),
    Mutation(
        "stale probabilities outside a panel's keys",
        BACKWARD,
        "zero_pairs(scratch, panel.padded_lane, panel.nv, first_key, done, run_end);",
        "",
    ),
    Mutation(
        "every task of a chain clears the sums",
        BACKWARD,
        "if (take_turn(task, taken)) sums",
        "take_turn(task, taken), sums",
        SCHEDULE_TESTS,
    ),
    Mutation("nobody writes the sums of a chain", SCHEDULE, "after == task.n_links", "false", SCHEDULE_TESTS),
    Mutation(
        "the last key of a turn is not written",
        BACKWARD,
        "smaller(task.sums_end, begin_of(turn) + TURN_KEYS)",
        "smaller(task.sums_end, begin_of(turn) + TURN_KEYS - 1)",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "gradients hold sums that are wider than their rows",
        SCHEDULE,
        "width == p_.shape.head_dim + p_.shape.value_dim",
        "true",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "sums in gradients lie as if these were dense",
        PRODUCTS,
        "key_stride = grad_k.row_stride;",
        "key_stride = head_width;",
        SCHEDULE_TESTS,
    ),
    Mutation(
        "keys before a chain are not written",
        SCHEDULE,
        "    nobodys(task.zero_begin, task.key_begin);\n",
        "",
        SCHEDULE_TESTS,
    ),
    Mutation("long backwards are not cut", SCHEDULE, "if (whole.flops <= most &&", "if (", SCHEDULE_TESTS),
    Mutation(
        "keys before a document not written",
        SCHEDULE,
        "task.zero_begin = written;",
        "task.zero_begin = task.key_begin;",
    ),
    Mutation(
        "keys behind the last document not written",
        SCHEDULE,
        "&components.back() ? k_len : task.key_end",
        "&components.back() ? task.key_end : task.key_end",
    ),
    Mutation(
        "lanes of a long block dropped",
        FORWARD_SCHEDULE,
        "lane < lanes; lane += BLOCK_LANES",
        "lane < std::min(lanes, BLOCK_LANES); lane += BLOCK_LANES",
    ),
    Mutation(
        "rows see keys beyond their tile's",
        BACKWARD,
        "plan_lanes(lanes, p.spans, shape, block, first_key, last_key);",
        "plan_lanes(lanes, p.spans, shape, block, 0, (int32_t)shape.k_len);",
        HOSTILE,
    ),
    Mutation("exponential with a worse coefficient", VECTORS, "9.671512991189957e-3f", "9.5e-3f"),
    Mutation("exponential of -inf is not 0", VECTORS, "x = vmax(splat(-127.0f), x);", "x = vmax(splat(-126.0f), x);"),
    Mutation("bfloat16 rounded towards zero", VECTORS, "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    Mutation("logarithm with a worse coefficient", VECTORS, "0.48091062903404236f", "0.49f"),
    Mutation("tanh keeps its sign for the far half", VECTORS, "x < (vf){} ? -far : far", "far"),
)
