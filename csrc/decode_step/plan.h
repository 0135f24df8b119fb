// Operations recorded to be replayed without Python and the dispatcher: the CPU's counterpart of a CUDA graph.

#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace fastgpt {

// Recorded operations read and write the same addresses again; whoever replays a plan must keep those tensors alive and in
// place.
class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { finish(); }

  // From now on until `finish`, the operations of this thread are added to the plan. Throws std::runtime_error if another plan
  // is being recorded on this thread.
  void record();
  void finish();
  void run() const;
  int64_t size() const { return static_cast<int64_t>(operations_.size()); }

  static Plan* recording();  // this thread's, or null
  void add(std::function<void()> operation) { operations_.push_back(std::move(operation)); }

 private:
  std::vector<std::function<void()>> operations_;
};

// Runs an operation, and records it if a plan is being recorded. It owns everything that it needs except tensors.
template <typename Operation>
void perform(Operation operation) {
  operation();
  if (Plan* plan = Plan::recording()) plan->add(std::move(operation));
}

}  // namespace fastgpt
