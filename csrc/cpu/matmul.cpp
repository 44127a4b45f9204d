// The schedule of matrix products: slabs of both operands are packed, then multiplied, each by all threads.
#include "matmul.h"

#include <algorithm>

#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

constexpr int64_t PACKED_FLOATS = 1 << 20;  // of either operand at once: both stay in the last cache
constexpr int64_t PACKED_PANELS = 8;        // a task packs: what lies side by side is read in one go
constexpr int64_t BLOCK_COLUMNS = 256;      // of a task: over a part of the depth they stay in the second cache
constexpr int64_t BLOCK_ROWS = 192;         // at most, fewer where threads would be idle
constexpr int64_t TASKS_PER_WORKER = 4;
constexpr double FLOPS_PER_WORKER = 2e6;  // waking a thread pays off for this much
constexpr int64_t SPACING = 16;           // floats between panels, so that they do not all begin in one set of a cache

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct Slabs {
  int64_t rows, columns, depth;  // of a slab: whole panels and parts of the depth
};

Slabs slabs_of(const Matmul& p, const KernelTable& table) {
  const auto fit = [](int64_t size, int64_t unit, int64_t most) {
    return std::min(parts(size, unit), std::max<int64_t>(1, most / unit)) * unit;
  };
  Slabs slabs;
  // The shorter operand is packed once for a part of the depth, as much of it as there is room for.
  const int64_t panel = std::max(table.matmul_rows, table.matmul_columns);
  slabs.depth = fit(p.depth, table.matmul_depth, PACKED_FLOATS / std::max(panel, std::min(p.rows, p.columns)));
  slabs.rows = fit(p.rows, table.matmul_rows, PACKED_FLOATS / slabs.depth);
  slabs.columns = fit(p.columns, table.matmul_columns, PACKED_FLOATS / slabs.depth);
  return slabs;
}

// Huge pages are not for small products, which would clear one for a few numbers.
Memory allocate_of(int64_t floats) {
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  return bytes < (size_t{1} << 20) ? allocate(bytes) : allocate_huge(bytes);
}

// One operand's slab, and how it is packed.
struct Operand {
  void (*pack)(const Matmul&, const MatmulPanels&);
  int64_t width, size;  // of a panel, of the operand
  Memory memory;
  MatmulPanels slab;

  Operand(void (*pack)(const Matmul&, const MatmulPanels&), int64_t width, int64_t size, int64_t slab_size,
          int64_t slab_depth)
      : pack(pack),
        width(width),
        size(size),
        memory(allocate_of(parts(slab_size, width) * (slab_depth * width + SPACING))),
        slab{-1, 0, 0, -1, 0, 0, reinterpret_cast<float*>(memory.get()), slab_depth * width + SPACING} {}

  // Moves to another slab; the number of groups of panels that have to be packed for it, none where it is the same.
  int64_t move(int64_t origin, int64_t end, int64_t depth_begin, int64_t depth_end) {
    if (slab.origin == origin && slab.slab_begin == depth_begin) return 0;
    slab.origin = origin;
    slab.panel_end = parts(end - origin, width);
    slab.slab_begin = slab.depth_begin = depth_begin;
    slab.depth_end = depth_end;
    return parts(slab.panel_end, PACKED_PANELS);
  }
  void pack_group(const Matmul& p, int64_t group, int64_t depth_begin, int64_t depth_end) const {
    MatmulPanels panels = slab;
    panels.panel_begin = group * PACKED_PANELS;
    panels.panel_end = std::min(panels.panel_begin + PACKED_PANELS, slab.panel_end);
    panels.depth_begin = depth_begin;
    panels.depth_end = depth_end;
    pack(p, panels);
  }
};

template <class Run>
void run(int64_t n_tasks, const Threads& threads, const Run& body) {
  const auto fn = [](int64_t task, int, void* context) { (*static_cast<const Run*>(context))(task); };
  threads.run(n_tasks, threads.count, fn, const_cast<Run*>(&body));
}

void pack(const Matmul& p, const KernelTable& table, const Operand& left, int64_t left_groups, const Operand& right,
          int64_t right_groups, const Threads& threads) {
  const int64_t begin = left.slab.depth_begin, end = left.slab.depth_end, groups = left_groups + right_groups;
  run(groups * parts(end - begin, table.matmul_depth), threads, [&](int64_t task) {
    const int64_t group = task % groups, from = begin + task / groups * table.matmul_depth;
    const int64_t to = std::min(from + table.matmul_depth, end);
    if (group < left_groups) {
      left.pack_group(p, group, from, to);
    } else {
      right.pack_group(p, group - left_groups, from, to);
    }
  });
}

void multiply(const Matmul& p, const KernelTable& table, const Operand& left, const Operand& right,
              const Threads& threads) {
  const int64_t across = std::max<int64_t>(1, BLOCK_COLUMNS / right.width);
  const int64_t n_across = parts(right.slab.panel_end, across);
  const int64_t wanted = parts(TASKS_PER_WORKER * threads.count, n_across);
  const int64_t down = std::clamp<int64_t>(parts(left.slab.panel_end, wanted), 1, BLOCK_ROWS / left.width);
  const int64_t n_down = parts(left.slab.panel_end, down);
  run(n_across * n_down, threads, [&](int64_t task) {
    const int64_t i = task % n_down * down, j = task / n_down * across;
    table.matmul_block(p, {&left.slab, &right.slab, i, std::min(i + down, left.slab.panel_end), j,
                           std::min(j + across, right.slab.panel_end)});
  });
}

}  // namespace

void matmul(const Matmul& p, const Threads& all) {
  const double flops =
      2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const Threads threads{all.run, static_cast<int>(std::min<double>(all.count, 1 + flops / FLOPS_PER_WORKER))};
  const KernelTable& table = kernels();
  const Slabs slabs = slabs_of(p, table);
  Operand left(table.matmul_pack_left, table.matmul_rows, p.rows, slabs.rows, slabs.depth);
  Operand right(table.matmul_pack_right, table.matmul_columns, p.columns, slabs.columns, slabs.depth);
  for (int64_t k = 0; k < p.depth; k += slabs.depth) {
    const int64_t depth_end = std::min(k + slabs.depth, p.depth);
    for (int64_t j = 0; j < p.columns; j += slabs.columns) {
      for (int64_t i = 0; i < p.rows; i += slabs.rows) {
        const int64_t left_groups = left.move(i, std::min(i + slabs.rows, p.rows), k, depth_end);
        const int64_t right_groups = right.move(j, std::min(j + slabs.columns, p.columns), k, depth_end);
        pack(p, table, left, left_groups, right, right_groups, threads);
        multiply(p, table, left, right, threads);
      }
    }
  }
}

}  // namespace maskops
