"""The shorter way of plain calls."""

from tests.mutations import Mutation

TESTS = ("tests/test_direct.py",)
OP_TESTS = ("tests/test_direct_ops.py",)

STATE = "maskops/ops/direct.py"
ATTENTION = "maskops/ops/attention/direct.py"

MUTATIONS = (
    Mutation("direct: autocast is not seen", STATE, '        and not _is_autocast_enabled("cpu")\n', "", TESTS),
    Mutation("direct: modes are not seen", STATE, "        or _length_of_modes()\n", "", TESTS),
    Mutation("direct: a preferred backend is not seen", STATE, "        and processor_is_free()\n", "", TESTS),
    Mutation(
        "direct: plans of dense masks are taken for their hull",
        ATTENTION,
        "return mask if mask.dense is None and mask.start.is_cpu else None",
        "return mask if mask.start.is_cpu else None",
        TESTS,
    ),
    Mutation(
        "direct: the gradient of the lse is lost",
        ATTENTION,
        "if grad_lse is None and not torch.is_grad_enabled()",
        "if not torch.is_grad_enabled()",
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
        "direct: the mean counts ignored rows",
        "csrc/ops/cross_entropy_direct.cpp",
        "kept += !ignored;",
        "kept += 1;",
        OP_TESTS,
    ),
    Mutation(
        "direct: prefixes of a tensor are taken for a pattern of packed rows",
        ATTENTION,
        "or mask.layouts or mask.operands:",
        "or mask.layouts:",
        OP_TESTS,
    ),
)
