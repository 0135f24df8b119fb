// Addresses of the tensors that a recorded step of a model reads: it may be replayed only while they do not change.

#pragma once

#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fastgpt {

class Addresses {
 public:
  Addresses() = default;
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  ~Addresses() { finish(); }

  // From now on until `finish`, tensors that this thread passes to the operation `fastgpt::watch` must keep their addresses.
  // Throws std::runtime_error if another object is watching on this thread.
  void watch();
  void finish();

  // Whether all addresses are unchanged. That takes nanoseconds per tensor; from Python, a tenth of a microsecond.
  bool hold() const;

  void add(const torch::stable::Tensor& tensor) { addresses_.emplace_back(tensor, tensor.data_ptr()); }

 private:
  std::vector<std::pair<torch::stable::Tensor, void*>> addresses_;
};

}  // namespace fastgpt
