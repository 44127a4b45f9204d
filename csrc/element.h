// Element types of tensors that kernels read and write.
#pragma once

#include <cstdint>

namespace maskops {

enum class Element : int32_t { float32, bfloat16, float16 };

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

}  // namespace maskops
