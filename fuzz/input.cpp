#include "input.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

namespace fuzz {

std::vector<int64_t> Input::strides(const std::vector<int64_t>& sizes) {
  const size_t dim = sizes.size();
  std::vector<size_t> order(dim);
  std::iota(order.begin(), order.end(), 0);
  if (once_in(3) && dim >= 3) std::swap(order[dim - 2], order[dim - 3]);  // (B, S, H, D) seen as (B, H, S, D)
  if (once_in(8) && dim >= 3) std::swap(order[0], order[dim - 2]);
  if (once_in(64) && dim >= 2) std::swap(order[dim - 1], order[dim - 2]);  // the last one is not contiguous
  std::vector<int64_t> result(dim, 1);
  int64_t running = 1;
  for (size_t i = dim; i-- > 0;) {
    const size_t d = order[i];
    result[d] = running;
    running *= std::max<int64_t>(sizes[d], 1);
    if (once_in(4)) running += 1 + below(3);  // rows of a wider matrix
  }
  for (size_t d = 0; d + 1 < dim; d++) {
    if (once_in(16)) result[d] = 0;  // expanded
  }
  return result;
}

namespace {

uint16_t half_of(float value, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::bfloat16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = bits >> 23 & 0xff;  // truncated; values too small for a float16 become 0
  if (exponent == 0xff) return static_cast<uint16_t>(bits >> 16 & 0x8000) | 0x7c00 | (bits << 9 != 0 ? 1 : 0);
  if (exponent < 113) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (exponent > 142) return static_cast<uint16_t>(bits >> 16 & 0x8000) | 0x7bff;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
}

}  // namespace

Value Input::floats(std::vector<int64_t> sizes, DType dtype, bool wild) {
  std::vector<int64_t> chosen = strides(sizes);
  Value value = Value::of(std::move(sizes), std::move(chosen), dtype);
  uint32_t state = byte() + 1;
  for (int64_t i = 0; i < value.elements; i++) {
    state = state * 1664525u + 1013904223u;
    float x = static_cast<float>(static_cast<int32_t>(state)) * (2.0f / 2147483648.0f);
    if (wild && state % 11 == 0) x = static_cast<float>(real());
    if (dtype == DType::float32) {
      value.data<float>()[i] = x;
    } else {
      value.data<uint16_t>()[i] = half_of(x, dtype);
    }
  }
  return value;
}

Value Input::integers(std::vector<int64_t> sizes, DType dtype) {
  std::vector<int64_t> chosen = once_in(8) ? strides(sizes) : Value::dense(sizes, dtype).strides;
  Value value = Value::of(std::move(sizes), std::move(chosen), dtype);
  if (value.elements > 0) std::memset(value.storage.get(), 0, value.elements * bytes_of(dtype));
  return value;
}

Value Input::misshapen(const Value& value) {
  if (!once_in(48)) return value;
  std::vector<int64_t> sizes = value.sizes;
  DType dtype = value.dtype;
  switch (below(6)) {
    case 3:  // as many elements, elsewhere
      if (sizes.size() >= 2) std::swap(sizes.front(), sizes.back());
      break;
    case 0: sizes.push_back(1 + below(2)); break;
    case 1:
      if (!sizes.empty()) sizes.pop_back();
      break;
    case 2:
      dtype = of({DType::uint8, DType::boolean, DType::int32, DType::int64, DType::float32, DType::float64});
      break;
    default:
      if (!sizes.empty()) {
        int64_t& size = sizes[below(static_cast<int64_t>(sizes.size()))];
        size = std::max<int64_t>(0, size + (byte() % 2 == 0 ? 1 : -1));
      }
  }
  Value other = Value::of(sizes, strides(sizes), dtype);
  if (other.elements > 0) std::memset(other.storage.get(), 0, other.elements * bytes_of(dtype));
  return other;
}

void set(const Value& value, int64_t index, int64_t integer) {
  switch (value.dtype) {
    case DType::uint8: value.data<uint8_t>()[index] = static_cast<uint8_t>(integer); break;
    case DType::boolean: value.data<uint8_t>()[index] = integer & 1; break;
    case DType::int32: value.data<int32_t>()[index] = static_cast<int32_t>(integer); break;
    case DType::int64: value.data<int64_t>()[index] = integer; break;
    default: fail("an integer for a tensor of floats");
  }
}

namespace {

std::string content(const Value& value) {
  return {value.storage.get(), static_cast<size_t>(value.elements * bytes_of(value.dtype))};
}

// Which NaN it is depends on how a vector meets the addresses, and says nothing.
void make_equal_what_is_no_number(std::string& bytes, DType dtype) {
  if (dtype == DType::float32) {
    for (size_t at = 0; at < bytes.size(); at += 4) {
      float x;
      std::memcpy(&x, &bytes[at], 4);
      if (x != x) std::memset(&bytes[at], 0xff, 4);
    }
  } else if (dtype == DType::float16 || dtype == DType::bfloat16) {
    const int infinity = dtype == DType::float16 ? 0x7c00 : 0x7f80;
    for (size_t at = 0; at < bytes.size(); at += 2) {
      uint16_t x;
      std::memcpy(&x, &bytes[at], 2);
      if ((x & 0x7fff) > infinity) std::memset(&bytes[at], 0xff, 2);
    }
  }
}

std::vector<std::string> contents(const std::vector<Value>& results, const std::vector<Value>& in_place) {
  std::vector<std::string> all;
  for (const std::vector<Value>& values : {results, in_place}) {
    for (const Value& value : values) {
      all.push_back(content(value));
      make_equal_what_is_no_number(all.back(), value.dtype);
    }
  }
  return all;
}

}  // namespace

void require_same(const Value& one, const Value& other, const char* what) {
  const bool is_same = one.sizes == other.sizes && one.strides == other.strides && one.dtype == other.dtype;
  if (!is_same || contents({one}, {}) != contents({other}, {})) fail(std::string(what) + " differ");
}

bool run_twice(Input& input, Call& call, const char* name, int n_results, std::vector<Value>& results,
               const std::vector<Value>& in_place) {
  World& w = world();
  const World before = w;
  std::vector<std::string> written;
  for (const Value& value : in_place) written.push_back(content(value));
  const auto restore = [&] {
    for (size_t i = 0; i < in_place.size(); i++) {
      if (!written[i].empty()) std::memcpy(in_place[i].storage.get(), written[i].data(), written[i].size());
    }
  };
  w.threads = 1;
  const bool fails = input.once_in(8);
  if (fails) {
    w.fail_after = input.byte() % 16;
    call.run(name, n_results, results);
    w.fail_after = -1;
    restore();
  }
  const bool served = call.run(name, n_results, results);
  if (served && input.once_in(4)) {
    const std::vector<std::string> first = contents(results, in_place);
    restore();
    w.threads = static_cast<int>(2 + input.below(6));
    w.fill = 0x3c;  // a small number in every dtype
    std::vector<Value> again;
    if (!call.run(name, n_results, again)) fail(std::string(name) + " refuses what it took before: " + call.error());
    const std::vector<std::string> second = contents(again, in_place);
    for (size_t i = 0; i < first.size(); i++) {
      if (first[i] == second[i]) continue;
      size_t place = 0;
      while (place < first[i].size() && first[i][place] == second[i][place]) place++;
      fail(std::string(name) + ": result " + std::to_string(i) + " differs at byte " + std::to_string(place) +
           " with other threads and other contents of new memory");
    }
  }
  w.threads = before.threads;
  w.fill = before.fill;
  return served;
}

}  // namespace fuzz
