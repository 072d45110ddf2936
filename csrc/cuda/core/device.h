// What the launchers ask of the current device; asked once, since a call's host time is most of
// what a small problem takes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace hesskern::cuda {

struct Device {
  int processors = 1;
  // Bytes of shared memory that a block may ask for.
  size_t shared = 48 << 10;
  // 10 * major + minor.
  int capability = 0;

  // Whether the kernels for compute capability 9.0 alone were built and run here.
  bool hopper() const {
#ifdef HESSKERN_SM90A
    return capability == 90;
#else
    return false;
#endif
  }
};

// The current device.
const Device& current_device();

// Lets blocks of the kernel have so much dynamic shared memory on the current device.
cudaError_t allow_shared(const void* kernel, size_t bytes);

// Blocks of the kernel that the current device holds at once, at least 1.
int resident_blocks(const void* kernel, int threads, size_t shared);

}  // namespace hesskern::cuda
