#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/blas/symmetric_update.h"

namespace hesskern::cpu {

namespace {

// Rows converted at a time when x is not of acc's dtype: about 4 MB of float32.
int64_t convert_rows(int64_t d) {
  return std::max<int64_t>(256, (1 << 20) / std::max<int64_t>(d, 1));
}

// acc and base [d, d] or [d + 1, d + 1], x [N, d]
void input_covariance_(at::Tensor& acc, const at::Tensor& x, double alpha, bool ones,
                       const std::optional<at::Tensor>& base, double beta) {
  check_input_covariance(acc, x, ones, base);
  const int64_t n = x.size(0), d = x.size(1);
  Addend addend{base.value_or(acc), beta};
  // The column of ones is added to by itself.
  if (n == 0 || ones) addend = start_triangle_(acc, addend);
  if (n == 0) return;
  const at::Tensor block = ones ? acc.narrow(0, 0, d).narrow(1, 0, d) : acc;
  if (ones) addend.base = block;
  const int64_t step = x.scalar_type() == acc.scalar_type() ? n : convert_rows(d);
  for (int64_t start = 0; start < n; start += step) {
    const at::Tensor rows = x.narrow(0, start, std::min(step, n - start)).to(acc.scalar_type());
    symmetric_update_(block, addend, rows, alpha);
    addend = {block, 1};
    if (ones) acc.select(1, d).narrow(0, 0, d).add_(rows.sum(0), alpha);
  }
  if (ones) acc.select(0, d).select(0, d).add_(alpha * static_cast<double>(n));
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("input_covariance_", &input_covariance_);
}

}  // namespace hesskern::cpu
