// `quantize` on the CPU: a group of numbers at a time, in the operations and the order of the reference, `reference_blocks` in
// fastgpt/ops/quantized_weight.py. setup.py compiles this file with -ffp-contract=off, and sums are of 16 lanes on every CPU
// level, so that weights that are quantized on one machine are those of another.

#include "common/integers.h"
#include "common/stored_elements.h"
#include "linear/quantize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int kLanes = 16, kVectors = kLanes / kWidth;
constexpr float kMostOfHalf = 65504, kInfiniteInHalf = 65520;  // the largest finite number; the least that rounds to infinity

// Combines lanes pairwise, halves first.
template <typename Combine>
float combined(const Vector (&vectors)[kVectors], Combine combine) {
  float lanes[kLanes];
  std::memcpy(lanes, vectors, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// What the integers of a group stand for: w = scale · q + minimum. Both are values of fp16.
struct Grid {
  float scale, minimum;
};

inline float to_half(float x) { return half_to_float(float_to_half(x)); }

template <int kBits, bool kMinima>
class Group {
 public:
  // integers: memory for `size` floats.
  Group(const float* numbers, int64_t size, float* integers) : numbers_(numbers), size_(size), integers_(integers) {
    Vector highest[kVectors], lowest[kVectors];
    for (int v = 0; v < kVectors; ++v) highest[v] = lowest[v] = load(numbers + v * kWidth);
    for (int64_t i = kLanes; i < size; i += kLanes) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector w = load(numbers + i + v * kWidth);
        highest[v] = highest[v] > w ? highest[v] : w, lowest[v] = lowest[v] < w ? lowest[v] : w;
      }
    }
    highest_ = combined(highest, [](float a, float b) { return a > b ? a : b; });
    lowest_ = combined(lowest, [](float a, float b) { return a < b ? a : b; });
  }

  Grid grid() const {
    if constexpr (kBits == 8) {
      if constexpr (kMinima) return lowered({to_half((highest_ - lowest_) / 255), to_half(lowest_)});
      return lowered({to_half((-lowest_ > highest_ ? -lowest_ : highest_) / 127), 0});
    } else {
      return fitted();
    }
  }

  // The block: scale, minimum if there is one, integers.
  void write(Grid grid, uint8_t* block) const {
    const uint16_t header[] = {float_to_half(grid.scale), float_to_half(grid.minimum)};
    std::memcpy(block, header, kMinima ? 4 : 2);
    block += kMinima ? 4 : 2;
    for (int64_t i = 0; i < size_; i += kPacked) {
      alignas(64) float q[kPacked];
      for (int j = 0; j < kPacked; j += kWidth) store(q + j, integers(i + j, grid) + (kBits == 4 && !kMinima ? 8.0f : 0.0f));
      const auto byte = [&](int j) { return static_cast<uint8_t>(static_cast<int32_t>(q[j])); };
      if constexpr (kBits == 8) {
        for (int j = 0; j < kPacked; ++j) block[i + j] = byte(j);
      } else {
        for (int j = 0; j < kPacked / 2; ++j) block[i / 2 + j] = byte(j) | byte(j + kPacked / 2) << 4;
      }
    }
  }

 private:
  // Numbers i to i + kWidth as integers, in floats.
  Vector integers(int64_t i, Grid grid) const { return rounded(load(numbers_ + i), grid); }

  Vector rounded(Vector q, Grid grid) const {
    constexpr float kLeast = kMinima ? 0 : kBits == 8 ? -127 : -8, kMost = kMinima ? (1 << kBits) - 1 : kBits == 8 ? 127 : 7;
    if (grid.scale == 0) return Vector{};
    if constexpr (kMinima) q -= grid.minimum;
    q /= grid.scale;
    q = q < kLeast ? broadcast(kLeast) : q;
    q = q > kMost ? broadcast(kMost) : q;
    return q + 12582912.0f - 12582912.0f;  // 1.5 · 2^23: rounds to the nearest, ties to even
  }

  // As _overflows and _lowered in fastgpt/ops/quantized_weight.py.
  bool overflows(Grid grid) const {
    const float largest = highest_ > -lowest_ ? highest_ : -lowest_;
    if (!(largest > kMostOfHalf / 2 && largest <= kMostOfHalf)) return false;
    for (const float number : {highest_, lowest_}) {
      const float found = rounded(broadcast(number), grid)[0] * grid.scale + grid.minimum;
      if (found >= kInfiniteInHalf || found <= -kInfiniteInHalf) return true;
    }
    return false;
  }

  Grid lowered(Grid grid) const {
    if (!overflows(grid)) return grid;
    return {half_to_float(static_cast<uint16_t>(float_to_half(grid.scale) - 1)), grid.minimum};
  }

  template <typename Term>
  float sum(Term term) const {
    Vector sums[kVectors] = {};
    for (int64_t i = 0; i < size_; i += kLanes) {
      for (int v = 0; v < kVectors; ++v) sums[v] += term(i + v * kWidth, load(numbers_ + i + v * kWidth));
    }
    return combined(sums, [](float a, float b) { return a + b; });
  }

  // Sets the integers to those of a grid; the squared error.
  float round_to(Grid grid) const {
    return sum([&](int64_t i, Vector w) {
      const Vector q = integers(i, grid);
      store(integers_ + i, q);
      Vector difference = q * grid.scale;
      if constexpr (kMinima) difference += grid.minimum;
      difference -= w;
      return difference * difference;
    });
  }

  // The grid with the least squared error for the integers that were set.
  Grid least_squares() const {
    const auto q = [&](int64_t i) { return load(integers_ + i); };
    if constexpr (!kMinima) {
      const float products = sum([&](int64_t i, Vector w) { return w * q(i); });
      const float squares = sum([&](int64_t i, Vector) { return q(i) * q(i); });
      return {to_half(products / (squares < 1 ? 1.0f : squares)), 0};
    }
    const float count = static_cast<float>(size_);
    const float mean = sum([](int64_t, Vector w) { return w; }) / count;
    const float of_integers = sum([&](int64_t i, Vector) { return q(i); }) / count;
    const float products = sum([&](int64_t i, Vector w) { return (q(i) - of_integers) * (w - mean); });
    const float squares = sum([&](int64_t i, Vector) { return (q(i) - of_integers) * (q(i) - of_integers); });
    const float scale = products / (squares < 1e-9f ? 1e-9f : squares);
    return {to_half(scale), to_half(mean - scale * of_integers)};
  }

  // Of several starts, each refined, the grid with the least squared error. As FITS in fastgpt/ops/quantized_weight.py.
  Grid fitted() const {
    constexpr float kParts[2][4] = {{1, 1.1f, 0.93f, 0.86f}, {1, 0.88f}};
    constexpr int kStarts = kMinima ? 2 : 4, kRefinements = kMinima ? 3 : 1;
    const float extreme = highest_ > -lowest_ ? highest_ : lowest_;
    Grid best = {};
    float least = kInfinity;
    for (int start = 0; start < kStarts; ++start) {
      const float part = kParts[kMinima][start];
      Grid grid = {to_half(extreme * part / -8), 0};
      if constexpr (kMinima) {
        const float middle = (highest_ + lowest_) / 2, half = (highest_ - lowest_) / 2 * part;
        grid = {to_half(half / 7.5f), to_half(middle - half)};
      }
      grid = lowered(grid);
      for (int refinement = 0;; ++refinement) {
        float squared = round_to(grid);
        if (overflows(grid)) squared = kInfinity;
        if (squared < least || (start == 0 && refinement == 0)) least = squared, best = grid;
        if (refinement == kRefinements) break;
        grid = least_squares();
      }
    }
    return best;
  }

  const float* numbers_;
  int64_t size_;
  float* integers_;
  float highest_, lowest_;
};

template <int kBits, bool kMinima>
void quantize_row(const Quantize& q, const float* row, float* integers, uint8_t* blocks) {
  const int64_t size = q.packing.group_size, bytes = q.packing.row_bytes(size);
  for (int64_t c = 0; c < q.in; c += size, blocks += bytes) {
    const Group<kBits, kMinima> group(row + c, size, integers);
    group.write(group.grid(), blocks);
  }
}

}  // namespace

// Rows begin to end, by way of `row`, 2 · q.in floats. Returns the bits of the largest magnitude among them, which are larger
// than infinity's if there is a NaN. Rows of numbers beyond `most` are left out.
uint32_t quantize_rows(const Quantize& q, float most, float* row, int64_t begin, int64_t end) {
  uint32_t largest = 0;
  for (int64_t r = begin; r < end; ++r) {
    convert(q.weight, r * q.in, q.in, q.element, row);
    uint32_t of_row = 0;
    for (int64_t c = 0; c < q.in; ++c) {
      const uint32_t magnitude = float_to_bits(row[c]) & 0x7fffffff;
      of_row = of_row > magnitude ? of_row : magnitude;
    }
    largest = largest > of_row ? largest : of_row;
    if (of_row > float_to_bits(most)) continue;
    uint8_t* blocks = q.blocks + r * q.row_stride;
    if (q.packing.bits == 8) {
      q.packing.minima ? quantize_row<8, true>(q, row, row + q.in, blocks) : quantize_row<8, false>(q, row, row + q.in, blocks);
    } else {
      q.packing.minima ? quantize_row<4, true>(q, row, row + q.in, blocks) : quantize_row<4, false>(q, row, row + q.in, blocks);
    }
  }
  return largest;
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
