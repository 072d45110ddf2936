// What a call of an operator will do, decided once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace hesskern::cuda {

// workspace: elements of T that run needs at an address that is a multiple of 16 bytes.
template <typename T>
struct Work {
  int64_t workspace = 0;
  std::function<cudaError_t(T* workspace, cudaStream_t stream)> run;
};

}  // namespace hesskern::cuda
