// `linear` for few rows of x. Such a product reads every weight once, from memory; all else must hide behind that.

#include "vectors.h"
#include "linear.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Weight rows that are read side by side: the CPU fetches ahead within a page of memory, so one row alone is read 20%
// slower than several.
constexpr int kMostStreams = 4;
constexpr int kMostRows = kWidth == 16 ? 4 : 2;  // of x, multiplied with them at a time; registers hold all sums

// dots[i][s] = sum_c x[i][c] · weight[s][c] for kRows rows of x and kStreams of weights. If `next` is not 0, the weights
// that many bytes on are fetched into the caches.
template <int kRows, int kStreams, typename T>
void multiply_rows(
    const float* x, int64_t x_row, const T* weight, int64_t in, int64_t next, float* dots, int64_t dots_row) {
  Vector total[kRows][kStreams] = {};
  int64_t c = 0;
  for (; c + kWidth <= in; c += kWidth) {
    for (int s = 0; s < kStreams; ++s) {
      const T* source = weight + s * in + c;
      if (next) __builtin_prefetch(reinterpret_cast<const char*>(source) + next);
      const Vector w = load(source);
      for (int i = 0; i < kRows; ++i) total[i][s] += load(x + i * x_row + c) * w;
    }
  }
  alignas(64) float lanes[kRows][kStreams][kWidth];
  for (int i = 0; i < kRows; ++i) {
    for (int s = 0; s < kStreams; ++s) store(lanes[i][s], total[i][s]);
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
    const float* x, int64_t x_row, int64_t rows, const T* weight, int64_t in, int64_t next, float* dots,
    int64_t dots_row) {
  for (; rows >= kRows; rows -= kRows, x += kRows * x_row, dots += kRows * dots_row, next = 0) {
    multiply_rows<kRows, kStreams>(x, x_row, weight, in, next, dots, dots_row);
  }
  if constexpr (kRows > 1) {
    if (rows) multiply_blocks<kRows - 1, kStreams>(x, x_row, rows, weight, in, next, dots, dots_row);
  }
}

inline Vector gelu_tanh(Vector x) {
  return 0.5f * x * (1.0f + tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// What follows the product, for up to kFeatures of a row's output features, from `first` on.
void finish(const Linear& l, int64_t row, int64_t first, int64_t count, float* y) {
  const int64_t offset = row * l.out_features + first;
  const auto add = [&](const void* source, int64_t from) {
    alignas(64) float other[kFeatures] = {};
    convert(source, from, count, l.element, other);
    for (int64_t j = 0; j < count; j += kWidth) store(y + j, load(y + j) + load(other + j));
  };
  if (l.bias) add(l.bias, first);
  if (l.gelu) {
    for (int64_t j = 0; j < count; j += kWidth) store(y + j, gelu_tanh(load(y + j)));
  }
  if (l.residual) add(l.residual, offset);
  write(y, count, l.out, offset, l.element);
}

template <typename T>
void outputs(const Linear& l, const float* x, const T* weight, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float dots[kMaxRows][kFeatures] = {};
  for (int64_t first = begin; first < end; first += kFeatures) {
    const int64_t count = end - first < kFeatures ? end - first : kFeatures;
    const auto multiply = [&](auto streams, int64_t n) {
      constexpr int kStreams = decltype(streams)::value;
      const int64_t now = first + n, then = now + kStreams < end ? now + kStreams : next;
      const int64_t ahead = then < l.out_features ? (then - now) * l.in * sizeof(T) : 0;
      multiply_blocks<kMostRows, kStreams>(
          x, l.padded(), l.rows, weight + now * l.in, l.in, ahead, &dots[0][n], kFeatures);
    };
    int64_t n = 0;
    for (; n + kMostStreams <= count; n += kMostStreams) multiply(std::integral_constant<int, kMostStreams>(), n);
    for (; n < count; ++n) multiply(std::integral_constant<int, 1>(), n);
    for (int64_t r = 0; r < l.rows; ++r) finish(l, r, first, count, dots[r]);
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

// What follows the product, of rows begin to end whose products are in `out`.
void linear_finish(const Linear& l, int64_t begin, int64_t end) {
  alignas(64) float y[kFeatures] = {};
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t first = 0; first < l.out_features; first += kFeatures) {
      const int64_t count = l.out_features - first < kFeatures ? l.out_features - first : kFeatures;
      convert(l.out, r * l.out_features + first, count, l.element, y);
      finish(l, r, first, count, y);
    }
  }
}

// Rows of x as floats, normalised, filled up with zeros: (rows, padded()), and two more of scratch.
void linear_inputs(const Linear& l, float* x) {
  const int64_t padded = l.padded();
  const auto read = [&](const void* source, int64_t row, float* target) {
    convert(source, row * l.in, l.in, l.element, target);
    std::memset(target + l.in, 0, (padded - l.in) * sizeof(float));
  };
  for (int64_t r = 0; r < l.rows; ++r) read(l.x, r, x + r * padded);
  if (!l.norm_weight) return;
  float *weight = x + l.rows * padded, *bias = weight + padded;
  read(l.norm_weight, 0, weight);
  if (l.norm_bias) read(l.norm_bias, 0, bias);
  for (int64_t r = 0; r < l.rows; ++r, x += padded) {
    Vector total = {}, rest = {}, squares = {};
    for (int64_t c = 0; c < padded; c += kWidth) total += load(x + c);
    const Vector mean = broadcast(sum(total) / l.in);
    for (int64_t c = 0; c < padded; c += kWidth) store(x + c, load(x + c) - mean);
    std::memset(x + l.in, 0, (padded - l.in) * sizeof(float));
    for (int64_t c = 0; c < padded; c += kWidth) {
      const Vector centred = load(x + c);
      rest += centred, squares += centred * centred;
    }
    const float shift = sum(rest) / l.in;  // what rounding left of the mean
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / l.in - shift * shift + l.norm_eps);
    for (int64_t c = 0; c < padded; c += kWidth) {
      Vector y = (load(x + c) - shift) * factor * load(weight + c);
      if (l.norm_bias) y += load(bias + c);
      store(x + c, y);
    }
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
