// SIMD vectors for the CPU kernels: kWidth floats at a time, by GCC's vector extension, which Clang supports, too. Loads,
// stores, transposes and reductions.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/cpu_level.h"
#include "common/elements.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kWidth = 8, kTileRows = 6, kTileVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kWidth = 4, kTileRows = 5,
              kTileVectors = 4;  // 20 of 32, as GCC 12 also keeps a broadcast factor of each row in one
#else
constexpr int kWidth = 4, kTileRows = 6, kTileVectors = 2;  // 12 of 16 (SSE2)
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t IntVector __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t UIntVector __attribute__((vector_size(kWidth * sizeof(float))));

constexpr float kInfinity = __builtin_inff();

// Forces x into a register, and hides its value from the compiler. Otherwise GCC keeps an accumulator in memory throughout a
// loop if its lanes are read later, and loads several operands ahead of use when no register is left.
template <typename Register>
inline Register in_register(Register x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#endif
  return x;
}

inline Vector load(const float* source) {
  Vector x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

inline void store(float* target, Vector x) { std::memcpy(target, &x, sizeof x); }

inline IntVector load(const int32_t* source) {
  IntVector x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

inline Vector broadcast(float x) { return x - Vector{}; }

inline IntVector broadcast(int32_t x) { return x - IntVector{}; }

inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

typedef float Quad __attribute__((vector_size(16)));

// Reduces the lanes of one vector pairwise, halves first.
template <int kLanes, typename Combine>
inline float reduce(const float* lanes, Combine combine) {
  if constexpr (kLanes == 4) {
    Quad x;
    std::memcpy(&x, lanes, sizeof x);
    return combine(combine(x[0], x[2]), combine(x[1], x[3]));
  } else {
    typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + kLanes / 2, sizeof high);
    low = combine(low, high);
    return reduce<kLanes / 2>(reinterpret_cast<const float*>(&low), combine);
  }
}

inline float sum(Vector x) {
  return reduce<kWidth>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a + b; });
}

inline float maximum(Vector x) {
  return reduce<kWidth>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a > b ? a : b; });
}

// Exchanges the lanes of a whose index has the bit kBit for the lanes of b whose index lacks it.
template <int kBit, size_t... kLanes>
inline void exchange(Vector& a, Vector& b, std::index_sequence<kLanes...>) {
#if defined(__clang__)
  const Vector low = __builtin_shufflevector(a, b, (kLanes & kBit ? kWidth + kLanes - kBit : kLanes)...);
  b = __builtin_shufflevector(a, b, (kLanes & kBit ? kWidth + kLanes : kLanes + kBit)...);
#else
  const Vector low = __builtin_shuffle(a, b, IntVector{(kLanes & kBit ? kWidth + kLanes - kBit : kLanes)...});
  b = __builtin_shuffle(a, b, IntVector{(kLanes & kBit ? kWidth + kLanes : kLanes + kBit)...});
#endif
  a = low;
}

// Transposes: lane j of vector i goes to lane i of vector j, one bit of i and j at a time.
template <int kBit = kWidth / 2>
inline void transpose(Vector (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit], std::make_index_sequence<kWidth>());
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(rows);
}

// Reduces the lanes of each vector; lane i of the result is that of vector i.
template <int kBit = kWidth / 2, typename Combine>
inline Vector combine_lanes(Vector (&rows)[kWidth], Combine combine) {
  for (int i = 0; i < kBit; ++i) {
    exchange<kBit>(rows[i], rows[i + kBit], std::make_index_sequence<kWidth>());
    rows[i] = combine(rows[i], rows[i + kBit]);
  }
  if constexpr (kBit > 1) combine_lanes<kBit / 2>(rows, combine);
  return rows[0];
}

inline Vector sums(Vector (&rows)[kWidth]) {
  return combine_lanes(rows, [](Vector a, Vector b) { return a + b; });
}

inline Vector maxima(Vector (&rows)[kWidth]) {
  return combine_lanes(rows, [](Vector a, Vector b) { return maximum(a, b); });
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
