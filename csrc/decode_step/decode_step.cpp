// `advance` and `record_token` on the CPU: the parts of a decode step before the blocks and after a token is chosen. See
// fastgpt/ops/decode_step.py.

#include <cmath>
#include <optional>

#include <torch/csrc/stable/library.h>

#include "common/tensors.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

double number_at(const void* data, int64_t index, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return static_cast<const double*>(data)[index];
    case ScalarType::Float: return static_cast<const float*>(data)[index];
    case ScalarType::Half: return half_to_float(static_cast<const uint16_t*>(data)[index]);
    default: return bfloat16_to_float(static_cast<const uint16_t*>(data)[index]);
  }
}

int64_t size_of_float(const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Double ? 8 : size_of(floating_element_of(x, name));
}

// The data of a contiguous CPU tensor that is written.
template <typename Number>
Number* written(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_cpu(x, name);
  check_dtype(x, name, dtype);
  check_shape(x, name, shape);
  FASTGPT_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor");
  return static_cast<Number*>(mutable_data_of(x, name, sizeof(Number)));
}

void advance_cpu(const Tensor& lengths, const Tensor& positions) {
  FASTGPT_CHECK(lengths.dim() == 1, "lengths: expected shape (B,)");
  const int64_t B = lengths.size(0);
  auto* stored = written<int32_t>(lengths, "lengths", ScalarType::Int, {B});
  auto* next = written<int32_t>(positions, "positions", ScalarType::Int, {B, 1});
  for (int64_t b = 0; b < B; ++b) next[b] = stored[b]++;
}

// Updates a row's largest magnitude so far; NaN once there was one.
template <typename Number>
void grow(void* extreme, int64_t row, double magnitude) {
  Number& largest = static_cast<Number*>(extreme)[row];
  const Number number = static_cast<Number>(magnitude);
  if (!(number <= largest) && largest == largest) largest = number;
}

void record_token_cpu(
    const Tensor& token, const Tensor& scores, const Tensor& tokens, const Tensor& extreme, const Tensor& step,
    const std::optional<Tensor>& ended, const std::optional<Tensor>& eos) {
  FASTGPT_CHECK(token.dim() == 1, "token: expected shape (B,)");
  FASTGPT_CHECK(tokens.dim() == 2, "tokens: expected shape (steps, B)");
  FASTGPT_CHECK(scores.dim() == 2 && scores.size(1) >= 1, "scores: expected shape (B, V) or (B, 1)");
  FASTGPT_CHECK(ended.has_value() == eos.has_value(), "ended, eos: expected both or none");
  const int64_t B = token.size(0), steps = tokens.size(0), V = scores.size(1);
  check_cpu(token, "token"), check_dtype(token, "token", ScalarType::Long);
  check_cpu(scores, "scores"), check_shape(scores, "scores", {B, V});
  const auto* chosen = static_cast<const int64_t*>(data_of(token, "token", 8));
  const int64_t chosen_stride = token.stride(0), row_stride = scores.stride(0), stride = scores.stride(1);
  const void* numbers = data_of(scores, "scores", size_of_float(scores, "scores"));
  const ScalarType dtype = scores.scalar_type(), extreme_dtype = extreme.scalar_type();
  auto* noted = written<int64_t>(tokens, "tokens", ScalarType::Long, {steps, B});
  auto* now = written<int64_t>(step, "step", ScalarType::Long, {1});
  void* largest = extreme_dtype == ScalarType::Double
      ? static_cast<void*>(written<double>(extreme, "extreme", ScalarType::Double, {B, 1}))
      : static_cast<void*>(written<float>(extreme, "extreme", ScalarType::Float, {B, 1}));
  bool* over = nullptr;
  const int64_t* ends = nullptr;
  int64_t count = 0, ends_stride = 0;
  if (ended) {
    over = written<bool>(*ended, "ended", ScalarType::Bool, {B});
    check_cpu(*eos, "eos"), check_dtype(*eos, "eos", ScalarType::Long);
    FASTGPT_CHECK(eos->dim() == 1, "eos: expected shape (E,)");
    ends = static_cast<const int64_t*>(data_of(*eos, "eos", 8));
    count = eos->size(0), ends_stride = eos->stride(0);
  }
  FASTGPT_CHECK(*now >= 0 && *now < steps, "step: expected a number from 0 to ", steps - 1, ", got ", *now);
  for (int64_t b = 0; b < B && V > 1; ++b) {
    const int64_t id = chosen[b * chosen_stride];
    FASTGPT_CHECK(id >= 0 && id < V, "token: expected numbers from 0 to ", V - 1, ", got ", id);
  }
  for (int64_t b = 0; b < B; ++b) {
    const int64_t id = chosen[b * chosen_stride];
    const bool was_over = over && over[b];
    noted[*now * B + b] = was_over ? -1 : id;
    for (int64_t i = 0; i < count; ++i) over[b] |= id == ends[i * ends_stride];
    if (was_over) continue;
    const double magnitude = std::abs(number_at(numbers, b * row_stride + (V > 1 ? id * stride : 0), dtype));
    extreme_dtype == ScalarType::Double ? grow<double>(largest, b, magnitude) : grow<float>(largest, b, magnitude);
  }
  ++*now;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("advance_", TORCH_BOX(&fastgpt::advance_cpu));
  m.impl("record_token_", TORCH_BOX(&fastgpt::record_token_cpu));
}
