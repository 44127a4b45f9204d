// Bindings of attention in plain calls: no features, and masks that text and offsets describe, which are planned here.
// A tensor less to pass, an operator less to call: each of them takes as long as a part of a small problem.
#include <array>
#include <iterator>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/attention.h"
#include "../plan_program.h"
#include "attention_spans.h"

namespace maskops {
namespace {

// A (batch, heads, rows, width) tensor, or a packed one (rows, heads, width) seen as such.
class Heads {
 public:
  explicit Heads(const Tensor& tensor) : data_(nullptr), dim_(tensor.dim()), dtype_(tensor.dtype()) {
    const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
    require(dim_ == 3 || dim_ == 4, "attention: q, k and v must have 3 or 4 dimensions");
    if (dim_ == 4) {
      std::copy_n(sizes, 4, sizes_);
      std::copy_n(strides, 4, strides_);
    } else {
      const int order[3] = {1, 0, 2};
      for (int d = 0; d < 3; d++) {
        sizes_[d + 1] = sizes[order[d]];
        strides_[d + 1] = strides[order[d]];
      }
    }
    data_ = tensor.data();
  }

  int64_t dim() const { return 4; }
  bool is_packed() const { return dim_ == 3; }
  DType dtype() const { return dtype_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int64_t numel() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }
  StridedRows rows() const { return {data_, strides_[0], strides_[1], strides_[2]}; }

  // A new tensor with these sizes but the last one, and its order of dimensions.
  Tensor empty_like(int64_t width) const {
    int64_t sizes[4], strides[4];
    dense_in_order_of(sizes_, strides_, width, sizes, strides);
    if (!is_packed()) return Tensor::empty_strided(4, sizes, strides, dtype_);
    const int64_t packed_sizes[3] = {sizes[2], sizes[1], width}, packed_strides[3] = {strides[2], strides[1], 1};
    return Tensor::empty_strided(3, packed_sizes, packed_strides, dtype_);
  }

 private:
  void* data_;
  int64_t dim_;
  DType dtype_;
  int64_t sizes_[4] = {1, 0, 0, 0}, strides_[4] = {0, 0, 0, 0};
};

// ---- plans ----

// What decides a plan, values and all. Where offsets are absent there are none.
struct PlanKey {
  std::string program;  // of spans, without a layout
  int64_t q_len = 0, k_len = 0;
  std::vector<int64_t> offsets;  // of the queries, then of the keys where they have their own
  bool keys_given = false;

  bool operator==(const PlanKey& other) const {
    return q_len == other.q_len && k_len == other.k_len && keys_given == other.keys_given && offsets == other.offsets &&
           program == other.program;
  }
};

struct DirectPlan {
  PlanKey key;
  std::vector<int32_t> start, end, tiles;
  std::vector<uint8_t> key_valid;
  int32_t n_tiles = 0, n_spans = 0;

  explicit DirectPlan(const PlanKey& wanted) : key(wanted) {
    PlanRequest request{parse_plan(key.program), {}, 1, key.q_len, key.k_len};
    require(request.program.layouts.empty(), "attention: the program of a plain call has no layouts");
    for (const PlanStep& step : request.program.steps) {
      require(step.op != PlanStep::Op::prefix_of, "attention: the program of a plain call has no operands");
    }
    if (!key.offsets.empty()) {
      const auto parts = key.keys_given ? 2 : 1, count = static_cast<int>(key.offsets.size()) / parts;
      for (int part = 0; part < parts; part++) {
        request.operands[part] = {key.offsets.data() + part * count, IntegerType::int64, 1, {count, 0}};
      }
      PlanLayout layout{PlanLayout::Kind::cu_seqlens};
      layout.operand = 0;
      layout.key_operand = parts - 1;
      layout.keys_given = key.keys_given;
      layout.names = &plan_text::varlen_names;
      request.program.layouts.push_back(layout);
    }
    check_plan(request);
    n_spans = static_cast<int32_t>(request.program.n_spans());
    start.resize(static_cast<size_t>(n_spans * key.q_len));
    end.resize(start.size());
    key_valid.resize(static_cast<size_t>(key.k_len));
    tiles.resize(static_cast<size_t>(tiles_per_batch_element(key.q_len, key.k_len) * (4 + 4 * n_spans)));
    build_plan(request,
               {start.data(), end.data(), key_valid.data(), tiles.data(), &n_tiles, nullptr, nullptr, nullptr});
  }

  Spans spans() const {
    return {start.data(),    end.data(), key_valid.data(), tiles.data(), key.q_len, 0, 0, n_spans, n_tiles,
            4 + 4 * n_spans, 1};
  }
};

// Plans of this thread's last calls. A plan is found by the values that decide it, which are read anew in every call:
// whatever may have changed a tensor meanwhile, the plan is that of its values.
constexpr int64_t LONGEST_KEPT = 1 << 13;  // queries and keys: with more of them the work takes longer than to plan it

std::shared_ptr<const DirectPlan> plan_of(const PlanKey& key) {
  thread_local std::array<std::shared_ptr<const DirectPlan>, 8> kept;
  thread_local size_t next = 0;
  for (const auto& plan : kept) {
    if (plan != nullptr && plan->key == key) return plan;
  }
  auto plan = std::make_shared<const DirectPlan>(key);
  if (key.q_len + key.k_len + static_cast<int64_t>(key.offsets.size()) <= LONGEST_KEPT) {
    kept[next++ % kept.size()] = plan;
  }
  return plan;
}

void read_offsets(const Tensor& tensor, std::vector<int64_t>& offsets) {
  require(tensor.dim() == 1 && tensor.size(0) >= 1, "attention: offsets must have one dimension and a first element");
  const DType dtype = tensor.dtype();
  require(dtype == DType::int32 || dtype == DType::int64, "attention: offsets must be int32 or int64");
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  const void* data = tensor.data();
  for (int64_t i = 0; i < count; i++) {
    offsets.push_back(dtype == DType::int64 ? static_cast<const int64_t*>(data)[i * stride]
                                            : static_cast<const int32_t*>(data)[i * stride]);
  }
}

// ---- calls ----

struct Call {
  Heads q, k, v;
  AttentionShape shape;
  std::shared_ptr<const DirectPlan> plan;  // where the spans are made here
  Spans spans{};

  Call(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale) : q(q), k(k), v(v) {
    require(this->q.is_packed() == this->k.is_packed() && this->q.is_packed() == this->v.is_packed(),
            "attention: q, k and v must have equally many dimensions");
    require(this->q.size(3) > 0, "attention: q has no width");
    if (std::isnan(softmax_scale))
      softmax_scale = 1.0 / std::sqrt(static_cast<double>(this->q.size(3)));  // the default
    shape = attention_shape(this->q, this->k, this->v, softmax_scale, 0.0);
  }
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const SpanTensors& tensors, double softmax_scale)
      : Call(q, k, v, softmax_scale) {
    spans = spans_of(shape, tensors);
  }
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const std::string& program, double softmax_scale)
      : Call(q, k, v, softmax_scale) {
    take({program, shape.q_len, shape.k_len, {}, false});
  }

  // Offsets of the keys that are empty are those of the queries.
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
       const std::string& program, double softmax_scale)
      : Call(q, k, v, softmax_scale) {
    require(this->q.is_packed(), "attention: offsets are for packed rows");
    PlanKey key{program, shape.q_len, shape.k_len, {}, cu_seqlens_k.numel() != 0};
    read_offsets(cu_seqlens_q, key.offsets);
    if (key.keys_given) {
      read_offsets(cu_seqlens_k, key.offsets);
      require(cu_seqlens_k.size(0) == cu_seqlens_q.size(0), "attention: offsets must be equally many");
    }
    take(std::move(key));
  }

  // `kept` is what offsets() made.
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kept, const std::string& program,
       double softmax_scale)
      : Call(q, k, v, softmax_scale) {
    require(this->q.is_packed(), "attention: offsets are for packed rows");
    require(kept.dim() == 2 && kept.dtype() == DType::int64 && (kept.size(0) == 1 || kept.size(0) == 2) &&
                kept.size(1) >= 1 && (kept.size(1) == 1 || kept.stride(1) == 1) &&
                (kept.size(0) == 1 || kept.stride(0) == kept.size(1)),
            "attention: offsets must be those of the forward pass");
    const auto* values = kept.data<int64_t>();
    take({program, shape.q_len, shape.k_len, {values, values + kept.numel()}, kept.size(0) == 2});
  }

  void take(PlanKey key) {
    plan = plan_of(key);
    spans = plan->spans();
  }

  Tensor forward(float* lse) const {
    Tensor out = q.empty_like(shape.value_dim);
    if (has_work(shape)) {
      attention_forward({shape, spans, Features{}, q.rows(), k.rows(), v.rows(), Heads(out).rows(), lse},
                        torch_threads());
    }
    return out;
  }
  std::tuple<Tensor> alone() const {
    const int64_t rows = shape.batch * shape.heads * shape.q_len;
    float few[1 << 10];  // uninitialised: a tensor takes longer than they do
    if (rows <= static_cast<int64_t>(std::size(few))) return {forward(few)};
    return std::move(std::get<0>(with_lse()));
  }
  std::tuple<Tensor, Tensor> with_lse() const {
    Tensor lse = q.is_packed() ? Tensor::empty({shape.heads, shape.q_len}, DType::float32)
                               : Tensor::empty({shape.batch, shape.heads, shape.q_len}, DType::float32);
    Tensor out = forward(lse.data<float>());
    return {std::move(out), std::move(lse)};
  }
  // The offsets as they were read.
  Tensor offsets() const {
    const auto& values = plan->key.offsets;
    const int64_t parts = plan->key.keys_given ? 2 : 1, count = static_cast<int64_t>(values.size()) / parts;
    Tensor copy = Tensor::empty({parts, count}, DType::int64);
    std::copy(values.begin(), values.end(), copy.data<int64_t>());
    return copy;
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse) const {
    const Heads grad_rows(grad_out), out_rows(out);
    require(grad_rows.is_packed() == q.is_packed() && out_rows.is_packed() == q.is_packed(),
            "attention: out and its gradient must have as many dimensions as q");
    check_out(shape, q.dtype(), out_rows, grad_rows);
    const int64_t sizes[3] = {shape.batch, shape.heads, shape.q_len};
    const int64_t first = q.is_packed() ? 1 : 0;
    int64_t running = 1;
    require(lse.dim() == 3 - first && lse.dtype() == DType::float32, "attention: lse must be that of the forward pass");
    for (int64_t d = 3; d-- > first;) {
      require(
          lse.size(d - first) == sizes[d] && (sizes[d] <= 1 || !has_work(shape) || lse.stride(d - first) == running),
          "attention: lse must be that of the forward pass");
      running *= sizes[d];
    }
    Tensor grad_q = q.empty_like(shape.head_dim), grad_k = k.empty_like(shape.head_dim);
    Tensor grad_v = v.empty_like(shape.value_dim);
    if (has_work(shape)) {
      attention_backward({shape, spans, Features{}, q.rows(), k.rows(), v.rows(), out_rows.rows(), grad_rows.rows(),
                          Heads(grad_q).rows(), Heads(grad_k).rows(), Heads(grad_v).rows(), lse.data<float>()},
                         torch_threads());
    } else {
      for (const Tensor* gradient : {&grad_q, &grad_k, &grad_v}) clear(*gradient);
    }
    return {std::move(grad_q), std::move(grad_k), std::move(grad_v)};
  }
};

std::tuple<Tensor, Tensor> attention_direct_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                                const Tensor& end, const Tensor& key_valid, const Tensor& tiles,
                                                const Tensor& tile_count, double softmax_scale) {
  return Call(q, k, v, SpanTensors{start, end, key_valid, tiles, tile_count}, softmax_scale).with_lse();
}

std::tuple<Tensor, Tensor, Tensor> attention_direct_backward_cpu(const Tensor& grad_out, const Tensor& q,
                                                                 const Tensor& k, const Tensor& v, const Tensor& out,
                                                                 const Tensor& lse, const Tensor& start,
                                                                 const Tensor& end, const Tensor& key_valid,
                                                                 const Tensor& tiles, const Tensor& tile_count,
                                                                 double softmax_scale) {
  return Call(q, k, v, SpanTensors{start, end, key_valid, tiles, tile_count}, softmax_scale)
      .backward(grad_out, out, lse);
}

std::tuple<Tensor> attention_pattern_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::string& program,
                                         double softmax_scale) {
  return Call(q, k, v, program, softmax_scale).alone();
}

std::tuple<Tensor, Tensor> attention_pattern_saving_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const std::string& program, double softmax_scale) {
  return Call(q, k, v, program, softmax_scale).with_lse();
}

std::tuple<Tensor, Tensor, Tensor> attention_pattern_backward_cpu(const Tensor& grad_out, const Tensor& q,
                                                                  const Tensor& k, const Tensor& v, const Tensor& out,
                                                                  const Tensor& lse, const std::string& program,
                                                                  double softmax_scale) {
  return Call(q, k, v, program, softmax_scale).backward(grad_out, out, lse);
}

std::tuple<Tensor> attention_packed_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                        const Tensor& cu_seqlens_k, const std::string& program, double softmax_scale) {
  return Call(q, k, v, cu_seqlens_q, cu_seqlens_k, program, softmax_scale).alone();
}

std::tuple<Tensor, Tensor, Tensor> attention_packed_saving_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                               const std::string& program, double softmax_scale) {
  const Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, program, softmax_scale);
  auto [out, lse] = call.with_lse();
  return {std::move(out), std::move(lse), call.offsets()};
}

std::tuple<Tensor, Tensor, Tensor> attention_packed_backward_cpu(const Tensor& grad_out, const Tensor& q,
                                                                 const Tensor& k, const Tensor& v, const Tensor& out,
                                                                 const Tensor& lse, const Tensor& offsets,
                                                                 const std::string& program, double softmax_scale) {
  return Call(q, k, v, offsets, program, softmax_scale).backward(grad_out, out, lse);
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&attention_direct_cpu>("attention_direct");
  library.implement<&attention_direct_backward_cpu>("attention_direct_backward");
  library.implement<&attention_pattern_cpu>("attention_pattern");
  library.implement<&attention_pattern_saving_cpu>("attention_pattern_saving");
  library.implement<&attention_pattern_backward_cpu>("attention_pattern_backward");
  library.implement<&attention_packed_cpu>("attention_packed");
  library.implement<&attention_packed_saving_cpu>("attention_packed_saving");
  library.implement<&attention_packed_backward_cpu>("attention_packed_backward");
  return true;
}();

}  // namespace
}  // namespace maskops
