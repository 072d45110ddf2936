// Gram matrices of rows of at most 64 columns, of a softmax's output Hessian or plain: one read of
// the rows bounds them.
//
// Every warp sums the whole triangle of four samples at a time (core/warp_gram.h); of plain rows
// eight make a sample. What it reads lies in one piece, which the copy engine or the lanes
// (cp_async) bring to the warp's own part of shared memory while the samples before are multiplied.
// A lane reads all classes of one sample for some columns, so that centring needs no other lane.
// float32 is multiplied as two float16 parts under a power of two (hi/lo), plain 16-bit rows as
// they are.
//
// With 64 columns, sixteen rows (4 KB) take 60 tensor-core products and 330 other instructions of a
// warp, and 85 more for the mean where there is one; registers allow two warps a scheduler: bound
// by latency, at half of the memory's rate.
#include <algorithm>
#include <cmath>

#include "core/barrier.h"
#include "core/device.h"
#include "core/elements.h"
#include "core/float16_parts.h"
#include "core/launch.h"
#include "core/warp.h"
#include "core/warp_gram.h"
#include "narrow_rows.h"

namespace hesskern::cuda {

namespace {

constexpr int kMostColumns = 64;
constexpr int kStages = 2;
// Samples that a warp multiplies at a time, one for every t = lane % 4; plain rows as samples.
constexpr int kAtOnce = 4;
constexpr int kPlainSample = 8;
constexpr int kPiece = 16;

// Who copies to shared memory: the copy engine, or the lanes, 16 or 4 bytes at a time.
enum class Transport { kBulk, kPieces, kWords };

// The rows in groups of some samples, and how a group lies in shared memory. Sizes in bytes.
struct RowGroups {
  const unsigned char *rows, *weights;
  int64_t row_bytes, weight_bytes;
  int64_t count;
  int classes, columns;
  int samples, sample;
  // What is copied at once, one sample or the group, and where the next sample begins.
  int span, slot;
  // The samples' part of a stage; their weights follow.
  int values, stage;
  // A warp's stages and roots.
  int warp;
  Transport transport, weight_transport;

  __host__ __device__ int group() const { return samples * sample; }
  __host__ __device__ int group_weights() const {
    return samples * classes * static_cast<int>(sizeof(float));
  }
  // Roots of a sample, fours of them aligned.
  __host__ __device__ int padded_classes() const { return (classes + 3) / 4 * 4; }
};

__device__ inline int smaller(int64_t a, int b) {
  return a < b ? static_cast<int>(a) : b;
}

// The warp starts to copy bytes, a multiple of 4; of the copy engine's whole pieces the barrier is
// told. Behind them words, as a piece that ends early is one read of 16 bytes to memory checkers.
__device__ inline void copy_span(unsigned char* shared, const unsigned char* global, int bytes,
                                 Transport transport, uint64_t* barrier) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int whole = transport == Transport::kWords ? 0 : bytes / kPiece * kPiece;
  if (transport == Transport::kBulk) {
    if (lane == 0 && whole > 0) copy_row(shared, global, whole, barrier);
  } else {
#pragma unroll 1
    for (int at = lane * kPiece; at < whole; at += 32 * kPiece) {
      copy_piece(shared + at, global + at, kPiece);
    }
  }
#pragma unroll 1
  for (int at = whole + lane * 4; at < bytes; at += 32 * 4) {
    copy_word(reinterpret_cast<float*>(shared + at), reinterpret_cast<const float*>(global + at),
              true);
  }
}

// How a lane reads its columns of a row: those that do not exist repeat others, and what they add
// to is never looked at.
// Four at once, for multiples of four columns.
template <int Groups>
class ColumnsByFours {
 public:
  static constexpr ColumnOrder kOrder = ColumnOrder::kByFours;
  static constexpr int kBlocks = 2 * Groups, kValues = 4 * Groups;

  __device__ explicit ColumnsByFours(int columns)
      : first_(static_cast<int>(threadIdx.x) % 32 / 4 * 4),
        last_(smaller(first_ + 32 * (Groups - 1), columns - 4)) {}

  template <typename In>
  __device__ void load(const In* row, In (&values)[kValues]) const {
#pragma unroll
    for (int h = 0; h < Groups; ++h) {
      const Four<In> four =
          *reinterpret_cast<const Four<In>*>(row + (h + 1 < Groups ? first_ + 32 * h : last_));
#pragma unroll
      for (int q = 0; q < 4; ++q) values[4 * h + q] = four.value[q];
    }
  }

 private:
  int first_, last_;
};

// One by one, for any number of them.
template <int Blocks>
class ColumnsInTurn {
 public:
  static constexpr ColumnOrder kOrder = ColumnOrder::kInTurn;
  static constexpr int kBlocks = Blocks, kValues = 2 * Blocks;

  __device__ explicit ColumnsInTurn(int columns)
      : first_(static_cast<int>(threadIdx.x) % 32 / 4),
        last_{smaller(first_ + 8 * (kValues - 2), columns - 1),
              smaller(first_ + 8 * (kValues - 1), columns - 1)} {}

  template <typename In>
  __device__ void load(const In* row, In (&values)[kValues]) const {
#pragma unroll
    for (int b = 0; b < kValues - 2; ++b) values[b] = row[first_ + 8 * b];
    values[kValues - 2] = row[last_[0]];
    values[kValues - 1] = row[last_[1]];
  }

 private:
  int first_, last_[2];
};

// The samples' rows, centred and weighted, sixteen at a time to the triangle, the last ones eight.
// rows: those of the lane's sample in shared memory; weights: its probabilities; roots: of the
// warp, to be written.
template <typename In, class Columns>
__device__ void add_centred(WarpTriangle<Columns::kBlocks>& triangle, const Columns& columns,
                            const In* rows, const float* weights, float* roots,
                            const RowGroups& groups, uint32_t nothing) {
  using Triangle = WarpTriangle<Columns::kBlocks>;
  constexpr int kValues = Columns::kValues;
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const int classes = groups.classes, padded = groups.padded_classes();
  float mean[kValues], most = 0.0f;
#pragma unroll
  for (int b = 0; b < kValues; ++b) mean[b] = 0.0f;
#pragma unroll 2
  for (int c = 0; c < classes; ++c) {
    In row[kValues];
    columns.load(rows + c * groups.columns, row);
    const float weight = weights[c];
#pragma unroll
    for (int b = 0; b < kValues; ++b) {
      const float value = to_float(row[b]);
      most = fmaxf(most, fabsf(value));
      mean[b] += weight * value;
    }
  }
  const Scale scale = scale_for(most);
  const float factor = scale.back * scale.back;
#pragma unroll 1
  for (int c = lane / 4; c < padded; c += 8) {
    roots[t * padded + c] = c < classes ? square_root(weights[c]) * scale.to_half : 0.0f;
  }
  warp_barrier();
  // Rows c and c + 1 of the lane's sample to the words of its columns; behind the last class rows
  // have no weight.
  const auto split_rows = [&](int c, float root, float next_root, auto to) {
    In first[kValues], second[kValues];
    columns.load(rows + smaller(c, classes - 1) * groups.columns, first);
    columns.load(rows + smaller(c + 1, classes - 1) * groups.columns, second);
#pragma unroll
    for (int b = 0; b < kValues; ++b) {
      uint32_t high, low;
      split_pair(root * (to_float(first[b]) - mean[b]), next_root * (to_float(second[b]) - mean[b]),
                 high, low);
      to(b, high, low);
    }
  };
  int c = 0;
#pragma unroll 1
  for (; c + 2 < classes; c += 4) {
    const Four<float> root = *reinterpret_cast<const Four<float>*>(roots + t * padded + c);
    typename Triangle::Words high, low;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      split_rows(c + 2 * pair, root.value[2 * pair], root.value[2 * pair + 1],
                 [&](int b, uint32_t large, uint32_t small) {
                   high[b][pair] = large;
                   low[b][pair] = small;
                 });
    }
    triangle.add(high, low, factor, nothing);
  }
  if (c < classes) {
    typename Triangle::FewWords high, low;
    split_rows(c, roots[t * padded + c], roots[t * padded + c + 1],
               [&](int b, uint32_t large, uint32_t small) {
                 high[b] = large;
                 low[b] = small;
               });
    triangle.add(high, low, factor, nothing);
  }
}

template <typename In, class Columns>
__device__ void add_plain(WarpTriangle<Columns::kBlocks>& triangle, const Columns& columns,
                          const In* rows, int row_size, uint32_t nothing) {
  constexpr int kValues = Columns::kValues;
#pragma unroll 1
  for (int c = 0; c < kPlainSample; c += 4) {
    In row[4][kValues];
#pragma unroll
    for (int i = 0; i < 4; ++i) columns.load(rows + (c + i) * row_size, row[i]);
    typename WarpTriangle<Columns::kBlocks>::Words high;
    if constexpr (sizeof(In) == 2) {
#pragma unroll
      for (int b = 0; b < kValues; ++b) {
        high[b][0] = pair_of(row[0][b], row[1][b]);
        high[b][1] = pair_of(row[2][b], row[3][b]);
      }
      triangle.add(high, nothing, In{});
    } else {
      float most = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int b = 0; b < kValues; ++b) most = fmaxf(most, fabsf(row[i][b]));
      }
      const Scale scale = scale_for(most);
      typename WarpTriangle<Columns::kBlocks>::Words low;
#pragma unroll
      for (int b = 0; b < kValues; ++b) {
        split_pair(row[0][b] * scale.to_half, row[1][b] * scale.to_half, high[b][0], low[b][0]);
        split_pair(row[2][b] * scale.to_half, row[3][b] * scale.to_half, high[b][1], low[b][1]);
      }
      triangle.add(high, low, scale.back * scale.back, nothing);
    }
  }
}

// partial [blocks, size of a triangle]
template <typename In, class Columns, bool kCentred>
__global__ void __launch_bounds__(kGramThreads, kGramBlocks)
    narrow_rows_kernel(RowGroups groups, uint32_t nothing, float* partial) {
  __shared__ uint64_t barriers[kGramWarps][kStages];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  unsigned char* const stages = dynamic_shared() + warp * groups.warp;
  const bool bulk = groups.transport == Transport::kBulk;
  if (threadIdx.x == 0 && bulk) {
    for (int w = 0; w < kGramWarps; ++w) {
      for (int s = 0; s < kStages; ++s) barrier_init(&barriers[w][s], 1);
    }
    barriers_are_ready();
  }
  __syncthreads();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGramWarps + warp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kGramWarps;
  int64_t next = first;
  int next_stage = 0;
  const auto copy = [&] {
    if (next < groups.count) {
      unsigned char* to = stages + next_stage * groups.stage;
      uint64_t* const barrier = &barriers[warp][next_stage];
      const int64_t begin = next * groups.group();
      const int bytes = smaller(groups.row_bytes - begin, groups.group());
      int weight_bytes = 0;
      int64_t weight_begin = 0;
      if constexpr (kCentred) {
        weight_begin = next * groups.group_weights();
        weight_bytes = smaller(groups.weight_bytes - weight_begin, groups.group_weights());
      }
      if (bulk && lane == 0) {
        const bool both = groups.weight_transport == Transport::kBulk;
        barrier_expect(barrier,
                       bytes / kPiece * kPiece + (both ? weight_bytes / kPiece * kPiece : 0));
      }
      if constexpr (kCentred) {
        copy_span(to + groups.values, groups.weights + weight_begin, weight_bytes,
                  groups.weight_transport, barrier);
      }
      const unsigned char* from = groups.rows + begin;
#pragma unroll 1
      for (int left = bytes; left > 0; left -= groups.span) {
        copy_span(to, from, smaller(left, groups.span), groups.transport, barrier);
        from += groups.span;
        to += groups.slot;
      }
    }
    close_copies();
    next += step;
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
  };
#pragma unroll
  for (int s = 0; s + 1 < kStages; ++s) copy();

  WarpTriangle<Columns::kBlocks> triangle;
  const Columns columns(groups.columns);
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t group = first; group < groups.count; group += step) {
    copy();
    wait_for_copies<kStages - 1>();
    unsigned char* const here = stages + stage * groups.stage;
    if (bulk) barrier_wait(&barriers[warp][stage], parity);
    warp_barrier();
    if (group == groups.count - 1 && groups.row_bytes % groups.group() != 0) {
      // Samples that do not exist are zero, and so are their weights.
      constexpr int kSize = static_cast<int>(sizeof(In));
#pragma unroll 1
      for (int at = static_cast<int>(groups.row_bytes % groups.group()) + lane * kSize;
           at < groups.group(); at += 32 * kSize) {
        *reinterpret_cast<In*>(here + at / groups.span * groups.slot + at % groups.span) = In{};
      }
      if constexpr (kCentred) {
#pragma unroll 1
        for (int at = static_cast<int>(groups.weight_bytes % groups.group_weights()) + lane * 4;
             at < groups.group_weights(); at += 32 * 4) {
          *reinterpret_cast<float*>(here + groups.values + at) = 0.0f;
        }
      }
      warp_barrier();
    }
#pragma unroll 1
    for (int some = 0; some < groups.samples; some += kAtOnce) {
      const int sample = some + lane % kAtOnce;
      const In* rows = reinterpret_cast<const In*>(here + sample * groups.slot);
      if constexpr (kCentred) {
        add_centred(triangle, columns, rows,
                    reinterpret_cast<const float*>(here + groups.values) + sample * groups.classes,
                    reinterpret_cast<float*>(stages + kStages * groups.stage), groups, nothing);
        // The roots may be written again.
        warp_barrier();
      } else {
        add_plain(triangle, columns, rows, groups.columns, nothing);
      }
    }
    // The stage may be filled again.
    warp_barrier();
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  wait_for_copies<0>();
  triangle.finish(reinterpret_cast<float*>(dynamic_shared()), partial);
}

Transport transport_of(const void* data) {
  if (!is_aligned(data, kPiece)) return Transport::kWords;
  return current_device().hopper() ? Transport::kBulk : Transport::kPieces;
}

// Groups of so many times the samples that are multiplied at a time.
template <typename In>
RowGroups groups_of(const NarrowRows<In>& call, int times) {
  const bool centred = call.probabilities != nullptr;
  const int64_t classes = centred ? call.classes : kPlainSample;
  RowGroups groups{};
  groups.rows = reinterpret_cast<const unsigned char*>(call.x);
  groups.weights = reinterpret_cast<const unsigned char*>(call.probabilities);
  groups.row_bytes = call.rows * call.columns * static_cast<int64_t>(sizeof(In));
  groups.weight_bytes = centred ? call.rows * static_cast<int64_t>(sizeof(float)) : 0;
  groups.samples = times * kAtOnce;
  groups.count = ceil_div(call.rows, groups.samples * classes);
  groups.classes = static_cast<int>(classes);
  groups.columns = static_cast<int>(call.columns);
  groups.sample = groups.classes * groups.columns * static_cast<int>(sizeof(In));
  groups.transport = transport_of(call.x);
  groups.weight_transport = transport_of(call.probabilities);
  // The barrier counts the rows.
  if (groups.transport != Transport::kBulk && groups.weight_transport == Transport::kBulk) {
    groups.weight_transport = Transport::kPieces;
  }
  if (groups.sample % kPiece == 0) {
    // Samples 8 banks apart, so that what the four of a group read lies in different ones.
    groups.span = groups.sample;
    groups.slot = (groups.sample + 95) / 128 * 128 + 32;
    groups.values = groups.samples * groups.slot;
  } else {
    groups.span = groups.group();
    groups.slot = groups.sample;
    groups.values = (groups.group() + kPiece - 1) / kPiece * kPiece;
  }
  groups.stage = groups.values + (centred ? groups.group_weights() : 0);
  const int roots = kAtOnce * groups.padded_classes() * static_cast<int>(sizeof(float));
  groups.warp = kStages * groups.stage + (centred ? roots : 0);
  return groups;
}

template <class Columns>
size_t shared_bytes(const RowGroups& groups) {
  return std::max(static_cast<size_t>(groups.warp) * kGramWarps,
                  WarpTriangle<Columns::kBlocks>::kBytes);
}

// Larger groups cost fewer instructions a row; not so large that shared memory holds fewer blocks
// than registers do, nor so few that some warps have much more to do than others.
template <class Columns, typename In>
RowGroups best_groups(const NarrowRows<In>& call) {
  constexpr int kBlocks = Columns::kBlocks <= 2 ? 4 : Columns::kBlocks == 3 ? 3 : 2;
  constexpr int kMostTimes = 8, kRounds = 8;
  const Device& device = current_device();
  const RowGroups smallest = groups_of(call, 1);
  const int64_t warps = int64_t{device.processors} * kBlocks * kGramWarps;
  const int64_t memory = static_cast<int64_t>(device.shared) / (kBlocks * kGramWarps);
  const int64_t times = std::min(memory / smallest.warp, smallest.count / (warps * kRounds));
  return groups_of(call, static_cast<int>(std::clamp<int64_t>(times, 1, kMostTimes)));
}

template <typename In, class Columns, bool kCentred>
Work<float> plan_rows(const NarrowRows<In>& call) {
  using Triangle = WarpTriangle<Columns::kBlocks>;
  const RowGroups groups = best_groups<Columns>(call);
  const auto kernel = narrow_rows_kernel<In, Columns, kCentred>;
  const size_t shared = shared_bytes<Columns>(groups);
  const int64_t blocks = std::min<int64_t>(
      resident_blocks(reinterpret_cast<const void*>(kernel), kGramThreads, shared),
      ceil_div(groups.count, kGramWarps));
  return {blocks * Triangle::kSize, [=, sum = call.sum](float* partial, cudaStream_t stream) {
            const cudaError_t error =
                launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kGramThreads), shared,
                       stream, groups, 0u, partial);
            if (error != cudaSuccess) return error;
            return add_blocks(partial, blocks, Triangle::kSize,
                              WarpTrianglePlace<Columns::kBlocks, Columns::kOrder>{}, sum, stream);
          }};
}

template <class Columns, typename In>
Work<float> plan_columns(const NarrowRows<In>& call) {
  if (call.probabilities != nullptr) return plan_rows<In, Columns, true>(call);
  return plan_rows<In, Columns, false>(call);
}

}  // namespace

template <typename In>
bool NarrowRows<In>::fits() const {
  if (rows < 1 || columns < 1 || columns > kMostColumns || sum.groups != 1) return false;
  if (!is_aligned(x, 4) || (sizeof(In) == 2 && columns % 4 != 0)) return false;
  // Before the sizes are computed, which are ints.
  const int64_t shared = static_cast<int64_t>(current_device().shared);
  if (probabilities != nullptr && classes > shared / kGramWarps) return false;
  return static_cast<int64_t>(groups_of(*this, 1).warp) * kGramWarps <= shared;
}

template <typename In>
Work<float> NarrowRows<In>::plan() const {
  if constexpr (sizeof(In) == 2) {
    return columns <= 32 ? plan_columns<ColumnsByFours<1>>(*this)
                         : plan_columns<ColumnsByFours<2>>(*this);
  } else {
    const int64_t blocks = ceil_div(columns, 16);
    const bool fours = columns % 4 == 0;
    if (blocks == 1) return plan_columns<ColumnsInTurn<1>>(*this);
    if (blocks == 2 && fours) return plan_columns<ColumnsByFours<1>>(*this);
    if (blocks == 2) return plan_columns<ColumnsInTurn<2>>(*this);
    if (blocks == 3) return plan_columns<ColumnsInTurn<3>>(*this);
    if (fours) return plan_columns<ColumnsByFours<2>>(*this);
    return plan_columns<ColumnsInTurn<4>>(*this);
  }
}

template struct NarrowRows<float>;
template struct NarrowRows<BFloat16>;
template struct NarrowRows<Float16>;

}  // namespace hesskern::cuda
