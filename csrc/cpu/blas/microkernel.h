// Products of small matrix blocks held in registers: the inner loops of the
// fused operators, which share a packed operand between two products and so
// cannot be written as calls of a BLAS.
#pragma once

#include <cstdint>

namespace hesskern::cpu {

// C [R, columns] = A B, or C += A B, or with the squares of A B's elements. R is at most
// Microkernels::rows, columns at most Microkernels::width.
template <typename T>
struct BlockProduct {
  // A by rows: element (i, k) is a[i * a_stride + (k / n) * a_jump + k % n] with
  // n = segment; A by columns: element (i, k) is a[k * a_stride + i].
  const T* a;
  int64_t a_stride;
  int64_t a_jump;
  int64_t segment;
  int64_t inner;
  const T* b;  // [inner, width]
  T* c;        // element (i, j) is c[i * c_stride + j]
  int64_t c_stride;
  bool accumulate;
  bool square;
  // Memory that a later step reads, fetched towards the cache meanwhile:
  // ahead_step bytes per inner index. 0: nothing to fetch.
  const char* ahead;
  int64_t ahead_step;
};

template <typename T>
using BlockKernel = void (*)(const BlockProduct<T>&);

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

// The kernels of the instruction set of this machine.
template <typename T>
struct Microkernels {
  static constexpr int kMaxRows = 14;
  int lanes;  // elements of a vector
  int rows;   // rows of a full block
  int width;  // columns of a full block and of a panel: two vectors
  // [rows][vectors]: rows in 1 .. rows, vectors in 1 .. 2
  BlockKernel<T> by_rows[kMaxRows + 1][3];
  BlockKernel<T> by_columns[kMaxRows + 1][3];
  GatherKernel<T> gathered[kMaxRows + 1][3];
};

template <typename T>
const Microkernels<T>& microkernels();

extern template const Microkernels<float>& microkernels<float>();
extern template const Microkernels<double>& microkernels<double>();

}  // namespace hesskern::cpu
