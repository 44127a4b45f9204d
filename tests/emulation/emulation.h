// The part of CUDA that csrc/cuda uses, as host code: for tests of the kernels' logic where there is no device.
//
// The threads of a block are fibres of one host thread. Each runs until it waits (for a barrier, for the lanes of its
// warp), then another one does, in an order that changes from pass to pass and from block to block: a barrier that is
// missing shows as a value that is not there yet, or not there any more. Memory that a block shares holds NaN at first.
// It is an error when a barrier or a lane of a warp's exchange is not reached by all, when threads meet at different
// barriers, and when a block writes past the shared memory that it asked for. What only a device shows (accesses that
// race between two barriers in a way that no order of whole stretches does, alignment, the scheduling of blocks) does
// not show here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int WARP = 32;

struct Index {
  unsigned x, y, z;
};

// Of the thread that runs.
extern Index thread_index, block_index;
extern dim3 block_size, grid_size;
extern int64_t launches;  // in this process

// The values that the lanes of a warp left at an exchange, 8 bytes each.
using Lanes = uint64_t[WARP];

const Lanes& exchange(uint32_t mask, uint64_t value, int line);
int lane();
// Returns the sum of `value` over the threads of the block.
int barrier(int value, int line);
// The bytes that this block shares under a key: the same for all its threads, NaN at first.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_memory();
[[noreturn]] void fail(const char* what, int line);

void run_grid(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of a lane of the same segment of `width` lanes; that of a lane outside of the mask is nobody's: NaN.
template <class T>
T shuffle(uint32_t mask, T value, int source, int line) {
  const Lanes& lanes = exchange(mask, bits_of(value), line);
  return value_of<T>((mask >> (source & 31)) & 1 ? lanes[source & 31] : ~uint64_t{0});
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)
constexpr int warpSize = emulation::WARP;

// A place in the code is a key: of one variable of one kernel, in each of its instantiations.
#define MASKOPS_SHARED(type, name, ...) \
  using name##_type = type __VA_ARGS__; \
  static const char name##_key = 0;     \
  name##_type& name = *static_cast<name##_type*>(::emulation::shared_memory(&name##_key, sizeof(name##_type)))
#define MASKOPS_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::emulation::dynamic_memory())

// ---- what a launch asks of the runtime
// ----------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
// What a kernel shares is known only when it runs; run_grid holds it and what a launch asks for to the limit together.
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a launch throws what it has to say
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// ---- barriers and exchanges ----------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emulation::barrier(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulation::barrier(predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return emulation::barrier(predicate == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulation::exchange(mask, 0, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int base = emulation::lane() & -width;
  return emulation::shuffle(mask, value, base | (source & (width - 1)), line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < (lane & -width) ? lane : source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), source = lane ^ lanes;
  return emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const emulation::Lanes& lanes = emulation::exchange(mask, predicate != 0, line);
  unsigned votes = 0;
  for (int i = 0; i < emulation::WARP; i++) votes |= (mask >> i & 1) != 0 && lanes[i] == 1 ? 1u << i : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate == 0, line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  const uint64_t mine = emulation::bits_of(value);
  const emulation::Lanes& lanes = emulation::exchange(mask, mine, line);
  unsigned votes = 0;
  for (int i = 0; i < emulation::WARP; i++) votes |= (mask >> i & 1) != 0 && lanes[i] == mine ? 1u << i : 0u;
  return votes;
}
template <class T, class Combine>
T reduce_lanes(unsigned mask, T value, Combine combine, int line) {
  const emulation::Lanes& lanes = emulation::exchange(mask, emulation::bits_of(value), line);
  for (int i = 0; i < emulation::WARP; i++) {
    if ((mask >> i & 1) != 0 && i != emulation::lane()) value = combine(value, emulation::value_of<T>(lanes[i]));
  }
  return value;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return reduce_lanes(mask, value, [](T a, T b) { return a + b; }, line);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return reduce_lanes(mask, value, [](T a, T b) { return std::min(a, b); }, line);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return reduce_lanes(mask, value, [](T a, T b) { return std::max(a, b); }, line);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

// ---- atomics: nothing runs beside a fibre
// ----------------------------------------------------------------------------

template <class T, class U>
T atomicAdd(T* at, U value) {
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const T old = *at;
  *at = std::max<T>(old, value);
  return old;
}
template <class T, class U>
T atomicMin(T* at, U value) {
  const T old = *at;
  *at = std::min<T>(old, value);
  return old;
}
template <class T, class U>
T atomicOr(T* at, U value) {
  const T old = *at;
  *at = old | static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicAnd(T* at, U value) {
  const T old = *at;
  *at = old & static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicExch(T* at, U value) {
  const T old = *at;
  *at = static_cast<T>(value);
  return old;
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V value) {
  const T old = *at;
  if (old == static_cast<T>(expected)) *at = static_cast<T>(value);
  return old;
}

// ---- loads, vectors
// ---------------------------------------------------------------------------------------------------

#define MASKOPS_EMULATED_VECTOR(scalar, name)                                                       \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                      \
  struct name##3 { scalar x, y, z; };                                                               \
  struct alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
MASKOPS_EMULATED_VECTOR(float, float)
MASKOPS_EMULATED_VECTOR(int, int)
MASKOPS_EMULATED_VECTOR(unsigned, uint)
MASKOPS_EMULATED_VECTOR(short, short)
MASKOPS_EMULATED_VECTOR(unsigned short, ushort)
MASKOPS_EMULATED_VECTOR(signed char, char)
MASKOPS_EMULATED_VECTOR(unsigned char, uchar)
MASKOPS_EMULATED_VECTOR(long long, longlong)
#undef MASKOPS_EMULATED_VECTOR

// A device refuses an address that is not a multiple of the size; the processor would not.
template <class T>
const T* aligned(const T* at, int line) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) emulation::fail("an address is not aligned", line);
  return at;
}
template <class T>
T __ldg(const T* at, int line = __builtin_LINE()) {
  return *aligned(at, line);
}
template <class T>
T __ldcs(const T* at, int line = __builtin_LINE()) {
  return *aligned(at, line);
}
template <class T>
T __ldcg(const T* at, int line = __builtin_LINE()) {
  return *aligned(at, line);
}
template <class T>
void __stcs(T* at, T value, int line = __builtin_LINE()) {
  *const_cast<T*>(aligned(static_cast<const T*>(at), line)) = value;
}
template <class T>
void __stcg(T* at, T value, int line = __builtin_LINE()) {
  *const_cast<T*>(aligned(static_cast<const T*>(at), line)) = value;
}

// ---- numbers
// ----------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int b) { return a > b ? a : b; }
inline int64_t min(int a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int a, int64_t b) { return a > b ? a : b; }

inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float_as_int(float x) { return emulation::value_of<int>(emulation::bits_of(x)); }
inline unsigned __float_as_uint(float x) { return emulation::value_of<unsigned>(emulation::bits_of(x)); }
inline float __int_as_float(int x) { return emulation::value_of<float>(emulation::bits_of(x)); }
inline float __uint_as_float(unsigned x) { return emulation::value_of<float>(emulation::bits_of(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float __half2float(__half x) {
  return static_cast<float>(emulation::value_of<_Float16>(emulation::bits_of(x.bits)));
}
inline __half __float2half_rn(float x) {
  return {emulation::value_of<uint16_t>(emulation::bits_of(static_cast<_Float16>(x)))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
