// Types of blocks in GGUF files, unpacked to integers of 8 bits, scales and minima: w = scale · q + minimum. The same as
// fastgpt/ops/gguf_blocks.py.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/linear.h"
#include "linear/products_quantized.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Numbers that 4 bits stand for.
constexpr int8_t kLinear[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int8_t kNonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFloat4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // E2M1, doubled

typedef uint8_t ByteVector __attribute__((vector_size(32)));
#pragma GCC diagnostic ignored "-Wpsabi"  // of functions that return it, in files that are not linked with others' code

inline ByteVector load_bytes(const uint8_t* source) {
  ByteVector x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

inline void store_bytes(int8_t* target, ByteVector x) { std::memcpy(target, &x, sizeof x); }

// The lower halves of 16 bytes, and then the upper ones.
inline ByteVector halves_of_16(const uint8_t* source) {
#if defined(__AVX2__)
  const __m128i bytes = load_16_bytes(source);
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
  return reinterpret_cast<ByteVector>(_mm256_and_si256(both, _mm256_set1_epi8(15)));
#else
  ByteVector x;
  for (int i = 0; i < 16; ++i) x[i] = source[i] & 15, x[16 + i] = source[i] >> 4;
  return x;
#endif
}

// 16 in the bytes whose bit is set.
inline ByteVector fifth_bits(const uint8_t* bits) {
  typedef uint64_t Words __attribute__((vector_size(32)));
  const Words words{bits[0], bits[1], bits[2], bits[3]};
  const Words apart = words * 0x0101010101010101u & 0x8040201008040201u;
  return reinterpret_cast<ByteVector>(reinterpret_cast<ByteVector>(apart) != 0) & 16;
}

// What a block holds. `minima` are set only if its type has some.
template <int64_t kColumns, int64_t kGroup>
struct Unpacked {
  alignas(64) int8_t q[kColumns];
  float scales[kColumns / kGroup], minima[kColumns / kGroup];

  // kWidth numbers from column c on, and weights: scale · number + minimum.
  Vector numbers(int64_t c) const { return load(q + c); }
  Vector weights(int64_t c, Vector scale, Vector minimum) const { return numbers(c) * scale + minimum; }
};

// The same, of numbers that 4 bits stand for: the lower halves of kPart bytes, then the upper ones, and so on.
template <int64_t kColumns, int64_t kGroup, int64_t kPart, const int8_t (&kTable)[16]>
struct LookedUp {
#if defined(__AVX512F__)
  const uint8_t* bytes;
#else
  alignas(64) int8_t q[kColumns];
#endif
  float scales[kColumns / kGroup], minima[kColumns / kGroup];

#if defined(__AVX512F__)
  void set(const uint8_t* source) { bytes = source; }

  Vector numbers(int64_t c) const { return look_up(c, table()); }
  Vector weights(int64_t c, Vector scale, Vector minimum) const { return look_up(c, table() * scale + minimum); }

 private:
  static Vector table() {
    Vector numbers;
    for (int i = 0; i < 16; ++i) numbers[i] = kTable[i];
    return numbers;
  }

  // A permutation ignores all but the lowest 4 bits of a lane's index.
  Vector look_up(int64_t c, Vector table) const {
    const bool upper = c % (2 * kPart) >= kPart;
    const __m512i indices = reinterpret_cast<__m512i>(widen(bytes + c / (2 * kPart) * kPart + c % kPart));
    return _mm512_maskz_permutexvar_ps(0xffff, upper ? _mm512_maskz_srli_epi32(0xffff, indices, 4) : indices, table);
  }
#else
  void set(const uint8_t* source) {
    for (int64_t c = 0; c < kColumns; c += 32) {
      const int64_t upper = c % (2 * kPart) >= kPart;  // if kPart is 16, both halves of 16 bytes
      const uint8_t* const part = source + c / (2 * kPart) * kPart;
      store_bytes(q + c, looked_up(kPart == 16 ? halves_of_16(part) : upper ? load_bytes(part) >> 4 : load_bytes(part) & 15));
    }
  }

  Vector numbers(int64_t c) const { return load(q + c); }
  Vector weights(int64_t c, Vector scale, Vector minimum) const { return numbers(c) * scale + minimum; }

 private:
  static ByteVector looked_up(ByteVector indices) {
    if (kTable[15] == 15) return indices;
#if defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(load_16_bytes(kTable));
    return reinterpret_cast<ByteVector>(_mm256_shuffle_epi8(table, reinterpret_cast<__m256i>(indices)));
#else
    for (int i = 0; i < 32; ++i) indices[i] = static_cast<uint8_t>(kTable[indices[i]]);
    return indices;
#endif
  }
#endif
};

// Eight scales or minima: bytes · factor.
inline void store_scaled(uint64_t bytes, float factor, float* target, float offset = 0.0f) {
#if defined(__AVX2__)
  const __m256i numbers = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  _mm256_storeu_ps(
      target, _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(numbers), _mm256_set1_ps(offset)), _mm256_set1_ps(factor)));
#else
  for (int i = 0; i < 8; ++i) target[i] = (static_cast<float>(bytes >> 8 * i & 255) + offset) * factor;
#endif
}

template <typename Bits>
inline Bits load_bits(const uint8_t* source) {
  Bits bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

struct Q5_0 {
  static constexpr int kNumber = 6;
  static constexpr int64_t kColumns = 32, kBytes = 22, kGroup = 32;
  static constexpr bool kMinima = false;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    to.scales[0] = value_of_half(block, values_of_halves);
    store_bytes(to.q, (halves_of_16(block + 6) | fifth_bits(block + 2)) - 16);
  }
};

struct Q5_1 {
  static constexpr int kNumber = 7;
  static constexpr int64_t kColumns = 32, kBytes = 24, kGroup = 32;
  static constexpr bool kMinima = true;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    to.scales[0] = value_of_half(block, values_of_halves), to.minima[0] = value_of_half(block + 2, values_of_halves);
    store_bytes(to.q, halves_of_16(block + 8) | fifth_bits(block + 4));
  }
};

struct Q2_K {
  static constexpr int kNumber = 10;
  static constexpr int64_t kColumns = 256, kBytes = 84, kGroup = 16;
  static constexpr bool kMinima = true;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    const float d = value_of_half(block + 80, values_of_halves), least = value_of_half(block + 82, values_of_halves);
    for (int g = 0; g < 16; g += 8) {
      const auto bytes = load_bits<uint64_t>(block + g);
      store_scaled(bytes & 0x0f0f0f0f0f0f0f0fu, d, to.scales + g);
      store_scaled(bytes >> 4 & 0x0f0f0f0f0f0f0f0fu, -least, to.minima + g);
    }
    for (int half = 0; half < 2; ++half) {
      const ByteVector bytes = load_bytes(block + 16 + 32 * half);
      for (int part = 0; part < 4; ++part) store_bytes(to.q + 128 * half + 32 * part, bytes >> 2 * part & 3);
    }
  }
};

struct Q3_K {
  static constexpr int kNumber = 11;
  static constexpr int64_t kColumns = 256, kBytes = 110, kGroup = 16;
  static constexpr bool kMinima = false;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    const float d = value_of_half(block + 108, values_of_halves);
    for (int half = 0; half < 2; ++half) store_scaled(bytes_of_scales(block, half), d, to.scales + 8 * half, -32.0f);
    const ByteVector high = load_bytes(block);
    for (int half = 0; half < 2; ++half) {
      const ByteVector low = load_bytes(block + 32 + 32 * half);
      for (int part = 0; part < 4; ++part) {
        const ByteVector q = (low >> 2 * part & 3) | (high >> (4 * half + part) & 1) << 2;
        store_bytes(to.q + 128 * half + 32 * part, q - 4);
      }
    }
  }

  static uint64_t bytes_of_scales(const uint8_t* block, int half) {
    const uint64_t low = load_bits<uint64_t>(block + 96) >> 4 * half & 0x0f0f0f0f0f0f0f0fu;
    const uint32_t high = load_bits<uint32_t>(block + 104) >> 4 * half;
    return low | (high & 0x03030303u) << 4 | uint64_t{high >> 2 & 0x03030303u} << 36;
  }
};

struct Q4_K {
  static constexpr int kNumber = 12;
  static constexpr int64_t kColumns = 256, kBytes = 144, kGroup = 32;
  static constexpr bool kMinima = true;
  using Numbers = LookedUp<kColumns, kGroup, 32, kLinear>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    unpack_scales(block, values_of_halves, to);
    to.set(block + 16);
  }

  template <typename Numbers>
  static void unpack_scales(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    const auto [scales, minima] = bytes_of_scales(block);
    store_scaled(scales, value_of_half(block, values_of_halves), to.scales);
    store_scaled(minima, -value_of_half(block + 2, values_of_halves), to.minima);
  }

  // Of eight scales and minima, of 6 bits each.
  static std::pair<uint64_t, uint64_t> bytes_of_scales(const uint8_t* block) {
    const auto a = load_bits<uint32_t>(block + 4), b = load_bits<uint32_t>(block + 8), c = load_bits<uint32_t>(block + 12);
    const uint64_t scales = (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u);
    const uint64_t minima = (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u);
    return {scales << 32 | (a & 0x3f3f3f3fu), minima << 32 | (b & 0x3f3f3f3fu)};
  }
};

struct Q5_K {
  static constexpr int kNumber = 13;
  static constexpr int64_t kColumns = 256, kBytes = 176, kGroup = 32;
  static constexpr bool kMinima = true;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    Q4_K::unpack_scales(block, values_of_halves, to);
    const ByteVector high = load_bytes(block + 16);
    for (int part = 0; part < 4; ++part) {
      const ByteVector low = load_bytes(block + 48 + 32 * part);
      store_bytes(to.q + 64 * part, (low & 15) | (high >> 2 * part & 1) << 4);
      store_bytes(to.q + 64 * part + 32, low >> 4 | (high >> (2 * part + 1) & 1) << 4);
    }
  }
};

struct Q6_K {
  static constexpr int kNumber = 14;
  static constexpr int64_t kColumns = 256, kBytes = 210, kGroup = 16;
  static constexpr bool kMinima = false;
  using Numbers = Unpacked<kColumns, kGroup>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    const Vector d = broadcast(value_of_half(block + 208, values_of_halves));
    for (int g = 0; g < 16; g += kWidth) {
      store(to.scales + g, load(reinterpret_cast<const int8_t*>(block) + 192 + g) * d);
    }
    for (int half = 0; half < 2; ++half) {
      const ByteVector first = load_bytes(block + 64 * half), second = load_bytes(block + 64 * half + 32);
      const ByteVector high = load_bytes(block + 128 + 32 * half);
      int8_t* const q = to.q + 128 * half;
      store_bytes(q, ((first & 15) | (high << 4 & 48)) - 32), store_bytes(q + 32, ((second & 15) | (high << 2 & 48)) - 32);
      store_bytes(q + 64, (first >> 4 | (high & 48)) - 32), store_bytes(q + 96, (second >> 4 | (high >> 2 & 48)) - 32);
    }
  }
};

struct IQ4_NL {
  static constexpr int kNumber = 20;
  static constexpr int64_t kColumns = 32, kBytes = 18, kGroup = 32;
  static constexpr bool kMinima = false;
  using Numbers = LookedUp<kColumns, kGroup, 16, kNonlinear>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    to.scales[0] = value_of_half(block, values_of_halves);
    to.set(block + 2);
  }
};

struct IQ4_XS {
  static constexpr int kNumber = 23;
  static constexpr int64_t kColumns = 256, kBytes = 136, kGroup = 32;
  static constexpr bool kMinima = false;
  using Numbers = LookedUp<kColumns, kGroup, 16, kNonlinear>;

  static void unpack(const uint8_t* block, const float* values_of_halves, Numbers& to) {
    store_scaled(bytes_of_scales(block), value_of_half(block, values_of_halves), to.scales, -32.0f);
    to.set(block + 8);
  }

  static uint64_t bytes_of_scales(const uint8_t* block) {
    uint64_t low = load_bits<uint32_t>(block + 4), high = load_bits<uint16_t>(block + 2);  // moved apart, to one in a byte
    low = (low | low << 16) & 0x0000ffff0000ffffu, low = (low | low << 8) & 0x00ff00ff00ff00ffu;
    low = (low | low << 4) & 0x0f0f0f0f0f0f0f0fu;
    high = (high | high << 24) & 0x000000ff000000ffu, high = (high | high << 12) & 0x000f000f000f000fu;
    high = (high | high << 6) & 0x0303030303030303u;
    return low | high << 4;
  }
};

struct MXFP4 {
  static constexpr int kNumber = 39;
  static constexpr int64_t kColumns = 32, kBytes = 17, kGroup = 32;
  static constexpr bool kMinima = false;
  using Numbers = LookedUp<kColumns, kGroup, 16, kFloat4>;

  static void unpack(const uint8_t* block, const float*, Numbers& to) {
    to.scales[0] = scale(block[0]);
    to.set(block + 1);
  }

  // 2^(exponent - 128); the two smallest ones are subnormal.
  static float scale(uint32_t exponent) { return bits_to_float(exponent < 2 ? 0x200000u << exponent : (exponent - 1) << 23); }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
