// A bump allocator for the scratch memory of kernels.

#pragma once

#include <cstdint>

namespace fastgpt {

// Hands out parts of 64-byte aligned memory, 64-byte aligned themselves. With null, it only measures how much they take.
class Arena {
 public:
  explicit Arena(float* memory) : begin_(memory), next_(memory) {}

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += (floats + 15) / 16 * 16;
    return taken;
  }
  int64_t taken() const { return next_ - begin_; }

 private:
  float *begin_, *next_;
};

}  // namespace fastgpt
