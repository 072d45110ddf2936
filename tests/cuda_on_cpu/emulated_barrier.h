// csrc/cuda/core/barrier.h on the CPU.
#pragma once

#include <cstdint>

#include "emulation.h"

namespace hesskern::cuda {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer));
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  emulation::barrier_init(barrier, arrivals);
}
inline void barriers_are_ready() {}
inline void barrier_arrive(uint64_t* barrier) {
  emulation::barrier_arrive(barrier, 0);
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulation::barrier_arrive(barrier, bytes);
}
inline bool barrier_passed(uint64_t* barrier, uint32_t parity) {
  return emulation::barrier_passed(barrier, parity);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulation::barrier_wait(barrier, parity);
}
inline void copy_row(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) |
       static_cast<uintptr_t>(bytes)) % 16 != 0) {
    emulation::fail("a bulk copy takes multiples of 16 bytes from and to such addresses");
  }
  emulation::start_bulk_copy({{shared, global, bytes, bytes}}, bytes, barrier);
}

}  // namespace hesskern::cuda
