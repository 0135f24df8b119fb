// Activations of vectors of floats, which propagate NaN. For files that are compiled once per CPU level: see cpu_level.h.

#pragma once

#include "common/vector_math.h"
#include "linear/linear.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline Vector magnitude(Vector x) { return x < 0.0f ? -x : x; }

inline Vector relu(Vector x) { return x < 0.0f ? Vector{} : x; }

inline Vector gelu_tanh(Vector x) { return 0.5f * x * (1.0f + tanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }

// x Φ(x) = max(x, 0) - |x| Φ(-|x|), without cancellation. Φ(-a) is e^(-a²/2) times a polynomial in 1 / (1 + 0.346 a), a minimax
// fit of the relative error (2.2e-8 before rounding) up to a = 14; beyond that the exponential is zero.
inline Vector gelu(Vector x) {
  const Vector a = magnitude(x) > 14.0f ? broadcast(14.0f) : magnitude(x), t = 1.0f / (1.0f + 0.346f * a);
  Vector y = broadcast(-2.857433969e-02f);
  y = y * t + 1.452030525e-01f;
  y = y * t - 2.683821289e-01f;
  y = y * t + 1.817672248e-01f;
  y = y * t - 3.471455241e-02f;
  y = y * t + 1.105235273e-01f;
  y = y * t + 1.177704680e-01f;
  y = y * t + 1.383868705e-01f;
  y = y * t + 1.380198669e-01f;
  return relu(x) - a * t * y * exp_nonpositive(-0.5f * a * a);
}

// x / (1 + e^-x), computed from e^-|x|, which cannot overflow.
inline Vector silu(Vector x) {
  const Vector e = exp_nonpositive<true>(-magnitude(x));
  return x * (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// (up + 1) · gate · sigmoid(1.702 gate), the gate at most 7 and |up| too (GPT-OSS).
inline Vector swiglu_clamped(Vector gate, Vector up) {
  gate = gate > 7.0f ? broadcast(7.0f) : gate;
  up = up > 7.0f ? broadcast(7.0f) : up < -7.0f ? broadcast(-7.0f) : up;
  return (up + 1.0f) * silu(1.702f * gate) * (1.0f / 1.702f);
}

// Activates `count` elements in place, and the padding to whole vectors; what depends on the factors as well is left to the
// caller.
inline void activate(Activation activation, float* x, int64_t count) {
  const auto each = [&](auto function) {
    for (int64_t i = 0; i < count; i += kWidth) store(x + i, function(load(x + i)));
  };
  switch (activation) {
    case Activation::none:
    case Activation::swiglu_clamped: return;
    case Activation::gelu_tanh: return each(gelu_tanh);
    case Activation::gelu: return each(gelu);
    case Activation::silu: return each(silu);
    case Activation::relu: return each(relu);
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
