"""Plans on processors."""

from tests.mutations import Mutation

HOSTILE = ("tests/test_hostile.py",)
PLAN = ("tests/test_plan.py",)
VALUES = ("tests/test_masks_errors.py",)

PROGRAM = "csrc/cpu/plan_program.cpp"
SPANS = "csrc/cpu/plan_spans.cpp"
TILES = "csrc/cpu/plan_tiles.cpp"

MUTATIONS = (
    Mutation(
        "plan: diagonal one key late", SPANS, "top[i] = diag_[i] + offset;", "top[i] = diag_[i] + offset + 1;", PLAN
    ),
    Mutation("plan: chunks of a negative position", SPANS, " - (position % offset < 0)", "", PLAN),
    Mutation("plan: prefix from key 0", SPANS, "top[i] = k_start_[i] + offset;", "top[i] = offset;", PLAN),
    Mutation(
        "plan: top-left aligned", SPANS, "current.k_end - current.q_end", "current.k_start - current.q_start", PLAN
    ),
    Mutation("plan: spans not clipped to one another", SPANS, "start[i] = std::max(start[i], before[i]);", "", PLAN),
    Mutation("plan: holes stay valid", TILES, "valid[j] &= bits[j] != 0;", "(void)bits[j];", PLAN),
    Mutation(
        "plan: rows at holes see keys",
        SPANS,
        "const int32_t keep = bits[first + i] != 0 ? -1 : 0;",
        "const int32_t keep = -1; (void)bits;",
        PLAN,
    ),
    Mutation("plan: full range over a hole", TILES, "if (!partial && !valid_before_.empty())", "if (false)", PLAN),
    Mutation("plan: row missing from a span", TILES, "bool partial = mixed != 0 ||", "bool partial =", PLAN),
    Mutation(
        "plan: item over 128 rows",
        TILES,
        "next.end - head.begin > tile_rows",
        "next.end - head.begin > 2 * tile_rows",
        PLAN,
    ),
    Mutation("plan: keys of an item unlimited", TILES, "new_high - new_low > 2 * tile_rows", "false", PLAN),
    Mutation(
        "plan: ordinals restart in each batch element",
        SPANS,
        "layout, b, ids_counted_[index]",
        "layout, b, ids_counted_[index] = 0",
        PLAN,
    ),
    Mutation(
        "plan: ragged last key tile never whole",
        TILES,
        "reaches_last = end[i] >= k_len_",
        "reaches_last = false",
        PLAN,
    ),
    Mutation(
        "plan: gap among the rows of a key tile",
        TILES,
        "covering > 0 && covering == bounds[2] - bounds[1]",
        "covering > 0",
        PLAN,
    ),
    Mutation("plan: cost loses its high half", TILES, "(static_cast<int64_t>(cost_high) << 16)", "0 * cost_high", PLAN),
    Mutation(
        "plan: offsets of keys that nobody checked",
        PROGRAM,
        "(q_len == k_len && layout.key_operand == layout.operand)",
        "q_len == k_len",
        HOSTILE,
    ),
    Mutation("plan: a document may return", PROGRAM, "if (lookup.count(id) != 0)", "if (false)", VALUES),
)
