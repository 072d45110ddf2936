// acc += other on the upper triangle: half of what adding whole matrices reads and writes.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace hesskern::cpu {

namespace {

// Elements that a thread is worth starting for.
constexpr int64_t kElements = 1 << 15;

// acc and other [d, d] or [g, d, d]
void add_triangle_(const at::Tensor& acc, const at::Tensor& other) {
  if (acc.numel() == 0) return;
  const int64_t d = acc.size(-1), groups = acc.dim() == 3 ? acc.size(0) : 1;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "add_triangle_", [&] {
    auto* to = acc.mutable_data_ptr<scalar_t>();
    const auto* from = other.const_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kElements / d);
    // Row i together with the row as far from the end: pairs are equally long.
    const int64_t pairs = (d + 1) / 2;
    auto add_row = [&](int64_t first) {
      const int64_t i = first % d;
      scalar_t* target = to + first * d;
      const scalar_t* source = from + first * d;
      for (int64_t j = i; j < d; ++j) target[j] += source[j];
    };
    at::parallel_for(0, groups * pairs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item % pairs, start = item / pairs * d;
        add_row(start + row);
        if (d - 1 - row != row) add_row(start + d - 1 - row);
      }
    });
  });
}

void add_triangles_(at::TensorList acc, at::TensorList other) {
  TORCH_CHECK_VALUE(acc.size() == other.size(), "add_triangles_: as many others as acc, ",
                    acc.size(), ", got ", other.size());
  for (size_t i = 0; i < acc.size(); ++i) check_add_triangle(acc[i], other[i]);
  for (size_t i = 0; i < acc.size(); ++i) add_triangle_(acc[i], other[i]);
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern_internal, CPU, m) {
  m.impl("add_triangles_", &add_triangles_);
}

}  // namespace hesskern::cpu
