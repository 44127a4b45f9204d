// The schedule of the backward pass of span attention: which task does what, on how many threads, in what memory. Tasks
// depend on shapes and spans only, never on the number of threads, so neither do the bits of the result.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace maskops {
namespace {

// A task takes a few microseconds at least, else waking a thread costs more than it brings.
constexpr double FLOPS_PER_WORKER = 2e6;
// The backward pass splits a long sequence until about so many tasks share the work of a call.
constexpr int64_t SHARED_TASKS = 32;
constexpr int32_t MERGED_KEYS = 256;  // keys whose partial sums one task adds up
// Key heads of short sequences share a task, and one plan of its lanes, up to about this work.
constexpr double FLOPS_PER_TASK = 4e6;

int64_t heads_of_task(double flops) {
  return flops == 0 ? 1 : static_cast<int64_t>(std::clamp(FLOPS_PER_TASK / flops, 1.0, 64.0));
}

const int32_t* tile_at(const Spans& spans, int64_t tile) { return spans.tiles + tile * spans.tile_width; }

double pairs_of(const Spans& spans, const AttentionShape& shape) {
  int64_t pairs = 0;
  for (int64_t tile = 0; tile < spans.n_tiles; tile++) pairs += std::max(tile_at(spans, tile)[3], 0);
  return static_cast<double>(pairs) * shape.heads * (shape.batch / std::max(1, spans.plan_batch));
}

}  // namespace

int useful_workers(const Threads& threads, double flops, int64_t n_tasks) {
  const double useful = 1 + flops / FLOPS_PER_WORKER;
  return static_cast<int>(std::min({static_cast<double>(threads.count), useful, std::max<double>(1, n_tasks)}));
}

namespace {

// Tiles [tile_begin, tile_end) of one batch element whose keys no tile outside them sees.
struct Component {
  int32_t tile_begin, tile_end, key_begin, key_end;
  int64_t cost;
};

void hull(const int32_t* item, int n_spans, int32_t k_len, int32_t& begin, int32_t& end) {
  begin = k_len;
  end = 0;
  for (int s = 0; s < n_spans; s++) {
    const int32_t lo = std::max(item[4 + 4 * s], 0);
    const int32_t hi = std::min(item[4 + 4 * s + 3], k_len);
    if (lo >= hi) continue;
    begin = std::min(begin, lo);
    end = std::max(end, hi);
  }
}

// The components of one batch element of the plan, in the order of their keys; never none, so that every gradient of a
// key is somebody's to write.
std::vector<Component> components_of(const Spans& spans, int32_t k_len, int32_t tile_begin, int32_t tile_end) {
  std::vector<Component> stack;
  for (int32_t tile = tile_begin; tile < tile_end; tile++) {
    int32_t begin, end;
    hull(tile_at(spans, tile), spans.n_spans, k_len, begin, end);
    const int64_t cost = std::max(tile_at(spans, tile)[3], 0);
    if (begin >= end) {  // nobody's keys: only rows to write
      if (stack.empty()) stack.push_back({tile, tile, 0, 0, 0});
      stack.back().tile_end = tile + 1;
      continue;
    }
    Component merged{tile, tile + 1, begin, end, cost};
    while (!stack.empty() && (stack.back().key_end > begin || stack.back().key_end == 0)) {
      const Component& previous = stack.back();
      merged.tile_begin = previous.tile_begin;
      if (previous.key_end != 0) {
        merged.key_begin = std::min(merged.key_begin, previous.key_begin);
        merged.key_end = std::max(merged.key_end, previous.key_end);
        merged.cost += previous.cost;
      }
      stack.pop_back();
    }
    stack.push_back(merged);
  }
  if (stack.empty()) stack.push_back({tile_begin, tile_begin, 0, 0, 0});
  return stack;
}

// Tiles of a component cut into `parts` runs of about equal cost.
std::vector<int32_t> cut(const Spans& spans, const Component& component, int64_t parts) {
  std::vector<int32_t> bounds{component.tile_begin};
  int64_t done = 0;
  for (int32_t tile = component.tile_begin; tile < component.tile_end; tile++) {
    done += std::max(tile_at(spans, tile)[3], 0);
    const auto made = static_cast<int64_t>(bounds.size());
    if (made < parts && done * parts >= component.cost * made && tile + 1 < component.tile_end) {
      bounds.push_back(tile + 1);
    }
  }
  bounds.push_back(component.tile_end);
  return bounds;
}

}  // namespace

void attention_backward(const AttentionBackward& call, const Threads& threads) {
  AttentionBackward p = call;
  const AttentionShape& shape = p.shape;
  const size_t row_bytes = shape.batch * shape.heads * shape.q_len * sizeof(float);
  const Memory row_grad_slopes = allocate(p.grad_slopes != nullptr ? row_bytes : 0);
  const Memory row_grad_sinks = allocate(p.grad_sinks != nullptr ? row_bytes : 0);
  if (p.grad_slopes != nullptr) p.row_grad_slopes = reinterpret_cast<float*>(row_grad_slopes.get());
  if (p.grad_sinks != nullptr) p.row_grad_sinks = reinterpret_cast<float*>(row_grad_sinks.get());
  if (p.grad_bias != nullptr && !p.bias_is_shared) clear_bias_gradient(p, threads);
  const Spans& spans = p.spans;
  const auto k_len = static_cast<int32_t>(shape.k_len);
  const KernelTable& table = kernels();
  const int64_t width = table.attention_backward_width(shape);

  std::vector<std::vector<Component>> plan(spans.plan_batch);
  int64_t total_cost = 0;
  for (int32_t batch = 0, tile = 0; batch < spans.plan_batch; batch++) {
    const int32_t begin = tile;
    while (tile < spans.n_tiles && tile_at(spans, tile)[0] == batch) tile++;
    plan[batch] = components_of(spans, k_len, begin, tile);
    for (const Component& component : plan[batch]) total_cost += component.cost;
  }
  total_cost *= shape.kv_heads * (shape.batch / std::max(1, spans.plan_batch));

  struct Task {
    BackwardTask task;
    int64_t cost;
  };
  struct Group {  // tasks that own the same keys
    int64_t first_task, n_tasks;
  };
  struct Merge {  // keys whose sums a group's tasks left apart
    int64_t first_task, n_tasks;
    int32_t key_begin, key_end;
  };
  std::vector<Task> tasks;
  std::vector<Group> groups;
  std::vector<Merge> merges;
  int64_t partial_floats = 0, most_keys = 0;
  const int64_t group = shape.heads / shape.kv_heads;
  const double pair_flops = 4.0 * static_cast<double>(group) * (1.5 * shape.head_dim + shape.value_dim);
  for (int32_t batch = 0; batch < shape.batch; batch++) {
    const auto& components = plan[batch % spans.plan_batch];
    int32_t written = 0;
    for (const Component& component : components) {
      const int64_t parts =
          total_cost == 0 ? 1 : std::max<int64_t>(1, (component.cost * SHARED_TASKS + total_cost - 1) / total_cost);
      const std::vector<int32_t> bounds = cut(spans, component, parts);
      const bool shared = bounds.size() > 2;
      const bool last = &component == &components.back();
      std::vector<Task> of_head;
      for (size_t part = 0; part + 1 < bounds.size(); part++) {
        BackwardTask task{};
        task.batch = batch;
        task.tile_begin = bounds[part];
        task.tile_end = bounds[part + 1];
        task.key_begin = component.key_begin;
        task.key_end = component.key_end;
        int64_t cost = 0;
        if (shared) {  // only the keys that these tiles see: half of them under a causal mask
          task.key_begin = component.key_end;
          task.key_end = component.key_begin;
        }
        for (int32_t tile = task.tile_begin; tile < task.tile_end; tile++) {
          cost += std::max(tile_at(spans, tile)[3], 0);
          if (!shared) continue;
          int32_t begin, end;
          hull(tile_at(spans, tile), spans.n_spans, k_len, begin, end);
          if (begin >= end) continue;
          task.key_begin = std::min(task.key_begin, begin);
          task.key_end = std::max(task.key_end, end);
        }
        if (task.key_begin > task.key_end) task.key_end = task.key_begin;
        // The gap before a component is its task's to fill with zeros, or the merge's.
        task.zero_begin = shared ? task.key_begin : written;
        task.zero_end = !shared && last ? k_len : task.key_end;
        if (!shared) most_keys = std::max<int64_t>(most_keys, task.key_end - task.key_begin);
        of_head.push_back({task, cost});
      }
      const int64_t heads = shared ? 1 : heads_of_task(pair_flops * static_cast<double>(component.cost));
      for (int64_t head = 0; head < shape.kv_heads; head += heads) {
        const auto first = static_cast<int64_t>(tasks.size());
        for (Task part : of_head) {
          part.task.kv_head = static_cast<int32_t>(head);
          part.task.kv_head_end = static_cast<int32_t>(std::min(shape.kv_heads, head + heads));
          part.cost *= part.task.kv_head_end - part.task.kv_head;
          if (shared) partial_floats += (part.task.key_end - part.task.key_begin) * width;
          tasks.push_back(part);
        }
        if (!shared) continue;
        const auto n_tasks = static_cast<int64_t>(of_head.size());
        groups.push_back({first, n_tasks});
        const int32_t end = last ? k_len : component.key_end;
        for (int32_t key = written; key < end; key += MERGED_KEYS) {
          merges.push_back({first, n_tasks, key, std::min(end, key + MERGED_KEYS)});
        }
      }
      written = component.key_end;
    }
  }

  const Memory partials = allocate(partial_floats * sizeof(float));
  auto* next = reinterpret_cast<float*>(partials.get());
  for (const Group& group : groups) {
    for (int64_t i = 0; i < group.n_tasks; i++) {
      BackwardTask& task = tasks[group.first_task + i].task;
      task.partial = next;
      next += (task.key_end - task.key_begin) * width;
    }
  }
  std::vector<BackwardTask> in_order;  // what the merge reads
  in_order.reserve(tasks.size());
  for (const Task& task : tasks) in_order.push_back(task.task);
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });

  const double flops = 4.0 * pairs_of(spans, shape) * (shape.head_dim + shape.value_dim);
  struct Context {
    const AttentionBackward& p;
    const KernelTable& table;
    const std::vector<Task>& tasks;
    const std::vector<Merge>& merges;
    const std::vector<BackwardTask>& in_order;
    std::vector<Memory> scratch;
    size_t last_ahead;  // tasks from here on are nobody's before it is done with the one before: they level the workers
    std::atomic<size_t> next_task{0};

    const BackwardTask* take() {
      const size_t index = next_task.fetch_add(1, std::memory_order_relaxed);
      return index < tasks.size() ? &tasks[index].task : nullptr;
    }
    const BackwardTask* take_ahead() {
      return next_task.load(std::memory_order_relaxed) < last_ahead ? take() : nullptr;
    }
  } context{p, table, tasks, merges, in_order, {}, 0};
  const int workers = useful_workers(threads, flops, static_cast<int64_t>(tasks.size()));
  const size_t leveling = static_cast<size_t>(workers) * 4;
  context.last_ahead = tasks.size() > leveling ? tasks.size() - leveling : 0;
  context.scratch = scratch_for(workers, std::max(table.attention_backward_scratch(shape, spans.n_spans, most_keys),
                                                  static_cast<size_t>(width) * sizeof(float)));
  // A worker knows its next task, so that what it reads comes into the caches during the one before.
  threads.run(
      workers, workers,
      [](int64_t, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        const BackwardTask* task = context.take();
        while (task != nullptr) {
          const BackwardTask* next = context.take_ahead();
          context.table.attention_backward(context.p, *task, next, context.scratch[worker].get());
          task = next != nullptr ? next : context.take();
        }
      },
      &context);
  threads.run(
      static_cast<int64_t>(merges.size()), workers,
      [](int64_t index, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        const Merge& merge = context.merges[index];
        for (int64_t key = merge.key_begin; key < merge.key_end; key++) {
          context.table.attention_backward_merge(context.p, &context.in_order[merge.first_task],
                                                 static_cast<int>(merge.n_tasks), key,
                                                 reinterpret_cast<float*>(context.scratch[worker].get()));
        }
      },
      &context);
  if (p.grad_bias != nullptr && p.bias_is_shared) attention_bias_gradient(p, flops, threads);
  sum_row_gradients(p);
}

}  // namespace maskops
