#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// Element strides of a tensor [N, c, t].
struct ClassStrides {
  int64_t sample, label, position;
};

// out [N, c, t] := alpha / sqrt(terms_n) times the gradient of softmax cross-entropy in its logits
// [N, c, t], at a class drawn from the softmax: p - e_k, with k the first class at which the sum of
// p passes uniform_nt. Zero where targets [N, t] are ignore_index. In is float, BFloat16 or Float16
// where T is float, double where T is double.
template <typename In, typename T>
struct SampledCrossEntropy {
  const In* logits;
  In* out;
  int64_t samples, classes, positions;
  ClassStrides logit_strides, out_strides;
  const double* uniform;  // [N t], in [0, 1)
  int64_t uniform_stride;
  const int64_t* targets;  // [N, t]; null: every token counts
  int64_t target_sample_stride, target_position_stride;
  int64_t ignore_index;
  const int64_t* terms;  // [N], positive; null: ones
  int64_t term_stride;
  double alpha;

  Work<T> plan() const;
};

}  // namespace hesskern::cuda
