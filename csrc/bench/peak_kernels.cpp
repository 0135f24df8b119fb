// The loops of bench/peaks.h. Each has enough independent accumulators to hide latency: at least latency times throughput,
// which is 10 for 2 per cycle that take 5 cycles, and 16 for Arm's 4 per cycle that take 4.

#include "bench/peaks.h"

#include <cstring>

#include "common/cpu_level.h"
#include "common/vectors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AMX_TILE__)
#include "common/tiles.h"
#endif

// Instructions beyond those of a level: compilers that support one have its header. CPUID says whether the CPU has it, as
// Clang's
// __builtin_cpu_supports does not know all names; that the operating system saves the registers follows from the level.
#if defined(__AVX512F__) && __has_include(<avx512bf16intrin.h>)
#define FASTGPT_BF16_DOT __attribute__((target("avx512bf16")))
#endif
#if defined(__AVX512F__) && __has_include(<avx512vnniintrin.h>)
#define FASTGPT_INT8_DOT __attribute__((target("avx512vnni")))
#elif defined(__AVX2__) && !defined(__AVX512F__) && __has_include(<avxvnniintrin.h>)
#define FASTGPT_INT8_DOT __attribute__((target("avxvnni")))
#endif
#if defined(__AMX_TILE__)
#define FASTGPT_INT8_TILES __attribute__((target("amx-int8")))
#endif

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators =
    16;  // of 32 registers: GCC does not unroll longer loops completely, and would keep accumulators in memory
#else
constexpr int kAccumulators = 12;  // of 16
#endif

float multiply_add(int64_t iterations) {
  const Vector factor = in_register(broadcast(0.5f)), addend = in_register(broadcast(1.0f));
  Vector total[kAccumulators];
  for (Vector& x : total) x = in_register(Vector{});
  for (int64_t n = 0; n < iterations; ++n) {
    for (Vector& x : total) x = x * factor + addend;
  }
  Vector all = {};
  for (const Vector x : total) all += x;
  return sum(all);
}

#if defined(FASTGPT_BF16_DOT)
FASTGPT_BF16_DOT float bf16_dot(int64_t iterations) {
  const __m512bh ones = (__m512bh)in_register(_mm512_set1_epi16(0x3f80));
  __m512 total[kAccumulators];
  for (__m512& x : total) x = in_register(_mm512_setzero_ps());
  for (int64_t n = 0; n < iterations; ++n) {
    for (__m512& x : total) x = _mm512_dpbf16_ps(x, ones, ones);
  }
  Vector all = {};
  for (const __m512 x : total) all += (Vector)x;
  return sum(all);
}
#endif

#if defined(FASTGPT_INT8_DOT)
FASTGPT_INT8_DOT float int8_dot(int64_t iterations) {
#if defined(__AVX512F__)
  typedef __m512i Integers;
#else
  typedef __m256i Integers;
#endif
  const Integers ones = in_register((Integers)(IntVector{} + 0x01010101));
  Integers total[kAccumulators];
  for (Integers& x : total) x = in_register(Integers{});
  for (int64_t n = 0; n < iterations; ++n) {
    for (Integers& x : total) {
#if defined(__AVX512F__)
      x = _mm512_dpbusd_epi32(x, ones, ones);
#else
      x = _mm256_dpbusd_avx_epi32(x, ones, ones);
#endif
    }
  }
  IntVector all = {};
  for (const Integers x : total) all += (IntVector)x;
  return static_cast<float>(all[0]);
}
#endif

#if defined(__AMX_TILE__)
constexpr int kTileAccumulators = 6;  // of eight tiles

// Zeros tiles 0 to 5, and fills tiles 6 and 7 with these four bytes.
inline void fill_tiles(uint32_t bytes) {
  alignas(64) uint32_t rows[16][16];
  for (auto& row : rows) {
    for (uint32_t& x : row) x = bytes;
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_loadd(6, rows, 64);
  _tile_loadd(7, rows, 64);
}

inline float first_of_tiles() {
  alignas(64) float rows[16][16];
  _tile_stored(0, rows, 64);
  return rows[0][0];
}

float bf16_tiles(int64_t iterations) {
  const Tiles tiles;
  fill_tiles(0x3f803f80);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  return first_of_tiles();
}

FASTGPT_INT8_TILES float int8_tiles(int64_t iterations) {
  const Tiles tiles;
  fill_tiles(0x01010101);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  }
  return first_of_tiles();
}
#endif

#if defined(__AVX2__)
// A bit of CPUID leaf 7: register 0 is eax, 2 ecx and 3 edx.
bool has_feature(unsigned subleaf, int register_number, int bit) {
  unsigned registers[4];
  return __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
      (registers[register_number] >> bit & 1);
}
#endif

}  // namespace

float read_memory(const float* numbers, int64_t count) {
  constexpr int64_t kAhead = 2048 / sizeof(float);
  Vector even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    __builtin_prefetch(numbers + i + kAhead, 0, 2);
    __builtin_prefetch(numbers + i + kAhead + kWidth, 0, 2);
    even += load(numbers + i);
    odd += load(numbers + i + kWidth);
  }
  float all = sum(even + odd);
  for (; i < count; ++i) all += numbers[i];
  return all;
}

int list_peaks(Peak* list) {
  int count = 0;
#if defined(__FMA__) || defined(__aarch64__)
  constexpr const char* kName = "fp32 fma";
#else
  constexpr const char* kName = "fp32 multiply and add";
#endif
  constexpr int64_t kOperations = 2 * kAccumulators * kWidth;
  list[count++] = {kName, kOperations, &multiply_add};
#if defined(FASTGPT_BF16_DOT)
  if (cpu_features().avx512_bf16) list[count++] = {"bf16 dot", 2 * kOperations, &bf16_dot};
#endif
#if defined(FASTGPT_INT8_DOT) && defined(__AVX512F__)
  if (has_feature(0, 2, 11)) list[count++] = {"int8 dot", 4 * kOperations, &int8_dot};
#elif defined(FASTGPT_INT8_DOT)
  if (has_feature(1, 0, 4)) list[count++] = {"int8 dot", 4 * kOperations, &int8_dot};
#endif
#if defined(__AMX_TILE__)
  constexpr int64_t kProducts = 2 * kTileAccumulators * 16 * 16 * 16;  // of the four-byte elements of two tiles
  list[count++] = {"AMX bf16 tiles", 2 * kProducts, &bf16_tiles};
  if (has_feature(0, 3, 25)) list[count++] = {"AMX int8 tiles", 4 * kProducts, &int8_tiles};
#endif
  return count;
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
