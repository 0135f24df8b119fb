// Scratch memory of kernels.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include <torch/headeronly/util/Exception.h>

namespace fastgpt {

struct FreeScratch {
  void operator()(float* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<float, FreeScratch>;

// 64-byte aligned, uninitialised.
inline Scratch scratch(int64_t floats) {
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  Scratch memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  STD_TORCH_CHECK(memory != nullptr, "attention: out of memory for ", bytes, " bytes of scratch");
  return memory;
}

}  // namespace fastgpt
