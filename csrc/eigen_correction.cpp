#include "eigen_correction.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace hesskern {

namespace {

// Sizes of a call, outputs and inputs of one group; inputs with the column of ones.
struct Sizes {
  int64_t samples, roots, positions, groups, outputs, inputs;
  bool ones;

  // R = sum_t g_t x_t^T [m, d] is rotated by U after the sum over positions, or g before: of r m m
  // d and r t m m multiplications the fewer.
  bool outputs_first() const { return positions == 1 || positions < inputs; }
  // The same for V: of r m d d and t d d, which all root rows share.
  bool inputs_first() const { return positions == 1 || positions < roots * outputs; }
  int64_t matrix() const { return roots * outputs * inputs; }

  // Multiplications of a sample: with the order above, and with the sum over positions first.
  int64_t least_work() const {
    return positions * matrix() +
           (outputs_first() ? positions * roots * outputs : matrix()) * outputs +
           (inputs_first() ? positions * inputs : matrix()) * inputs;
  }
  int64_t sums_first_work() const { return matrix() * (positions + outputs + inputs); }
};

// Parts whose sums acc takes as they come; of more, in float64 first.
constexpr int64_t kFewParts = 8;

// acc += alpha times the sums of squares of all groups' samples, part by part. add(first, count)
// adds those of some samples to sum, zero at first; numbers: that one sample takes.
template <class Add>
void in_parts(const at::Tensor& acc, const at::Tensor& sum, double alpha, const Sizes& s,
              int64_t numbers, const CorrectionKernels& kernels, const Add& add) {
  // Without positions the root rows are summed beforehand, and products sum in parts of their own.
  const int64_t level =
      s.positions == 1 ? kernels.products_level : std::max<int64_t>(1, kernels.level / s.roots);
  const int64_t step = std::clamp<int64_t>(kernels.numbers / numbers, 1, level);
  const int64_t held = level / step * step;
  const bool many = (s.samples + held - 1) / held > kFewParts && acc.scalar_type() == at::kFloat;
  const at::Tensor total =
      many ? at::zeros(sum.sizes(), sum.options().dtype(at::kDouble)) : at::Tensor();
  for (int64_t first = 0; first < s.samples; first += step) {
    const int64_t last = std::min(first + step, s.samples);
    add(first, last - first);
    if (last % held != 0 && last < s.samples) continue;
    if (many) {
      total.add_(sum);
    } else {
      acc.add_(sum, alpha);
    }
    sum.zero_();
  }
  if (many) acc.add_(total.to(acc.scalar_type()), alpha);
}

// rows [..., d] V, with ones [rows, 1] V
at::Tensor rotate_inputs(const at::Tensor& rows, const at::Tensor& V, bool ones,
                         const CorrectionKernels& kernels) {
  const int64_t d = rows.size(-1);
  const at::Tensor flat = rows.flatten(0, -2);
  if (!ones) return kernels.matmul(flat, V);
  return kernels.matmul(flat, V.narrow(0, 0, d)).add_(V.select(0, d));
}

// One group: sum [m, columns] += squares; g [n, r, t, m], x [n, t, d] without the ones
void add_group(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x, const at::Tensor& U,
               const at::Tensor& V, const Sizes& s, const CorrectionKernels& kernels) {
  const int64_t n = x.size(0), r = s.roots, t = s.positions, m = s.outputs, d = s.inputs;
  if (t == 1) {
    // (U^T g x^T V)^2 is an outer product of squares.
    at::Tensor left = kernels.matmul(g.reshape({-1, m}), U);
    left.mul_(left);
    if (r > 1) left = left.view({n, r, m}).sum(1);
    const at::Tensor right = rotate_inputs(x, V, s.ones, kernels);
    right.mul_(right);
    sum.narrow(1, 0, d).addmm_(left.t(), right);
    return;
  }
  const bool outputs_first = s.outputs_first(), inputs_first = s.inputs_first();
  at::Tensor left = g, right = x;
  if (outputs_first) left = kernels.matmul(g.reshape({-1, m}), U).view({n, r, t, m});
  if (inputs_first) {
    right = rotate_inputs(x, V, s.ones, kernels).view({n, t, d});
  } else if (s.ones) {
    right = at::cat({x, at::ones({n, t, 1}, x.options())}, 2);
  }
  if (outputs_first && inputs_first && kernels.add_squared_products != nullptr) {
    return kernels.add_squared_products(sum, left, right);
  }
  at::Tensor matrices = at::bmm(left.transpose(2, 3).reshape({n, r * m, t}), right);
  if (!inputs_first) matrices = kernels.matmul(matrices.view({n * r * m, d}), V);
  matrices = matrices.view({n * r, m, d});
  if (!outputs_first) matrices = at::matmul(U.t(), matrices);
  kernels.add_squares(sum, matrices.contiguous());
}

// Rows as they come, [n, t, groups d] from inputs(first, count).
template <class Inputs>
void by_rows(const at::Tensor& acc, const at::Tensor& g, const Inputs& inputs, const at::Tensor& U,
             const at::Tensor& V, double alpha, const Sizes& s, const CorrectionKernels& kernels) {
  const int64_t m = s.outputs, width = s.inputs - (s.ones ? 1 : 0);
  const int64_t columns = (s.inputs + kernels.width - 1) / kernels.width * kernels.width;
  const bool formed = s.positions > 1 && (!s.outputs_first() || !s.inputs_first() ||
                                          kernels.add_squared_products == nullptr);
  // As they come, rotated, and laid out for the products; and the matrices, where they are formed.
  const int64_t numbers =
      s.groups * (s.positions * (3 * s.inputs + 2 * s.roots * m) + (formed ? 3 * s.matrix() : 0));
  const at::Tensor sum = at::zeros({s.groups, m, columns}, acc.options());
  in_parts(acc, sum.narrow(2, 0, s.inputs), alpha, s, numbers, kernels,
           [&](int64_t first, int64_t count) {
             const at::Tensor rows =
                 g.narrow(0, first, count).flatten(3).transpose(2, 3).to(acc.scalar_type());
             const at::Tensor x = inputs(first, count).to(acc.scalar_type());
             for (int64_t i = 0; i < s.groups; ++i) {
               add_group(sum[i], rows.narrow(3, i * m, m), x.narrow(2, i * width, width), U[i],
                         V[i], s, kernels);
             }
           });
}

// A convolution of many positions: the sums over them come first, and are rotated for many samples
// at once.
void by_sums(const at::Tensor& acc, const at::Tensor& g, const at::Tensor& images,
             const ConvGeometry& geometry, const at::Tensor& U, const at::Tensor& V, double alpha,
             const Sizes& s, const CorrectionKernels& kernels) {
  const int64_t m = s.outputs, d = s.inputs;
  // Samples' matrices are read and written by one product after another: of fewer, from the cache.
  constexpr int64_t kCached = 4;
  const int64_t numbers =
      kCached * (3 * s.groups * s.matrix() + images.numel() / s.samples + g.numel() / s.samples);
  const at::Tensor sum = at::zeros({s.groups, d, m}, acc.options());
  in_parts(acc, sum.transpose(1, 2), alpha, s, numbers, kernels, [&](int64_t first, int64_t count) {
    const auto part = [&](const at::Tensor& t) {
      return t.narrow(0, first, count).to(acc.scalar_type());
    };
    const at::Tensor sums = kernels.conv_sums(part(images), part(g).flatten(3), geometry, s.ones);
    for (int64_t i = 0; i < s.groups; ++i) {
      const at::Tensor turned = kernels.matmul(V[i].t(), sums[i].view({d, -1}));
      const at::Tensor matrices = kernels.matmul(turned.view({-1, m}), U[i]).view({d, -1, m});
      kernels.add_squares(sum[i], matrices.transpose(0, 1));
    }
  });
}

// How many times more multiplications sums over positions may take to be as fast as patches.
constexpr double kUnfolding = 1.5;

// [groups, k, k] of either form.
at::Tensor grouped(const at::Tensor& t) {
  return t.dim() == 3 ? t : t.unsqueeze(0);
}

bool empty(const at::Tensor& acc, const Sizes& s) {
  return acc.numel() == 0 || s.samples == 0 || s.roots == 0 || s.positions == 0;
}

}  // namespace

void eigen_correction(const at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                      const at::Tensor& U, const at::Tensor& V, double alpha, bool ones,
                      const CorrectionKernels& kernels) {
  const int64_t groups = check_eigen_correction(acc, g, x, U, V, ones);
  const at::Tensor rows = g.dim() == 4 ? g : g.unsqueeze(3);
  const at::Tensor columns = x.dim() == 3 ? x : x.unsqueeze(2);
  const Sizes s{x.size(0), g.size(1), rows.size(3), groups, g.size(2) / groups, acc.size(1), ones};
  if (empty(acc, s)) return;
  const auto inputs = [&](int64_t first, int64_t count) {
    return columns.narrow(0, first, count).transpose(1, 2);
  };
  by_rows(acc.view({groups, s.outputs, s.inputs}), rows, inputs, grouped(U), grouped(V), alpha, s,
          kernels);
}

void conv_eigen_correction(const at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                           const at::Tensor& U, const at::Tensor& V, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, double alpha, bool ones,
                           const CorrectionKernels& kernels) {
  const ConvGeometry c = check_conv_eigen_correction(acc, g, x, U, V, kernel_size, stride, padding,
                                                     dilation, groups, ones);
  const Sizes s{x.size(0), g.size(1), c.positions(), groups, g.size(2) / groups, acc.size(1), ones};
  if (empty(acc, s)) return;
  const at::Tensor images = x.dim() == 4 ? x : x.unsqueeze(2);
  const at::Tensor sums = acc.view({groups, s.outputs, s.inputs});
  const bool sums_first =
      s.positions > 1 && kernels.conv_sums != nullptr &&
      static_cast<double>(s.sums_first_work()) <= kUnfolding * static_cast<double>(s.least_work());
  if (sums_first && kernels.conv_sums_fit(c, images.size(2), images.size(3))) {
    return by_sums(sums, g, images, c, grouped(U), grouped(V), alpha, s, kernels);
  }
  const auto inputs = [&](int64_t first, int64_t count) {
    return at::im2col(images.narrow(0, first, count), {c.kernel_h, c.kernel_w},
                      {c.dilation_h, c.dilation_w}, {c.padding_h, c.padding_w},
                      {c.stride_h, c.stride_w})
        .transpose(1, 2);
  };
  by_rows(sums, g, inputs, grouped(U), grouped(V), alpha, s, kernels);
}

}  // namespace hesskern
