// The schedule of the forward pass of span attention. What a task is depends on shapes and spans only, and so do the
// bits of the result; in which order tasks start depends on the number of threads, too.
#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "decode.h"
#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

// What a task costs besides its products, in floating-point operations: estimates, not fitted to this kernel.
constexpr double FLOPS_PER_LANE = 16;  // for each of its head_dim + value_dim numbers
constexpr double FLOPS_PER_TASK = 1e5;
// Tasks become smaller until each is a small part of what is left when it starts, so that those that start last end at
// about the same time on up to so many threads...
constexpr double MOST_WORKERS = 256;
// ... but not smaller than this, about 0.1 ms: whoever comes late has to wait for little, and setup stays small beside
// it.
constexpr double FEWEST_FLOPS = 1e7;
// Where so many workers have this to do, about 0.4 ms each, evenness is worth more cuts: from this part of a share on
// one more task is made of it, and parts have fewer keys.
constexpr double ENOUGH_FLOPS = 4e7;
constexpr double ROUNDED_UP = 0.75;
// Many keys are cut first, where what the merge reads is little beside them: fewer lanes read the same keys again.
constexpr int32_t MANY_KEYS = 1024;
constexpr int32_t FEWEST_KEYS = 512, FEWEST_KEYS_OF_ENOUGH = 256;
constexpr int32_t FEWEST_LANES = 64;
// Lanes that a task of the merge has, so that many threads share it.
constexpr int64_t MERGED_LANES = 16;

// What follows changes no bits: only in which company and when a task runs.
constexpr double FLOPS_PER_UNIT = 1e6;   // short tasks start together up to so much, so that the counter stays cold,
constexpr double UNITS_PER_WORKER = 32;  // where each worker gets so many
constexpr double LEVELLING_TASKS = 2;    // of the largest that there are, for each worker, level them at the end
// Tiles that see more keys than this share them with others, and come head by head: keys and values stay in a core's
// own cache. Others come tile by tile, all heads of it one after the other: their rows are neighbours in a packed
// batch. For the same reason the heads of a document come before the next document: a row of a packed batch has a page
// of memory almost to itself, and no processor remembers where more than a few thousand pages are.
constexpr int32_t SHARED_KEYS = 256;

// One task for every copy of it: the key heads of the batch elements that share a plan.
struct Piece {
  int32_t group, plan_batch, first_row, rows, lane_begin, lane_end, key_begin, key_end;
  int32_t part, parts;  // of the keys of these lanes
  int64_t partials;     // floats before those of the first copy of its lanes
  double flops;
};

// The pieces of neighbouring tiles whose keys overlap: those of a document, or of a whole batch element of the plan.
struct Group {
  int32_t plan_batch, key_begin, key_end;
  int64_t first_piece = 0, n_pieces = 0, n_copies = 0;
  double flops = 0;  // of one copy
  bool shares_keys = false;
};

// Tasks in a row: n_pieces pieces for copies [first_copy, first_copy + n_copies), copy by copy, or one piece for
// several key heads at a time.
struct Run {
  int64_t first_unit, first_piece, n_pieces, first_copy, n_copies, heads_per_task, tasks_per_unit;
};

// The parts of a block of lanes are added up, MERGED_LANES at a time: copy by copy, `piece` being the first part of
// one.
struct Merge {
  int64_t first_task;
  Piece piece;
};
int64_t merges_of(int64_t lanes) { return (lanes + MERGED_LANES - 1) / MERGED_LANES; }

class Schedule {
 public:
  Schedule(const AttentionForward& p, const Threads& threads);

  int64_t n_units() const { return n_units_; }
  double flops() const { return flops_; }
  int64_t partial_floats() const { return partial_floats_; }
  int64_t n_merges() const { return n_merges_; }

  // The copies of a task are key heads of one batch element.
  struct Task {
    const Piece* piece;
    int64_t copy, heads;
  };

  // Calls fn for each task of a unit.
  template <class Fn>
  void for_tasks(int64_t unit, Fn fn) const {
    const Run& run = run_of(unit);
    const int64_t begin = (unit - run.first_unit) * run.tasks_per_unit;
    const int64_t end = std::min(begin + run.tasks_per_unit, tasks_of(run));
    for (int64_t task = begin; task < end; task++) fn(task_at(run, task));
  }

  Task first_task(int64_t unit) const {
    const Run& run = run_of(unit);
    return task_at(run, (unit - run.first_unit) * run.tasks_per_unit);
  }

  // Calls fn(piece, copy, first lane) of a task of merging.
  template <class Fn>
  void for_merge(int64_t task, Fn fn) const {
    const Merge& merge = *(std::upper_bound(merges_.begin(), merges_.end(), task,
                                            [](int64_t task, const Merge& merge) { return task < merge.first_task; }) -
                           1);
    const int64_t index = task - merge.first_task, of_copy = merges_of(merge.piece.lane_end - merge.piece.lane_begin);
    fn(merge.piece, index / of_copy, index % of_copy * MERGED_LANES);
  }

  LaneBlock block_of(const AttentionForward& p, const Task& task) const {
    const Piece& piece = *task.piece;
    const int64_t copy = task.copy, heads = task.heads;
    const auto batch = static_cast<int32_t>(piece.plan_batch + copy / kv_heads_ * p.spans.plan_batch);
    const auto head = static_cast<int32_t>(copy % kv_heads_), head_end = static_cast<int32_t>(head + heads);
    return {batch,           head,         head_end, piece.first_row, piece.rows, piece.lane_begin, piece.lane_end,
            piece.key_begin, piece.key_end};
  }

 private:
  const Run& run_of(int64_t unit) const {
    return *(std::upper_bound(runs_.begin(), runs_.end(), unit,
                              [](int64_t unit, const Run& run) { return unit < run.first_unit; }) -
             1);
  }
  Task task_at(const Run& run, int64_t task) const {
    const int64_t index = task / run.n_pieces, groups = head_groups(run);
    const int64_t head = index % groups * run.heads_per_task;
    return {&pieces_[run.first_piece + task % run.n_pieces], run.first_copy + index / groups * kv_heads_ + head,
            std::min(run.heads_per_task, kv_heads_ - head)};
  }
  int64_t head_groups(const Run& run) const { return (kv_heads_ + run.heads_per_task - 1) / run.heads_per_task; }
  int64_t tasks_of(const Run& run) const {  // heads are grouped only where whole batch elements are in the run
    return run.n_pieces * (run.heads_per_task == 1 ? run.n_copies : run.n_copies / kv_heads_ * head_groups(run));
  }

  void cut_lanes(const AttentionForward& p);
  void shrink(const AttentionForward& p);
  void order(int64_t workers);

  std::vector<Group> groups_;
  std::vector<Piece> pieces_;  // by group, costliest first within it
  std::vector<Run> runs_;
  std::vector<Merge> merges_;
  int64_t kv_heads_;
  double flops_ = 0;
  int64_t n_units_ = 0, partial_floats_ = 0, n_merges_ = 0;
};

// Pairs of query row and key in rows [begin, end).
double pairs_of_rows(const Spans& spans, int64_t plan_batch, int64_t begin, int64_t end) {
  double pairs = 0;
  for (int32_t s = 0; s < spans.n_spans; s++) {
    const int64_t offset = s * spans.span_stride + plan_batch * spans.batch_stride;
    for (int64_t row = begin; row < end; row++) {
      pairs += std::max(0, spans.end[offset + row] - std::max(0, spans.start[offset + row]));
    }
  }
  return pairs;
}

Schedule::Schedule(const AttentionForward& p, const Threads& threads) : kv_heads_(p.shape.kv_heads) {
  cut_lanes(p);
  shrink(p);
  order(useful_workers(threads, flops_, std::numeric_limits<int64_t>::max()));
}

// Blocks of lanes, the largest tasks that there are.
void Schedule::cut_lanes(const AttentionForward& p) {
  const AttentionShape& shape = p.shape;
  const Spans& spans = p.spans;
  const auto group = static_cast<int32_t>(shape.heads / shape.kv_heads);
  const auto k_len = static_cast<int32_t>(shape.k_len);
  const auto widths = static_cast<double>(shape.head_dim + shape.value_dim);
  pieces_.reserve(spans.n_tiles * group);
  for (int32_t tile = 0; tile < spans.n_tiles; tile++) {
    const int32_t* item = tile_at(spans, tile);
    const int32_t lanes = item[2] * group;
    int32_t key_begin, key_end;
    keys_of_tile(spans, tile, k_len, key_begin, key_end);
    if (groups_.empty() || groups_.back().plan_batch != item[0] || key_begin >= groups_.back().key_end ||
        key_end <= groups_.back().key_begin) {
      const int64_t batches = (shape.batch - item[0] + spans.plan_batch - 1) / spans.plan_batch;
      groups_.push_back({item[0], key_begin, key_end, 0, 0, kv_heads_ * batches, 0, false});
    }
    Group& owner = groups_.back();
    owner.key_begin = std::min(owner.key_begin, key_begin);
    owner.key_end = std::max(owner.key_end, key_end);
    owner.shares_keys = owner.shares_keys || key_end - key_begin > SHARED_KEYS;
    for (int32_t lane = 0; lane < lanes; lane += BLOCK_LANES) {
      const int32_t lane_end = std::min(lanes, lane + BLOCK_LANES);
      double pairs = static_cast<double>(std::max(item[3], 0)) * group;
      if (lane_end - lane < lanes) {
        const int32_t row = item[1] + lane / group, row_end = item[1] + (lane_end - 1) / group + 1;
        pairs = pairs_of_rows(spans, item[0], row, row_end) * (lane_end - lane) / (row_end - row);
      }
      const double flops = (2 * pairs + FLOPS_PER_LANE * (lane_end - lane)) * widths + FLOPS_PER_TASK;
      pieces_.push_back({static_cast<int32_t>(groups_.size()) - 1, item[0], item[1], item[2], lane, lane_end, key_begin,
                         std::max(key_begin, key_end), 0, 1, 0, flops});
      owner.flops += flops;
      flops_ += flops * static_cast<double>(owner.n_copies);
    }
  }
}

// Guided self-scheduling (Polychronopoulos and Kuck 1987): no task is much larger than an even share of what is left
// when it starts, nor is any part of its keys.
void Schedule::shrink(const AttentionForward& p) {
  const int64_t width = 2 + p.shape.value_dim;
  const auto k_len = static_cast<int32_t>(p.shape.k_len);
  std::vector<int64_t> costliest_first(pieces_.size());
  for (size_t i = 0; i < pieces_.size(); i++) costliest_first[i] = static_cast<int64_t>(i);
  std::stable_sort(costliest_first.begin(), costliest_first.end(),
                   [&](int64_t a, int64_t b) { return pieces_[a].flops > pieces_[b].flops; });
  std::vector<Piece> smaller;
  smaller.reserve(pieces_.size());
  double left = flops_;
  const bool enough = flops_ >= MOST_WORKERS * ENOUGH_FLOPS;
  for (const int64_t index : costliest_first) {
    const Piece& piece = pieces_[index];
    const int64_t n_copies = groups_[piece.group].n_copies;
    // Into how many parts, each about a share of what is left, so many operations go.
    const auto parts_of = [&](double flops) {
      const double parts = flops / std::max(FEWEST_FLOPS, left / MOST_WORKERS);
      return static_cast<int32_t>(std::max(1.0, enough ? parts + ROUNDED_UP : parts));
    };
    const int32_t lanes = piece.lane_end - piece.lane_begin, all_keys = piece.key_end - piece.key_begin;
    const int32_t fewest_keys = all_keys < MANY_KEYS ? MANY_KEYS : enough ? FEWEST_KEYS_OF_ENOUGH : FEWEST_KEYS;
    const int32_t lane_step = parts_of(piece.flops) <= std::max(1, all_keys / fewest_keys) ? lanes : FEWEST_LANES;
    for (int32_t lane = 0; lane < lanes; lane += lane_step) {
      Piece part = piece;
      part.lane_begin = piece.lane_begin + lane;
      part.lane_end = piece.lane_begin + std::min(lanes, lane + lane_step);
      const int32_t n_lanes = part.lane_end - part.lane_begin;
      // All keys there are, together: the hull only says where cuts are worth it.
      part.key_begin = 0;
      const size_t first_part = smaller.size();
      double rest = piece.flops * n_lanes / lanes;
      for (int32_t key = piece.key_begin;; part.part++) {
        const int32_t keys = piece.key_end - key;
        // Where there is not enough for all, keys are cut as if these were all the lanes: more tasks, and shorter sums.
        const double weighed = enough ? rest : rest * lanes / n_lanes;
        int32_t parts = std::min(parts_of(weighed), keys / fewest_keys);
        if (part.part + 1 == MOST_KEY_PARTS) parts = 1;
        key += parts <= 1 ? keys : (keys / parts + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS;
        part.key_end = parts <= 1 ? k_len : key;
        part.flops = parts <= 1 ? rest : rest / parts;
        rest -= part.flops;
        left -= part.flops * static_cast<double>(n_copies);
        smaller.push_back(part);
        if (parts <= 1) break;
        part.key_begin = part.key_end;
      }
      const auto parts = static_cast<int32_t>(smaller.size() - first_part);
      for (size_t i = first_part; i < smaller.size(); i++) {
        smaller[i].parts = parts;
        smaller[i].partials = partial_floats_;
      }
      if (parts > 1) {
        partial_floats_ += n_copies * parts * n_lanes * width;
        merges_.push_back({n_merges_, smaller[first_part]});
        n_merges_ += n_copies * merges_of(n_lanes);
      }
    }
  }
  std::stable_sort(smaller.begin(), smaller.end(), [](const Piece& a, const Piece& b) { return a.group < b.group; });
  pieces_ = std::move(smaller);
  for (size_t i = 0; i < pieces_.size(); i++) {
    Group& group = groups_[pieces_[i].group];
    if (group.n_pieces++ == 0) group.first_piece = static_cast<int64_t>(i);
  }
}

// Long sequences copy by copy while there is work enough left to level the workers; then costliest first, whatever it
// belongs to, several heads together while that is a small part of what is left.
void Schedule::order(int64_t workers) {
  double costliest = 0;
  for (const Piece& piece : pieces_) costliest = std::max(costliest, piece.flops);
  std::vector<const Group*> longest_first;
  longest_first.reserve(groups_.size());
  for (const Group& group : groups_) longest_first.push_back(&group);
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [](const Group* a, const Group* b) { return a->flops > b->flops; });
  const double levelling = workers == 1 ? 0 : LEVELLING_TASKS * static_cast<double>(workers) * costliest;
  std::vector<Run> last;
  double left = flops_;
  for (const Group* group : longest_first) {
    int64_t n_whole = 0;
    if (group->shares_keys) {
      const double spare = std::max(0.0, left - levelling) / std::max(group->flops, 1.0);
      n_whole = static_cast<int64_t>(std::min(spare, static_cast<double>(group->n_copies)));
    }
    if (n_whole > 0) runs_.push_back({0, group->first_piece, group->n_pieces, 0, n_whole, 1, 1});
    left -= group->flops * static_cast<double>(n_whole);
    for (int64_t i = 0; i < group->n_pieces && n_whole < group->n_copies; i++) {
      last.push_back({0, group->first_piece + i, 1, n_whole, group->n_copies - n_whole, 1, 1});
    }
  }
  std::stable_sort(last.begin(), last.end(), [&](const Run& a, const Run& b) {
    return pieces_[a.first_piece].flops > pieces_[b.first_piece].flops;
  });
  for (Run& run : last) {
    const Piece& piece = pieces_[run.first_piece];
    const double share = left / (UNITS_PER_WORKER * static_cast<double>(workers));
    left -= piece.flops * static_cast<double>(run.n_copies);
    if (piece.parts == 1 && !groups_[piece.group].shares_keys) {
      run.heads_per_task = std::clamp<int64_t>(static_cast<int64_t>(share / piece.flops), 1, kv_heads_);
    }
    const double flops = piece.flops * static_cast<double>(run.heads_per_task);
    run.tasks_per_unit = std::max<int64_t>(1, static_cast<int64_t>(std::min(share, FLOPS_PER_UNIT) / flops));
  }
  runs_.insert(runs_.end(), last.begin(), last.end());
  for (Run& run : runs_) {
    run.first_unit = n_units_;
    n_units_ += (tasks_of(run) + run.tasks_per_unit - 1) / run.tasks_per_unit;
  }
}

}  // namespace

void attention_forward(const AttentionForward& p, const Threads& threads) {
  if (decode_serves(p)) return decode_forward(decode_of(p), threads);
  const Schedule schedule(p, threads);
  const KernelTable& table = kernels();
  const Memory partials = allocate(static_cast<size_t>(schedule.partial_floats()) * sizeof(float));
  struct Context {
    const AttentionForward& p;
    const KernelTable& table;
    const Schedule& schedule;
    float* partials;
    std::vector<Memory> scratch;
    int workers = 1;

    // Each task with the one that this worker takes after it: in another unit, the one that it takes if all workers
    // take turns. That is a guess, and only decides which rows come into the caches.
    void run_unit(int64_t unit, char* memory) {
      std::optional<Schedule::Task> previous;
      schedule.for_tasks(unit, [&](const Schedule::Task& task) {
        if (previous.has_value()) run(*previous, schedule.block_of(p, task), memory);
        previous = task;
      });
      if (unit + workers < schedule.n_units()) {
        run(*previous, schedule.block_of(p, schedule.first_task(unit + workers)), memory);
      } else {
        run(*previous, std::nullopt, memory);
      }
    }

    void run(const Schedule::Task& task, const std::optional<LaneBlock>& next, char* memory) {
      const Piece& piece = *task.piece;
      LaneBlock block = schedule.block_of(p, task);
      const LaneBlock* ahead = next.has_value() ? &*next : nullptr;
      if (piece.parts > 1) block.partial = partial_of(piece, task.copy);
      table.attention_forward(p, block, ahead, memory);
    }

    float* partial_of(const Piece& piece, int64_t copy) const {
      const int64_t floats = (piece.lane_end - piece.lane_begin) * (2 + p.shape.value_dim);
      return partials + piece.partials + (copy * piece.parts + piece.part) * floats;
    }
  } context{p, table, schedule, reinterpret_cast<float*>(partials.get()), {}, 1};
  const int workers = useful_workers(threads, schedule.flops(), schedule.n_units());
  context.workers = workers;
  context.scratch = scratch_for(workers, table.attention_forward_scratch(p.shape, p.spans.n_spans));
  threads.run(
      schedule.n_units(), workers,
      [](int64_t unit, int worker, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        context.run_unit(unit, context.scratch[worker].get());
      },
      &context);
  if (schedule.n_merges() == 0) return;
  // Always in the order of the keys.
  threads.run(
      schedule.n_merges(), workers,
      [](int64_t task, int, void* pointer) {
        auto& context = *static_cast<Context*>(pointer);
        context.schedule.for_merge(task, [&](const Piece& piece, int64_t copy, int64_t lane) {
          const auto end = std::min<int64_t>(lane + MERGED_LANES, piece.lane_end - piece.lane_begin);
          context.table.attention_forward_merge(context.p, context.schedule.block_of(context.p, {&piece, copy, 1}),
                                                context.partial_of(piece, copy), piece.parts, static_cast<int>(lane),
                                                static_cast<int>(end));
        });
      },
      &context);
}

}  // namespace maskops
