// `linear` on the CPU: unpacking, parallel tasks, and dispatch to the kernels of the CPU level.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/contiguous_memory.h"
#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/regions.h"
#include "decode_step/plan.h"
#include "linear/blocks.h"
#include "linear/linear.h"
#include "linear/products.h"
#include "norm/check_norm.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    void linear_finish(const Linear& l, const void* product, int64_t begin, int64_t end);
    void linear_dequantize(const Linear& l, int64_t begin, int64_t end);)

namespace fastgpt {

const float* values_of_halves() {
  static const std::vector<float> values = [] {
    std::vector<float> values(1 << 16);
    for (size_t bits = 0; bits < values.size(); ++bits) values[bits] = half_to_float(static_cast<uint16_t>(bits));
    return values;
  }();
  return values.data();
}

namespace {

// The operation for up to linear_most_rows rows.
void run_block(const Linear& l, float* x) {
  const int64_t key = threads_lay_out(l) ? new_keys(1) : 0;
  if (!key) {  // an element takes about as long as 16 multiply-adds
    for_tasks(l.row_blocks(), 16 * std::min(l.rows, kRowBlock) * l.in + 1, [&](int64_t begin, int64_t end) {
      float* memory = thread_scratch(FASTGPT_AT_CPU_LEVEL(linear_inputs_scratch)(l));
      FASTGPT_AT_CPU_LEVEL(linear_inputs)(l, x, memory, begin, end);
    });
  }
  const auto outputs = [&](int64_t begin, int64_t end, int64_t next) {
    if (key) return linear_outputs_of_thread(l, key, begin, end, next);
    float* memory = thread_scratch(FASTGPT_AT_CPU_LEVEL(linear_outputs_scratch)(l));
    FASTGPT_AT_CPU_LEVEL(linear_outputs)(l, x, memory, begin, end, next);
  };
  if (l.rows * l.in * l.weight_rows() <= grain()) return outputs(0, l.out_features, l.out_features);
  // The next part is known before this one ends, so its weights are prefetched.
  for_parts(l.out_features, kLeastFeatures, outputs);
}

void run(const Linear& all, float* x) {
  const int64_t size = size_of(all.element);
  const auto after = [size](const void* start, int64_t numbers) {
    return start ? static_cast<const char*>(start) + numbers * size : nullptr;
  };
  // Blocks of about equal numbers of rows, as each reads all weights.
  const int64_t most = FASTGPT_AT_CPU_LEVEL(linear_most_rows)(all), blocks = (all.rows + most - 1) / most;
  const auto begin_of = [&](int64_t block) { return std::min(all.rows, all.row_blocks() * block / blocks * kRowBlock); };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = begin_of(block);
    Linear l = all;
    l.rows = begin_of(block + 1) - first;
    l.x = after(all.x, first * all.in);
    l.residual = after(all.residual, first * all.out_features);
    l.out = static_cast<char*>(all.out) + first * all.out_features * size;
    run_block(l, x);
  }
}

Activation activation_of(int64_t number) {
  FASTGPT_CHECK(number >= 0 && number <= static_cast<int64_t>(Activation::relu), "activation: unknown number ", number);
  return static_cast<Activation>(number);
}

struct Surroundings {  // of a product, in `linear`
  const std::optional<Tensor>&bias, &residual, &norm_weight, &norm_bias;
  int64_t activation;
  bool gated, rms;
  double norm_eps, norm_offset;
};

// With the memory of `weight`, of `weight_rows` rows, already checked.
Tensor run_linear(
    const Tensor& x, const void* weight, int64_t weight_rows, const Packing& packing, ContiguousMemory& memory,
    const Surroundings& with) {
  const int64_t dims = x.dim();
  FASTGPT_CHECK(!with.gated || weight_rows % 2 == 0, "weight: expected an even number of rows with a gate");
  FASTGPT_CHECK(with.norm_weight || !with.norm_bias, "norm_bias: expected none without norm_weight");
  Linear l{};
  l.element = l.x_element = l.out_element = memory.element();
  l.in = x.size(dims - 1), l.out_features = with.gated ? weight_rows / 2 : weight_rows;
  l.activation = activation_of(with.activation), l.gated = with.gated;
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = l.out_features;
  l.rows = 1;
  for (int64_t i = 0; i < dims - 1; ++i) {
    if (__builtin_mul_overflow(l.rows, shape[i], &l.rows)) l.rows = INT64_MAX;
  }
  l.many = l.rows > kMaxRows;
  l.x = memory.of(x, "x"), l.weight = weight, l.packing = packing;
  if (packing.bits) l.values_of_halves = values_of_halves();
  l.bias = memory.of(with.bias, "bias", {l.weight_rows()});
  l.residual = memory.of(with.residual, "residual", shape);
  l.norm.weight = memory.of(with.norm_weight, "norm_weight", {l.in});
  l.norm.bias = memory.of(with.norm_bias, "norm_bias", {l.in});
  check_norm(with.norm_eps, "norm_eps", with.norm_offset, "norm_offset");
  l.norm.rms = with.rms, l.norm.eps = with.norm_eps, l.norm.offset = with.norm_offset;
  Tensor out = new_empty(x, shape);
  l.out = out.mutable_data_ptr();
  Linear largest = l;
  largest.rows = std::min(l.rows, FASTGPT_AT_CPU_LEVEL(linear_most_rows)(l));
  const std::shared_ptr<float> floats = scratch(FASTGPT_AT_CPU_LEVEL(linear_inputs_size)(largest) + 1);
  const auto operation = [l, floats] { run(l, floats.get()); };
  memory.copied() ? operation() : perform(operation);  // a plan must not read a stale copy again
  return out;
}

Tensor linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    int64_t activation, bool gated, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, bool rms,
    double norm_eps, double norm_offset) {
  FASTGPT_CHECK(x.dim() >= 1, "x: expected shape (..., C)");
  FASTGPT_CHECK(weight.dim() == 2, "weight: expected shape (N, C)");
  FASTGPT_CHECK(weight.size(1) == x.size(x.dim() - 1), "weight: expected as many columns as x has");
  ContiguousMemory memory(x, "x");
  const void* data = memory.of(weight, "weight");
  return run_linear(
      x, data, weight.size(0), {}, memory,
      {bias, residual, norm_weight, norm_bias, activation, gated, rms, norm_eps, norm_offset});
}

Tensor linear_quantized_cpu(
    const Tensor& x, const Tensor& blocks, int64_t bits, int64_t group_size, bool minima, int64_t block_type,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation, bool gated,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, bool rms, double norm_eps,
    double norm_offset) {
  FASTGPT_CHECK(x.dim() >= 1, "x: expected shape (..., C)");
  const Packing packing{bits, group_size, minima, block_type};
  check_blocks(blocks, "blocks", packing, x.size(x.dim() - 1), "x");
  ContiguousMemory memory(x, "x");
  return run_linear(
      x, blocks.const_data_ptr(), blocks.size(0), packing, memory,
      {bias, residual, norm_weight, norm_bias, activation, gated, rms, norm_eps, norm_offset});
}

void linear_dequantize_cpu(
    const Tensor& out, const Tensor& blocks, int64_t bits, int64_t group_size, bool minima, int64_t block_type) {
  FASTGPT_CHECK(out.dim() == 2 && out.is_contiguous(), "out: expected a contiguous tensor (N, C)");
  Linear l{};
  l.packing = {bits, group_size, minima, block_type};
  l.in = out.size(1), l.out_features = out.size(0);
  check_blocks(blocks, "blocks", l.packing, l.in, "x");
  FASTGPT_CHECK(blocks.size(0) == l.out_features, "blocks: expected ", l.out_features, " rows, as out has");
  ContiguousMemory memory(out, "out");
  memory.check(out, "out");
  l.element = l.out_element = memory.element();
  l.weight = blocks.const_data_ptr(), l.out = out.mutable_data_ptr(), l.values_of_halves = values_of_halves();
  const auto kernel = FASTGPT_AT_CPU_LEVEL(linear_dequantize);
  for_tasks(l.out_features, l.in, [&](int64_t begin, int64_t end) { kernel(l, begin, end); });
}

// The epilogue of a product, into `out` (..., out_features). The product is `out` itself or, if gated, twice as wide.
void finish(
    Linear& l, ContiguousMemory& memory, const void* product, const Tensor& out, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual) {
  l.element = l.out_element = memory.element();
  l.out = out.mutable_data_ptr();
  l.bias = memory.of(bias, "bias", {l.weight_rows()});
  l.residual = memory.of(residual, "residual", shape_of(out));
  const auto kernel = FASTGPT_AT_CPU_LEVEL(linear_finish);
  // An element takes about as long as 16 multiply-adds.
  for_tasks(out.numel() / std::max<int64_t>(l.out_features, 1), 16 * l.weight_rows() + 1, [&](int64_t begin, int64_t end) {
    kernel(l, product, begin, end);
  });
}

void linear_finish_cpu(
    const Tensor& out, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation) {
  FASTGPT_CHECK(out.dim() >= 1 && out.is_contiguous(), "out: expected a contiguous tensor (..., N)");
  Linear l{};
  l.out_features = out.size(out.dim() - 1), l.activation = activation_of(activation);
  ContiguousMemory memory(out, "out");
  memory.check(out, "out");
  const Region written = region_of(out, out.const_data_ptr(), size_of(memory.element()));
  const auto check_apart = [&](const std::optional<Tensor>& x, const char* name) {
    FASTGPT_CHECK(
        !x || !overlap(region_of(*x, x->const_data_ptr(), written.size), written), name, ": expected memory apart from out");
  };
  check_apart(bias, "bias"), check_apart(residual, "residual");
  finish(l, memory, out.const_data_ptr(), out, bias, residual);
}

Tensor linear_gate_cpu(
    const Tensor& product, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation) {
  std::vector<int64_t> shape = shape_of(product);
  FASTGPT_CHECK(!shape.empty() && shape.back() % 2 == 0, "product: expected shape (..., 2N)");
  shape.back() /= 2;
  Linear l{};
  l.out_features = shape.back(), l.activation = activation_of(activation), l.gated = true;
  ContiguousMemory memory(product, "product");
  const void* source = memory.of(product, "product");
  const Tensor out = new_empty(product, shape);
  finish(l, memory, source, out, bias, residual);
  return out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastgpt::linear_cpu));
  m.impl("linear_quantized", TORCH_BOX(&fastgpt::linear_quantized_cpu));
  m.impl("linear_dequantize_", TORCH_BOX(&fastgpt::linear_dequantize_cpu));
  m.impl("linear_finish_", TORCH_BOX(&fastgpt::linear_finish_cpu));
  m.impl("linear_gate", TORCH_BOX(&fastgpt::linear_gate_cpu));
}
