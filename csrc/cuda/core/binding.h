// From tensors to the launchers of the .cu files, which know no torch: dtypes, parts of large
// tensors, workspaces, the current stream.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "axis.h"
#include "work.h"

namespace hesskern::cuda {

// Elements converted to another dtype at a time.
constexpr int64_t kConvert = 1 << 26;

// Whether torch.set_float32_matmul_precision allows less than float32.
inline bool tf32_allowed() {
  return at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
}

// Runs what a plan says on the current stream, with a workspace of these options.
template <typename T>
void run_work(const Work<T>& work, const at::TensorOptions& options) {
  const at::Tensor workspace = at::empty({work.workspace}, options);
  C10_CUDA_CHECK(work.run(workspace.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream()));
}

// visit(pointer of the kernels' own type to t's data); t is T, bfloat16 or float16.
template <typename T, class Visit>
void with_input(const at::Tensor& t, Visit visit) {
  if constexpr (std::is_same_v<T, float>) {
    if (t.scalar_type() == at::kBFloat16) {
      return visit(static_cast<const BFloat16*>(t.const_data_ptr()));
    }
    if (t.scalar_type() == at::kHalf) return visit(static_cast<const Float16*>(t.const_data_ptr()));
  }
  visit(t.const_data_ptr<T>());
}

// Whether the kernels read t as it is: acc's dtype, or a narrower one into float32.
inline bool read_directly(const at::Tensor& acc, const at::Tensor& t) {
  return acc.scalar_type() == t.scalar_type() || acc.scalar_type() == at::kFloat;
}

// acc := beta base, or beta acc; where beta is zero, values do not count.
inline void start(at::Tensor& acc, const std::optional<at::Tensor>& base, double beta) {
  if (beta == 0) {
    acc.zero_();
    return;
  }
  if (base.has_value()) acc.copy_(*base);
  if (beta != 1) acc.mul_(beta);
}

// run(part) for parts of t [N, ...] along its first axis that the kernels can read.
template <class Run>
void in_parts(const at::Tensor& acc, const at::Tensor& t, Run run) {
  if (read_directly(acc, t)) return run(t, 0);
  const int64_t n = t.size(0);
  const int64_t step = std::clamp<int64_t>(kConvert / std::max<int64_t>(t.numel() / n, 1), 1, n);
  for (int64_t first = 0; first < n; first += step) {
    run(t.narrow(0, first, std::min(step, n - first)).to(acc.scalar_type()), first);
  }
}

// acc [d, d] or [g, d, d]
template <typename T>
SymmetricSum<T> sum_into(const at::Tensor& acc, double alpha) {
  const bool grouped = acc.dim() == 3;
  return {acc.mutable_data_ptr<T>(),
          grouped ? acc.size(0) : 1,
          acc.size(-1),
          grouped ? acc.stride(0) : 0,
          acc.stride(-2),
          acc.stride(-1),
          static_cast<T>(alpha)};
}

}  // namespace hesskern::cuda
