// What both operators do, whatever runs them:
//
//     y = x, but y[..., idx] = x[..., idx] * (1 + scale * gamma * phi)
//     phi = 1, or 4 * sigmoid((x[..., idx] V + b) U - ln 3) with a predictor
//
// in float32, rounded once to the type of x.
#pragma once

#include <cstddef>
#include <cstdint>

namespace austeer {

constexpr float kPhiMax = 4.0f;
constexpr float kPhiShift = 1.0986122886681098f;  // ln 3
constexpr std::size_t kMaxRank = 64;

enum class Type { kFloat, kFloat16, kBFloat16 };

constexpr std::size_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// The site's constants, where the kernel runs; no index twice; V, b and U are null without a
// predictor.
struct Site {
  const std::int64_t* idx;
  const float* gamma;
  const float* scale;
  const float* V;
  const float* b;
  const float* U;
  std::size_t k;
  std::size_t r;
};

// tokens x width activations; y may be x.
struct Rows {
  const void* x;  // the row to begin with
  void* y;
  std::size_t tokens;
  std::size_t width;
  std::ptrdiff_t step;  // from row to row in elements: width, or -width where y is x
  bool more;            // another row comes after these: it may be prefetched
};

// One block of rows on the CPU.
void steer_cpu(Type type, const Site& site, const Rows& rows);

// Whether every index is inside the width.
bool inside(const std::int64_t* idx, std::size_t k, std::size_t width);

// Whether no index is there twice; all are inside the width.
bool distinct(const std::int64_t* idx, std::size_t k, std::size_t width);

// Whether the library holds CUDA kernels.
bool has_cuda();

// One line of JSON: compiler, and the compute capabilities of the CUDA kernels.
const char* build_facts();

// Null on success, else what went wrong.
const char* steer_cuda(Type type, const Site& site, const Rows& rows, void* stream);

}  // namespace austeer
