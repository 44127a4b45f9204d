// build_plan on CUDA: a mask as a program, from the operands on the device to the tensors of a RowSpans there.
#pragma once

#include "../plan.h"

namespace maskops {

constexpr int PLAN_LAYOUTS = 12;
constexpr int PLAN_STEPS = 160;
constexpr int PLAN_SPANS = 16;
constexpr int PLAN_DEPTH = PLAN_STEPS / 2;  // values on the stack of a bound

struct DevicePlanLayout {
  PlanLayout::Kind kind;
  int32_t operand, keys;
  int32_t length;  // of key_length
  bool counts;     // whether it numbers the sequences
};

struct DevicePlanStep {
  PlanStep::Op op;
  int32_t value;
};

struct DevicePlanOperand {
  const void* data;
  int32_t bytes;  // of an element: 1, unsigned, 4 or 8
  int32_t rows;   // size of the first dimension, 1 of ids without one for the batch
};

// A bool mask of any strides, in elements, and what one read of it leaves.
struct DevicePlanMask {
  const uint8_t* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;
  int32_t batch, heads, q_len, k_len;
  int32_t* bits;   // (batch, heads, q_len, words), nullptr: not wanted
  int32_t* hulls;  // (batch, key_groups, q_len, 2): first key and one past the last key that any head allows; scratch
  int32_t* seen;   // (batch, row_groups, words): keys that any row and head allows; scratch
  int32_t words, row_groups, key_groups;  // 32 keys a word; blocks of the read (plan_blocks)
};

// A program as a kernel takes it; of a dense mask the program is empty.
struct DevicePlan {
  DevicePlanLayout layouts[PLAN_LAYOUTS];
  DevicePlanStep steps[PLAN_STEPS];
  int32_t span_ends[PLAN_SPANS];
  DevicePlanOperand operands[plan_operands];
  int32_t n_layouts, n_spans;
  bool has_holes, reads_ordinals, is_dense;
  DevicePlanMask mask;
  int32_t batch, q_len, k_len;
  int32_t per_batch, capacity;  // room for items
  PlanResult result;
  int32_t window, row_blocks, key_blocks;  // threads of a block, and blocks that a batch element takes (plan_blocks)
  int32_t* scratch;                        // plan_scratch(p) elements
};

// Chooses the blocks, of a dense mask too.
void plan_blocks(DevicePlan& p);

// Elements of scratch that a plan takes, without those of a dense mask.
int64_t plan_scratch(const DevicePlan& p);

// Elements that the parts of a dense mask's hulls take, and those of its seen keys.
int64_t plan_hulls(const DevicePlanMask& mask);
int64_t plan_seen(const DevicePlanMask& mask);

// Writes all of the result in two launches, of a dense mask in three.
void build_plan_cuda(const DevicePlan& p, void* stream);

}  // namespace maskops
