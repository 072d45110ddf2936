#pragma once

#include "cuda/core/axis.h"
#include "cuda/core/work.h"

namespace hesskern::cuda {

// out [k m, d] := alpha sum_n sum_c a_nc sum_t s_nct x_nt^T with a_nc = <V, sum_t s_nct x_nt^T>;
// x [N, d, t] and s [N, c, m, t] with element strides, V and out [k m, d] contiguous.
// T is float or double.
template <typename T>
struct LayerHessianProduct {
  const T* x;
  const T* s;
  const T* vectors;
  T* out;
  int64_t samples, classes, outputs, inputs, positions, vector_count;
  int64_t x_sample, x_input, x_position;
  int64_t s_sample, s_class, s_output, s_position;
  T alpha;
  bool tf32;
  // X as LayerInputs packs it, where that was done before; only of float.
  const T* packed_inputs = nullptr;
  // Elements of V x_n of all samples of a chunk: 16 MB of float32, which stay in the L2 cache.
  int64_t chunk_elements = 1 << 22;

  Work<T> plan() const;
};

}  // namespace hesskern::cuda
