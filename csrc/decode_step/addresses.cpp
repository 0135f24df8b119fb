#include "decode_step/addresses.h"

#include <stdexcept>

#include <torch/csrc/stable/library.h>

namespace fastgpt {
namespace {

thread_local Addresses* current = nullptr;

void watch(const std::vector<torch::stable::Tensor>& tensors) {
  if (!current) return;
  for (const auto& tensor : tensors) current->add(tensor);
}

}  // namespace

void Addresses::watch() {
  if (current) throw std::runtime_error("tensors of another step are being watched on this thread");
  current = this;
}

void Addresses::finish() {
  if (current == this) current = nullptr;
}

bool Addresses::hold() const {
  for (const auto& [tensor, address] : addresses_) {
    if (tensor.data_ptr() != address) return false;
  }
  return true;
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CompositeExplicitAutograd, m) { m.impl("watch", TORCH_BOX(&fastgpt::watch)); }
