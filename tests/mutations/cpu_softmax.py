"""Masked softmax on processors."""

from tests.mutations import Mutation

SOFTMAX_TESTS = ("tests/test_softmax.py", "tests/test_softmax_torch.py", "tests/test_softmax_errors.py")

SOFTMAX = "csrc/cpu/softmax.inc"
FORWARD = "csrc/cpu/softmax_forward.inc"
BACKWARD = "csrc/cpu/softmax_backward.inc"
SCHEDULE = "csrc/cpu/softmax.cpp"

MUTATIONS = (
    Mutation(
        "softmax: masked elements are read",
        FORWARD,
        "if constexpr (MASK == SM_BYTES) value = sm_visible(mask + i) ? value : splat(-INFINITY);",
        "static_cast<void>(mask);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: a strided mask taken as adjacent",
        FORWARD,
        "value = sm_visible(mask + i * strides.mask, strides.mask)",
        "value = sm_visible(mask + i, 1)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the ragged vector counts elements twice",
        FORWARD,
        "tail = lane >= splat_int((int32_t)(W - (n - i))) ? last",
        "tail = lane >= splat_int(0) ? last",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: one visible byte for all lanes",
        FORWARD,
        "value = splat_int(*mask) != 0 ? value : splat(-INFINITY);",
        "static_cast<void>(mask);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: the buffer keeps what a block before left",
        FORWARD,
        "if (top > -INFINITY) total *= exp((double)top - raised);",
        "",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: lanes are not rescaled",
        FORWARD,
        "before[v] == splat(-INFINITY) ? (vf){} : sm_exp(before[v] - reference[v])",
        "before[v] == splat(-INFINITY) ? (vf){} : splat(1.0f)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: nothing visible is NaN",
        FORWARD,
        "const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;",
        "const float scale = 1.0f / sum;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: lanes of nothing visible are NaN",
        FORWARD,
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
        FORWARD,
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
        FORWARD,
        "p.mask.along == 0 && *mask == 0",
        "p.mask.along == 0 && *mask == 2",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: gradients of masked elements reach the sum",
        BACKWARD,
        "return w == (vf){} ? (vf){} : w * g;",
        "return w * g;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: sign of the gradient of the lse",
        BACKWARD,
        "if (grad_lse != nullptr) total -= *grad_lse;",
        "if (grad_lse != nullptr) total += *grad_lse;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: gradient of the lse of a lane",
        BACKWARD,
        "total.sums[v] -= load(values + v * W);",
        "total.sums[v] -= load(values);",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "softmax: dimensions joined whatever their strides",
        "csrc/ops/softmax.h",
        "joins = operands[t].outer[count - 1] == stride(t) * full[d];",
        "joins = true;",
        SOFTMAX_TESTS,
    ),
)
