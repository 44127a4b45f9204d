// A thin layer over the vector extensions of GCC and Clang: one source, any vector width. Included inside the namespace
// of an instruction set with VECTOR_BYTES defined, so it has no include guard and includes nothing.

#define ALWAYS_INLINE inline __attribute__((always_inline))
// Micro-kernels stay functions of their own: inlined into a driver, GCC 12 spills an accumulator or refolds loads into
// the multiplications and loses up to half of the speed.
#define NO_INLINE __attribute__((noinline))

typedef float vf __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES), may_alias));  // wraps around, compares without a sign
typedef float vf_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_halves __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));  // pairs of bfloat16
constexpr int W = VECTOR_BYTES / 4;                                                           // lanes

// Pins a loaded vector in a register, so that the compiler does not load it again in every use.
#if defined(__aarch64__)
#define KEEP_IN_REGISTER(v) asm("" : "+w"(v))
#elif VECTOR_BYTES == 64
#define KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v) asm("" : "+x"(v))
#endif

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

template <class T>
static ALWAYS_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
static ALWAYS_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

static ALWAYS_INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
static ALWAYS_INLINE void store(float* p, vf v) { *(vf_unaligned*)p = v; }
static ALWAYS_INLINE vi load_int(const int32_t* p) { return *(const vi_unaligned*)p; }
static ALWAYS_INLINE vf splat(float x) { return x - (vf){}; }
static ALWAYS_INLINE vi splat_int(int32_t x) { return x - (vi){}; }
static ALWAYS_INLINE vu splat_unsigned(uint32_t x) { return x - (vu){}; }
static ALWAYS_INLINE vf to_float_lanes(vi x) { return __builtin_convertvector(x, vf); }

// The 64-bit products of the lanes and a factor, in two halves.
static ALWAYS_INLINE void multiply_wide(vu x, uint32_t factor, vu& high, vu& low) {
#if defined(__x86_64__)
  // The machine multiplies every other lane.
#if VECTOR_BYTES == 64
  const __m512i m = _mm512_set1_epi32((int)factor);
  const vu even = (vu)_mm512_mul_epu32((__m512i)x, m);
  const vu odd = (vu)_mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), m);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, _mm512_slli_epi64((__m512i)odd, 32));
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64((__m512i)even, 32), (__m512i)odd);
#elif VECTOR_BYTES == 32
  const __m256i m = _mm256_set1_epi32((int)factor);
  const vu even = (vu)_mm256_mul_epu32((__m256i)x, m);
  const vu odd = (vu)_mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), m);
  low = (vu)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xaa);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64((__m256i)even, 32), (__m256i)odd, 0xaa);
#else
  const __m128i m = _mm_set1_epi32((int)factor);
  const __m128i even = _mm_mul_epu32((__m128i)x, m);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)x, 32), m);
  const __m128i first = _mm_set_epi32(0, -1, 0, -1);
  low = (vu)_mm_or_si128(_mm_and_si128(even, first), _mm_slli_epi64(odd, 32));
  high = (vu)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(first, odd));
#endif
#else
  for (int i = 0; i < W; i++) {
    const uint64_t product = (uint64_t)x[i] * factor;
    low[i] = (uint32_t)product;
    high[i] = (uint32_t)(product >> 32);
  }
#endif
}

// The maximum instruction of the machine: where one operand is NaN, x86 returns b, so keep the running maximum in b.
static ALWAYS_INLINE vf vmax(vf a, vf b) {
#if defined(__aarch64__)
  return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#elif defined(__x86_64__) && VECTOR_BYTES == 64
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
// True if any lane of a comparison result is set.
static ALWAYS_INLINE bool any(vi condition) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)condition) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)condition) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)condition) != 0;
#else
  int32_t set = 0;
  for (int i = 0; i < W; i++) set |= condition[i];
  return set != 0;
#endif
}
static ALWAYS_INLINE float horizontal_sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}
static ALWAYS_INLINE float horizontal_max(vf v) {
  float lanes[W];
  store(lanes, v);
  float result = lanes[0];
  for (int i = 1; i < W; i++) result = larger(lanes[i], result);
  return result;
}

// 2^f for |f| <= 1/2, exactly 1 at 0: the minimax polynomial of degree 5 under that condition, relative error 1.8e-7.
static ALWAYS_INLINE vf exp2_of_fraction(vf f) {
  vf p = splat(1.326472731307149e-3f);
  p = p * f + splat(9.671512991189957e-3f);
  p = p * f + splat(5.550733581185341e-2f);
  p = p * f + splat(2.4022242426872253e-1f);
  p = p * f + splat(6.931470036506653e-1f);
  return p * f + splat(1.0f);
}

// 2^x for x <= 127 with a relative error below 1.8e-7. Exactly 0 for x <= -127, -inf included: there the fraction is 0,
// the polynomial 1.0 and its exponent bits cancel. A NaN gives NaN.
static ALWAYS_INLINE vf exp2_lanes(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  x = vmax(splat(-127.0f), x);
  vf t = x + shift;
  return (vf)((vu)exp2_of_fraction(x - (t - shift)) + ((vu)t << 23));
}

// The logarithm of 2 with a relative error below 1e-7, also near 1: f times the minimax polynomial of log2(1 + f) / f
// on [sqrt(1/2) - 1, sqrt(2) - 1]. For x = 0 or above 1e-38; infinity and NaN stay what they are.
static ALWAYS_INLINE vf log2_lanes(vf x) {
  const vi bits = (vi)x;
  const vi exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  const vf f = (vf)(bits - (exponent << 23)) - splat(1.0f);
  vf p = splat(0.12583689391613007f);
  p = p * f + splat(-0.20726968348026276f);
  p = p * f + splat(0.21571561694145203f);
  p = p * f + splat(-0.23894482851028442f);
  p = p * f + splat(0.28791624307632446f);
  p = p * f + splat(-0.3607036769390106f);
  p = p * f + splat(0.48091062903404236f);
  p = p * f + splat(-0.7213473320007324f);
  p = p * f + splat(1.4426950216293335f);
  const vf result = p * f + to_float_lanes(exponent);
  return x < splat(INFINITY) ? (x == (vf){} ? splat(-INFINITY) : result) : x;
}

// tanh with a relative error of a few 1e-7: an odd polynomial (minimax on [0, 0.625]) near 0, where
// (1 - e^-2x) / (1 + e^-2x) would cancel.
static ALWAYS_INLINE vf tanh_lanes(vf x) {
  const vf magnitude = vmax(x, -x);
  const vf square = x * x;
  vf p = splat(-5.704979412257671e-3f);
  p = p * square + splat(2.0639080554246902e-2f);
  p = p * square + splat(-5.373971164226532e-2f);
  p = p * square + splat(1.3331441581249237e-1f);
  p = p * square + splat(-3.333328068256378e-1f);
  const vf near_zero = x + x * (square * p);
  const vf e = exp2_lanes(magnitude * splat(-2.0f * LOG2E));
  const vf far = (splat(1.0f) - e) / (splat(1.0f) + e);
  const vf signed_far = x < (vf){} ? -far : far;
  return magnitude < splat(0.625f) ? near_zero : signed_far;
}
// The derivative of tanh, with a small relative error everywhere: 1 - tanh^2 would cancel.
static ALWAYS_INLINE vf tanh_slope_lanes(vf x) {
  const vf e = exp2_lanes(vmax(x, -x) * splat(-2.0f * LOG2E));
  const vf half = splat(2.0f) / (splat(1.0f) + e);
  return e * (half * half);
}

// Element types in memory. Arithmetic is always float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

static ALWAYS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static ALWAYS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static ALWAYS_INLINE float to_float(float x) { return x; }
static ALWAYS_INLINE float to_float(bfloat16 x) { return bits_to_float((uint32_t)x.bits << 16); }
static ALWAYS_INLINE float to_float(float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The magnitude read as a float32 exponent is too small by 2^112; the product is exact, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e33f));
}
// Round to nearest, ties to even, as torch does.
static ALWAYS_INLINE void from_float(float* p, float x) { *p = x; }
static ALWAYS_INLINE void from_float(bfloat16* p, float x) {
  const uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7fc0u : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static ALWAYS_INLINE void from_float(float16* p, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    p->bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    p->bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the float addition align and round
    const float aligned = bits_to_float(magnitude) + 0.5f;
    p->bits = sign | (uint16_t)(float_to_bits(aligned) - 0x3f000000u);
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    p->bits = sign | (uint16_t)((rounded - 0x38000000u) >> 13);
  }
}

// W consecutive elements, as float32.
static ALWAYS_INLINE vf load_lanes(const float* p) { return load(p); }
static ALWAYS_INLINE vf load_lanes(const bfloat16* p) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
static ALWAYS_INLINE vf load_lanes(const float16* p) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vld1_f16((const __fp16*)p));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
// W bytes of a bool tensor, as 0 and other numbers.
static ALWAYS_INLINE float to_float(uint8_t x) { return (float)x; }
static ALWAYS_INLINE vf load_lanes(const uint8_t* p) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = (float)p[i];
  return v;
#endif
}
static ALWAYS_INLINE void store_lanes(float* p, vf v) { store(p, v); }
static ALWAYS_INLINE void store_lanes(bfloat16* p, vf v) {
#if defined(__x86_64__) && VECTOR_BYTES >= 32
  const vu bits = (vu)v;
  const vi rounded = (vi)(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff);
  const vi selected = v != v ? splat_int(0x7fc0) : rounded;
#if VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)selected));
#else
  const __m256i packed = _mm256_packus_epi32((__m256i)selected, (__m256i)selected);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x8)));
#endif
#else
  for (int i = 0; i < W; i++) from_float(p + i, v[i]);
#endif
}
static ALWAYS_INLINE void store_lanes(float16* p, vf v) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_f16((__fp16*)p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < W; i++) from_float(p + i, v[i]);
#endif
}

// Stores past the caches, for results too large to be read back from them: p is aligned to the bytes of W elements.
// A thread calls stream_fence() before others may read what it streamed.
template <class T>
static ALWAYS_INLINE void stream_lanes(T* p, vf v) {
#if defined(__x86_64__)
  alignas(64) T packed[W];
  store_lanes(packed, v);
  if constexpr (sizeof(packed) == 64) {
#if VECTOR_BYTES == 64
    _mm512_stream_si512((__m512i*)p, _mm512_load_si512((const __m512i*)packed));
#endif
  } else if constexpr (sizeof(packed) == 32) {
#if VECTOR_BYTES >= 32
    _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)packed));
#endif
  } else if constexpr (sizeof(packed) == 16) {
    _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)packed));
  } else {
    store_lanes(p, v);
  }
#else
  store_lanes(p, v);
#endif
}
static ALWAYS_INLINE void stream(float* p, vf v) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
static ALWAYS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Asks for a line of memory, without waiting for it. A line that is to be written comes as the core's own.
static ALWAYS_INLINE void prefetch_to_read(const void* p) { __builtin_prefetch(p, 0, 2); }
static ALWAYS_INLINE void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*(const char*)p));  // does nothing on a processor that does not know it
#else
  __builtin_prefetch(p, 1, 2);
#endif
}

// rows[i][j] <-> rows[j][i] of a W x W block in registers.
static ALWAYS_INLINE void transpose(vf rows[W]) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  // Four rounds of a perfect shuffle: interleaving row i with row i + W/2 moves one bit of the row number into the
  // lane.
  const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const vi high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    vf next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      next[2 * i] = (vf)_mm512_permutex2var_ps((__m512)rows[i], (__m512i)low, (__m512)rows[i + W / 2]);
      next[2 * i + 1] = (vf)_mm512_permutex2var_ps((__m512)rows[i], (__m512i)high, (__m512)rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = next[i];
  }
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  __m256 t[8], s[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m256* a = t + 4 * half;
    s[4 * half] = _mm256_shuffle_ps(a[0], a[2], 0x44);
    s[4 * half + 1] = _mm256_shuffle_ps(a[0], a[2], 0xee);
    s[4 * half + 2] = _mm256_shuffle_ps(a[1], a[3], 0x44);
    s[4 * half + 3] = _mm256_shuffle_ps(a[1], a[3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    rows[i] = (vf)_mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    rows[i + 4] = (vf)_mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
#else
  for (int i = 0; i < W; i++)
    for (int j = i + 1; j < W; j++) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
#endif
}
