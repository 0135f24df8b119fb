// `linear` for few rows of x. Such a product reads every weight once, from memory; all else must hide behind that.

#include "common/stored_elements.h"
#include "linear/activations.h"
#include "linear/linear.h"
#include "norm/normalize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Weight rows that are read side by side: the CPU fetches ahead within a page of memory, so one row alone is read 20%
// slower than several.
constexpr int kMostStreams = 4;
constexpr int kMostRows = kWidth == 16 ? 4 : 2;  // of x, multiplied with them at a time; registers hold all sums
// Sums of each dot product that grow side by side. NEON's are of 4 numbers: with one for each weight row, multiply-adds would
// wait for those before, and weights be read slower than memory has them.
#if defined(__aarch64__)
constexpr int kSumsOfDot = 2;
#else
constexpr int kSumsOfDot = 1;
#endif

// dots[i][s] = sum_c x[i][c] · weight[s][c] for kRows rows of x and kStreams of weights. If `next` is not 0, the weights
// that many bytes on are fetched into the caches.
template <int kRows, int kStreams, typename T>
void multiply_rows(const float* x, int64_t x_row, const T* weight, int64_t in, int64_t next, float* dots, int64_t dots_row) {
  Vector total[kRows][kStreams][kSumsOfDot] = {};
  int64_t c = 0;
  for (; c + kSumsOfDot * kWidth <= in; c += kSumsOfDot * kWidth) {
    for (int s = 0; s < kStreams; ++s) {
      const T* source = weight + s * in + c;
      if (next) __builtin_prefetch(reinterpret_cast<const char*>(source) + next);
      for (int v = 0; v < kSumsOfDot; ++v) {
        const Vector w = load(source + v * kWidth);
        for (int i = 0; i < kRows; ++i) total[i][s][v] += load(x + i * x_row + c + v * kWidth) * w;
      }
    }
  }
  alignas(64) float lanes[kRows][kStreams][kWidth];
  for (int i = 0; i < kRows; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      for (int v = 1; v < kSumsOfDot; ++v) total[i][s][0] += total[i][s][v];
      store(lanes[i][s], total[i][s][0]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      float dot = sum(load(lanes[i][s]));
      for (int64_t rest = c; rest < in; ++rest) dot += x[i * x_row + rest] * static_cast<float>(weight[s * in + rest]);
      dots[i * dots_row + s] = dot;
    }
  }
}

// The same for any number of rows of x.
template <int kRows, int kStreams, typename T>
void multiply_blocks(
    const float* x, int64_t x_row, int64_t rows, const T* weight, int64_t in, int64_t next, float* dots, int64_t dots_row) {
  for (; rows >= kRows; rows -= kRows, x += kRows * x_row, dots += kRows * dots_row, next = 0) {
    multiply_rows<kRows, kStreams>(x, x_row, weight, in, next, dots, dots_row);
  }
  if constexpr (kRows > 1) {
    if (rows) multiply_blocks<kRows - 1, kStreams>(x, x_row, rows, weight, in, next, dots, dots_row);
  }
}

// What follows the product, for up to kFeatures of a row's output features, from `first` on; `factors` are what a gate is
// multiplied with.
void finish(const Linear& l, int64_t row, int64_t first, int64_t count, float* y, float* factors) {
  const int64_t offset = row * l.out_features + first;
  const auto add = [&](const void* source, int64_t from, float* target) {
    alignas(64) float other[kFeatures] = {};
    convert(source, from, count, l.element, other);
    for (int64_t j = 0; j < count; j += kWidth) store(target + j, load(target + j) + load(other + j));
  };
  if (l.bias) add(l.bias, first, y);
  activate(l.activation, y, count);
  if (l.gated) {
    if (l.bias) add(l.bias, l.out_features + first, factors);
    for (int64_t j = 0; j < count; j += kWidth) store(y + j, load(y + j) * load(factors + j));
  }
  if (l.residual) add(l.residual, offset, y);
  write(y, count, l.out, offset, l.element);
}

template <typename T>
void outputs(const Linear& l, const float* x, const T* weight, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float dots[kMaxRows][kFeatures] = {};  // if gated: those of the gate, and in the second half its factors
  const int64_t step = l.gated ? kFeatures / 2 : kFeatures;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = end - first < step ? end - first : step;
    const auto multiply = [&](auto streams, int64_t n) {
      constexpr int kStreams = decltype(streams)::value;
      // Weight rows from `now` on, before those from `then` on if there are such.
      const auto multiply_from = [&](int64_t now, int64_t then, float* column) {
        const int64_t ahead = then < l.weight_rows() ? (then - now) * l.in * sizeof(T) : 0;
        multiply_blocks<kMostRows, kStreams>(x, padded(l.in), l.rows, weight + now * l.in, l.in, ahead, column, kFeatures);
      };
      const int64_t now = first + n, then = now + kStreams < end ? now + kStreams : next;
      if (l.gated) {
        multiply_from(now, now + l.out_features, &dots[0][n]);
        multiply_from(now + l.out_features, then < l.out_features ? then : l.weight_rows(), &dots[0][step + n]);
      } else {
        multiply_from(now, then, &dots[0][n]);
      }
    };
    int64_t n = 0;
    for (; n + kMostStreams <= count; n += kMostStreams) multiply(std::integral_constant<int, kMostStreams>(), n);
    for (; n < count; ++n) multiply(std::integral_constant<int, 1>(), n);
    for (int64_t r = 0; r < l.rows; ++r) finish(l, r, first, count, dots[r], dots[r] + step);
  }
}

}  // namespace

// Output features begin to end, of all rows. The weights of `next`, if there is such a feature, are needed after them.
void linear_outputs(const Linear& l, const float* x, int64_t begin, int64_t end, int64_t next) {
  switch (l.element) {
    case Element::float32: return outputs(l, x, static_cast<const float*>(l.weight), begin, end, next);
    case Element::float16: return outputs(l, x, static_cast<const Half*>(l.weight), begin, end, next);
    default: return outputs(l, x, static_cast<const BFloat16*>(l.weight), begin, end, next);
  }
}

// What follows the product, of its rows begin to end. It may be `out` if there is no gate.
void linear_finish(const Linear& l, const void* product, int64_t begin, int64_t end) {
  alignas(64) float y[kFeatures] = {}, factors[kFeatures] = {};
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t first = 0; first < l.out_features; first += kFeatures) {
      const int64_t count = l.out_features - first < kFeatures ? l.out_features - first : kFeatures;
      const int64_t offset = r * l.weight_rows() + first;
      convert(product, offset, count, l.element, y);
      if (l.gated) convert(product, offset + l.out_features, count, l.element, factors);
      finish(l, r, first, count, y, factors);
    }
  }
}

// Rows of x as floats, normalized, filled up with zeros: (rows, padded(in)), and two more of scratch.
void linear_inputs(const Linear& l, float* x) {
  for (int64_t r = 0; r < l.rows; ++r) convert_padded(l.x, r * l.in, l.in, l.element, x + r * padded(l.in));
  if (!l.norm.weight) return;
  const Normalizer normalize(l.norm, l.in, l.element, x + l.rows * padded(l.in));
  for (int64_t r = 0; r < l.rows; ++r) normalize(x + r * padded(l.in));
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
