// Plain parameters of build_plan: no torch. A mask arrives as a program (see maskops/ops/plan/registration.py) with its
// operands and leaves as the tensors of a RowSpans (see maskops/spans.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maskops {

constexpr int64_t tile_rows = 128;
constexpr int64_t key_tile = 64;
constexpr int plan_operands = 6;
constexpr int64_t plan_longest = int64_t{1} << 28;  // sums of a few lengths fit in int32

enum class IntegerType { boolean, uint8, int32, int64 };

// A contiguous tensor of integers with at most two dimensions.
struct PlanOperand {
  const void* data;
  IntegerType type;
  int64_t dim;
  int64_t sizes[2];
};

// What errors call the arguments of the function that made a layout, the twin of CuSeqlensNames in maskops/layouts.py.
struct CuSeqlensNames {
  const char* owner;
  const char* queries;
  const char* keys;
  const char* q_total[2];  // around the number
  const char* k_total[2];
};

struct PlanLayout {
  enum class Kind { padding_right, padding_left, padding_mask, key_lengths, key_length, key_mask, cu_seqlens, ids };
  Kind kind;
  int operand = -1;
  int key_operand = -1;  // of cu_seqlens: the same as operand where the keys have no cu_seqlens of their own
  bool keys_given = false;
  const CuSeqlensNames* names = nullptr;  // of cu_seqlens
  int64_t length = 0;                     // of key_length
};

struct PlanStep {
  enum class Op { first, last, diag, prefix, prefix_of, chunk_start, chunk_end, maximum, minimum };
  Op op;
  int64_t value;
};

struct PlanProgram {
  std::vector<PlanLayout> layouts;
  std::vector<PlanStep> steps;    // of all spans, one after the other
  std::vector<size_t> span_ends;  // for each span the end of its steps, which leave two values: start, end
  size_t deepest = 0;             // values on the stack at most
  int64_t n_spans() const { return static_cast<int64_t>(span_ends.size()); }
};

struct PlanRequest {
  PlanProgram program;
  PlanOperand operands[plan_operands];
  int64_t batch, q_len, k_len;
};

struct PlanResult {
  int32_t* start;       // (n_spans, batch, q_len)
  int32_t* end;         // (n_spans, batch, q_len)
  uint8_t* key_valid;   // (batch, k_len)
  int32_t* tiles;       // (batch * tiles_per_batch_element, 4 + 4 * n_spans)
  int32_t* tile_count;  // (1)
  int32_t* key_tiles;   // (n_spans, batch, key tiles, 4), nullptr: not wanted
  int32_t* order;       // (capacity of tiles), nullptr: not wanted
  int32_t* positions;   // (3, batch, q_len), nullptr: not wanted
};

// The twin of tiles_per_batch_element in maskops/spans.py.
inline int64_t tiles_per_batch_element(int64_t q_len, int64_t k_len) {
  const int64_t bound =
      3 * ((q_len + tile_rows - 1) / tile_rows) + (2 * k_len + 2 * tile_rows - 1) / (2 * tile_rows) + 2;
  return q_len < bound ? q_len : bound;
}

// Checks lengths and operands against the program: std::invalid_argument with the words of maskops/layouts.py and
// lowering.py.
void check_plan(const PlanRequest& request);

// Plans a request that check_plan has accepted.
void build_plan(const PlanRequest& request, const PlanResult& result);

}  // namespace maskops
