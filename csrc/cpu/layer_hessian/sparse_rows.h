// Where the rows of a matrix differ from their most frequent value: images with a
// background, activations after a ReLU.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

#if HESSKERN_X86
#include <immintrin.h>
#endif

namespace hesskern::cpu {

// A value, and the share of the elements that have it.
template <typename T>
struct Frequent {
  T value;
  double share;
};

// The most frequent value of x [n, d], rows stride apart, as some of its rows show it.
template <typename T>
Frequent<T> most_frequent(const T* x, int64_t n, int64_t d, int64_t stride) {
  constexpr int64_t kRows = 16, kProbes = 256;
  const int64_t rows = std::min(n, kRows), each = std::min(kProbes / rows, d);
  std::array<T, kProbes> probes;
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + n * i / rows * stride;
    for (int64_t j = 0; j < each; ++j) {
      const T value = row[d * j / each];
      if (std::isfinite(value)) probes[count++] = value;
    }
  }
  std::sort(probes.begin(), probes.begin() + count);
  int64_t longest = 0, run = 0;
  T value = 0;
  for (int64_t i = 0; i < count; ++i) {
    run = i > 0 && probes[i] == probes[i - 1] ? run + 1 : 1;
    if (run > longest) {
      longest = run;
      value = probes[i];
    }
  }
  if (longest < 2) return {T(0), 0.0};
  int64_t equal = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + n * i / rows * stride;
    for (int64_t j = 0; j < d; ++j) equal += row[j] == value;
  }
  return {value, static_cast<double>(equal) / static_cast<double>(rows * d)};
}

namespace detail {

template <typename T>
uint64_t differing_scalar(const T* x, int64_t count, T value) {
  uint64_t bits = 0;
  for (int64_t j = 0; j < count; ++j) bits |= static_cast<uint64_t>(x[j] != value) << j;
  return bits;
}

#if HESSKERN_X86
HESSKERN_TARGET_AVX512 inline uint64_t differing_avx512(const float* x, float value) {
  const __m512 values = _mm512_set1_ps(value);
  uint64_t bits = 0;
  for (int j = 0; j < 64; j += 16) {
    const __mmask16 part = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + j), values, _CMP_NEQ_UQ);
    bits |= static_cast<uint64_t>(part) << j;
  }
  return bits;
}
HESSKERN_TARGET_AVX512 inline uint64_t differing_avx512(const double* x, double value) {
  const __m512d values = _mm512_set1_pd(value);
  uint64_t bits = 0;
  for (int j = 0; j < 64; j += 8) {
    const __mmask8 part = _mm512_cmp_pd_mask(_mm512_loadu_pd(x + j), values, _CMP_NEQ_UQ);
    bits |= static_cast<uint64_t>(part) << j;
  }
  return bits;
}
#endif

}  // namespace detail

// Bit j tells whether x[j] differs from value; count <= 64. NaN differs.
template <typename T>
uint64_t differing(const T* x, int64_t count, T value) {
#if HESSKERN_X86
  if (count == 64 && simd_level() == Simd::avx512) return detail::differing_avx512(x, value);
#endif
  return detail::differing_scalar(x, count, value);
}

// Bit j of word i becomes bit i of word j.
inline void transpose_bits(uint64_t* words) {
  uint64_t mask = 0x00000000ffffffff;
  for (int width = 32; width > 0; width /= 2, mask ^= mask << width) {
    for (int i = 0; i < 64; i = (i + width + 1) & ~width) {
      const uint64_t swapped = ((words[i] >> width) ^ words[i + width]) & mask;
      words[i] ^= swapped << width;
      words[i + width] ^= swapped;
    }
  }
}

}  // namespace hesskern::cpu
