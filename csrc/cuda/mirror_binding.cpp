#include <torch/library.h>

#include "checks.h"
#include "core/binding.h"
#include "mirror.h"

namespace hesskern::cuda {

namespace {

// acc [d, d] or [g, d, d]
void mirror_(at::Tensor& acc) {
  check_mirror(acc);
  if (acc.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "mirror_", [&] {
    const auto sum = sum_into<scalar_t>(acc, 1.0);
    C10_CUDA_CHECK(mirror(sum.acc, sum.groups, sum.order, sum.group_stride, sum.row_stride,
                          sum.column_stride, c10::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("mirror_", &mirror_);
}

}  // namespace hesskern::cuda
