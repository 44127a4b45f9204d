// Binding of build_plan on a CUDA device. Shapes are checked here; values stay on the device, where the kernels clamp
// them (maskops.validate() checks them).
#include "../../cuda/plan.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "../../plan_program.h"
#include "tensors.h"

namespace maskops {
namespace {

using Kind = PlanLayout::Kind;

// Shapes of an operand that the kernels rely on.
struct Shape {
  int64_t dim, first, last;
};

Shape shape_of(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return {dim, dim == 0 ? 1 : tensor.size(0), dim == 0 ? 1 : tensor.size(dim - 1)};
}

DevicePlanOperand operand_of(const Tensor& tensor) {
  require(tensor.dim() <= 2, "build_plan: operands have at most two dimensions");
  int64_t running = 1;
  for (int64_t d = tensor.dim(); d-- > 0;) {
    require(tensor.size(d) <= 1 || tensor.numel() == 0 || tensor.stride(d) == running,
            "build_plan: operands must be contiguous");
    running *= tensor.size(d);
  }
  const int64_t rows = shape_of(tensor).first;
  require(rows < plan_longest, "build_plan: an operand is too large");
  switch (tensor.dtype()) {
    case DType::boolean:
    case DType::uint8: return {tensor.data_or_null(), 1, static_cast<int32_t>(rows)};
    case DType::int32: return {tensor.data_or_null(), 4, static_cast<int32_t>(rows)};
    case DType::int64: return {tensor.data_or_null(), 8, static_cast<int32_t>(rows)};
    default: throw std::invalid_argument("build_plan: operands must be bool, uint8, int32 or int64");
  }
}

void check_layout(const PlanLayout& layout, const Tensor* const* operands, int64_t batch, int64_t q_len,
                  int64_t k_len) {
  if (layout.kind == Kind::key_length) {
    require(0 <= layout.length && layout.length <= k_len, "build_plan: the length of the keys is not in [0, k_len]");
    return;
  }
  const Shape shape = shape_of(*operands[layout.operand]);
  const bool fits_batch = shape.dim > 0 && (shape.first == 1 || shape.first == batch);
  switch (layout.kind) {
    case Kind::padding_mask:
    case Kind::key_mask:
      require(shape.dim == 2 && fits_batch && shape.last == k_len, "build_plan: mask must be (batch|1, k_len)");
      break;
    case Kind::cu_seqlens: {
      const Shape keys = shape_of(*operands[layout.key_operand]);
      require(batch == 1 && shape.dim == 1 && keys.dim == 1 && shape.first >= 1 && shape.first == keys.first,
              "build_plan: cu_seqlens must be one packed row");
      break;
    }
    case Kind::ids:
      require((shape.dim == 1 || (shape.dim == 2 && fits_batch)) && shape.last == q_len && q_len == k_len,
              "build_plan: ids must be (q_len) or (batch|1, q_len) with q_len == k_len");
      break;
    default: require(shape.dim == 1 && fits_batch, "build_plan: lengths must have shape (batch|1)");
  }
  const bool is_padding =
      layout.kind == Kind::padding_mask || layout.kind == Kind::padding_left || layout.kind == Kind::padding_right;
  require(!is_padding || q_len == k_len, "build_plan: padding needs q_len == k_len");
}

void check_lengths(int64_t batch, int64_t q_len, int64_t k_len) {
  require(std::min({batch, q_len, k_len}) >= 0 && std::max({batch, q_len, k_len}) < plan_longest,
          "build_plan: a length is negative or too large");
}

// What a plan consists of on every way to it, and the plan's share in p.
struct Lists {
  Tensor start, end, key_valid, tiles, tile_count, key_tiles, order;

  Lists(const Call& call, DevicePlan& p, int64_t batch, int64_t q_len, int64_t k_len, bool grad, bool wants_order) {
    check_lengths(batch, q_len, k_len);
    const int64_t per_batch = tiles_per_batch_element(q_len, k_len), capacity = batch * per_batch, n_spans = p.n_spans;
    require(capacity < INT32_MAX, "build_plan: the batch is too large");
    start = call.empty({n_spans, batch, q_len}, DType::int32);
    end = call.empty({n_spans, batch, q_len}, DType::int32);
    key_valid = call.empty({batch, k_len}, DType::uint8);
    tiles = call.empty({capacity, 4 + 4 * n_spans}, DType::int32);
    tile_count = call.empty({1}, DType::int32);
    key_tiles = grad ? call.empty({n_spans, batch, (k_len + key_tile - 1) / key_tile, 4}, DType::int32)
                     : call.empty({0}, DType::int32);
    order = call.empty({wants_order ? capacity : 0}, DType::int32);
    p.result = {start.data<int32_t>(),
                end.data<int32_t>(),
                key_valid.data<uint8_t>(),
                tiles.data<int32_t>(),
                tile_count.data<int32_t>(),
                grad ? key_tiles.data<int32_t>() : nullptr,
                wants_order && capacity > 0 ? order.data<int32_t>() : nullptr,
                nullptr};
    // Without batch elements there is nothing to write but the count of the work list.
    p.batch = static_cast<int32_t>(std::max<int64_t>(batch, 1));
    p.q_len = static_cast<int32_t>(batch == 0 ? 0 : q_len);
    p.k_len = static_cast<int32_t>(batch == 0 ? 0 : k_len);
    p.per_batch = static_cast<int32_t>(per_batch);
    p.capacity = static_cast<int32_t>(capacity);
    plan_blocks(p);
    require(static_cast<int64_t>(p.batch) * (p.row_blocks + p.key_blocks) < INT32_MAX,
            "build_plan: the batch is too large");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> build_plan(
    const std::string& text, const Tensor& operand0, const Tensor& operand1, const Tensor& operand2,
    const Tensor& operand3, const Tensor& operand4, const Tensor& operand5, int64_t batch, int64_t q_len, int64_t k_len,
    bool grad, bool order, bool wants_positions) {
  const Call call(operand0);
  call.require_here({&operand1, &operand2, &operand3, &operand4, &operand5});
  const PlanProgram program = parse_plan(text);
  const int64_t n_spans = program.n_spans();
  check_lengths(batch, q_len, k_len);
  require(program.layouts.size() <= PLAN_LAYOUTS && program.steps.size() <= PLAN_STEPS && n_spans <= PLAN_SPANS &&
              program.deepest <= PLAN_DEPTH,
          "build_plan: the program is longer than a kernel takes");
  const Tensor* const operands[plan_operands] = {&operand0, &operand1, &operand2, &operand3, &operand4, &operand5};

  DevicePlan p{};
  for (int index = 0; index < plan_operands; index++) p.operands[index] = operand_of(*operands[index]);
  bool is_counted = false;
  for (const PlanLayout& layout : program.layouts) {
    check_layout(layout, operands, batch, q_len, k_len);
    const bool counts = !is_counted && (layout.kind == Kind::ids || layout.kind == Kind::cu_seqlens);
    is_counted = is_counted || counts;
    p.has_holes = p.has_holes || layout.kind == Kind::padding_mask || layout.kind == Kind::key_mask;
    if (layout.kind == Kind::ids && operands[layout.operand]->dim() == 1) p.operands[layout.operand].rows = 1;
    p.layouts[p.n_layouts++] = {layout.kind, std::max(layout.operand, 0), std::max(layout.key_operand, 0),
                                static_cast<int32_t>(layout.length), counts};
  }
  const int64_t farthest = q_len + k_len + 1;
  p.reads_ordinals = wants_positions;
  for (size_t index = 0; index < program.steps.size(); index++) {
    const PlanStep& step = program.steps[index];
    p.steps[index] = {step.op, static_cast<int32_t>(std::clamp(step.value, -farthest, farthest))};
    if (step.op != PlanStep::Op::prefix_of) continue;
    p.steps[index].value = static_cast<int32_t>(step.value);
    p.reads_ordinals = true;
    require(operands[step.value]->dim() <= 1, "build_plan: lengths of a prefix must have at most one dimension");
  }
  for (size_t span = 0; span < program.span_ends.size(); span++) {
    p.span_ends[span] = static_cast<int32_t>(program.span_ends[span]);
  }
  p.n_spans = static_cast<int32_t>(n_spans);

  Lists lists(call, p, batch, q_len, k_len, grad, order);
  Tensor where = wants_positions ? call.empty({3, batch, q_len}, DType::int32) : call.empty({0}, DType::int32);
  if (wants_positions) p.result.positions = where.data<int32_t>();
  const Tensor scratch = call.empty({plan_scratch(p)}, DType::int32);
  p.scratch = scratch.data<int32_t>();
  build_plan_cuda(p, call.stream());
  return {std::move(lists.start),      std::move(lists.end),       std::move(lists.key_valid), std::move(lists.tiles),
          std::move(lists.tile_count), std::move(lists.key_tiles), std::move(lists.order),     std::move(where)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> compile_mask(const Tensor& mask,
                                                                                        int64_t batch, bool grad,
                                                                                        bool order, bool wants_bits) {
  const Call call(mask);
  require(mask.dim() == 4 && mask.dtype() == DType::boolean, "compile_mask: mask must be bool (batch, heads, q, k)");
  require(mask.size(0) == 1 || mask.size(0) == batch, "compile_mask: the mask's batch is neither 1 nor the plan's");
  require(mask.size(1) < plan_longest, "compile_mask: the mask has too many heads");
  const int64_t q_len = mask.size(2), k_len = mask.size(3);
  DevicePlan p{};
  p.n_spans = 1;
  p.is_dense = true;
  p.mask.batch_stride = mask.stride(0);
  p.mask.head_stride = mask.stride(1);
  p.mask.row_stride = mask.stride(2);
  p.mask.key_stride = mask.stride(3);
  p.mask.data = mask.data_or_null<uint8_t>();
  p.mask.batch = static_cast<int32_t>(mask.size(0));
  p.mask.heads = static_cast<int32_t>(mask.size(1));
  p.mask.q_len = static_cast<int32_t>(q_len);
  p.mask.k_len = static_cast<int32_t>(k_len);
  Lists lists(call, p, batch, q_len, k_len, grad, order);
  Tensor bits = wants_bits ? call.empty({mask.size(0), mask.size(1), q_len, (k_len + 31) / 32}, DType::int32)
                           : call.empty({0}, DType::int32);
  p.mask.bits = bits.data_or_null<int32_t>();
  const int64_t own = plan_scratch(p), hulls = plan_hulls(p.mask);
  const Tensor scratch = call.empty({own + hulls + plan_seen(p.mask)}, DType::int32);
  p.scratch = scratch.data<int32_t>();
  p.mask.hulls = p.scratch + own;
  p.mask.seen = p.mask.hulls + hulls;
  build_plan_cuda(p, call.stream());
  return {std::move(lists.start),      std::move(lists.end),       std::move(lists.key_valid), std::move(lists.tiles),
          std::move(lists.tile_count), std::move(lists.key_tiles), std::move(lists.order),     std::move(bits)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&build_plan>("build_plan_cuda");
  library.implement<&compile_mask>("compile_mask_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
