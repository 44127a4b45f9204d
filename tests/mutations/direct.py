"""The shorter way of plain calls."""

from tests.mutations import Mutation

TESTS = ("tests/test_direct.py",)
OP_TESTS = ("tests/test_direct_ops.py",)

STATE = "maskops/ops/direct.py"
ATTENTION = "maskops/ops/attention/direct.py"

MUTATIONS = (
    Mutation("direct: autocast is not seen", STATE, " and not _is_autocast_enabled()", "", TESTS),
    Mutation("direct: modes are not seen", STATE, "        or _length_of_modes()\n", "", TESTS),
    Mutation("direct: a preferred backend is not seen", STATE, " and processor_is_free()", "", TESTS),
    Mutation(
        "direct: plans of dense masks are taken for their hull",
        ATTENTION,
        "type(mask) is not RowSpans or mask.dense is not None or not mask.start.is_cpu",
        "type(mask) is not RowSpans or not mask.start.is_cpu",
        TESTS,
    ),
    Mutation(
        "direct: the gradient of the lse is lost",
        ATTENTION,
        "return grad_lse is None and not _is_grad_enabled()",
        "return not _is_grad_enabled()",
        TESTS,
    ),
    Mutation(
        "direct: a mask keeps plans made under inference mode as they are",
        "maskops/masks.py",
        "with torch.inference_mode(False):",
        "if True:",
        TESTS,
    ),
    Mutation(
        "direct: plans are found without the values of offsets",
        "csrc/ops/attention_direct.cpp",
        "keys_given == other.keys_given && offsets == other.offsets &&",
        "keys_given == other.keys_given &&",
        TESTS,
    ),
    Mutation(
        "direct: the gradient of packed rows reads the offsets as they are now",
        ATTENTION,
        "ctx.save_for_backward(q, k, v, out, lse, offsets)",
        "ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q[None])",
        TESTS,
    ),
    Mutation(
        "direct: a call that failed is made again",
        STATE,
        "TypeError, AttributeError, NotImplementedError)",
        "TypeError, AttributeError, RuntimeError)",
        TESTS,
    ),
    Mutation(
        "direct: the mean counts ignored rows",
        "csrc/ops/cross_entropy_direct.cpp",
        "kept += !ignored;",
        "kept += 1;",
        OP_TESTS,
    ),
    Mutation(
        "direct: prefixes of a tensor are taken for a pattern of packed rows",
        ATTENTION,
        "elif type(mask) is not Mask or mask.layouts or mask.operands:",
        "elif type(mask) is not Mask or mask.layouts:",
        OP_TESTS,
    ),
    Mutation(
        "direct: labels of other rows are taken",
        "maskops/ops/cross_entropy/direct.py",
        " or target.shape != logits.shape[:-1]",
        "",
        OP_TESTS,
    ),
)
