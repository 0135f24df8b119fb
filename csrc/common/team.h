// A thread pool for the operations of a recorded step, with dynamic scheduling.
//
// PyTorch's threads meet at a barrier after each operation, some 200 times per step, and all wait for a thread whose core
// another process has. Here threads take parts of the work, smaller and smaller ones (guided scheduling), and only parts that
// have been taken are waited for.

#pragma once

#include <cstdint>

namespace fastgpt {

// The size of the next part, given `left` items that no thread has taken. Threads on a shared machine are not equally fast, so
// parts become smaller and smaller, and all threads end at about the same time.
inline int64_t part_of(int64_t left, int64_t threads, int64_t least) {
  const int64_t part = left / (2 * threads) / least * least;
  return part < least ? (left < least ? left : least) : part;
}

// In its scope, the operations of this thread run on the team: `threads` threads including this one, but no more than there are
// CPUs for. They spin between operations, and sleep when no step runs. A process has one team, which serves one step at a time;
// a step that begins meanwhile on another thread runs without it.
class TeamStep {
 public:
  explicit TeamStep(int64_t threads);
  ~TeamStep();
  TeamStep(const TeamStep&) = delete;
  TeamStep& operator=(const TeamStep&) = delete;

 private:
  bool leads_ = false;
};

// The number of threads of this thread's step; 0 outside of a step.
int64_t team_threads();

// Within a step: calls work(run, begin, end, next) for parts of [0, count), of at least `least` items except the last one;
// `next` is where the thread's next part begins, or count. Returns when all are done; rethrows an exception of any.
void run_on_team(
    int64_t count, int64_t least, void (*work)(const void* run, int64_t begin, int64_t end, int64_t next), const void* run);

}  // namespace fastgpt
