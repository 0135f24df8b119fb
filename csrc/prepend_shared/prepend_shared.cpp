// `prepend_shared` on the CPU: dimensions that all heads share, before those of each head. See fastgpt/ops/prepend_shared.py.

#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/parallel.h"
#include "common/tensors.h"
#include "decode_step/plan.h"

namespace fastgpt {
namespace {

using torch::stable::Tensor;

// Strides of tokens and heads, and rows, in bytes.
struct Rows {
  const char* data;
  int64_t batch_stride, token_stride, head_stride, bytes;
};

Rows rows_of(const Tensor& x, const char* name, int64_t size) {
  const int64_t last = x.dim() - 1, width = x.size(last);
  FASTGPT_CHECK(x.stride(last) == 1 || width <= 1, name, ": expected a contiguous last dimension");
  const auto* data = static_cast<const char*>(data_of(x, name, size));
  return {data, x.stride(0) * size, x.stride(1) * size, last == 3 ? x.stride(2) * size : 0, width * size};
}

Tensor prepend_shared_cpu(const Tensor& shared, const Tensor& x) {
  FASTGPT_CHECK(x.dim() == 4, "x: expected shape (B, T, H, D)");
  FASTGPT_CHECK(shared.dim() == 3, "shared: expected shape (B, T, R)");
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), R = shared.size(2), size = size_of(floating_element_of(x, "x"));
  check_cpu(x, "x"), check_cpu(shared, "shared");
  check_dtype(shared, "shared", x.scalar_type());
  check_shape(shared, "shared", {B, T, R});
  const Rows first = rows_of(shared, "shared", size), second = rows_of(x, "x", size);
  const Tensor out = new_empty(x, std::vector<int64_t>{B, T, H, R + x.size(3)});
  auto* written = static_cast<char*>(out.mutable_data_ptr());
  perform([=] {
    const int64_t width = first.bytes + second.bytes;
    // 16 bytes take about as long as a multiply-add.
    for_tasks(B * T, H * width / 16 + 1, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / T, t = token % T;
        const char* common = first.data + b * first.batch_stride + t * first.token_stride;
        const char* own = second.data + b * second.batch_stride + t * second.token_stride;
        for (int64_t h = 0; h < H; ++h) {
          char* row = written + (token * H + h) * width;
          std::memcpy(row, common, first.bytes);
          std::memcpy(row + first.bytes, own + h * second.head_stride, second.bytes);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("prepend_shared", TORCH_BOX(&fastgpt::prepend_shared_cpu)); }
