// Binding of build_plan.
#include "../plan.h"

#include <string>
#include <tuple>

#include "../plan_program.h"
#include "tensors.h"

namespace maskops {
namespace {

PlanOperand plan_operand(const Tensor& tensor) {
  PlanOperand operand{tensor.data(), IntegerType::int32, tensor.dim(), {0, 0}};
  require(operand.dim <= 2, "build_plan: operands have at most two dimensions");
  int64_t running = 1;
  for (int64_t d = operand.dim; d-- > 0;) {
    operand.sizes[d] = tensor.size(d);
    require(operand.sizes[d] <= 1 || tensor.numel() == 0 || tensor.stride(d) == running,
            "build_plan: operands must be contiguous");
    running *= operand.sizes[d];
  }
  switch (tensor.dtype()) {
    case DType::boolean: operand.type = IntegerType::boolean; break;
    case DType::uint8: operand.type = IntegerType::uint8; break;
    case DType::int32: operand.type = IntegerType::int32; break;
    case DType::int64: operand.type = IntegerType::int64; break;
    default: throw std::invalid_argument("build_plan: operands must be bool, uint8, int32 or int64");
  }
  return operand;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> build_plan_cpu(
    const std::string& program, const Tensor& operand0, const Tensor& operand1, const Tensor& operand2,
    const Tensor& operand3, const Tensor& operand4, const Tensor& operand5, int64_t batch, int64_t q_len, int64_t k_len,
    bool grad, bool order, bool positions) {
  PlanRequest request{parse_plan(program), {}, batch, q_len, k_len};
  const Tensor* operands[plan_operands] = {&operand0, &operand1, &operand2, &operand3, &operand4, &operand5};
  for (int index = 0; index < plan_operands; index++) request.operands[index] = plan_operand(*operands[index]);
  check_plan(request);
  const int64_t n_spans = request.program.n_spans();
  Tensor start = Tensor::empty({n_spans, batch, q_len}, DType::int32);
  Tensor end = Tensor::empty({n_spans, batch, q_len}, DType::int32);
  Tensor key_valid = Tensor::empty({batch, k_len}, DType::uint8);
  const int64_t capacity = batch * tiles_per_batch_element(q_len, k_len);
  Tensor tiles = Tensor::empty({capacity, 4 + 4 * n_spans}, DType::int32);
  Tensor tile_count = Tensor::empty({1}, DType::int32);
  Tensor key_tiles = grad ? Tensor::empty({n_spans, batch, (k_len + key_tile - 1) / key_tile, 4}, DType::int32)
                          : Tensor::empty({0}, DType::int32);
  Tensor by_cost = Tensor::empty({order ? capacity : 0}, DType::int32);
  Tensor where = positions ? Tensor::empty({3, batch, q_len}, DType::int32) : Tensor::empty({0}, DType::int32);
  build_plan(request, {start.data<int32_t>(), end.data<int32_t>(), key_valid.data<uint8_t>(), tiles.data<int32_t>(),
                       tile_count.data<int32_t>(), grad ? key_tiles.data<int32_t>() : nullptr,
                       order ? by_cost.data<int32_t>() : nullptr, positions ? where.data<int32_t>() : nullptr});
  return {std::move(start),      std::move(end),       std::move(key_valid), std::move(tiles),
          std::move(tile_count), std::move(key_tiles), std::move(by_cost),   std::move(where)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&build_plan_cpu>("build_plan");
  return true;
}();

}  // namespace
}  // namespace maskops
