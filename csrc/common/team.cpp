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

// If the leader waits for a worker longer than kLateAfter, and longer than twice the time of its own share, the worker has been
// preempted. It then pauses for kPauseFactor times that wait, which bounds the share of time that is lost in waiting.
constexpr Clock::duration kLateAfter = std::chrono::microseconds(100);
constexpr int kPauseFactor = 8;
constexpr int kSpinsPerClockRead = 64;
constexpr int64_t kMaxCount = (int64_t(1) << 32) - 1;

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

// The CPU limit of a control group, in CPUs, or 0 if it has none.
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
  return least > 0 ? std::max<int64_t>(static_cast<int64_t>(least), 1) : kMaxCount;
}
#endif

class Team;
std::atomic<Team*> the_team{nullptr};
thread_local Team* led = nullptr;       // the team that this thread leads
thread_local bool inside_part = false;  // within a part of an operation, others are not distributed

struct InsidePart {
  InsidePart() { inside_part = true; }
  ~InsidePart() { inside_part = false; }
};

class Team {
 public:
  // The process's team; a forked child creates its own. It is never deleted, as its threads run until the process ends.
  static Team& get() {
    Team* team = the_team.load(std::memory_order_acquire);
    if (team) return *team;
    static const int registered = pthread_atfork(
        nullptr, nullptr, [] { the_team = nullptr, led = nullptr, inside_part = false; });
    static_cast<void>(registered);
    auto* fresh = new Team;
    if (the_team.compare_exchange_strong(team, fresh)) return *fresh;
    delete fresh;
    return *team;
  }

  // Makes this thread the leader, with up to `threads` threads. Returns false if the team has a leader already.
  bool begin(int64_t threads) {
    if (led || inside_part || threads < 2 || is_led_.exchange(true, std::memory_order_acquire)) return false;
    threads = std::min(threads, allowed_cpus());
    while (static_cast<int64_t>(workers_.size()) < threads - 1 && add_worker()) {
    }
    threads_ = std::min<int64_t>(threads, workers_.size() + 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++step_;
      std::fegetenv(&environment_);
      for (int64_t i = 0; i < threads_ - 1; ++i) workers_[i]->called_for_step.store(step_, std::memory_order_relaxed);
    }
    if (threads_ > 1) wake_.notify_all();
    led = this;
    return true;
  }

  void end() {
    led = nullptr;
    for (Worker* worker : workers_) worker->called_for_step.store(0, std::memory_order_relaxed);
    is_led_.store(false, std::memory_order_release);
  }

  int64_t threads() const { return threads_; }

  void run(int64_t count, int64_t least, Work work, const void* context) {
    if (threads_ == 1 || count <= least || count > kMaxCount) {
      const InsidePart serial;
      if (count > 0) work(context, 0, count, count);
      return;
    }
    // Workers read these only after they have taken a part, and no part is available now.
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
  struct alignas(64) Worker {
    std::atomic<int64_t> called_for_step{0};  // the step that it joins, or 0
    std::atomic<bool> is_busy{false};         // works on a part
    int64_t fenv_step = 0;                    // the step whose floating-point environment is set
    std::atomic<Clock::rep> paused_until{0};  // ticks of the clock
#if defined(__linux__)
    pthread_t thread{};
#endif
  };
  struct Part {
    int64_t begin = 0, end = 0;
  };

  // Takes the next part of the current operation; empty if none is left.
  Part take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t rest = static_cast<int64_t>(left & 0xffffffff);
      if (rest == 0) return {};
      // These belong to another operation if the current one has just ended; then the exchange fails, as the round differs.
      const int64_t count = count_.load(std::memory_order_relaxed);
      const int64_t part = part_of(rest, sharers_.load(std::memory_order_relaxed), least_.load(std::memory_order_relaxed));
      if (left_.compare_exchange_weak(left, left - part, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return {count - rest, count - rest + part};
      }
    }
  }

  // Works until no part is left, and returns the number of items done. The next part is taken before the current one begins, so
  // that its memory can be prefetched.
  int64_t take_parts(Worker* worker) {
    Part now = take();
    if (now.begin == now.end) return 0;
    const InsidePart inside;
    const Work work = work_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    if (worker) {
      worker->is_busy.store(true, std::memory_order_relaxed);
      // Not when it is called: it may arrive after that step has ended, and take a part of the next one.
      if (std::exchange(worker->fenv_step, step_) != step_) std::fesetenv(&environment_);
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
      if (worker && next.begin == next.end) worker->is_busy.store(false, std::memory_order_relaxed);
      // A worker's last access to this operation: after it the leader may begin another.
      if (worker) done_.fetch_add(now.end - now.begin, std::memory_order_acq_rel);
    }
    return total;
  }

  // Waits for parts that workers have taken.
  void wait_for(int64_t others, Clock::time_point start) {
    const Clock::time_point waiting = Clock::now();
    const Clock::duration patience = std::max<Clock::duration>(kLateAfter, 2 * (waiting - start));
    for (int spins = 1; done_.load(std::memory_order_acquire) != others; ++spins) {
      pause();
      if (spins % kSpinsPerClockRead) continue;
      const Clock::time_point now = Clock::now();
      if (now - waiting < patience) continue;
      const Clock::rep until = (now + kPauseFactor * (now - waiting)).time_since_epoch().count();
      for (Worker* worker : workers_) {
        if (worker->is_busy.load(std::memory_order_relaxed)) worker->paused_until.store(until, std::memory_order_relaxed);
      }
      std::this_thread::yield();  // the worker may need this CPU
    }
  }

  // The number of CPUs that this thread and its workers may use. Workers are kept off the leader's CPU: Linux tends to wake a
  // thread on the CPU of its waker, where it would have to wait.
  int64_t allowed_cpus() {
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
        for (Worker* worker : workers_) pthread_setaffinity_np(worker->thread, sizeof cpus, &cpus);
      }
    }
    return std::min(count, of_control_groups);
#else
    return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
#endif
  }

  // Starts another worker; false if that fails.
  bool add_worker() {
    auto* worker = new Worker;
    sigset_t all, before;  // signals are left to the application's threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      std::thread thread([this, worker, step = step_] { run_worker(*worker, step); });
#if defined(__linux__)
      worker->thread = thread.native_handle();
      pthread_setname_np(worker->thread, "fastgpt");
      if (CPU_COUNT(&cpus_) > 0) pthread_setaffinity_np(worker->thread, sizeof cpus_, &cpus_);
#endif
      thread.detach();
      workers_.push_back(worker);
    } catch (const std::system_error&) {
      delete worker;
      worker = nullptr;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return worker != nullptr;
  }

  void run_worker(Worker& self, int64_t step) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return step_ != step; });
        step = step_;
      }
      while (self.called_for_step.load(std::memory_order_relaxed) == step) {
        if (!take_parts(&self)) {
          pause();
        } else if (
            const Clock::time_point until{Clock::duration(self.paused_until.load(std::memory_order_relaxed))};
            until > Clock::now()) {
          std::this_thread::sleep_until(until);
        }
      }
    }
  }

  // The current operation: its round (upper half) and the items that are not taken yet (lower half), then its arguments.
  alignas(64) std::atomic<uint64_t> left_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0}, least_{1}, sharers_{1};
  alignas(64) std::atomic<int64_t> done_{0};  // items done by workers
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;

  alignas(64) std::atomic<bool> is_led_{false};
  int64_t threads_ = 1;  // this and the following belong to the leader
  std::vector<Worker*> workers_;
#if defined(__linux__)
  int leader_ = -1;  // its CPU at the last step
  Cpus cpus_{};      // that workers may use
#endif
  std::mutex mutex_;
  std::condition_variable wake_;
  // Written under mutex_, while no part is available; read under it, or while holding a part.
  int64_t step_ = 0;
  std::fenv_t environment_;  // the leader's: rounding mode, flushing of subnormals
};

}  // namespace

TeamStep::TeamStep(int64_t threads) : leads_(threads > 1 && Team::get().begin(threads)) {}

TeamStep::~TeamStep() {
  if (leads_) led->end();
}

int64_t team_threads() { return inside_part ? 1 : led ? led->threads() : 0; }

void run_on_team(int64_t count, int64_t least, Work work, const void* run) {
  inside_part ? work(run, 0, count, count) : led->run(count, least, work, run);
}

}  // namespace fastgpt
