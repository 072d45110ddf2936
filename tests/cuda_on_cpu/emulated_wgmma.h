// csrc/cuda/core/wgmma.h on the CPU: every thread finds its own sums.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "emulated_warp.h"
#include "emulation.h"

namespace hesskern::cuda {

namespace emulated {

// Every 16-bit number of the format.
template <typename T>
const double* all_numbers() {
  static const std::vector<double> numbers = [] {
    std::vector<double> all(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
      all[bits] = static_cast<double>(to_float(T{static_cast<uint16_t>(bits)}));
    }
    return all;
  }();
  return numbers.data();
}

// An operand in shared memory as its descriptor says: element (i, k), i along M or N.
struct WarpgroupOperand {
  unsigned char* memory;
  uint32_t origin, start, leading, stride;
  bool transposed, swizzled;

  WarpgroupOperand(uint64_t descriptor, bool is_transposed)
      : memory(emulation::dynamic_shared()),
        origin(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(memory))),
        start(field(descriptor, 0)),
        leading(field(descriptor, 16)),
        stride(field(descriptor, 32)),
        transposed(is_transposed),
        swizzled(descriptor >> 62 == 1) {
    if (!swizzled && (descriptor >> 62 != 0 || transposed)) {
      emulation::fail("only lines of 128 bytes are emulated, and matrices [8, 8] along k");
    }
  }

  static uint32_t field(uint64_t descriptor, int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  }
  uint16_t element(uint32_t i, uint32_t k) const {
    // Matrices of 128 bytes: `leading` bytes along k and `stride` along M or N from one to the
    // next.
    const uint32_t offset = !swizzled ? i / 8 * stride + k / 8 * leading + i % 8 * 16 + k % 8 * 2
                            : transposed
                                ? i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                                : i / 8 * stride + i % 8 * 128 + k * 2;
    uint32_t address = start + offset;
    if (swizzled) address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, memory + ((address - origin) & 0x3ffff), sizeof(bits));
    return bits;
  }
};

}  // namespace emulated

template <int Count>
void give_up_registers() {}
template <int Count>
void take_registers() {}

inline void show_to_wgmma() {}

inline void wgmma_fence() {
  emulation::fence_products();
}
inline void wgmma_commit() {
  emulation::close_products();
}
template <int Left>
void wgmma_wait() {
  emulation::wait_for_products(Left);
}
template <int Count>
void pin(float (&)[Count]) {}

template <typename T, int N, bool Transposed, int Size>
void wgmma(float (&d)[Size], uint64_t a, uint64_t b, int keep) {
  const uint32_t thread = threadIdx.x % 128, lane = thread % 32;
  emulation::issue_product(d, N / 2, [=](float* sums) {
    const double* numbers = emulated::all_numbers<T>();
    const emulated::WarpgroupOperand left(a, Transposed), right(b, Transposed);
    double rows[2][16];
    for (uint32_t r = 0; r < 2; ++r) {
      for (uint32_t k = 0; k < 16; ++k) {
        rows[r][k] = numbers[left.element(thread / 32 * 16 + lane / 4 + 8 * r, k)];
      }
    }
    for (uint32_t j = 0; j < N / 4; ++j) {
      const uint32_t column = j / 2 * 8 + 2 * (lane % 4) + j % 2;
      double values[16];
      for (uint32_t k = 0; k < 16; ++k) values[k] = numbers[right.element(column, k)];
      for (uint32_t r = 0; r < 2; ++r) {
        double products[16];
        for (uint32_t k = 0; k < 16; ++k) products[k] = rows[r][k] * values[k];
        float& sum = sums[j / 2 * 4 + 2 * r + j % 2];
        sum = emulated::truncated_sum(keep != 0 ? sum : 0.0f, products);
      }
    }
  });
}

}  // namespace hesskern::cuda
