// The targets: each makes calls of an operator, mostly almost right, and checks what can be said of any result.
#pragma once

#include <vector>

#include "input.h"

namespace fuzz {

struct Target {
  const char* name;
  void (*run)(Input& input);
};
extern const std::vector<Target> targets;

void fuzz_plan(Input& input);
void fuzz_attention(Input& input);
void fuzz_cross_entropy(Input& input);
void fuzz_decode(Input& input);
void fuzz_softmax(Input& input);

// The tensors of a RowSpans, in its order.
struct Plan {
  Value start, end, key_valid, tiles, tile_count, key_tiles, positions;
};

// A plan of build_plan for a mask that could be anyone's, or, where it refuses that or `arbitrary`, one whose work list
// is right and whose spans hold anything.
Plan make_plan(Input& input, int64_t batch, int64_t q_len, int64_t k_len, bool arbitrary);

// Some of its integers become hostile.
void corrupt(Input& input, Plan& plan, int64_t q_len, int64_t k_len);

}  // namespace fuzz
