// Matrix products into memory that is handed in: operands of any strides, rows of a wider result, whose other columns
// stay as they are, and sums that come near to those in double precision.
#include <cmath>
#include <cstring>
#include <utility>

#include "targets.h"

namespace fuzz {
namespace {

// What Input::floats makes: no float16 that is denormal, and no infinity, unless it is wild.
double number_at(const Value& value, int64_t index) {
  if (value.dtype == DType::float32) return value.data<float>()[index];
  const uint32_t bits = value.data<uint16_t>()[index];
  uint32_t wide = bits << 16;
  if (value.dtype == DType::float16) {
    const uint32_t sign = (bits & 0x8000) << 16;
    wide = (bits & 0x7fff) == 0 ? sign : sign | (((bits & 0x7fff) << 13) + (112u << 23));
  }
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

double number_at(const Value& value, int64_t row, int64_t column) {
  return number_at(value, row * value.strides[0] + column * value.strides[1]);
}

Value matrix(Input& input, int64_t rows, int64_t columns, bool wild) {
  const bool turned = input.once_in(2);
  Value value = input.floats({turned ? columns : rows, turned ? rows : columns}, input.floating(), wild);
  if (turned) {
    std::swap(value.sizes[0], value.sizes[1]);
    std::swap(value.strides[0], value.strides[1]);
  }
  return input.misshapen(value);
}

// Each number near its sum, and nothing written between the rows.
void check_product(const Value& left, const Value& right, const Value& row, const Value& result,
                   const std::vector<float>& before, bool add) {
  const int64_t columns = result.sizes[1], depth = left.sizes[1];
  std::vector<bool> written(before.size());
  for (int64_t i = 0; i < result.sizes[0]; i++) {
    for (int64_t j = 0; j < columns; j++) {
      const int64_t at = i * result.strides[0] + j * result.strides[1];
      written[static_cast<size_t>(at)] = true;
      double sum = add ? before[static_cast<size_t>(at)] : row.numel() != 0 ? number_at(row, j * row.strides[0]) : 0.0;
      double magnitude = std::fabs(sum);
      for (int64_t d = 0; d < depth; d++) {
        const double product = number_at(left, i, d) * number_at(right, d, j);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(result.data<float>()[at] - sum);
      if (!(error <= magnitude * static_cast<double>(depth + 2) * 0x1p-24)) {
        fail("matmul_into: row " + std::to_string(i) + ", column " + std::to_string(j) + " is " +
             std::to_string(result.data<float>()[at]) + " instead of " + std::to_string(sum));
      }
    }
  }
  for (size_t at = 0; at < before.size(); at++) {
    if (!written[at] && std::memcmp(&result.data<float>()[at], &before[at], sizeof(float)) != 0) {
      fail("matmul_into: element " + std::to_string(at) + " between the rows of the result was written");
    }
  }
}

}  // namespace

void fuzz_matmul(Input& input) {
  if (input.once_in(16)) {  // memory alone, for other products
    const auto size = [&] { return input.once_in(4) ? input.hostile(300) : input.length(300); };
    const int64_t rows = size(), columns = size();
    Call empty;
    empty.add(Value::dense({0}, input.floating())).add(rows).add(columns);
    std::vector<Value> made;
    if (empty.run("empty_matrix", 1, made) && made[0].sizes != std::vector<int64_t>{rows, columns}) {
      fail("empty_matrix: another size than was asked for");
    }
  }
  const bool wild = input.once_in(8), add = input.once_in(3);
  const int64_t rows = input.length(200), columns = input.length(300);
  const int64_t depth = input.length(300) * (input.once_in(8) ? 3 : 1);
  const Value left = matrix(input, rows, depth, wild), right = matrix(input, depth, columns, wild);
  Value row = Value::dense({0}, DType::float32);
  if (input.once_in(add ? 16 : 2)) row = input.misshapen(input.floats({columns}, DType::float32, wild));
  const Value result = input.misshapen(input.floats({rows, columns}, DType::float32, wild));
  std::vector<float> before;
  if (result.dtype == DType::float32 && result.elements > 0) {
    before.assign(result.data<float>(), result.data<float>() + result.elements);
  }
  Call call;
  call.add(left).add(right).add(row).add(result).add(add);
  std::vector<Value> results;
  if (!run_twice(input, call, "matmul_into", 0, results, {result})) return;
  if (!wild && rows * columns * depth <= 1 << 20) check_product(left, right, row, result, before, add);
}

}  // namespace fuzz
