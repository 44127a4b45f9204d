// What the parts of build_plan share: how operands are read, and the two halves of a plan.
#pragma once

#include "../plan.h"

namespace maskops {

inline int64_t count_of(const PlanOperand& operand) {
  int64_t count = 1;
  for (int64_t d = 0; d < operand.dim; d++) count *= operand.sizes[d];
  return count;
}

// Calls use(pointer to the elements) with the pointer's own type.
template <class Use>
auto with_elements(const PlanOperand& operand, Use use) {
  switch (operand.type) {
    case IntegerType::int32: return use(static_cast<const int32_t*>(operand.data));
    case IntegerType::int64: return use(static_cast<const int64_t*>(operand.data));
    default: return use(static_cast<const uint8_t*>(operand.data));
  }
}

inline int64_t element(const PlanOperand& operand, int64_t index) {
  return with_elements(operand, [&](auto data) { return static_cast<int64_t>(data[index]); });
}

// The row of an operand (batch|1, ...) that batch element b reads.
inline int64_t row_of(const PlanOperand& operand, int64_t b) {
  return operand.dim == 0 || operand.sizes[0] == 1 ? 0 : b;
}

// Calls use(pointer to the bits) with the row of a mask operand that batch element b reads; a bit of 0 is a hole.
template <class Use>
void with_mask_row(const PlanOperand& mask, int64_t b, Use use) {
  with_elements(mask, [&, at = row_of(mask, b) * mask.sizes[1]](auto data) { use(data + at); });
}

// Writes start, end and positions (plan_spans.cpp).
void write_spans(const PlanRequest& request, const PlanResult& result);

// Writes key_valid, tiles, tile_count and key_tiles from the start and end of `result` (plan_tiles.cpp).
void write_tiles(const PlanRequest& request, const PlanResult& result);

}  // namespace maskops
