// Samples on their way to a block's operands (block_gram.cu): brought by the copy engine or by the
// lanes that will read them, centred, scaled and split into two float16 (hi/lo).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/core/barrier.h"
#include "cuda/core/elements.h"
#include "cuda/core/float16_parts.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"
#include "slabs.h"

namespace hesskern::cuda {

// Samples go by fours, one for every t = lane % 4; so many fours may make a slab.
constexpr int kMostSets = 2;

template <typename In>
__device__ inline Four<float> load_values(const In* from) {
  const Four<In> four = *reinterpret_cast<const Four<In>*>(from);
  Four<float> values;
#pragma unroll
  for (int q = 0; q < 4; ++q) values.value[q] = to_float(four.value[q]);
  return values;
}

template <typename In>
struct SampleSlabs;

// A warp makes operands of a slab's samples for its 32 columns, at `to`, and at `back` the factor
// that undoes their scale. weights: its own, in shared memory; roots: to be written. find(set):
// the lane's columns of its sample of the set; rooted(): the weights are not needed any more;
// made(set): nor are the set's rows.
template <class S, typename In, class Find, class Rooted, class Made>
__device__ inline void make_samples(const SampleSlabs<In>& in, const float* weights, float* roots,
                                    uint32_t* to, float* back, Find find, Rooted rooted,
                                    Made made) {
  const int lane = anew(static_cast<int>(threadIdx.x)) % 32, t = lane % 4;
  const In* from[kMostSets];
  float mean[kMostSets][4], most = 0.0f;
#pragma unroll
  for (int set = 0; set < kMostSets; ++set) {
    if (set >= in.sets) continue;
    from[set] = find(set);
#pragma unroll
    for (int q = 0; q < 4; ++q) mean[set][q] = 0.0f;
    if (in.weights != nullptr) {
      const float* weight = weights + set * in.classes * 4 + t;
#pragma unroll(S::kAhead)
      for (int c = 0; c < in.classes; ++c) {
        const Four<float> v = load_values(from[set] + c * in.stride);
        most = largest(most, v);
#pragma unroll
        for (int q = 0; q < 4; ++q) mean[set][q] += weight[c * 4] * v.value[q];
      }
    } else {
#pragma unroll(S::kAhead)
      for (int c = 0; c < in.classes; ++c) {
        most = largest(most, load_values(from[set] + c * in.stride));
      }
    }
  }
  const Scale scale = scale_for(most);
  for (int i = lane; i < in.weight_size(); i += 32) {
    roots[i] = square_root(weights[i]) * scale.to_half;
  }
  warp_barrier();
  rooted();
  if (lane == 0) *back = scale.back;
  to += lane;
#pragma unroll
  for (int set = 0; set < kMostSets; ++set) {
    if (set >= in.sets) continue;
    const float* root = roots + set * in.classes * 4 + t;
#pragma unroll(S::kAhead / 2)
    for (int c = 0; c < in.classes; c += 2, to += 2 * S::kHalf) {
      const int second = c + 1 < in.classes ? c + 1 : c;
      const Four<float> v = load_values(from[set] + c * in.stride);
      const Four<float> w = load_values(from[set] + second * in.stride);
      const float root_v = root[c * 4], root_w = second > c ? root[second * 4] : 0.0f;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t high, low;
        split_pair(root_v * (v.value[q] - mean[set][q]), root_w * (w.value[q] - mean[set][q]), high,
                   low);
        to[q * 32] = high;
        to[q * 32 + S::kHalf] = low;
      }
    }
    made(set);
  }
}

// Samples of rows, each to be centred under its weights, or (without weights) rows as they are, of
// which eight stand for a sample. A slab is sets times four samples.
template <typename In>
struct SampleSlabs {
  static constexpr ColumnOrder kOrder = ColumnOrder::kByFours;
  static constexpr int kSize = static_cast<int>(sizeof(In));
  // What the lanes of a warp read of a row.
  static constexpr int kLanes = 32 * 4;

  const In* x;
  const float* weights;
  int64_t samples, rows, sample_stride, row_stride;
  int classes, columns;
  // Whole samples by the copy engine; by lanes, four elements at a time.
  bool bulk, pieces;
  // Elements between rows in shared memory.
  int stride;
  int sets;

  __host__ __device__ int pairs() const { return (classes + 1) / 2; }
  __host__ __device__ int steps() const { return (sets * pairs() + 1) / 2; }
  __host__ __device__ int64_t count() const { return ceil_div(samples, 4 * sets); }
  // Samples begin eight banks apart; in words.
  __host__ __device__ int slot() const {
    return (classes * columns * kSize / 4 + 23) / 32 * 32 + 8;
  }
  __host__ __device__ int slab_size(int groups) const {
    return bulk ? 4 * sets * slot() : groups * sets * classes * kLanes * kSize / 4;
  }
  __host__ __device__ int weight_size() const { return 4 * sets * classes; }

  // A thread's part in bringing a slab and turning it into operands; of the first warps each has 32
  // columns. A lane (g, t) = (lane / 4, lane % 4) makes four columns of sample t of every set.
  template <class S>
  class Maker {
   public:
    __device__ Maker(const SampleSlabs& in, float* memory, const BlockCut& cut)
        : in_(in),
          slab_(reinterpret_cast<In*>(memory + cut.slab)),
          barrier_(reinterpret_cast<uint64_t*>(memory + cut.barrier)),
          thread_(anew(static_cast<int>(threadIdx.x))),
          lane_(thread_ % 32),
          warp_(thread_ / 32),
          g_(lane_ / 4),
          t_(lane_ % 4),
          column_(32 * warp_ + 4 * g_) {
      own_ = slab_ + warp_ * in.sets * in.classes * kLanes + lane_ * 4;
      weights_ = memory + cut.weights + warp_ * 2 * in.weight_size();
      roots_ = weights_ + in.weight_size();
    }

    // Before a block barrier: what stays as it is.
    __device__ void prepare(float* memory, const BlockCut& cut, int buffers) {
      const int thread = static_cast<int>(threadIdx.x);
      if (thread == 0) {
        barrier_init(barrier_, 1);
        barriers_are_ready();
      }
      if (in_.sets * in_.pairs() % 2 == 0) return;
      // The last half of sixteen rows, which no pair of rows fills.
      for (int i = thread; i < 2 * S::kHalf; i += S::kBlockThreads) {
        for (int buffer = 1; buffer <= buffers; ++buffer)
          memory[buffer * cut.operand - 1 - i] = 0.0f;
      }
    }

    __device__ void copy(int slab) {
      if (in_.bulk && warp_ == 0) copy_samples(slab);
      if (warp_ >= S::kGroups) return;
      for (int set = 0; set < in_.sets; ++set) {
        const int64_t sample = sample_of(slab, set);
        const bool inside = sample < in_.samples;
        if (!in_.bulk) {
          const int count = inside ? in_.columns - column_ : 0;
          const In* from = in_.x + (count > 0 ? sample * in_.sample_stride + column_ : 0);
          int64_t left = in_.rows - sample * in_.classes;
          for (int c = 0; c < in_.classes; ++c, --left) {
            copy_four(own_ + (set * in_.classes + c) * kLanes, from, left > 0 ? count : 0,
                      in_.pieces);
            if (count > 0 && left > 1) from += in_.row_stride;
          }
        }
        for (int c = g_; c < in_.classes; c += 8) {
          float* const weight = weights_ + (set * in_.classes + c) * 4 + t_;
          if (in_.weights != nullptr) {
            copy_word(weight, in_.weights + (inside ? sample * in_.classes + c : 0), inside);
          } else {
            *weight = inside ? 1.0f : 0.0f;
          }
        }
      }
    }

    // To operands, and the factor that undoes the scale; the lane's own copies have ended.
    __device__ void make(int slab, int phase, uint32_t* operands, float* backs) {
      if (warp_ >= S::kGroups) return;
      if (in_.bulk) barrier_wait(barrier_, static_cast<uint32_t>(phase));
      const auto nothing = [](int) {};
      make_samples<S>(
          in_, weights_, roots_, operands + 4 * warp_ * 32, backs + warp_,
          [&](int set) { return find(slab, set); }, [] {}, nothing);
    }

   private:
    // By the copy engine, and zeros for rows that the last of plain samples lacks.
    __device__ void copy_samples(int slab) {
      const int64_t first = int64_t{slab} * 4 * in_.sets, left = in_.samples - first;
      const int samples = left < 4 * in_.sets ? static_cast<int>(left) : 4 * in_.sets;
      const int size = in_.classes * in_.columns;
      int64_t last = (in_.rows - (first + samples - 1) * in_.classes) * in_.columns;
      if (last >= size) {
        last = size;
      } else {
        In* const sample = place(samples - 1);
        for (int i = static_cast<int>(last) + lane_; i < size; i += 32) sample[i] = In{};
        warp_barrier();
      }
      if (lane_ != 0) return;
      barrier_expect(barrier_, ((samples - 1) * size + static_cast<int>(last)) * kSize);
      for (int i = 0; i < samples; ++i) {
        copy_row(place(i), in_.x + (first + i) * in_.sample_stride,
                 (i + 1 < samples ? size : static_cast<int>(last)) * kSize, barrier_);
      }
    }

    __device__ int64_t sample_of(int slab, int set) const {
      return (int64_t{slab} * in_.sets + set) * 4 + t_;
    }

    // The lane's columns of the set's sample. Where there are none it reads others of its group,
    // with which it shares a scale: its weights are zeros, or nobody looks at its sums.
    __device__ const In* find(int slab, int set) const {
      if (!in_.bulk) return own_ + set * in_.classes * kLanes;
      const bool inside = sample_of(slab, set) < in_.samples;
      const int others = 32 * warp_ < in_.columns ? 32 * warp_ : 0;
      return place(inside ? set * 4 + t_ : 0) + (column_ < in_.columns ? column_ : others);
    }

    // A sample that the copy engine brought.
    __device__ In* place(int sample) const { return slab_ + sample * in_.slot() * 4 / kSize; }

    const SampleSlabs& in_;
    In* slab_;
    uint64_t* barrier_;
    int thread_, lane_, warp_, g_, t_, column_;
    In* own_;
    float *weights_, *roots_;
  };
};

}  // namespace hesskern::cuda
