// The targets: each makes calls of an operator, mostly almost right, and checks what can be said of any result.
#pragma once

#include <string>
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
void fuzz_attention_direct(Input& input);
void fuzz_cross_entropy(Input& input);
void fuzz_cross_entropy_direct(Input& input);
void fuzz_decode(Input& input);
void fuzz_matmul(Input& input);
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

// The text of spans alone, as plain calls of attention take it; rarely with what they refuse.
std::string make_spans(Input& input, int64_t q_len, int64_t k_len);

// Offsets of documents in `total` rows, mostly of a right kind.
Value make_offsets(Input& input, int64_t total, int64_t documents);

// A label for every row, mostly; some are ignored, few lie outside of the vocabulary.
Value make_labels(Input& input, int64_t rows, int64_t vocabulary, int64_t ignore_index);

}  // namespace fuzz
