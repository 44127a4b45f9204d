// The backward pass of cross-entropy on CUDA: reads the logits, writes their gradients. No column waits for another, so
// a row may be shared by blocks; where the gradients replace the logits, one block has all of it, because the others
// would look for the label's logit.
#include "cross_entropy_rows.h"

namespace maskops {
namespace {

constexpr int THREADS = 256;
constexpr int64_t BLOCK_BYTES = 64 << 10;  // of logits
constexpr int64_t MOST_BLOCKS = 1 << 30;

// The gradients of the probabilities of N columns, (D' w_j - G) (lse - z_j). Like the loss, they leave out what is
// 0 * inf.
template <int N>
__device__ __forceinline__ void write_target_gradients(const CrossEntropyBackward& p, int64_t row, int64_t at,
                                                       const float (&x)[N], const RowTarget& target,
                                                       const RowGradients& grad, const Coefficients& c,
                                                       const Transform& transform) {
  const float of_weighted = static_cast<float>((1.0 - p.rows.label_smoothing) * grad.loss);
  float weights[N], probabilities[N], result[N];
#pragma unroll
  for (int j = 0; j < N; j++) weights[j] = 1.0f;
  if (p.rows.class_weights != nullptr) load_floats<N>(p.rows.class_weights, p.rows.vocabulary, at, 0.0f, weights);
  load_floats<N>(target.probabilities, p.rows.probability_element, p.rows.vocabulary, at, 0.0f, probabilities);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float value = value_of(x[j], transform), surprise = c.lse - value * transform.factor;
    const float coefficient = weights[j] * of_weighted - grad.logprobs;
    const bool nothing = value == -INFINITY && (probabilities[j] == 0.0f || coefficient == 0.0f);
    result[j] = nothing ? 0.0f : coefficient * surprise;
    if (c.pivot == at + j && coefficient != 0.0f) {
      result[j] = static_cast<float>(-coefficient * p.statistics[row * N_ROW_STATISTICS + PIVOT_LOGPROB]);
    }
  }
  const int64_t bytes = p.rows.probability_element == Element::float32 ? 4 : 2;
  store_floats<N>(static_cast<char*>(p.grad_probabilities) + row * p.rows.vocabulary * bytes,
                  p.rows.probability_element, p.rows.vocabulary, at, result);
}

// `first`: the row of grad_probabilities that no row of the logits is scored against, nullptr where there is none; the
// last row of the logits, which is skipped then, clears it.
template <class T, bool GENERAL>
__global__ void __launch_bounds__(THREADS)
    write_gradients(const __grid_constant__ CrossEntropyBackward p, const CudaLabels labels, const Transform transform,
                    void* first, int64_t blocks_per_row) {
  constexpr int N = VECTOR<T>, BATCH = GENERAL ? 1 : 2;
  MASKOPS_SHARED(Coefficients, shared, [1]);
  const int64_t vocabulary = p.rows.vocabulary;
  for (int64_t task = blockIdx.x; task < p.rows.n_rows * blocks_per_row; task += gridDim.x) {
    const int64_t row = task / blocks_per_row, part = task % blocks_per_row;
    const T* x = static_cast<const T*>(p.rows.logits) + row * p.rows.row_stride;
    T* gradient = static_cast<T*>(p.grad_logits) + row * p.grad_row_stride;
    const RowTarget target = target_of(p.rows, labels, row);
    RowGradients grad = {};
    if (!target.skipped) grad = gradients_of(p, row);  // those of skipped rows may hold anything
    const bool soft = GENERAL && target.probabilities != nullptr;
    const bool wants_target = soft && p.grad_probabilities != nullptr;
    // Vectors are aligned in the gradients; the logits may be off.
    const int64_t head = phase_of(gradient);
    const int64_t vectors = (head + vocabulary + N - 1) / N, share = (vectors + blocks_per_row - 1) / blocks_per_row;
    const int64_t end = (part + 1) * share < vectors ? (part + 1) * share : vectors;
    int64_t i = part * share + threadIdx.x;
    if (!grad.any()) {
      const float zeros[N] = {};
      void* none = nullptr;
      if (wants_target) {
        const int64_t bytes = p.rows.probability_element == Element::float32 ? 4 : 2;
        none = row < p.rows.n_probability_rows ? static_cast<char*>(p.grad_probabilities) + row * vocabulary * bytes
                                               : first;
      }
      for (; i < end; i += blockDim.x) {
        store_floats<N>(gradient, vocabulary, i * N - head, zeros);
        if (none != nullptr) store_floats<N>(none, p.rows.probability_element, vocabulary, i * N - head, zeros);
      }
      continue;
    }
    if (threadIdx.x == 0) {
      const double* statistics = p.statistics == nullptr ? nullptr : p.statistics + row * N_ROW_STATISTICS;
      int64_t pivot = target.label;
      if (soft) {
        const double saved = statistics[PIVOT];  // names a column to read, so it is not trusted
        pivot = saved >= 0.0 && saved < static_cast<double>(vocabulary) ? static_cast<int64_t>(saved) : 0;
      }
      const float pivot_logit = pivot == NO_LABEL ? -INFINITY : to_float(x[pivot]);
      shared[0] = coefficients_of(p.rows, grad, target, pivot, pivot_logit, p.lse[row], p.logprobs[row],
                                  grad.entropy != 0.0f ? p.entropy[row] : 0.0f, statistics);
    }
    __syncthreads();
    const Coefficients c = shared[0];
    for (; i < end; i += BATCH * static_cast<int64_t>(blockDim.x)) {
      Vector<T> batch[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int64_t at = i + b * static_cast<int64_t>(blockDim.x);
        if (at < end) batch[b] = load_vector(x, vocabulary, at * N - head, 0.0f);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int64_t vector = i + b * static_cast<int64_t>(blockDim.x), at = vector * N - head;
        if (vector >= end) break;
        float values[N];
        unpack(batch[b], values);
        if (wants_target) write_target_gradients<N>(p, row, at, values, target, grad, c, transform);
        replace_by_gradients<N, GENERAL>(values, at, p.rows, target, c, transform);
        store_floats<N>(gradient, vocabulary, at, values);
      }
    }
    __syncthreads();  // the coefficients are replaced by those of the next row
  }
}

template <class T>
void run(const CrossEntropyBackward& p, const CudaLabels& labels, void* first, int64_t blocks_per_row, void* stream) {
  const int64_t tasks = p.rows.n_rows * blocks_per_row;
  const dim3 grid(static_cast<unsigned>(tasks < MOST_BLOCKS ? tasks : MOST_BLOCKS));
  const int64_t vectors = p.rows.vocabulary / VECTOR<T> + 2;
  int threads = THREADS;
  while (threads > 32 && vectors * 2 <= threads * 2) threads /= 2;
  const auto kernel =
      is_general(p.rows, p.grad_entropy.values != nullptr) ? write_gradients<T, true> : write_gradients<T, false>;
  launch(kernel, grid, dim3(static_cast<unsigned>(threads)), 0, stream, p, labels, transform_of(p.rows), first,
         blocks_per_row);
}

}  // namespace

void cross_entropy_backward_cuda(const CrossEntropyBackward& p, const CudaLabels& labels, void* stream) {
  const int64_t row_bytes = p.rows.vocabulary * (p.rows.element == Element::float32 ? 4 : 2);
  const int64_t blocks_per_row = p.grad_logits == p.rows.logits ? 1 : (row_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
  void* first = nullptr;
  if (p.grad_probabilities != nullptr && p.rows.n_probability_rows < p.rows.n_rows) {
    const int64_t bytes = p.rows.vocabulary * (p.rows.probability_element == Element::float32 ? 4 : 2);
    first = static_cast<char*>(p.grad_probabilities) - bytes;
  }
  switch (p.rows.element) {
    case Element::float32: return run<float>(p, labels, first, blocks_per_row, stream);
    case Element::bfloat16: return run<__nv_bfloat16>(p, labels, first, blocks_per_row, stream);
    case Element::float16: return run<__half>(p, labels, first, blocks_per_row, stream);
  }
}

}  // namespace maskops
