// Threads for the operations of a recorded step.
//
// PyTorch's threads meet at a barrier after each operation, some 200 times a step, and all wait for one that is not running
// because another process has its core. Here whoever is there does the work: threads take parts of it, smaller and smaller
// ones, and only parts that somebody has begun are waited for.

#pragma once

#include <cstdint>

namespace fastgpt {

// How much of the `left` that nobody has taken a thread takes: threads of a shared machine are not equally fast, so parts
// become smaller, and all end together.
inline int64_t part_of(int64_t left, int64_t threads, int64_t least) {
  const int64_t part = left / (2 * threads) / least * least;
  return part < least ? (left < least ? left : least) : part;
}

// While it lives, the operations of this thread run on the team: `threads` threads, this one included, or as many as it may
// have CPUs. They spin between operations, and sleep when no step runs. There is one team in a process, for one step at a
// time: another step that begins meanwhile goes without.
class TeamStep {
 public:
  explicit TeamStep(int64_t threads);
  ~TeamStep();
  TeamStep(const TeamStep&) = delete;
  TeamStep& operator=(const TeamStep&) = delete;

 private:
  bool leads_ = false;
};

// Threads of the step that this thread is in, or 0 if it is in none.
int64_t team_threads();

// Within a step: work(run, begin, end, next) on parts of [0, count), of at least `least` each but the last one; `next` is
// where the thread's next part begins, or count. Returns when all are done; rethrows what one has thrown.
void run_on_team(
    int64_t count, int64_t least, void (*work)(const void* run, int64_t begin, int64_t end, int64_t next), const void* run);

}  // namespace fastgpt
