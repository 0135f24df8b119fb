// Vectors for the CPU kernels: arithmetic on kWidth floats at a time (GCC's vector extension, which Clang shares),
// e^x and tanh, dropout's random numbers, conversion from and to stored elements, and the matrix product.
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
constexpr int kWidth = 4, kTileRows = 5, kTileVectors = 4;  // 20 of 32, as GCC 12 also keeps a factor of each row in one
#else
constexpr int kWidth = 4, kTileRows = 6, kTileVectors = 2;  // 12 of 16 (SSE2)
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t IntVector __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint64_t LongWords __attribute__((vector_size(kWidth * sizeof(float))));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

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

// One vector's lanes combined pairwise, halves first.
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

// Exchanges the lanes of a whose number has the bit kBit for those of b whose number lacks it.
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

// Lane j of vector i goes to lane i of vector j, bit by bit of i and j.
template <int kBit = kWidth / 2>
inline void transpose(Vector (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit], std::make_index_sequence<kWidth>());
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(rows);
}

// Each vector's lanes combined, those of vector i in lane i.
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

// e^x for x <= 0, zero below 2^-126: with y = x · log2(e), 2^y = 2^n · 2^f where n = round(y) and a polynomial for 2^f
// on [-1/2, 1/2], fitted for least relative error (1.9e-9 before rounding). Scores stay in natural units until here: the
// rounding of y then matters least for the largest weights, while scores in base 2 would all carry it at full size.
// kSmallToo: what is small is as accurate, in proportion: f follows from x less n log(2) in two parts, the first of few bits.
template <bool kSmallToo = false>
[[gnu::always_inline]] inline Vector exp_nonpositive(Vector natural) {
  const Vector x = natural * kLog2e;
  const Vector shifter = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = x + shifter, whole = shifted - shifter;
  const Vector f = kSmallToo ? (natural - whole * 0.693359375f + whole * 2.12194440e-4f) * kLog2e : x - whole;
  Vector y = broadcast(1.534581097e-04f);
  y = y * f + 1.339993090e-03f;
  y = y * f + 9.618489072e-03f;
  y = y * f + 5.550328642e-02f;
  y = y * f + 2.402264625e-01f;
  y = y * f + 6.931471825e-01f;
  y = y * f + 1.0f;
  Words n, bits;  // unsigned: below -126 they wrap around, to no use
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &y, sizeof bits);
  bits += n << 23;  // the shifter's own bits are shifted out
  std::memcpy(&y, &bits, sizeof y);
  return x >= broadcast(-126.0f) ? y : maximum(Vector{}, x);  // which is 0, or NaN where x is
}

inline float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }

// Below 0.625 an odd polynomial (that of Cephes' tanhf), as 1 - e^-2x cancels there: within 2 units in the last place.
inline Vector tanh(Vector x) {
  const Vector magnitude = x < 0.0f ? -x : x, square = x * x;
  Vector y = broadcast(-5.70498872745e-03f);
  y = y * square + 2.06390887954e-02f;
  y = y * square - 5.37397155531e-02f;
  y = y * square + 1.33314422036e-01f;
  y = y * square - 3.33332819422e-01f;
  const Vector small = y * square * x + x;
  const Vector e = exp_nonpositive(-2.0f * magnitude), large = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// The four words of Philox4x32-10, as in fastgpt/ops/dropout.py, for the counter (c0, c1, c2, c3) in each lane.
struct PhiloxWords {
  Words word[4];
};

// The upper halves of the products of each lane and a constant.
inline Words high_product(Words x, uint32_t factor) {
#if defined(__aarch64__)
  // There is no product of 64-bit lanes, which the generic code below asks for.
  const uint32x4_t lanes = reinterpret_cast<uint32x4_t>(x);
  const uint64x2_t low = vmull_n_u32(vget_low_u32(lanes), factor), high = vmull_high_n_u32(lanes, factor);
  return reinterpret_cast<Words>(vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high)));
#else
  // Of even lanes and of odd ones.
  LongWords pairs;
  std::memcpy(&pairs, &x, sizeof pairs);
  pairs = ((pairs & 0xffffffffu) * uint64_t{factor} >> 32) | ((pairs >> 32) * uint64_t{factor} & 0xffffffff00000000u);
  std::memcpy(&x, &pairs, sizeof x);
  return x;
#endif
}

inline PhiloxWords philox(uint64_t seed, Words c0, Words c1, Words c2, Words c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words a = high_product(c0, 0xD2511F53u), b = high_product(c2, 0xCD9E8D57u);
    const Words low_a = c0 * 0xD2511F53u, low_b = c2 * 0xCD9E8D57u;
    c0 = b ^ c1 ^ k0, c1 = low_b, c2 = a ^ c3 ^ k1, c3 = low_a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Elements as memory holds them, so that pointers to them tell how to load.
struct Half {
  uint16_t bits;
  operator float() const { return half_to_float(bits); }
};
struct BFloat16 {
  uint16_t bits;
  operator float() const { return bfloat16_to_float(bits); }
};
struct Float8 {
  uint8_t bits;
  operator float() const { return e4m3_to_float(bits); }
};

// read(elements), with `data` as a pointer to elements of the type that it holds.
template <typename Read>
inline void as_elements(const void* data, Element element, const Read& read) {
  switch (element) {
    case Element::float32: return read(static_cast<const float*>(data));
    case Element::float16: return read(static_cast<const Half*>(data));
    case Element::bfloat16: return read(static_cast<const BFloat16*>(data));
    case Element::int8: return read(static_cast<const int8_t*>(data));
    case Element::float8_e4m3: return read(static_cast<const Float8*>(data));
  }
}

// kWidth numbers as 32-bit ones. From __builtin_convertvector, GCC 12 makes twice to three times the instructions; on Arm, of
// loops over lanes it makes loads of single ones. (Masks of all lanes, because its headers warn of AVX-512's plain forms.)
#if defined(__AVX512F__)
inline __m128i load_16_bytes(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }
inline __m256i load_32_bytes(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
inline IntVector widen(const int8_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepi8_epi32(0xffff, load_16_bytes(source)));
}
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, load_16_bytes(source)));
}
inline IntVector widen(const uint16_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepu16_epi32(0xffff, load_32_bytes(source)));
}
inline Vector load(const Half* source) { return _mm512_maskz_cvtph_ps(0xffff, load_32_bytes(source)); }
#elif defined(__AVX2__)
inline __m128i load_8_bytes(const void* source) { return _mm_loadl_epi64(static_cast<const __m128i*>(source)); }
inline __m128i load_16_bytes(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }
inline IntVector widen(const int8_t* source) { return reinterpret_cast<IntVector>(_mm256_cvtepi8_epi32(load_8_bytes(source))); }
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(_mm256_cvtepu8_epi32(load_8_bytes(source)));
}
inline IntVector widen(const uint16_t* source) {
  return reinterpret_cast<IntVector>(_mm256_cvtepu16_epi32(load_16_bytes(source)));
}
inline Vector load(const Half* source) { return _mm256_cvtph_ps(load_16_bytes(source)); }
#elif defined(__aarch64__)
inline uint8x8_t load_4_bytes(const void* source) {
  uint32_t bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
inline IntVector widen(const int8_t* source) {
  const int16x8_t twice = vmovl_s8(vreinterpret_s8_u8(load_4_bytes(source)));
  return reinterpret_cast<IntVector>(vmovl_s16(vget_low_s16(twice)));
}
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(vmovl_u16(vget_low_u16(vmovl_u8(load_4_bytes(source)))));
}
inline IntVector widen(const uint16_t* source) { return reinterpret_cast<IntVector>(vmovl_u16(vld1_u16(source))); }
// For all GCC 12 knows, the intrinsic of this instruction reads memory: it would store sums in registers before each.
inline Vector load(const Half* source) {
  Vector x;
  asm("fcvtl %0.4s, %1.4h" : "=w"(x) : "w"(vld1_u16(&source->bits)));
  return x;
}
#else
template <typename Number>
inline IntVector widen(const Number* source) {
  IntVector x;
  for (int i = 0; i < kWidth; ++i) x[i] = source[i];
  return x;
}
inline Vector load(const Half* source) {
  Vector x;
  for (int i = 0; i < kWidth; ++i) x[i] = source[i];
  return x;
}
#endif

inline Vector load(const BFloat16* source) {
  const IntVector bits = widen(&source->bits) << 16;
  return reinterpret_cast<Vector>(bits);
}

inline Vector load(const int8_t* source) { return __builtin_convertvector(widen(source), Vector); }

// As e4m3_to_float.
inline Vector load(const Float8* source) {
  const IntVector bits = widen(&source->bits), magnitude = bits & 0x7f, shifted = magnitude << 20;
  const Vector scaled = reinterpret_cast<Vector>(shifted) * 0x1p120f;
  const IntVector number = magnitude == 0x7f ? broadcast(0x7fc00000) : reinterpret_cast<IntVector>(scaled);
  return reinterpret_cast<Vector>(number | (bits & 0x80) << 24);
}

// `count` elements of `element`, from index `offset` of `source`, as floats.
inline void convert(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  as_elements(source, element, [&](const auto* elements) {
    elements += offset;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(target + i, load(elements + i));
    for (; i < count; ++i) target[i] = elements[i];
  });
}

// `count` floats as elements of q's dtype, from index `offset` of `target` on.
inline void write(const float* source, int64_t count, void* target, int64_t offset, Element element) {
  if (element == Element::float32) {
    std::memcpy(static_cast<float*>(target) + offset, source, count * sizeof(float));
  } else if (element == Element::float16) {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(target)[offset + i] = float_to_half(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(target)[offset + i] = float_to_bfloat16(source[i]);
  }
}

// c[i][j] (+)= sum_k a[i][k] · b[k][j] for i < kRows and j < kVectors vectors, and c[i][j] · factors[j] in place of c[i][j]
// if there are factors. Strides in elements. What c held joins last, so that the rounding of a long sum grows with the
// number of blocks, not of terms.
template <int kRows, int kVectors>
inline void multiply_tile(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c, int64_t c_row, int64_t K,
    bool accumulate, const float* factors) {
  Vector total[kRows][kVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * b_k + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = broadcast(a[i * a_row + k * a_k]);
      for (int j = 0; j < kVectors; ++j) total[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* target = c + i * c_row + j * kWidth;
      if (factors) {
        total[i][j] += load(target) * load(factors + j * kWidth);
      } else if (accumulate) {
        total[i][j] += load(target);
      }
      store(target, total[i][j]);
    }
  }
}

// The same for any number of rows and vectors, tile by tile.
template <int kRows, int kVectors>
inline void multiply(
    int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
    int64_t c_row, int64_t K, bool accumulate, const float* factors = nullptr) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row) {
    const auto tile = [&](auto count, int64_t j) {
      multiply_tile<kRows, decltype(count)::value>(
          a, a_row, a_k, b + j, b_k, c + j, c_row, K, accumulate, factors ? factors + j : nullptr);
    };
    int64_t j = 0;
    for (; j + kVectors <= vectors; j += kVectors) tile(std::integral_constant<int, kVectors>(), j * kWidth);
    for (; j < vectors; ++j) tile(std::integral_constant<int, 1>(), j * kWidth);
  }
  if constexpr (kRows > 1) {
    if (rows) multiply<kRows - 1, kVectors>(rows, vectors, a, a_row, a_k, b, b_k, c, c_row, K, accumulate, factors);
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
