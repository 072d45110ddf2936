// Boxes of matrices of 16-bit elements that the copy engine brings to shared memory (TMA, compute
// capability 9.0 and later). Compiled without nvcc, the same functions come from the emulation in
// tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda.h>
#endif

#include <cstdint>
#include <type_traits>

#include "axis.h"
#include "barrier.h"

namespace hesskern::cuda {

constexpr int kBoxColumns = 64;

// [parts, rows, columns]; the address and both steps are multiples of 16 bytes.
struct BoxedParts {
  const void* data;
  int64_t columns, rows, parts;
  int64_t row_step, part_step;
};

}  // namespace hesskern::cuda

#ifndef __CUDACC__
#include "emulated_tensor_map.h"
#endif

namespace hesskern::cuda {

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

// The driver's function by way of the runtime, so that nothing is linked against the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return found;
}

inline bool tensor_maps_available() {
  return tensor_map_encoder() != nullptr;
}

// map: of boxes of 64 columns and so many rows and parts. In shared memory a row is a line of 128
// bytes, whose piece i of 16 bytes is at i ^ (address / 128 % 8). False: the driver cannot.
template <typename T>
bool encode(TensorMap& map, const BoxedParts& source, int box_rows, int box_parts) {
  if (!tensor_maps_available()) return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(source.columns),
                               static_cast<cuuint64_t>(source.rows),
                               static_cast<cuuint64_t>(source.parts)};
  const cuuint64_t steps[2] = {static_cast<cuuint64_t>(2 * source.row_step),
                               static_cast<cuuint64_t>(2 * source.part_step)};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_parts)};
  const cuuint32_t ones[3] = {1, 1, 1};
  constexpr auto kType = std::is_same_v<T, Float16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_encoder()(&map, kType, 3, const_cast<void*>(source.data), sizes, steps, box,
                              ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Starts to copy the box that begins there to shared memory, at a multiple of 1024 bytes, and
// counts all of its bytes on the barrier; zeros outside of the matrices, coordinates may be
// negative. map: a kernel's parameter.
__device__ inline void copy_box(void* shared, const TensorMap& map, uint64_t* barrier, int column,
                                int row, int part) {
#ifdef HESSKERN_BULK_COPIES
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(row),
      "r"(part)
      : "memory");
#else
  __trap();
#endif
}

#endif

}  // namespace hesskern::cuda
