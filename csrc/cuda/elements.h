// Matrices in memory as the tile products read them: [K, I] by an offset per row k and one per
// column i.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "axis.h"

namespace hesskern::cuda {

__host__ __device__ inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename To>
__host__ __device__ inline To convert(float value) {
  return static_cast<To>(value);
}
template <typename To>
__host__ __device__ inline To convert(double value) {
  return static_cast<To>(value);
}
template <typename To>
__host__ __device__ inline To convert(BFloat16 value) {
  return static_cast<To>(float_of_bits(static_cast<uint32_t>(value.bits) << 16));
}
template <typename To>
__host__ __device__ inline To convert(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The exponent moves from a bias of 15 to one of 127 by a product, which normalizes subnormal
  // numbers as well; infinities and NaN keep their fraction.
  const bool finite = (value.bits & 0x7c00u) != 0x7c00u;
  const float magnitude =
      finite ? float_of_bits(rest) * 0x1p112f : float_of_bits(rest | 0x7f800000u);
  return static_cast<To>(sign != 0 ? -magnitude : magnitude);
}

// data [K, I] of In, read as Value; zeros outside.
template <typename In, typename Value_>
struct Elements {
  using Value = Value_;
  const In* data;
  Axis k_axis, i_axis;
  int64_t k_end, i_end;

  struct Row {
    int64_t offset;
    bool inside;
  };
  using Column = Row;

  __device__ void select(int64_t) {}
  __device__ Row row(int64_t k) const { return {k_axis.offset(k), k < k_end}; }
  __device__ Column column(int64_t i) const { return {i_axis.offset(i), i < i_end}; }
  __device__ Value load(const Row& row, const Column& column) const {
    if (!row.inside || !column.inside) return Value(0);
    return convert<Value>(data[row.offset + column.offset]);
  }
};

}  // namespace hesskern::cuda
