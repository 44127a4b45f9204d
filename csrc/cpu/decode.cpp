// The schedule of attention over a cache: tasks are runs of keys, cut at fixed keys of a sequence, so that neither the
// number of threads nor the other sequences of the batch change a bit of the result.
#include "decode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

// A worker's share takes a few microseconds at least, else waking a thread costs more than it brings.
constexpr double BYTES_PER_WORKER = 128 << 10;
constexpr double FLOPS_PER_WORKER = 2e6;
// With more rows than these, queries as vectors are faster (measured with AVX2 and AVX-512: they are equal at about
// 12).
constexpr int64_t MOST_ROWS = 8;
// Below it, span attention is over before a difference could be felt.
constexpr int64_t FEWEST_KEYS = 128;

int workers_for(const Threads& threads, double shares, size_t n_tasks) {
  return static_cast<int>(std::min({static_cast<double>(threads.count), 1 + shares, std::max<double>(1, n_tasks)}));
}

// Tasks are handed out in runs, whose keys mostly lie side by side in memory: a long stream is read faster than many
// short ones. Runs become shorter, so that the last ones level the threads. Gives where each begins, and the end.
std::vector<int64_t> runs_of(const std::vector<DecodeTask>& tasks, int workers) {
  int64_t keys = 0, taken = 0;
  for (const DecodeTask& task : tasks) keys += task.key_end - task.key_begin;
  std::vector<int64_t> begins;
  int64_t wanted = 0, run = 0;
  for (size_t i = 0; i < tasks.size(); i++) {
    if (i == 0 || run >= wanted) {
      begins.push_back(static_cast<int64_t>(i));
      wanted = (keys - taken) / (2 * workers);
      run = 0;
    }
    const int64_t own = tasks[i].key_end - tasks[i].key_begin;
    run += own;
    taken += own;
  }
  begins.push_back(static_cast<int64_t>(tasks.size()));
  return begins;
}

// The hull of the keys that some query of [begin, end) of a sequence sees.
void hull_of(const DecodeForward& p, int64_t batch, int64_t begin, int64_t end, int32_t& low, int32_t& high) {
  const auto k_len = static_cast<int32_t>(p.shape.k_len);
  const int32_t first = p.begin_of(batch), length = p.end_of(batch);
  low = first;
  high = length;
  if (p.spans.start != nullptr) {
    low = k_len;
    high = 0;
    for (int32_t s = 0; s < p.spans.n_spans; s++) {
      const int64_t offset = s * p.spans.span_stride + batch * p.spans.batch_stride;
      for (int64_t row = begin; row < end; row++) {
        const int32_t lo = std::max(p.spans.start[offset + row], first);
        const int32_t hi = std::min(p.spans.end[offset + row], length);
        if (lo >= hi) continue;
        low = std::min(low, lo);
        high = std::max(high, hi);
      }
    }
  }
  if (low >= high) low = high = 0;
}

}  // namespace

bool suits_decode(const AttentionShape& shape) { return shape.q_len * (shape.heads / shape.kv_heads) <= MOST_ROWS; }

void decode_forward(const DecodeForward& p, const Threads& threads) {
  const AttentionShape& shape = p.shape;
  const KernelTable& table = kernels();
  const int64_t group = shape.heads / shape.kv_heads, rows = shape.q_len * group;
  const auto width = static_cast<int64_t>(table.decode_partial_width(shape));

  struct Group {  // tasks that share their rows
    int64_t first_task, n_tasks;
  };
  std::vector<DecodeTask> tasks;
  std::vector<Group> merges;
  int64_t partial_floats = 0;
  double pairs = 0, keys = 0;
  for (int64_t batch = 0; batch < shape.batch; batch++) {
    for (int64_t row = 0; row < rows; row += DECODE_ROWS) {
      const int64_t row_end = std::min(rows, row + DECODE_ROWS);
      int32_t low, high;
      hull_of(p, batch, row / group, (row_end - 1) / group + 1, low, high);
      pairs += static_cast<double>(high - low) * static_cast<double>((row_end - row) * shape.kv_heads);
      keys += static_cast<double>(high - low) * static_cast<double>(shape.kv_heads);
      for (int64_t head = 0; head < shape.kv_heads; head++) {
        const auto first = static_cast<int64_t>(tasks.size());
        for (int32_t key = low;;) {
          const auto next = static_cast<int32_t>(
              std::min<int64_t>(high, (static_cast<int64_t>(key) / DECODE_TASK_KEYS + 1) * DECODE_TASK_KEYS));
          tasks.push_back({static_cast<int32_t>(batch), static_cast<int32_t>(head), static_cast<int32_t>(row),
                           static_cast<int32_t>(row_end), key, next, nullptr});
          key = next;
          if (key >= high) break;
        }
        const auto n_tasks = static_cast<int64_t>(tasks.size()) - first;
        if (n_tasks > 1) {
          merges.push_back({first, n_tasks});
          partial_floats += n_tasks * (row_end - row) * width;
        }
      }
    }
  }
  const Memory partials = allocate(static_cast<size_t>(partial_floats) * sizeof(float));
  auto* next = reinterpret_cast<float*>(partials.get());
  for (const Group& merge : merges) {
    for (int64_t i = 0; i < merge.n_tasks; i++) {
      DecodeTask& task = tasks[merge.first_task + i];
      task.partial = next;
      next += (task.row_end - task.row_begin) * width;
    }
  }

  const double widths = static_cast<double>(shape.head_dim + shape.value_dim);
  const double shares = std::max(2.0 * pairs * widths / FLOPS_PER_WORKER,
                                 keys * widths * static_cast<double>(bytes_of(shape.element)) / BYTES_PER_WORKER);
  const int workers = workers_for(threads, shares, tasks.size());
  const std::vector<int64_t> runs = runs_of(tasks, workers);
  struct Context {
    const DecodeForward& p;
    const KernelTable& table;
    const std::vector<DecodeTask>& tasks;
    const std::vector<Group>& merges;
    const std::vector<int64_t>& runs;
    std::vector<Memory> scratch;
  } context{p, table, tasks, merges, runs, {}};
  const size_t bytes =
      table.decode_scratch(shape, p.spans.n_spans, static_cast<int>(std::min<int64_t>(rows, DECODE_ROWS)));
  context.scratch = scratch_for(workers, bytes);
  threads.run(
      static_cast<int64_t>(runs.size()) - 1, workers,
      [](int64_t run, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        for (int64_t task = context.runs[run], end = context.runs[run + 1]; task < end; task++) {
          const DecodeTask* following = task + 1 < end ? &context.tasks[task + 1] : nullptr;
          context.table.decode_forward(context.p, context.tasks[task], following, context.scratch[worker].get());
        }
      },
      &context);
  threads.run(
      static_cast<int64_t>(merges.size()), workers,
      [](int64_t index, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        const Group& merge = context.merges[index];
        context.table.decode_merge(context.p, &context.tasks[merge.first_task], static_cast<int>(merge.n_tasks),
                                   context.scratch[worker].get());
      },
      &context);
}

void cache_forward(const DecodeForward& p, const Threads& threads) {
  if (suits_decode(p.shape))
    decode_forward(p, threads);
  else
    prefill_forward(p, threads);
}

bool decode_serves(const AttentionForward& p) {
  return suits_decode(p.shape) && p.shape.k_len >= FEWEST_KEYS && p.features.bias.data == nullptr &&
         !p.features.dropout.is_on;
}

DecodeForward decode_of(const AttentionForward& p) {
  return {p.shape, p.spans, {nullptr, 1, p.shape.k_len}, nullptr, nullptr, p.features, p.q, p.k, p.v, p.out, p.lse};
}

namespace {

// Copies the new keys of one sequence and head, page by page.
void append_rows(const AppendKv& p, const StridedRows& cache, const StridedRows& source, int64_t bytes, int64_t batch,
                 int64_t head) {
  if (bytes == 0) return;  // there is no memory, not even of no bytes
  const int64_t element = p.element_bytes;
  const bool is_dense = cache.row_stride * element == bytes && source.row_stride * element == bytes;
  for (int64_t i = 0; i < p.new_keys;) {
    const int64_t key = p.lengths[batch] + i, slot = key % p.at.page_size;
    const int64_t n = std::min(p.new_keys - i, p.at.page_size - slot);
    const int64_t place = p.at.place[batch * p.at.places + key / p.at.page_size];
    char* target = static_cast<char*>(cache.data) +
                   (place * cache.batch_stride + head * cache.head_stride + slot * cache.row_stride) * element;
    const char* from = static_cast<const char*>(source.data) +
                       (batch * source.batch_stride + head * source.head_stride + i * source.row_stride) * element;
    if (is_dense) {
      std::memmove(target, from, static_cast<size_t>(n * bytes));
    } else {
      for (int64_t j = 0; j < n; j++) {
        std::memmove(target + j * cache.row_stride * element, from + j * source.row_stride * element,
                     static_cast<size_t>(bytes));
      }
    }
    i += n;
  }
}

}  // namespace

void append_kv(const AppendKv& p, const Threads& threads) {
  const double bytes =
      static_cast<double>(p.batch * p.kv_heads * p.new_keys) * static_cast<double>(p.key_bytes + p.value_bytes);
  const int64_t n_tasks = p.batch * p.kv_heads;
  threads.run(
      n_tasks, workers_for(threads, bytes / BYTES_PER_WORKER, static_cast<size_t>(n_tasks)),
      [](int64_t task, int, void* pointer) {
        const auto& p = *static_cast<const AppendKv*>(pointer);
        append_rows(p, p.k_cache, p.k, p.key_bytes, task / p.kv_heads, task % p.kv_heads);
        append_rows(p, p.v_cache, p.v, p.value_bytes, task / p.kv_heads, task % p.kv_heads);
      },
      const_cast<AppendKv*>(&p));
}

}  // namespace maskops
