// What the kernels of both passes of cross-entropy are made of.
#pragma once

#include "cross_entropy.h"
#include "vectors.h"

namespace maskops {

constexpr float DEEPEST = -128.0f;  // expf gives exactly 0 here

// From a logit to its value, which is the logit or what the softcap makes of it, and from there to z = factor * value.
struct Transform {
  float softcap;  // 0: none
  float inside;   // the argument of tanh is inside * logit
  float factor;
};

inline Transform transform_of(const CrossEntropyRows& rows) {
  if (rows.softcap == 0.0) return {0.0f, 0.0f, static_cast<float>(rows.logit_scale)};
  return {static_cast<float>(rows.softcap), static_cast<float>(rows.logit_scale / rows.softcap), 1.0f};
}

// A logit of -inf is a banned column and stays -inf: the cap must lift neither it nor the filling beyond a row's ends.
__device__ __forceinline__ float value_of(float logit, const Transform& transform) {
  if (transform.softcap == 0.0f || logit == -INFINITY) return logit;
  return tanhf(logit * transform.inside) * transform.softcap;
}
// d(softcap * tanh(u)) / du / softcap = 1 - tanh^2, which would cancel; 1 in a banned column, which stays what it is.
__device__ __forceinline__ float slope_of(float logit, const Transform& transform) {
  if (logit == -INFINITY) return 1.0f;
  const float e = expf(-2.0f * fabsf(logit * transform.inside)), half = 2.0f / (1.0f + e);
  return e * (half * half);
}
// z of one logit, and dz/dlogit, in double precision: near p = 1 an absolute error of the label's z is a relative one
// of the loss.
__device__ inline double exact_z(double logit, const CrossEntropyRows& rows) {
  const double scaled = logit * rows.logit_scale;
  return rows.softcap == 0.0 || scaled == -INFINITY ? scaled : rows.softcap * tanh(scaled / rows.softcap);
}
__device__ inline double exact_slope(double logit, const CrossEntropyRows& rows) {
  if (rows.softcap == 0.0 || logit == -INFINITY) return rows.logit_scale;
  const double e = exp(-2.0 * fabs(logit * rows.logit_scale / rows.softcap)), half = 2.0 / (1.0 + e);
  return rows.logit_scale * e * (half * half);
}

constexpr int64_t NO_LABEL = -1;  // outside the vocabulary

struct RowTarget {
  bool skipped;
  int64_t label;              // NO_LABEL, or a column; rows that are scored against probabilities have none
  const void* probabilities;  // of this row; nullptr: none
};

__device__ __forceinline__ RowTarget target_of(const CrossEntropyRows& rows, const CudaLabels& labels, int64_t row) {
  const int64_t at = row * labels.stride;
  const int64_t label =
      labels.wide ? static_cast<const int64_t*>(labels.values)[at] : static_cast<const int32_t*>(labels.values)[at];
  RowTarget target = {label == labels.ignore_index, NO_LABEL, nullptr};
  if (rows.probabilities != nullptr) {
    target.skipped |= row >= rows.n_probability_rows;
    const int64_t bytes = rows.probability_element == Element::float32 ? 4 : 2;
    target.probabilities = static_cast<const char*>(rows.probabilities) + row * rows.probability_row_stride * bytes;
  } else if (label >= 0 && label < rows.vocabulary) {
    target.label = label;
  }
  return target;
}

// The statistics of a row where there are none in memory.
struct RowStatistics {
  double values[N_ROW_STATISTICS];
};

// dz_j = A p_j - E p_j (log p_j + H) + w_j (D t_j + F [z_j finite]) + G t_j, with the weight w_j and the probability
// t_j of a column, and dx = dz * dz/dx.
struct Coefficients {
  float every;     // A
  float at_pivot;  // the gradient of the label's column (or the largest), where parts of the sum cancel near p = 1
  float entropy;   // E
  float offset;    // H
  float weighted;  // D
  float smoothed;  // F
  float mass;      // G
  float lse;
  int64_t pivot;
};

// What comes in for a row.
struct RowGradients {
  float loss, lse, logprobs, entropy;
  __device__ __forceinline__ bool any() const {
    return loss != 0.0f || lse != 0.0f || logprobs != 0.0f || entropy != 0.0f;
  }
};
__device__ __forceinline__ float incoming(const RowGradient& gradient, int64_t row) {
  return gradient.values == nullptr ? 0.0f : gradient.values[row * gradient.stride];
}
__device__ __forceinline__ RowGradients gradients_of(const CrossEntropyBackward& p, int64_t row) {
  return {incoming(p.grad_loss, row), incoming(p.grad_lse, row), incoming(p.grad_logprobs, row),
          incoming(p.grad_entropy, row)};
}

// pivot_logit: read before any gradient may have replaced it. statistics: nullptr where the row has none.
__device__ inline Coefficients coefficients_of(const CrossEntropyRows& rows, const RowGradients& grad,
                                               const RowTarget& target, int64_t pivot, float pivot_logit, double lse,
                                               double logprob, double row_entropy, const double* statistics) {
  const bool soft = target.probabilities != nullptr;
  const double smoothing = rows.label_smoothing, scale = rows.logit_scale;
  if (soft) logprob = statistics[PIVOT_LOGPROB];
  const double probability = exp(logprob), rest = expm1(logprob);
  const double grad_loss = grad.loss, grad_logprobs = grad.logprobs, grad_entropy = grad.entropy;
  const double entropy = grad_entropy != 0.0 ? row_entropy : 0.0;
  const double weight = rows.class_weights == nullptr || pivot == NO_LABEL ? 1.0 : rows.class_weights[pivot];
  const double of_target = (1.0 - smoothing) * grad_loss;
  const double of_lse = 2.0 * rows.z_loss * lse * grad_loss + grad.lse;
  // A sum of a_j (lse - z_j) has the gradient p_j * (sum of a) - a_j. At the pivot that is a * (p - 1), of which
  // nothing cancels, plus p * (sum of the other a).
  double every = of_lse, at_pivot = of_lse * probability;
  const auto add = [&](double coefficient, double others, double at) {
    every += coefficient * (others + at);
    at_pivot += coefficient * (others * probability + at * rest);
  };
  double smoothed = 0.0;
  if (soft) {
    const double share = element_at(target.probabilities, rows.probability_element, pivot);
    add(of_target, statistics[TARGET_WEIGHT], share * weight);
    add(-grad_logprobs, statistics[TARGET_MASS], share);
  } else {
    add(of_target * weight - grad_logprobs, 0.0, 1.0);
  }
  if (smoothing != 0.0) {
    smoothed = -smoothing * grad_loss / statistics[ALLOWED_COLUMNS];
    add(-smoothed, statistics[ALLOWED_WEIGHT], pivot_logit > -INFINITY ? weight : 0.0);
  }
  if (probability > 0.0) at_pivot -= grad_entropy * probability * (logprob + entropy);
  Coefficients c;
  c.every = static_cast<float>((pivot == NO_LABEL ? static_cast<double>(NAN) : every) * scale);
  c.at_pivot = static_cast<float>(at_pivot * exact_slope(pivot_logit, rows));
  c.entropy = static_cast<float>(grad_entropy * scale);
  c.offset = static_cast<float>(entropy);
  c.weighted = static_cast<float>(-of_target * scale);
  c.smoothed = static_cast<float>(smoothed * scale);
  c.mass = static_cast<float>(grad_logprobs * scale);
  c.lse = static_cast<float>(lse);
  c.pivot = pivot;
  return c;
}

// Logits become their gradients: N columns from `at` on, which may lie outside of the row (their results are nothing).
template <int N, bool GENERAL>
__device__ __forceinline__ void replace_by_gradients(float (&x)[N], int64_t at, const CrossEntropyRows& rows,
                                                     const RowTarget& target, const Coefficients& c,
                                                     const Transform& transform) {
  float weights[N], probabilities[N];
  if constexpr (GENERAL) {
#pragma unroll
    for (int j = 0; j < N; j++) weights[j] = 1.0f, probabilities[j] = 0.0f;
    if (rows.class_weights != nullptr) load_floats<N>(rows.class_weights, rows.vocabulary, at, 0.0f, weights);
    if (target.probabilities != nullptr) {
      load_floats<N>(target.probabilities, rows.probability_element, rows.vocabulary, at, 0.0f, probabilities);
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) {
    if constexpr (GENERAL) {
      const float value = value_of(x[j], transform), d = fmaf(value, transform.factor, -c.lse);
      float g = expf(d) * (c.every - c.entropy * (fmaxf(d, DEEPEST) + c.offset));
      g += weights[j] * (probabilities[j] * c.weighted) + probabilities[j] * c.mass;
      if (value > -INFINITY) g += weights[j] * c.smoothed;
      x[j] = transform.softcap == 0.0f ? g : g * slope_of(x[j], transform);
    } else {
      x[j] = expf(fmaf(x[j], transform.factor, -c.lse)) * c.every;
    }
  }
  if (c.pivot >= at && c.pivot < at + N) {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (c.pivot == at + j) x[j] = c.at_pivot;
  }
}

// Whether columns need more than their probability: a softcap, the entropy, or weights and probabilities of their own.
inline bool is_general(const CrossEntropyRows& rows, bool entropy) {
  return rows.softcap != 0.0 || rows.label_smoothing != 0.0 || rows.probabilities != nullptr || entropy;
}

}  // namespace maskops
