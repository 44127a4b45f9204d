// Element types on the device, and loads of 16 bytes.
#pragma once

#include "../element.h"
#include "launch.h"

namespace maskops {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// As many elements as 16 bytes hold.
template <class T>
struct alignas(16) Sixteen {
  static constexpr int N = 16 / sizeof(T);
  T values[N];
};

template <class T>
__device__ inline Sixteen<T> load_sixteen(const T* at) {
  union {
    uint4 words;
    Sixteen<T> elements;
  } both;
  both.words = __ldg(reinterpret_cast<const uint4*>(at));
  return both.elements;
}

// Runs body with a value of the type of an element.
template <class Body>
void with_element(Element element, Body body) {
  switch (element) {
    case Element::float32: return body(float{});
    case Element::bfloat16: return body(__nv_bfloat16{});
    case Element::float16: return body(__half{});
  }
}

}  // namespace maskops
