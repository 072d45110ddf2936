#include <torch/library.h>

#include <optional>

#include "checks.h"
#include "core/binding.h"
#include "input_covariance.h"
#include "output_hessian.h"

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

// acc [m, m] += alpha sum of the rows of jacobian [N, c, m] or [N, c, m, t]
void add_root_rows(const at::Tensor& acc, const at::Tensor& jacobian, double alpha) {
  const int64_t n = jacobian.size(0), c = jacobian.size(1), m = jacobian.size(2);
  const int64_t t = jacobian.dim() == 4 ? jacobian.size(3) : 1;
  const bool joins = n == 1 || c == 1 || jacobian.stride(0) == c * jacobian.stride(1);
  const int64_t joined = c == 1 ? jacobian.stride(0) : jacobian.stride(1);
  Axis rows{joined};
  if (t > 1) {
    if (!joins) return add_root_rows(acc, jacobian.contiguous(), alpha);
    rows = {jacobian.stride(3), t, joined};
  } else if (!joins) {
    rows = {jacobian.stride(1), c, jacobian.stride(0)};
  }
  add_rows(acc, jacobian, rows, {jacobian.stride(2)}, n * c * t, m, alpha, false);
}

// acc [m, m], jacobian [N, c, m] or [N, c, m, t] of its dtype, p [N, c] contiguous of its dtype
void add_softmax_rows(const at::Tensor& acc, const at::Tensor& jacobian, const at::Tensor& p,
                      double alpha) {
  const bool positions = jacobian.dim() == 4;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "output_hessian_", [&] {
    OutputHessian<scalar_t> call{};
    call.classes = jacobian.size(1);
    call.outputs = jacobian.size(2);
    call.positions = positions ? jacobian.size(3) : 1;
    call.sample_stride = jacobian.stride(0);
    call.class_stride = jacobian.stride(1);
    call.output_stride = jacobian.stride(2);
    call.position_stride = positions ? jacobian.stride(3) : 0;
    call.tf32 = tf32_allowed();
    call.sum = sum_into<scalar_t>(acc, alpha);
    call.samples = jacobian.size(0);
    call.jacobian = jacobian.const_data_ptr<scalar_t>();
    call.probabilities = p.const_data_ptr<scalar_t>();
    run_work(call.plan(), acc.options());
  });
}

// acc [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
void output_hessian_(at::Tensor& acc, const at::Tensor& jacobian,
                     const std::optional<at::Tensor>& probabilities, double alpha) {
  check_output_hessian(acc, jacobian, probabilities);
  // The weights of a single class are zero.
  if (jacobian.numel() == 0 || (probabilities.has_value() && jacobian.size(1) == 1)) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  if (!probabilities.has_value()) {
    in_parts(acc, jacobian,
             [&](const at::Tensor& part, int64_t) { add_root_rows(acc, part, alpha); });
    return;
  }
  const auto dtype = acc.scalar_type();
  const at::Tensor p = probabilities->to(dtype).contiguous();
  const int64_t n = jacobian.size(0);
  const bool direct = jacobian.scalar_type() == dtype;
  const int64_t step = direct ? n : std::clamp<int64_t>(kConvert / (jacobian.numel() / n), 1, n);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    add_softmax_rows(acc, jacobian.narrow(0, first, count).to(dtype), p.narrow(0, first, count),
                     alpha);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("output_hessian_", &output_hessian_);
}

}  // namespace hesskern::cuda
