// The schedule of the backward pass of span attention: which task does what, on how many threads, in what memory. The
// sums of a key's gradients run over rows in an order that depends on shapes and spans only, whatever the tasks are and
// however many threads there are, so the bits of the result do, too.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <queue>
#include <thread>
#include <vector>

#include "../task_trace.h"
#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace maskops {
namespace {

// A task takes a few microseconds at least, else waking a thread costs more than it brings.
constexpr double FLOPS_PER_WORKER = 2e6;
// Key heads of short sequences share a task, and one plan of its lanes, up to about this work.
constexpr double FLOPS_PER_TASK = 4e6;
// A sequence is one task while there is this many times as much left for each worker, and no longer than this: a worker
// keeps its sums at hand. Else its blocks of lanes are tasks...
constexpr double SPARE_TASKS = 4;
constexpr int32_t WHOLE_KEYS = 4096;
// ... which become smaller where they are more than a share of what is left for each worker, down to this.
constexpr double SPARE_BLOCKS = 4;
constexpr int32_t FEWEST_LANES = 32;

int64_t heads_of_task(double flops) {
  return flops == 0 ? 1 : static_cast<int64_t>(std::clamp(FLOPS_PER_TASK / flops, 1.0, 64.0));
}

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

// The components of one batch element of the plan, in the order of their keys; never none, so that every gradient of a
// key is somebody's to write.
std::vector<Component> components_of(const Spans& spans, int32_t k_len, int32_t tile_begin, int32_t tile_end) {
  std::vector<Component> stack;
  for (int32_t tile = tile_begin; tile < tile_end; tile++) {
    int32_t begin, end;
    keys_of_tile(spans, tile, k_len, begin, end);
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

// A sequence whose blocks of lanes are tasks that add to the same keys, one behind the other in each key.
struct Chain {
  int32_t batch, kv_head;
  const Component* component;
  double left;         // floating-point operations of the tasks to come
  int32_t tile, lane;  // where the next one begins
  float* sums;
  Turn* turns;
  std::vector<Link> links;
};

int64_t turns_of(const Component& component) {
  return (component.key_end - component.key_begin + TURN_KEYS - 1) / TURN_KEYS;
}

class Schedule {
 public:
  Schedule(const AttentionBackward& p, int workers, int64_t width);

  const std::vector<BackwardTask>& tasks() const { return tasks_; }
  const std::vector<int64_t>& chains() const { return chain_of_task_; }  // -1 for a task of its own
  int64_t most_keys() const { return most_keys_; }                       // whose sums a worker keeps

 private:
  struct Whole {  // components with all of their keys, one task for several key heads
    BackwardTask task;
    double flops;
    const Component* component;
  };

  double flops_of(int32_t tile) const { return pair_flops_ * std::max(tile_at(spans_, tile)[3], 0); }
  int32_t lanes_of(int32_t tile) const { return tile_at(spans_, tile)[2] * group_; }
  void list_components();
  void cut(int workers);
  void emit(int workers);
  double next_flops(const Chain& chain, double most, int32_t& lanes) const;
  void share(int64_t width);
  void push(const BackwardTask& task, int64_t chain);

  const AttentionBackward& p_;
  const Spans& spans_;
  int32_t group_;
  bool is_general_;    // sums over keys depend on which lanes are together
  double pair_flops_;  // of a pair of a row and a key, all heads of a group
  double flops_ = 0;
  std::vector<std::vector<Component>> components_;  // by batch element of the plan
  std::vector<Whole> whole_;
  std::vector<Chain> chains_;
  std::vector<BackwardTask> zeros_;
  std::vector<BackwardTask> tasks_;
  std::vector<int64_t> chain_of_task_;
  std::vector<Turn> turns_;
  Memory sums_;
  int64_t most_keys_ = 0;
};

Schedule::Schedule(const AttentionBackward& p, int workers, int64_t width)
    : p_(p),
      spans_(p.spans),
      group_(static_cast<int32_t>(p.shape.heads / p.shape.kv_heads)),
      is_general_(p.spans.n_spans > 1 || p.shape.softcap != 0.0f || p.features.bias.data != nullptr ||
                  p.features.dense.data != nullptr || p.features.alibi_slopes.data != nullptr ||
                  p.features.dropout.is_on),
      pair_flops_(4.0 * group_ *
                  (1.5 * static_cast<double>(p.shape.head_dim) + static_cast<double>(p.shape.value_dim))),
      components_(p.spans.plan_batch) {
  list_components();
  cut(workers);
  emit(workers);
  share(width);
}

BackwardTask nobodys_keys(int32_t batch, int32_t kv_head, int32_t kv_head_end, int32_t begin, int32_t end) {
  BackwardTask task{};
  task.batch = batch;
  task.kv_head = kv_head;
  task.kv_head_end = kv_head_end;
  task.zero_begin = begin;
  task.key_begin = task.key_end = task.zero_end = end;
  return task;
}

void Schedule::list_components() {
  const AttentionShape& shape = p_.shape;
  const auto k_len = static_cast<int32_t>(shape.k_len);
  for (int32_t batch = 0, tile = 0; batch < spans_.plan_batch; batch++) {
    const int32_t begin = tile;
    while (tile < spans_.n_tiles && tile_at(spans_, tile)[0] == batch) tile++;
    components_[batch] = components_of(spans_, k_len, begin, tile);
  }
  for (int32_t batch = 0; batch < shape.batch; batch++) {
    const auto& components = components_[batch % spans_.plan_batch];
    int32_t written = 0;
    for (const Component& component : components) {
      const double flops = pair_flops_ * static_cast<double>(component.cost);
      const int64_t heads = heads_of_task(flops);
      BackwardTask task{};
      task.batch = batch;
      task.tile_begin = component.tile_begin;
      task.tile_end = component.tile_end;
      task.lane_end = std::numeric_limits<int32_t>::max();
      task.key_begin = component.key_begin;
      task.key_end = component.key_end;
      // The gap before a component is its task's to fill with zeros.
      task.zero_begin = written;
      task.zero_end = &component == &components.back() ? k_len : task.key_end;
      for (int64_t head = 0; head < shape.kv_heads; head += heads) {
        task.kv_head = static_cast<int32_t>(head);
        task.kv_head_end = static_cast<int32_t>(std::min(shape.kv_heads, head + heads));
        whole_.push_back({task, flops * (task.kv_head_end - task.kv_head), &component});
        flops_ += whole_.back().flops;
      }
      written = component.key_end;
    }
  }
  std::stable_sort(whole_.begin(), whole_.end(), [](const Whole& a, const Whole& b) { return a.flops > b.flops; });
}

// Makes chains of the components that would keep a worker for too long.
void Schedule::cut(int workers) {
  double left = flops_;
  const auto chained = [&](const Whole& whole) {
    const Component& component = *whole.component;
    const double most = workers == 1 ? left : left / (SPARE_TASKS * workers);
    left -= whole.flops;
    if (whole.flops < FLOPS_PER_TASK || whole.task.kv_head_end - whole.task.kv_head > 1) return false;
    if (whole.flops <= most && component.key_end - component.key_begin <= WHOLE_KEYS) return false;
    const int32_t last = component.tile_end - 1;
    if (last == component.tile_begin && lanes_of(last) <= FEWEST_LANES) return false;
    chains_.push_back({whole.task.batch, whole.task.kv_head, &component, whole.flops, last, 0, nullptr, nullptr, {}});
    const BackwardTask& task = whole.task;
    const auto nobodys = [&](int32_t begin, int32_t end) {
      if (begin < end) zeros_.push_back(nobodys_keys(task.batch, task.kv_head, task.kv_head_end, begin, end));
    };
    nobodys(task.zero_begin, task.key_begin);
    nobodys(task.key_end, task.zero_end);
    // Turns that no tile takes.
    std::vector<int32_t> takers(turns_of(component) + 1);
    for (int32_t tile = component.tile_begin; tile < component.tile_end; tile++) {
      int32_t begin, end;
      keys_of_tile(spans_, tile, static_cast<int32_t>(p_.shape.k_len), begin, end);
      if (begin >= end) continue;
      takers[(begin - component.key_begin) / TURN_KEYS]++;
      takers[(end - 1 - component.key_begin) / TURN_KEYS + 1]--;
    }
    int32_t key = component.key_begin;
    for (int32_t turn = 0, now = 0; key < component.key_end; turn++, key += TURN_KEYS) {
      now += takers[turn];
      if (now == 0) nobodys(key, std::min(component.key_end, key + TURN_KEYS));
    }
    return true;
  };
  whole_.erase(std::remove_if(whole_.begin(), whole_.end(), chained), whole_.end());
  for (const Whole& whole : whole_) {
    most_keys_ = std::max<int64_t>(most_keys_, whole.task.key_end - whole.task.key_begin);
  }
}

// What the next task of a chain costs, and its lanes: a whole block of them, or less where that is more than `most`.
double Schedule::next_flops(const Chain& chain, double most, int32_t& lanes) const {
  const int32_t full = lanes_of(chain.tile);
  const double of_lane = flops_of(chain.tile) / std::max(full, 1);
  lanes = BLOCK_LANES;
  while (!is_general_ && lanes > FEWEST_LANES && of_lane * lanes > most) lanes /= 2;
  lanes = std::min(lanes, full - chain.lane);
  return of_lane * lanes;
}

void Schedule::push(const BackwardTask& task, int64_t chain) {
  tasks_.push_back(task);
  chain_of_task_.push_back(chain);
}

// Tasks in the order in which they start: the costliest first, those of a chain in its own order.
void Schedule::emit(int workers) {
  tasks_.reserve(whole_.size());
  chain_of_task_.reserve(whole_.size());
  const auto less = [&](int64_t a, int64_t b) {
    return chains_[a].left != chains_[b].left ? chains_[a].left < chains_[b].left : a > b;
  };
  std::priority_queue<int64_t, std::vector<int64_t>, decltype(less)> queue(less);
  for (size_t i = 0; i < chains_.size(); i++) queue.push(static_cast<int64_t>(i));
  double left = flops_;
  auto whole = whole_.begin();
  while (!queue.empty() || whole != whole_.end()) {
    int32_t lanes = 0;
    const double flops =
        queue.empty() ? -1.0 : next_flops(chains_[queue.top()], left / (SPARE_BLOCKS * workers), lanes);
    if (whole != whole_.end() && whole->flops >= flops) {
      push(whole->task, -1);
      left -= whole->flops;
      whole++;
      continue;
    }
    const int64_t index = queue.top();
    queue.pop();
    Chain& chain = chains_[index];
    const Component& component = *chain.component;
    BackwardTask task{};
    task.batch = chain.batch;
    task.kv_head = chain.kv_head;
    task.kv_head_end = chain.kv_head + 1;
    task.tile_begin = chain.tile;
    task.tile_end = chain.tile + 1;
    task.lane_begin = chain.lane;
    task.lane_end = chain.lane + lanes;
    keys_of_tile(spans_, chain.tile, static_cast<int32_t>(p_.shape.k_len), task.key_begin, task.key_end);
    Link link{};
    if (task.key_begin < task.key_end) {
      link.begin = (task.key_begin - component.key_begin) / TURN_KEYS;
      link.end = (task.key_end - 1 - component.key_begin) / TURN_KEYS + 1;
    } else {
      task.key_begin = task.key_end = component.key_begin;
    }
    task.zero_begin = task.key_begin;
    task.zero_end = task.key_end;
    task.sums_begin = component.key_begin;
    task.sums_end = component.key_end;
    task.link = static_cast<int32_t>(chain.links.size());
    chain.links.push_back(link);
    push(task, index);
    left -= flops;
    chain.left -= flops;
    chain.lane += lanes;
    if (chain.lane >= lanes_of(chain.tile)) {
      chain.lane = 0;
      chain.tile--;
    }
    if (chain.tile >= component.tile_begin) queue.push(index);
  }
  for (const BackwardTask& task : zeros_) push(task, -1);
}

// Gives each chain its sums and turns, and its tasks what they know of one another.
void Schedule::share(int64_t width) {
  int64_t n_turns = 0, n_keys = 0;
  for (const Chain& chain : chains_) {
    n_turns += turns_of(*chain.component);
    n_keys += chain.component->key_end - chain.component->key_begin;
  }
  // Float32 gradients hold the sums themselves where their rows are whole vectors.
  const bool in_place = p_.shape.element == Element::float32 && width == p_.shape.head_dim + p_.shape.value_dim;
  if (in_place) width = 0;
  turns_ = std::vector<Turn>(n_turns);
  sums_ = allocate(n_keys * width * sizeof(float));
  Turn* turns = turns_.data();
  auto* sums = reinterpret_cast<float*>(sums_.get());
  for (Chain& chain : chains_) {
    chain.turns = turns;
    chain.sums = in_place ? nullptr : sums;
    turns += turns_of(*chain.component);
    sums += (chain.component->key_end - chain.component->key_begin) * width;
    const auto widen = [](int32_t& begin, int32_t& end, const Link& link) {
      if (link.begin >= link.end) return;
      begin = begin < end ? std::min(begin, link.begin) : link.begin;
      end = std::max(end, link.end);
    };
    const auto n_links = static_cast<int64_t>(chain.links.size());
    for (int64_t i = 1; i < n_links; i++) {
      Link& link = chain.links[i];
      link.before_begin = chain.links[i - 1].before_begin;
      link.before_end = chain.links[i - 1].before_end;
      widen(link.before_begin, link.before_end, chain.links[i - 1]);
    }
    for (int64_t i = n_links - 2; i >= 0; i--) {
      Link& link = chain.links[i];
      link.after_begin = chain.links[i + 1].after_begin;
      link.after_end = chain.links[i + 1].after_end;
      widen(link.after_begin, link.after_end, chain.links[i + 1]);
    }
  }
  for (size_t i = 0; i < tasks_.size(); i++) {
    if (chain_of_task_[i] < 0) continue;
    const Chain& chain = chains_[chain_of_task_[i]];
    tasks_[i].sums = chain.sums;
    tasks_[i].turns = chain.turns;
    tasks_[i].links = chain.links.data();
    tasks_[i].n_links = static_cast<int32_t>(chain.links.size());
  }
}

bool takes(const Link& link, int32_t turn) { return link.begin <= turn && turn < link.end; }

// What the workers of a call share.
struct Team {
  const AttentionBackward& p;
  const KernelTable& table;
  const std::vector<BackwardTask>& tasks;
  std::vector<Memory> scratch;
  size_t last_ahead;  // tasks from here on are nobody's before it is done with the one before: they level the workers
  std::atomic<size_t> next_task{0};

  const BackwardTask* take() {
    const size_t index = next_task.fetch_add(1, std::memory_order_relaxed);
    return index < tasks.size() ? &tasks[index] : nullptr;
  }

  // Others may wait for the turns of a task, so that one which has turns to take is taken when it can begin.
  const BackwardTask* take_ahead() {
    size_t index = next_task.load(std::memory_order_relaxed);
    while (index < last_ahead && tasks[index].turns == nullptr) {
      if (next_task.compare_exchange_weak(index, index + 1, std::memory_order_relaxed)) return &tasks[index];
    }
    return nullptr;
  }

  // A worker knows its next task, so that what it reads comes into the caches during the one before.
  template <class Done>
  void work(int worker, Done done) {
    const BackwardTask* task = take();
    while (task != nullptr) {
      const BackwardTask* next = take_ahead();
      table.attention_backward(p, *task, next, scratch[worker].get());
      done(static_cast<size_t>(task - tasks.data()));
      task = next != nullptr ? next : take();
    }
  }
};

}  // namespace

bool take_turn(const BackwardTask& task, int32_t turn) {
  const Link& link = task.links[task.link];
  if (turn < link.before_begin || turn >= link.before_end) return true;
  int32_t before = task.link - 1;
  while (before >= 0 && !takes(task.links[before], turn)) before--;
  if (before < 0) return true;
  const std::atomic<int32_t>& passed = task.turns[turn].passed;
  for (int tries = 0; passed.load(std::memory_order_acquire) != before + 1; tries++) {
    if (tries >= 64) std::this_thread::yield();  // who comes before may wait for this processor
  }
  return false;
}

bool is_last_turn(const BackwardTask& task, int32_t turn) {
  const Link& link = task.links[task.link];
  if (turn < link.after_begin || turn >= link.after_end) return true;
  int32_t after = task.link + 1;
  while (after < task.n_links && !takes(task.links[after], turn)) after++;
  return after == task.n_links;
}

void pass_turn(const BackwardTask& task, int32_t turn) {
  task.turns[turn].passed.store(task.link + 1, std::memory_order_release);
}

void attention_backward(const AttentionBackward& call, const Threads& threads) {
  AttentionBackward p = call;
  const AttentionShape& shape = p.shape;
  const size_t row_bytes = shape.batch * shape.heads * shape.q_len * sizeof(float);
  const Memory row_grad_slopes = allocate(p.grad_slopes != nullptr ? row_bytes : 0);
  const Memory row_grad_sinks = allocate(p.grad_sinks != nullptr ? row_bytes : 0);
  if (p.grad_slopes != nullptr) p.row_grad_slopes = reinterpret_cast<float*>(row_grad_slopes.get());
  if (p.grad_sinks != nullptr) p.row_grad_sinks = reinterpret_cast<float*>(row_grad_sinks.get());
  if (p.grad_bias != nullptr && !p.bias_is_shared) clear_bias_gradient(p, threads);
  const KernelTable& table = kernels();

  const double flops = 4.0 * pairs_of(p.spans, shape) * (shape.head_dim + shape.value_dim);
  const int useful = useful_workers(threads, flops, std::numeric_limits<int64_t>::max());
  const Schedule schedule(p, useful, table.attention_backward_width(shape));
  const std::vector<BackwardTask>& tasks = schedule.tasks();
  Team team{p, table, tasks, {}, 0};
  const int workers = useful_workers(threads, flops, static_cast<int64_t>(tasks.size()));
  const size_t leveling = static_cast<size_t>(workers) * 4;
  team.last_ahead = tasks.size() > leveling ? tasks.size() - leveling : 0;
  TaskTrace* trace = task_trace.load(std::memory_order_relaxed);
  team.scratch = scratch_for(trace != nullptr ? 1 : workers,
                             table.attention_backward_scratch(shape, p.spans.n_spans, schedule.most_keys()));
  if (trace != nullptr) {
    int64_t begin = TaskTrace::now();
    team.work(0, [&](size_t task) {
      const int64_t end = TaskTrace::now();
      trace->add(workers, end - begin, schedule.chains()[task], tasks[task].key_end - tasks[task].key_begin);
      begin = end;
    });
    trace->regions++;
  } else {
    threads.run(
        workers, workers,
        [](int64_t, int worker, void* pointer) { static_cast<Team*>(pointer)->work(worker, [](size_t) {}); }, &team);
  }
  if (p.grad_bias != nullptr && p.bias_is_shared) attention_bias_gradient(p, flops, threads);
  sum_row_gradients(p);
}

}  // namespace maskops
