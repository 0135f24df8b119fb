// Checks of quantized weights, which memory safety needs.

#pragma once

#include <algorithm>
#include <iterator>

#include "common/tensors.h"
#include "linear/linear.h"

namespace fastgpt {
namespace {

struct BlockType {
  int64_t number, columns, bytes;
};
constexpr BlockType kBlockTypes[] = {
    // those of gguf_blocks.h
    {6, 32, 22},    {7, 32, 24},    {10, 256, 84}, {11, 256, 110}, {12, 256, 144},
    {13, 256, 176}, {14, 256, 210}, {20, 32, 18},  {23, 256, 136}, {39, 32, 17},
};

// Checks rows of blocks, and that they stand for as many columns as the tensor `columns_of` has.
inline void check_blocks(
    const torch::stable::Tensor& blocks, const char* name, const Packing& packing, int64_t C, const char* columns_of) {
  int64_t columns, row_bytes;  // a multiple of `columns` takes a whole number of blocks
  if (packing.block_type) {
    const BlockType* const type = std::find_if(std::begin(kBlockTypes), std::end(kBlockTypes), [&](const BlockType& type) {
      return type.number == packing.block_type;
    });
    FASTGPT_CHECK(type != std::end(kBlockTypes), "block_type: unknown number ", packing.block_type);
    FASTGPT_CHECK(packing.bits > 0, "bits: expected a positive number, got ", packing.bits);  // 0: not quantized
    columns = type->columns, row_bytes = C / columns * type->bytes;
  } else {
    FASTGPT_CHECK(packing.bits == 8 || packing.bits == 4, "bits: expected 8 or 4, got ", packing.bits);
    columns = packing.group_size;
    FASTGPT_CHECK(columns > 0 && columns % kPacked == 0, "group_size: expected a multiple of 32, got ", columns);
    row_bytes = packing.row_bytes(C);
  }
  FASTGPT_CHECK(C > 0 && C % columns == 0, columns_of, ": expected a positive multiple of ", columns, " columns, got ", C);
  FASTGPT_CHECK(blocks.dim() == 2, name, ": expected shape (N, bytes)");
  check_dtype(blocks, name, torch::headeronly::ScalarType::Byte);
  check_cpu(blocks, name);
  check_storage(blocks, name, 1);
  FASTGPT_CHECK(
      blocks.size(1) == row_bytes && blocks.is_contiguous(), name, ": expected contiguous rows of ", row_bytes, " bytes");
}

}  // namespace
}  // namespace fastgpt
