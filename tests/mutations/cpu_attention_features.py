"""What attention adds to scores on processors: softcap, ALiBi, bias, sinks, dense masks, dropout."""

from tests.mutations import Mutation

ATTENTION_FEATURES = ("tests/test_attention_features.py",)

FEATURES = "csrc/cpu/attention_features.inc"
FORWARD = "csrc/cpu/attention_forward.inc"
FORWARD_PRODUCTS = "csrc/cpu/attention_forward_products.inc"
BACKWARD = "csrc/cpu/attention_backward.inc"
BACKWARD_FEATURES = "csrc/cpu/attention_backward_features.inc"
BIAS = "csrc/cpu/attention_bias.inc"
SCHEDULE = "csrc/cpu/attention.cpp"
GRADIENTS = "csrc/cpu/attention_gradients.cpp"
BINDING = "csrc/ops/attention.cpp"
SHARED_BINDING = "csrc/ops/attention.h"

MUTATIONS = (
    Mutation(
        "features: softcap in base 2",
        FORWARD_PRODUCTS,
        "s = tanh_lanes(s) * cap;",
        "s = tanh_lanes(s) * cap * splat(LOG2E);",
    ),
    Mutation("features: sign of ALiBi", FORWARD_PRODUCTS, "s -= load(features.slope", "s += load(features.slope"),
    Mutation(
        "features: sign of ALiBi in backward", BACKWARD_FEATURES, "s -= load(features.slope", "s += load(features.slope"
    ),
    Mutation("features: distance with a sign", FEATURES, "return vmax(distance, -distance);", "return distance;"),
    Mutation("features: sign of the slopes' gradient", BACKWARD_FEATURES, "grad_slope[v] -=", "grad_slope[v] +="),
    Mutation("features: slopes of another head", FEATURES, "outer, lanes.head[lane]);", "outer, 0);"),
    Mutation(
        "features: slopes of another sequence",
        "csrc/cpu/attention.h",
        "2 * features.positions_stride + row",
        "row",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: slopes past the last sequence",
        BINDING,
        "if (slopes.by_sequence && last >= slopes.outer)",
        "if (false)",
        ATTENTION_FEATURES,
    ),
    Mutation("features: bias of another head", FEATURES, "lanes.head[lane] * tensor.head_stride", "0"),
    Mutation("features: bias of another row", FEATURES, "lanes.row[lane] * tensor.row_stride", "0"),
    Mutation("features: bias of another batch element", FEATURES, "block.batch * tensor.batch_stride", "0"),
    Mutation("features: bias of another key", FEATURES, "first_key * tensor.key_stride;", "0;"),
    Mutation(
        "features: one row of a bias for all",
        FEATURES,
        "alike = alike && (rows[x] == nullptr || row == nullptr || rows[x] == row);",
        "",
    ),
    Mutation(
        "features: bias of -inf does not hide",
        FORWARD_PRODUCTS,
        "bias == splat(-INFINITY) ? bias : s + bias",
        "s + bias",
        ATTENTION_FEATURES,
    ),
    Mutation("features: bias forgotten in backward", BACKWARD_FEATURES, "s += bias;", ""),
    Mutation(
        "features: sum of a large row forgotten",
        BACKWARD,
        "large ? sums.log2_sum[lane] : 0.0f",
        "0.0f",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: sum of a large row over its first keys",
        BACKWARD_FEATURES,
        "shape, block, 0, (int32_t)shape.k_len);",
        "shape, block, 0, 64);",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: dense mask inverted",
        FEATURES,
        "load(mine.dense + i * W) != (vf){}",
        "load(mine.dense + i * W) == (vf){}",
    ),
    Mutation(
        "features: dense mask without the bias",
        FEATURES,
        "!= (vf){} ? bias : splat",
        "!= (vf){} ? (vf){} : splat",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: sign of the sink", FORWARD, "sigmoid(log_sums[x] - per_head", "sigmoid(-log_sums[x] + per_head"
    ),
    Mutation("features: sink of another head", FORWARD, "0, head));", "0, 0));"),
    Mutation("features: sink forgotten in dO", BACKWARD, "store(grad_row + d, load(grad_row + d) * splat(share));", ""),
    Mutation("features: sink forgotten in delta", BACKWARD, "delta[x] *= share;", ""),
    Mutation("features: sign of the sink's gradient", BACKWARD, "= -delta[x] * sigmoid", "= delta[x] * sigmoid"),
    Mutation(
        "features: word of a draw",
        FEATURES,
        "random[key & 3] > last_dropped",
        "random[0] > last_dropped",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: word of a draw in a shared vector",
        FEATURES,
        "upper = (key & 2) != 0",
        "upper = (key & 4) != 0",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: keys counted from the buffer",
        FEATURES,
        "(uint32_t)(first_key + i) - mine.first[at]",
        "(uint32_t)(first_key + i)",
        ATTENTION_FEATURES,
    ),
    Mutation("features: draws of another head", FEATURES, "(uint32_t)lanes.head[lane];", "0;", ATTENTION_FEATURES),
    Mutation(
        "features: batch elements drop alike",
        FEATURES,
        "(uint32_t)block.batch * features.dropout.sequences",
        "0",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: rows counted from the buffer",
        FEATURES,
        "(uint32_t)diagonal - (uint32_t)first;",
        "(uint32_t)diagonal;",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: kept weights not scaled",
        SHARED_BINDING,
        "static_cast<float>(1.0 / (1.0 - dropout_p))",
        "1.0f",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: threshold of dropout",
        SHARED_BINDING,
        "std::ceil(dropout_p * 0x1p32) - 1.0",
        "dropout_p * 0x1p31",
        ATTENTION_FEATURES,
    ),
    Mutation("features: six rounds", FEATURES, "round < 7", "round < 6", ATTENTION_FEATURES),
    Mutation(
        "features: dropped weights in the sum",
        FORWARD_PRODUCTS,
        "      sum[v] += p;\n      if (DROPOUT) {",
        "      if (DROPOUT) {\n        sum[v] += load(kept + (i * NV + v) * W) != (vf){} ? p : (vf){};",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: dropout forgotten in dP",
        BACKWARD_FEATURES,
        "dp = kept ? dp * factor : (vf){};",
        "",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: dropout forgotten in dV",
        BACKWARD_FEATURES,
        "weight = kept ? p * factor : (vf){};",
        "",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: gradient of the bias after the softcap",
        BACKWARD_FEATURES,
        "if (ADDED) store(sum_at, ds);",
        "if (ADDED) store(sum_at, SOFTCAP ? ds * tanh_slope_lanes(bent) : ds);",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: bias gradient not cleared",
        SCHEDULE,
        "if (p.grad_bias != nullptr && !p.bias_is_shared) clear",
        "if (false) clear",
        ATTENTION_FEATURES,
    ),
    Mutation("features: bias gradient of another row", BIAS, "(by_row ? row - first_row : 0)", "0", ATTENTION_FEATURES),
    Mutation("features: bias gradient of another head", BIAS, "(by_head ? head % group : 0)", "0", ATTENTION_FEATURES),
    Mutation(
        "features: bias gradient of one batch element",
        GRADIENTS,
        "Steps batches(p.bias_sizes[0], shape.batch, 1)",
        "Steps batches(p.bias_sizes[0], 1, 1)",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: bias gradient at another key",
        BIAS,
        "(piece.by_key ? at - piece.first_key : 0)",
        "0",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: bias gradient skips rows",
        BIAS,
        "spans.end[at + row] > key_begin",
        "spans.end[at + row] > key_begin + 1",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: slopes' gradient of empty rows",
        BACKWARD,
        "live ? ((const float*)panel.grad_slope)[x] : 0.0f",
        "((const float*)panel.grad_slope)[x]",
        ATTENTION_FEATURES,
    ),
)
