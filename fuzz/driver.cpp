// The program: `fuzz TARGET --seconds N [--seed N]` runs a target on inputs that it makes, `fuzz TARGET FILE...` on
// those inputs. Coverage-guided: an input that reaches a new edge of the operators' code, or an edge a new number of
// times, is kept and changed further. Built with clang, libFuzzer does this instead, and calls the same function.
#include <signal.h>
#include <sys/time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "../csrc/cpu/isa.h"
#include "targets.h"

namespace fuzz {

const std::vector<Target> targets = {
    {"plan", &fuzz_plan},
    {"attention", &fuzz_attention},
    {"attention_direct", &fuzz_attention_direct},
    {"cross_entropy", &fuzz_cross_entropy},
    {"cross_entropy_direct", &fuzz_cross_entropy_direct},
    {"decode", &fuzz_decode},
    {"matmul", &fuzz_matmul},
    {"softmax", &fuzz_softmax},
};

namespace {

const Target* target = nullptr;

const Target* target_called(const char* name) {
  for (const Target& candidate : targets) {
    if (std::strcmp(candidate.name, name) == 0) return &candidate;
  }
  std::fprintf(stderr, "fuzz: no target is called %s; there are", name);
  for (const Target& candidate : targets) std::fprintf(stderr, " %s", candidate.name);
  std::fprintf(stderr, "\n");
  std::exit(2);
}

void choose_instruction_set(Input& input) {
  std::vector<std::string> names{""};
  for (const char* at = maskops::instruction_sets(); *at != '\0'; at++) {
    if (*at == ' ') {
      names.emplace_back();
    } else {
      names.back() += *at;
    }
  }
  maskops::select_instruction_set(names[input.below(static_cast<int64_t>(names.size()))].c_str());
}

}  // namespace
}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (fuzz::target == nullptr) fuzz::target = fuzz::target_called(std::getenv("FUZZ_TARGET"));
  fuzz::world() = {};
  fuzz::world().verbose = std::getenv("FUZZ_VERBOSE") != nullptr;
  fuzz::Input input(data, size);
  fuzz::choose_instruction_set(input);
  fuzz::target->run(input);
  return 0;
}

#if !defined(MASKOPS_LIBFUZZER)

namespace {

// ---- coverage ----

constexpr size_t EDGES = 1 << 18;
uint8_t hits[EDGES];  // of the running case
uint8_t seen[EDGES];  // a bit for each class of numbers of hits
uintptr_t previous = 0;
bool counting = false;

uint8_t class_of(uint8_t count) {
  if (count <= 3) return static_cast<uint8_t>(1 << (count - 1));
  return count < 8 ? 8 : count < 16 ? 16 : count < 32 ? 32 : count < 128 ? 64 : 128;
}

}  // namespace

// Called at the beginning of every basic block of the operators' code, which alone is compiled for it.
extern "C" void __sanitizer_cov_trace_pc() {
  if (!counting) return;
  const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const uintptr_t mixed = here * 0x9e3779b97f4a7c15u >> 20;
  uint8_t& count = hits[(mixed ^ previous) % EDGES];
  if (count < 255) count++;
  previous = mixed >> 1;
}

namespace {

bool anything_new(int64_t& edges) {
  bool found = false;
  for (size_t word = 0; word < EDGES; word += 8) {
    uint64_t eight;
    std::memcpy(&eight, hits + word, 8);
    if (eight == 0) continue;
    for (size_t i = word; i < word + 8; i++) {
      if (hits[i] == 0) continue;
      const uint8_t bit = class_of(hits[i]);
      if (seen[i] & bit) continue;
      edges += seen[i] == 0;
      seen[i] |= bit;
      found = true;
    }
  }
  return found;
}

// ---- inputs ----

using Bytes = std::vector<uint8_t>;

Bytes running;

// Keeps the input of a case that ended the process.
void keep_input() {
  const std::string name = std::string("crash-") + fuzz::target->name;
  FILE* file = std::fopen(name.c_str(), "wb");
  if (file == nullptr) return;
  std::fwrite(running.data(), 1, running.size(), file);
  std::fclose(file);
  std::fprintf(stderr, "fuzz: the input is in %s: run it with `fuzz %s %s`\n", name.c_str(), fuzz::target->name,
               name.c_str());
}

void on_signal(int number) {
  std::fprintf(stderr, "fuzz: %s\n", number == SIGPROF ? "a case takes longer than 20 s" : "aborted");
  keep_input();
  signal(SIGABRT, SIG_DFL);
  std::abort();
}

void run_case(const Bytes& bytes) {
  running = bytes;
  // Of processor time: on a busy machine a case may wait for longer.
  const itimerval limit{{0, 0}, {20, 0}};
  setitimer(ITIMER_PROF, &limit, nullptr);
  counting = true;
  LLVMFuzzerTestOneInput(running.data(), running.size());
  counting = false;
}

Bytes changed(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t count) { return static_cast<size_t>(random() % count); };
  Bytes bytes = corpus[below(corpus.size())];
  for (size_t times = 1 + below(8); times > 0; times--) {
    const size_t at = below(bytes.size() + 1);
    switch (below(7)) {
      case 0:
        if (at < bytes.size()) bytes[at] ^= static_cast<uint8_t>(1 << below(8));
        break;
      case 1:
      case 2:
        if (at < bytes.size()) bytes[at] = static_cast<uint8_t>(random());
        break;
      case 3: bytes.insert(bytes.begin() + at, 1 + below(16), static_cast<uint8_t>(random())); break;
      case 4: bytes.erase(bytes.begin() + at, bytes.begin() + std::min(bytes.size(), at + 1 + below(16))); break;
      case 5: {  // the end of another input
        const Bytes& other = corpus[below(corpus.size())];
        if (other.empty()) break;
        bytes.resize(at);
        bytes.insert(bytes.end(), other.begin() + std::min(at, other.size()), other.end());
        break;
      }
      default:
        for (size_t i = 0; i < 64; i++) bytes.push_back(static_cast<uint8_t>(random()));
    }
  }
  if (bytes.size() > 4096) bytes.resize(4096);
  return bytes;
}

int search(double seconds, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Bytes> corpus{Bytes(64, 0)};
  for (int i = 0; i < 64; i++) {
    Bytes bytes(1024);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    corpus.push_back(bytes);
  }
  const size_t seeds = corpus.size();
  int64_t cases = 0, edges = 0;
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  while (elapsed() < seconds) {
    Bytes bytes = cases < static_cast<int64_t>(seeds) ? corpus[cases] : changed(corpus, random);
    std::memset(hits, 0, sizeof(hits));
    previous = 0;
    run_case(bytes);
    cases++;
    if (anything_new(edges)) corpus.push_back(std::move(bytes));
  }
  std::printf("%s: %lld cases in %.0f s, %lld edges, %zu inputs kept, seed %llu: nothing found\n", fuzz::target->name,
              static_cast<long long>(cases), elapsed(), static_cast<long long>(edges), corpus.size(),
              static_cast<unsigned long long>(seed));
  return 0;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
extern "C" void __sanitizer_set_death_callback(void (*callback)());
#endif

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: fuzz TARGET --seconds N [--seed N] | fuzz TARGET FILE...\n");
    return 2;
  }
  fuzz::target = fuzz::target_called(arguments[1]);
  signal(SIGPROF, on_signal);
  signal(SIGABRT, on_signal);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(keep_input);
#endif
  double seconds = 0;
  uint64_t seed = 1;
  std::vector<std::string> files;
  for (int i = 2; i < count; i++) {
    if (std::strcmp(arguments[i], "--seconds") == 0 && i + 1 < count) {
      seconds = std::atof(arguments[++i]);
    } else if (std::strcmp(arguments[i], "--seed") == 0 && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else {
      files.push_back(arguments[i]);
    }
  }
  for (const std::string& name : files) {
    std::ifstream file(name, std::ios::binary);
    run_case({std::istreambuf_iterator<char>(file), {}});
    std::printf("%s: %s passed\n", fuzz::target->name, name.c_str());
  }
  return files.empty() ? search(seconds, seed) : 0;
}

#endif
