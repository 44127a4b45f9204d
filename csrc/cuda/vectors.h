// Rows of float, bfloat16 and float16 in memory, sixteen bytes at a time wherever addresses allow it.
#pragma once

#include "elements.h"

namespace maskops {

template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <class T>
union Vector {
  uint4 bits;
  T elements[VECTOR<T>];
  uint32_t words[4];
  __device__ __forceinline__ Vector() {}
};

template <class T>
__device__ __forceinline__ void unpack(const Vector<T>& vector, float (&values)[VECTOR<T>]) {
#pragma unroll
  for (int j = 0; j < VECTOR<T>; j++) values[j] = to_float(vector.elements[j]);
}

// Two values to one word, which is one instruction where the processor has it.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  Vector<__nv_bfloat16> both;
  both.elements[0] = __float2bfloat16_rn(low);
  both.elements[1] = __float2bfloat16_rn(high);
  return both.words[0];
#endif
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  Vector<__half> both;
  both.elements[0] = __float2half_rn(low);
  both.elements[1] = __float2half_rn(high);
  return both.words[0];
#endif
}

template <class T>
__device__ __forceinline__ Vector<T> pack(const float (&values)[VECTOR<T>]) {
  Vector<T> vector;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < VECTOR<T>; j++) vector.elements[j] = values[j];
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) vector.words[j] = pack_two<T>(values[2 * j], values[2 * j + 1]);
  }
  return vector;
}

template <class T>
__device__ __forceinline__ Vector<T> load_aligned(const T* p) {
  Vector<T> vector;
  vector.bits = *reinterpret_cast<const uint4*>(p);
  return vector;
}

// Through an intrinsic: of an assignment the compiler makes four stores of a word each in some of the kernels.
template <class T>
__device__ __forceinline__ void store_aligned(T* p, const Vector<T>& vector) {
  __stcg(reinterpret_cast<uint4*>(p), vector.bits);
}

// The elements before p in the 16 aligned bytes that hold it.
template <class T>
__device__ __forceinline__ int phase_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The elements [at, at + VECTOR) of a row of `count`; those outside of it are `fill`, and nothing outside of it is
// read. Where the address is not aligned, the two aligned vectors that hold the elements are loaded and shifted.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t count, int64_t at, float fill) {
  constexpr int N = VECTOR<T>;
  const int phase = phase_of(row + at);
  if (phase == 0 && at >= 0 && at + N <= count) return load_aligned(row + at);
  if (at - phase >= 0 && at - phase + 2 * N <= count) {
    const Vector<T> low = load_aligned(row + at - phase), high = load_aligned(row + at - phase + N);
    uint32_t words[8];
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = low.words[j], words[j + 4] = high.words[j];
    const int bytes = phase * static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < 6; j++) words[j] = bytes & 8 ? words[j + 2] : words[j];
#pragma unroll
    for (int j = 0; j < 5; j++) words[j] = bytes & 4 ? words[j + 1] : words[j];
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      vector.words[j] = bytes & 2 ? words[j] >> 16 | words[j + 1] << 16 : words[j];
    }
    return vector;
  }
  Vector<T> vector;
#pragma unroll
  for (int j = 0; j < N; j++) vector.elements[j] = at + j >= 0 && at + j < count ? row[at + j] : from_float<T>(fill);
  return vector;
}

// The same of N elements of a type of their own, as float.
template <int N, class T>
__device__ __forceinline__ void load_floats(const T* row, int64_t count, int64_t at, float fill, float (&values)[N]) {
  if constexpr (VECTOR<T> <= N) {
#pragma unroll
    for (int part = 0; part < N; part += VECTOR<T>) {
      const Vector<T> vector = load_vector(row, count, at + part, fill);
#pragma unroll
      for (int j = 0; j < VECTOR<T>; j++) values[part + j] = to_float(vector.elements[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) values[j] = at + j >= 0 && at + j < count ? to_float(row[at + j]) : fill;
  }
}
template <int N>
__device__ __forceinline__ void load_floats(const void* row, Element element, int64_t count, int64_t at, float fill,
                                            float (&values)[N]) {
  switch (element) {
    case Element::float32: return load_floats<N>(static_cast<const float*>(row), count, at, fill, values);
    case Element::bfloat16: return load_floats<N>(static_cast<const __nv_bfloat16*>(row), count, at, fill, values);
    case Element::float16: return load_floats<N>(static_cast<const __half*>(row), count, at, fill, values);
  }
}

// Those of the N elements from `at` on that lie in the row. Wide where the address is aligned.
template <int N, class T>
__device__ __forceinline__ void store_floats(T* row, int64_t count, int64_t at, const float (&values)[N]) {
  constexpr int WIDTH = VECTOR<T> < N ? VECTOR<T> : N;
#pragma unroll
  for (int part = 0; part < N; part += WIDTH) {
    float some[VECTOR<T>] = {};
#pragma unroll
    for (int j = 0; j < WIDTH; j++) some[j] = values[part + j];
    const int64_t first = at + part;
    if (WIDTH == VECTOR<T> && first >= 0 && first + WIDTH <= count && phase_of(row + first) == 0) {
      store_aligned(row + first, pack<T>(some));
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; j++)
        if (first + j >= 0 && first + j < count) row[first + j] = from_float<T>(some[j]);
    }
  }
}
template <int N>
__device__ __forceinline__ void store_floats(void* row, Element element, int64_t count, int64_t at,
                                             const float (&values)[N]) {
  switch (element) {
    case Element::float32: return store_floats<N>(static_cast<float*>(row), count, at, values);
    case Element::bfloat16: return store_floats<N>(static_cast<__nv_bfloat16*>(row), count, at, values);
    case Element::float16: return store_floats<N>(static_cast<__half*>(row), count, at, values);
  }
}

__device__ __forceinline__ float element_at(const void* row, Element element, int64_t at) {
  switch (element) {
    case Element::float32: return static_cast<const float*>(row)[at];
    case Element::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(row)[at]);
    case Element::float16: return to_float(static_cast<const __half*>(row)[at]);
  }
  return 0.0f;
}

}  // namespace maskops
