// The warp's primitives of csrc/cuda/warp.h, by exchange between the emulated lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/axis.h"
#include "emulation.h"

namespace hesskern::cuda {

inline unsigned char* dynamic_shared() {
  return emulation::dynamic_shared();
}

inline int anew(int value) {
  return value;
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
  float a[4][2], b[2][2];
};

// The low 13 bits of an operand do not enter.
inline double operand(float value) {
  return float_of(bits_of(value) & 0xffffe000u);
}

// c plus products, as tensor cores add: every addend is cut, toward zero, to multiples of 2^-26 of
// the power of two above the largest, and the sum to 24 bits. Measured on an H200: the biases of
// long sums come out to two digits.
template <int Count>
float truncated_sum(float c, const double (&products)[Count]) {
  const auto magnitude = [](double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits & 0x7fffffffffffffffu;
  };
  // Bits are ordered as magnitudes are, infinities and NaN last.
  constexpr uint64_t kInfinity = 0x7ff0000000000000u;
  uint64_t largest = magnitude(c);
  for (const double product : products) {
    const uint64_t bits = magnitude(product);
    largest = bits > largest ? bits : largest;
  }
  if (largest == 0 || largest >= kInfinity) {
    double plain = c;
    for (const double product : products) plain += product;
    return static_cast<float>(plain);
  }
  // The largest lies in [2^(exponent - 1), 2^exponent); floats' products are normal doubles.
  const int exponent = static_cast<int>(largest >> 52) - 1022;
  const auto power_of_two = [](int e) {
    const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
  };
  const double to_units = power_of_two(26 - exponent), unit = power_of_two(exponent - 26);
  int64_t total = static_cast<int64_t>(c * to_units);
  for (const double product : products) total += static_cast<int64_t>(product * to_units);
  uint64_t size = static_cast<uint64_t>(total < 0 ? -total : total);
  int cut = 0;
  while (size >> cut >= 1u << 24) ++cut;
  size = size >> cut << cut;
  const double result = static_cast<double>(size) * unit;
  return static_cast<float>(total < 0 ? -result : result);
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
    double products[8];
    for (int k = 0; k < 8; ++k) {
      const float left = lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
      const float right = lanes[column * 4 + k % 4].b[k / 4];
      products[k] = emulated::operand(left) * emulated::operand(right);
    }
    c[part] = emulated::truncated_sum(c[part], products);
  }
  emulation::warp_barrier();
}

template <typename In>
void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, In) {
  emulated::HalfOperands mine;
  const auto unpack = [](uint32_t word, float (&pair)[2]) {
    pair[0] = to_float(In{static_cast<uint16_t>(word)});
    pair[1] = to_float(In{static_cast<uint16_t>(word >> 16)});
  };
  for (int i = 0; i < 4; ++i) unpack(a[i], mine.a[i]);
  for (int i = 0; i < 2; ++i) unpack(b[i], mine.b[i]);
  const auto* lanes =
      static_cast<const emulated::HalfOperands*>(emulation::warp_exchange(&mine, sizeof(mine)));
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int part = 0; part < 4; ++part) {
    const int row = g + part / 2 * 8, column = 2 * t + part % 2;
    double products[16];
    for (int k = 0; k < 16; ++k) {
      const double left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2][k % 2];
      const double right = lanes[column * 4 + k % 8 / 2].b[k / 8][k % 2];
      products[k] = left * right;
    }
    c[part] = emulated::truncated_sum(c[part], products);
  }
  emulation::warp_barrier();
}

template <typename In>
void multiply_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                   const float (&c)[4], In type) {
  float sums[4];
  std::memcpy(sums, c, sizeof(sums));
  multiply_half(sums, a, b, type);
  std::memcpy(d, sums, sizeof(sums));
}

inline void multiply_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
                          Float16 type) {
  const uint32_t left[4] = {a[0], a[1], 0, 0}, right[2] = {b, 0};
  multiply_half(d, left, right, c, type);
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
inline void copy_two_words(void* shared, const void* global, bool inside) {
  emulation::start_copy(shared, global, inside ? 8 : 0, 8);
}
inline void copy_word(float* shared, const float* global, bool inside) {
  emulation::start_copy(shared, global, inside ? 4 : 0, 4);
}
// A unit off, as the device's may be.
inline float square_root(float value) {
  return value == 0.0f ? 0.0f : std::nextafter(std::sqrt(value), 2.0f * value + 1.0f);
}
inline int read_only(const int* pointer) {
  return *pointer;
}
inline float read_only(const float* pointer) {
  return *pointer;
}
inline void raise_flag(int* flag) {
  __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
}
inline void raise_to(uint32_t* place, uint32_t value) {
  uint32_t seen = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(place, &seen, value, false, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}
inline void close_copies() {
  emulation::close_copies();
}
template <int Groups>
void wait_for_copies() {
  emulation::wait_for_copies(Groups);
}

template <int Count>
void read_once(float (&values)[Count], const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(values) != 0) std::abort();
  std::memcpy(values, from, sizeof(values));
}

template <typename T>
T from_lane_xor(T value, int mask) {
  const auto* lanes = static_cast<const T*>(emulation::warp_exchange(&value, sizeof(value)));
  const T other = lanes[emulation::lane() ^ mask];
  emulation::warp_barrier();
  return other;
}

inline uint32_t warp_max(uint32_t value) {
  const auto* lanes = static_cast<const uint32_t*>(emulation::warp_exchange(&value, sizeof(value)));
  uint32_t most = 0;
  for (int lane = 0; lane < 32; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  emulation::warp_barrier();
  return most;
}

inline uint32_t warp_or(uint32_t value) {
  const auto* lanes = static_cast<const uint32_t*>(emulation::warp_exchange(&value, sizeof(value)));
  uint32_t all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= lanes[lane];
  emulation::warp_barrier();
  return all;
}

inline void warp_barrier() {
  emulation::warp_barrier();
}

inline uint32_t float16_pair(float low, float high) {
  const _Float16 values[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t word;
  std::memcpy(&word, values, sizeof(word));
  return word;
}
inline void floats_of_pair(uint32_t word, float& low, float& high) {
  low = to_float(Float16{static_cast<uint16_t>(word)});
  high = to_float(Float16{static_cast<uint16_t>(word >> 16)});
}

}  // namespace hesskern::cuda
