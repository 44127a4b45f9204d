// From tensors to plain parameters to kernels, and the registration of the CPU implementations. The schemas are defined
// in Python, in registration.py of each operator.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "plan.h"
#include "torch_abi.h"

namespace maskops {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Threads torch_threads() {
  uint32_t count = 1;
  MASKOPS_CHECK_TORCH(torch_get_num_threads(&count));
  return {&run_tasks, static_cast<int>(count)};
}

Element element_of(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case DType::float32: return Element::float32;
    case DType::bfloat16: return Element::bfloat16;
    case DType::float16: return Element::float16;
    default: throw std::invalid_argument("maskops: the CPU kernels take float32, bfloat16 and float16");
  }
}

StridedRows rows_of(const Tensor& tensor) {
  return {tensor.data(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A dense tensor with the sizes of `like`, but for the last one, and its order of dimensions. The twin of
// output_strides in registration.py, which the fake kernels use.
Tensor empty_in_order_of(const Tensor& like, int64_t width) {
  const int64_t* sizes = like.sizes();
  const int64_t* strides = like.strides();
  int order[3] = {0, 1, 2};
  auto key = [&](int d) { return strides[d] == 0 ? INT64_MAX : strides[d]; };
  std::stable_sort(order, order + 3, [&](int a, int b) { return key(a) > key(b); });
  const int64_t new_sizes[4] = {sizes[0], sizes[1], sizes[2], width};
  int64_t new_strides[4] = {0, 0, 0, 1};
  int64_t running = std::max<int64_t>(width, 1);
  for (int i = 3; i-- > 0;) {
    new_strides[order[i]] = running;
    running *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return Tensor::empty_strided(4, new_sizes, new_strides, like.dtype());
}

// A large tensor that was just allocated has no memory behind it yet: the kernel (of the system) provides and clears it
// page by page at the first touch, which takes several times longer with pages of 4 KiB than with huge ones.
void advise_huge_pages(const Tensor& tensor, int64_t element_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t worthwhile = 32 << 20;
  constexpr uintptr_t page = 4096;
  const int64_t bytes = tensor.numel() * element_bytes;
  if (bytes < worthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failing costs time only
#else
  static_cast<void>(tensor), static_cast<void>(element_bytes);
#endif
}

// Without elements any stride will do; torch's contiguous() leaves it as it is.
bool last_is_contiguous(const Tensor& tensor) {
  return tensor.numel() == 0 || tensor.size(3) <= 1 || tensor.stride(3) == 1;
}

AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                               double softcap) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must have 4 dimensions");
  require(q.dtype() == k.dtype() && q.dtype() == v.dtype(), "attention: q, k and v must have one dtype");
  AttentionShape shape{element_of(q),
                       q.size(0),
                       q.size(1),
                       k.size(1),
                       q.size(2),
                       k.size(2),
                       q.size(3),
                       v.size(3),
                       static_cast<float>(softmax_scale),
                       static_cast<float>(softcap)};
  require(k.size(0) == shape.batch && v.size(0) == shape.batch, "attention: q, k and v must have one batch size");
  require(k.size(3) == shape.head_dim, "attention: q and k must have one head dimension");
  require(v.size(1) == shape.kv_heads && v.size(2) == shape.k_len, "attention: k and v must have the same rows");
  require(shape.heads == 0 || (shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0),
          "attention: the heads of k and v must divide those of q");
  for (const Tensor* tensor : {&q, &k, &v}) {
    require(last_is_contiguous(*tensor), "attention: the last dimension must be contiguous");
  }
  return shape;
}

// Checks what the kernels rely on for their memory accesses; the limits of keys are clamped by the kernels themselves.
Spans spans_of(const AttentionShape& shape, const Tensor& start, const Tensor& end, const Tensor& key_valid,
               const Tensor& tiles, const Tensor& tile_count) {
  require(start.dim() == 3 && end.dim() == 3 && key_valid.dim() == 2 && tiles.dim() == 2 && tile_count.numel() == 1,
          "attention: the spans have the wrong number of dimensions");
  require(start.dtype() == DType::int32 && end.dtype() == DType::int32 && tiles.dtype() == DType::int32 &&
              tile_count.dtype() == DType::int32 && key_valid.dtype() == DType::uint8,
          "attention: the spans must be int32 and key_valid uint8");
  const int64_t n_spans = start.size(0), plan_batch = start.size(1);
  require(n_spans >= 1 && end.size(0) == n_spans && end.size(1) == plan_batch && key_valid.size(0) == plan_batch,
          "attention: start, end and key_valid must agree in shape");
  require(plan_batch == 1 || plan_batch == shape.batch, "attention: the spans are for another batch size");
  require(start.size(2) == shape.q_len && end.size(2) == shape.q_len && key_valid.size(1) == shape.k_len,
          "attention: the spans are for other lengths than those of q and k");
  require(tiles.size(1) == 4 + 4 * n_spans, "attention: tiles has the wrong width");
  const auto contiguous = [](const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) <= 1 || tensor.stride(last) == 1;
  };
  require(contiguous(start) && contiguous(end) && contiguous(key_valid) && contiguous(tiles) &&
              (tiles.size(0) <= 1 || tiles.stride(0) == tiles.size(1)) && start.stride(0) == end.stride(0) &&
              start.stride(1) == end.stride(1),
          "attention: the spans must be contiguous");
  Spans spans{start.data<int32_t>(),
              end.data<int32_t>(),
              key_valid.data<uint8_t>(),
              tiles.data<int32_t>(),
              start.stride(0),
              plan_batch == 1 ? 0 : start.stride(1),
              plan_batch == 1 ? 0 : key_valid.stride(0),
              static_cast<int32_t>(n_spans),
              *tile_count.data<int32_t>(),
              static_cast<int32_t>(tiles.size(1)),
              static_cast<int32_t>(plan_batch)};
  require(0 <= spans.n_tiles && spans.n_tiles <= tiles.size(0), "attention: tile_count exceeds the work list");
  int32_t batch = 0, row = 0;  // the list must cover every row once, in order: each row's output is written by its tile
  for (int64_t tile = 0; tile < spans.n_tiles; tile++) {
    const int32_t* item = spans.tiles + tile * spans.tile_width;
    while (batch < item[0] && row == shape.q_len) {
      batch++;
      row = 0;
    }
    require(item[0] == batch && item[1] == row && item[2] >= 1 && row + item[2] <= shape.q_len,
            "attention: the work list does not cover the rows of q in order");
    row += item[2];
  }
  require(plan_batch == 0 || shape.q_len == 0 || (batch == plan_batch - 1 && row == shape.q_len),
          "attention: the work list does not cover the rows of q");
  return spans;
}

std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                                 const Tensor& end, const Tensor& key_valid, const Tensor& tiles,
                                                 const Tensor& tile_count, double softmax_scale, double softcap) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, start, end, key_valid, tiles, tile_count);
  Tensor out = empty_in_order_of(q, shape.value_dim);
  Tensor lse = Tensor::empty({shape.batch, shape.heads, shape.q_len}, DType::float32);
  if (shape.batch > 0 && shape.heads > 0 && shape.q_len > 0) {
    attention_forward({shape, spans, rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data<float>()},
                      torch_threads());
  }
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_out, const Tensor& grad_lse,
                                                          const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Tensor& out, const Tensor& lse, const Tensor& start,
                                                          const Tensor& end, const Tensor& key_valid,
                                                          const Tensor& tiles, const Tensor& tile_count,
                                                          double softmax_scale, double softcap) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, start, end, key_valid, tiles, tile_count);
  for (const Tensor* tensor : {&grad_out, &out}) {
    require(tensor->dim() == 4 && tensor->dtype() == q.dtype() && tensor->size(0) == shape.batch &&
                tensor->size(1) == shape.heads && tensor->size(2) == shape.q_len && tensor->size(3) == shape.value_dim,
            "attention: out and its gradient must have the shape and dtype of the output");
    require(last_is_contiguous(*tensor), "attention: the last dimension of out and its gradient must be contiguous");
  }
  const int64_t rows = shape.batch * shape.heads * shape.q_len;
  const auto dense = [&](const Tensor& tensor) {
    return tensor.dtype() == DType::float32 && tensor.numel() == rows && tensor.dim() == 3 &&
           (rows == 0 ||
            ((shape.q_len == 1 || tensor.stride(2) == 1) && (shape.heads == 1 || tensor.stride(1) == shape.q_len) &&
             (shape.batch == 1 || tensor.stride(0) == shape.heads * shape.q_len)));
  };
  require(dense(lse) && (grad_lse.numel() == 0 || dense(grad_lse)),
          "attention: lse and its gradient must be contiguous float32 (batch, heads, q_len)");
  Tensor grad_q = empty_in_order_of(q, shape.head_dim);
  Tensor grad_k = empty_in_order_of(k, shape.head_dim);
  Tensor grad_v = empty_in_order_of(v, shape.value_dim);
  if (shape.batch > 0 && shape.kv_heads > 0) {
    attention_backward(
        {shape, spans, rows_of(q), rows_of(k), rows_of(v), rows_of(out), rows_of(grad_out), rows_of(grad_q),
         rows_of(grad_k), rows_of(grad_v), lse.data<float>(), grad_lse.data_or_null<float>()},
        torch_threads());
  }
  return {std::move(grad_q), std::move(grad_k), std::move(grad_v)};
}

// A label per row, -1 in rows to skip. Reads the target, so that a label outside the vocabulary is an error and never
// an address. The message is that of check_labels in rows.py.
template <class T>
std::vector<int32_t> labels_of(const Tensor& target, int64_t vocabulary, int64_t ignore_index) {
  const T* values = target.data_or_null<const T>();
  const int64_t n_rows = target.size(0), stride = target.stride(0);
  std::vector<int32_t> labels(static_cast<size_t>(n_rows));
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t label = values[row * stride];
    if (label != ignore_index && (label < 0 || label >= vocabulary)) {
      throw std::invalid_argument(
          "target: the label that row " + std::to_string(row) + " of the logits is scored against is " +
          std::to_string(label) + ", outside the vocabulary of " + std::to_string(vocabulary) +
          ". Rows to skip hold ignore_index (" + std::to_string(ignore_index) + ") or are masked");
    }
    labels[static_cast<size_t>(row)] = label == ignore_index ? -1 : static_cast<int32_t>(label);
  }
  return labels;
}

// Holds what CrossEntropyRows points to.
struct LabelledRows {
  std::vector<int32_t> labels;
  CrossEntropyRows rows;

  LabelledRows(const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing, double z_loss,
               double softcap, double logit_scale) {
    require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < INT32_MAX,
            "cross_entropy: logits must have 2 dimensions and 1 to 2^31 - 2 columns");
    require(logits.size(1) == 1 || logits.stride(1) == 1, "cross_entropy: the columns of logits must be contiguous");
    require(target.dim() == 1 && target.size(0) == logits.size(0), "cross_entropy: target must have a label per row");
    require(target.dtype() == DType::int32 || target.dtype() == DType::int64,
            "cross_entropy: target must be int32 or int64");
    labels = target.dtype() == DType::int32 ? labels_of<int32_t>(target, logits.size(1), ignore_index)
                                            : labels_of<int64_t>(target, logits.size(1), ignore_index);
    rows = {logits.data(),
            element_of(logits),
            logits.size(0),
            logits.size(1),
            logits.stride(0),
            labels.data(),
            label_smoothing,
            z_loss,
            static_cast<float>(softcap),
            static_cast<float>(logit_scale)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap, double logit_scale, bool entropy, bool argmax) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  const auto per_row = [&](bool wanted, DType dtype) {
    return Tensor::empty({wanted ? labelled.rows.n_rows : 0}, dtype);
  };
  Tensor loss = per_row(true, DType::float32), lse = per_row(true, DType::float32);
  Tensor logprobs = per_row(true, DType::float32), uncertainty = per_row(entropy, DType::float32);
  Tensor highest = per_row(argmax, DType::int64), columns = per_row(label_smoothing != 0.0, DType::float32);
  if (labelled.rows.n_rows > 0) {
    cross_entropy_forward(
        {labelled.rows, loss.data<float>(), lse.data<float>(), logprobs.data<float>(),
         uncertainty.data_or_null<float>(), highest.data_or_null<int64_t>(), columns.data_or_null<float>()},
        torch_threads());
  }
  return {std::move(loss),        std::move(lse),     std::move(logprobs),
          std::move(uncertainty), std::move(highest), std::move(columns)};
}

// Where the gradient goes: a new tensor, or the logits.
void cross_entropy_backward_into(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& grad_lse,
                                 const Tensor& grad_logprobs, const Tensor& grad_entropy, const LabelledRows& labelled,
                                 const Tensor& lse, const Tensor& logprobs, const Tensor& entropy,
                                 const Tensor& columns) {
  const int64_t n_rows = labelled.rows.n_rows;
  const auto gradient = [&](const Tensor& tensor) {
    require(tensor.numel() == 0 || (tensor.dim() == 1 && tensor.size(0) == n_rows && tensor.dtype() == DType::float32),
            "cross_entropy: an incoming gradient must be float32 with a value per row");
    return RowGradient{tensor.data_or_null<float>(), tensor.stride(0)};
  };
  const auto saved = [&](const Tensor& tensor, bool needed) {
    require(tensor.dtype() == DType::float32 && tensor.dim() == 1 &&
                (tensor.size(0) == n_rows || (!needed && tensor.size(0) == 0)) &&
                (tensor.size(0) <= 1 || tensor.stride(0) == 1),
            "cross_entropy: lse, logprobs, entropy and columns must be those of the forward pass");
    return tensor.data_or_null<const float>();
  };
  const CrossEntropyBackward p{labelled.rows,
                               gradient(grad_loss),
                               gradient(grad_lse),
                               gradient(grad_logprobs),
                               gradient(grad_entropy),
                               saved(lse, true),
                               saved(logprobs, true),
                               saved(entropy, grad_entropy.numel() != 0),
                               saved(columns, labelled.rows.label_smoothing != 0.0),
                               grad_logits.data(),
                               grad_logits.stride(0)};
  if (n_rows > 0) cross_entropy_backward(p, torch_threads());
}

std::tuple<Tensor> cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& grad_lse,
                                              const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                              const Tensor& logits, const Tensor& target, const Tensor& lse,
                                              const Tensor& logprobs, const Tensor& entropy, const Tensor& columns,
                                              int64_t ignore_index, double label_smoothing, double z_loss,
                                              double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  Tensor grad_logits = Tensor::empty({logits.size(0), logits.size(1)}, logits.dtype());
  advise_huge_pages(grad_logits, bytes_of(labelled.rows.element));
  cross_entropy_backward_into(grad_logits, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse, logprobs,
                              entropy, columns);
  return {std::move(grad_logits)};
}

void cross_entropy_backward_inplace_cpu(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                                        const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                                        const Tensor& lse, const Tensor& logprobs, const Tensor& entropy,
                                        const Tensor& columns, int64_t ignore_index, double label_smoothing,
                                        double z_loss, double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  require(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
          "cross_entropy: rows of logits that overlap in memory cannot hold their gradients");
  cross_entropy_backward_into(logits, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse, logprobs,
                              entropy, columns);
}

PlanOperand plan_operand(const Tensor& tensor) {
  PlanOperand operand{tensor.data(), IntegerType::int32, tensor.dim(), {0, 0}};
  require(operand.dim <= 2, "build_plan: operands have at most two dimensions");
  int64_t running = 1;
  for (int64_t d = operand.dim; d-- > 0;) {
    operand.sizes[d] = tensor.size(d);
    require(operand.sizes[d] <= 1 || tensor.numel() == 0 || tensor.stride(d) == running,
            "build_plan: operands must be contiguous");
    running *= operand.sizes[d];
  }
  switch (tensor.dtype()) {
    case DType::boolean: operand.type = IntegerType::boolean; break;
    case DType::uint8: operand.type = IntegerType::uint8; break;
    case DType::int32: operand.type = IntegerType::int32; break;
    case DType::int64: operand.type = IntegerType::int64; break;
    default: throw std::invalid_argument("build_plan: operands must be bool, uint8, int32 or int64");
  }
  return operand;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> build_plan_cpu(
    const std::string& program, const Tensor& operand0, const Tensor& operand1, const Tensor& operand2,
    const Tensor& operand3, const Tensor& operand4, const Tensor& operand5, int64_t batch, int64_t q_len, int64_t k_len,
    bool grad, bool positions) {
  PlanRequest request{parse_plan(program), {}, batch, q_len, k_len};
  const Tensor* operands[plan_operands] = {&operand0, &operand1, &operand2, &operand3, &operand4, &operand5};
  for (int index = 0; index < plan_operands; index++) request.operands[index] = plan_operand(*operands[index]);
  check_plan(request);
  const int64_t n_spans = request.program.n_spans();
  Tensor start = Tensor::empty({n_spans, batch, q_len}, DType::int32);
  Tensor end = Tensor::empty({n_spans, batch, q_len}, DType::int32);
  Tensor key_valid = Tensor::empty({batch, k_len}, DType::uint8);
  Tensor tiles = Tensor::empty({batch * tiles_per_batch_element(q_len, k_len), 4 + 4 * n_spans}, DType::int32);
  Tensor tile_count = Tensor::empty({1}, DType::int32);
  Tensor key_tiles = grad ? Tensor::empty({n_spans, batch, (k_len + key_tile - 1) / key_tile, 4}, DType::int32)
                          : Tensor::empty({0}, DType::int32);
  Tensor where = positions ? Tensor::empty({3, batch, q_len}, DType::int32) : Tensor::empty({0}, DType::int32);
  build_plan(request, {start.data<int32_t>(), end.data<int32_t>(), key_valid.data<uint8_t>(), tiles.data<int32_t>(),
                       tile_count.data<int32_t>(), grad ? key_tiles.data<int32_t>() : nullptr,
                       positions ? where.data<int32_t>() : nullptr});
  return {std::move(start),      std::move(end),       std::move(key_valid), std::move(tiles),
          std::move(tile_count), std::move(key_tiles), std::move(where)};
}

const bool registered = [] {
  static CpuLibrary library("maskops");
  library.implement<&attention_forward_cpu>("attention_forward");
  library.implement<&attention_backward_cpu>("attention_backward");
  library.implement<&cross_entropy_forward_cpu>("cross_entropy_forward");
  library.implement<&cross_entropy_backward_cpu>("cross_entropy_backward");
  library.implement<&cross_entropy_backward_inplace_cpu>("cross_entropy_backward_");
  library.implement<&build_plan_cpu>("build_plan");
  return true;
}();

}  // namespace
}  // namespace maskops

// Called from Python through ctypes: they concern the process, not tensors. The only symbols that the binary exports.
#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED const char* maskops_instruction_sets() { return maskops::instruction_sets(); }
EXPORTED const char* maskops_instruction_set() { return maskops::kernels().name; }
EXPORTED int maskops_select_instruction_set(const char* name) { return maskops::select_instruction_set(name) ? 1 : 0; }
}
