// `linear`. With few rows of x a product is bound by reading every weight once from memory; with few enough, everything else
// overlaps with that. With many it is bound by arithmetic.

#include "common/integers.h"
#include "common/matrices.h"
#include "linear/activations.h"
#include "linear/linear.h"
#include "linear/products_blocks.h"
#include "linear/products_many_rows.h"
#include "linear/products_quantized.h"
#include "linear/products_vector.h"
#if defined(__AVX512F__)
#include "linear/products_digits_dot.h"
#include "linear/products_digits_groups.h"
#include "linear/products_quantized_dot.h"
#elif defined(__AVX2__)
#include "linear/products_digits.h"
#endif
#if defined(__AMX_BF16__)
#include "linear/products_amx.h"
#elif defined(__AVX512F__)
#include "linear/products_bf16_dot.h"
#endif
#include "norm/normalize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The epilogue of the product, for up to kLine output features of `rows` rows, from `first` and `row` on: y and the gate's
// `factors` have kLine numbers a row, of several; of one, `count` in whole vectors.
template <int64_t kLine = kFeatures>
inline void finish(const Linear& l, int64_t row, int64_t rows, int64_t first, int64_t count, float* y, float* factors) {
  const int64_t numbers = rows == 1 ? count : rows * kLine;
  // A number of a whole line that the compiler knows, for what it does with each row.
  const auto with_count = [&](const auto& function) {
    count == kLine ? function(std::integral_constant<int64_t, kLine>()) : function(count);
  };
  alignas(64) float other[kLine];
  const auto read = [&](const void* source, int64_t from) {
    with_count([&](auto columns) {
      if (columns < kLine) std::memset(other, 0, sizeof other);
      convert(source, from, columns, l.element, other);
    });
  };
  const auto add_to = [&](float* target) {
    with_count([&](auto columns) {
      for (int64_t j = 0; j < columns; j += kWidth) store(target + j, load(target + j) + load(other + j));
    });
  };
  if (l.bias) {
    read(l.bias, first);
    for (int64_t r = 0; r < rows; ++r) add_to(y + r * kLine);
  }
  if (l.bias && l.gated) {
    read(l.bias, l.out_features + first);
    for (int64_t r = 0; r < rows; ++r) add_to(factors + r * kLine);
  }
  activate(l.activation, y, numbers);
  if (l.activation == Activation::swiglu_clamped) {
    for (int64_t i = 0; i < numbers; i += kWidth) store(y + i, swiglu_clamped(load(y + i), load(factors + i)));
  } else if (l.gated) {
    for (int64_t i = 0; i < numbers; i += kWidth) store(y + i, load(y + i) * load(factors + i));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = (row + r) * l.out_features + first;
    if (l.residual) read(l.residual, offset), add_to(y + r * kLine);
    with_count([&](auto columns) { write(y + r * kLine, columns, l.out, offset, l.out_element); });
  }
}

template <typename T>
void outputs_in_vectors(const Linear& l, const float* x, const T* weight, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float dots[kMaxRows][kFeatures];    // if gated: those of the gate, and in the second half its factors
  std::memset(dots, 0, l.rows * sizeof dots[0]);  // `finish` reads whole vectors
  const int64_t step = l.gated ? kFeatures / 2 : kFeatures;
  const int64_t row = l.in * sizeof(T), lead = kLead / larger(row, 1);
  const bool alone = l.rows == 1, amd = cpu_features().amd;  // see kMostStreams
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = end - first < step ? end - first : step;
    // Row n of the weights from `first` on, and others `apart` from each other. They are read up to row `stop`.
    const auto multiply = [&](auto streams, int64_t n, int64_t apart, int64_t stop) {
      constexpr int kStreams = decltype(streams)::value;
      const int64_t now = first + n, then = first + step < end ? first + step : next;
      const int64_t skipped = n + lead < stop ? 0 : then - first - stop;
      const int64_t last = now + (kStreams - 1) * apart + skipped + lead;
      const int64_t ahead = last < l.out_features ? skipped * row + kLead : 0;
      const auto multiply_from = [&](int64_t row, float* column) {
        multiply_blocks<kStreams>(x, padded(l.in), l.rows, weight + row * l.in, l.in, apart, ahead, column, kFeatures);
      };
      multiply_from(now, &dots[0][n]);
      if (l.gated) multiply_from(now + l.out_features, &dots[0][step + n]);
    };
    int64_t n = 0;
    const auto multiply_apart = [&](auto streams) {
      const int64_t apart = count / streams;
      for (; n < apart; ++n) multiply(streams, n, apart, apart);
      n = streams * apart;
    };
    if (alone && amd) multiply_apart(std::integral_constant<int, 2>());
    if (alone && !amd) multiply_apart(std::integral_constant<int, kMostStreams>());
    for (; n + kMostStreams <= count; n += kMostStreams) multiply(std::integral_constant<int, kMostStreams>(), n, 1, count);
    for (; n < count; ++n) multiply(std::integral_constant<int, 1>(), n, 1, count);
    for (int64_t r = 0; r < l.rows; ++r) finish(l, r, 1, first, count, dots[r], dots[r] + step);
  }
}

// Rows: QuantizedRows, QuantizedDots, DigitRows, DigitGroups, BlockRows or DigitDots.
template <typename Rows>
void outputs_quantized(const Linear& l, const float* x, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float dots[kMaxRows][kFeatures];  // as in outputs_in_vectors
  std::memset(dots, 0, l.rows * sizeof dots[0]);
  const Rows weight(l);
  const int64_t step = l.gated ? kFeatures / 2 : kFeatures, row = weight.row_bytes();
  // Beyond rows that are read concurrently: up to four neighbors, or any of kRows.
  const int64_t distance = cpu_features().amd ? kLead + 4 * row : larger(kLead, Rows::kRows * row);
  const int64_t lead = distance / larger(row, 1);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = smaller(end - first, step);
    for (int64_t n = 0; n < count; n += Rows::kRows) {
      const int64_t now = first + n, rows = smaller(count - n, Rows::kRows), skipped = now + lead < end ? 0 : next - end;
      const int64_t ahead = now + skipped + lead < l.out_features ? skipped * row + distance : 0;
      weight.multiply(x, now, rows, ahead, &dots[0][n]);
      if (l.gated) weight.multiply(x, now + l.out_features, rows, ahead, &dots[0][step + n]);
    }
    for (int64_t r = 0; r < l.rows; ++r) finish(l, r, 1, first, count, dots[r], dots[r] + step);
  }
}

template <typename Class>
struct Type {
  using type = Class;
};

// Calls function(Type<...>()) with the first of these types of blocks, or the last, that has the number.
template <typename Block, typename... Others, typename Function>
auto with_block_type(int64_t number, const Function& function) {
  if constexpr (sizeof...(Others) > 0) {
    if (number != Block::kNumber) return with_block_type<Others...>(number, function);
  }
#if defined(__AVX512F__)
  // Of other types, whose blocks have 32 columns or signed numbers of 8 bits, digits are no faster than floats.
  if constexpr (Block::kColumns == 256 && Block::kNumber != IQ4_XS::kNumber) {
    if (cpu_features().avx512_vnni) return function(Type<DigitDots<Block>>());
  }
#endif
  return function(Type<BlockRows<Block>>());
}

// Calls function(Type<...>()) with the class that multiplies with quantized weights.
template <typename Function>
auto with_quantized(const Linear& l, const Function& function) {
  if (l.packing.block_type) {
    return with_block_type<Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4>(l.packing.block_type, function);
  }
#if defined(__AVX512F__)
  if (QuantizedDots::serves(l)) return function(Type<QuantizedDots>());
  if (DigitGroups::serves(l)) return function(Type<DigitGroups>());
#endif
  const auto with_minima = [&](auto minima) {
    constexpr bool kMinima = decltype(minima)::value;
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (l.packing.bits == 4) {
      return l.packing.group_size == kPacked ? function(Type<DigitRows<kMinima, true>>())
                                             : function(Type<DigitRows<kMinima, false>>());
    }
#endif
    return l.packing.bits == 8 ? function(Type<QuantizedRows<8, kMinima>>()) : function(Type<QuantizedRows<4, kMinima>>());
  };
  return l.packing.minima ? with_minima(std::true_type()) : with_minima(std::false_type());
}

// Floats of a row of x as linear_inputs lays it out, if not in pairs.
int64_t inputs_row(const Linear& l) {
  if (!l.packing.bits) return padded(l.in);
  return with_quantized(l, [&](auto rows) { return decltype(rows)::type::x_row(l); });
}

#if defined(__AMX_BF16__)
using Pairs = TileRows;
#elif defined(__AVX512F__)
using Pairs = DotRows;
#endif

// Whether elements are multiplied in pairs, at least if there are enough rows of x.
bool multiplies_pairs(Element element) {
#if defined(__AMX_BF16__)
  return element == Element::bfloat16;
#elif defined(__AVX512F__)
  return element == Element::bfloat16 && cpu_features().avx512_bf16;
#else
  return false;
#endif
}

bool multiplies_pairs(const Linear& l) {
#if defined(__AVX512F__)
  return Pairs::serves(l);
#else
  return false;
#endif
}

bool multiplies_many(const Linear& l) { return ManyRows::serves(l) && !multiplies_pairs(l); }

#if defined(__AVX512F__)
// count: a multiple of 32. Subnormals become zero, as in the instructions that multiply.
FASTGPT_BF16_DOT void round_to_bfloat16(const float* source, int64_t count, BFloat16* target) {
  for (int64_t i = 0; i < count; i += 2 * kWidth) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)load(source + i + kWidth), (__m512)load(source + i));
    std::memcpy(target + i, &rounded, sizeof rounded);
  }
}

// Rows `row` to `row` + count of quantized weights, rounded to bfloat16. If `ahead`, the rows after them are prefetched.
void dequantize_rows(const Linear& l, int64_t row, int64_t count, bool ahead, BFloat16* target) {
  with_quantized(l, [&](auto quantized) {
    const typename decltype(quantized)::type weight(l);
    alignas(64) float panel[kPanel];
    const auto* source = static_cast<const uint8_t*>(l.weight) + row * weight.row_bytes();
    const int64_t next = ahead ? count * weight.row_bytes() : 0;
    for (int64_t n = 0; n < count; ++n, source += weight.row_bytes(), target += l.in) {
      for (int64_t byte = 0; byte < weight.row_bytes() && next; byte += 64) __builtin_prefetch(source + next + byte, 0, 2);
      for (int64_t c = 0; c < l.in; c += kPanel) {
        const int64_t columns = smaller(kPanel, l.in - c);
        weight.dequantize(source, c, columns, panel);
        round_to_bfloat16(panel, columns, target + c);
      }
    }
  });
}

// scratch: of linear_outputs_scratch floats.
void outputs_of_pairs(const Linear& l, const Pairs& x, float* scratch, int64_t begin, int64_t end, int64_t next) {
  constexpr int64_t kStep = Pairs::kGroup, kLines = 2 * kStep;  // if gated: those of the gate, and then its factors
  alignas(64) float dots[kLines][kMaxRows] = {}, lines[kMaxRows][kLines];
  for (int64_t first = begin; first < end; first += kStep) {
    const int64_t count = smaller(end - first, kStep), then = first + kStep < end ? first + kStep : next;
    // Multiplies `count` weight rows from `now` on, and prefetches those from `then` on, if they exist.
    const auto multiply_from = [&](int64_t now, int64_t then, float* target) {
      if (l.packing.bits) {
        auto* rows = reinterpret_cast<BFloat16*>(scratch);
        for (int64_t n = 0; n < count; n += Pairs::kDequantized) {
          const int64_t part = smaller(count - n, Pairs::kDequantized);
          dequantize_rows(l, now + n, part, then < l.weight_rows(), rows);
          x.multiply(rows, part, 0, target + n * x.rows());
        }
        return;
      }
      const auto* weight = static_cast<const BFloat16*>(l.weight) + now * l.in;
      x.multiply(weight, count, then < l.weight_rows() ? (then - now) * l.in : 0, target);
    };
    if (l.gated) {
      multiply_from(first, first + l.out_features, dots[0]);
      multiply_from(first + l.out_features, then < l.out_features ? then : l.weight_rows(), dots[0] + kStep * x.rows());
    } else {
      multiply_from(first, then, dots[0]);
    }
    transpose_matrix(dots[0], x.rows(), l.gated ? kLines : kStep, lines[0], kLines, x.rows());
    for (int64_t r = 0; r < l.rows; ++r) finish(l, r, 1, first, count, lines[r], lines[r] + kStep);
  }
}
#endif

// scratch: of linear_outputs_scratch floats.
template <typename Weights>
void outputs_of_many(
    const Linear& l, const Weights& weights, const float* x, float* scratch, int64_t begin, int64_t end, int64_t next) {
  constexpr int64_t kHalf = kBlockRows / 2, kLine = 16;  // output features that are a line of the cache
  const ManyRows many(l);
  const int64_t step = l.gated ? kHalf : kBlockRows;
  // If gated: those of the gate, then of its factors. Of a panel, lines after its last are read, too, and have no effect.
  float *const dots = scratch, *const panel = dots + kBlockRows * many.rows();
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = smaller(end - first, step), following = first + step < end ? first + step : next;
    int64_t column = 0, stop;
    do {  // at least once: without columns, dots are zeros
      stop = smaller(column + kBlockColumns, l.in);
      const bool last = stop == l.in;
      const auto read = [&](int64_t row, float* target) { return weights.read(row, count, column, stop, target); };
      const FloatsOfRows rows = read(first, panel);
      const FloatsOfRows factor_rows = l.gated ? read(first + l.out_features, panel + kHalf * kBlockColumns) : rows;
      const int64_t steps = many.steps(count, stop - column);
      const auto ahead = [&](int64_t skipped) {
        const int64_t then = last ? following : first, left = larger(0, smaller(step, l.out_features - then));
        return WeightsAhead(l.weight, weights.row_bytes(), then + skipped, left, last ? 0 : stop, l.in, steps);
      };
      WeightsAhead rows_ahead = ahead(0), factors_ahead = ahead(l.gated ? l.out_features : 0);
      for (int64_t r = 0; r < many.rows(); r += many.panel(r)) {
        const int64_t width = many.panel(r);
        float *const of_rows = dots + r * kBlockRows, *const of_factors = of_rows + kHalf * width;
        many.multiply(x, r, rows, count, column, stop, of_rows, [&] { rows_ahead(); });
        if (l.gated) many.multiply(x, r, factor_rows, count, column, stop, of_factors, [&] { factors_ahead(); });
        if (!last) continue;
        for (int64_t i = r; i < smaller(r + width, l.rows); i += kWidth) {
          for (int64_t n = 0; n < count; n += kLine) {
            alignas(64) float y[kWidth][kLine], factors[kWidth][kLine];
            const auto turn = [&](const float* source, float* target) {
              transpose_matrix(source + n * width + i - r, width, kLine, target, kLine, kWidth);
            };
            turn(of_rows, y[0]);
            if (l.gated) turn(of_factors, factors[0]);
            finish<kLine>(l, i, smaller(l.rows - i, kWidth), first + n, smaller(count - n, kLine), y[0], factors[0]);
          }
        }
      }
      column = stop;
    } while (column < l.in);
  }
}

}  // namespace

bool linear_multiplies_many(const Linear& l) { return multiplies_many(l); }

int64_t linear_most_rows(const Linear& l) {
  return kHasManyRows && l.many && !multiplies_pairs(l.element) ? kMostManyRows : kMaxRows;
}

int64_t linear_outputs_scratch(const Linear& l) {
  if (multiplies_many(l)) return kBlockRows * (ManyRows(l).rows() + kBlockColumns);
#if defined(__AVX512F__)
  if (Pairs::serves(l) && l.packing.bits) return Pairs::kDequantized * l.in / 2;
#endif
  return 0;
}

// Output features begin to end of all rows. The weights of feature `next`, if it exists, are prefetched.
void linear_outputs(const Linear& l, const float* x, float* scratch, int64_t begin, int64_t end, int64_t next) {
#if defined(__AVX512F__)
  if (Pairs::serves(l)) return outputs_of_pairs(l, Pairs(l, const_cast<float*>(x)), scratch, begin, end, next);
#endif
  const auto outputs_of = [&](const auto& weights) { outputs_of_many(l, weights, x, scratch, begin, end, next); };
  if (l.packing.bits) {
    return with_quantized(l, [&](auto rows) {
      using Rows = typename decltype(rows)::type;
      multiplies_many(l) ? outputs_of(DequantizedRows<Rows>{l}) : outputs_quantized<Rows>(l, x, begin, end, next);
    });
  }
  if (multiplies_many(l)) return l.element == Element::float32 ? outputs_of(FloatRows{l}) : outputs_of(ConvertedRows{l});
  switch (l.element) {
    case Element::float32: return outputs_in_vectors(l, x, static_cast<const float*>(l.weight), begin, end, next);
    case Element::float16: return outputs_in_vectors(l, x, static_cast<const Half*>(l.weight), begin, end, next);
    default: return outputs_in_vectors(l, x, static_cast<const BFloat16*>(l.weight), begin, end, next);
  }
}

// The epilogue of rows begin to end of the product, which may be `out` if there is no gate.
void linear_finish(const Linear& l, const void* product, int64_t begin, int64_t end) {
  alignas(64) float y[kFeatures] = {}, factors[kFeatures] = {};
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t first = 0; first < l.out_features; first += kFeatures) {
      const int64_t count = l.out_features - first < kFeatures ? l.out_features - first : kFeatures;
      const int64_t offset = r * l.weight_rows() + first;
      convert(product, offset, count, l.element, y);
      if (l.gated) convert(product, offset + l.out_features, count, l.element, factors);
      finish(l, r, 1, first, count, y, factors);
    }
  }
}

// Rows begin to end of quantized weights as elements, into `out` (out_features, in).
void linear_dequantize(const Linear& l, int64_t begin, int64_t end) {
  with_quantized(l, [&](auto quantized) {
    const typename decltype(quantized)::type weight(l);
    alignas(64) float panel[kPanel];
    for (int64_t row = begin; row < end; ++row) {
      const auto* source = static_cast<const uint8_t*>(l.weight) + row * weight.row_bytes();
      for (int64_t c = 0; c < l.in; c += kPanel) {
        const int64_t columns = smaller(kPanel, l.in - c);
        weight.dequantize(source, c, columns, panel);
        write(panel, columns, l.out, row * l.in + c, l.out_element);
      }
    }
  });
}

int64_t linear_inputs_size(const Linear& l) {
#if defined(__AVX512F__)
  if (Pairs::serves(l)) return Pairs(l, nullptr).size();
#endif
  if (multiplies_many(l)) return ManyRows(l).rows() * l.in;
  return l.rows * inputs_row(l);
}

int64_t linear_inputs_scratch(const Linear& l) { return (kRowBlock + 2) * padded(l.in); }

// Prepares blocks of kRowBlock rows of x for products: normalized, as zero-padded floats, as pairs, or arranged.
void linear_inputs(const Linear& l, float* x, float* scratch, int64_t begin, int64_t end) {
  const int64_t line = padded(l.in);
  const bool arranged = l.packing.bits && l.rows <= kFewRows, transposed = multiplies_many(l);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowBlock, count = smaller(l.rows - first, kRowBlock);
    if (transposed && l.x_element == Element::float32 && !l.norm.weight && !l.x_rows && count == kRowBlock && line == l.in) {
      ManyRows(l).set(x, first, static_cast<const float*>(l.x) + first * l.in, l.in);  // as they are
      continue;
    }
    float* rows = arranged || transposed ? scratch + 2 * line : x + first * line;
#if defined(__AVX512F__)
    if (Pairs::serves(l)) rows = scratch + 2 * line;
#endif
    for (int64_t r = 0; r < count; ++r) {
      const int64_t source = l.x_rows ? l.x_rows[first + r] : first + r;
      convert_padded(l.x, source * l.in, l.in, l.x_element, rows + r * line);
    }
    if (l.norm.weight) {
      const Normalizer normalize(l.norm, l.in, l.element, scratch);
      for (int64_t r = 0; r < count; ++r) normalize(rows + r * line);
    }
    const auto pad = [&] { std::memset(rows + count * line, 0, (kRowBlock - count) * line * sizeof(float)); };
    if (transposed) pad(), ManyRows(l).set(x, first, rows, line);
#if defined(__AVX512F__)
    if (Pairs::serves(l)) {
      pad();
      Pairs(l, x).set(first, rows, line);
    }
#endif
    if (arranged) {
      with_quantized(l, [&](auto quantized) {
        for (int64_t r = 0; r < count; ++r) {
          decltype(quantized)::type::arrange(l, rows + r * line, x + (first + r) * inputs_row(l));
        }
      });
    }
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
