// acc += alpha rows^T rows on the upper triangle for few rows, which are read where
// they lie: the time goes into reading and writing acc, and packing rows into panels
// would double it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/vector.h"

namespace hesskern::cpu {

// Rows up to which this is used.
constexpr int64_t kFewRows = 32;

namespace detail {

// Rows [i, i + kRows) of acc, columns from i on.
template <typename T, class Isa, int kRows>
HESSKERN_FORCE_INLINE void few_rows_band(T* acc, int64_t ld, const T* rows, int64_t stride,
                                         int64_t count, int64_t d, int64_t i, T alpha) {
  constexpr int L = kLanes<T, Isa>;
  T left[kRows][kFewRows];
  for (int64_t k = 0; k < count; ++k) {
    HESSKERN_UNROLL
    for (int r = 0; r < kRows; ++r) left[r][k] = alpha * rows[k * stride + i + r];
  }
  auto single = [&](int r, int64_t j) HESSKERN_INLINE {
    T sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += left[r][k] * rows[k * stride + j];
    acc[(i + r) * ld + j] += sum;
  };
  // Whole vectors end with the row. The first may begin left of the diagonal, where acc
  // is not defined.
  int64_t j = i + (d - i) % L;
  if (j >= L) {
    if (j > i) j -= L;
  } else {
    for (int64_t k = i; k < j; ++k) {
      for (int r = 0; r < kRows; ++r) single(r, k);
    }
  }
  for (; j + L <= d; j += L) {
    Vector<T, Isa> sum[kRows], right, old;
    HESSKERN_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = Vector<T, Isa>{};
    for (int64_t k = 0; k < count; ++k) {
      load<T, Isa>(right, rows + k * stride + j);
      HESSKERN_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += left[r][k] * right;
    }
    HESSKERN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      load<T, Isa>(old, acc + (i + r) * ld + j);
      store<T, Isa>(acc + (i + r) * ld + j, old + sum[r]);
    }
  }
}

}  // namespace detail

// acc [d, d], rows ld apart; rows [count <= kFewRows, d], stride apart.
template <typename T>
void few_rows_update(T* acc, int64_t ld, const T* rows, int64_t stride, int64_t count, int64_t d,
                     T alpha) {
  constexpr int kBand = 4;
  // One thread for about a hundred thousand elements that are read and written.
  const int64_t threads = std::clamp<int64_t>(d * d * (count + 8) >> 21, 1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // Equal areas of the triangle: rows before a share f of it are d (1 - sqrt(1 - f)).
    auto edge = [&](int64_t part) {
      const double share = static_cast<double>(part) / static_cast<double>(threads);
      const auto row = static_cast<int64_t>(static_cast<double>(d) * (1 - std::sqrt(1 - share)));
      return part == threads ? d : row / kBand * kBand;
    };
    const int64_t first = edge(begin), last = edge(end);
    with_simd([&](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      int64_t i = first;
      for (; i + kBand <= last; i += kBand) {
        detail::few_rows_band<T, Isa, kBand>(acc, ld, rows, stride, count, d, i, alpha);
      }
      for (; i < last; ++i) {
        detail::few_rows_band<T, Isa, 1>(acc, ld, rows, stride, count, d, i, alpha);
      }
    });
  });
}

}  // namespace hesskern::cpu
