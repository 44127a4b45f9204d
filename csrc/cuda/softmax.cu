// Masked softmax on CUDA along a dimension of a strided tensor, in two ways, as on the CPU (csrc/cpu/softmax.inc):
//
// * rows: the softmax runs along the dimension in which the results are contiguous; a warp or a block for each. Vectors
//   of the results are aligned, those of the operands are shifted into place where they are not.
// * lanes: softmaxes that lie side by side in the results, 32 at a time, whose places are shared by the warps of a
// block.
//
// Either walks its elements twice: once for the maximum and the sum (or the dot product of the backward pass), once for
// the results. The rows that are under way fit the L2 cache, so that memory is read once. Sums are taken in an order
// that depends on shapes and alignments only.
#include "softmax.h"

#include "vectors.h"

namespace maskops {
namespace {

constexpr float DEEPEST = -128.0f;  // expf gives exactly 0 here
constexpr int LANES = 32;
constexpr int GROUPS = 8;  // warps that share the places of a strip of lanes
constexpr int THREADS = 256;
constexpr int64_t ROW_OF_A_WARP = 2048;  // elements; longer rows take a block
constexpr int64_t MOST_BLOCKS = 1 << 30;

// What the visible elements seen so far are summed to.
struct Sum {
  float top;    // the largest
  float total;  // of e^(x - top)
  bool holds_nan;
};

// What exponentials refer to: finite where nothing is visible.
__device__ __forceinline__ float reference_of(float top) { return top == -INFINITY ? 0.0f : top; }

// -inf where an element is masked.
template <int N>
__device__ __forceinline__ void add(Sum& sum, const float (&x)[N]) {
  float top = x[0];
#pragma unroll
  for (int j = 0; j < N; j++) {
    sum.holds_nan |= x[j] != x[j];
    top = fmaxf(top, x[j]);
  }
  if (top > sum.top) {
    sum.total *= expf(fmaxf(sum.top - top, DEEPEST));
    sum.top = top;
  }
  const float reference = reference_of(sum.top);
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < N; j++) total += expf(x[j] - reference);
  sum.total += total;
}

__device__ __forceinline__ void merge(Sum& sum, const Sum& other) {
  const float top = fmaxf(sum.top, other.top);
  sum.total = sum.total * expf(fmaxf(sum.top - top, DEEPEST)) + other.total * expf(fmaxf(other.top - top, DEEPEST));
  sum.top = top;
  sum.holds_nan |= other.holds_nan;
}

// The weights of elements from their sum. Something visible that is NaN or +inf makes the sum NaN and with it
// everything visible, as in torch.softmax; masked elements stay 0.
struct Weigh {
  float reference, scale;

  __device__ __forceinline__ explicit Weigh(const Sum& sum)
      : reference(reference_of(sum.top)), scale(sum.total == 0.0f ? 0.0f : 1.0f / sum.total) {}
  __device__ __forceinline__ float weight(float x, bool visible) const {
    return visible ? expf(x - reference) * scale : 0.0f;
  }
};

__device__ __forceinline__ float lse_of(const Sum& sum) {
  if (sum.total != sum.total) return sum.holds_nan ? NAN : INFINITY;
  return sum.total == 0.0f ? -INFINITY : reference_of(sum.top) + logf(sum.total);
}

// w * g, and 0 where w is 0, whatever g holds there.
__device__ __forceinline__ float product(float w, float g) { return w == 0.0f ? 0.0f : w * g; }

__device__ __forceinline__ Sum of_warp(Sum sum) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const float top = __shfl_xor_sync(~0u, sum.top, lane), total = __shfl_xor_sync(~0u, sum.total, lane);
    const int holds_nan = __shfl_xor_sync(~0u, static_cast<int>(sum.holds_nan), lane);
    merge(sum, Sum{top, total, holds_nan != 0});
  }
  return sum;
}
__device__ __forceinline__ float of_warp(float sum) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  return sum;
}
__device__ __forceinline__ void merge(float& sum, float other) { sum += other; }

// Of all threads of a row; every thread of the block calls it, and gets it.
template <bool BLOCK, class Value>
__device__ __forceinline__ Value of_row(Value value, Value* of_warps) {
  value = of_warp(value);
  if (!BLOCK) return value;
  const int n_warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < n_warps; warp++) merge(value, of_warps[warp]);
  __syncthreads();  // it is used again
  return value;
}

// Where an operand begins for an index of the outer dimensions.
__device__ __forceinline__ int64_t offset_of(const SoftmaxShape& shape, const SoftmaxOperand& operand, int64_t outer) {
  int64_t offset = 0;
  for (int d = shape.n_outer; d-- > 0;) {
    offset += outer % shape.outer_sizes[d] * operand.outer[d];
    outer /= shape.outer_sizes[d];
  }
  return offset;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// What of a row is visible.
struct RowMask {
  const uint8_t* mask;  // nullptr: none
  int64_t stride;       // of the mask
  const int32_t* start;
  const int32_t* end;  // nullptr: no spans
  const uint8_t* key_valid;
  int64_t span_stride, n_spans, length;
  int64_t first, last;  // nothing outside of [first, last) is visible

  __device__ __forceinline__ RowMask(const SoftmaxShape& shape, const SoftmaxOperand* bytes, const SoftmaxSpans& spans,
                                     int64_t outer)
      : mask(nullptr), stride(0), start(nullptr), end(nullptr), length(shape.length), first(0), last(shape.length) {
    if (bytes != nullptr && bytes->data != nullptr) {
      mask = static_cast<const uint8_t*>(bytes->data) + offset_of(shape, *bytes, outer);
      stride = bytes->along;
    }
    if (spans.start == nullptr) return;
    const int64_t batch = spans.plan_batch == 1 ? 0 : outer / spans.rows_per_batch_element;
    const int64_t at = batch * spans.batch_stride + outer % spans.q_len;
    start = spans.start + at;
    end = spans.end + at;
    key_valid = spans.key_valid + batch * spans.key_batch_stride;
    span_stride = spans.span_stride;
    n_spans = spans.n_spans;
    first = length;
    last = 0;
    each_span([&](int64_t from, int64_t to) {
      first = from < first ? from : first;
      last = to;
    });
    if (first > last) first = last;
  }

  // body(from, to) for the spans in ascending order, clamped: what a user made by hand may hold anything.
  template <class Body>
  __device__ __forceinline__ void each_span(const Body& body) const {
    int64_t done = 0;
    for (int64_t span = 0; span < n_spans; span++) {
      int64_t from = start[span * span_stride], to = end[span * span_stride];
      from = from > done ? from : done;
      from = from < length ? from : length;
      to = to > from ? to : from;
      to = to < length ? to : length;
      if (from == to) continue;
      body(from, to);
      done = to;
    }
  }

  // A bit for each of the N elements from `at` on.
  template <int N>
  __device__ __forceinline__ uint32_t visible(int64_t at) const {
    uint32_t bits = 0;
    if (end != nullptr) {
      each_span([&](int64_t from, int64_t to) {
#pragma unroll
        for (int j = 0; j < N; j++)
          if (at + j >= from && at + j < to) bits |= 1u << j;
      });
    } else {
#pragma unroll
      for (int j = 0; j < N; j++)
        if (at + j >= 0 && at + j < length) bits |= 1u << j;
    }
    if (bits == 0) return 0;
    const uint8_t* bytes = end != nullptr ? key_valid : mask;
    if (bytes == nullptr) return bits;
    const int64_t step = end != nullptr ? 1 : stride;
#pragma unroll
    for (int j = 0; j < N; j++)
      if ((bits >> j & 1u) != 0 && bytes[(at + j) * step] == 0) bits &= ~(1u << j);
    return bits;
  }
};

// N elements of a row that is contiguous or not, where a bit is set.
template <class T>
__device__ __forceinline__ void load_elements(const T* row, int64_t stride, int64_t length, int64_t at, uint32_t bits,
                                              float (&values)[VECTOR<T>]) {
  if (stride == 1) {
    load_floats<VECTOR<T>>(row, length, at, 0.0f, values);
  } else {
#pragma unroll
    for (int j = 0; j < VECTOR<T>; j++) values[j] = (bits >> j & 1u) != 0 ? to_float(row[(at + j) * stride]) : 0.0f;
  }
}

// The vectors of a row of results, aligned, and which of them a thread takes.
template <class T, bool BLOCK>
struct RowVectors {
  int64_t head, count;

  __device__ __forceinline__ RowVectors(const T* results, int64_t length)
      : head(phase_of(results)), count((head + length + VECTOR<T> - 1) / VECTOR<T>) {}
  // body(first element) for the vectors that hold some of [from, to).
  template <class Body>
  __device__ __forceinline__ void each(int64_t from, int64_t to, const Body& body) const {
    if (from >= to) return;
    const int64_t thread = BLOCK ? threadIdx.x : threadIdx.x % 32, threads = BLOCK ? blockDim.x : 32;
    // A thread has the same vectors whatever the range, so that it depends on nothing else how sums are taken.
    const int64_t before = (from + head) / VECTOR<T> / threads * threads;
    for (int64_t i = before + thread; i * VECTOR<T> - head < to; i += threads) body(i * VECTOR<T> - head);
  }
};

// Calls body(row) for the rows of this warp or block. All threads of a warp (of a block) go along.
template <bool BLOCK, class Body>
__device__ __forceinline__ void each_row(int64_t count, const Body& body) {
  const int64_t per_block = BLOCK ? 1 : blockDim.x / 32;
  const int64_t first = blockIdx.x * per_block + (BLOCK ? 0 : threadIdx.x / 32);
  for (int64_t row = first; row < count; row += gridDim.x * per_block) body(row);
}

template <class T, bool BLOCK>
__global__ void __launch_bounds__(THREADS, 4) softmax_forward_rows(const __grid_constant__ SoftmaxForward p) {
  constexpr int N = VECTOR<T>;
  MASKOPS_SHARED(Sum, of_warps, [THREADS / 32]);
  each_row<BLOCK>(p.shape.outer_count, [&](int64_t outer) {
    const T* x = static_cast<const T*>(p.x.data) + offset_of(p.shape, p.x, outer);
    T* weights = static_cast<T*>(p.weights.data) + offset_of(p.shape, p.weights, outer);
    const RowMask mask(p.shape, &p.mask, p.spans, outer);
    const RowVectors<T, BLOCK> vectors(weights, p.shape.length);
    Sum sum = {-INFINITY, 0.0f, false};
    vectors.each(mask.first, mask.last, [&](int64_t at) {
      const uint32_t bits = mask.visible<N>(at);
      if (bits == 0) return;
      float values[N];
      load_elements(x, p.x.along, p.shape.length, at, bits, values);
#pragma unroll
      for (int j = 0; j < N; j++) values[j] = (bits >> j & 1u) != 0 ? values[j] : -INFINITY;
      add(sum, values);
    });
    sum = of_row<BLOCK>(sum, of_warps);
    const Weigh weigh(sum);
    vectors.each(0, p.shape.length, [&](int64_t at) {
      float values[N] = {};
      const bool inside = at + N > mask.first && at < mask.last;
      const uint32_t bits = inside ? mask.visible<N>(at) : 0u;
      if (bits != 0) load_elements(x, p.x.along, p.shape.length, at, bits, values);
#pragma unroll
      for (int j = 0; j < N; j++) values[j] = weigh.weight(values[j], (bits >> j & 1u) != 0);
      store_floats<N>(weights, p.shape.length, at, values);
    });
    if (p.lse != nullptr && threadIdx.x % (BLOCK ? blockDim.x : 32) == 0) p.lse[outer] = lse_of(sum);
  });
}

template <class T, bool BLOCK>
__global__ void __launch_bounds__(THREADS) softmax_backward_rows(const __grid_constant__ SoftmaxBackward p) {
  constexpr int N = VECTOR<T>;
  MASKOPS_SHARED(float, of_warps, [THREADS / 32]);
  each_row<BLOCK>(p.shape.outer_count, [&](int64_t outer) {
    const T* weights = static_cast<const T*>(p.weights.data) + offset_of(p.shape, p.weights, outer);
    const T* grads = static_cast<const T*>(p.grad_weights.data) + offset_of(p.shape, p.grad_weights, outer);
    T* grad_x = static_cast<T*>(p.grad_x.data) + offset_of(p.shape, p.grad_x, outer);
    const RowMask mask(p.shape, nullptr, p.spans, outer);  // weights outside of the spans are 0 and are not read
    const RowVectors<T, BLOCK> vectors(grad_x, p.shape.length);
    const auto inside_of = [&](int64_t at) {
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < N; j++)
        if (at + j >= mask.first && at + j < mask.last) bits |= 1u << j;
      return bits;
    };
    // Weights, and the gradients of those that are not 0.
    const auto load = [&](int64_t at, float (&w)[N], float (&g)[N]) {
      const uint32_t bits = inside_of(at);
#pragma unroll
      for (int j = 0; j < N; j++) w[j] = g[j] = 0.0f;
      if (bits == 0) return;
      load_floats<N>(weights, p.shape.length, at, 0.0f, w);
      load_elements(grads, p.grad_weights.along, p.shape.length, at, bits, g);
#pragma unroll
      for (int j = 0; j < N; j++) w[j] = (bits >> j & 1u) != 0 ? w[j] : 0.0f;
    };
    float dot = 0.0f;
    vectors.each(mask.first, mask.last, [&](int64_t at) {
      float w[N], g[N], sum = 0.0f;
      load(at, w, g);
#pragma unroll
      for (int j = 0; j < N; j++) sum += product(w[j], g[j]);
      dot += sum;
    });
    dot = of_row<BLOCK>(dot, of_warps);
    if (p.grad_lse != nullptr) dot -= p.grad_lse[outer];
    vectors.each(0, p.shape.length, [&](int64_t at) {
      float w[N], g[N];
      load(at, w, g);
#pragma unroll
      for (int j = 0; j < N; j++) w[j] = product(w[j], g[j] - dot);
      store_floats<N>(grad_x, p.shape.length, at, w);
    });
  });
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// Calls body(outer index, lane) for the strips of this block; all of its threads go along.
template <class Body>
__device__ __forceinline__ void each_strip(const SoftmaxShape& shape, const Body& body) {
  const int64_t strips = (shape.lanes + LANES - 1) / LANES;
  for (int64_t strip = blockIdx.x; strip < shape.outer_count * strips; strip += gridDim.x) {
    body(strip / strips, strip % strips * LANES + threadIdx.x % LANES);
  }
}

// Of the groups of a block, lane by lane; every thread of the block calls it, and gets it.
template <class Value>
__device__ __forceinline__ Value of_lane(const Value& value, Value* shared) {
  const int lane = threadIdx.x % LANES;
  shared[threadIdx.x] = value;
  __syncthreads();
  Value all = shared[lane];
  for (int group = 1; group < GROUPS; group++) merge(all, shared[group * LANES + lane]);
  __syncthreads();  // it is used again
  return all;
}

template <class T>
__global__ void __launch_bounds__(THREADS) softmax_forward_lanes(const __grid_constant__ SoftmaxForward p) {
  MASKOPS_SHARED(Sum, of_threads, [LANES * GROUPS]);
  each_strip(p.shape, [&](int64_t outer, int64_t lane) {
    const bool exists = lane < p.shape.lanes;
    const int64_t first = threadIdx.x / LANES, length = exists ? p.shape.length : 0;
    const T* x = static_cast<const T*>(p.x.data) + offset_of(p.shape, p.x, outer) + lane * p.x.across;
    T* weights = static_cast<T*>(p.weights.data) + offset_of(p.shape, p.weights, outer) + lane * p.weights.across;
    const auto* mask = static_cast<const uint8_t*>(p.mask.data);
    if (mask != nullptr) mask += offset_of(p.shape, p.mask, outer) + lane * p.mask.across;
    const auto visible = [&](int64_t i) { return mask == nullptr || mask[i * p.mask.along] != 0; };
    Sum sum = {-INFINITY, 0.0f, false};
    for (int64_t i = first; i < length; i += GROUPS) {
      if (!visible(i)) continue;
      const float value[1] = {to_float(x[i * p.x.along])};
      add(sum, value);
    }
    sum = of_lane(sum, of_threads);
    const Weigh weigh(sum);
    for (int64_t i = first; i < length; i += GROUPS) {
      const bool seen = visible(i);
      weights[i * p.weights.along] = from_float<T>(weigh.weight(seen ? to_float(x[i * p.x.along]) : 0.0f, seen));
    }
    if (p.lse != nullptr && exists && first == 0) p.lse[outer * p.shape.lanes + lane] = lse_of(sum);
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS) softmax_backward_lanes(const __grid_constant__ SoftmaxBackward p) {
  MASKOPS_SHARED(float, of_threads, [LANES * GROUPS]);
  each_strip(p.shape, [&](int64_t outer, int64_t lane) {
    const bool exists = lane < p.shape.lanes;
    const int64_t first = threadIdx.x / LANES, length = exists ? p.shape.length : 0;
    const T* weights =
        static_cast<const T*>(p.weights.data) + offset_of(p.shape, p.weights, outer) + lane * p.weights.across;
    const T* grads = static_cast<const T*>(p.grad_weights.data) + offset_of(p.shape, p.grad_weights, outer) +
                     lane * p.grad_weights.across;
    T* grad_x = static_cast<T*>(p.grad_x.data) + offset_of(p.shape, p.grad_x, outer) + lane * p.grad_x.across;
    float dot = 0.0f;
    for (int64_t i = first; i < length; i += GROUPS) {
      dot += product(to_float(weights[i * p.weights.along]), to_float(grads[i * p.grad_weights.along]));
    }
    dot = of_lane(dot, of_threads);
    if (p.grad_lse != nullptr && exists) dot -= p.grad_lse[outer * p.shape.lanes + lane];
    for (int64_t i = first; i < length; i += GROUPS) {
      const float g = to_float(grads[i * p.grad_weights.along]) - dot;
      grad_x[i * p.grad_x.along] = from_float<T>(product(to_float(weights[i * p.weights.along]), g));
    }
  });
}

template <class Parameters>
void run(const Parameters& p, void (*warp)(Parameters), void (*block)(Parameters), void (*lanes)(Parameters),
         void* stream) {
  const SoftmaxShape& shape = p.shape;
  int threads = THREADS;
  int64_t blocks = shape.outer_count;
  auto kernel = block;
  if (shape.lanes != 1) {
    kernel = lanes;
    blocks *= (shape.lanes + LANES - 1) / LANES;
  } else if (shape.length <= ROW_OF_A_WARP) {
    kernel = warp;
    threads = shape.outer_count < 4 ? static_cast<int>(shape.outer_count) * 32 : 128;
    blocks = (blocks + 3) / 4;
  }
  if (blocks == 0) return;
  launch(kernel, dim3(static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS)),
         dim3(static_cast<unsigned>(threads)), 0, stream, p);
}

template <class T>
void forward(const SoftmaxForward& p, void* stream) {
  run(p, softmax_forward_rows<T, false>, softmax_forward_rows<T, true>, softmax_forward_lanes<T>, stream);
}
template <class T>
void backward(const SoftmaxBackward& p, void* stream) {
  run(p, softmax_backward_rows<T, false>, softmax_backward_rows<T, true>, softmax_backward_lanes<T>, stream);
}

}  // namespace

void softmax_forward_cuda(const SoftmaxForward& p, void* stream) {
  switch (p.shape.element) {
    case Element::float32: return forward<float>(p, stream);
    case Element::bfloat16: return forward<__nv_bfloat16>(p, stream);
    case Element::float16: return forward<__half>(p, stream);
  }
}

void softmax_backward_cuda(const SoftmaxBackward& p, void* stream) {
  switch (p.shape.element) {
    case Element::float32: return backward<float>(p, stream);
    case Element::bfloat16: return backward<__nv_bfloat16>(p, stream);
    case Element::float16: return backward<__half>(p, stream);
  }
}

}  // namespace maskops
