// The operators of the extension in a program of their own, for a processor that cannot load it: calls come in at
// standard input, results go out at standard output, all of it little-endian. It runs the kernels that every processor
// of its architecture has, on the stand-in for libtorch that the fuzzers use (fuzz/torch.h). tools/processor.py is the
// other end, and says what a message is.
//
// `processor --without KERNEL` has one kernel of the table do nothing: what nobody notices is not checked.
// `processor --list` names those that can be left out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/isa.h"
#include "../fuzz/torch.h"

namespace maskops {
namespace {

// Built without the other tables of csrc/cpu/isa.cpp.
KernelTable table = baseline_kernels;

template <class... Arguments>
auto nothing(void (*)(Arguments...)) -> void (*)(Arguments...) {
  return [](Arguments...) {};
}

struct Entry {
  const char* name;
  void (*leave_out)();
};
#define KERNEL(name)                                \
  Entry {                                           \
    #name, [] { table.name = nothing(table.name); } \
  }

const Entry entries[] = {
    KERNEL(attention_forward),
    KERNEL(attention_forward_merge),
    KERNEL(attention_backward),
    KERNEL(attention_bias),
    KERNEL(decode_forward),
    KERNEL(decode_merge),
    KERNEL(cross_entropy_forward),
    KERNEL(cross_entropy_backward),
    KERNEL(cross_entropy_backward_streaming),
    KERNEL(cross_entropy_both),
    KERNEL(cross_entropy_both_streaming),
    KERNEL(matmul_pack_left),
    KERNEL(matmul_pack_right),
    KERNEL(matmul_block),
    KERNEL(softmax_forward),
    KERNEL(softmax_backward),
};

}  // namespace

const KernelTable& kernels() { return table; }
bool select_instruction_set(const char* name) { return std::strcmp(table.name, name) == 0; }
const char* instruction_sets() { return table.name; }

}  // namespace maskops

namespace {

using fuzz::Value;

void read_bytes(void* target, size_t bytes) {
  if (bytes > 0 && std::fread(target, 1, bytes, stdin) != bytes) std::exit(0);  // the other end has closed
}
int64_t read_number() {
  int64_t number;
  read_bytes(&number, sizeof(number));
  return number;
}
std::string read_text() {
  std::string text(static_cast<size_t>(read_number()), '\0');
  read_bytes(text.data(), text.size());
  return text;
}
std::vector<int64_t> read_numbers(int64_t count) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  for (int64_t& number : numbers) number = read_number();
  return numbers;
}
size_t bytes_of(const Value& value) { return static_cast<size_t>(value.elements * fuzz::bytes_of(value.dtype)); }
Value read_tensor() {
  const auto dtype = static_cast<maskops::DType>(read_number());
  const int64_t dim = read_number();
  std::vector<int64_t> sizes = read_numbers(dim), strides = read_numbers(dim);
  Value value = Value::of(std::move(sizes), std::move(strides), dtype);
  read_bytes(value.storage.get(), bytes_of(value));
  return value;
}

void write_bytes(const void* source, size_t bytes) {
  if (bytes > 0 && std::fwrite(source, 1, bytes, stdout) != bytes) std::exit(0);
}
void write_number(int64_t number) { write_bytes(&number, sizeof(number)); }
void write_text(const std::string& text) {
  write_number(static_cast<int64_t>(text.size()));
  write_bytes(text.data(), text.size());
}
void write_tensor(const Value& value) {
  write_number(static_cast<int64_t>(value.dtype));
  write_number(static_cast<int64_t>(value.sizes.size()));
  for (int64_t size : value.sizes) write_number(size);
  for (int64_t stride : value.strides) write_number(stride);
  write_bytes(value.storage.get(), bytes_of(value));
}

void answer() {
  const std::string name = read_text();
  fuzz::Call call;
  std::vector<Value> written;  // arguments that the operator may write
  for (int64_t left = read_number(); left > 0; left--) {
    const auto kind = static_cast<char>(read_number());
    switch (kind) {
      case 't': call.add(read_tensor()); break;
      case 'w':
        written.push_back(read_tensor());
        call.add(written.back());
        break;
      case 'i': call.add(read_number()); break;
      case 'b': call.add(read_number() != 0); break;
      case 's': call.add(read_text()); break;
      case 'f': {
        double real;
        read_bytes(&real, sizeof(real));
        call.add(real);
        break;
      }
      default: fuzz::fail("a message has an argument of an unknown kind");
    }
  }
  const auto n_results = static_cast<int>(read_number());
  std::vector<Value> results;
  const bool is_served = call.run(name.c_str(), n_results, results);
  write_number(is_served);
  if (is_served) {
    for (const Value& value : results) write_tensor(value);
    for (const Value& value : written) write_tensor(value);
  } else {
    write_text(call.out_of_memory() ? "out of memory" : call.error());
  }
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--list") == 0) {
    for (const maskops::Entry& entry : maskops::entries) std::puts(entry.name);
    return 0;
  }
  if (count == 3 && std::strcmp(arguments[1], "--without") == 0) {
    for (const maskops::Entry& entry : maskops::entries) {
      if (std::strcmp(entry.name, arguments[2]) == 0) entry.leave_out();
    }
  }
  fuzz::world().threads = 2;
  fuzz::world().largest = int64_t{1} << 30;
  const std::vector<std::string> names = fuzz::operator_names();
  write_text(maskops::kernels().name);
  write_number(static_cast<int64_t>(names.size()));
  for (const std::string& name : names) write_text(name);
  std::fflush(stdout);
  while (true) answer();
}
