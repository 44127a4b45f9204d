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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> build_plan(
    const std::string& text, const Tensor& operand0, const Tensor& operand1, const Tensor& operand2,
    const Tensor& operand3, const Tensor& operand4, const Tensor& operand5, int64_t batch, int64_t q_len, int64_t k_len,
    bool grad, bool order, bool wants_positions) {
  const Call call(operand0);
  call.require_here({&operand1, &operand2, &operand3, &operand4, &operand5});
  const PlanProgram program = parse_plan(text);
  const int64_t n_spans = program.n_spans();
  require(std::min({batch, q_len, k_len}) >= 0 && std::max({batch, q_len, k_len}) < plan_longest,
          "build_plan: a length is negative or too large");
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

  const int64_t per_batch = tiles_per_batch_element(q_len, k_len), capacity = batch * per_batch;
  require(capacity < INT32_MAX, "build_plan: the batch is too large");
  Tensor start = call.empty({n_spans, batch, q_len}, DType::int32);
  Tensor end = call.empty({n_spans, batch, q_len}, DType::int32);
  Tensor key_valid = call.empty({batch, k_len}, DType::uint8);
  Tensor tiles = call.empty({capacity, 4 + 4 * n_spans}, DType::int32);
  Tensor tile_count = call.empty({1}, DType::int32);
  Tensor key_tiles = grad ? call.empty({n_spans, batch, (k_len + key_tile - 1) / key_tile, 4}, DType::int32)
                          : call.empty({0}, DType::int32);
  Tensor by_cost = call.empty({order ? capacity : 0}, DType::int32);
  Tensor where = wants_positions ? call.empty({3, batch, q_len}, DType::int32) : call.empty({0}, DType::int32);
  p.result = {start.data<int32_t>(),
              end.data<int32_t>(),
              key_valid.data<uint8_t>(),
              tiles.data<int32_t>(),
              tile_count.data<int32_t>(),
              grad ? key_tiles.data<int32_t>() : nullptr,
              order && capacity > 0 ? by_cost.data<int32_t>() : nullptr,
              wants_positions ? where.data<int32_t>() : nullptr};
  // Without batch elements there is nothing to write but the count of the work list.
  p.batch = static_cast<int32_t>(std::max<int64_t>(batch, 1));
  p.q_len = static_cast<int32_t>(batch == 0 ? 0 : q_len);
  p.k_len = static_cast<int32_t>(batch == 0 ? 0 : k_len);
  p.per_batch = static_cast<int32_t>(per_batch);
  p.capacity = static_cast<int32_t>(capacity);
  plan_blocks(p);
  require(static_cast<int64_t>(p.batch) * p.n_blocks < INT32_MAX, "build_plan: the batch is too large");
  const Tensor scratch = call.empty({plan_scratch(p)}, DType::int32);
  p.scratch = scratch.data<int32_t>();
  build_plan_cuda(p, call.stream());
  return {std::move(start),      std::move(end),       std::move(key_valid), std::move(tiles),
          std::move(tile_count), std::move(key_tiles), std::move(by_cost),   std::move(where)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&build_plan>("build_plan_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
