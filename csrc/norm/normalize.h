// Normalization of a row. For files that are compiled once per CPU level: see cpu_level.h.

#pragma once

#include "common/stored_elements.h"
#include "norm/norm.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Converts `count` elements from index `offset` of `source` on to floats, zero-padded to whole vectors.
inline void convert_padded(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  convert(source, offset, count, element, target);
  std::memset(target + count, 0, (padded(count) - count) * sizeof(float));
}

// Calls each(c, i) for the index c of every vector up to `end`; i cycles through kSums independent accumulators, to hide the
// latency of additions.
constexpr int kSums = 4;
template <typename Each>
inline void for_vectors(int64_t end, const Each& each) {
  int64_t c = 0;
  for (; c + kSums * kWidth <= end; c += kSums * kWidth) {
    for (int i = 0; i < kSums; ++i) each(c + i * kWidth, i);
  }
  for (; c < end; c += kWidth) each(c, 0);
}

inline float sum(const Vector (&parts)[kSums]) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// Normalizes zero-padded rows of `count` floats.
class Normalizer {
 public:
  // scratch: two padded rows, which must outlive this object.
  Normalizer(const Norm& norm, int64_t count, Element element, float* scratch)
      : count_(count), eps_(norm.eps), rms_(norm.rms), weight_(scratch), bias_(scratch + padded(count)) {
    convert_padded(norm.weight, 0, count, element, weight_);
    for (int64_t c = 0; c < count; ++c) weight_[c] += norm.offset;
    if (norm.bias) {
      convert_padded(norm.bias, 0, count, element, bias_);
    } else {
      std::memset(bias_, 0, padded(count) * sizeof(float));
    }
  }

  void operator()(float* x) const {
    const int64_t count = count_, end = padded(count);
    const float *weight = weight_, *bias = bias_;
    Vector rest[kSums] = {}, squares[kSums] = {};
    const auto measure = [&](Vector y, int i) { rest[i] += y, squares[i] += y * y; };
    if (rms_) {
      for_vectors(end, [&](int64_t c, int i) { measure(load(x + c), i); });
    } else {
      Vector total[kSums] = {};
      for_vectors(end, [&](int64_t c, int i) { total[i] += load(x + c); });
      const Vector mean = broadcast(sum(total) / count);
      for (int64_t c = count; c < end; ++c) x[c] = mean[0];  // so that the difference is zero again
      for_vectors(end, [&](int64_t c, int i) {
        const Vector y = load(x + c) - mean;
        store(x + c, y);
        measure(y, i);
      });
    }
    const float shift = rms_ ? 0.0f : sum(rest) / count;  // the rounding error of the mean
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / count - shift * shift + eps_);
    for_vectors(end, [&](int64_t c, int) { store(x + c, (load(x + c) - shift) * rstd * load(weight + c) + load(bias + c)); });
  }

 private:
  int64_t count_;
  float eps_;
  bool rms_;
  float *weight_, *bias_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
