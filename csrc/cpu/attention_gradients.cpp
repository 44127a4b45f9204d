// Gradients of what several pairs share: a broadcast bias, ALiBi's slopes, sinks. Each is added up by one task in a
// fixed order, so that the bits of the result do not depend on the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

constexpr int64_t CLEARED_BYTES = 1 << 20;  // that a task sets to 0
// Keys of a piece of a bias: a block's rows of it stay in a core's own cache.
constexpr int32_t PIECE_KEYS = 1024;
constexpr int32_t FEWEST_PIECE_KEYS = 64;
// Pieces become shorter until about so many share the work.
constexpr int64_t ENOUGH_PIECES = 32;

// [0, full) in steps, or as a whole where the bias has one element for all of it.
struct Steps {
  int64_t full, step;
  bool whole;
  Steps(int64_t bias_size, int64_t full_size, int64_t step_size)
      : full(full_size), step(bias_size == 1 ? full_size : step_size), whole(bias_size == 1) {}
  int64_t count() const { return whole ? 1 : (full + step - 1) / step; }
  int32_t begin(int64_t index) const { return static_cast<int32_t>(index * step); }
  int32_t end(int64_t index) const { return static_cast<int32_t>(std::min(full, (index + 1) * step)); }
};

}  // namespace

void clear_bias_gradient(const AttentionBackward& p, const Threads& threads) {
  struct Context {
    char* data;
    int64_t bytes;
  } context{static_cast<char*>(p.grad_bias), bytes_of(p.features.bias_element)};
  for (const int64_t size : p.bias_sizes) context.bytes *= size;
  const int64_t n_tasks = (context.bytes + CLEARED_BYTES - 1) / CLEARED_BYTES;
  threads.run(
      n_tasks, static_cast<int>(std::min<int64_t>(threads.count, std::max<int64_t>(n_tasks, 1))),
      [](int64_t task, int, void* pointer) {
        const auto& context = *static_cast<Context*>(pointer);
        const int64_t begin = task * CLEARED_BYTES;
        std::memset(context.data + begin, 0, std::min(CLEARED_BYTES, context.bytes - begin));
      },
      &context);
}

void attention_bias_gradient(const AttentionBackward& p, double flops, const Threads& threads) {
  const AttentionShape& shape = p.shape;
  const Steps batches(p.bias_sizes[0], shape.batch, 1);
  const Steps heads(p.bias_sizes[1], shape.kv_heads, 1);
  const Steps rows(p.bias_sizes[2], shape.q_len, rows_of_block(shape));
  const int64_t others = batches.count() * heads.count() * rows.count();
  int32_t piece = PIECE_KEYS;
  while (piece > FEWEST_PIECE_KEYS && others * Steps(p.bias_sizes[3], shape.k_len, piece).count() < ENOUGH_PIECES) {
    piece /= 2;
  }
  const Steps keys(p.bias_sizes[3], shape.k_len, piece);
  std::vector<BiasTask> tasks;
  for (int64_t batch = 0; batch < batches.count(); batch++) {
    for (int64_t head = 0; head < heads.count(); head++) {
      for (int64_t row = 0; row < rows.count(); row++) {
        for (int64_t key = 0; key < keys.count(); key++) {
          tasks.push_back({batches.begin(batch), batches.end(batch), heads.begin(head), heads.end(head),
                           rows.begin(row), rows.end(row), keys.begin(key), keys.end(key)});
        }
      }
    }
  }
  if (tasks.empty()) return;
  const KernelTable& table = kernels();
  struct Context {
    const AttentionBackward& p;
    const KernelTable& table;
    const std::vector<BiasTask>& tasks;
    std::vector<Memory> scratch;
  } context{p, table, tasks, {}};
  const int workers = useful_workers(threads, flops, static_cast<int64_t>(tasks.size()));
  context.scratch = scratch_for(workers, table.attention_bias_scratch(p, tasks[0]));
  threads.run(
      static_cast<int64_t>(tasks.size()), workers,
      [](int64_t task, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        context.table.attention_bias(context.p, context.tasks[task], context.scratch[worker].get());
      },
      &context);
}

void sum_row_gradients(const AttentionBackward& p) {
  const AttentionShape& shape = p.shape;
  const PerHead& slopes = p.features.alibi_slopes;
  std::vector<double> of_slopes(p.grad_slopes != nullptr ? slopes.outer * shape.heads : 0);
  std::vector<double> of_sinks(p.grad_sinks != nullptr ? shape.heads : 0);
  for (int64_t batch = 0; batch < shape.batch; batch++) {
    for (int64_t head = 0; head < shape.heads; head++) {
      const int64_t first = (batch * shape.heads + head) * shape.q_len;
      for (int64_t row = 0; p.grad_slopes != nullptr && row < shape.q_len; row++) {
        const int64_t outer = slopes_of_row(p.features, batch, row);
        of_slopes[outer * shape.heads + head] += p.row_grad_slopes[first + row];
      }
      for (int64_t row = 0; p.grad_sinks != nullptr && row < shape.q_len; row++) {
        of_sinks[head] += p.row_grad_sinks[first + row];
      }
    }
  }
  std::copy(of_slopes.begin(), of_slopes.end(), p.grad_slopes);
  std::copy(of_sinks.begin(), of_sinks.end(), p.grad_sinks);
}

}  // namespace maskops
