// The CPU kernel of `norm`: normalizes rows, and adds a residual.

#include "norm/normalize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Iterates over rows in order, from index `row` on.
class RowIterator {
 public:
  RowIterator(const StridedRows& rows, int64_t row) : rows_(rows), now_(rows.data) {
    for (int i = 0; i < kRowDims; ++i) {
      at_[i] = row % rows.sizes[i], row /= rows.sizes[i];
      now_ += at_[i] * rows.strides[i];
    }
  }

  const void* next() {
    const char* row = now_;
    for (int i = 0; i < kRowDims; ++i) {
      now_ += rows_.strides[i];
      if (++at_[i] < rows_.sizes[i]) break;
      now_ -= rows_.sizes[i] * rows_.strides[i], at_[i] = 0;
    }
    return row;
  }

 private:
  const StridedRows& rows_;
  const char* now_;
  int64_t at_[kRowDims];
};

}  // namespace

// Normalizes rows begin to end. scratch: four padded rows.
void norm_rows(const NormRows& n, float* scratch, int64_t begin, int64_t end) {
  const int64_t size = padded(n.count);
  float *y = scratch, *residual = y + size;
  const Normalizer normalize(n.norm, n.count, n.element, residual + size);
  RowIterator xs(n.x, begin), residuals(n.residual, begin);
  for (int64_t r = begin; r < end; ++r) {
    convert_padded(xs.next(), 0, n.count, n.element, y);
    normalize(y);
    if (n.residual.data) {
      convert_padded(residuals.next(), 0, n.count, n.element, residual);
      for (int64_t c = 0; c < size; c += kWidth) store(y + c, load(residual + c) + load(y + c));
    }
    write(y, n.count, n.out, r * n.count, n.element);
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
