// Checks of the operators that accumulate squares in an eigenbasis, as those of checks.h.
#pragma once

#include "checks.h"

namespace hesskern {

// What both operators say of acc [m, d], g [N, r, m, ...], x [N, ...], U and V; inputs: d of one
// group, with the column of ones if there is one.
inline void check_correction(const char* op, const at::Tensor& acc, const at::Tensor& g,
                             const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                             int64_t groups, int64_t inputs, bool ones) {
  const char* with_ones = ones ? " with ones" : "";
  TORCH_CHECK_VALUE(g.size(0) == x.size(0), op, ": x has ", x.size(0), " samples but g has ",
                    g.size(0));
  const int64_t outputs = g.size(2);
  TORCH_CHECK_VALUE(outputs % groups == 0, op, ": groups must divide the number of outputs ",
                    outputs, ", got ", groups);
  TORCH_CHECK_VALUE(acc.dim() == 2 && acc.size(0) == outputs && acc.size(1) == inputs, op,
                    ": acc must be [m, d] = [", outputs, ", ", inputs, "] for g ", g.sizes(),
                    " and x ", x.sizes(), with_ones, ", got ", acc.sizes());
  const auto check_basis = [&](const char* name, const at::Tensor& basis, int64_t order) {
    const bool plain =
        basis.dim() == 2 && groups == 1 && basis.size(0) == order && basis.size(1) == order;
    const bool grouped = basis.dim() == 3 && basis.size(0) == groups && basis.size(1) == order &&
                         basis.size(2) == order;
    TORCH_CHECK_VALUE(plain || grouped, op, ": ", name, " must be ",
                      groups == 1 ? "[k, k] or [1, k, k]" : "[groups, k, k]", " with k = ", order,
                      " and groups = ", groups, ", got ", basis.sizes());
    TORCH_CHECK_VALUE(basis.scalar_type() == acc.scalar_type(), op, ": ", name, " is ",
                      basis.scalar_type(), " but acc is ", acc.scalar_type());
    TORCH_CHECK_VALUE(basis.device() == acc.device(), op, ": acc is on ", acc.device(), " but ",
                      name, " is on ", basis.device());
    check_separate(op, acc, basis, name);
  };
  check_accumulator(op, acc, g, "g");
  check_accumulator(op, acc, x, "x");
  check_basis("U", U, outputs / groups);
  check_basis("V", V, inputs);
}

// acc [m, d], g [N, r, m] or [N, r, m, t], x [N, groups d] or [N, groups d, t], U [m, m] or
// [groups, m / groups, m / groups], V [d, d] or [groups, d, d]; ones: d counts one more.
// The number of groups.
inline int64_t check_eigen_correction(const at::Tensor& acc, const at::Tensor& g,
                                      const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                                      bool ones) {
  const char* op = "eigen_correction_";
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, op, ": x must be [N, d] or [N, d, t], got ",
                    x.sizes());
  TORCH_CHECK_VALUE(g.dim() == x.dim() + 1, op, ": g must be ",
                    x.dim() == 2 ? "[N, r, m]" : "[N, r, m, t]", " for x ", x.sizes(), ", got ",
                    g.sizes());
  TORCH_CHECK_VALUE(x.dim() == 2 || g.size(3) == x.size(2), op, ": x has ",
                    x.dim() == 3 ? x.size(2) : 1, " positions but g has ", g.size(g.dim() - 1));
  TORCH_CHECK_VALUE(U.dim() == 2 || U.dim() == 3, op,
                    ": U must be [m, m] or [groups, m / groups, m / groups], got ", U.sizes());
  const int64_t groups = U.dim() == 3 ? U.size(0) : 1;
  TORCH_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0, op, ": U's number of groups must ",
                    "divide the number of inputs ", x.size(1), ", got ", groups);
  check_correction(op, acc, g, x, U, V, groups, x.size(1) / groups + (ones ? 1 : 0), ones);
  return groups;
}

// The same with the patches of x [N, C, H, W] or [N, C, L], d = C k k / groups, and
// g [N, r, m, Ho, Wo] or [N, r, m, Lo]
inline ConvGeometry check_conv_eigen_correction(const at::Tensor& acc, const at::Tensor& g,
                                                const at::Tensor& x, const at::Tensor& U,
                                                const at::Tensor& V, at::IntArrayRef kernel_size,
                                                at::IntArrayRef stride, at::IntArrayRef padding,
                                                at::IntArrayRef dilation, int64_t groups,
                                                bool ones) {
  const char* op = "conv_eigen_correction_";
  const ConvGeometry geometry =
      read_conv_geometry(op, x, kernel_size, stride, padding, dilation, groups);
  const bool fits = g.dim() == x.dim() + 1 && g.size(-1) == geometry.out_w &&
                    (g.dim() == 4 || g.size(3) == geometry.out_h);
  TORCH_CHECK_VALUE(fits, op, ": g must be ", x.dim() == 3 ? "[N, r, m, Lo]" : "[N, r, m, Ho, Wo]",
                    " with ", geometry.out_h, " x ", geometry.out_w, " positions for x ", x.sizes(),
                    ", got ", g.sizes());
  const int64_t inputs = x.size(1) / groups * geometry.taps() + (ones ? 1 : 0);
  check_correction(op, acc, g, x, U, V, groups, inputs, ones);
  return geometry;
}

}  // namespace hesskern
