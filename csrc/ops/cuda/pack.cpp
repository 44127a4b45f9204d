// Bindings of packing on a CUDA device. Shapes are checked here; values stay on the device.
#include "../../cuda/pack.h"

#include <tuple>

#include "tensors.h"

namespace maskops {
namespace {

bool is_dense(const Tensor& tensor) {
  int64_t running = 1;
  for (int64_t d = tensor.dim(); d-- > 0;) {
    if (tensor.size(d) > 1 && tensor.stride(d) != running) return false;
    running *= tensor.size(d);
  }
  return true;
}

DeviceMask mask_of(const Tensor& mask) {
  if (mask.dim() != 2) return {nullptr, 1};
  require(is_dense(mask) || mask.numel() == 0, "unpad_index: masks must be contiguous");
  switch (mask.dtype()) {
    case DType::boolean:
    case DType::uint8: return {mask.data_or_null(), 1};
    case DType::int32: return {mask.data_or_null(), 4};
    case DType::int64: return {mask.data_or_null(), 8};
    default: throw std::invalid_argument("unpad_index: masks must be bool, uint8, int32 or int64");
  }
}

std::tuple<Tensor, Tensor, Tensor> unpad_index(const Tensor& real, const Tensor& unused, int64_t capacity) {
  const Call call(real);
  call.require_here({&unused});
  require(real.dim() == 2 && capacity >= 0, "unpad_index: the mask must be (batch, length), the capacity not negative");
  const int64_t batch = real.size(0), length = real.size(1);
  require(unused.dim() != 2 || (unused.size(0) == batch && unused.size(1) == length),
          "unpad_index: both masks must have one shape");
  require(length < INT32_MAX && batch < INT32_MAX, "unpad_index: the mask is too large");
  require(capacity <= INT32_MAX, "unpad_index: cu_seqlens are int32: the capacity must be below 2^31");
  Tensor indices = call.empty({capacity}, DType::int64);
  Tensor cu_seqlens = call.empty({batch + 1}, DType::int32), seqused = call.empty({batch}, DType::int32);
  const Tensor counts = call.empty({batch}, DType::int32);
  unpad_index_cuda({mask_of(real), mask_of(unused), batch, length, capacity, counts.data<int32_t>(),
                    indices.data<int64_t>(), cu_seqlens.data<int32_t>(), seqused.data<int32_t>()},
                   call.stream());
  return {std::move(indices), std::move(cu_seqlens), std::move(seqused)};
}

void check_rows(const Tensor& source, const Tensor& index) {
  require(source.dim() == 2 && source.dtype() == DType::uint8 && is_dense(source),
          "rows must be contiguous bytes (rows, bytes)");
  require(index.dim() == 1 && index.dtype() == DType::int64 && is_dense(index), "indices must be contiguous int64");
}

std::tuple<Tensor> gather_rows(const Tensor& source, const Tensor& index) {
  const Call call(source);
  call.require_here({&index});
  check_rows(source, index);
  Tensor out = call.empty({index.size(0), source.size(1)}, DType::uint8);
  gather_rows_cuda({source.data<uint8_t>(), out.data<uint8_t>(), index.data<int64_t>(), source.size(0), index.size(0),
                    source.size(1)},
                   call.stream());
  return {std::move(out)};
}

std::tuple<Tensor> scatter_rows(const Tensor& source, const Tensor& index, int64_t rows) {
  const Call call(source);
  call.require_here({&index});
  check_rows(source, index);
  require(index.size(0) == source.size(0) && rows >= 0, "scatter_rows: there must be an index for each row");
  Tensor out = call.empty({rows, source.size(1)}, DType::uint8);
  const Tensor inverse = call.empty({rows}, DType::int64);
  scatter_rows_cuda(
      {source.data<uint8_t>(), out.data<uint8_t>(), index.data<int64_t>(), source.size(0), rows, source.size(1)},
      inverse.data<int64_t>(), call.stream());
  return {std::move(out)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&unpad_index>("unpad_index");
  library.implement<&gather_rows>("gather_rows");
  library.implement<&scatter_rows>("scatter_rows");
  return true;
}();

}  // namespace
}  // namespace maskops
