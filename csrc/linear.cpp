// `linear` on the CPU: unpacking, parallel parts, and the kernels of the CPU's level.

#include <atomic>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu_level.h"
#include "linear.h"
#include "parallel.h"
#include "plan.h"
#include "tensors.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(void linear_inputs(const Linear& l, float* x);
                              void linear_outputs(const Linear& l, const float* x, int64_t begin, int64_t end);
                              void gelu_elements(void* x, Element element, int64_t begin, int64_t end);)

namespace fastgpt {
namespace {

using torch::stable::Tensor;

// Bytes of weights that a thread takes at a time. Threads of a shared machine are not equally fast, so they take what is
// left rather than a share each.
constexpr int64_t kPart = 128 * 1024;

void run(const Linear& l, float* x) {
  FASTGPT_AT_CPU_LEVEL(linear_inputs)(l, x);
  const auto kernel = FASTGPT_AT_CPU_LEVEL(linear_outputs);
  if (l.rows * l.in * l.out_features <= kGrain) return kernel(l, x, 0, l.out_features);
  const int64_t blocks = kPart / (l.in * size_of(l.element) * kFeatures);
  const int64_t part = std::max<int64_t>(blocks, 1) * kFeatures;
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, int64_t{torch::stable::get_num_threads()}, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first; (first = next.fetch_add(part, std::memory_order_relaxed)) < l.out_features;) {
      kernel(l, x, first, std::min(first + part, l.out_features));
    }
  });
}

Tensor linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double norm_eps, bool gelu) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && weight.dim() == 2, "x, weight: expected (..., C) and (N, C)");
  const int32_t dtype = dtype_of(x);
  Linear l{};
  l.element = element_of(x, "x");
  l.in = x.size(dims - 1), l.out_features = weight.size(0);
  l.norm_eps = norm_eps, l.gelu = gelu;

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(dims, 1);
  shape.back() = l.out_features;
  l.rows = 1;
  for (int64_t i = dims - 1; i-- > 0;) strides[i] = strides[i + 1] * shape[i + 1], l.rows *= shape[i];
  STD_TORCH_CHECK(l.rows <= kMaxRows, "x: expected at most ", kMaxRows, " rows");
  STD_TORCH_CHECK(norm_weight || !norm_bias, "norm_bias: expected none without norm_weight");

  std::vector<Tensor> held;
  const auto data = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(dtype_of(tensor) == dtype, "expected tensors of one dtype");
    return tensor.is_contiguous() ? tensor.const_data_ptr()
                                  : held.emplace_back(torch::stable::contiguous(tensor)).const_data_ptr();
  };
  const auto optional = [&](const std::optional<Tensor>& tensor, const char* name, const std::vector<int64_t>& expected) {
    if (!tensor) return static_cast<const void*>(nullptr);
    const auto sizes = tensor->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": unexpected shape");
    return data(*tensor);
  };
  STD_TORCH_CHECK(weight.size(1) == l.in, "weight: expected as many columns as x has");
  l.x = data(x), l.weight = data(weight);
  l.bias = optional(bias, "bias", {l.out_features});
  l.norm_weight = optional(norm_weight, "norm_weight", {l.in});
  l.norm_bias = optional(norm_bias, "norm_bias", {l.in});
  l.residual = optional(residual, "residual", shape);
  Tensor out = new_empty(x, dims, shape.data(), strides.data(), dtype);
  l.out = out.mutable_data_ptr();
  const std::shared_ptr<float> memory = scratch((l.rows + 2) * l.padded() + 1);
  const auto operation = [l, memory] { run(l, memory.get()); };
  held.empty() ? perform(operation) : operation();  // a copy is not what a plan should read again
  return out;
}

void gelu_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
  const Element element = element_of(x, "x");
  const auto kernel = FASTGPT_AT_CPU_LEVEL(gelu_elements);
  // An element costs about as much as 32 multiply-adds.
  for_tasks(x.numel(), 32, [&](int64_t begin, int64_t end) { kernel(x.mutable_data_ptr(), element, begin, end); });
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastgpt::linear_cpu));
  m.impl("gelu_", TORCH_BOX(&fastgpt::gelu_cpu));
}
