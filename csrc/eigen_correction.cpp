#include "eigen_correction.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace hesskern {

namespace {

// Numbers that one sample takes: its rows as they come, rotated, and laid out for the products; and
// its matrices, where they are formed.
int64_t numbers_per_sample(const CorrectionSizes& s, const CorrectionKernels& kernels) {
  const int64_t rows = s.positions * (3 * s.inputs + 2 * s.roots * s.outputs);
  const bool formed = !s.outputs_first() || !s.inputs_first() ||
                      (s.positions > 1 && kernels.add_squared_products == nullptr);
  return s.groups * (rows + (formed ? 3 * s.roots * s.outputs * s.inputs : 0));
}

// rows [..., d] V, with ones [rows, 1] V
at::Tensor rotate_inputs(const at::Tensor& rows, const at::Tensor& V, bool ones) {
  const int64_t d = rows.size(-1);
  const at::Tensor flat = rows.flatten(0, -2);
  if (!ones) return at::mm(flat, V);
  return at::addmm(V.select(0, d), flat, V.narrow(0, 0, d));
}

// One group: sum [m, columns] += squares; g [n, r, t, m], x [n, t, d]
void add_group(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x, const at::Tensor& U,
               const at::Tensor& V, const CorrectionSizes& s, const CorrectionKernels& kernels) {
  const int64_t n = x.size(0), r = s.roots, t = s.positions, m = s.outputs, d = s.inputs;
  if (t == 1) {
    // (U^T g x^T V)^2 is an outer product of squares.
    at::Tensor left = at::mm(g.reshape({-1, m}), U);
    left.mul_(left);
    if (r > 1) left = left.view({n, r, m}).sum(1);
    const at::Tensor right = rotate_inputs(x, V, s.ones);
    right.mul_(right);
    sum.narrow(1, 0, d).addmm_(left.t(), right);
    return;
  }
  const bool outputs_first = s.outputs_first(), inputs_first = s.inputs_first();
  at::Tensor left = g, right = x;
  if (outputs_first) left = at::mm(g.reshape({-1, m}), U).view({n, r, t, m});
  if (inputs_first) {
    right = rotate_inputs(x, V, s.ones).view({n, t, d});
  } else if (s.ones) {
    right = at::cat({x, at::ones({n, t, 1}, x.options())}, 2);
  }
  if (outputs_first && inputs_first && kernels.add_squared_products != nullptr) {
    return kernels.add_squared_products(sum, left, right);
  }
  at::Tensor matrices = at::bmm(left.transpose(2, 3).reshape({n, r * m, t}), right);
  if (!inputs_first) matrices = at::mm(matrices.view({n * r * m, d}), V);
  matrices = matrices.view({n * r, m, d});
  if (!outputs_first) matrices = at::matmul(U.t(), matrices);
  kernels.add_squares(sum, matrices.contiguous());
}

}  // namespace

void add_eigen_correction(const at::Tensor& acc, const at::Tensor& g,
                          const CorrectionInputs& inputs, const at::Tensor& U, const at::Tensor& V,
                          double alpha, const CorrectionSizes& s,
                          const CorrectionKernels& kernels) {
  if (s.samples == 0 || s.roots == 0 || s.positions == 0 || acc.numel() == 0) return;
  const int64_t m = s.outputs, d = s.inputs;
  const int64_t columns = (d + kernels.width - 1) / kernels.width * kernels.width;
  const int64_t level = std::max<int64_t>(1, kernels.level / s.roots);
  const int64_t step =
      std::clamp<int64_t>(kernels.numbers / numbers_per_sample(s, kernels), 1, level);
  const int64_t width = s.inputs - (s.ones ? 1 : 0);
  const at::Tensor sum = at::zeros({s.groups, m, columns}, acc.options());
  const at::Tensor left = U.dim() == 3 ? U : U.unsqueeze(0);
  const at::Tensor right = V.dim() == 3 ? V : V.unsqueeze(0);
  int64_t summed = 0;
  for (int64_t first = 0; first < s.samples; first += step) {
    const int64_t count = std::min(step, s.samples - first);
    const at::Tensor rows =
        g.narrow(0, first, count).flatten(3).transpose(2, 3).to(acc.scalar_type());
    const at::Tensor x = inputs(first, count).to(acc.scalar_type());
    for (int64_t i = 0; i < s.groups; ++i) {
      add_group(sum[i], rows.narrow(3, i * m, m), x.narrow(2, i * width, width), left[i], right[i],
                s, kernels);
    }
    summed += count;
    if (summed + step <= level && first + count < s.samples) continue;
    acc.view({s.groups, m, d}).add_(sum.narrow(2, 0, d), alpha);
    sum.zero_();
    summed = 0;
  }
}

}  // namespace hesskern
