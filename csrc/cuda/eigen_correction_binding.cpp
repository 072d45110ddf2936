#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "core/binding.h"
#include "eigen_correction.h"
#include "squares.h"

namespace hesskern::cuda {

namespace {

// sum [m, d], rows [k, m, d]
void add_squares(const at::Tensor& sum, const at::Tensor& rows) {
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "add_squares", [&] {
    const SquareSum<scalar_t> call{sum.mutable_data_ptr<scalar_t>(),
                                   rows.const_data_ptr<scalar_t>(), rows.size(0), sum.numel()};
    run_work(call.plan(), sum.options());
  });
}

CorrectionKernels kernels() {
  CorrectionKernels own{};
  own.matmul = [](const at::Tensor& a, const at::Tensor& b) { return at::mm(a, b); };
  own.numbers = kConvert;
  // The kernel sums in levels of its own.
  own.level = 1 << 16;
  own.products_level = 1 << 12;
  own.width = 1;
  own.add_squares = &add_squares;
  return own;
}

// acc [m, d], g [N, r, m(, t)], x [N, groups d(, t)], U [(groups,) m, m], V [(groups,) d, d]
void eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                       const at::Tensor& U, const at::Tensor& V, double alpha, bool ones) {
  const c10::cuda::CUDAGuard guard(acc.device());
  eigen_correction(acc, g, x, U, V, alpha, ones, kernels());
}

// acc [m, d], g [N, r, m, Ho, Wo] or [N, r, m, Lo], x [N, C, H, W] or [N, C, L]
void conv_eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                            const at::Tensor& U, const at::Tensor& V, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha, bool ones) {
  const c10::cuda::CUDAGuard guard(acc.device());
  conv_eigen_correction(acc, g, x, U, V, kernel_size, stride, padding, dilation, groups, alpha,
                        ones, kernels());
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("eigen_correction_", &eigen_correction_);
  m.impl("conv_eigen_correction_", &conv_eigen_correction_);
}

}  // namespace hesskern::cuda
