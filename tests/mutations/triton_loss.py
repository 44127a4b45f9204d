"""Cross-entropy, linear cross-entropy and masked softmax in Triton, interpreted."""

from tests.mutations import Mutation

LOSS = ("tests/test_triton_loss.py",)
LINEAR = ("tests/test_triton_linear_loss.py",)
SOFTMAX_TESTS = ("tests/test_triton_softmax.py",)

GROUPS = "maskops/ops/triton_rows.py"
VALUES = "maskops/ops/cross_entropy/triton_kernels/values.py"
FORWARD = "maskops/ops/cross_entropy/triton_kernels/forward.py"
BACKWARD = "maskops/ops/cross_entropy/triton_kernels/backward.py"
LAUNCHES = "maskops/ops/cross_entropy/triton_kernels/__init__.py"
CHUNKS = "maskops/ops/linear_cross_entropy/device_chunks.py"
PLACES = "maskops/ops/softmax/triton_kernels/places.py"
TILES = "maskops/ops/softmax/triton_kernels/tiles.py"
ROWS = "maskops/ops/softmax/triton_kernels/rows.py"

MUTATIONS = (
    Mutation("triton loss: sum not rescaled", FORWARD, "exponentials * alpha + tl.sum", "exponentials + tl.sum", LOSS),
    Mutation(
        "triton loss: label among the others",
        FORWARD,
        'tl.where(column == pivot, float("-inf"), value)\n    # A NaN',
        "value\n    # A NaN",
        LOSS,
    ),
    Mutation(
        "triton loss: entropy not rescaled",
        FORWARD,
        "alpha * (moment + (top - raised)",
        "alpha * ((top - raised)",
        LOSS,
    ),
    Mutation(
        "triton loss: the last of equals",
        FORWARD,
        "tl.where(highest > best, tl.min(column, 1), best_column)\n        best =",
        "tl.where(highest >= best, tl.min(column, 1), best_column)\n        best =",
        LOSS,
    ),
    Mutation(
        "triton loss: capped padding",
        VALUES,
        'x = tl.where(x == float("-inf"), x, tanh',
        'x = tl.where(x == float("inf"), x, tanh',
        LOSS,
    ),
    Mutation(
        "triton loss: log1p as a logarithm",
        VALUES,
        "tl.where(is_one, x, tl.log(u) * (x /",
        "tl.where(is_one, 0.0, tl.log(u) * (x /",
        LOSS,
    ),
    Mutation(
        "triton loss: labels are followed",
        FORWARD,
        "pivot = tl.minimum(tl.maximum(label, 0), vocabulary - 1).to(tl.int32)",
        "pivot = tl.minimum(label, vocabulary - 1).to(tl.int32)",
        LOSS,
    ),
    Mutation(
        "triton loss: the label's gradient cancels",
        BACKWARD,
        "grad = tl.where(column == pivot, at_pivot, grad)",
        "grad = tl.where(column == pivot, p * every - every, grad)",
        LOSS,
    ),
    Mutation(
        "triton loss: row 0 of the probabilities not cleared",
        BACKWARD,
        "share_row = (row + 1) % rows",
        "share_row = tl.minimum(row + 1, rows - 1)",
        LOSS,
    ),
    Mutation(
        "triton loss: skipped rows not cleared",
        BACKWARD,
        "        _clear(grad_logits, grad_place, vocabulary, GROUP, BLOCK_V)\n",
        "",
        LOSS,
    ),
    Mutation(
        "triton loss: gradients laid out as the logits",
        LAUNCHES,
        "GRAD_IN_STEP=in_step((grad_lead, rows.lead), (grad_logits.stride(0), logits.stride(0)), group)",
        "GRAD_IN_STEP=True",
        LOSS,
    ),
    Mutation(
        "triton loss: probabilities laid out as the logits",
        LAUNCHES,
        "IN_STEP=rows.soft and rows.probabilities_in_step(),\n        ENTROPY=entropy",
        "IN_STEP=True,\n        ENTROPY=entropy",
        LOSS,
    ),
    Mutation(
        "triton loss: the ragged end dropped",
        GROUPS,
        "tl.where(lane < GROUP, element < first, element < end)",
        "(lane < GROUP) & (element < first)",
        LOSS,
    ),
    Mutation(
        "triton loss: groups from the row on",
        GROUPS,
        "first = tl.minimum((place + begin + GROUP - 1) // GROUP * GROUP - place, end)",
        "first = tl.minimum(begin + place * 0, end)",
        LOSS,
    ),
    Mutation(
        "triton loss: banned columns in the smoothing",
        BACKWARD,
        'tl.where(value > float("-inf"), weight * smoothed, 0.0)',
        "weight * smoothed",
        LOSS,
    ),
    Mutation("triton chunks: first chunk not started anew", CHUNKS, "accumulate=number > 0", "accumulate=True", LINEAR),
    Mutation("triton chunks: later chunks replace", CHUNKS, "accumulate=number > 0", "accumulate=False", LINEAR),
    Mutation(
        "triton chunks: skipped rows enter the products",
        CHUNKS,
        "x = torch.where(chosen, x, 0.0).to(dtype)",
        "x = x.to(dtype)",
        LINEAR,
    ),
    Mutation(
        "triton chunks: gradients underflow",
        CHUNKS,
        "scale = _exponent(incoming, kept) if gradients and dtype == torch.float16 else None",
        "scale = None",
        LINEAR,
    ),
    Mutation(
        "triton softmax: sum not rescaled",
        ROWS,
        "total = total * alpha + tl.sum",
        "total = total + tl.sum",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "triton softmax: tiles not rescaled",
        TILES,
        "total = total * alpha + tl.sum",
        "total = total + tl.sum",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "triton softmax: spans cross",
        PLACES,
        "tl.minimum(tl.maximum(begin, written), length)",
        "tl.minimum(tl.maximum(begin, 0), length)",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "triton softmax: gaps not cleared",
        ROWS,
        "                _clear(weights, weights_place, before, from_key, lane, GROUP, BLOCK_V)\n",
        "",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "triton softmax: outer strides swapped",
        PLACES,
        "index_2 * stride_2 + index_3 * stride_3",
        "index_2 * stride_3 + index_3 * stride_2",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "triton softmax: gradient of the lse added",
        TILES,
        "offset -= tl.load(grad_lse",
        "offset += tl.load(grad_lse",
        SOFTMAX_TESTS,
    ),
)
