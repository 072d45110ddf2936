// The CUDA side of the operators: tensors, device and stream on the way into the
// launchers of the .cu files, which know no torch.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "mirror.h"

namespace hesskern::cuda {

namespace {

// acc [d, d] or [g, d, d]
void mirror_(at::Tensor& acc) {
  check_mirror(acc);
  if (acc.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  const bool grouped = acc.dim() == 3;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "mirror_", [&] {
    C10_CUDA_CHECK(mirror(acc.mutable_data_ptr<scalar_t>(), grouped ? acc.size(0) : 1, acc.size(-1),
                          grouped ? acc.stride(0) : 0, acc.stride(-2), acc.stride(-1),
                          c10::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("mirror_", &mirror_);
}

}  // namespace hesskern::cuda
