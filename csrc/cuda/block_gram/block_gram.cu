// Gram matrices of 65 to 256 columns, the whole upper triangle in the registers of a block: one
// read of the rows.
//
// The rows go through a block in slabs. The copy engine brings whole samples to shared memory, or
// lanes copy the values that they will need (cp_async), while the slab before is multiplied. Then a
// warp per 32 columns makes operands of them: centred, scaled, split into two float16 (hi/lo), and
// stored as matrices [8, 8] of 128 contiguous bytes, which ldmatrix reads as left operands and as
// right ones without a bank conflict or a move. Then all warps multiply their shares of the
// triangle: units of two blocks [16, 16] above one another, whose left operands serve a row of
// units. Every sixteen rows are multiplied into fresh registers and added in float32, because
// tensor cores cut sums off; blocks are added by a second kernel. All sums have a fixed order.
//
// 200 columns, 10 classes: per 80 rows (64 KB) 60 units (49 needed) make 3600 products of the
// tensor cores, 5400 cycles; multiplying takes 14700 instructions and making operands 8700, which
// take turns: 13500 cycles measured on an H200, 1.04 to 1.1 TB/s. 64 to 128 columns: 1.6 to 3.7.
// Where these run at once: roles.cu, for samples on compute capability 9.0.
#include <algorithm>

#include "block_gram.h"
#include "cuda/core/device.h"
#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"
#include "positions.h"
#include "roles.h"
#include "samples.h"
#include "slabs.h"
#include "units.h"

namespace hesskern::cuda {

namespace {

constexpr int64_t kMostColumns = 256;
// Plain rows that stand for a sample.
constexpr int kPlainRows = 8;
// Sixteens of positions in a slab.
constexpr int kMostSteps = 4;

// buffers: of operands; with two, warps that are through with one slab make the next one's.
template <class S, class Slabs, int Resident>
__global__ void __launch_bounds__(S::kBlockThreads, Resident)
    block_gram_kernel(Slabs slabs, int count, BlockCut cut, int buffers, float* partial) {
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  using Maker = typename Slabs::template Maker<S>;
  Maker(slabs, memory, cut).prepare(memory, cut, buffers);
  __syncthreads();
  WarpUnits<S> units;
  const auto copy = [&](int slab) {
    if (slab < count) Maker(slabs, memory, cut).copy(slab);
    close_copies();
  };
  const auto slab_of = [&](int turn) {
    return static_cast<int>(blockIdx.x) + turn * static_cast<int>(gridDim.x);
  };
  // With one buffer the barrier at the turn's end guards it.
  const auto buffer_of = [&](int turn) { return buffers == 1 ? 0 : turn % 2; };
  const auto operands_of = [&](int buffer) {
    return reinterpret_cast<uint32_t*>(memory + buffer * cut.operand);
  };
  const auto backs_of = [&](int buffer) { return memory + cut.backs + buffer * S::kGroups; };
  copy(slab_of(0));
  for (int turn = 0; slab_of(turn) < count; ++turn) {
    wait_for_copies<0>();
    warp_barrier();
    Maker(slabs, memory, cut)
        .make(slab_of(turn), turn % 2, operands_of(buffer_of(turn)), backs_of(buffer_of(turn)));
    __syncthreads();
    copy(slab_of(turn + 1));
    units.add(operands_of(buffer_of(turn)), cut.steps, backs_of(buffer_of(turn)));
    if (buffers == 1) __syncthreads();
  }
  units.finish(partial);
}

template <class Slabs>
BlockCut cut_of(const Slabs& slabs, int buffers) {
  const int groups = std::max((slabs.columns + 31) / 32, 3);
  return BlockCut(groups, buffers, slabs.steps(), slabs.slab_size(groups), slabs.weight_size());
}

// As many operand buffers as pay and there is room for; 0 where not even one fits.
template <class Slabs>
int operand_buffers(const Slabs& slabs) {
  constexpr int kAlone = 128;
  int buffers = slabs.columns > kAlone ? 2 : 1;
  while (buffers > 0 && cut_of(slabs, buffers).bytes() > current_device().shared) --buffers;
  return buffers;
}

template <class Slabs>
Work<float> plan_slabs(const Slabs& slabs, int buffers, const SymmetricSum<float>& sum) {
  return with_block_shape(slabs.columns, [&](auto shape, auto resident) -> Work<float> {
    using S = decltype(shape);
    const auto kernel = block_gram_kernel<S, Slabs, decltype(resident)::value>;
    const BlockCut cut = cut_of(slabs, buffers);
    const int count = static_cast<int>(slabs.count());
    const int64_t blocks = std::min<int64_t>(
        resident_blocks(reinterpret_cast<const void*>(kernel), S::kBlockThreads, cut.bytes()),
        count);
    return {blocks * S::kSize, [=](float* partial, cudaStream_t stream) {
              const cudaError_t error =
                  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kBlockThreads),
                         cut.bytes(), stream, slabs, count, cut, buffers, partial);
              if (error != cudaSuccess) return error;
              return add_blocks(partial, blocks, int64_t{S::kSize}, BlockPlace<S, Slabs::kOrder>{},
                                sum, stream);
            }};
  });
}

bool takes(const SymmetricSum<float>& sum, int64_t columns) {
  return sum.groups == 1 && sum.order == columns && columns >= 1 && columns <= kMostColumns;
}

// The samples in slabs that fit, and their buffers; none where nothing fits.
template <typename In>
struct SamplePlan {
  SampleSlabs<In> slabs;
  int buffers;
};

template <typename In>
SamplePlan<In> plan_samples(const In* x, const float* weights, int64_t samples, int64_t rows,
                            int64_t classes, int64_t columns, int64_t sample_stride,
                            int64_t row_stride) {
  // More would not fit anyway.
  constexpr int64_t kMostClasses = 64;
  SamplePlan<In> plan{};
  if (rows < 1 || classes < 1 || classes > kMostClasses) return plan;
  const bool steps_of_pieces = sample_stride % 4 == 0 && (classes == 1 || row_stride % 4 == 0);
  plan.slabs = {x,
                weights,
                samples,
                rows,
                sample_stride,
                row_stride,
                static_cast<int>(classes),
                static_cast<int>(columns),
                false,
                is_aligned(x, 4 * sizeof(In)) && steps_of_pieces,
                SampleSlabs<In>::kLanes,
                1};
  // 16-bit elements are not copied one by one.
  if (sizeof(In) == 2 && (!plan.slabs.pieces || columns % 4 != 0)) return plan;
  // Samples in one piece, in whole pieces of 16 bytes.
  constexpr int64_t kPiece = 16 / sizeof(In);
  plan.slabs.bulk = current_device().hopper() && is_aligned(x, 16) && plan.slabs.pieces &&
                    columns % 4 == 0 && classes * columns % kPiece == 0 &&
                    sample_stride % kPiece == 0 && (classes == 1 || row_stride == columns);
  if (plan.slabs.bulk) plan.slabs.stride = plan.slabs.columns;
  // One set of more classes than these makes a slab long enough.
  constexpr int kFewClasses = 12;
  for (plan.slabs.sets = classes > kFewClasses ? 1 : kMostSets; plan.slabs.sets >= 1;
       --plan.slabs.sets) {
    plan.buffers = operand_buffers(plan.slabs);
    if (plan.buffers > 0) break;
  }
  return plan;
}

template <typename In>
SamplePlan<In> plan_samples(const BlockSamples<In>& call) {
  return plan_samples(call.jacobian, call.probabilities, call.samples, call.samples * call.classes,
                      call.classes, call.columns, call.sample_stride, call.class_stride);
}

SamplePlan<float> plan_samples(const BlockRows& call) {
  return plan_samples(call.x, static_cast<const float*>(nullptr), ceil_div(call.rows, kPlainRows),
                      call.rows, kPlainRows, call.columns, kPlainRows * call.row_stride,
                      call.row_stride);
}

PositionSlabs slabs_of(const BlockPositions& call) {
  const int64_t sixteens = ceil_div(call.positions, 16);
  return {call.x,
          call.sample_stride,
          call.column_stride,
          static_cast<int>(call.samples),
          static_cast<int>(sixteens),
          static_cast<int>(call.positions),
          static_cast<int>(call.columns),
          is_aligned(call.x, 16) && (call.samples == 1 || call.sample_stride % 4 == 0) &&
              (call.columns == 1 || call.column_stride % 4 == 0),
          static_cast<int>(std::min<int64_t>(kMostSteps, call.samples * sixteens))};
}

}  // namespace

template <typename In>
bool BlockSamples<In>::fits() const {
  return takes(sum, columns) && samples > 0 && plan_samples(*this).buffers > 0;
}

template <typename In>
Work<float> BlockSamples<In>::plan() const {
  const SamplePlan<In> plan = plan_samples(*this);
  if (roles_pay(plan.slabs)) return plan_roles(plan.slabs, sum);
  return plan_slabs(plan.slabs, plan.buffers, sum);
}

template struct BlockSamples<float>;
template struct BlockSamples<BFloat16>;
template struct BlockSamples<Float16>;

bool BlockRows::fits() const {
  return takes(sum, columns) && rows > 0 && plan_samples(*this).buffers > 0;
}

Work<float> BlockRows::plan() const {
  const SamplePlan<float> plan = plan_samples(*this);
  return plan_slabs(plan.slabs, plan.buffers, sum);
}

bool BlockPositions::fits() const {
  // Sixteens are counted in 32 bits, past the last by less than a slab for every block.
  constexpr int64_t kMost = int64_t{1} << 30;
  return takes(sum, columns) && samples > 0 && positions > 0 && positions <= kMost &&
         samples <= kMost / ceil_div(positions, 16) && operand_buffers(slabs_of(*this)) > 0;
}

Work<float> BlockPositions::plan() const {
  // The lanes' copies go on while the block multiplies, and one buffer leaves room for more blocks.
  return plan_slabs(slabs_of(*this), 1, sum);
}

}  // namespace hesskern::cuda
