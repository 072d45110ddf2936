// The warp's primitives of csrc/cuda/warp.h, by exchange between the emulated lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "axis.h"
#include "emulation.h"

namespace hesskern::cuda {

inline unsigned char* dynamic_shared() {
  return emulation::dynamic_shared();
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_float(Float16 value) {
  _Float16 narrow;
  std::memcpy(&narrow, &value, sizeof(narrow));
  return static_cast<float>(narrow);
}

namespace emulated {

struct Operands {
  float a[4], b[2];
};
struct HalfOperands {
  uint32_t a[4], b[2];
};

// The low 13 bits of an operand do not enter.
inline double operand(float value) {
  return float_of(bits_of(value) & 0xffffe000u);
}

// Tensor cores cut off what does not fit instead of rounding it.
inline float cut_off(double value) {
  float rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value)) {
    rounded = std::nextafter(rounded, 0.0f);
  }
  return rounded;
}

}  // namespace emulated

inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  emulated::Operands mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const auto* lanes =
      static_cast<const emulated::Operands*>(emulation::warp_exchange(&mine, sizeof(mine)));
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int part = 0; part < 4; ++part) {
    // Element (row, column) of c; a's element (row, k) and b's (k, column) lie with these lanes.
    const int row = g + part / 2 * 8, column = 2 * t + part % 2;
    double total = c[part];
    for (int k = 0; k < 8; ++k) {
      const float left = lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
      const float right = lanes[column * 4 + k % 4].b[k / 4];
      total += emulated::operand(left) * emulated::operand(right);
    }
    c[part] = emulated::cut_off(total);
  }
  emulation::warp_barrier();
}

template <typename In>
void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, In) {
  emulated::HalfOperands mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const auto* lanes =
      static_cast<const emulated::HalfOperands*>(emulation::warp_exchange(&mine, sizeof(mine)));
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  const auto half_of = [&](uint32_t word, int k) {
    return static_cast<double>(to_float(In{static_cast<uint16_t>(word >> k % 2 * 16)}));
  };
  for (int part = 0; part < 4; ++part) {
    const int row = g + part / 2 * 8, column = 2 * t + part % 2;
    double total = c[part];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t right = lanes[column * 4 + k % 8 / 2].b[k / 8];
      total += half_of(left, k) * half_of(right, k);
    }
    c[part] = emulated::cut_off(total);
  }
  emulation::warp_barrier();
}

inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed) {
  const auto* rows =
      static_cast<const uint16_t* const*>(emulation::warp_exchange(&row, sizeof(row)));
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int i, int j) {
      uint16_t value;
      std::memcpy(&value, rows[8 * matrix + i] + j, sizeof(value));
      return static_cast<uint32_t>(value);
    };
    const uint32_t first = transposed ? element(2 * t, g) : element(g, 2 * t);
    const uint32_t second = transposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
    words[matrix] = first | second << 16;
  }
  emulation::warp_barrier();
}

inline void copy_piece(void* shared, const void* global, int bytes) {
  emulation::start_copy(shared, global, bytes, 16);
}
inline void copy_word(float* shared, const float* global, bool inside) {
  emulation::start_copy(shared, global, inside ? 4 : 0, 4);
}
// A unit off, as the device's may be.
inline float square_root(float value) {
  return value == 0.0f ? 0.0f : std::nextafter(std::sqrt(value), 2.0f * value + 1.0f);
}
inline void close_copies() {
  emulation::close_copies();
}
template <int Groups>
void wait_for_copies() {
  emulation::wait_for_copies(Groups);
}

template <typename T>
T from_lane_xor(T value, int mask) {
  const auto* lanes = static_cast<const T*>(emulation::warp_exchange(&value, sizeof(value)));
  const T other = lanes[emulation::lane() ^ mask];
  emulation::warp_barrier();
  return other;
}

}  // namespace hesskern::cuda
