#include "decode_step/plan.h"

#include <stdexcept>

namespace fastgpt {
namespace {

thread_local Plan* current = nullptr;

}  // namespace

Plan* Plan::recording() { return current; }

void Plan::record() {
  if (current) throw std::runtime_error("another plan is being recorded on this thread");
  operations_.clear();
  current = this;
}

void Plan::finish() {
  if (current == this) current = nullptr;
}

}  // namespace fastgpt
