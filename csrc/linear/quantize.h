// The arguments of the CPU kernel of `quantize`: rows of a matrix become rows of blocks.

#pragma once

#include <cstdint>

#include "common/elements.h"
#include "linear/linear.h"

namespace fastgpt {

struct Quantize {
  Element element;
  int64_t in;
  Packing packing;     // without block_type
  const void* weight;  // (rows, in), contiguous
  uint8_t* blocks;     // rows of packing.row_bytes(in) bytes, row_stride apart
  int64_t row_stride;
};

}  // namespace fastgpt
