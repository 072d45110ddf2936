// The random row of cross-entropy's root: softmax, a class drawn from it and the gradient there in
// one launch.
//
// Logits are read three or four times, mostly from a cache, rather than kept: a token may have as
// many classes as a vocabulary has words. Sums over classes are float64 and run in the classes'
// order, so that a draw is the CPU's but where a number lies within rounding of a class's edge.
#include <cmath>

#include "core/launch.h"
#include "core/warp.h"
#include "sampled_cross_entropy.h"

namespace hesskern::cuda {

namespace {

constexpr int kLanes = 32;

__device__ inline double to_math(double value) {
  return value;
}
template <typename In>
__device__ inline float to_math(In value) {
  return to_float(value);
}

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

// value rounded to nearest, as it lies in memory.
__device__ inline void store(float* to, float value) {
  *to = value;
}
__device__ inline void store(double* to, double value) {
  *to = value;
}
__device__ inline void store(Float16* to, float value) {
  to->bits = static_cast<uint16_t>(float16_pair(value, 0.0f));
}
__device__ inline void store(BFloat16* to, float value) {
  const uint32_t bits = bits_of(value);
  // What is added would carry a NaN over to zero.
  const uint32_t rounded = value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : 0x7fc00000u;
  to->bits = static_cast<uint16_t>(rounded >> 16);
}

// What the row of a token is multiplied by.
template <typename In, typename T>
__device__ double scale_of(const SampledCrossEntropy<In, T>& call, int64_t index) {
  if (call.terms == nullptr) return call.alpha;
  return call.alpha /
         sqrt(static_cast<double>(call.terms[index / call.positions * call.term_stride]));
}

// One token: its classes, and whether it counts.
template <typename In, typename T>
struct Token {
  const In* logits;
  In* out;
  int64_t logit_stride, out_stride;
  double uniform;
  bool counts;

  __device__ Token(const SampledCrossEntropy<In, T>& call, int64_t index)
      : logit_stride(call.logit_strides.label), out_stride(call.out_strides.label) {
    const int64_t n = index / call.positions, t = index % call.positions;
    logits = call.logits + n * call.logit_strides.sample + t * call.logit_strides.position;
    out = call.out + n * call.out_strides.sample + t * call.out_strides.position;
    uniform = call.uniform[index * call.uniform_stride];
    counts = call.targets == nullptr ||
             call.targets[n * call.target_sample_stride + t * call.target_position_stride] !=
                 call.ignore_index;
  }

  __device__ T logit(int64_t k) const { return to_math(logits[k * logit_stride]); }
  __device__ T weight(int64_t k, T largest) const { return exponential(logit(k) - largest); }

  // The row at class k, of the weights exp(logit - largest) and their total; share is scale /
  // total.
  __device__ void write(int64_t k, T largest, double total, double share, bool drawn) const {
    const T own = weight(k, largest);
    // total first: p - 1 would lose the digits of a class that is nearly certain.
    store(out + k * out_stride,
          drawn ? static_cast<T>((own - total) * share) : own * static_cast<T>(share));
  }
  __device__ void write_zero(int64_t k) const { store(out + k * out_stride, T(0)); }
};

// Classes lie side by side: a warp takes a token.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads) sampled_rows_kernel(SampledCrossEntropy<In, T> call) {
  const int lane = threadIdx.x % kLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const int64_t c = call.classes;
  for (int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
       index < call.samples * call.positions; index += warps) {
    const Token<In, T> token(call, index);
    if (!token.counts) {
      for (int64_t k = lane; k < c; k += kLanes) token.write_zero(k);
      continue;
    }
    // A lane without classes has the first one.
    T largest = token.logit(lane < c ? lane : 0);
    for (int64_t k = lane + kLanes; k < c; k += kLanes) {
      const T logit = token.logit(k);
      largest = logit > largest ? logit : largest;
    }
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      const T other = from_lane_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    double total = 0;
    for (int64_t k = lane; k < c; k += kLanes) total += token.weight(k, largest);
    total = warp_sum(total);

    const double threshold = token.uniform * total;
    // Where rounding or NaN leaves no class: the last one with a weight.
    int64_t chosen = -1, last = 0;
    double before = 0;
    for (int64_t begin = 0; begin < c && chosen < 0; begin += kLanes) {
      const int64_t k = begin + lane;
      const double own = k < c ? token.weight(k, largest) : 0;
      double up_to = own, all = own;
#pragma unroll
      for (int mask = 1; mask < kLanes; mask *= 2) {
        const double other = from_lane_xor(all, mask);
        all += other;
        if (lane & mask) up_to += other;
      }
      const bool passed = k < c && before + up_to > threshold;
      const uint32_t first = warp_max(passed ? kLanes - lane : 0);
      const uint32_t heavy = warp_max(own > 0 ? lane + 1 : 0);
      if (first > 0) chosen = begin + kLanes - first;
      if (heavy > 0) last = begin + heavy - 1;
      before += all;
    }
    if (chosen < 0) chosen = last;
    const double share = scale_of(call, index) / total;
    for (int64_t k = lane; k < c; k += kLanes) token.write(k, largest, total, share, k == chosen);
  }
}

// They do not: a thread takes a token, and its neighbour the next one.
template <typename In, typename T>
__global__ void __launch_bounds__(kThreads)
    sampled_columns_kernel(SampledCrossEntropy<In, T> call) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t c = call.classes;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       index < call.samples * call.positions; index += threads) {
    const Token<In, T> token(call, index);
    if (!token.counts) {
      for (int64_t k = 0; k < c; ++k) token.write_zero(k);
      continue;
    }
    T largest = token.logit(0);
    for (int64_t k = 1; k < c; ++k) {
      const T logit = token.logit(k);
      largest = logit > largest ? logit : largest;
    }
    double total = 0;
    for (int64_t k = 0; k < c; ++k) total += token.weight(k, largest);
    const double threshold = token.uniform * total;
    int64_t chosen = -1, last = 0;
    double up_to = 0;
    for (int64_t k = 0; k < c && chosen < 0; ++k) {
      const double own = token.weight(k, largest);
      up_to += own;
      if (own > 0) last = k;
      if (up_to > threshold) chosen = k;
    }
    if (chosen < 0) chosen = last;
    const double share = scale_of(call, index) / total;
    for (int64_t k = 0; k < c; ++k) token.write(k, largest, total, share, k == chosen);
  }
}

}  // namespace

template <typename In, typename T>
Work<T> SampledCrossEntropy<In, T>::plan() const {
  const SampledCrossEntropy call = *this;
  const bool by_warps = logit_strides.label == 1;
  const dim3 grid = grid_for(samples * positions * (by_warps ? kLanes : 1));
  return {0, [=](T*, cudaStream_t stream) {
            if (call.samples * call.classes * call.positions == 0) return cudaSuccess;
            return launch(by_warps ? sampled_rows_kernel<In, T> : sampled_columns_kernel<In, T>,
                          grid, dim3(kThreads), 0, stream, call);
          }};
}

template struct SampledCrossEntropy<float, float>;
template struct SampledCrossEntropy<BFloat16, float>;
template struct SampledCrossEntropy<Float16, float>;
template struct SampledCrossEntropy<double, double>;

}  // namespace hesskern::cuda
