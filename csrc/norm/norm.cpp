// `norm` on the CPU: unpacking, parallel tasks, and dispatch to the kernels of the CPU level.

#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/contiguous_memory.h"
#include "common/cpu_level.h"
#include "common/parallel.h"
#include "decode_step/plan.h"
#include "norm/check_norm.h"
#include "norm/norm.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(void norm_rows(const NormRows& n, float* scratch, int64_t begin, int64_t end);)

namespace fastgpt {
namespace {

// Dimensions that can be merged are merged. A tensor with more than kRowDims of them left, or whose last one is not contiguous,
// is copied.
StridedRows rows_of(const Tensor& x, const char* name, ContiguousMemory& memory) {
  memory.check(x, name);
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t last = x.dim() - 1, size = size_of(memory.element());
  StridedRows rows;
  int n = 0;
  bool fits = strides[last] == 1 || sizes[last] <= 1;
  for (int64_t i = last; i-- > 0 && fits;) {
    if (sizes[i] == 1) continue;
    const int64_t stride = strides[i] * size;
    if (n > 0 && stride == rows.strides[n - 1] * rows.sizes[n - 1]) {
      rows.sizes[n - 1] *= sizes[i];
    } else if (n < kRowDims) {
      rows.sizes[n] = sizes[i], rows.strides[n++] = stride;
    } else {
      fits = false;
    }
  }
  if (fits) {
    rows.data = static_cast<const char*>(x.const_data_ptr());
    return rows;
  }
  const char* copy = static_cast<const char*>(memory.of(x, name));
  return {copy, {x.numel() / std::max<int64_t>(sizes[last], 1), 1, 1}, {sizes[last] * size, 0, 0}};
}

void run(const NormRows& n) {
  if (n.rows == 0) return;
  const auto kernel = FASTGPT_AT_CPU_LEVEL(norm_rows);
  // An element takes about as long as 16 multiply-adds.
  for_tasks(n.rows, 16 * n.count + 1, [&](int64_t begin, int64_t end) {
    kernel(n, scratch(4 * padded(n.count) + 1).get(), begin, end);
  });
}

Tensor norm_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool rms,
    double eps, double offset) {
  const std::vector<int64_t> shape = shape_of(x);
  FASTGPT_CHECK(!shape.empty(), "x: expected shape (..., C)");
  NormRows n{};
  ContiguousMemory memory(x, "x");
  n.element = memory.element();
  n.count = shape.back();
  n.rows = n.count > 0 ? x.numel() / n.count : 0;
  n.norm.weight = memory.of(weight, "weight", {n.count});
  n.norm.bias = memory.of(bias, "bias", {n.count});
  check_norm(eps, "eps", offset, "offset");
  n.norm.rms = rms, n.norm.eps = eps, n.norm.offset = offset;
  n.x = rows_of(x, "x", memory);
  if (residual) {
    check_shape(*residual, "residual", shape);
    n.residual = rows_of(*residual, "residual", memory);
  }
  const Tensor out = new_empty(x, shape);
  n.out = out.mutable_data_ptr();
  const auto operation = [n] { run(n); };
  memory.copied() ? operation() : perform(operation);  // a plan must not read a stale copy again
  return out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("norm", TORCH_BOX(&fastgpt::norm_cpu)); }
