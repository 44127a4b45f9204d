"""Plans and packing on devices: Triton, interpreted, and CUDA, compiled as host code."""

from tests.mutations import Mutation

TRITON = ("tests/test_triton_plan.py",)
CUDA = ("tests/test_cuda_plan.py",)
CUDA_MASKS = ("tests/test_cuda_masks.py",)
PACKING = ("tests/test_cuda_packing.py",)

SEQUENCES = "maskops/ops/plan/triton_kernels/sequences.py"
ROWS = "maskops/ops/plan/triton_kernels/rows.py"
LISTS = "maskops/ops/plan/triton_kernels/lists.py"
LAUNCHES = "maskops/ops/plan/triton_kernels/__init__.py"
BLOCK = "csrc/cuda/plan_block.cuh"
SPANS_CU = "csrc/cuda/plan_sequences.cuh"
ROWS_CU = "csrc/cuda/plan_rows.cu"
LISTS_CU = "csrc/cuda/plan_lists.cu"
MASK_CU = "csrc/cuda/plan_mask.cu"
PACK_CU = "csrc/cuda/pack.cu"

MUTATIONS = (
    Mutation("triton plan: top-left aligned", SEQUENCES, "inside, k_end - q_end + row, 0)", "inside, row, 0)", TRITON),
    Mutation("triton plan: chunks rounded to 0", SEQUENCES, "chunk - 1, chunk)", "chunk, chunk)", TRITON),
    Mutation(
        "triton plan: documents numbered from 1",
        SEQUENCES,
        "inside).to(tl.int32)) - 1",
        "inside).to(tl.int32))",
        TRITON,
    ),
    Mutation(
        "triton plan: no look above the window",
        SEQUENCES,
        "while (began < 0) & (at > 0)",
        "while (began < 0) & (at > FAR)",
        TRITON,
    ),
    Mutation(
        "triton plan: numbers of one class",
        LAUNCHES,
        "sizes = tuple(encoded(parsed",
        "sizes = tuple(-encoded(parsed",
        TRITON,
    ),
    Mutation("triton plan: runs with a gap", ROWS, "& (next_start <= end)", "", TRITON),
    Mutation(
        "triton plan: items of too many keys",
        ROWS,
        "(new_high - new_low <= 2 * ROWS)",
        "(new_high - new_low <= 3 * ROWS)",
        TRITON,
    ),
    Mutation(
        "triton plan: segments never end",
        ROWS,
        "(seeing & (last_before > 0) & ~overlaps)",
        "(seeing & (row < 0))",
        TRITON,
    ),
    Mutation(
        "triton plan: a block forgets the one above",
        ROWS,
        "while (above_last == 0) & (above > 0)",
        "while (above_last == 0) & (above > FAR)",
        TRITON,
    ),
    Mutation("triton plan: no plain grid", LISTS, "too_many = items > per_batch", "too_many = items > FAR - 1", TRITON),
    Mutation("triton plan: holes in full tiles", LISTS, "& (complete != 0)", "", TRITON),
    Mutation(
        "triton plan: gaps among the rows of a key tile", LISTS, "& (covering == full_high - full_low)", "", TRITON
    ),
    Mutation("triton plan: rows without a span are full", LISTS, "partial = (mixed != 0) | ", "partial = ", TRITON),
    Mutation(
        "triton plan: cheapest first",
        LISTS,
        "digit = DIGITS - 1 - ((cost >> shift) & (DIGITS - 1))\n            held",
        "digit = (cost >> shift) & (DIGITS - 1)\n            held",
        TRITON,
    ),
    Mutation(
        "triton plan: a third operator",
        LAUNCHES,
        "key_valid = empty(batch, k_len, dtype=torch.uint8)",
        "key_valid = empty(batch, k_len, dtype=torch.uint8).zero_()",
        TRITON,
    ),
    Mutation(
        "cuda plan: spans not sorted",
        SPANS_CU,
        "for (; slot > 0; slot--) {",
        "for (; slot > PLAN_SPANS; slot--) {",
        CUDA,
    ),
    Mutation("cuda plan: the first of a window's documents", SPANS_CU, "if (start < 0) start = began;", "", CUDA),
    Mutation(
        "cuda plan: items of 129 rows",
        ROWS_CU,
        "stop < thread + ROWS && stop < threads",
        "stop <= thread + ROWS && stop < threads",
        CUDA,
    ),
    Mutation(
        "cuda plan: no plain grid",
        LISTS_CU,
        "const bool is_grid = items > p.per_batch;",
        "const bool is_grid = false;",
        CUDA,
    ),
    Mutation(
        "cuda plan: a missing barrier of the scan",
        BLOCK,
        "if (lane == 31) sums[warp] = value;\n  __syncthreads();",
        "if (lane == 31) sums[warp] = value;",
        CUDA,
    ),
    Mutation(
        "cuda plan: jumps before they are there",
        LISTS_CU,
        "const int further = goes_on ? jumps[far - first_row] : far;\n      __syncthreads();",
        "const int further = goes_on ? jumps[far - first_row] : far;",
        CUDA,
    ),
    Mutation(
        "cuda plan: equal costs in any order",
        LISTS_CU,
        "int to = base[digit] + __popc(below);",
        "int to = base[digit] + __popc(alike & ~below) - 1;",
        CUDA,
    ),
    Mutation(
        "cuda plan: holes in full ranges", LISTS_CU, "if (!partial && p.has_holes)", "if (!partial && false)", CUDA
    ),
    Mutation(
        "cuda plan: the count of the last batch element",
        LISTS_CU,
        "total += sum;\n    block_scan(element < b",
        "total = sum + 1;\n    block_scan(element < b",
        CUDA,
    ),
    Mutation(
        "cuda plan: scratch of rows by the keys",
        "csrc/cuda/plan.cu",
        "max(1, (p.q_len + own - 1) / own)",
        "max(p.k_len / own, (p.q_len + own - 1) / own)",
        CUDA,
    ),
    Mutation("cuda plan: holes of whole words", LISTS_CU, "& ((1u << key % 32) - 1));", "& ~0u);", CUDA),
    Mutation(
        "cuda plan: holes of one block",
        LISTS_CU,
        "for (int other = 0; other < block && other < p.key_blocks; other++) count +=",
        "for (int other = 0; other < 0; other++) count +=",
        CUDA,
    ),
    Mutation("cuda plan: masks, the last head alone", MASK_CU, "any[i] |= bits;", "any[i] = bits;", CUDA_MASKS),
    Mutation(
        "cuda plan: masks, halves of a word swapped", MASK_CU, "bits | other << 16", "bits << 16 | other", CUDA_MASKS
    ),
    Mutation(
        "cuda plan: masks, bytes other than 1",
        MASK_CU,
        "((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u) >> 7",
        "bytes & 0x01010101u",
        CUDA_MASKS,
    ),
    Mutation("cuda plan: masks, the ragged end", MASK_CU, "if (key + 16 <= p.k_len)", "if (true)", CUDA_MASKS),
    Mutation(
        "cuda plan: masks, strides of keys", MASK_CU, "p.key_stride == 1 && reinterpret", "reinterpret", CUDA_MASKS
    ),
    Mutation(
        "cuda plan: masks, words before they are there",
        MASK_CU,
        "read_rows(p, at, words);\n    __syncthreads();",
        "read_rows(p, at, words);",
        CUDA_MASKS,
    ),
    Mutation(
        "cuda plan: masks, hulls of one block of keys",
        ROWS_CU,
        "last = max(last, part[1]);",
        "last = part[1];",
        CUDA_MASKS,
    ),
    Mutation("cuda plan: masks, keys of one block of rows", LISTS_CU, "either |= seen[", "either = seen[", CUDA_MASKS),
    Mutation(
        "cuda plan: masks, full ranges",
        LISTS_CU,
        "full_high <= full_low || p.is_dense;",
        "full_high <= full_low;",
        CUDA_MASKS,
    ),
    Mutation(
        "cuda plan: masks, full key tiles",
        LISTS_CU,
        "complete[thread] != 0 && !p.is_dense;",
        "complete[thread] != 0;",
        CUDA_MASKS,
    ),
    Mutation(
        "cuda launch: shared memory that nobody asked for",
        "csrc/cuda/shared_memory.h",
        "SHARED_BYTES_WITHOUT_ASKING = 32 << 10;",
        "SHARED_BYTES_WITHOUT_ASKING = 64 << 10;",
        ("tests/test_cuda_shared_memory.py",),
    ),
    Mutation(
        "cuda devices: an error is left for the next launch",
        "csrc/cuda/runtime.h",
        "  static_cast<void>(cudaGetLastError());  // an error that is told",
        "  // an error that is told",
        ("tests/test_device_runtime.py",),
    ),
    Mutation(
        "cuda launch: what one device allows counts for all",
        "csrc/cuda/shared_memory.h",
        "allowed.count({kernel, device}) != 0",
        "allowed.count({kernel, 1}) != 0",
        ("tests/test_device_runtime.py",),
    ),
    Mutation(
        "cuda devices: one answer for all of them",
        "csrc/cuda/device.cu",
        "if (known[index] == nullptr) {",
        "if (index = 1; known[index] == nullptr) {",
        ("tests/test_device_runtime.py",),
    ),
    Mutation(
        "cuda devices: the current one chosen anew",
        "csrc/cuda/device.cu",
        "if (before == index) return;",
        "",
        ("tests/test_device_runtime.py",),
    ),
    Mutation(
        "cuda memory: another word for it",
        "csrc/torch_abi.h",
        "maskops: out of memory: no ",
        "maskops: no memory: no ",
        ("tests/test_out_of_memory.py",),
    ),
    Mutation(
        "cuda packing: tokens of a warp in one place",
        PACK_CU,
        "before + __popc(ballot & ((1u << lane) - 1));",
        "before;",
        PACKING,
    ),
    Mutation(
        "cuda packing: votes before they are there",
        PACK_CU,
        "votes[warp] = __popc(ballot);\n      __syncthreads();",
        "votes[warp] = __popc(ballot);",
        PACKING,
    ),
    Mutation("cuda packing: padding counts", PACK_CU, "real += is_real;", "real += 1;", PACKING),
    Mutation(
        "cuda packing: rows that are not there",
        PACK_CU,
        "if (source >= 0 && source < p.source_rows)",
        "if (source < p.source_rows)",
        PACKING,
    ),
    Mutation(
        "cuda packing: the first of rows that meet",
        PACK_CU,
        "atomicMax(reinterpret_cast<long long*>(inverse + row)",
        "atomicMin(reinterpret_cast<long long*>(inverse + row)",
        PACKING,
    ),
)
