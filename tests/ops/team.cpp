// What tests/ops/test_team.py runs: the team of csrc/common/team.h by itself. Prints what is wrong and exits with 1, or exits
// with 0. Built with sanitizers.

#include "common/team.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace fastgpt;

namespace {

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition);       \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

void share_out(int64_t count, int64_t least, const std::function<void(int64_t, int64_t, int64_t)>& work) {
  run_on_team(
      count, least,
      [](const void* run, int64_t begin, int64_t end, int64_t next) {
        (*static_cast<const std::function<void(int64_t, int64_t, int64_t)>*>(run))(begin, end, next);
      },
      &work);
}

// Operations of random sizes, each of which reads what the one before has written: none begins too early, no index is left
// out or done twice. Plain numbers, so that ThreadSanitizer sees what is not ordered.
void chained(int64_t threads, unsigned seed, int steps) {
  std::mt19937 random(seed);
  std::vector<int64_t> now(5000), before(5000);
  for (int step = 0; step < steps; ++step) {
    const TeamStep team(threads);
    if (!team_threads()) continue;  // another thread leads it
    std::fill(before.begin(), before.end(), 0);
    for (int64_t i = 1; i <= 50; ++i) {
      const int64_t count = i % 10 ? 1 + random() % 100 : now.size(), least = 1 + random() % 20;
      share_out(count, least, [&](int64_t begin, int64_t end, int64_t next) {
        EXPECT(0 <= begin && begin < end && end <= count && end <= next && next <= count);
        EXPECT(end == count || end - begin >= least);
        for (int64_t j = begin; j < end; ++j) now[j] = before[(j + 1) % count] + 1;
      });
      for (int64_t j = 0; j < count; ++j) EXPECT(now[j] == before[(j + 1) % count] + 1);
      std::copy(now.begin(), now.begin() + count, before.begin());
    }
    if (step % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // members fall asleep
  }
}

void threads_of_their_own() {
  std::vector<std::thread> leaders;
  for (unsigned i = 0; i < 3; ++i) leaders.emplace_back([i] { chained(3, i, 200); });
  for (std::thread& leader : leaders) leader.join();
}

void errors() {
  for (int i = 0; i < 200; ++i) {
    const TeamStep team(4);
    bool thrown = false;
    try {
      share_out(40, 1, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t j = begin; j < end; ++j) {
          if (j == i % 40) throw std::runtime_error("here");
        }
      });
    } catch (const std::runtime_error& error) {
      thrown = std::strcmp(error.what(), "here") == 0;
    }
    EXPECT(thrown);
    std::atomic<int64_t> sum{0};
    share_out(40, 1, [&](int64_t begin, int64_t end, int64_t) { sum += end - begin; });
    EXPECT(sum == 40);
  }
}

// Whether another thread ever takes a part, if it is given ten seconds to come and a CPU.
bool has_members() {
  cpu_set_t cpus;
  EXPECT(sched_getaffinity(0, sizeof cpus, &cpus) == 0);
  if (CPU_COUNT(&cpus) == 1) return true;
  const auto leader = std::this_thread::get_id();
  std::atomic<bool> came{false};
  const auto start = std::chrono::steady_clock::now();
  while (!came && std::chrono::steady_clock::now() - start < std::chrono::seconds(10)) {
    const TeamStep team(2);
    share_out(100, 1, [&](int64_t, int64_t, int64_t) {
      if (std::this_thread::get_id() != leader) came = true;
    });
  }
  return came;
}

void forks() {
  chained(3, 0, 20);
  for (int i = 0; i < 3; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      chained(3, 1, 20);
      EXPECT(has_members());  // of its own
      std::_Exit(0);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  chained(3, 2, 20);
}

// Members compute as the thread that leads does: it may have set how floats are rounded, and that small ones are zero.
void environment() {
  const auto third = [] {
    volatile double one = 1.0, three = 3.0;
    return one / three;
  };
  for (int i = 0; i < 100; ++i) {
    std::fesetround(i % 2 ? FE_DOWNWARD : FE_UPWARD);
    const double expected = third();
    const TeamStep team(4);
    for (int j = 0; j < 20; ++j) {
      share_out(64, 1, [&](int64_t, int64_t, int64_t) { EXPECT(third() == expected); });
    }
  }
  std::fesetround(FE_TONEAREST);
}

// Members that stop within a part cost little: they are waited for, and then left alone for several times as long.
void late_members() {
  const auto leader = std::this_thread::get_id();
  using Clock = std::chrono::steady_clock;
  Clock::duration of_leader{};
  std::atomic<int64_t> late{0};
  const Clock::time_point start = Clock::now();
  for (int step = 0; step < 100; ++step) {
    const TeamStep team(2);
    for (int operation = 0; operation < 20; ++operation) {
      share_out(8, 1, [&](int64_t, int64_t, int64_t) {
        const bool member = std::this_thread::get_id() != leader;
        const Clock::time_point begin = Clock::now();
        std::this_thread::sleep_for(member ? std::chrono::milliseconds(4) : std::chrono::microseconds(5));
        member ? static_cast<void>(++late) : static_cast<void>(of_leader += Clock::now() - begin);
      });
    }
  }
  const double ratio = std::chrono::duration<double>(Clock::now() - start) / std::chrono::duration<double>(of_leader);
  if (ratio > 1.6) std::fprintf(stderr, "%f times as long as the leader's own work, %ld parts late\n", ratio, long(late));
  EXPECT(ratio <= 1.6);
}

void parts_within_parts() {
  const TeamStep team(2);
  std::atomic<int64_t> sum{0};
  share_out(10, 1, [&](int64_t begin, int64_t end, int64_t) {
    EXPECT(team_threads() == 1);
    share_out(end - begin, 1, [&](int64_t first, int64_t last, int64_t) { sum += last - first; });
  });
  EXPECT(sum == 10);
}

// As many threads as the CPUs that this thread may have, and no more than it asks for.
void counts() {
  EXPECT(team_threads() == 0);
  EXPECT(has_members());
  {
    const TeamStep one(1);
    EXPECT(team_threads() == 0);
  }
  cpu_set_t before, one;
  EXPECT(sched_getaffinity(0, sizeof before, &before) == 0);
  const int64_t cpus = CPU_COUNT(&before);
  for (int64_t threads : {2, 1000, 2}) {
    const TeamStep team(threads);
    EXPECT(team_threads() <= std::min(threads, cpus));  // fewer if one was late before
    std::set<std::thread::id> seen;
    std::atomic_flag lock = ATOMIC_FLAG_INIT;
    for (int i = 0; i < 100; ++i) {
      share_out(1000, 1, [&](int64_t, int64_t, int64_t) {
        while (lock.test_and_set(std::memory_order_acquire)) {
        }
        seen.insert(std::this_thread::get_id());
        lock.clear(std::memory_order_release);
      });
    }
    EXPECT(static_cast<int64_t>(seen.size()) <= std::min(threads, cpus));
  }
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  EXPECT(sched_setaffinity(0, sizeof one, &one) == 0);
  {
    const TeamStep team(2);
    EXPECT(team_threads() <= 1);
  }
  EXPECT(sched_setaffinity(0, sizeof before, &before) == 0);
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "chained") {
    for (int64_t threads = 2; threads <= 5; ++threads) chained(threads, threads, 300);
  } else if (name == "leaders") {
    threads_of_their_own();
  } else if (name == "errors") {
    errors();
  } else if (name == "forks") {
    forks();
  } else if (name == "environment") {
    environment();
  } else if (name == "late") {
    late_members();
  } else if (name == "nested") {
    parts_within_parts();
  } else if (name == "counts") {
    counts();
  } else {
    return 2;
  }
  return 0;
}
