// Matrices in memory as the tile products read them: [K, I] by an offset per row k and one per
// column i.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "axis.h"

namespace hesskern::cuda {

template <typename T>
__host__ __device__ inline T one() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {0x3f80};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {0x3c00};
  } else {
    return T(1);
  }
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Neighbours that are read and written at once.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T value[2];
};
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

__device__ inline Four<float> load_four(const float* from) {
  return *reinterpret_cast<const Four<float>*>(from);
}

// Two 16-bit elements as an operand's word of tensor-core products.
template <typename T>
__device__ inline uint32_t pair_of(T low, T high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

// data [K, I]; zeros outside.
template <typename T>
struct Elements {
  using Value = T;
  const T* data;
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
  __device__ T load(const Row& row, const Column& column) const {
    return row.inside && column.inside ? data[row.offset + column.offset] : T{};
  }
};

// x [K, I] with one more column, of ones.
template <typename T>
struct RowsWithOnes {
  using Value = T;
  Elements<T> x;
  bool ones;

  using Row = typename Elements<T>::Row;
  struct Column {
    Row x;
    bool one;
  };

  __device__ void select(int64_t) {}
  __device__ Row row(int64_t k) const { return x.row(k); }
  __device__ Column column(int64_t i) const { return {x.column(i), ones && i == x.i_end}; }
  __device__ T load(const Row& row, const Column& column) const {
    if (column.one && row.inside) return one<T>();
    return x.load(row, column.x);
  }
  // Where eight columns begin, an offset of row() before, if they lie side by side at a multiple of
  // 16 bytes, all in x; null elsewhere.
  __device__ const T* eight(int64_t first) const {
    return aligned && first + 8 <= x.i_end ? x.data + first : nullptr;
  }
  // Rows and their elements' neighbours lie at multiples of 16 bytes; set by with_alignment().
  bool aligned = false;

  RowsWithOnes with_alignment() const {
    constexpr int64_t piece = 16 / sizeof(T);
    RowsWithOnes known = *this;
    known.aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.i_axis.step == 1 &&
                    x.i_axis.inner == 0 && x.k_axis.step % piece == 0 &&
                    x.k_axis.outer % piece == 0;
    return known;
  }
};

// data [rows, columns] by axes.
template <typename T>
RowsWithOnes<T> rows_by_axes(const T* data, const Axis& row, const Axis& column, int64_t rows,
                             int64_t columns, bool ones = false) {
  return RowsWithOnes<T>{{data, row, column, rows, columns}, ones}.with_alignment();
}

}  // namespace hesskern::cuda
