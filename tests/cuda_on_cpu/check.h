// What the checks of the emulated kernels share: memory, numbers, comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/axis.h"
#include "core/elements.h"
#include "emulation.h"

namespace hesskern::cuda::check {

// Memory of exactly that size, poisoned with NaN: AddressSanitizer guards its ends.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t size) : data_(new T[static_cast<size_t>(size)]), size_(size) {
    std::memset(static_cast<void*>(data_.get()), 0xff, static_cast<size_t>(size) * sizeof(T));
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_;
};

inline std::mt19937& generator() {
  static std::mt19937 engine(0);
  return engine;
}

inline double normal() {
  return std::normal_distribution<double>()(generator());
}

// value rounded to the format, as it lies in memory.
template <typename In>
In store(double value) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<In, Float16>) {
    const _Float16 narrow = static_cast<_Float16>(value);
    Float16 stored;
    std::memcpy(&stored, &narrow, sizeof(stored));
    return stored;
  } else {
    return static_cast<In>(value);
  }
}

// What the CPU itself makes of a stored number.
template <typename In>
double value_of(In stored) {
  if constexpr (std::is_same_v<In, Float16>) {
    _Float16 narrow;
    std::memcpy(&narrow, &stored, sizeof(narrow));
    return static_cast<double>(narrow);
  } else if constexpr (std::is_same_v<In, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(stored.bits) << 16;
    float narrow;
    std::memcpy(&narrow, &bits, sizeof(narrow));
    return narrow;
  } else {
    return static_cast<double>(stored);
  }
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline void report(const std::string& name, double error, double limit) {
  const bool good = error <= limit;
  std::printf("%s %-72s error %.2e, limit %.0e\n", good ? "ok  " : "FAIL", name.c_str(), error,
              limit);
  if (!good) ++failures();
}

// ‖found - expected‖ / ‖expected‖ over count elements; NaN counts as infinite.
inline double relative_error(int64_t count, const std::function<double(int64_t)>& found,
                             const std::function<double(int64_t)>& expected) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double delta = found(i) - expected(i);
    if (!std::isfinite(delta)) return std::numeric_limits<double>::infinity();
    difference += delta * delta;
    norm += expected(i) * expected(i);
  }
  return std::sqrt(difference) / (norm > 0 ? std::sqrt(norm) : 1.0);
}

// Relative error that a format and its arithmetic may have.
template <typename T>
double limit_of(bool tf32 = false) {
  if (sizeof(T) == 8) return 1e-13;
  return tf32 ? 2e-3 : 1e-6;
}

}  // namespace hesskern::cuda::check
