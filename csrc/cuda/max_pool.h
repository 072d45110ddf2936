#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/work.h"

namespace hesskern::cuda {

// Windows along one axis: window o begins at stride o - padding and reaches over `reach` inputs,
// dilation (kernel - 1) + 1.
struct PoolAxis {
  int in, out, reach, stride, padding;
};

// Element strides of [N, H, W, C].
struct ImageStrides {
  int64_t sample, y, x, channel;
};

// out [N, H, W, r, C] := gradients of r rows with respect to the input of a max pooling. An input
// gets the gradients of the windows whose maximum it is, times factor, where relu is positive.
// T is float or double; every element of out is written once, sums run over windows in order.
template <typename T>
struct MaxPoolInputGradient {
  const T* grad;           // [N, h.out, w.out, r, C]
  const int64_t* indices;  // [N, h.out, w.out, C] into [h.in, w.in]; others count as nowhere
  const T* relu;           // [N, h.in, w.in, C] or null
  const T* factor;         // [N, h.in, w.in, C] or null
  T* out;                  // [N, h.in, w.in, r, C]
  int64_t samples, rows, channels;
  PoolAxis h, w;
  ImageStrides grad_strides, index_strides, relu_strides, factor_strides, out_strides;
  int64_t grad_row, out_row;  // element strides from row to row

  Work<float> plan() const;
};

}  // namespace hesskern::cuda
