// Cross-entropy: labels, strides and numbers of every kind, forward and backward; the gradient in new memory, over the
// logits, and in memory that is handed in, there also in one pass with the losses.
#include <algorithm>

#include "targets.h"

namespace fuzz {

Value make_labels(Input& input, int64_t rows, int64_t vocabulary, int64_t ignore_index) {
  const Value labels = input.misshapen(input.integers({rows}, input.of({DType::int64, DType::int32})));
  for (int64_t i = 0; i < labels.elements; i++) {
    if (labels.dtype != DType::int64 && labels.dtype != DType::int32) break;
    const int64_t label = input.below(std::max<int64_t>(vocabulary, 1));
    set(labels, i, input.once_in(64) ? input.hostile(vocabulary) : input.once_in(8) ? ignore_index : label);
  }
  return labels;
}

void fuzz_cross_entropy(Input& input) {
  const bool wild = input.once_in(4);
  const int64_t rows = input.length(40), vocabulary = input.length(300);
  const DType dtype = input.floating();
  const Value logits = input.misshapen(input.floats({rows, vocabulary}, dtype, wild));
  const int64_t ignore_index = input.once_in(4) ? input.hostile(vocabulary) : -100;
  const Value target = make_labels(input, rows, vocabulary, ignore_index);
  const auto number = [&](double usual) { return input.once_in(4) ? (wild ? input.real() : 0.25) : usual; };
  const double smoothing = number(0.0), z_loss = number(0.0), softcap = number(0.0), scale = number(1.0);
  Value weights = Value::dense({0}, DType::float32), probabilities = Value::dense({0}, dtype);
  if (input.once_in(4)) weights = input.misshapen(input.floats({vocabulary}, DType::float32, wild));
  if (input.once_in(3)) probabilities = input.misshapen(input.floats({rows, vocabulary}, input.floating(), wild));
  const bool shift = input.once_in(4);
  const bool labelled = target.dtype == DType::int64 || target.dtype == DType::int32;
  if (shift && labelled && target.elements > 0 && input.once_in(2)) set(target, target.elements - 1, ignore_index);
  Call forward;
  forward.add(logits)
      .add(target)
      .add(weights)
      .add(probabilities)
      .add(shift)
      .add(ignore_index)
      .add(smoothing)
      .add(z_loss)
      .add(softcap)
      .add(scale);
  const bool entropy = input.once_in(2), argmax = input.once_in(2);
  forward.add(entropy).add(argmax);
  std::vector<Value> results;
  if (!run_twice(input, forward, "cross_entropy_forward", 6, results)) return;
  if (argmax) {
    for (int64_t i = 0; i < rows; i++) {
      const int64_t column = results[4].data<int64_t>()[i];
      if (column < -1 || column >= logits.sizes[1]) fail("cross_entropy_forward: argmax is no column");
    }
  }

  const auto gradient = [&] {
    if (input.once_in(3)) return Value::dense({0}, DType::float32);
    return input.misshapen(input.floats({input.once_in(64) ? rows + 1 : rows}, DType::float32, wild));
  };
  const Value grad_loss = gradient(), grad_lse = gradient(), grad_logprobs = gradient(), grad_entropy = gradient();
  // Memory for the gradient: the logits themselves, or rows of any stride.
  const Value buffer = input.once_in(2) ? logits : input.misshapen(input.floats(logits.sizes, logits.dtype));
  if (input.once_in(3)) {
    Call both;
    both.add(grad_loss).add(grad_lse).add(grad_logprobs).add(grad_entropy).add(logits).add(target);
    both.add(weights).add(probabilities).add(buffer).add(shift).add(ignore_index);
    both.add(smoothing).add(z_loss).add(softcap).add(scale).add(entropy).add(argmax);
    run_twice(input, both, "cross_entropy_both_into", 5, results, {buffer});
    return;
  }
  enum class Memory { fresh, logits, buffer };
  const Memory memory = input.of({Memory::fresh, Memory::logits, Memory::buffer});
  const Value saved[] = {input.misshapen(results[1]), input.misshapen(results[2]), input.misshapen(results[3]),
                         input.misshapen(results[5])};
  Call backward;
  backward.add(grad_loss).add(grad_lse).add(grad_logprobs).add(grad_entropy).add(logits).add(target);
  backward.add(weights).add(probabilities);
  for (const Value& value : saved) backward.add(value);
  if (memory == Memory::buffer) backward.add(buffer);
  if (saved[3].dtype == DType::float64 && input.once_in(16)) {  // the column that it names is read
    double* statistics = saved[3].data<double>();
    for (int64_t i = 0; i < saved[3].elements; i++) statistics[i] = input.real();
  }
  backward.add(shift);
  if (memory == Memory::fresh) backward.add(input.once_in(2));
  backward.add(input.once_in(16) ? input.hostile(vocabulary) : ignore_index);
  backward.add(input.once_in(16) ? 0.5 : smoothing).add(z_loss).add(softcap).add(scale);
  switch (memory) {
    case Memory::fresh: run_twice(input, backward, "cross_entropy_backward", 2, results); break;
    case Memory::logits: run_twice(input, backward, "cross_entropy_backward_", 0, results, {logits}); break;
    case Memory::buffer: run_twice(input, backward, "cross_entropy_backward_into", 0, results, {buffer}); break;
  }
}

}  // namespace fuzz
