// Products with gathered rows of a packed operand, held in registers: the inner loop
// of gradients that are zero at the same places in every row.
#pragma once

#include <cstdint>

namespace hesskern::cpu {

// values [count, r] times the rows of weight that index names, by their offsets.
template <typename T>
struct GatheredRows {
  const T* values;
  const int32_t* index;
  int64_t count;
  const T* weight;
};

// out [R, columns] := factor . sum over terms of values^T weight[index], for rows
// [first, first + R) of r.
template <typename T>
struct GatherProduct {
  const GatheredRows<T>* term;
  int64_t terms;
  int64_t first, r;
  const T* factor;  // [columns] or null
  T* out;
  int64_t out_stride;
};

template <typename T>
using GatherKernel = void (*)(const GatherProduct<T>&);

// Most rows R of one product on this machine.
template <typename T>
int64_t gather_rows();

// The kernel for so many rows, of one or two vectors of columns.
template <typename T>
GatherKernel<T> gather_kernel(int64_t rows, int64_t vectors);

extern template int64_t gather_rows<float>();
extern template int64_t gather_rows<double>();
extern template GatherKernel<float> gather_kernel<float>(int64_t, int64_t);
extern template GatherKernel<double> gather_kernel<double>(int64_t, int64_t);

}  // namespace hesskern::cpu
