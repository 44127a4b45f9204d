"""Losses of attached models, and the output layer fused into them."""

from tests.mutations import Mutation

LOSS = ("tests/test_attach_loss.py",)

LOSSES = "maskops/integrations/transformers/loss.py"
FUSED = "maskops/integrations/transformers/fused_loss.py"

MUTATIONS = (
    Mutation(
        "losses: documents of the call not looked at",
        LOSSES,
        "if documents is not None:",
        "if documents is None:",
        LOSS,
    ),
    Mutation(
        "losses: padding beside documents predicts",
        LOSSES,
        "return None if kept is None else torch.where(kept, 0, -1)",
        "return None",
        LOSS,
    ),
    Mutation(
        "losses: kept labels are those of the first columns",
        LOSSES,
        "found[:, length - keep :]",
        "found[:, :keep]",
        LOSS,
    ),
    Mutation("losses: every pair of a 4-D mask is seen", LOSSES, "~seen.any(1)", "~seen.any(1) & False", LOSS),
    Mutation(
        "losses: documents of a forward without hooks forgotten",
        LOSSES,
        "_apart.found[0][0] != id(self)",
        "_apart.found[0][0] == id(self)",
        LOSS,
    ),
    Mutation("losses: given shifted labels shifted again", LOSSES, "target = shift_labels", "target = labels", LOSS),
    Mutation(
        "losses: fractions of items cut off",
        LOSSES,
        "torch.tensor(num_items_in_batch, dtype=torch.float32",
        "torch.tensor(num_items_in_batch, dtype=torch.int32",
        LOSS,
    ),
    Mutation("losses: a loss that was set is replaced", LOSSES, 'vars(model).get("_loss_function") or ', "", LOSS),
    Mutation(
        "fused head: also in evaluation",
        FUSED,
        "            self.model.training\n            and call",
        "            call",
        LOSS,
    ),
    Mutation(
        "fused head: all rows handed on",
        FUSED,
        "row = row[(slice(None),) * dimension + (slice(1),)]",
        "row = row",
        LOSS,
    ),
    Mutation("fused head: without the bias", FUSED, "bias=layer.bias,", "bias=None,", LOSS),
    Mutation("fused head: a factor for a divisor", FUSED, "1.0 / number if self.inverse else number", "number", LOSS),
    Mutation("fused head: unequal losses let pass", FUSED, "if smallest <= tolerance:", "if smallest >= 0:", LOSS),
)
