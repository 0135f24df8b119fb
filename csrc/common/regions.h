// Memory overlap of tensors: what is written must not overlap anything else that is written or read.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <torch/csrc/stable/tensor.h>

namespace fastgpt {
namespace {

// The bytes [begin, end) that a tensor spans, and its layout.
struct Region {
  const char* begin;
  const char* end;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  int64_t size;  // of an element
};

inline Region region_of(
    const void* data, int64_t size, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    torch::headeronly::IntHeaderOnlyArrayRef strides) {
  Region region{static_cast<const char*>(data), static_cast<const char*>(data), sizes, strides, size};
  int64_t last = 0;
  for (size_t i = 0; i < region.sizes.size(); ++i) {
    if (region.sizes[i] == 0) return region;
    last += (region.sizes[i] - 1) * region.strides[i];
  }
  region.end += (last + 1) * size;
  return region;
}

inline Region region_of(const torch::stable::Tensor& x, const void* data, int64_t size) {
  return region_of(data, size, x.sizes(), x.strides());
}

inline bool overlap(const Region& a, const Region& b) { return a.begin < b.end && b.begin < a.end; }

// Whether two tensors of the same strides share an element, where b begins `distance` elements after a; dimension by dimension.
inline bool share_element(int64_t distance, const Region& a, const Region& b, size_t dim = 0) {
  if (dim == a.sizes.size()) return distance == 0;
  int64_t after_a = 0, after_b = 0;  // extent of the dimensions after this one
  for (size_t i = dim + 1; i < a.sizes.size(); ++i) {
    after_a += (a.sizes[i] - 1) * a.strides[i], after_b += (b.sizes[i] - 1) * b.strides[i];
  }
  const int64_t stride = a.strides[dim], least = 1 - b.sizes[dim], most = a.sizes[dim] - 1;
  if (stride == 0 || least == most) return share_element(distance, a, b, dim + 1);
  for (int64_t n = std::max<int64_t>(least, (distance - after_a) / stride - 1);
       n <= std::min<int64_t>(most, (distance + after_b) / stride + 1); ++n) {
    if (share_element(distance - n * stride, a, b, dim + 1)) return true;
  }
  return false;
}

// Whether no two elements of a tensor of up to 4 dimensions share memory. Sufficient, not necessary: in ascending order, each
// stride must exceed the extent of the dimensions with smaller ones.
inline bool has_no_internal_overlap(const Region& x) {
  std::pair<int64_t, int64_t> dims[4];  // stride and size, in order
  size_t count = 0;
  for (size_t i = 0; i < x.sizes.size() && i < 4; ++i) {
    if (x.sizes[i] == 0) return true;
    if (x.sizes[i] == 1) continue;
    size_t at = count++;
    for (; at > 0 && dims[at - 1].first > x.strides[i]; --at) dims[at] = dims[at - 1];
    dims[at] = {x.strides[i], x.sizes[i]};
  }
  int64_t reach = 0;
  for (size_t i = 0; i < count; ++i) {
    if (dims[i].first <= reach) return false;
    reach += (dims[i].second - 1) * dims[i].first;
  }
  return true;
}

}  // namespace
}  // namespace fastgpt
