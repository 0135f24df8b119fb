#include "decode_step/plan.h"

#include <stdexcept>

#include "common/pytorch_threads.h"
#include "common/team.h"

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

void Plan::run() const {
  const TeamStep step(num_threads());
  for (const auto& operation : operations_) operation();
}

void Plan::finish() {
  if (current == this) current = nullptr;
}

}  // namespace fastgpt
