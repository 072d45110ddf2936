// CUDA's execution model on the CPU, as far as csrc/cuda uses it: blocks one after another, a
// block's threads as fibers (or, with HESSKERN_EMULATE_THREADS, as real threads, so that
// ThreadSanitizer sees their races), warps of 32 lanes, barriers, shared memory. Shared memory
// starts as NaN in every block and is exactly as large as the launch says, so that reading what
// was not written, or beyond it, shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() hesskern::cuda::emulation::block_barrier()
// One block runs at a time.
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace hesskern::cuda::emulation {

// A number that the running thread asks for: threadIdx.x and its like.
struct Coordinate {
  unsigned (*get)();
  operator unsigned() const { return get(); }
};
struct Coordinates {
  Coordinate x, y, z;
};

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();
unsigned char* dynamic_shared();
void block_barrier();
void warp_barrier();

// The size bytes at value of all 32 lanes of the warp, one after another; they stay until the
// warp's next barrier.
const void* warp_exchange(const void* value, size_t size);

// Copies size bytes (4 or 16) to shared memory, the first bytes of them from global and zeros
// behind: not before the thread waits for the group that the copy belongs to.
void start_copy(void* shared, const void* global, int bytes, int size);
void close_copies();
void wait_for_copies(int latest_groups_left);

// Runs body once for every thread of every block. An error, if the launch is one that a device
// would refuse.
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body);

// The most dynamic shared memory that the kernel was allowed so far.
size_t& shared_limit(const void* kernel);

// Kernels launched so far.
std::set<const void*>& launched();

// What multiprocessor counts and limits of shared memory are answered with.
int& multiprocessor_count();
int& most_shared();
constexpr int kMostShared = 227 << 10;

template <auto Get>
constexpr Coordinates coordinates() {
  return {{[] { return Get().x; }}, {[] { return Get().y; }}, {[] { return Get().z; }}};
}

}  // namespace hesskern::cuda::emulation

inline constexpr auto threadIdx =
    hesskern::cuda::emulation::coordinates<hesskern::cuda::emulation::thread_index>();
inline constexpr auto blockIdx =
    hesskern::cuda::emulation::coordinates<hesskern::cuda::emulation::block_index>();
inline constexpr auto blockDim =
    hesskern::cuda::emulation::coordinates<hesskern::cuda::emulation::block_size>();
inline constexpr auto gridDim =
    hesskern::cuda::emulation::coordinates<hesskern::cuda::emulation::grid_size>();

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  hesskern::cuda::emulation::shared_limit(reinterpret_cast<const void*>(kernel)) =
      static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  namespace emulation = hesskern::cuda::emulation;
  if (config->dynamicSmemBytes > emulation::shared_limit(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::launched().insert(reinterpret_cast<const void*>(kernel));
  // Kernel parameters are copies, as on a device: every thread gets its own.
  const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  return emulation::run(*config, [&] { std::apply(kernel, parameters); });
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  namespace emulation = hesskern::cuda::emulation;
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::multiprocessor_count()
                                                       : emulation::most_shared();
  return cudaSuccess;
}
