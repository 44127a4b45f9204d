"""Linear cross-entropy: chunks of rows between matrix products."""

from tests.mutations import Mutation

LINEAR = ("tests/test_linear_cross_entropy.py", "tests/test_linear_cross_entropy_cost.py")

MATMUL = "csrc/cpu/matmul.inc"
SCHEDULE = "csrc/cpu/matmul.cpp"
PRODUCTS = ("tests/test_matmul.py",)

CHUNKS = "maskops/ops/linear_cross_entropy/chunks.py"
LINEAR_LAYER = "maskops/ops/linear_cross_entropy/registration.py"

MUTATIONS = (
    Mutation("linear: chunks a row short", CHUNKS, "self.step = -(-self.count", "self.step = (self.count", LINEAR),
    Mutation("linear: skipped rows scored", CHUNKS, "chosen = labels != ignore_index", "chosen = labels != -1", LINEAR),
    Mutation("linear: only the last chunk counts", CHUNKS, "add=self.started", "add=False", LINEAR),
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
    Mutation(
        "matmul: only the last part of the depth counts",
        MATMUL,
        "const float* start = k == 0 ? p.start : p.result;",
        "const float* start = p.start;",
        PRODUCTS,
    ),
    Mutation("matmul: a slab is not packed anew", SCHEDULE, "slab.origin == origin && slab", "slab", PRODUCTS),
    Mutation(
        "matmul: tiles stick out", MATMUL, "if (rows >= MM_ROWS && columns", "if (rows >= MM_ROWS || columns", PRODUCTS
    ),
    Mutation(
        "matmul: a result among its operands",
        "csrc/ops/matmul.cpp",
        "|| end(operand) <= result.data<const char>()) return;",
        "|| true) return;",
        PRODUCTS,
    ),
    Mutation("matmul: the row comes again", MATMUL, "k == 0 ? p.start_stride", "k != 0 ? p.start_stride", PRODUCTS),
)
