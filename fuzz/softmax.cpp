// Masked softmax: any dimension, bool masks of any strides, spans that hold anything, forward and backward.
#include <algorithm>

#include "targets.h"

namespace fuzz {

void fuzz_softmax(Input& input) {
  const bool wild = input.once_in(8), planned = input.once_in(2);
  const int64_t batch = input.of({1, 2, 3, 0}), q_len = input.length(130), k_len = input.length(200);
  std::vector<int64_t> sizes;
  if (planned) {
    sizes = {batch, q_len, k_len};
    if (input.once_in(2)) sizes.insert(sizes.begin() + 1, 1 + input.below(3));
    if (input.once_in(4) && batch == 1) sizes = {q_len, k_len};
  } else {
    for (int64_t dims = input.below(5); dims > 0; dims--) sizes.push_back(input.length(dims > 2 ? 5 : 70));
  }
  const auto dims = static_cast<int64_t>(sizes.size());
  const int64_t dim = input.once_in(32) ? input.hostile(dims)
                      : planned         ? dims - 1
                                        : input.below(std::max<int64_t>(dims, 1));
  const DType dtype = input.floating();
  const Value x = input.misshapen(input.floats(sizes, dtype, wild));
  const Value absent = Value::dense({0}, DType::float32), no_plan = Value::dense({0}, DType::int32);
  Value mask = absent;
  if (!planned && input.once_in(2)) {
    mask = input.misshapen(input.integers(sizes, DType::boolean));
    const int64_t period = 1 + input.below(9);
    for (int64_t i = 0; i < mask.elements && mask.dtype == DType::boolean; i++) set(mask, i, i % period == 0);
  }
  Plan plan{no_plan, no_plan, no_plan, no_plan, no_plan, no_plan, no_plan};
  if (planned) {
    plan = make_plan(input, batch, q_len, k_len, input.once_in(2));
    if (input.once_in(2)) corrupt(input, plan, q_len, k_len);
  }
  Call forward;
  forward.add(x).add(mask).add(plan.start).add(plan.end).add(plan.key_valid).add(dim).add(input.once_in(2));
  std::vector<Value> results;
  if (!run_twice(input, forward, "masked_softmax_forward", 2, results)) return;
  const Value weights = input.misshapen(results[0]);
  std::vector<int64_t> per_softmax = x.sizes;
  per_softmax.erase(per_softmax.begin() + dim);
  const Value grad_lse = input.once_in(2) ? absent : input.misshapen(Value::dense(per_softmax, DType::float32));
  if (planned && input.once_in(4)) corrupt(input, plan, q_len, k_len);
  Call backward;
  backward.add(input.misshapen(input.floats(x.sizes, x.dtype, wild))).add(grad_lse).add(weights);
  backward.add(plan.start).add(plan.end).add(plan.key_valid).add(input.once_in(32) ? input.hostile(dims) : dim);
  run_twice(input, backward, "masked_softmax_backward", 1, results);
}

}  // namespace fuzz
