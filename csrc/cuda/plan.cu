// build_plan in two launches, by the algorithm of maskops/ops/plan/triton_kernels (told there): a thread has a row. A
// dense mask takes a third one before them, which reads it.
#include "plan_block.cuh"

namespace maskops {

using namespace plan_kernels;

void plan_blocks(DevicePlan& p) {
  // Rows and keys are shared out apart: a few queries over many keys are one block of rows.
  p.window = p.q_len <= ROWS ? 2 * ROWS : WINDOW;
  const int own = own_rows(p);
  p.row_blocks = max(1, (p.q_len + own - 1) / own);
  p.key_blocks = (p.k_len + p.window - 1) / p.window;
  p.mask.words = (p.mask.k_len + 31) / 32;
  p.mask.row_groups = (p.mask.q_len + MASK_ROWS - 1) / MASK_ROWS;
  p.mask.key_groups = (p.mask.k_len + MASK_KEYS - 1) / MASK_KEYS;
}

int64_t plan_scratch(const DevicePlan& p) {
  const int64_t holes = p.has_holes ? blocks_of_keys(p) * holes_width(p) : 0;
  return sort_size(p) + 3 * rows_of(p) + 4 * run_plane(p) + p.n_spans * blocks_of_rows(p) * SUMMARY + holes;
}

int64_t plan_hulls(const DevicePlanMask& mask) {
  return 2 * static_cast<int64_t>(mask.batch) * mask.key_groups * mask.q_len;
}

int64_t plan_seen(const DevicePlanMask& mask) {
  return static_cast<int64_t>(mask.batch) * mask.row_groups * mask.words;
}

void build_plan_cuda(const DevicePlan& p, void* stream) {
  if (p.is_dense) launch_mask(p.mask, stream);
  launch_rows(p, stream);
  launch_lists(p, stream);
}

}  // namespace maskops
