"""Cross-entropy and masked softmax in CUDA, compiled as host code."""

from tests.mutations import Mutation

LOSS = ("tests/test_cuda_loss.py",)
SOFTMAX_TESTS = ("tests/test_cuda_softmax.py",)

FORWARD = "csrc/cuda/cross_entropy.cu"
BACKWARD = "csrc/cuda/cross_entropy_backward.cu"
ROWS = "csrc/cuda/cross_entropy_rows.h"
VECTORS = "csrc/cuda/vectors.h"
SOFTMAX = "csrc/cuda/softmax.cu"

MUTATIONS = (
    Mutation("cuda loss: sum not rescaled", FORWARD, "  s.total *= alpha;\n", "", LOSS),
    Mutation("cuda loss: entropy not rescaled", FORWARD, "(s.moment + delta * s.total)", "s.moment", LOSS),
    Mutation("cuda loss: label among the others", FORWARD, "if (scan.pivot == at + j) x[j] = -INFINITY;", ";", LOSS),
    Mutation("cuda loss: a missing barrier of warps", FORWARD, "value;\n    __syncthreads();", "value;", LOSS),
    Mutation(
        "cuda loss: the last of equals", FORWARD, "other.column < best.column", "other.column > best.column", LOSS
    ),
    Mutation(
        "cuda loss: filled with 0", FORWARD, "row[first + j] : from_float<T>(-INFINITY)", "row[first + j] : T{}", LOSS
    ),
    Mutation(
        "cuda loss: labels outside are followed", ROWS, "label >= 0 && label < rows.vocabulary", "label >= 0", LOSS
    ),
    Mutation("cuda loss: the last row under shift", ROWS, "row >= rows.n_probability_rows", "false", LOSS),
    Mutation(
        "cuda loss: capped padding",
        ROWS,
        "if (transform.softcap == 0.0f || logit == -INFINITY) return",
        "if (transform.softcap == 0.0f) return",
        LOSS,
    ),
    Mutation(
        "cuda loss: slope of the softcap", ROWS, "return e * (half * half);\n}\n// z", "return e * half;\n}\n// z", LOSS
    ),
    Mutation("cuda loss: the label's gradient cancels", ROWS, "if (c.pivot == at + j) x[j] = c.at_pivot;", ";", LOSS),
    Mutation("cuda loss: banned columns in the smoothing", ROWS, "if (value > -INFINITY) g +=", "g +=", LOSS),
    Mutation(
        "cuda loss: gradients in place by several blocks", BACKWARD, "== p.rows.logits ? 1", "== nullptr ? 1", LOSS
    ),
    Mutation(
        "cuda loss: gradients of skipped rows are read",
        BACKWARD,
        "if (!target.skipped) grad = gradients_of",
        "grad = gradients_of",
        LOSS,
    ),
    Mutation("cuda loss: row 0 of the probabilities not cleared", BACKWARD, ": first;", ": nullptr;", LOSS),
    Mutation(
        "cuda loss: coefficients before they are there",
        BACKWARD,
        "statistics);\n    }\n    __syncthreads();",
        "statistics);\n    }",
        LOSS,
    ),
    Mutation("cuda loss: a shifted vector", VECTORS, "bytes & 8 ? words[j + 2]", "bytes & 8 ? words[j + 1]", LOSS),
    Mutation("cuda loss: a vector shifted by an element", VECTORS, "words[j] >> 16 |", "words[j] >> 8 |", LOSS),
    Mutation(
        "cuda softmax: sum not rescaled",
        SOFTMAX,
        "    sum.total *= expf(fmaxf(sum.top - top, DEEPEST));\n",
        "",
        SOFTMAX_TESTS,
    ),
    Mutation("cuda softmax: spans overlap", SOFTMAX, "      done = to;\n", "", SOFTMAX_TESTS),
    Mutation("cuda softmax: holes are seen", SOFTMAX, "bytes[(at + j) * step] == 0)", "false)", SOFTMAX_TESTS),
    Mutation(
        "cuda softmax: stride of the mask",
        SOFTMAX,
        "    stride = bytes->along;\n".replace("    ", "      ", 1),
        "      stride = 1;\n",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: lse of infinity",
        SOFTMAX,
        "return sum.holds_nan ? NAN : INFINITY;",
        "return NAN;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: lse of nothing",
        SOFTMAX,
        "sum.total == 0.0f ? -INFINITY :",
        "sum.total == 0.0f ? 0.0f :",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: gradients at no weight",
        SOFTMAX,
        "return w == 0.0f ? 0.0f : w * g;",
        "return w * g;",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: a missing barrier",
        SOFTMAX,
        "  __syncthreads();\n  value = of_warps[0];",
        "  value = of_warps[0];",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: sign of the lse's gradient",
        SOFTMAX,
        "dot -= p.grad_lse[outer];",
        "dot += p.grad_lse[outer];",
        SOFTMAX_TESTS,
    ),
    Mutation(
        "cuda softmax: rows of a batch element",
        SOFTMAX,
        "batch * spans.batch_stride + outer % spans.q_len",
        "outer % spans.q_len",
        SOFTMAX_TESTS,
    ),
)
