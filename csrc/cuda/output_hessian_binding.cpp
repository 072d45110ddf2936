#include <torch/library.h>

#include <optional>
#include <type_traits>

#include "checks.h"
#include "core/binding.h"
#include "output_hessian.h"
#include "root_rows.h"

namespace hesskern::cuda {

namespace {

// The sizes and strides of a jacobian [N, c, m] or [N, c, m, t] for a call that adds to acc [m, m].
template <class Call>
Call call_of(const at::Tensor& acc, const at::Tensor& jacobian, double alpha) {
  const bool positions = jacobian.dim() == 4;
  Call call{};
  call.samples = jacobian.size(0);
  call.classes = jacobian.size(1);
  call.outputs = jacobian.size(2);
  call.positions = positions ? jacobian.size(3) : 1;
  call.sample_stride = jacobian.stride(0);
  call.class_stride = jacobian.stride(1);
  call.output_stride = jacobian.stride(2);
  call.position_stride = positions ? jacobian.stride(3) : 0;
  call.tf32 = tf32_allowed();
  call.sum =
      sum_into<std::remove_const_t<std::remove_pointer_t<decltype(call.sum.acc)>>>(acc, alpha);
  return call;
}

// acc [m, m] += alpha sum of the rows of jacobian [N, c, m] or [N, c, m, t]
void add_root_rows(const at::Tensor& acc, const at::Tensor& jacobian, double alpha) {
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "output_hessian_", [&] {
    with_input<scalar_t>(jacobian, [&](auto* data) {
      using In = std::decay_t<decltype(*data)>;
      auto call = call_of<RootRows<In, scalar_t>>(acc, jacobian, alpha);
      if (!call.readable()) return add_root_rows(acc, jacobian.contiguous(), alpha);
      call.jacobian = data;
      run_work(call.plan(), acc.options());
    });
  });
}

// Whether jacobian [N, c, m] or [N, c, m, t] and p [N, c], contiguous of acc's dtype, were added to
// acc [m, m]: not where the jacobian has to be converted to acc's dtype first.
bool add_softmax_rows(const at::Tensor& acc, const at::Tensor& jacobian, const at::Tensor& p,
                      double alpha) {
  if (!read_directly(acc, jacobian)) return false;
  bool added = false;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "output_hessian_", [&] {
    with_input<scalar_t>(jacobian, [&](auto* data) {
      using In = std::decay_t<decltype(*data)>;
      auto call = call_of<OutputHessian<In, scalar_t>>(acc, jacobian, alpha);
      call.jacobian = data;
      call.probabilities = p.const_data_ptr<scalar_t>();
      added = call.readable();
      if (added) run_work(call.plan(), acc.options());
    });
  });
  return added;
}

// acc and base [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
void output_hessian_(at::Tensor& acc, const at::Tensor& jacobian,
                     const std::optional<at::Tensor>& probabilities, double alpha,
                     const std::optional<at::Tensor>& base, double beta) {
  check_output_hessian(acc, jacobian, probabilities, base);
  start(acc, base, beta);
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
  if (add_softmax_rows(acc, jacobian, p, alpha)) return;
  const int64_t n = jacobian.size(0);
  const int64_t step = std::clamp<int64_t>(kConvert / (jacobian.numel() / n), 1, n);
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
