// A row normalised. For files that are compiled once per CPU level: see cpu_level.h.

#pragma once

#include "norm.h"
#include "vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// `count` elements from index `offset` of `source` on as floats, filled up with zeros to whole vectors.
inline void convert_padded(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  convert(source, offset, count, element, target);
  std::memset(target + count, 0, (padded(count) - count) * sizeof(float));
}

// Normalises rows of `count` floats, filled up with zeros.
class Normaliser {
 public:
  // scratch: two such rows, for as long as this lives.
  Normaliser(const Norm& norm, int64_t count, Element element, float* scratch)
      : norm_(norm), count_(count), weight_(scratch), bias_(scratch + padded(count)) {
    convert_padded(norm.weight, 0, count, element, weight_);
    for (int64_t c = 0; c < count; ++c) weight_[c] += norm.offset;
    if (norm.bias) convert_padded(norm.bias, 0, count, element, bias_);
  }

  void operator()(float* x) const {
    const int64_t end = padded(count_);
    if (!norm_.rms) {
      Vector total = {};
      for (int64_t c = 0; c < end; c += kWidth) total += load(x + c);
      const Vector mean = broadcast(sum(total) / count_);
      for (int64_t c = 0; c < end; c += kWidth) store(x + c, load(x + c) - mean);
      std::memset(x + count_, 0, (end - count_) * sizeof(float));
    }
    Vector rest = {}, squares = {};
    for (int64_t c = 0; c < end; c += kWidth) {
      const Vector y = load(x + c);
      rest += y, squares += y * y;
    }
    const float shift = norm_.rms ? 0.0f : sum(rest) / count_;  // what rounding left of the mean
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / count_ - shift * shift + norm_.eps);
    for (int64_t c = 0; c < end; c += kWidth) {
      Vector y = (load(x + c) - shift) * factor * load(weight_ + c);
      if (norm_.bias) y += load(bias_ + c);
      store(x + c, y);
    }
  }

 private:
  Norm norm_;
  int64_t count_;
  float *weight_, *bias_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
