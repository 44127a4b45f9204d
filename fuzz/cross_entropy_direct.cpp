// Cross-entropy of plain rows, which sums up in the operator: with and without what the backward pass needs, and beside
// the operator that leaves the sum to others.
#include "targets.h"

namespace fuzz {

void fuzz_cross_entropy_direct(Input& input) {
  const bool wild = input.once_in(4), mean = input.once_in(2);
  const int64_t rows = input.length(40), vocabulary = input.length(300);
  const Value logits = input.misshapen(input.floats({rows, vocabulary}, input.floating(), wild));
  const int64_t ignore_index = input.once_in(4) ? input.hostile(vocabulary) : -100;
  const Value target = make_labels(input, rows, vocabulary, ignore_index);
  Call forward;
  forward.add(logits).add(target).add(ignore_index).add(mean);
  std::vector<Value> results, again;
  if (!run_twice(input, forward, "cross_entropy_direct", 3, results)) return;
  if (forward.run("cross_entropy_loss", 1, again)) {
    require_same(results[0], again[0], "the loss with and without what the backward pass needs");
  } else if (!forward.out_of_memory()) {
    fail("cross_entropy_loss refuses what cross_entropy_direct took: " + forward.error());
  }
  const Value absent = Value::dense({0}, DType::float32);
  Call full;
  full.add(logits).add(target).add(absent).add(absent).add(false).add(ignore_index);
  full.add(0.0).add(0.0).add(0.0).add(1.0).add(false).add(false);
  if (full.run("cross_entropy_forward", 6, again)) {
    require_same(results[1], again[1], "lse of cross_entropy_direct and cross_entropy_forward");
    require_same(results[2], again[2], "logprobs of cross_entropy_direct and cross_entropy_forward");
  } else if (!full.out_of_memory()) {
    fail("cross_entropy_forward refuses what cross_entropy_direct took: " + full.error());
  }

  Call backward;
  backward.add(input.misshapen(input.floats({}, DType::float32, wild))).add(logits);
  backward.add(input.once_in(16) ? make_labels(input, rows, vocabulary, ignore_index) : target);
  backward.add(input.misshapen(results[1])).add(input.misshapen(results[2]));
  backward.add(input.once_in(16) ? input.hostile(vocabulary) : ignore_index).add(mean);
  run_twice(input, backward, "cross_entropy_direct_backward", 1, results);
}

}  // namespace fuzz
