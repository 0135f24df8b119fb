#include "common/team.h"

#include <cfenv>
#include <csignal>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>

#if defined(__linux__)
#include <sched.h>

#include <fstream>
#include <string>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgpt {
namespace {

using Clock = std::chrono::steady_clock;
using Work = void (*)(const void* run, int64_t begin, int64_t end, int64_t next);

// A member that is waited for longer than this, and than the leader took for its own share, was taken off its CPU. It rests for
// so many times as long as it was waited for, so that waiting takes no more than that part of the time.
constexpr Clock::duration kLate = std::chrono::microseconds(100);
constexpr int kRest = 8;
constexpr int kSpinsPerLook = 64;  // at the clock
constexpr int64_t kMostLeft = (int64_t(1) << 32) - 1;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

#if defined(__linux__)
using Cpus = cpu_set_t;

Cpus cpus_of_this_thread() {
  Cpus cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) CPU_ZERO(&cpus);  // more CPUs than a cpu_set_t holds
  return cpus;
}

// CPUs' worth of time that control groups leave this process, or 0 where they do not say.
double quota_of(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota, period;
  return file >> quota >> period && period > 0 ? quota / period : 0;  // not a number: "max"
}

int64_t quota() {
  std::ifstream file("/proc/self/cgroup");
  std::string line, path;
  while (std::getline(file, line)) {
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  }
  double least = 0;
  for (path = "/sys/fs/cgroup" + path; path.size() >= 14; path.resize(path.rfind('/'))) {
    if (const double of_group = quota_of(path); of_group > 0) least = least > 0 ? std::min(least, of_group) : of_group;
  }
  return least > 0 ? std::max<int64_t>(static_cast<int64_t>(least), 1) : kMostLeft;
}
#endif

class Team;
std::atomic<Team*> the_team{nullptr};
thread_local Team* led = nullptr;     // by this thread
thread_local bool in_a_part = false;  // of an operation, within which no other is shared out

struct InAPart {
  InAPart() { in_a_part = true; }
  ~InAPart() { in_a_part = false; }
};

class Team {
 public:
  // Of this process; a child of fork makes one of its own. It is never deleted: threads may outlive all else.
  static Team& get() {
    Team* team = the_team.load(std::memory_order_acquire);
    if (team) return *team;
    static const int registered = pthread_atfork(
        nullptr, nullptr, [] { the_team = nullptr, led = nullptr, in_a_part = false; });
    static_cast<void>(registered);
    auto* fresh = new Team;
    if (the_team.compare_exchange_strong(team, fresh)) return *fresh;
    delete fresh;
    return *team;
  }

  // Whether this thread leads it from now on.
  bool begin(int64_t threads) {
    if (led || in_a_part || threads < 2 || is_led_.exchange(true, std::memory_order_acquire)) return false;
    threads = std::min(threads, allowed());
    while (static_cast<int64_t>(members_.size()) < threads - 1 && hire()) {
    }
    threads_ = std::min<int64_t>(threads, members_.size() + 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++step_;
      std::fegetenv(&environment_);
      for (int64_t i = 0; i < threads_ - 1; ++i) members_[i]->called.store(step_, std::memory_order_relaxed);
    }
    if (threads_ > 1) wake_.notify_all();
    led = this;
    return true;
  }

  void end() {
    led = nullptr;
    for (Member* member : members_) member->called.store(0, std::memory_order_relaxed);
    is_led_.store(false, std::memory_order_release);
  }

  int64_t threads() const { return threads_; }

  void run(int64_t count, int64_t least, Work work, const void* context) {
    if (threads_ == 1 || count <= least || count > kMostLeft) {
      const InAPart serial;
      if (count > 0) work(context, 0, count, count);
      return;
    }
    // What members read once they have taken a part: none can be taken now, so nobody does.
    work_.store(work, std::memory_order_relaxed), context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed), least_.store(least, std::memory_order_relaxed);
    sharers_.store(threads_, std::memory_order_relaxed), done_.store(0, std::memory_order_relaxed);
    const uint64_t round = (left_.load(std::memory_order_relaxed) >> 32) + 1;
    left_.store(round << 32 | static_cast<uint64_t>(count), std::memory_order_release);

    const Clock::time_point start = Clock::now();
    const int64_t own = take_parts(nullptr);
    if (done_.load(std::memory_order_acquire) != count - own) wait_for(count - own, start);
    if (failed_.load(std::memory_order_acquire)) {
      failed_.store(false, std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  struct alignas(64) Member {
    std::atomic<int64_t> called{0};          // the step that it takes part in, or 0
    std::atomic<bool> works{false};          // on a part
    int64_t computes_as_in = 0;              // the step whose floating-point environment it has
    std::atomic<Clock::rep> rests_until{0};  // ticks of the clock
#if defined(__linux__)
    pthread_t thread{};
#endif
  };
  struct Part {
    int64_t begin = 0, end = 0;
  };

  // The next part of the operation that runs, empty if none is left.
  Part take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t rest = static_cast<int64_t>(left & 0xffffffff);
      if (rest == 0) return {};
      // Of another operation if that one is over by now, but then the exchange fails: its round is another.
      const int64_t count = count_.load(std::memory_order_relaxed);
      const int64_t part = part_of(rest, sharers_.load(std::memory_order_relaxed), least_.load(std::memory_order_relaxed));
      if (left_.compare_exchange_weak(left, left - part, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return {count - rest, count - rest + part};
      }
    }
  }

  // Works until nothing is left, and returns how much that was. The next part is taken before one begins, so that its memory
  // is fetched in time.
  int64_t take_parts(Member* member) {
    Part now = take();
    if (now.begin == now.end) return 0;
    const InAPart inside;
    const Work work = work_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    if (member) {
      member->works.store(true, std::memory_order_relaxed);
      // Not when it is called: it may come when that step is over, and take a part of the next.
      if (std::exchange(member->computes_as_in, step_) != step_) std::fesetenv(&environment_);
    }
    int64_t total = 0;
    for (Part next; now.begin < now.end; now = next) {
      next = take();
      try {
        work(context, now.begin, now.end, next.begin < next.end ? next.begin : count);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_.store(true, std::memory_order_release);
      }
      total += now.end - now.begin;
      if (member && next.begin == next.end) member->works.store(false, std::memory_order_relaxed);
      // The last that a member does for this operation: then the leader may begin another.
      if (member) done_.fetch_add(now.end - now.begin, std::memory_order_acq_rel);
    }
    return total;
  }

  // For parts that members have begun.
  void wait_for(int64_t others, Clock::time_point start) {
    const Clock::time_point waiting = Clock::now();
    const Clock::duration patience = std::max<Clock::duration>(kLate, 2 * (waiting - start));
    for (int spins = 1; done_.load(std::memory_order_acquire) != others; ++spins) {
      pause();
      if (spins % kSpinsPerLook) continue;
      const Clock::time_point now = Clock::now();
      if (now - waiting < patience) continue;
      const Clock::rep until = (now + kRest * (now - waiting)).time_since_epoch().count();
      for (Member* member : members_) {
        if (member->works.load(std::memory_order_relaxed)) member->rests_until.store(until, std::memory_order_relaxed);
      }
      std::this_thread::yield();  // it may be this CPU that it waits for
    }
  }

  // CPUs that this thread, and so its members, may have. Members are kept off the one that this thread is on: Linux wakes a
  // thread where the one that wakes it runs, and there it would wait.
  int64_t allowed() {
#if defined(__linux__)
    static const int64_t of_control_groups = quota();
    const int leader = sched_getcpu();
    Cpus cpus = cpus_of_this_thread();
    const int64_t count = CPU_COUNT(&cpus);
    if (count == 0) return of_control_groups;
    if (leader >= 0 && leader < CPU_SETSIZE) CPU_CLR(leader, &cpus);
    if (leader != leader_ || !CPU_EQUAL(&cpus, &cpus_)) {
      leader_ = leader, cpus_ = cpus;
      if (count > 1) {
        for (Member* member : members_) pthread_setaffinity_np(member->thread, sizeof cpus, &cpus);
      }
    }
    return std::min(count, of_control_groups);
#else
    return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
#endif
  }

  // One more member, if there can be one.
  bool hire() {
    auto* member = new Member;
    sigset_t all, before;  // signals are for the threads of whoever uses this library
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      std::thread thread([this, member, step = step_] { live(*member, step); });
#if defined(__linux__)
      member->thread = thread.native_handle();
      pthread_setname_np(member->thread, "fastgpt");
      if (CPU_COUNT(&cpus_) > 0) pthread_setaffinity_np(member->thread, sizeof cpus_, &cpus_);
#endif
      thread.detach();
      members_.push_back(member);
    } catch (const std::system_error&) {
      delete member;
      member = nullptr;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return member != nullptr;
  }

  void live(Member& self, int64_t step) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return step_ != step; });
        step = step_;
      }
      while (self.called.load(std::memory_order_relaxed) == step) {
        if (!take_parts(&self)) {
          pause();
        } else if (
            const Clock::time_point until{Clock::duration(self.rests_until.load(std::memory_order_relaxed))};
            until > Clock::now()) {
          std::this_thread::sleep_until(until);
        }
      }
    }
  }

  // The operation that runs: its number and what of it nobody has taken, and what it is.
  alignas(64) std::atomic<uint64_t> left_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0}, least_{1}, sharers_{1};
  alignas(64) std::atomic<int64_t> done_{0};  // by members
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;

  alignas(64) std::atomic<bool> is_led_{false};
  int64_t threads_ = 1;  // this and the following are the leader's
  std::vector<Member*> members_;
#if defined(__linux__)
  int leader_ = -1;  // the CPU that it was on
  Cpus cpus_{};      // that members may have
#endif
  std::mutex mutex_;
  std::condition_variable wake_;
  // Written under mutex_, when no part can be taken; read under it, or with a part in hand.
  int64_t step_ = 0;
  std::fenv_t environment_;  // the leader's: how it rounds, whether denormal numbers are zero
};

}  // namespace

TeamStep::TeamStep(int64_t threads) : leads_(threads > 1 && Team::get().begin(threads)) {}

TeamStep::~TeamStep() {
  if (leads_) led->end();
}

int64_t team_threads() { return in_a_part ? 1 : led ? led->threads() : 0; }

void run_on_team(int64_t count, int64_t least, Work work, const void* run) {
  in_a_part ? work(run, 0, count, count) : led->run(count, least, work, run);
}

}  // namespace fastgpt
