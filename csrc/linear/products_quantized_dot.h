// The products of `linear` with weights of 4 bits by VDPBF16PS, which adds dot products of pairs of bfloat16 to floats
// (AVX512_BF16).
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "common/bfloat16_pieces.h"
#include "linear/products_quantized.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Up to kFewRows rows of x in bfloat16: if they have been normalized or are float32, they are rounded. Integers of 4 bits are
// looked up in a table of bfloat16. Four units, a chunk, are multiplied at a time, each in 4 lanes of the accumulators.
class QuantizedDots {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  static bool serves(const Linear& l) {
    const int64_t size = l.packing.group_size;
    return l.packing.bits == 4 && !l.packing.minima && (size == kPacked || size % kChunk == 0) &&
        l.element == Element::bfloat16 && l.rows <= kFewRows && cpu_features().avx512_bf16;
  }

  explicit QuantizedDots(const Linear& l) : l_(l), row_bytes_(l.packing.row_bytes(l.in)) {}

  int64_t row_bytes() const { return row_bytes_; }

  static int64_t x_row(const Linear& l) { return chunks(l) * kChunk / 2; }  // floats of a row of x: pairs of the chunks

  static void arrange(const Linear& l, const float* x, float* target) {
    auto* pairs = reinterpret_cast<uint16_t*>(target);
    for (int64_t c = 0; c < rounded_up(l.in, kChunk); c += kPacked) {
      Vector halves[2] = {};
      if (c < l.in) halves[0] = load(x + c), halves[1] = load(x + c + kWidth);
      arrange_unit(halves, pairs + c / kChunk * kChunk + c % kChunk / 4);  // from a quarter of the first vector of the chunk on
    }
  }

  // As QuantizedRows.
  void dequantize(const uint8_t* row, int64_t c, int64_t count, float* target) const {
    QuantizedRows<4, false>(l_).dequantize(row, c, count, target);
  }

  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    multiply_rows<kFewRows>(x, static_cast<const uint8_t*>(l_.weight) + row * row_bytes_, count, ahead, dots);
  }

 private:
  static constexpr int64_t kUnits = 4, kChunk = kUnits * kPacked;
  using Header = GroupHeader<false>;

  static int64_t chunks(const Linear& l) { return (l.in + kChunk - 1) / kChunk; }

  // Rounds 32 numbers to bfloat16. Those at 4i + v, where the second half's are between the first half's, go to
  // word i of the unit's quarter of vector v, which is multiplied with the integers in bits 4v to 4v + 3 of words.
  static void arrange_unit(Vector (&halves)[2], uint16_t* target) {
    const UIntVector first = take_piece<true, 1>(halves[0]), second = take_piece<true, 1>(halves[1]);
    // clang-format off
    const __m512i order = _mm512_set_epi16(
        31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2,
        29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    // clang-format on
    const __m512i words = _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(first >> 16 | second));
    alignas(64) uint16_t quarters[kUnits][8];
    std::memcpy(quarters, &words, sizeof words);
    for (int v = 0; v < kUnits; ++v) std::memcpy(target + v * kPacked, quarters[v], sizeof quarters[v]);
  }

  template <int kCount>
  FASTGPT_BF16_DOT void multiply_rows(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_rows<kCount - 1>(x, weight, count, ahead, dots);
    }
    multiply_in_streams<kCount, kCount == 1 ? 2 : 1>(
        weight, row_bytes_, count, false, dots,
        [&](auto& rows, auto& total) FASTGPT_BF16_DOT { Streams(l_, x, rows, total).multiply(ahead); });
  }

  // Adds to lanes of the sums of kCount rows of x times kStreams of the weights.
  template <int kStreams, int kCount>
  struct Streams {
    const Linear& l;
    const float* x;
    const int64_t x_row;
    const uint8_t* (&rows)[kStreams];
    Vector (&total)[kStreams][kCount];

    Streams(const Linear& l, const float* x, const uint8_t* (&rows)[kStreams], Vector (&total)[kStreams][kCount])
        : l(l), x(x), x_row(QuantizedDots::x_row(l)), rows(rows), total(total) {}

    FASTGPT_BF16_DOT __attribute__((always_inline)) inline void multiply(int64_t ahead) {
      const int64_t size = l.packing.group_size, units = l.in / kPacked;
      if (size == kPacked) {
        int64_t unit = 0;
        for (; unit + kUnits <= units; unit += kUnits) add_groups(kUnits, ahead);
        if (unit < units) add_groups(units - unit, ahead);
      } else {
        for (int64_t unit = 0; unit < units; unit += size / kPacked) add_group(size / kChunk, ahead);
      }
    }

    // A chunk of groups of a unit. If there are only `count`, the last one is read again, as x is zero.
    FASTGPT_BF16_DOT __attribute__((always_inline)) inline void add_groups(int64_t count, int64_t ahead) {
      constexpr int64_t kBytes = Header::kBytes + kPacked / 2;
      for (int j = 0; j < kStreams; ++j) {
        if (ahead) prefetch(rows[j] + ahead), prefetch(rows[j] + ahead + 2 * kBytes);
        __m128i of[kUnits];
        float scales[kUnits];
        for (int64_t u = 0; u < kUnits; ++u) {
          const uint8_t* const source = rows[j] + smaller(u, count - 1) * kBytes;
          const Header header(source, l.values_of_halves);
          of[u] = load_16_bytes(source + Header::kBytes), scales[u] = header.scale;
        }
        __m512i bytes = _mm512_castsi128_si512(of[0]);
        bytes = _mm512_mask_broadcast_i32x4(bytes, 0xf0, of[1]);
        bytes = _mm512_mask_broadcast_i32x4(bytes, 0xf00, of[2]);
        bytes = _mm512_mask_broadcast_i32x4(bytes, 0xf000, of[3]);
        const __m512 scale = _mm512_castps128_ps512(_mm_setr_ps(scales[0], scales[1], scales[2], scales[3]));
        const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        add_products(j, bytes, _mm512_maskz_permutexvar_ps(0xffff, quarters, scale));
        rows[j] += kUnits * kBytes;
      }
      x += kChunk / 2;
    }

    // A group of several chunks.
    FASTGPT_BF16_DOT __attribute__((always_inline)) inline void add_group(int64_t count, int64_t ahead) {
      Vector scale[kStreams];
      for (int j = 0; j < kStreams; ++j) {
        const Header header(rows[j], l.values_of_halves);
        scale[j] = broadcast(header.scale);
        rows[j] += Header::kBytes;
      }
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        for (int j = 0; j < kStreams; ++j) {
          if (ahead) prefetch(rows[j] + ahead);
          add_products(j, _mm512_loadu_si512(rows[j]), scale[j]);
          rows[j] += kChunk / 2;
        }
        x += kChunk / 2;
      }
    }

    FASTGPT_BF16_DOT __attribute__((always_inline)) inline void add_products(int j, __m512i bytes, __m512 scale) {
      // Bfloat16 from -8 to 7, twice, since permutations look at 5 bits of an index.
      const __m512i numbers = _mm512_maskz_broadcast_i64x4(
          0xff,
          _mm256_setr_epi16(
              short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040), short(0xc000),
              short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
      __m512 sums[kCount][2] = {};
      for (int v = 0; v < kUnits; ++v) {
        const __m512i w = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * v), numbers);
        for (int i = 0; i < kCount; ++i) {
          const __m512i pairs = _mm512_loadu_si512(x + i * x_row + v * kWidth);
          sums[i][v % 2] = _mm512_dpbf16_ps(sums[i][v % 2], (__m512bh)pairs, (__m512bh)w);
        }
      }
      for (int i = 0; i < kCount; ++i) {
        total[j][i] += (sums[i][0] + sums[i][1]) * scale;
      }
    }

    static void prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }
  };

  const Linear& l_;
  int64_t row_bytes_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
