#include "bench/peaks.h"

#include <atomic>

#include "common/cpu_level.h"
#include "common/parallel.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(int list_peaks(Peak* list); float read_memory(const float* numbers, int64_t count);)

namespace fastgpt {

std::vector<Peak> peaks() {
  std::vector<Peak> list(kMaxPeaks);
  list.resize(FASTGPT_AT_CPU_LEVEL(list_peaks)(list.data()));
  return list;
}

void run_on_all_threads(const Peak& peak, int64_t iterations) {
  constexpr int64_t kLeast = 1024;  // iterations per part: some microseconds, so that the cost of scheduling does not count
  for_parts(iterations, kLeast, [&](int64_t begin, int64_t end, int64_t) { peak.run(end - begin); });
}

float read_on_all_threads(const float* numbers, int64_t count) {
  constexpr int64_t kLeast = 1 << 18;
  std::atomic<float> total{0.0f};
  for_parts(count, kLeast, [&](int64_t begin, int64_t end, int64_t) {
    const float part = FASTGPT_AT_CPU_LEVEL(read_memory)(numbers + begin, end - begin);
    for (float before = total; !total.compare_exchange_weak(before, before + part);) continue;
  });
  return total;
}

}  // namespace fastgpt
