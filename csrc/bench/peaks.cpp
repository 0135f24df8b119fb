#include "bench/peaks.h"

#include "common/cpu_level.h"
#include "common/parallel.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(int list_peaks(Peak* list);)

namespace fastgpt {

std::vector<Peak> peaks() {
  std::vector<Peak> list(kMostPeaks);
  list.resize(FASTGPT_AT_CPU_LEVEL(list_peaks)(list.data()));
  return list;
}

void run_on_all_threads(const Peak& peak, int64_t iterations) {
  constexpr int64_t kLeast = 1024;  // iterations of some microseconds, beside which taking a part is nothing
  for_parts(iterations, kLeast, [&](int64_t begin, int64_t end, int64_t) { peak.run(end - begin); });
}

}  // namespace fastgpt
