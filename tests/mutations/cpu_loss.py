"""Cross-entropy on processors."""

from tests.mutations import Mutation

LOSS = (
    "tests/test_cross_entropy.py",
    "tests/test_cross_entropy_numerics.py",
    "tests/test_cross_entropy_autograd.py",
    "tests/test_cross_entropy_errors.py",
)
LOSS_BUFFER = ("tests/test_cross_entropy_grad_buffer.py",)
LOSS_TARGETS = ("tests/test_cross_entropy_targets.py",)

CROSS_ENTROPY = "csrc/cpu/cross_entropy.inc"
CROSS_ENTROPY_BACKWARD = "csrc/cpu/cross_entropy_backward.inc"
CROSS_ENTROPY_LANES = "csrc/cpu/cross_entropy_lanes.inc"
CROSS_ENTROPY_TARGETS = "csrc/cpu/cross_entropy_target.inc"
CROSS_ENTROPY_BOTH = "csrc/cpu/cross_entropy_both.inc"
OPERATORS = "csrc/ops/cross_entropy.cpp"

MUTATIONS = (
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
        CROSS_ENTROPY_LANES,
        "constexpr float CE_UNDERFLOW = -88.0f",
        "constexpr float CE_UNDERFLOW = -80.0f",
        LOSS,
    ),
    Mutation(
        "loss: a NaN clamped away",
        CROSS_ENTROPY_LANES,
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
        CROSS_ENTROPY_LANES,
        "const double scaled = x * rows.logit_scale;",
        "const float scaled = (float)x * (float)rows.logit_scale;",
        LOSS,
    ),
    Mutation("loss: the exponential overflows", CROSS_ENTROPY, "if (gap <= 700.0)", "if (gap <= 1e30)", LOSS),
    Mutation("loss: softcap lifts padding", CROSS_ENTROPY_LANES, "x == splat(-INFINITY) ? x : capped", "capped", LOSS),
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
        CROSS_ENTROPY_TARGETS,
        "coefficient == (vf){} ? (vf){} : coefficient * depth",
        "coefficient * depth",
        LOSS_TARGETS,
    ),
    Mutation("loss: pivot counted twice", CROSS_ENTROPY_TARGETS, "scan(x, pivot + 1,", "scan(x, pivot,", LOSS_TARGETS),
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
        CROSS_ENTROPY_TARGETS,
        "ce_add_weighted(allowed ? weight : (vf){}",
        "ce_add_weighted(allowed ? splat(1.0f) : (vf){}",
        LOSS_TARGETS,
    ),
    Mutation(
        "loss: a piece of a distribution dropped",
        CROSS_ENTROPY_TARGETS,
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
        "loss: kept exponentials keep their references",
        CROSS_ENTROPY,
        "store(kept.exponentials + i, load(kept.exponentials + i) * alpha);",
        "(void)alpha;",
        LOSS_BUFFER,
    ),
    Mutation(
        "loss: one reference for all kept exponentials",
        CROSS_ENTROPY_BOTH,
        "ce_clamp(kept.reference[run] * splat(factor)",
        "ce_clamp(kept.reference[0] * splat(factor)",
        LOSS_BUFFER,
    ),
    Mutation(
        "loss: a NaN in a gradient of bfloat16 rounded to infinity",
        CROSS_ENTROPY_LANES,
        "ce_store_pairs<STREAM, true>(g, lanes);",
        "ce_store_pairs<STREAM, false>(g, lanes);",
        LOSS_BUFFER,
    ),
    Mutation(
        "loss: a buffer beside the logits",
        OPERATORS,
        "require(apart || (grad_logits.data() == logits.data() && grad_logits.stride(0) == logits.stride(0)),",
        "require(true || apart,",
        LOSS_BUFFER,
    ),
    Mutation(
        "loss: a gradient handed out twice",
        "maskops/ops/cross_entropy/registration.py",
        "        # It is handed out once.\n        torch.autograd.graph.increment_version(gradient)\n",
        "",
        LOSS_BUFFER,
    ),
    Mutation(
        "loss: the gradient of the loss forgotten",
        "maskops/ops/cross_entropy/registration.py",
        "gradient.mul_(grad)",
        "gradient.mul_(1.0)",
        LOSS_BUFFER,
    ),
)
