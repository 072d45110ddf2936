#include <torch/library.h>

#include "checks.h"
#include "core/binding.h"
#include "input_covariance.h"

namespace hesskern::cuda {

namespace {

// acc [d, d] or [d + 1, d + 1] += alpha rows^T rows, rows [count, d] by axes into x
void add_rows(const at::Tensor& acc, const at::Tensor& x, Axis rows, Axis columns, int64_t count,
              int64_t d, double alpha, bool ones) {
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "input_covariance_", [&] {
    with_input<scalar_t>(x, [&](auto* data) {
      using In = std::decay_t<decltype(*data)>;
      const InputCovariance<In, scalar_t> call{
          data, rows, columns, count, d, ones, tf32_allowed(), sum_into<scalar_t>(acc, alpha)};
      run_work(call.plan(), acc.options());
    });
  });
}

// acc and base [d, d] or [d + 1, d + 1], x [N, d]
void input_covariance_(at::Tensor& acc, const at::Tensor& x, double alpha, bool ones,
                       const std::optional<at::Tensor>& base, double beta) {
  check_input_covariance(acc, x, ones, base);
  start(acc, base, beta);
  if (x.size(0) == 0 || acc.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  in_parts(acc, x, [&](const at::Tensor& part, int64_t) {
    add_rows(acc, part, {part.stride(0)}, {part.stride(1)}, part.size(0), part.size(1), alpha,
             ones);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("input_covariance_", &input_covariance_);
}

}  // namespace hesskern::cuda
