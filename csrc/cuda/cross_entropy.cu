// The forward pass of cross-entropy on CUDA, and both passes at once.
//
// A row is scored by a cluster of blocks that hold it in shared memory between them, each its part, and tell each other
// their sums: its logits are read once, whatever is done with them. Where a row is too long for that, or one pass over
// it is all that is wanted and there are no clusters, one block reads it from memory as often as it needs it.
//
// As on the CPU (csrc/cpu/cross_entropy.inc), the label's own exponential stays out of the sums: with d = sum over
// j != y of e^(z_j - z_y) the loss is log1p(d), which keeps its relative accuracy where p approaches 1. Few operations
// a row are in double precision. Sums are taken in an order that depends on the shape and the alignment of a row only.
#include "cluster.h"
#include "cross_entropy_rows.h"

namespace maskops {
namespace {

constexpr float LOWEST = -3.402823466e38f;
constexpr int MOST_THREADS = 128;  // a row's end is one thread's work: more blocks at a time, of fewer threads, hide it
constexpr int MOST_WARPS = MOST_THREADS / 32;
constexpr int32_t NO_COLUMN = 0x7fffffff;

// Of some columns of a row, all but the pivot's (the label's; the largest logit's where there are probabilities).
struct Sums {
  float top;      // their largest value
  float total;    // of e^d with d = factor * (value - top)
  float moment;   // of d e^d: for the entropy
  float columns;  // above -inf
  // Of a coefficient a, and of a * (origin - value), where a is the weight of an allowed column, probability * weight,
  // or the probability.
  float allowed, allowed_depth;
  float target, target_depth;
  float mass, mass_depth;
};

struct Best {  // the first column with the largest logit, the pivot's among them
  float logit;
  int32_t column;
};

// What a row's columns are summed with.
struct Scan {
  Transform transform;
  float origin;
  int64_t pivot;
  bool entropy, smoothing, argmax;
};

__device__ __forceinline__ Sums no_sums() { return {LOWEST, 0, 0, 0, 0, 0, 0, 0, 0, 0}; }

// Raises the largest value, to which the sums refer.
template <bool GENERAL>
__device__ __forceinline__ void raise(Sums& s, float top, float factor) {
  const float delta = fmaxf((s.top - top) * factor, DEEPEST), alpha = expf(delta);
  if constexpr (GENERAL) s.moment = alpha * (s.moment + delta * s.total);
  s.total *= alpha;
  s.top = top;
}

template <bool GENERAL>
__device__ __forceinline__ void merge(Sums& s, Sums other, float factor) {
  const float top = fmaxf(s.top, other.top);
  raise<GENERAL>(s, top, factor);
  raise<GENERAL>(other, top, factor);
  s.total += other.total;
  if constexpr (GENERAL) {
    s.moment += other.moment;
    s.columns += other.columns;
    s.allowed += other.allowed, s.allowed_depth += other.allowed_depth;
    s.target += other.target, s.target_depth += other.target_depth;
    s.mass += other.mass, s.mass_depth += other.mass_depth;
  }
}

__device__ __forceinline__ void merge(Best& best, Best other) {
  if (other.logit > best.logit || (other.logit == best.logit && other.column < best.column)) best = other;
}

// A block's part of a row: the aligned vectors [begin, end) of it, in shared memory or (not KEPT) in global memory. The
// first and the last vector of a row may lie partly outside of it, where they are filled with -inf.
template <class T, bool KEPT>
struct Part {
  static constexpr int N = VECTOR<T>;
  const T* row;
  int64_t count;  // columns
  int64_t head;   // elements of vector 0 before the row
  int64_t begin, end;
  uint4* kept;

  __device__ __forceinline__ Part(const T* row, int64_t count, int rank, int size, uint4* kept)
      : row(row), count(count), head(phase_of(row)), kept(kept) {
    const int64_t vectors = (head + count + N - 1) / N, share = (vectors + size - 1) / size;
    begin = rank * share < vectors ? rank * share : vectors;
    end = begin + share < vectors ? begin + share : vectors;
  }
  // The column of the first element of a vector; negative where that lies before the row.
  __device__ __forceinline__ int64_t column(int64_t vector) const { return vector * N - head; }
  __device__ __forceinline__ bool is_whole(int64_t first) const { return first >= 0 && first + N <= count; }
  __device__ __forceinline__ Vector<T> load(int64_t first) const {
    if (is_whole(first)) return load_aligned(row + first);
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < N; j++) {
      vector.elements[j] = first + j >= 0 && first + j < count ? row[first + j] : from_float<T>(-INFINITY);
    }
    return vector;
  }

  // Into shared memory. A thread copies the vectors that it reads later, so that nobody else has to wait.
  __device__ __forceinline__ void fetch() const {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
      if (is_whole(column(i))) {
        const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(&kept[i - begin]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(row + column(i)) : "memory");
        continue;
      }
#endif
      kept[i - begin] = load(column(i)).bits;
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  }

  // Calls body(vector, first column) for the vectors of this thread; several are on their way when the first is used.
  template <int BATCH, class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    if constexpr (KEPT) {
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        Vector<T> vector;
        vector.bits = kept[i - begin];
        body(vector, column(i));
      }
    } else {
      for (int64_t i = begin + threadIdx.x; i < end; i += BATCH * static_cast<int64_t>(blockDim.x)) {
        Vector<T> batch[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          const int64_t at = i + b * static_cast<int64_t>(blockDim.x);
          if (at < end) batch[b] = load(column(at));
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          const int64_t at = i + b * static_cast<int64_t>(blockDim.x);
          if (at < end) body(batch[b], column(at));
        }
      }
    }
  }
};

// One vector into the sums.
template <class T, bool GENERAL>
__device__ __forceinline__ void add(const Vector<T>& vector, int64_t at, const CrossEntropyRows& rows,
                                    const RowTarget& target, const Scan& scan, Sums& s, Best& best) {
  constexpr int N = VECTOR<T>;
  float x[N];
  unpack(vector, x);
  if (GENERAL && scan.argmax) {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (x[j] > best.logit) best = {x[j], static_cast<int32_t>(at + j)};
  }
  if (scan.pivot >= at && scan.pivot < at + N) {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (scan.pivot == at + j) x[j] = -INFINITY;
  }
  if constexpr (GENERAL) {
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = value_of(x[j], scan.transform);
  }
  float top = x[0];
#pragma unroll
  for (int j = 1; j < N; j++) top = fmaxf(top, x[j]);
  if (top > s.top) raise<GENERAL>(s, top, scan.transform.factor);
  float total = 0.0f, moment = 0.0f;
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float d = (x[j] - s.top) * scan.transform.factor, e = expf(d);
    total += e;
    if (GENERAL) moment += fmaxf(d, DEEPEST) * e;
  }
  s.total += total;
  if constexpr (GENERAL) {
    if (scan.entropy) s.moment += moment;
    const bool soft = target.probabilities != nullptr;
    if (!scan.smoothing && !soft) return;
    // The pivot is left out by where it is, not by its value: with a probability, a banned column counts.
    float weights[N], probabilities[N];
#pragma unroll
    for (int j = 0; j < N; j++) weights[j] = 1.0f, probabilities[j] = 0.0f;
    if (rows.class_weights != nullptr) load_floats<N>(rows.class_weights, rows.vocabulary, at, 0.0f, weights);
    if (soft) load_floats<N>(target.probabilities, rows.probability_element, rows.vocabulary, at, 0.0f, probabilities);
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (scan.pivot == at + j) continue;
      const float depth = scan.origin - x[j];
      const auto weigh = [&](float coefficient, float& sum, float& sum_depth) {
        sum += coefficient;
        if (coefficient != 0.0f) sum_depth += coefficient * depth;
      };
      if (scan.smoothing && x[j] > -INFINITY) {
        s.columns += 1.0f;
        weigh(weights[j], s.allowed, s.allowed_depth);
      }
      if (soft) {
        weigh(probabilities[j], s.mass, s.mass_depth);
        if (rows.class_weights != nullptr) weigh(probabilities[j] * weights[j], s.target, s.target_depth);
      }
    }
  }
}

template <bool GENERAL>
__device__ __forceinline__ Sums of_warp(Sums s, float factor) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    Sums other = no_sums();
    other.top = __shfl_xor_sync(~0u, s.top, lane);
    other.total = __shfl_xor_sync(~0u, s.total, lane);
    if constexpr (GENERAL) {
      other.moment = __shfl_xor_sync(~0u, s.moment, lane);
      other.columns = __shfl_xor_sync(~0u, s.columns, lane);
      other.allowed = __shfl_xor_sync(~0u, s.allowed, lane);
      other.allowed_depth = __shfl_xor_sync(~0u, s.allowed_depth, lane);
      other.target = __shfl_xor_sync(~0u, s.target, lane);
      other.target_depth = __shfl_xor_sync(~0u, s.target_depth, lane);
      other.mass = __shfl_xor_sync(~0u, s.mass, lane);
      other.mass_depth = __shfl_xor_sync(~0u, s.mass_depth, lane);
    }
    merge<GENERAL>(s, other, factor);
  }
  return s;
}
__device__ __forceinline__ Best of_warp(Best best) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    merge(best, Best{__shfl_xor_sync(~0u, best.logit, lane), __shfl_xor_sync(~0u, best.column, lane)});
  }
  return best;
}

// What the blocks of a cluster know of one row, in the shared memory of each.
struct Exchange {
  Sums sums_of_warps[MOST_WARPS];
  Best best_of_warps[MOST_WARPS];
  Sums sums[LARGEST_CLUSTER];
  Best best[LARGEST_CLUSTER];
  Best pivot[LARGEST_CLUSTER];  // best, when it is found in a pass of its own
  Coefficients coefficients;
};

// The block's warps into one value, which the first warp sends to the others of the cluster, word by word. Every thread
// calls it.
template <class Value, class Merge>
__device__ __forceinline__ void exchange(Value value, Value nothing, Value* of_warps, Value* of_blocks, int rank,
                                         int size, const Merge& merge_warp) {
  constexpr int WORDS = static_cast<int>(sizeof(Value) / 4);
  static_assert(sizeof(Value) % 4 == 0, "values are sent word by word");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  value = merge_warp(value);
  if (n_warps > 1) {
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = nothing;
      if (lane < n_warps) value = of_warps[lane];
      value = merge_warp(value);
    }
  }
  if (warp != 0) return;
  if (lane == 0) of_warps[0] = value;
  __syncwarp();
  const auto* words = reinterpret_cast<const uint32_t*>(of_warps);
  auto* to = reinterpret_cast<uint32_t*>(&of_blocks[rank]);
  for (int i = lane; i < size * WORDS; i += 32) store_remote(to + i % WORDS, i / WORDS, words[i % WORDS]);
}

struct Score {
  double loss, lse, logprob, entropy;
  double statistics[N_ROW_STATISTICS];
};

// The end of a row: few operations in double precision, since the range of float would need a case for each end.
__device__ __forceinline__ Score score_of(const CrossEntropyRows& rows, const Sums& s, const RowTarget& target,
                                          const Scan& scan, float pivot_logit) {
  const bool soft = target.probabilities != nullptr;
  const double factor_of_values = rows.softcap == 0.0 ? rows.logit_scale : 1.0;
  const double reference = s.top * factor_of_values, others = s.total, moment = s.moment;
  const double z = exact_z(pivot_logit, rows), gap = reference - z;
  double nll, lse, entropy;
  if (gap <= 700.0) {
    const double factor = exp(gap);
    nll = log1p(others * factor);
    lse = z + nll;
    entropy = nll - factor * (moment + gap * others) / (1.0 + others * factor);
  } else {  // the pivot's probability is below 1e-300, or it is banned
    lse = log(others) + reference;
    nll = lse - z;
    entropy = log(others) - moment / others;
  }
  if (!(z < INFINITY)) nll = lse = entropy = NAN;  // inf - inf, as everywhere
  const double weight = rows.class_weights == nullptr || scan.pivot == NO_LABEL ? 1.0 : rows.class_weights[scan.pivot];
  const double smoothing = rows.label_smoothing;
  Score score = {};
  double of_target = weight == 0.0 ? 0.0 : weight * nll, of_mass = nll, of_allowed = 0.0;
  if (soft || scan.smoothing) {
    // sum a_j (lse - z_j), the pivot's share apart. Where a is 0 nothing is added, not 0 * inf.
    const double base =
        z > -INFINITY ? nll + (z - scan.origin * factor_of_values) : lse - scan.origin * factor_of_values;
    const auto cross = [&](double total, double depth, double at_pivot) {
      double result = depth * factor_of_values;
      if (total != 0.0) result += total * base;
      return at_pivot == 0.0 ? result : result + at_pivot * nll;
    };
    of_allowed = cross(s.allowed, s.allowed_depth, z > -INFINITY ? weight : 0.0);
    score.statistics[ALLOWED_COLUMNS] = s.columns + (z > -INFINITY ? 1.0 : 0.0);
    score.statistics[ALLOWED_WEIGHT] = s.allowed;
    if (soft) {
      const double probability = element_at(target.probabilities, rows.probability_element, scan.pivot);
      const bool weighted = rows.class_weights != nullptr;
      const double total = weighted ? s.target : s.mass, depth = weighted ? s.target_depth : s.mass_depth;
      of_target = cross(total, depth, probability * weight);
      of_mass = cross(s.mass, s.mass_depth, probability);
      score.statistics[TARGET_WEIGHT] = total;
      score.statistics[TARGET_MASS] = s.mass;
    }
    score.statistics[PIVOT] = static_cast<double>(scan.pivot);
    score.statistics[PIVOT_LOGPROB] = 0.0 - nll;
  }
  score.loss = smoothing < 1.0 ? (1.0 - smoothing) * of_target : 0.0;  // 0 * inf where the label is banned
  if (scan.smoothing) score.loss += smoothing / score.statistics[ALLOWED_COLUMNS] * of_allowed;
  if (rows.z_loss != 0.0) score.loss += rows.z_loss * lse * lse;
  if (scan.pivot == NO_LABEL) score.loss = of_mass = NAN;
  score.lse = lse;
  score.logprob = 0.0 - of_mass;
  score.entropy = entropy;
  return score;
}

__device__ __forceinline__ void write_row(const CrossEntropyForward& p, int64_t row, const Score& score,
                                          int64_t argmax) {
  p.loss[row] = static_cast<float>(score.loss);
  p.lse[row] = static_cast<float>(score.lse);
  p.logprobs[row] = static_cast<float>(score.logprob);
  if (p.entropy != nullptr) p.entropy[row] = static_cast<float>(score.entropy);
  if (p.argmax != nullptr) p.argmax[row] = argmax;
  if (p.statistics != nullptr) {
    for (int i = 0; i < N_ROW_STATISTICS; i++) p.statistics[row * N_ROW_STATISTICS + i] = score.statistics[i];
  }
}

// backward.grad_logits == nullptr: the forward pass alone. KEPT: the row is kept in shared memory.
template <class T, bool GENERAL, bool KEPT>
__global__ void __launch_bounds__(MOST_THREADS, 5)
    score_rows(const __grid_constant__ CrossEntropyForward p, const __grid_constant__ CrossEntropyBackward backward,
               const CudaLabels labels, const Transform transform) {
  constexpr int N = VECTOR<T>, BATCH = GENERAL ? 1 : 4;
  MASKOPS_DYNAMIC_SHARED(memory);
  MASKOPS_SHARED(Exchange, shared, [1]);
  Exchange& parts = shared[0];
  const int rank = KEPT ? cluster_rank() : 0, size = KEPT ? cluster_size() : 1;
  const bool first_thread = threadIdx.x == 0;
  for (int64_t row = blockIdx.x / size; row < p.rows.n_rows; row += gridDim.x / size) {
    const T* x = static_cast<const T*>(p.rows.logits) + row * p.rows.row_stride;
    T* gradient = static_cast<T*>(backward.grad_logits);
    if (gradient != nullptr) gradient += row * backward.grad_row_stride;
    const RowTarget target = target_of(p.rows, labels, row);
    const Part<T, KEPT> part(x, p.rows.vocabulary, rank, size, KEPT ? reinterpret_cast<uint4*>(memory) : nullptr);
    if (target.skipped) {
      if (rank == 0 && first_thread) write_row(p, row, Score{}, -1);
      if (KEPT && gradient != nullptr) {
        const float zeros[N] = {};
        for (int64_t i = part.begin + threadIdx.x; i < part.end; i += blockDim.x)
          store_floats<N>(gradient, part.count, part.column(i), zeros);
      }
      continue;
    }
    if (KEPT) {
      cluster_arrive();
      part.fetch();
    }
    const bool soft = GENERAL && target.probabilities != nullptr;
    const bool wants_best = GENERAL && p.argmax != nullptr && !soft;
    Scan scan = {transform, 0.0f, target.label, p.entropy != nullptr, p.rows.label_smoothing != 0.0, wants_best};
    Best best = {-INFINITY, NO_COLUMN};
    const auto best_of = [&](const Best* of_blocks) {
      Best found = of_blocks[0];
      for (int i = 1; i < size; i++) merge(found, of_blocks[i]);
      return found.column == NO_COLUMN ? 0 : found.column;  // nothing but -inf and NaN
    };
    const auto warps_best = [](const Best& value) { return of_warp(value); };
    bool waits = KEPT;  // for blocks that may not have begun, or may still read what they were told of the row before
    if (soft) {
      part.template each<BATCH>([&](const Vector<T>& vector, int64_t at) {
        float values[N];
        unpack(vector, values);
#pragma unroll
        for (int j = 0; j < N; j++)
          if (values[j] > best.logit) best = {values[j], static_cast<int32_t>(at + j)};
      });
      if (waits) cluster_wait();
      waits = false;
      exchange(best, Best{-INFINITY, NO_COLUMN}, parts.best_of_warps, parts.pivot, rank, size, warps_best);
      if (KEPT) cluster_arrive();
      if (KEPT) cluster_wait();
      if (!KEPT) __syncthreads();
      scan.pivot = best_of(parts.pivot);
    }
    const float pivot_logit = scan.pivot == NO_LABEL ? -INFINITY : to_float(x[scan.pivot]);
    if (GENERAL && pivot_logit > -INFINITY) scan.origin = value_of(pivot_logit, transform);
    Sums sums = no_sums();
    part.template each<BATCH>(
        [&](const Vector<T>& vector, int64_t at) { add<T, GENERAL>(vector, at, p.rows, target, scan, sums, best); });
    if (waits) cluster_wait();
    exchange(sums, no_sums(), parts.sums_of_warps, parts.sums, rank, size,
             [&](const Sums& value) { return of_warp<GENERAL>(value, transform.factor); });
    if (wants_best) exchange(best, Best{-INFINITY, NO_COLUMN}, parts.best_of_warps, parts.best, rank, size, warps_best);
    if (KEPT) cluster_arrive();
    if (KEPT) cluster_wait();
    if (!KEPT) __syncthreads();
    const RowGradients grad = KEPT && gradient != nullptr ? gradients_of(backward, row) : RowGradients{};
    if (first_thread && (rank == 0 || grad.any())) {
      Sums all = parts.sums[0];
      for (int i = 1; i < size; i++) merge<GENERAL>(all, parts.sums[i], transform.factor);
      const Score score = score_of(p.rows, all, target, scan, pivot_logit);
      if (rank == 0) write_row(p, row, score, soft ? scan.pivot : wants_best ? best_of(parts.best) : -1);
      if (grad.any()) {
        // As if they had been written and read again: both passes give the same, whether they run together or not.
        parts.coefficients =
            coefficients_of(p.rows, grad, target, scan.pivot, pivot_logit, static_cast<float>(score.lse),
                            static_cast<float>(score.logprob), static_cast<float>(score.entropy), score.statistics);
      }
    }
    if (KEPT && gradient != nullptr) {
      __syncthreads();
      const Coefficients c = parts.coefficients;
      part.template each<BATCH>([&](const Vector<T>& vector, int64_t at) {
        float values[N] = {};
        if (grad.any()) {
          unpack(vector, values);
          replace_by_gradients<N, GENERAL>(values, at, p.rows, target, c, transform);
        }
        store_floats<N>(gradient, part.count, at, values);
      });
    }
    if (!KEPT || gradient != nullptr) __syncthreads();  // what is shared is used again
  }
}

constexpr int64_t PART_BYTES = 32 << 10;     // of a row in a block, while the cluster can grow
constexpr int64_t LARGEST_PART = 160 << 10;  // beyond, too few loads are under way on a multiprocessor
constexpr int64_t MOST_BLOCKS = 1 << 30;

struct Shape {
  bool kept;
  int size;     // of a cluster
  int threads;  // of a block
  int64_t part_bytes;
};

// From shapes and the device alone. `passes`: how often the logits are used.
Shape shape_of(const CrossEntropyRows& rows, const Device& device, int passes) {
  const int64_t element = rows.element == Element::float32 ? 4 : 2;
  const int64_t bytes = rows.vocabulary * element + 32;  // either end of a row may share its vector
  const bool has_clusters = device.major >= 9;
  Shape shape = {false, 1, MOST_THREADS, 0};
  if (has_clusters)
    while (shape.size < LARGEST_CLUSTER && bytes > shape.size * PART_BYTES) shape.size *= 2;
  shape.part_bytes = (bytes / shape.size + 31) / 16 * 16;
  const int64_t room = device.shared_bytes - static_cast<int64_t>(sizeof(Exchange)) - 1024;
  shape.kept = (has_clusters || passes > 1) && shape.part_bytes <= (room < LARGEST_PART ? room : LARGEST_PART);
  if (!shape.kept) shape.size = 1;
  // A warp for every few vectors of a row.
  const int64_t vectors = bytes / shape.size / 16;
  while (shape.threads > 32 && vectors * 2 <= shape.threads * 4) shape.threads /= 2;
  return shape;
}

template <class T, bool GENERAL>
void run(const CrossEntropyForward& p, const CrossEntropyBackward& backward, const CudaLabels& labels,
         const Shape& shape, void* stream) {
  const int64_t most = MOST_BLOCKS / shape.size, clusters = p.rows.n_rows < most ? p.rows.n_rows : most;
  const Transform transform = transform_of(p.rows);
  if (shape.kept) {
    launch_clusters(score_rows<T, GENERAL, true>, clusters, shape.size, shape.threads,
                    static_cast<size_t>(shape.part_bytes), stream, p, backward, labels, transform);
  } else {
    launch(score_rows<T, GENERAL, false>, dim3(static_cast<unsigned>(clusters)),
           dim3(static_cast<unsigned>(shape.threads)), 0, stream, p, backward, labels, transform);
  }
}

template <class T>
void run(const CrossEntropyForward& p, const CrossEntropyBackward& backward, const CudaLabels& labels,
         const Shape& shape, void* stream) {
  const bool entropy = p.entropy != nullptr || backward.grad_entropy.values != nullptr;
  if (is_general(p.rows, entropy) || p.argmax != nullptr) {
    run<T, true>(p, backward, labels, shape, stream);
  } else {
    run<T, false>(p, backward, labels, shape, stream);
  }
}

void run(const CrossEntropyForward& p, const CrossEntropyBackward& backward, const CudaLabels& labels,
         const Shape& shape, void* stream) {
  switch (p.rows.element) {
    case Element::float32: return run<float>(p, backward, labels, shape, stream);
    case Element::bfloat16: return run<__nv_bfloat16>(p, backward, labels, shape, stream);
    case Element::float16: return run<__half>(p, backward, labels, shape, stream);
  }
}

}  // namespace

void cross_entropy_forward_cuda(const CrossEntropyForward& p, const CudaLabels& labels, const Device& device,
                                void* stream) {
  const int passes = p.rows.probabilities == nullptr ? 1 : 2;
  run(p, CrossEntropyBackward{}, labels, shape_of(p.rows, device, passes), stream);
}

void cross_entropy_both_cuda(const CrossEntropyForward& forward, const CrossEntropyBackward& backward,
                             const CudaLabels& labels, const Device& device, void* stream) {
  const Shape shape = shape_of(forward.rows, device, 2);
  run(forward, shape.kept ? backward : CrossEntropyBackward{}, labels, shape, stream);
  if (!shape.kept) cross_entropy_backward_cuda(backward, labels, stream);
}

}  // namespace maskops
