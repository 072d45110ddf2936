// Gram matrices of at most 64 rows of positions: one read of them bounds it.
//
// Every warp sums the whole triangle (core/warp_gram.h) of sixteen positions at a time. A lane
// copies exactly what its operands' registers stand for, four neighbouring positions of a row, to
// its own places of shared memory, some steps ahead (cp_async), and reads them back itself: no
// barrier, no bank conflict. float32 is multiplied as two float16 parts under a power of two
// (hi/lo), 16-bit numbers as they are. Of up to eight rows of float32 a thread multiplies four
// positions by itself: 2 m (m + 1) fused multiply-adds for 4 m values, without tensor cores.
#include <algorithm>
#include <cmath>

#include "core/device.h"
#include "core/elements.h"
#include "core/float16_parts.h"
#include "core/launch.h"
#include "core/warp.h"
#include "core/warp_gram.h"
#include "narrow_positions.h"

namespace hesskern::cuda {

namespace {

constexpr int kMostRows = 64, kFewRows = 8;
// So that a sample's offsets are ints.
constexpr int64_t kMostPositions = 1 << 24;

// partial [blocks, size of a triangle]; Steps sixteens of positions a stage.
template <typename In, int Blocks, int Steps, int Stages, bool kVector>
__global__ void __launch_bounds__(kGramThreads, kGramBlocks)
    positions_kernel(NarrowPositions<In> call, uint32_t nothing, float* partial) {
  using Triangle = WarpTriangle<Blocks>;
  constexpr int kEights = Triangle::kEights, kDepth = 16 * Steps;
  constexpr int kStageSize = Steps * kEights * 32;
  static_assert(kVector || sizeof(In) == 4, "16-bit elements are not copied one by one");
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = lane / 4, t = lane % 4;
  Four<In>* const stages =
      reinterpret_cast<Four<In>*>(dynamic_shared()) + warp * Stages * kStageSize + lane;
  // kDepth positions of one sample each: those of a warp are step apart.
  const int rows = static_cast<int>(call.outputs), positions = static_cast<int>(call.positions);
  const int pieces = (positions + kDepth - 1) / kDepth;
  const int64_t total = call.samples * pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kGramWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGramWarps + warp;
  const int64_t step_samples = step / pieces;
  const int step_pieces = static_cast<int>(step % pieces);

  int64_t sample = first / pieces;
  int piece = static_cast<int>(first % pieces), next_stage = 0;
  const auto copy = [&] {
    Four<In>* const to = stages + next_stage * kStageSize;
    const bool inside = sample < call.samples;
    const int begin = piece * kDepth + 4 * t;
    const In* const from = call.x + (inside ? (sample * rows + row) * positions + begin : 0);
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      const int left = inside ? positions - begin - 16 * s : 0;
#pragma unroll
      for (int b = 0; b < kEights; ++b) {
        const int count = b * 8 + row >= rows || left < 0 ? 0 : left < 4 ? left : 4;
        copy_four(to[(s * kEights + b) * 32].value,
                  count > 0 ? from + b * 8 * positions + s * 16 : call.x, count, kVector);
      }
    }
    close_copies();
    sample += step_samples;
    piece += step_pieces;
    if (piece >= pieces) piece -= pieces, ++sample;
    next_stage = next_stage + 1 == Stages ? 0 : next_stage + 1;
  };
#pragma unroll
  for (int s = 0; s + 1 < Stages; ++s) copy();

  Triangle triangle;
  int stage = 0;
  for (int64_t item = first; item < total; item += step) {
    copy();
    wait_for_copies<Stages - 1>();
    const Four<In>* const values = stages + stage * kStageSize;
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      Four<In> four[kEights];
#pragma unroll
      for (int b = 0; b < kEights; ++b) four[b] = values[(s * kEights + b) * 32];
      typename Triangle::Words high;
      if constexpr (sizeof(In) == 2) {
#pragma unroll
        for (int b = 0; b < kEights; ++b) {
          high[b][0] = pair_of(four[b].value[0], four[b].value[1]);
          high[b][1] = pair_of(four[b].value[2], four[b].value[3]);
        }
        triangle.add(high, nothing, In{});
      } else {
        float most = 0.0f;
#pragma unroll
        for (int b = 0; b < kEights; ++b) {
#pragma unroll
          for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(four[b].value[e]));
        }
        const Scale scale = scale_for(most);
        typename Triangle::Words low;
#pragma unroll
        for (int b = 0; b < kEights; ++b) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            split_pair(four[b].value[2 * part] * scale.to_half,
                       four[b].value[2 * part + 1] * scale.to_half, high[b][part], low[b][part]);
          }
        }
        triangle.add(high, low, scale.back * scale.back, nothing);
      }
    }
    stage = stage + 1 == Stages ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  triangle.finish(reinterpret_cast<float*>(dynamic_shared()), partial);
}

// Floats of a block's sums, in whole warps.
template <int Rows>
constexpr int kFewSize = (Rows * (Rows + 1) / 2 + 31) / 32 * 32;

// partial [blocks, kFewSize<Rows>]; kWide: positions of a thread at a time, 4 where rows of them
// are aligned to that.
template <int Rows, int kWide>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows_kernel(NarrowPositions<float> call, float* partial) {
  constexpr int kPairs = Rows * (Rows + 1) / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int positions = static_cast<int>(call.positions), pieces = positions / kWide;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t step_samples = step / pieces;
  const int step_pieces = static_cast<int>(step % pieces);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t sample = first / pieces;
  int piece = static_cast<int>(first % pieces);
  float sum[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) sum[p] = 0.0f;
  using Values = float[Rows][kWide];
  const auto load = [&](Values& values) {
    const float* from = call.x + sample * Rows * positions + piece * kWide;
    const bool inside = sample < call.samples;
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      if (inside) {
        read_once(values[i], from + i * positions);
      } else {
#pragma unroll
        for (int e = 0; e < kWide; ++e) values[i][e] = 0.0f;
      }
    }
    sample += step_samples;
    piece += step_pieces;
    if (piece >= pieces) piece -= pieces, ++sample;
    return inside;
  };
  const auto add = [&](const Values& values) {
    int pair = 0;
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
#pragma unroll
      for (int j = i; j < Rows; ++j, ++pair) {
#pragma unroll
        for (int e = 0; e < kWide; ++e) sum[pair] += values[i][e] * values[j][e];
      }
    }
  };
  // One more is under way while one is multiplied.
  Values one, other;
  bool more = load(one);
  while (more) {
    more = load(other);
    add(one);
    if (!more) break;
    more = load(one);
    add(other);
  }
  __shared__ float sums[kThreads / 32][kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const float total = warp_sum(sum[p]);
    if (lane == 0) sums[warp][p] = total;
  }
  __syncthreads();
  const int f = static_cast<int>(threadIdx.x);
  if (f < kFewSize<Rows>) {
    float total = 0.0f;
    if (f < kPairs) {
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) total += sums[w][f];
    }
    partial[static_cast<int64_t>(blockIdx.x) * kFewSize<Rows> + f] = total;
  }
}

struct FewRowsPlace {
  int rows;

  // Elements behind the last belong to a row that does not exist.
  __device__ void operator()(int f, int& row, int& column) const {
    row = 0;
    while (row < rows && f >= rows - row) f -= rows - row++;
    column = row + f;
  }
};

// Whether four positions of a row can be read at once, anywhere.
template <typename In>
bool by_fours(const NarrowPositions<In>& call) {
  return call.positions % 4 == 0 && is_aligned(call.x, 4 * sizeof(In));
}

template <typename In, int Blocks, int Steps, int Stages, bool kVector>
Work<float> plan_positions(const NarrowPositions<In>& call) {
  using Triangle = WarpTriangle<Blocks>;
  constexpr size_t kRing = sizeof(Four<In>) * kGramWarps * Stages * Steps * Triangle::kEights * 32;
  constexpr size_t kShared = std::max(kRing, Triangle::kBytes);
  const auto kernel = positions_kernel<In, Blocks, Steps, Stages, kVector>;
  const int64_t items = call.samples * ceil_div(call.positions, 16 * Steps);
  const int64_t blocks = std::min<int64_t>(
      resident_blocks(reinterpret_cast<const void*>(kernel), kGramThreads, kShared),
      ceil_div(items, kGramWarps));
  return {blocks * Triangle::kSize, [=](float* partial, cudaStream_t stream) {
            const cudaError_t error =
                launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kGramThreads), kShared,
                       stream, call, 0u, partial);
            if (error != cudaSuccess) return error;
            return add_blocks(partial, blocks, Triangle::kSize,
                              WarpTrianglePlace<Blocks, ColumnOrder::kInTurn>{}, call.sum, stream);
          }};
}

template <typename In, bool kVector>
Work<float> plan_triangle(const NarrowPositions<In>& call) {
  if (call.outputs <= 16) return plan_positions<In, 1, 4, 4, kVector>(call);
  if (call.outputs <= 32) return plan_positions<In, 2, 2, 4, kVector>(call);
  if (call.outputs <= 48) return plan_positions<In, 3, 1, 5, kVector>(call);
  return plan_positions<In, 4, 1, 3, kVector>(call);
}

template <int Rows, int kWide>
Work<float> plan_few(const NarrowPositions<float>& call) {
  const auto kernel = few_rows_kernel<Rows, kWide>;
  const int64_t items = call.samples * (call.positions / kWide);
  const int64_t blocks =
      std::min<int64_t>(resident_blocks(reinterpret_cast<const void*>(kernel), kThreads, 0),
                        ceil_div(items, kThreads));
  return {blocks * kFewSize<Rows>, [=](float* partial, cudaStream_t stream) {
            const cudaError_t error = launch(kernel, dim3(static_cast<unsigned>(blocks)),
                                             dim3(kThreads), 0, stream, call, partial);
            if (error != cudaSuccess) return error;
            return add_blocks(partial, blocks, kFewSize<Rows>, FewRowsPlace{Rows}, call.sum,
                              stream);
          }};
}

template <int kWide>
Work<float> plan_few_rows(const NarrowPositions<float>& call) {
  switch (call.outputs) {
    case 1:
      return plan_few<1, kWide>(call);
    case 2:
      return plan_few<2, kWide>(call);
    case 3:
      return plan_few<3, kWide>(call);
    case 4:
      return plan_few<4, kWide>(call);
    case 5:
      return plan_few<5, kWide>(call);
    case 6:
      return plan_few<6, kWide>(call);
    case 7:
      return plan_few<7, kWide>(call);
    default:
      return plan_few<8, kWide>(call);
  }
}

}  // namespace

template <typename In>
bool NarrowPositions<In>::fits() const {
  if (samples < 1 || outputs < 1 || positions < 1 || sum.groups != 1) return false;
  if (outputs > kMostRows || positions > kMostPositions) return false;
  return sizeof(In) == 4 || by_fours(*this);
}

template <typename In>
Work<float> NarrowPositions<In>::plan() const {
  if constexpr (sizeof(In) == 2) {
    return plan_triangle<In, true>(*this);
  } else if (outputs <= kFewRows) {
    return by_fours(*this) ? plan_few_rows<4>(*this) : plan_few_rows<1>(*this);
  } else {
    return by_fours(*this) ? plan_triangle<In, true>(*this) : plan_triangle<In, false>(*this);
  }
}

template struct NarrowPositions<float>;
template struct NarrowPositions<BFloat16>;
template struct NarrowPositions<Float16>;

}  // namespace hesskern::cuda
