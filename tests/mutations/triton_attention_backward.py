"""Breaks of the backward kernels of span attention on Triton."""

from tests.mutations import Mutation

FOLDER = "maskops/ops/attention/triton_kernels"
LAUNCHES = f"{FOLDER}/backward.py"
ROWS = f"{FOLDER}/backward_rows.py"
SCORES = f"{FOLDER}/backward_scores.py"
PRODUCTS = f"{FOLDER}/backward_products.py"
BIAS = f"{FOLDER}/backward_bias.py"


def _break(
    name: str, file: str, old: str, new: str, tests: str, test_file: str = "tests/test_triton_attention_backward.py"
) -> Mutation:
    """``tests``: the names of those that must notice, for pytest's -k."""
    return Mutation(f"triton attention backward: {name}", file, old, new, (test_file, "-k", tests))


MUTATIONS = (
    _break(
        "gradient of the lse with the wrong sign",
        ROWS,
        "        delta -= tl.load(GRAD_LSE",
        "        delta += tl.load(GRAD_LSE",
        "window",
    ),
    _break("delta forgotten", SCORES, "(grad_weight - over_keys(terms.delta, TRANSPOSED))", "grad_weight", "window"),
    _break("gradient of q without the scale", PRODUCTS, "grad_q * softmax_scale", "grad_q", "window"),
    _break("gradient of k without the scale", PRODUCTS, "grad_k * softmax_scale", "grad_k", "window"),
    _break(
        "span ends one key late in the gradient of k",
        SCORES,
        "(places < over_keys(rows.ends[0], TRANSPOSED))",
        "(places <= over_keys(rows.ends[0], TRANSPOSED))",
        "window",
    ),
    _break(
        "second span forgotten",
        SCORES,
        "for span in tl.static_range(1, N_SPANS):",
        "for span in tl.static_range(1, 1):",
        "test_masks",
    ),
    _break(
        "heads of a group: always the first",
        PRODUCTS,
        "head = kv_head * group + part // row_parts * heads_of_part + of_group",
        "head = kv_head * group + part // row_parts * heads_of_part",
        "group_is_split",
    ),
    _break(
        "parts of a group not added",
        LAUNCHES,
        "grad_v.copy_(of_parts[1].sum(0))",
        "grad_v.copy_(of_parts[1][0])",
        "group_is_split",
    ),
    _break(
        "parts of the rows: the last is cut off",
        PRODUCTS,
        "row_tiles_of_part = tl.cdiv(n_row_tiles, row_parts)",
        "row_tiles_of_part = n_row_tiles // row_parts",
        "rows_are_split",
    ),
    _break("holes of the keys seen", PRODUCTS, "place = tl.where(is_seen, key, -1)", "place = key", "holes"),
    _break(
        "empty rows multiplied",
        PRODUCTS,
        "tl.where(is_live[:, None], grad_q * softmax_scale, 0.0)",
        "grad_q * softmax_scale",
        "empty_rows",
    ),
    _break(
        "dS of masked pairs multiplied",
        SCORES,
        "grad_product = tl.where(is_visible, grad_product, 0.0)",
        "grad_product *= is_visible",
        "triton",
        "tests/test_nonfinite_neighbours.py",
    ),
    _break(
        "rows that are not finite are read",
        PRODUCTS,
        "is_finite = tl.abs(terms.lse) < NEVER",
        "is_finite = terms.lse != NEVER",
        "triton",
        "tests/test_nonfinite_neighbours.py",
    ),
    _break(
        "rows that a bias emptied are read",
        PRODUCTS,
        "is_finite = tl.abs(terms.lse) < NEVER",
        "is_finite = terms.lse == terms.lse",
        "bias_empties",
    ),
    _break(
        "large sums not renewed",
        ROWS,
        "is_large = (tl.abs(lse) >= LARGE)",
        "is_large = (tl.abs(lse) >= 1e30)",
        "large_log or moderate",
    ),
    _break(
        "sink forgotten in renewed sums",
        ROWS,
        "log2_sum += _softplus2(over_max - log2_sum)",
        "log2_sum += 0.0",
        "large_log",
    ),
    _break("share of a sink forgotten", ROWS, "            delta *= share\n", "            delta *= 1.0\n", "sinks"),
    _break("gradient of a sink with the wrong sign", ROWS, "-delta * taken", "delta * taken", "sinks"),
    _break(
        "softcap's derivative forgotten",
        SCORES,
        "grad_product = grad_score * tanh_slope(products * factor)",
        "grad_product = grad_score",
        "softcap",
    ),
    _break(
        "dropout does not scale dP",
        SCORES,
        "tl.where(is_kept, grad_weight * keep_scale, 0.0)",
        "tl.where(is_kept, grad_weight, 0.0)",
        "dropout",
    ),
    _break(
        "gradient of the slopes with the wrong sign", PRODUCTS, "row_slope -= tl.sum", "row_slope += tl.sum", "slopes"
    ),
    _break(
        "slopes of sequences: a block too few",
        BIAS,
        "tl.cdiv(tl.maximum(last_row - first_row, 0), BLOCK_M)",
        "tl.maximum(last_row - first_row, 0) // BLOCK_M",
        "slopes_of_sequences",
    ),
    _break(
        "bias: the last share forgotten",
        BIAS,
        "(shares * (part + 1) // parts - first_share)",
        "(shares * (part + 1) // parts - first_share - 1)",
        "test_bias",
    ),
    _break(
        "bias: tiles that nobody sees by the wrong end",
        BIAS,
        "(low < first_row + BLOCK_M) & (high > first_row)",
        "(low < first_row) & (high > first_row)",
        "test_bias",
    ),
    _break(
        "rows of a key tile begin one block late",
        PRODUCTS,
        "lows = lows + (tl.maximum(low, 0) // 16 * 16,)",
        "lows = lows + (tl.maximum(low, 0) // 16 * 16 + 16,)",
        "test_masks",
    ),
)
