// Where the tensors lie that a recorded step of a model reads: it may run again only while they stay there.

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

  // From now on, until `finish`, what this thread passes to the operation `fastgpt::watch` must stay where it is. Throws
  // std::runtime_error if another does.
  void watch();
  void finish();

  // Whether it is there. Reading an address takes nanoseconds; from Python, a tenth of a microsecond.
  bool hold() const;

  void add(const torch::stable::Tensor& tensor) { addresses_.emplace_back(tensor, tensor.data_ptr()); }

 private:
  std::vector<std::pair<torch::stable::Tensor, void*>> addresses_;
};

}  // namespace fastgpt
