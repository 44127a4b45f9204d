"""`python -m tests.mutate`: break the kernels one line at a time and show that a test catches each break.

Works on a copy of the project; the binary and the sources under development are not touched. A mutation names a file, a
piece of text that stands in it exactly once, what replaces it, and the tests that must notice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations import (
    ROOT,
    Mutation,
    cuda_attention,
    cuda_loss,
    plan,
    triton_attention,
    triton_attention_backward,
    triton_loss,
)

ATTENTION = ("tests/test_attention.py",)
ATTENTION_FEATURES = ("tests/test_attention_features.py",)
LOSS = (
    "tests/test_cross_entropy.py",
    "tests/test_cross_entropy_numerics.py",
    "tests/test_cross_entropy_autograd.py",
    "tests/test_cross_entropy_errors.py",
)
LOSS_TARGETS = ("tests/test_cross_entropy_targets.py",)
HOSTILE = ("tests/test_hostile.py",)
LINEAR = ("tests/test_linear_cross_entropy.py",)
PLAN = ("tests/test_plan.py",)
DECODE = ("tests/test_decode_kernel.py", "tests/test_decode.py")
DECODE_ERRORS = ("tests/test_decode_errors.py",)
SOFTMAX_TESTS = ("tests/test_softmax.py",)
VALUES = ("tests/test_masks.py",)


LANES = "csrc/cpu/attention_lanes.inc"
FEATURES = "csrc/cpu/attention_features.inc"
FORWARD = "csrc/cpu/attention_forward.inc"
BACKWARD = "csrc/cpu/attention_backward.inc"
BIAS = "csrc/cpu/attention_bias.inc"
SCHEDULE = "csrc/cpu/attention.cpp"
GRADIENTS = "csrc/cpu/attention_gradients.cpp"
BINDING = "csrc/ops/attention.cpp"
VECTORS = "csrc/cpu/vec.h"
PROGRAM = "csrc/cpu/plan_program.cpp"
SPANS = "csrc/cpu/plan_spans.cpp"
TILES = "csrc/cpu/plan_tiles.cpp"
CROSS_ENTROPY = "csrc/cpu/cross_entropy.inc"
CROSS_ENTROPY_BACKWARD = "csrc/cpu/cross_entropy_backward.inc"
CHUNKS = "maskops/ops/linear_cross_entropy/chunks.py"
LINEAR_LAYER = "maskops/ops/linear_cross_entropy/registration.py"
OPERATORS = "csrc/ops/cross_entropy.cpp"

SOFTMAX = "csrc/cpu/softmax.inc"
SOFTMAX_OPERATORS = "csrc/ops/softmax.cpp"

DECODE_KERNEL = "csrc/cpu/decode.inc"
DECODE_SCHEDULE = "csrc/cpu/decode.cpp"
DECODE_PARAMETERS = "csrc/decode.h"
DECODE_BINDING = "csrc/ops/decode.cpp"
PREFILL = "csrc/cpu/prefill.cpp"

MUTATIONS = (
    Mutation("window starts one key late", FORWARD, "(position >= load_int(start", "(position > load_int(start"),
    Mutation("window ends one key late", FORWARD, "(position < load_int(end", "(position <= load_int(end"),
    Mutation(
        "softcapped or two-span limits off by one",
        LANES,
        "(position < load_int(lanes.end",
        "(position <= load_int(lanes.end",
    ),
    Mutation("full range one key too long", FORWARD, "key + M <= panel.full_end)", "key + M <= panel.full_end + 1)"),
    Mutation(
        "full range begins too early in backward",
        LANES,
        "first_key >= panel.full_begin &&",
        "first_key + 1 >= panel.full_begin &&",
    ),
    Mutation("scale forgotten", FEATURES, "shape.softmax_scale : shape", "0.5f : shape"),
    Mutation("scale forgotten on the fast path", FEATURES, ": shape.softmax_scale * LOG2E", ": 0.5f * LOG2E"),
    Mutation("running sum not rescaled", FORWARD, "panel.running_sum[v] * rescale[v]", "panel.running_sum[v]"),
    Mutation("accumulator not rescaled", LANES, "if (START == FROM_SCALED_C)", "if (false)"),
    Mutation("accumulator never started", FORWARD, "panel.fresh = false;", ""),
    Mutation(
        "key head of a GQA group taken modulo",
        LANES,
        "block.kv_head * group + position % group",
        "block.kv_head + position % group * (int)shape.kv_heads",
    ),
    Mutation(
        "row of a GQA lane", LANES, "block.first_row + position / group", "block.first_row + position % block.rows"
    ),
    Mutation(
        "sign of the log-sum-exp",
        BACKWARD,
        "general ? log_sum : log_sum * LOG2E",
        "general ? log_sum : -log_sum * LOG2E",
    ),
    Mutation("log-sum-exp in base 2", FORWARD, "(maximum + log2f(sum)) * LN2", "(maximum + log2f(sum))"),
    Mutation("gradient of the log-sum-exp added", BACKWARD, "delta -= p.grad_lse", "delta += p.grad_lse"),
    Mutation("gradient of the log-sum-exp dropped", BACKWARD, "if (p.grad_lse != nullptr)", "if (false)"),
    Mutation("empty rows are not 0", FORWARD, "lanes.empty[lane] || sum == 0.0f;", "false;"),
    Mutation("log-sum-exp of the general path", FORWARD, "maximum + logf(sum)", "maximum + log2f(sum)"),
    Mutation("gradients of empty rows", BACKWARD, "if (log_sum == -INFINITY) {", "if (false) {"),
    Mutation(
        "masked pairs keep their gradient",
        BACKWARD,
        "p = allowed ? p : (vf){};\n        ds = allowed ? ds : (vf){};",
        "p = allowed ? p : (vf){};",
    ),
    Mutation("masked pairs keep their probability", BACKWARD, "p = allowed ? p : (vf){};", ""),
    Mutation("holes are read", LANES, "while (last < limit && key_valid[last]) last++;", "last = limit;"),
    Mutation(
        "dK without the scale",
        BACKWARD,
        "grad_keys + i * head_width, shape.head_dim,\n              shape.softmax_scale",
        "grad_keys + i * head_width, shape.head_dim,\n              1.0f",
    ),
    Mutation(
        "dQ without the scale",
        BACKWARD,
        "live && x < panel.lanes ? shape.softmax_scale",
        "live && x < panel.lanes ? 1.0f",
    ),
    Mutation("derivative of the softcap", BACKWARD, "if (SOFTCAP) ds = allowed", "if (false) ds = allowed"),
    Mutation("stale probabilities outside a panel's keys", BACKWARD, "zero_rows(run_end);", ""),
    Mutation(
        "first partial sum dropped",
        BACKWARD,
        "for (int t = 0; t < n_tasks; t++) {",
        "for (int t = 1; t < n_tasks; t++) {",
    ),
    Mutation(
        "keys before a document not written",
        SCHEDULE,
        "task.zero_begin = shared ? task.key_begin : written;",
        "task.zero_begin = task.key_begin;",
    ),
    Mutation("keys behind the last document not written", SCHEDULE, "tasks.back().task.zero_end = k_len;", ""),
    Mutation(
        "lanes of a long block dropped",
        SCHEDULE,
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
    Mutation(
        "features: softcap in base 2", FORWARD, "s = tanh_lanes(s) * cap;", "s = tanh_lanes(s) * cap * splat(LOG2E);"
    ),
    Mutation("features: sign of ALiBi", FORWARD, "s -= load(features.slope", "s += load(features.slope"),
    Mutation("features: sign of ALiBi in backward", BACKWARD, "s -= load(features.slope", "s += load(features.slope"),
    Mutation("features: distance with a sign", FEATURES, "return vmax(distance, -distance);", "return distance;"),
    Mutation("features: sign of the slopes' gradient", BACKWARD, "grad_slope[v] -=", "grad_slope[v] +="),
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
        "if (slopes_by_sequence && last >= slopes.outer)",
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
        FORWARD,
        "bias == splat(-INFINITY) ? bias : s + bias",
        "s + bias",
        ATTENTION_FEATURES,
    ),
    Mutation("features: bias forgotten in backward", BACKWARD, "s += bias;", ""),
    Mutation(
        "features: sum of a large row forgotten",
        BACKWARD,
        "large ? sums.log2_sum[lane] : 0.0f",
        "0.0f",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: sum of a large row over its first keys",
        BACKWARD,
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
    Mutation("features: sign of the sink", FORWARD, "sigmoid(lse - per_head", "sigmoid(-lse + per_head"),
    Mutation("features: sink of another head", FORWARD, "0, lanes.head[lane]));", "0, 0));"),
    Mutation("features: sink forgotten in dO", BACKWARD, "store(grad_row + d, load(grad_row + d) * splat(share));", ""),
    Mutation("features: sink forgotten in delta", BACKWARD, "delta *= share;", ""),
    Mutation("features: sign of the sink's gradient", BACKWARD, "= -delta * sigmoid", "= delta * sigmoid"),
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
        BINDING,
        "static_cast<float>(1.0 / (1.0 - dropout_p))",
        "1.0f",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: threshold of dropout",
        BINDING,
        "std::ceil(dropout_p * 0x1p32) - 1.0",
        "dropout_p * 0x1p31",
        ATTENTION_FEATURES,
    ),
    Mutation("features: six rounds", FEATURES, "round < 7", "round < 6", ATTENTION_FEATURES),
    Mutation(
        "features: dropped weights in the sum",
        FORWARD,
        "      sum[v] += p;\n      if (DROPOUT) {",
        "      if (DROPOUT) {\n        sum[v] += load(kept + (i * NV + v) * W) != (vf){} ? p : (vf){};",
        ATTENTION_FEATURES,
    ),
    Mutation(
        "features: dropout forgotten in dP", BACKWARD, "dp = kept ? dp * factor : (vf){};", "", ATTENTION_FEATURES
    ),
    Mutation(
        "features: dropout forgotten in dV", BACKWARD, "weight = kept ? p * factor : (vf){};", "", ATTENTION_FEATURES
    ),
    Mutation(
        "features: gradient of the bias after the softcap",
        BACKWARD,
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
    Mutation("exponential with a worse coefficient", VECTORS, "9.671512991189957e-3f", "9.5e-3f"),
    Mutation("exponential of -inf is not 0", VECTORS, "x = vmax(splat(-127.0f), x);", "x = vmax(splat(-126.0f), x);"),
    Mutation("bfloat16 rounded towards zero", VECTORS, "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    Mutation("tanh keeps its sign for the far half", VECTORS, "x < (vf){} ? -far : far", "far"),
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
    Mutation(
        "loss: moments keep the old reference",
        CROSS_ENTROPY,
        "alpha * (s.carried_moment + delta * s.carried_sum);\n    s.carried",
        "alpha * s.carried_moment;\n    s.carried",
        LOSS,
    ),
    Mutation("loss: a sum not rescaled", CROSS_ENTROPY, "    s.carried_sum *= alpha;\n", "", LOSS),
    Mutation(
        "loss: every lane raised",
        CROSS_ENTROPY,
        "above ? top + splat(wants.headroom) : s.reference",
        "top + splat(wants.headroom)",
        LOSS,
    ),
    Mutation(
        "loss: another column left out",
        CROSS_ENTROPY,
        "splat_int((int32_t)target - v * W) ?",
        "splat_int((int32_t)target + 1 - v * W) ?",
        LOSS,
    ),
    Mutation(
        "loss: the exponential of -inf is not 0",
        CROSS_ENTROPY,
        "constexpr float CE_UNDERFLOW = -88.0f",
        "constexpr float CE_UNDERFLOW = -80.0f",
        LOSS,
    ),
    Mutation(
        "loss: a NaN clamped away",
        CROSS_ENTROPY,
        "return vmax(splat(CE_UNDERFLOW), d);",
        "return vmax(d, splat(CE_UNDERFLOW));",
        LOSS,
    ),
    Mutation(
        "loss: cancellation near p = 1",
        CROSS_ENTROPY,
        "nll = log1p(others * factor);",
        "nll = log((float)(1.0 + others * factor));",
        LOSS,
    ),
    Mutation(
        "loss: cancellation of the target's gradient",
        CROSS_ENTROPY_BACKWARD,
        "rest = expm1(logprob)",
        "rest = (float)probability - 1.0f",
        LOSS,
    ),
    Mutation(
        "loss: long sums not carried in pieces",
        CROSS_ENTROPY,
        "smaller<int64_t>(i + CE_PIECE, end);\n    for (; i < stop; i += CE_BLOCK)",
        "end;\n    for (; i < stop; i += CE_BLOCK)",
        LOSS,
    ),
    Mutation(
        "loss: the target's z in single precision",
        CROSS_ENTROPY,
        "const double scaled = x * rows.logit_scale;",
        "const float scaled = (float)x * (float)rows.logit_scale;",
        LOSS,
    ),
    Mutation("loss: the exponential overflows", CROSS_ENTROPY, "if (gap <= 700.0)", "if (gap <= 1e30)", LOSS),
    Mutation("loss: softcap lifts padding", CROSS_ENTROPY, "x == splat(-INFINITY) ? x : capped", "capped", LOSS),
    Mutation(
        "loss: banned columns counted",
        CROSS_ENTROPY,
        "const vi finite = values[v] > splat(-INFINITY);",
        "const vi finite = values[v] >= splat(-INFINITY);",
        LOSS,
    ),
    Mutation(
        "loss: smoothing gradient on banned columns",
        CROSS_ENTROPY_BACKWARD,
        "value > splat(-INFINITY) ? splat(c.constant)",
        "value >= splat(-INFINITY) ? splat(c.constant)",
        LOSS,
    ),
    Mutation(
        "loss: last of equal columns",
        CROSS_ENTROPY,
        "s.highest_block[lane] < begin",
        "s.highest_block[lane] >= 0",
        LOSS,
    ),
    Mutation("loss: skipped rows not written", CROSS_ENTROPY_BACKWARD, "    memset(g, 0, n * sizeof(T));\n", "", LOSS),
    Mutation(
        "loss: streaming stores unaligned",
        CROSS_ENTROPY_BACKWARD,
        "begin = smaller(begin, vocabulary);",
        "begin = 0;",
        LOSS,
    ),
    Mutation(
        "loss: sign of the gradient of logprobs",
        CROSS_ENTROPY_BACKWARD,
        "of_target * weight - grad_logprobs",
        "of_target * weight + grad_logprobs",
        LOSS,
    ),
    Mutation(
        "loss: entropy forgotten in its gradient",
        CROSS_ENTROPY_BACKWARD,
        "splat(c.entropy) * (d + splat(c.offset))",
        "splat(c.entropy) * d",
        LOSS,
    ),
    Mutation(
        "loss: z loss gradient halved", CROSS_ENTROPY_BACKWARD, "2.0 * p.rows.z_loss * lse", "p.rows.z_loss * lse", LOSS
    ),
    Mutation(
        "loss: label outside the vocabulary",
        OPERATORS,
        "label < 0 || label >= vocabulary",
        "label < 0 || label > vocabulary",
        LOSS,
    ),
    Mutation(
        "loss: banned columns of a distribution",
        CROSS_ENTROPY,
        "coefficient == (vf){} ? (vf){} : coefficient * depth",
        "coefficient * depth",
        LOSS_TARGETS,
    ),
    Mutation("loss: pivot counted twice", CROSS_ENTROPY, "scan(x, pivot + 1,", "scan(x, pivot,", LOSS_TARGETS),
    Mutation(
        "loss: class weight of the label forgotten",
        CROSS_ENTROPY,
        "of_target = weight == 0.0 ? 0.0 : weight * nll",
        "of_target = nll",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: banned label of weight 0",
        CROSS_ENTROPY,
        "of_target = weight == 0.0 ? 0.0 : weight * nll",
        "of_target = weight * nll",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: class weights of the smoothing forgotten",
        CROSS_ENTROPY,
        "ce_add_weighted(allowed ? weight : (vf){}",
        "ce_add_weighted(allowed ? splat(1.0f) : (vf){}",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: a piece of a distribution dropped",
        CROSS_ENTROPY,
        "ce_total(s.depth[0] + s.depth[1])",
        "ce_total(s.depth[0])",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: another pivot than the largest logit",
        CROSS_ENTROPY,
        "found |= load_lanes(x + i + v * W) == splat(highest);",
        "found |= load_lanes(x + i + v * W) != splat(highest); i = vocabulary - 1;",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: weights of the smoothing's gradient",
        CROSS_ENTROPY_BACKWARD,
        "weight * splat(c.smoothed)",
        "splat(c.smoothed)",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: gradient of a distribution's logprobs",
        CROSS_ENTROPY_BACKWARD,
        "add(-grad_logprobs, statistics[TARGET_MASS], share);",
        "add(grad_logprobs, statistics[TARGET_MASS], share);",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: weight of the others in the pivot's gradient",
        CROSS_ENTROPY_BACKWARD,
        "coefficient * (others * probability + at * rest)",
        "coefficient * at * rest",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: gradient of a banned column's probability",
        CROSS_ENTROPY_BACKWARD,
        "return nothing ? (vf){} : coefficient * surprise;",
        "return coefficient * surprise;",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: gradient of skipped probabilities not written",
        CROSS_ENTROPY_BACKWARD,
        "    memset(g, 0, p.rows.vocabulary * sizeof(U));\n",
        "",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: probabilities do not shift",
        "csrc/ops/cross_entropy.h",
        "first += rows.probability_row_stride * bytes_of(rows.probability_element);",
        "",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: gradient of the first probabilities not written",
        OPERATORS,
        "std::memset(first, 0, static_cast<size_t>(rows.vocabulary * element));",
        "",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: a pivot that nobody checked",
        OPERATORS,
        "require(pivot >= 0.0 && pivot < static_cast<double>(p.rows.vocabulary),",
        "require(true || pivot == 0.0,",
        LOSS,
    ),
    Mutation("loss: labels taken as adjacent", OPERATORS, "values[row * stride]", "values[row]", LOSS),
    Mutation(
        "softmax: masked elements are read",
        SOFTMAX,
        "if constexpr (MASK == SM_BYTES) value = sm_visible(mask + i) ? value : splat(-INFINITY);",
        "static_cast<void>(mask);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: a strided mask taken as adjacent",
        SOFTMAX,
        "value = sm_visible(mask + i * strides.mask, strides.mask)",
        "value = sm_visible(mask + i, 1)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the ragged vector counts elements twice",
        SOFTMAX,
        "tail = lane >= splat_int((int32_t)(W - (n - i))) ? last",
        "tail = lane >= splat_int(0) ? last",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: one visible byte for all lanes",
        SOFTMAX,
        "value = splat_int(*mask) != 0 ? value : splat(-INFINITY);",
        "static_cast<void>(mask);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the buffer keeps what a block before left",
        SOFTMAX,
        "if (top > -INFINITY) total *= exp((double)top - raised);",
        "",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: lanes are not rescaled",
        SOFTMAX,
        "before[v] == splat(-INFINITY) ? (vf){} : sm_exp(before[v] - reference[v])",
        "before[v] == splat(-INFINITY) ? (vf){} : splat(1.0f)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: nothing visible is NaN",
        SOFTMAX,
        "const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;",
        "const float scale = 1.0f / sum;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: lanes of nothing visible are NaN",
        SOFTMAX,
        "scale[v] = total.sums[v] == (vf){} ? (vf){} :",
        "scale[v] =",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: masked elements beside a NaN",
        SOFTMAX,
        "from_float(weights + i * weights_stride, visible ? NAN : 0.0f);",
        "from_float(weights + i * weights_stride, NAN);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: lse of an infinite score",
        SOFTMAX,
        "if (lse != nullptr) *lse = holds_nan ? NAN : INFINITY;",
        "",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the exponential of -inf is not 0",
        SOFTMAX,
        "constexpr float SM_UNDERFLOW = -88.0f",
        "constexpr float SM_UNDERFLOW = -80.0f",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: holes of a span are read",
        SOFTMAX,
        "if (before[end] - before[begin] == end - begin) return nullptr;",
        "return nullptr;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: spans cross",
        SOFTMAX,
        "smaller(larger<int64_t>(spans.start[at], from), length)",
        "smaller<int64_t>(larger<int64_t>(spans.start[at], 0), length)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the next batch element keeps the plan", SOFTMAX, "batch += spans.plan_batch != 1;", "", SOFTMAX_TESTS
    ),
    Mutation(
        "softmax: outer dimensions walked with one stride",
        SOFTMAX,
        "offset[o] -= shape.outer_sizes[d] * operands[o]->outer[d];",
        "offset[o] -= shape.outer_sizes[d] * operands[0]->outer[d];",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: a whole row behind one byte",
        SOFTMAX,
        "p.mask.along == 0 && *mask == 0",
        "p.mask.along == 0 && *mask == 2",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: gradients of masked elements reach the sum",
        SOFTMAX,
        "return w == (vf){} ? (vf){} : w * g;",
        "return w * g;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: sign of the gradient of the lse",
        SOFTMAX,
        "if (grad_lse != nullptr) total -= *grad_lse;",
        "if (grad_lse != nullptr) total += *grad_lse;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: gradient of the lse of a lane",
        SOFTMAX,
        "total.sums[v] -= load(values + v * W);",
        "total.sums[v] -= load(values);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: dimensions joined whatever their strides",
        "csrc/ops/softmax.h",
        "joins = operands[t].outer[count - 1] == stride(t) * dense.size(d);",
        "joins = true;",
        SOFTMAX_TESTS,
    ),
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
        DECODE_KERNEL,
        "run_end = begin < run_begin ? end : larger(run_end, end);",
        "run_end = task.key_end;",
        DECODE,
    ),
    Mutation("decode: holes are read", DECODE_KERNEL, "if (valid == nullptr || valid[key])", "", DECODE),
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
        DECODE_KERNEL,
        "const int64_t place = p.place_of(task.batch, page);",
        "const int64_t place = p.place_of(task.batch, 0) + page;",
        DECODE,
    ),
    Mutation(
        "decode: a page too long", DECODE_KERNEL, "if (position >= page_end) {", "if (position > page_end) {", DECODE
    ),
    Mutation(
        "decode: sum not rescaled",
        DECODE_KERNEL,
        "s.sum[r] * scale + horizontal_sum(sum)",
        "s.sum[r] + horizontal_sum(sum)",
        DECODE,
    ),
    Mutation("decode: accumulator not rescaled", DECODE_KERNEL, "* splat(scale[r]);", "* splat(1.0f);", DECODE),
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
        DECODE_KERNEL,
        "static ALWAYS_INLINE bool comes_apart(const bfloat16*) { return true; }",
        "static ALWAYS_INLINE bool comes_apart(const bfloat16*) { return false; }",
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
        "decode: splits depend on the batch",
        DECODE_SCHEDULE,
        "(static_cast<int64_t>(key) / KEYS_PER_TASK + 1) * KEYS_PER_TASK)",
        "key + KEYS_PER_TASK / shape.batch)",
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
        "length > places.capacity - new_keys",
        "length > places.capacity",
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
        "if (row < 0 || row >= rows) {",
        "if (row < 0 || row > rows) {",
        DECODE_ERRORS,
    ),
    Mutation("linear: chunks a row short", CHUNKS, "self.step = -(-self.count", "self.step = (self.count", LINEAR),
    Mutation("linear: skipped rows scored", CHUNKS, "chosen = labels != ignore_index", "chosen = labels != -1", LINEAR),
    Mutation(
        "linear: first tile added to what was there",
        CHUNKS,
        "beta=int(tile.start > 0)",
        "beta=1",
        LINEAR,
    ),
    Mutation("linear: only the last chunk counts", CHUNKS, "beta=int(self.started)", "beta=0", LINEAR),
    Mutation(
        "linear: chunks summed in the weight's dtype",
        CHUNKS,
        "n_chunks == 0 or like.dtype == torch.float32",
        "True",
        LINEAR,
    ),
    Mutation("linear: rows without gradient", CHUNKS, "grad != 0 for", "grad == grad for", LINEAR),
    Mutation(
        "linear: gradients kept for a second pass",
        LINEAR_LAYER,
        "gradients, ctx.gradients = ctx.gradients, None",
        "gradients = ctx.gradients",
        LINEAR,
    ),
    Mutation("linear: factor of the loss forgotten", LINEAR_LAYER, "made.mul_(grad)", "made.mul_(1.0)", LINEAR),
    *cuda_attention.MUTATIONS,
    *cuda_loss.MUTATIONS,
    *plan.MUTATIONS,
    *triton_attention.MUTATIONS,
    *triton_attention_backward.MUTATIONS,
    *triton_loss.MUTATIONS,
)


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    # Optimised as little as the kernels bear, and without nvcc: most of a mutation's time goes into the compiler. What
    # the CUDA kernels do shows where they run, compiled as host code.
    environment = {**os.environ, "PYTHONPATH": str(root), "CXXFLAGS": "-O1", "NVCC": ""}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)


def build(root: Path) -> None:
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root)
    if result.returncode != 0:
        raise RuntimeError(f"the build failed:\n{result.stderr[-3000:]}")
    if not (root / "maskops/_native.so").exists():
        raise RuntimeError(f"the build gave no binary: {(root / 'maskops/_build_report.json').read_text()}")


def failing_test(mutation: Mutation, root: Path) -> str | None:
    """The first test that fails, or None: the mutation survived."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
    result = run(command, root)
    if result.returncode == 0:
        return None
    if result.returncode != 1:  # neither passed nor failed: a broken run proves nothing, unless the process was killed
        return f"the process ended with {result.returncode}" if result.returncode < 0 else None
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the mutations whose name contains this text")
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT, root, ignore=ignore)
        build(root)
        for tests in sorted({mutation.tests for mutation in chosen}):
            result = run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests], root)
            if result.returncode != 0:
                print(f"{' '.join(tests)} fails without a mutation:\n{result.stdout[-2000:]}", file=sys.stderr)
                return 2
        for mutation in chosen:
            begin = time.monotonic()
            mutation.apply(root)
            try:
                build(root)
                caught = failing_test(mutation, root)
            finally:
                mutation.revert(root)
            if caught is None:
                survivors.append(mutation.name)
            verdict = f"caught by {caught}" if caught else "SURVIVED"
            print(f"{mutation.name:48s} {verdict}  [{time.monotonic() - begin:.0f} s]", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
