#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "simd.h"
#include "symmetric_update.h"

namespace hesskern::cpu {

namespace {

// Elements of the root buffer: 4 MB of float32 keeps it in the last-level cache.
constexpr int64_t kBuffer = 1 << 20;

// roots [N, c, q] = sqrt(p_c) (g_c - sum_b p_b g_b) in place; p [N, c]. This is
// Q G with diag(p) - p p^T = Q^T Q for probabilities that sum to one.
template <typename T>
void center_and_scale(T* roots, const T* p, int64_t n, int64_t c, int64_t q) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    // Columns in blocks whose mean fits into registers and first-level cache.
    constexpr int64_t kBlock = 64;
    T mean[kBlock];
    for (int64_t sample = begin; sample < end; ++sample) {
      T* r = roots + sample * c * q;
      const T* weight = p + sample * c;
      for (int64_t col = 0; col < q; col += kBlock) {
        const int64_t width = std::min(kBlock, q - col);
        T* block = r + col;
        vectorize([&]() HESSKERN_INLINE {
          for (int64_t j = 0; j < width; ++j) mean[j] = 0;
          for (int64_t i = 0; i < c; ++i) {
            const T w = weight[i];
            for (int64_t j = 0; j < width; ++j) mean[j] += w * block[i * q + j];
          }
          for (int64_t i = 0; i < c; ++i) {
            const T w = std::sqrt(weight[i]);
            for (int64_t j = 0; j < width; ++j) block[i * q + j] = w * (block[i * q + j] - mean[j]);
          }
        });
      }
    }
  });
}

// acc [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
void output_hessian_(at::Tensor& acc, const at::Tensor& jacobian,
                     const std::optional<at::Tensor>& probabilities, double alpha) {
  check_output_hessian(acc, jacobian, probabilities);
  if (jacobian.numel() == 0) return;
  const int64_t n = jacobian.size(0), c = jacobian.size(1), m = jacobian.size(2);
  const bool positions = jacobian.dim() == 4;
  const auto dtype = acc.scalar_type();
  if (!probabilities.has_value() && !positions && jacobian.scalar_type() == dtype &&
      jacobian.is_contiguous()) {
    symmetric_update_(acc, jacobian.view({n * c, m}), alpha);
    return;
  }
  const int64_t per_sample = jacobian.numel() / n;
  const int64_t step = std::clamp<int64_t>(kBuffer / per_sample, 1, n);
  for (int64_t start = 0; start < n; start += step) {
    const int64_t count = std::min(step, n - start);
    at::Tensor roots = jacobian.narrow(0, start, count);
    if (probabilities.has_value()) {
      roots = at::empty(roots.sizes(), jacobian.options().dtype(dtype)).copy_(roots);
      const at::Tensor p = probabilities->narrow(0, start, count).to(dtype).contiguous();
      AT_DISPATCH_FLOATING_TYPES(dtype, "output_hessian_", [&] {
        center_and_scale<scalar_t>(roots.mutable_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(),
                                   count, c, per_sample / c);
      });
    } else {
      roots = roots.to(dtype);
    }
    // [m, count c t]: runs of t stay contiguous, and the GEMM takes it transposed.
    const at::Tensor rows = positions ? roots.permute({2, 0, 1, 3}).reshape({m, -1}).t()
                                      : roots.reshape({count * c, m});
    symmetric_update_(acc, rows, alpha);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("output_hessian_", &output_hessian_);
}

}  // namespace hesskern::cpu
