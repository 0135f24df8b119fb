// `quantize` on the CPU: checks, parallel tasks, and dispatch to the kernels of the CPU level.

#include <atomic>

#include <torch/csrc/stable/library.h>

#include "common/contiguous_memory.h"
#include "common/cpu_level.h"
#include "common/parallel.h"
#include "linear/quantize.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(uint32_t quantize_rows(const Quantize& q, float most, float* row, int64_t begin, int64_t end);)

namespace fastgpt {
namespace {

constexpr int64_t kCost[] = {2, 16};  // of a number with 8 and with 4 bits, in multiply-adds

void quantize_cpu(const Tensor& blocks, const Tensor& weight, int64_t bits, int64_t group_size, bool minima, double most) {
  FASTGPT_CHECK(weight.dim() == 2, "weight: expected shape (N, C)");
  FASTGPT_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
  const int64_t rows = weight.size(0), in = weight.size(1);
  FASTGPT_CHECK(
      group_size > 0 && group_size % kPacked == 0 && in % group_size == 0, "group_size: expected a multiple of ", kPacked,
      " that divides ", in, ", got ", group_size);
  ContiguousMemory memory(weight, "weight");
  Quantize q{memory.element(), in, {bits, group_size, minima, 0}};
  q.weight = memory.of(weight, "weight");
  const int64_t row_bytes = q.packing.row_bytes(in);
  check_dtype(blocks, "blocks", torch::headeronly::ScalarType::Byte);
  check_cpu(blocks, "blocks");
  check_storage(blocks, "blocks", 1);
  FASTGPT_CHECK(
      blocks.dim() == 2 && blocks.size(0) == rows && blocks.size(1) == row_bytes && (row_bytes < 2 || blocks.stride(1) == 1),
      "blocks: expected ", rows, " rows of ", row_bytes, " bytes, each contiguous");
  q.blocks = static_cast<uint8_t*>(blocks.mutable_data_ptr()), q.row_stride = blocks.stride(0);
  std::atomic<uint32_t> largest{0};
  for_tasks(rows, kCost[bits == 4] * in + 1, [&](int64_t begin, int64_t end) {
    const uint32_t found = FASTGPT_AT_CPU_LEVEL(quantize_rows)(q, static_cast<float>(most), thread_scratch(2 * in), begin, end);
    uint32_t before = largest.load(std::memory_order_relaxed);
    while (before < found && !largest.compare_exchange_weak(before, found, std::memory_order_relaxed)) {
    }
  });
  const float magnitude = bits_to_float(largest);
  FASTGPT_CHECK(
      magnitude <= most, "weight: expected finite numbers of magnitude ", static_cast<int64_t>(most), " at most, got ",
      magnitude);
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("quantize_", TORCH_BOX(&fastgpt::quantize_cpu)); }
