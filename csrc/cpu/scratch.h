// Working memory of a kernel call: uninitialized, aligned to cache lines, from
// torch's CPU allocator so that torch's accounting sees it.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hesskern::cpu {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(elements) * sizeof(T))) {
#if defined(__linux__)
    // Scattered writes into many pages miss the TLB; huge pages where they are
    // to be had. The advice may fail, and then changes nothing.
    constexpr uintptr_t kHuge = uintptr_t(1) << 21;
    const auto begin = reinterpret_cast<uintptr_t>(memory_.get());
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last = (begin + static_cast<size_t>(elements) * sizeof(T)) / kHuge * kHuge;
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

}  // namespace hesskern::cpu
