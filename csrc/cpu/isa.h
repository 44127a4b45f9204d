// The table of kernels of one instruction set, and the choice among the tables at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskops {

struct AttentionBackward;
struct AttentionForward;
struct AttentionShape;
struct BackwardTask;
struct BiasTask;
struct CrossEntropyBackward;
struct CrossEntropyForward;
struct CrossEntropyRows;
struct DecodeForward;
struct DecodeTask;
struct LaneBlock;
struct Matmul;
struct MatmulBlock;
struct MatmulPanels;
struct SoftmaxBackward;
struct SoftmaxForward;

// In how many ways limit_read reads.
constexpr int64_t LIMIT_READ_WAYS = 4;

// One task of each kernel; schedules, threads and memory are the caller's (attention.cpp, ...).
struct KernelTable {
  const char* name;
  size_t (*attention_forward_scratch)(const AttentionShape&, int n_spans);  // bytes, aligned to 64
  // The task that is probably next, of which the first rows are fetched, or nullptr.
  void (*attention_forward)(const AttentionForward&, const LaneBlock&, const LaneBlock* next, char* scratch);
  void (*attention_forward_merge)(const AttentionForward&, const LaneBlock&, const float* partials, int n_parts,
                                  int lane_begin, int lane_end);
  size_t (*attention_backward_scratch)(const AttentionShape&, int n_spans, int64_t owned_keys);
  int64_t (*attention_backward_width)(const AttentionShape&);  // floats of a key's sums, dK and dV
  void (*attention_backward)(const AttentionBackward&, const BackwardTask&, const BackwardTask* next, char* scratch);
  size_t (*attention_bias_scratch)(const AttentionBackward&, const BiasTask& largest);
  void (*attention_bias)(const AttentionBackward&, const BiasTask&, char* scratch);
  size_t (*decode_scratch)(const AttentionShape&, int n_spans, int rows);
  int64_t (*decode_partial_width)(const AttentionShape&);  // floats of a row's partial result
  // The task after this one, of which the first keys are fetched, or nullptr.
  void (*decode_forward)(const DecodeForward&, const DecodeTask&, const DecodeTask* following, char* scratch);
  void (*decode_merge)(const DecodeForward&, const DecodeTask*, int n_tasks, char* scratch);
  void (*cross_entropy_forward)(const CrossEntropyForward&, int64_t row_begin, int64_t row_end);
  void (*cross_entropy_backward)(const CrossEntropyBackward&, int64_t row_begin, int64_t row_end);
  void (*cross_entropy_backward_streaming)(const CrossEntropyBackward&, int64_t row_begin, int64_t row_end);
  size_t (*cross_entropy_both_scratch)(const CrossEntropyRows&);  // bytes
  void (*cross_entropy_both)(const CrossEntropyForward&, const CrossEntropyBackward&, int64_t row_begin,
                             int64_t row_end, char* scratch);
  void (*cross_entropy_both_streaming)(const CrossEntropyForward&, const CrossEntropyBackward&, int64_t row_begin,
                                       int64_t row_end, char* scratch);
  // Rows and columns of a panel, and the parts of the depth that sums are made of.
  int64_t matmul_rows;
  int64_t matmul_columns;
  int64_t matmul_depth;
  void (*matmul_pack_left)(const Matmul&, const MatmulPanels&);
  void (*matmul_pack_right)(const Matmul&, const MatmulPanels&);
  void (*matmul_block)(const Matmul&, const MatmulBlock&);
  // A strip is a row, or softmax_width lanes (the last of an outer index may have fewer).
  int64_t softmax_width;
  size_t (*softmax_forward_scratch)(const SoftmaxForward&);  // bytes
  void (*softmax_forward)(const SoftmaxForward&, int64_t strip_begin, int64_t strip_end, char* scratch);
  size_t (*softmax_backward_scratch)(const SoftmaxBackward&);
  void (*softmax_backward)(const SoftmaxBackward&, int64_t strip_begin, int64_t strip_end, char* scratch);
  // What the processor reaches at most; see limits.inc.
  double (*limit_multiply_add)(int64_t rounds);
  double (*limit_multiply_pairs)(int64_t rounds);
  float (*limit_read)(const float* x, int64_t n, int64_t way);
  void (*limit_copy)(float* to, const float* from, int64_t n);
};

// Each is defined by one isa_*.cpp.
extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

// The table in use: the widest that this processor runs, unless select_instruction_set named another.
const KernelTable& kernels();
// False where this processor or build has no such table.
bool select_instruction_set(const char* name);
// Space-separated names, narrowest first, of the tables that this processor runs.
const char* instruction_sets();

}  // namespace maskops
