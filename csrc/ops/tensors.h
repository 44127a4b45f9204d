// What the bindings of all operators share: checks, threads, and new tensors. A file beside this one takes an operator
// from tensors to plain parameters to its kernel and registers it; the schemas are defined in Python, in
// registration.py of each operator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../attention.h"
#include "../cpu/threads.h"
#include "../element.h"
#include "../torch_abi.h"

namespace maskops {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Threads torch_threads() {
  uint32_t count = 1;
  MASKOPS_CHECK_TORCH(torch_get_num_threads(&count));
  return {&run_tasks, static_cast<int>(count)};
}

template <class Any>
Element element_of(const Any& tensor) {
  switch (tensor.dtype()) {
    case DType::float32: return Element::float32;
    case DType::bfloat16: return Element::bfloat16;
    case DType::float16: return Element::float16;
    default: throw std::invalid_argument("maskops: the kernels take float32, bfloat16 and float16");
  }
}

inline StridedRows rows_of(const Tensor& tensor) {
  return {tensor.data(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Sizes and strides of a dense tensor like one of four dimensions, but for the last size, in its order of dimensions.
// The twin of output_strides in registration.py, which the fake kernels use.
inline void dense_in_order_of(const int64_t* sizes, const int64_t* strides, int64_t width, int64_t (&new_sizes)[4],
                              int64_t (&new_strides)[4]) {
  int order[3] = {0, 1, 2};
  auto key = [&](int d) { return strides[d] == 0 ? INT64_MAX : strides[d]; };
  std::stable_sort(order, order + 3, [&](int a, int b) { return key(a) > key(b); });
  std::copy_n(sizes, 3, new_sizes);
  new_sizes[3] = width;
  new_strides[3] = 1;
  int64_t running = std::max<int64_t>(width, 1);
  for (int i = 3; i-- > 0;) {
    new_strides[order[i]] = running;
    running *= std::max<int64_t>(sizes[order[i]], 1);
  }
}

inline Tensor empty_in_order_of(const Tensor& like, int64_t width) {
  int64_t sizes[4], strides[4];
  dense_in_order_of(like.sizes(), like.strides(), width, sizes, strides);
  return Tensor::empty_strided(4, sizes, strides, like.dtype(), like.place());
}

// Without elements any stride will do; torch's contiguous() leaves it as it is.
template <class Any>
bool last_is_contiguous(const Any& tensor) {
  return tensor.numel() == 0 || tensor.size(3) <= 1 || tensor.stride(3) == 1;
}

}  // namespace maskops
