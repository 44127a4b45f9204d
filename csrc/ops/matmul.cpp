// Binding of matrix products.
#include "../cpu/matmul.h"

#include <cstring>
#include <string>
#include <tuple>

#include "../cpu/memory.h"
#include "tensors.h"

namespace maskops {
namespace {

Matrix matrix_of(const Tensor& x) { return {x.data(), element_of(x), x.stride(0), x.stride(1)}; }

// Tiles of the result are written while operands are still read.
void require_apart(const Tensor& result, const Tensor& operand, const char* name) {
  if (operand.numel() == 0) return;
  const auto end = [](const Tensor& x) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); d++) last += (x.size(d) - 1) * x.stride(d);
    return x.data<const char>() + (last + 1) * bytes_of(x.dtype());
  };
  if (end(result) <= operand.data<const char>() || end(operand) <= result.data<const char>()) return;
  throw std::invalid_argument(std::string("matmul: result must lie in memory apart from that of ") + name +
                              ", which is read until the end; pass a copy of " + name + " or another result");
}

// result (M, N) float32, its columns contiguous: left (M, K) @ right (K, N), of any strides and of float32, bfloat16 or
// float16 each, plus `start`: what the result holds (add), a row (N,), or nothing where that is empty.
void matmul_into_cpu(const Tensor& left, const Tensor& right, const Tensor& row, const Tensor& result, bool add) {
  require(left.dim() == 2 && right.dim() == 2 && result.dim() == 2 && left.size(1) == right.size(0) &&
              result.size(0) == left.size(0) && result.size(1) == right.size(1),
          "matmul: left, right and result must be (M, K), (K, N) and (M, N)");
  const int64_t rows = result.size(0), columns = result.size(1), stride = rows > 1 ? result.stride(0) : columns;
  require(result.dtype() == DType::float32 && (columns <= 1 || result.stride(1) == 1) && stride >= columns,
          "matmul: result must be float32 with contiguous columns");
  const bool starts = row.numel() != 0;
  require(!starts || (!add && row.dtype() == DType::float32 && row.dim() == 1 && row.size(0) == columns &&
                      (columns <= 1 || row.stride(0) == 1)),
          "matmul: a row to start from must be float32 and have a value for every column");
  if (rows == 0 || columns == 0) return;
  require_apart(result, left, "left");
  require_apart(result, right, "right");
  require_apart(result, row, "row");
  auto* to = result.data<float>();
  const float* start = add ? to : starts ? row.data<float>() : nullptr;
  if (left.size(1) == 0) {
    for (int64_t i = 0; i < rows && !add; i++) {
      const auto bytes = static_cast<size_t>(columns) * sizeof(float);
      starts ? std::memcpy(to + i * stride, start, bytes) : std::memset(to + i * stride, 0, bytes);
    }
    return;
  }
  // What is written first may be memory that nobody touched: gradients and logits are torch's tensors.
  const auto bytes = static_cast<size_t>(rows * columns) * sizeof(float);
  if (!add && stride == columns && bytes >= LARGE_BYTES) advise_huge_pages(to, bytes);
  matmul({matrix_of(left), matrix_of(right), start, add ? stride : 0, to, stride, rows, columns, left.size(1)},
         torch_threads());
}

// A matrix without gaps, of the dtype of `like`, whose contents are anything, in memory that is kept for the next one.
std::tuple<Tensor> empty_matrix_cpu(const Tensor& like, int64_t rows, int64_t columns) {
  require(rows >= 0 && columns >= 0, "matmul: a matrix must have 0 or more rows and columns");
  return {Tensor::empty({rows, columns}, like.dtype())};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&matmul_into_cpu>("matmul_into");
  library.implement<&empty_matrix_cpu>("empty_matrix");
  return true;
}();

}  // namespace
}  // namespace maskops
