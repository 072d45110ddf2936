// How every launcher of this folder starts its kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device.h"

namespace hesskern::cuda {

// Threads of every block that multiplies tiles.
constexpr int kThreads = 256;

// kernel on grid x block threads with shared_bytes of dynamic shared memory; the launch's error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Elements of float, so that what follows them in a workspace begins at a multiple of 16 bytes.
inline int64_t whole_pieces(int64_t elements) {
  return ceil_div(elements, 4) * 4;
}

// Blocks of kThreads that walk over so many elements in strides of the grid.
inline dim3 grid_for(int64_t elements) {
  const int64_t most = 16 * current_device().processors;
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(elements, kThreads), 1, most)));
}

}  // namespace hesskern::cuda
