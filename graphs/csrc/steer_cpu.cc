#include <cstring>
#include <vector>

#include "steer.h"

// One build for each instruction set, chosen when the library is loaded. GCC before 12 does not
// know the levels, and an arch= of its own asks for that model of processor and no other.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define AUSTEER_SIMD \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define AUSTEER_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define AUSTEER_SIMD
#endif
#define AUSTEER_INLINE inline __attribute__((always_inline))
// Into the first cache alone (prefetchnta on x86): on the way into the second, the line next to
// it comes too, and of most pairs of lines only one holds a unit.
#define AUSTEER_PREFETCH(address) __builtin_prefetch(address, 0, 0)

namespace austeer {
namespace {

constexpr std::size_t kBlock = 256;  // units handled at once, on the stack
constexpr std::size_t kLanes = 8;    // of them read before one is written

using Half = std::uint16_t;

template <typename To, typename From>
AUSTEER_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Branchless conversions, so that the loops around them vectorize.
struct Float {
  using Stored = float;
  static AUSTEER_INLINE float widen(float value) { return value; }
  static AUSTEER_INLINE float narrow(float value) { return value; }
};

struct BFloat16 {
  using Stored = Half;
  static AUSTEER_INLINE float widen(Half value) {
    return bits<float>(static_cast<std::uint32_t>(value) << 16);
  }
  static AUSTEER_INLINE Half narrow(float value) {
    const auto from = bits<std::uint32_t>(value);
    const std::uint32_t rounded = (from + 0x7fffu + ((from >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (from >> 16) | 0x40u;
    return static_cast<Half>((from & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
};

struct Float16 {
  using Stored = Half;
  static AUSTEER_INLINE float widen(Half value) {
    const std::uint32_t sign = (value & 0x8000u) << 16;
    const std::uint32_t magnitude = value & 0x7fffu;
    // The exponent's bias moves from 15 to 127. Subnormal numbers come as the difference of two
    // normal ones: a session may have the float unit take subnormal ones for zero.
    float wide = magnitude < 0x400u
                     ? bits<float>((magnitude << 13) | 0x38800000u) - bits<float>(0x38800000u)
                     : bits<float>((magnitude << 13) + 0x38000000u);
    wide = magnitude >= 0x7c00u ? bits<float>((magnitude << 13) | 0x7f800000u) : wide;
    return bits<float>(bits<std::uint32_t>(wide) | sign);
  }
  static AUSTEER_INLINE Half narrow(float value) {
    const auto from = bits<std::uint32_t>(value);
    const std::uint32_t sign = (from >> 16) & 0x8000u;
    const std::uint32_t magnitude = from & 0x7fffffffu;
    // Normal numbers: round to even in the integers, and move the bias.
    const std::uint32_t normal =
        (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal ones: adding 0.5 makes the float unit round at 2^-24.
    const std::uint32_t small =
        bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - bits<std::uint32_t>(0.5f);
    std::uint32_t found = magnitude < 0x38800000u ? small : normal;
    found = magnitude >= 0x477ff000u ? 0x7c00u : found;
    found = magnitude > 0x7f800000u ? (0x7e00u | (magnitude >> 13)) & 0x7fffu : found;
    return static_cast<Half>(found | sign);
  }
};

// 4 * sigmoid(t - ln 3), within 2 ulp. e^-z in [2^-126, 2^126] by Cody and Waite's reduction and
// a polynomial for 2^f; beyond, the sigmoid is 0 or 1 in float32 all the same.
AUSTEER_INLINE float phi(float t) {
  const float z = kPhiShift - t;
  // NaN becomes a bound, as it has no integer.
  float w = z > -87.0f ? z : -87.0f;
  w = w < 87.0f ? w : 87.0f;
  const float n = (w * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float f = (w - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const float power = bits<float>((static_cast<std::int32_t>(n) + 127) << 23);
  const float value = kPhiMax / (1.0f + p * power);
  return t == t ? value : t;
}

template <typename Element>
AUSTEER_INLINE void constant(const Site& site, const Rows& rows) {
  using Stored = typename Element::Stored;
  const float scale = *site.scale;
  for (std::size_t first = 0; first < site.k; first += kBlock) {
    const std::size_t count = site.k - first < kBlock ? site.k - first : kBlock;
    float gain[kBlock];
    std::int32_t place[kBlock];
    for (std::size_t i = 0; i < count; ++i) {
      gain[i] = 1.0f + scale * site.gamma[first + i];
      place[i] = static_cast<std::int32_t>(site.idx[first + i]);
      AUSTEER_PREFETCH(static_cast<const Stored*>(rows.x) + place[i]);
    }
    const Stored* x = static_cast<const Stored*>(rows.x);
    Stored* y = static_cast<Stored*>(rows.y);
    for (std::size_t token = 0; token < rows.tokens; ++token, x += rows.step, y += rows.step) {
      const Stored* next = token + 1 < rows.tokens || rows.more ? x + rows.step : x;
      for (std::size_t i = 0; i < count; i += kLanes) {
        const std::size_t lanes = count - i < kLanes ? count - i : kLanes;
        // Reads of a group come first: writes between them would hold up those that follow.
        Stored value[kLanes];
        for (std::size_t j = i; j < i + lanes; ++j) {
          value[j - i] = Element::narrow(Element::widen(x[place[j]]) * gain[j]);
        }
        for (std::size_t j = i; j < i + lanes; ++j) y[place[j]] = value[j - i];
        for (std::size_t j = i; j < i + lanes; ++j) AUSTEER_PREFETCH(next + place[j]);
      }
    }
  }
}

// value . V, whose numbers lie `stride` apart.
AUSTEER_INLINE float dot(const float* value, const float* V, std::size_t stride,
                         std::size_t count) {
  static_assert(kLanes == 8);
  float sum[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += value[i + lane] * V[(i + lane) * stride];
    }
  }
  for (; i < count; ++i) sum[0] += value[i] * V[i * stride];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

template <typename Element>
AUSTEER_INLINE void adaptive(const Site& site, const Rows& rows) {
  using Stored = typename Element::Stored;
  const float scale = *site.scale;
  const Stored* x = static_cast<const Stored*>(rows.x);
  Stored* y = static_cast<Stored*>(rows.y);
  for (std::size_t token = 0; token < rows.tokens; ++token, x += rows.step, y += rows.step) {
    const Stored* next = token + 1 < rows.tokens || rows.more ? x + rows.step : x;
    float feature[kMaxRank];
    for (std::size_t j = 0; j < site.r; ++j) feature[j] = site.b[j];
    float value[kBlock], logit[kBlock];
    // Every unit is read before the first is written: y may be x.
    for (std::size_t first = 0; first < site.k; first += kBlock) {
      const std::size_t count = site.k - first < kBlock ? site.k - first : kBlock;
      for (std::size_t i = 0; i < count; ++i) {
        value[i] = Element::widen(x[site.idx[first + i]]);
      }
      for (std::size_t j = 0; j < site.r; ++j) {
        const float* V = site.V + first * site.r + j;
        feature[j] += site.r == 1 ? dot(value, V, 1, count) : dot(value, V, site.r, count);
      }
    }
    for (std::size_t first = 0; first < site.k; first += kBlock) {
      const std::size_t count = site.k - first < kBlock ? site.k - first : kBlock;
      if (site.k > kBlock) {
        for (std::size_t i = 0; i < count; ++i) {
          value[i] = Element::widen(x[site.idx[first + i]]);
        }
      }
      for (std::size_t i = 0; i < count; ++i) logit[i] = feature[0] * site.U[first + i];
      for (std::size_t j = 1; j < site.r; ++j) {
        const float* U = site.U + j * site.k + first;
        for (std::size_t i = 0; i < count; ++i) logit[i] += feature[j] * U[i];
      }
      Stored narrow[kBlock];
      for (std::size_t i = 0; i < count; ++i) {
        narrow[i] =
            Element::narrow(value[i] * (1.0f + scale * site.gamma[first + i] * phi(logit[i])));
      }
      for (std::size_t i = 0; i < count; ++i) {
        AUSTEER_PREFETCH(next + site.idx[first + i]);
        y[site.idx[first + i]] = narrow[i];
      }
    }
  }
}

#define AUSTEER_KERNEL(name, body, element) \
  AUSTEER_SIMD void name(const Site& site, const Rows& rows) { body<element>(site, rows); }
AUSTEER_KERNEL(constant_float, constant, Float)
AUSTEER_KERNEL(constant_float16, constant, Float16)
AUSTEER_KERNEL(constant_bfloat16, constant, BFloat16)
AUSTEER_KERNEL(adaptive_float, adaptive, Float)
AUSTEER_KERNEL(adaptive_float16, adaptive, Float16)
AUSTEER_KERNEL(adaptive_bfloat16, adaptive, BFloat16)
#undef AUSTEER_KERNEL

}  // namespace

void steer_cpu(Type type, const Site& site, const Rows& rows) {
  if (rows.x != rows.y) {
    std::memcpy(rows.y, rows.x, rows.tokens * rows.width * size_of(type));
  }
  const bool fixed = site.V == nullptr;
  switch (type) {
    case Type::kFloat:
      return fixed ? constant_float(site, rows) : adaptive_float(site, rows);
    case Type::kFloat16:
      return fixed ? constant_float16(site, rows) : adaptive_float16(site, rows);
    case Type::kBFloat16:
      return fixed ? constant_bfloat16(site, rows) : adaptive_bfloat16(site, rows);
  }
}

bool inside(const std::int64_t* idx, std::size_t k, std::size_t width) {
  bool outside = false;
  for (std::size_t i = 0; i < k; ++i) {
    // Negative numbers become large ones.
    outside |= static_cast<std::uint64_t>(idx[i]) >= width;
  }
  return !outside;
}

bool distinct(const std::int64_t* idx, std::size_t k, std::size_t width) {
  bool ascending = true;
  for (std::size_t i = 1; i < k; ++i) ascending &= idx[i - 1] < idx[i];
  if (ascending) return true;
  std::vector<bool> seen(width);
  for (std::size_t i = 0; i < k; ++i) {
    if (seen[static_cast<std::size_t>(idx[i])]) return false;
    seen[static_cast<std::size_t>(idx[i])] = true;
  }
  return true;
}

}  // namespace austeer
