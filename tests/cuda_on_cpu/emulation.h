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
#include <vector>

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

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
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

// Ends the program with what a kernel did that no device allows.
[[noreturn]] void fail(const char* what);

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

// Copies size bytes (4, 8 or 16) to shared memory, the first bytes of them from global and zeros
// behind: not before the thread waits for the group that the copy belongs to.
void start_copy(void* shared, const void* global, int bytes, int size);
void close_copies();
void wait_for_copies(int latest_groups_left);

// A product of the thread's warpgroup (wgmma) that adds to its count sums: issued it changes
// nothing but that the sums hold NaN, and it is done, reading shared memory then, when the thread
// waits for the group that it belongs to.
void issue_product(float* sums, int count, std::function<void(float*)> product);
// Sums may be products' from here to the thread's next wait.
void fence_products();
void close_products();
void wait_for_products(int latest_groups_left);

// Runs body once for every thread of every block. An error, if the launch is one that a device
// would refuse.
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body);

// The most dynamic shared memory that the kernel was allowed so far.
size_t& shared_limit(const void* kernel);

// Kernels launched so far.
std::set<const void*>& launched();

// The device that launchers find. Other properties are another device, so that what a launcher
// remembers of one is not taken for the other's.
struct Properties {
  int processors = 2;
  int most_shared = 227 << 10;
  // 10 * major + minor.
  int capability = 90;

  bool operator<(const Properties& other) const {
    return std::tie(processors, most_shared, capability) <
           std::tie(other.processors, other.most_shared, other.capability);
  }
};
Properties& device();
int device_ordinal();

// Barriers in shared memory that count arrivals and bytes (mbarrier): a phase ends when all
// arrivals and all bytes that they announced are there.
void barrier_init(void* barrier, int arrivals);
// The thread arrives and announces bytes.
void barrier_arrive(void* barrier, int bytes);
// Whether the phase of that parity is over; true of a fresh barrier with parity 1.
bool barrier_passed(void* barrier, unsigned parity);
// Returns when it is.
void barrier_wait(void* barrier, unsigned parity);

// A piece of shared memory that the copy engine fills.
struct Piece {
  void* shared;
  const void* global;
  // The first of them come from global, zeros behind.
  int bytes, size;
};
// Pieces that count as so many bytes on the barrier. They are copied when a thread next looks at
// the barrier, as late as may be; until then their places hold NaN.
void start_bulk_copy(std::vector<Piece> pieces, int bytes, void* barrier);

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

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  hesskern::cuda::emulation::shared_limit(kernel) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// As shared memory and threads allow, registers aside.
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*,
                                                                 int threads, size_t shared) {
  const int most = hesskern::cuda::emulation::device().most_shared;
  const int by_memory = most / static_cast<int>(shared > 1024 ? shared : 1024);
  *blocks = by_memory < 2048 / threads ? by_memory : 2048 / threads;
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
  *device = hesskern::cuda::emulation::device_ordinal();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const hesskern::cuda::emulation::Properties& device = hesskern::cuda::emulation::device();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.processors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.most_shared
           : attribute == cudaDevAttrComputeCapabilityMajor       ? device.capability / 10
                                                                  : device.capability % 10;
  return cudaSuccess;
}
