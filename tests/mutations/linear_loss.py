"""Linear cross-entropy: chunks of rows between matrix products."""

from tests.mutations import Mutation

LINEAR = ("tests/test_linear_cross_entropy.py", "tests/test_linear_cross_entropy_cost.py")

CHUNKS = "maskops/ops/linear_cross_entropy/chunks.py"
LINEAR_LAYER = "maskops/ops/linear_cross_entropy/registration.py"

MUTATIONS = (
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
)
