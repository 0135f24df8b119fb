// Operations recorded to run again without Python and the dispatcher: on the CPU, what a CUDA graph is on a GPU.

#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace fastgpt {

// What is recorded reads and writes where it did; whoever replays a plan keeps those tensors alive and in place.
class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { finish(); }

  // From now on, until `finish`, the operations of this thread join the plan. Throws std::runtime_error if another does.
  void record();
  void finish();
  void run() const;
  int64_t size() const { return static_cast<int64_t>(operations_.size()); }

  static Plan* recording();  // this thread's, or null
  void add(std::function<void()> operation) { operations_.push_back(std::move(operation)); }

 private:
  std::vector<std::function<void()>> operations_;
};

// Runs an operation, and records it where a plan is. It owns all it needs but tensors.
template <typename Operation>
void perform(Operation operation) {
  operation();
  if (Plan* plan = Plan::recording()) plan->add(std::move(operation));
}

}  // namespace fastgpt
