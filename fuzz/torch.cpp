#include "torch.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <set>
#include <stdexcept>
#include <thread>

namespace fuzz {
namespace {

using Entry = void (*)(StableIValue*, uint64_t, uint64_t);

std::map<std::string, Entry>& operators() {
  static std::map<std::string, Entry> registered;
  return registered;
}

std::atomic<int64_t> live_memory{0};  // blocks that operators took with operator new and did not give back

// Whether the allocation that is about to happen has to fail.
bool must_fail(size_t bytes) {
  World& w = world();
  if (!w.inside) return false;
  if (bytes > static_cast<size_t>(w.largest)) return true;
  if (w.fail_after < 0) return false;
  return w.fail_after-- == 0;
}

}  // namespace

World& world() {
  static World instance;
  return instance;
}

void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  std::abort();
}

int64_t extent_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); d++) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

Value Value::of(std::vector<int64_t> sizes, std::vector<int64_t> strides, DType dtype) {
  Value value;
  value.elements = extent_of(sizes, strides);
  const int64_t bytes = value.elements * fuzz::bytes_of(dtype);
  value.sizes = std::move(sizes);
  value.strides = std::move(strides);
  value.dtype = dtype;
  if (bytes > 0) {
    value.storage = std::shared_ptr<char>(static_cast<char*>(std::malloc(bytes)), std::free);
    std::memset(value.storage.get(), world().fill, bytes);
  }
  return value;
}

Value Value::dense(std::vector<int64_t> sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t running = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = running;
    running *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return of(std::move(sizes), std::move(strides), dtype);
}

int64_t Value::numel() const {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

}  // namespace fuzz

// ---- the C functions ----

struct AtenTensorOpaque {
  fuzz::Value value;
};
struct StringOpaque {
  std::string text;
};
struct TorchLibraryOpaque {};

namespace {

// The harness's own bookkeeping is no allocation of an operator.
struct Outside {
  bool before = std::exchange(fuzz::world().inside, false);
  ~Outside() { fuzz::world().inside = before; }
};

AtenTensorHandle new_handle(const fuzz::Value& value) {
  const Outside outside;
  fuzz::world().live_tensors++;
  return new AtenTensorOpaque{value};
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** result) {
  *result = tensor->value.storage.get();
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* result) {
  *result = tensor->value.numel();
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result) {
  *result = static_cast<int64_t>(tensor->value.sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** result) {
  *result = tensor->value.sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** result) {
  *result = tensor->value.strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* result) {
  *result = 0;  // the processor
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* result) {
  *result = 0;
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result) {
  *result = static_cast<int32_t>(tensor->value.dtype);
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t, AtenTensorHandle* result) {
  const auto type = static_cast<fuzz::DType>(dtype);
  // As torch does: sizes that do not fit are an error, and so is memory that is not there.
  int64_t bytes = fuzz::bytes_of(type);
  bool empty = false;
  for (int64_t d = 0; d < dim; d++) {
    if (sizes[d] < 0) return 1;
    empty = empty || sizes[d] == 0;
  }
  for (int64_t d = 0; d < dim && !empty; d++) {
    int64_t reach;
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) || reach < 0 ||
        __builtin_mul_overflow(reach, fuzz::bytes_of(type), &reach) || __builtin_add_overflow(bytes, reach, &bytes)) {
      return 1;
    }
  }
  if (fuzz::must_fail(empty ? 0 : static_cast<size_t>(bytes))) return 1;
  const Outside outside;
  *result = new_handle(fuzz::Value::of({sizes, sizes + dim}, {strides, strides + dim}, type));
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  const Outside outside;
  fuzz::world().live_tensors--;
  delete tensor;
  return 0;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle* result) {
  static TorchLibraryOpaque library;
  *result = &library;
  return 0;
}
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle, const char* name,
                                       void (*fn)(StableIValue*, uint64_t, uint64_t)) {
  fuzz::operators()[name] = fn;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc func, void* context) {
  const Outside outside;
  std::vector<std::thread> team;
  for (int64_t worker = begin + 1; worker < end; worker++) team.emplace_back(func, worker, worker + 1, context);
  func(begin, begin + 1, context);
  for (std::thread& member : team) member.join();
  return 0;
}
AOTITorchError torch_get_num_threads(uint32_t* result) {
  *result = static_cast<uint32_t>(fuzz::world().threads);
  return 0;
}
AOTITorchError torch_string_length(StringHandle handle, size_t* length) {
  *length = handle->text.size();
  return 0;
}
AOTITorchError torch_string_c_str(StringHandle handle, const char** data) {
  *data = handle->text.c_str();
  return 0;
}
AOTITorchError torch_delete_string(StringHandle handle) {
  const Outside outside;
  fuzz::world().live_tensors--;
  delete handle;
  return 0;
}

// The linker sends every call of aligned_alloc here (--wrap).
void* __real_aligned_alloc(size_t alignment, size_t bytes);
void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  if (fuzz::must_fail(bytes)) return nullptr;
  void* memory = __real_aligned_alloc(alignment, bytes);
  if (memory != nullptr) std::memset(memory, fuzz::world().fill, bytes);
  return memory;
}

}  // extern "C"

// Blocks that an operator allocates on the way and does not free are a leak; blocks that it frees are its own.
void* operator new(size_t bytes) {
  if (fuzz::must_fail(bytes)) throw std::bad_alloc();
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  if (fuzz::world().inside) {
    std::memset(memory, fuzz::world().fill, bytes);
    fuzz::live_memory.fetch_add(1, std::memory_order_relaxed);
  }
  return memory;
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept {
  if (memory != nullptr && fuzz::world().inside) fuzz::live_memory.fetch_sub(1, std::memory_order_relaxed);
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

namespace fuzz {

std::vector<std::string> operator_names() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : operators()) names.push_back(name);
  return names;
}

Call& Call::add(const Value& value) {
  arguments_.push_back({Argument::Kind::tensor, value, 0, 0, {}});
  return *this;
}
Call& Call::add(int64_t value) {
  arguments_.push_back({Argument::Kind::integer, {}, value, 0, {}});
  return *this;
}
Call& Call::add(double value) {
  arguments_.push_back({Argument::Kind::real, {}, 0, value, {}});
  return *this;
}
Call& Call::add(bool value) {
  arguments_.push_back({Argument::Kind::boolean, {}, value, 0, {}});
  return *this;
}
Call& Call::add(const std::string& text) {
  arguments_.push_back({Argument::Kind::text, {}, 0, 0, text});
  return *this;
}

std::vector<StableIValue> Call::build() const {
  std::vector<StableIValue> stack;
  for (const Argument& argument : arguments_) {
    StableIValue slot = 0;
    switch (argument.kind) {
      case Argument::Kind::tensor: slot = reinterpret_cast<StableIValue>(new_handle(argument.value)); break;
      case Argument::Kind::integer:
      case Argument::Kind::boolean: slot = static_cast<StableIValue>(argument.integer); break;
      case Argument::Kind::real: std::memcpy(&slot, &argument.real, sizeof(slot)); break;
      case Argument::Kind::text:
        world().live_tensors++;
        slot = reinterpret_cast<StableIValue>(new StringOpaque{argument.text});
        break;
    }
    stack.push_back(slot);
  }
  return stack;
}

void Call::print(const char* name) const {
  std::fprintf(stderr, "%s(\n", name);
  for (const Argument& argument : arguments_) {
    switch (argument.kind) {
      case Argument::Kind::integer:
      case Argument::Kind::boolean: std::fprintf(stderr, "  %lld\n", static_cast<long long>(argument.integer)); break;
      case Argument::Kind::real: std::fprintf(stderr, "  %g\n", argument.real); break;
      case Argument::Kind::text: std::fprintf(stderr, "  \"%s\"\n", argument.text.c_str()); break;
      case Argument::Kind::tensor: {
        const Value& value = argument.value;
        std::fprintf(stderr, "  dtype %d, (", static_cast<int>(value.dtype));
        for (size_t d = 0; d < value.sizes.size(); d++) {
          std::fprintf(stderr, "%s%lld:%lld", d > 0 ? ", " : "", static_cast<long long>(value.sizes[d]),
                       static_cast<long long>(value.strides[d]));
        }
        std::fprintf(stderr, ")");
        for (int64_t i = 0; i < std::min<int64_t>(value.elements, 64); i++) {
          switch (value.dtype) {
            case DType::uint8:
            case DType::boolean: std::fprintf(stderr, " %d", value.data<uint8_t>()[i]); break;
            case DType::int32: std::fprintf(stderr, " %d", value.data<int32_t>()[i]); break;
            case DType::int64: std::fprintf(stderr, " %lld", static_cast<long long>(value.data<int64_t>()[i])); break;
            default: break;
          }
        }
        std::fprintf(stderr, "\n");
      }
    }
  }
  std::fprintf(stderr, ")\n");
}

namespace {

// Fails where a call has kept what is nobody's. The first one of an operator may make what lives forever.
void check_kept(const std::string& name, int64_t blocks, int64_t tensors) {
  static std::set<std::string> warm;
  static int64_t of_plans = 0;
  if (name.rfind("attention_pattern", 0) == 0 || name.rfind("attention_packed", 0) == 0) {
    // Their plans serve later calls, eight at a time, each a few blocks.
    of_plans += blocks;
    if (of_plans > 8 * 8) fail(name + " and its like keep " + std::to_string(of_plans) + " blocks of memory");
    blocks = 0;
  }
  if ((blocks == 0 && tensors == 0) || warm.insert(name).second) return;
  fail(name + " kept " + std::to_string(blocks) + " blocks of memory and " + std::to_string(tensors) + " tensors");
}

}  // namespace

bool Call::run(const char* name, int n_results, std::vector<Value>& results) {
  const auto found = operators().find(name);
  if (found == operators().end()) fail(std::string("no operator is called ") + name);
  World& w = world();
  if (w.verbose) print(name);
  const int64_t tensors = w.live_tensors;
  std::vector<StableIValue> stack = build();
  if (stack.size() < static_cast<size_t>(n_results)) stack.resize(n_results);
  results.clear();
  error_.clear();
  out_of_memory_ = false;
  bool served = true;
  const int64_t memory = live_memory.load();
  w.inside = true;
  try {
    found->second(stack.data(), arguments_.size(), n_results);
  } catch (const std::invalid_argument& refusal) {
    const Outside outside;
    served = false;
    error_ = refusal.what();
  } catch (const std::bad_alloc&) {
    served = false;
    out_of_memory_ = true;
  } catch (const std::runtime_error& failure) {  // a call into libtorch failed: a tensor that could not be made
    const Outside outside;
    served = false;
    out_of_memory_ = true;
    error_ = failure.what();
    if (error_.find("out of memory") == std::string::npos) fail(std::string(name) + " threw: " + error_);
  } catch (const std::exception& other) {
    w.inside = false;
    fail(std::string(name) + " threw: " + other.what());
  }
  w.inside = false;
  if (served) {
    for (int i = 0; i < n_results; i++) {
      const auto handle = reinterpret_cast<AtenTensorHandle>(stack[i]);
      results.push_back(handle->value);
      aoti_torch_delete_tensor_object(handle);
    }
  }
  check_kept(name, live_memory.load() - memory, w.live_tensors - tensors);
  return served;
}

}  // namespace fuzz
