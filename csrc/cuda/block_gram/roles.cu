// Gram matrices of a softmax's samples of 129 to 224 columns with two roles in a block: some warps
// make operands, others multiply, so that neither waits for the other. Compute capability 9.0.
//
// One warp has the copy engine bring sets of four samples to a ring of places. Up to seven warps,
// one per 32 columns, make operands of a slab of one or two sets (samples.h) in one of
// two buffers; a place is filled again as soon as its set was read for the second time. Two
// warpgroups multiply a buffer by wgmma: the matrices [8, 8] of 128 bytes are its core matrices.
// The triangle is cut into bands of 64 rows, each from its diagonal on; the first and the fourth
// belong to one warpgroup, the second and the third to the other. A slab's products are summed in
// fresh registers, 64 or 96 columns at a time, and added to the sums under the slab's scales.
// Barriers in shared memory (mbarrier) count what is full, and what may be filled again.
//
// 200 columns (224 with the padding), 10 classes, a slab of 80 rows (64 KB), in cycles: tensor
// cores 3840; shared memory 6700, of which the products read 4320, the makers read 1300 and write
// 560 and the copies write 500; instructions of the makers 8800 and of those who multiply 8700,
// 4400 a scheduler. Where they take turns (block_gram.cu) it is 13500, measured.
#include "cuda/core/barrier.h"
#include "cuda/core/device.h"
#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"
#include "cuda/core/wgmma.h"
#include "roles.h"
#include "slabs.h"

namespace hesskern::cuda {

// Not without a name: where the kernel's body is left out, much of it would be unused.
namespace roles {

// The widths that go this way; the only place that says so. Not one of 65 to 128: registers hold
// three blocks of the other kernel on a multiprocessor then, which take turns by themselves. Not
// 225 to 256: two buffers of operands leave no room for the samples.
constexpr int kFewestColumns = 129, kMostColumns = 224;

// Half of the warps make operands, half multiply.
constexpr int kThreads = 512, kGroupThreads = 128, kWarps = 8;
// Places for sets of samples at most.
constexpr int kMostPlaces = 8;
// Sixteens of rows of a slab at most: they are one sum of the tensor cores, which cut sums off.
constexpr int kMostSteps = 8;

// A piece of a band: rows row, ... + 63 by columns column, ... + width - 1 of the operands. Of its
// rows those before `wanted` are another band's. first: of a thread's sums.
struct Piece {
  int row, column, width, wanted, first;
};

// 32 Groups columns.
template <int Groups>
struct Shape {
  static constexpr int kGroups = Groups, kColumns = 32 * Groups;
  static constexpr int kEights = 4 * Groups, kHalf = kEights * 32, kHalfBytes = kHalf * 4;
  static constexpr int kAhead = 5;
  // Columns that are multiplied at a time, and whose sums registers hold beside all others.
  static constexpr int kWide = Groups > 6 ? 64 : 96;
  static_assert(Groups >= 5 && Groups < kWarps);

  // The index-th piece of a warpgroup; after the last one pieces have no width.
  __host__ __device__ static constexpr Piece piece(int group, int index) {
    int first = 0;
    for (int band = 0; 64 * band < kColumns; ++band) {
      if ((band == 0 || band == 3) != (group == 0)) continue;
      const int row = 64 * band < kColumns - 64 ? 64 * band : kColumns - 64;
      for (int column = 64 * band; column < kColumns; column += kWide) {
        const int width = kColumns - column < kWide ? kColumns - column : kWide;
        if (index-- == 0) return {row, column, width, 64 * band, first};
        first += width / 2;
      }
    }
    return {0, 0, 0, 0, first};
  }
  __host__ __device__ static constexpr int sums(int group) { return piece(group, 1 << 20).first; }

  // The triangle as it lies in registers: [sums of the first warpgroup, then of the second, 128].
  static constexpr int kSize = (sums(0) + sums(1)) * kGroupThreads;
};

// Where an element belongs; (0, -1) for one that belongs nowhere.
template <class S>
struct Place {
  __device__ void operator()(int f, int& row, int& column) const {
    const int thread = f % kGroupThreads, lane = thread % 32;
    int sum = f / kGroupThreads, group = 0, index = 0;
    if (sum >= S::sums(0)) sum -= S::sums(0), group = 1;
    while (S::piece(group, index + 1).width > 0 && S::piece(group, index + 1).first <= sum) ++index;
    const Piece piece = S::piece(group, index);
    const int e = sum - piece.first;
    const int i = piece.row + thread / 32 * 16 + lane / 4 + e % 4 / 2 * 8;
    const int j = piece.column + e / 4 * 8 + lane % 4 * 2 + e % 2;
    row = gram_column<ColumnOrder::kByFours>(i / 8, i % 8);
    column = gram_column<ColumnOrder::kByFours>(j / 8, j % 8);
    // A band's first 64 columns hold both of an element and its mirror image.
    if (i < piece.wanted || row > column) row = 0, column = -1;
  }
};

// How a block's shared memory is cut, in words: operands [2 buffers, eights of rows, part, blocks
// of eight columns] of matrices [8, 8] of float16; places of four samples each; what every group of
// columns has of weights and their roots; factors that undo the scales [2, groups].
struct Cut {
  int steps, operand, places, place, weights, backs, total;

  template <typename In>
  Cut(const SampleSlabs<In>& slabs, int groups, int count)
      : steps(slabs.steps()), operand(2 * 2 * slabs.steps() * groups * 4 * 32), places(count) {
    place = 2 * operand;
    weights = place + count * 4 * slabs.slot();
    backs = weights + groups * 2 * slabs.weight_size();
    total = backs + (2 * groups + 3) / 4 * 4;
  }

  size_t bytes() const { return sizeof(float) * static_cast<size_t>(total); }
};

#ifdef HESSKERN_WGMMA

// The place, or the buffer, that is next, and the parity of the phase in which it is full.
struct Turn {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
};

// full, empty [places]; ready, freed [2 buffers].
struct Barriers {
  uint64_t full[kMostPlaces], empty[kMostPlaces], ready[2], freed[2];
};

// One thread: samples to the ring of places.
template <typename In>
__device__ void copy_samples(const SampleSlabs<In>& in, int count, const Cut& cut, In* places,
                             Barriers& barriers) {
  const int size = in.classes * in.columns, slot = in.slot() * 4 / in.kSize;
  Turn turn;
  for (int slab = static_cast<int>(blockIdx.x); slab < count; slab += static_cast<int>(gridDim.x)) {
    for (int set = 0; set < in.sets; ++set) {
      const int64_t first = (int64_t{slab} * in.sets + set) * 4;
      const int64_t left = in.samples - first;
      const int samples = left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
      barrier_wait(&barriers.empty[turn.index], turn.parity ^ 1);
      barrier_expect(&barriers.full[turn.index], samples * size * in.kSize);
      for (int i = 0; i < samples; ++i) {
        copy_row(places + (turn.index * 4 + i) * slot, in.x + (first + i) * in.sample_stride,
                 size * in.kSize, &barriers.full[turn.index]);
      }
      turn.next(cut.places);
    }
  }
}

// A warp: operands of its 32 columns.
template <class S, typename In>
__device__ void make_operands(const SampleSlabs<In>& in, int count, const Cut& cut, float* memory,
                              Barriers& barriers) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4, step = static_cast<int>(gridDim.x);
  const int slot = in.slot() * 4 / in.kSize;
  const In* const places = reinterpret_cast<const In*>(memory + cut.place);
  // Columns that do not exist repeat others.
  // Where there are none the lane reads others of its group, with which it shares a scale.
  const int column = 32 * warp + (32 * warp + 4 * g < in.columns ? 4 * g : 0);
  float* const weights = memory + cut.weights + warp * 2 * in.weight_size();
  const auto copy_weights = [&](int slab) {
    for (int set = 0; slab < count && set < in.sets; ++set) {
      const int64_t sample = (int64_t{slab} * in.sets + set) * 4 + t;
      const bool inside = sample < in.samples;
      for (int c = g; c < in.classes; c += 8) {
        copy_word(weights + (set * in.classes + c) * 4 + t,
                  in.weights + (inside ? sample * in.classes + c : 0), inside);
      }
    }
    close_copies();
  };
  Turn buffer, place;
  int slab = static_cast<int>(blockIdx.x);
  copy_weights(slab);
  for (; slab < count; slab += step) {
    wait_for_copies<0>();
    warp_barrier();
    int used[kMostSets];
    const In* first = nullptr;
    const auto find = [&](int set) {
      barrier_wait(&barriers.full[place.index], place.parity);
      used[set] = place.index;
      const In* const here = places + place.index * 4 * slot + column;
      place.next(cut.places);
      // Samples that do not exist have no weight, and are the slab's first one otherwise: nothing
      // is copied after the last slab.
      if (set == 0) first = here;
      return (int64_t{slab} * in.sets + set) * 4 + t < in.samples ? here + t * slot : first;
    };
    const auto rooted = [&] {
      copy_weights(slab + step);
      barrier_wait(&barriers.freed[buffer.index], buffer.parity ^ 1);
    };
    const auto made = [&](int set) {
      warp_barrier();
      if (lane == 0) barrier_arrive(&barriers.empty[used[set]]);
    };
    uint32_t* const operands =
        reinterpret_cast<uint32_t*>(memory) + buffer.index * cut.operand + 4 * warp * 32;
    make_samples<S>(in, weights, weights + in.weight_size(), operands,
                    memory + cut.backs + buffer.index * S::kGroups + warp, find, rooted, made);
    show_to_wgmma();
    warp_barrier();
    if (lane == 0) barrier_arrive(&barriers.ready[buffer.index]);
    buffer.next(2);
  }
  wait_for_copies<0>();
}

// The warpgroup's share of the triangle.
template <class S, int Group>
class Share {
 public:
  __device__ Share() {
#pragma unroll
    for (int i = 0; i < S::sums(Group); ++i) sum_[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kWide / 2; ++i) recent_[i] = 0.0f;
  }

  // Adds a slab: operands in units of 16 bytes as a descriptor has them; backs [groups].
  __device__ void add(uint32_t operands, int steps, const float* backs) {
    add_piece<0>(operands, steps, backs);
  }

  // To the block's place in partial [blocks, kSize].
  __device__ void finish(float* partial) const {
    float* const out = partial + static_cast<int64_t>(blockIdx.x) * S::kSize +
                       Group * S::sums(0) * kGroupThreads + threadIdx.x % kGroupThreads;
#pragma unroll
    for (int i = 0; i < S::sums(Group); ++i) out[i * kGroupThreads] = sum_[i];
  }

 private:
  // What wgmma is told about an operand, 64 bits: 0-13, address / 16; 16-29, "leading" distance
  // / 16, to the next eight k; 32-45, "stride" distance / 16, to the next eight rows or columns;
  // 62-63, swizzle: 0, none.
  static constexpr uint32_t kHigh = 128 / 16, kLow = 2 * S::kHalfBytes / 16 << 16;
  static constexpr int kStep = 4 * S::kHalfBytes / 16, kSmall = S::kHalfBytes / 16;

  __device__ static uint64_t descriptor(uint32_t address) {
    return static_cast<uint64_t>(kHigh) << 32 | (address + kLow);
  }

  template <int Index>
  __device__ void add_piece(uint32_t operands, int steps, const float* backs) {
    constexpr Piece kPiece = S::piece(Group, Index);
    if constexpr (kPiece.width > 0) {
      constexpr int kWidth = kPiece.width;
      const uint32_t a = operands + kPiece.row, b = operands + kPiece.column;
      pin(recent_);
      wgmma_fence();
      // Small products first, which fresh sums keep whole.
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        wgmma<Float16, kWidth, false>(recent_, descriptor(a + s * kStep + kSmall),
                                      descriptor(b + s * kStep), s);
        wgmma<Float16, kWidth, false>(recent_, descriptor(a + s * kStep),
                                      descriptor(b + s * kStep + kSmall), 1);
      }
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        wgmma<Float16, kWidth, false>(recent_, descriptor(a + s * kStep), descriptor(b + s * kStep),
                                      1);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(recent_);
      const float left = backs[(kPiece.row + threadIdx.x % kGroupThreads / 32 * 16) / 32];
#pragma unroll
      for (int group = 0; group < kWidth / 32; ++group) {
        const float factor = left * backs[kPiece.column / 32 + group];
#pragma unroll
        for (int i = 16 * group; i < 16 * group + 16; ++i) {
          sum_[kPiece.first + i] += recent_[i] * factor;
        }
      }
      add_piece<Index + 1>(operands, steps, backs);
    }
  }

  float sum_[S::sums(Group)], recent_[S::kWide / 2];
};

template <class S, int Group>
__device__ void multiply(int count, const Cut& cut, const float* memory, Barriers& barriers,
                         float* partial) {
  Share<S, Group> share;
  const uint32_t local = (shared_address(memory) & 0x3ffff) >> 4;
  // One number says all, for registers have no room for more.
  for (int turn = 0; static_cast<int>(blockIdx.x + turn * gridDim.x) < count; ++turn) {
    const int buffer = turn % 2;
    barrier_wait(&barriers.ready[buffer], static_cast<uint32_t>(turn / 2 % 2));
    share.add(local + buffer * (cut.operand / 4), cut.steps,
              memory + cut.backs + buffer * S::kGroups);
    warp_barrier();
    if (threadIdx.x % 32 == 0) barrier_arrive(&barriers.freed[buffer]);
  }
  share.finish(partial);
}

#endif

// partial [blocks, S::kSize]
template <class S, typename In>
__global__ void __launch_bounds__(kThreads, 1)
    block_roles_kernel(const __grid_constant__ SampleSlabs<In> slabs, int count,
                       const __grid_constant__ Cut cut, float* partial) {
#ifdef HESSKERN_WGMMA
  // As the hardware shares 65536 registers out: 2 x 128 x (72 + 184).
  constexpr int kMakerRegisters = 72, kMultiplierRegisters = 184;
  constexpr int kMakerThreads = kThreads / 2;
  __shared__ Barriers barriers;
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  if (thread == 0) {
    for (int place = 0; place < cut.places; ++place) {
      barrier_init(&barriers.full[place], 1);
      barrier_init(&barriers.empty[place], S::kGroups);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {
      barrier_init(&barriers.ready[buffer], S::kGroups);
      barrier_init(&barriers.freed[buffer], 2 * kGroupThreads / 32);
    }
    barriers_are_ready();
  }
  if (slabs.sets * slabs.pairs() % 2 != 0) {
    // The last half of sixteen rows, which no pair of rows fills.
    for (int i = thread; i < 2 * S::kHalf; i += kThreads) {
      memory[cut.operand - 1 - i] = memory[2 * cut.operand - 1 - i] = 0.0f;
    }
    show_to_wgmma();
  }
  __syncthreads();

  if (thread < kMakerThreads) {
    give_up_registers<kMakerRegisters>();
    if (warp < S::kGroups) {
      make_operands<S>(slabs, count, cut, memory, barriers);
    } else if (thread == kMakerThreads - 32) {
      copy_samples(slabs, count, cut, reinterpret_cast<In*>(memory + cut.place), barriers);
    }
    return;
  }
  take_registers<kMultiplierRegisters>();
  if (thread < kMakerThreads + kGroupThreads) {
    multiply<S, 0>(count, cut, memory, barriers, partial);
  } else {
    multiply<S, 1>(count, cut, memory, barriers, partial);
  }
#endif
}

// visit(Shape) for so many columns.
template <class Visit>
auto with_shape(int columns, Visit visit) {
  if (columns <= 160) return visit(Shape<5>{});
  if (columns <= 192) return visit(Shape<6>{});
  return visit(Shape<7>{});
}

// With as many places as there is room for, from the sets of a slab on; none where it does not fit.
template <typename In>
Cut cut_of(const SampleSlabs<In>& slabs) {
  constexpr size_t kStatic = 1024;
  const int groups = (slabs.columns + 31) / 32;
  int places = kMostPlaces;
  while (places >= slabs.sets &&
         Cut(slabs, groups, places).bytes() + kStatic > current_device().shared) {
    --places;
  }
  return Cut(slabs, groups, places >= slabs.sets ? places : 0);
}

// Slabs of as many sets as are best and fit.
template <typename In>
SampleSlabs<In> slabs_of(SampleSlabs<In> slabs) {
  // One set of more classes than these makes a slab long enough.
  constexpr int kFewClasses = 12;
  for (slabs.sets = slabs.classes > kFewClasses ? 1 : kMostSets; slabs.sets > 1; --slabs.sets) {
    if (cut_of(slabs).places > 0) break;
  }
  return slabs;
}

}  // namespace roles

template <typename In>
bool roles_pay(const SampleSlabs<In>& slabs) {
  return current_device().hopper() && slabs.bulk && slabs.weights != nullptr &&
         slabs.columns >= roles::kFewestColumns && slabs.columns <= roles::kMostColumns &&
         roles::slabs_of(slabs).steps() <= roles::kMostSteps &&
         roles::cut_of(roles::slabs_of(slabs)).places > 0;
}

template <typename In>
Work<float> plan_roles(const SampleSlabs<In>& source, const SymmetricSum<float>& sum) {
  const SampleSlabs<In> slabs = roles::slabs_of(source);
  return roles::with_shape(slabs.columns, [&](auto shape) -> Work<float> {
    using S = decltype(shape);
    const roles::Cut cut = roles::cut_of(slabs);
    const auto kernel = roles::block_roles_kernel<S, In>;
    const int count = static_cast<int>(slabs.count());
    const int64_t blocks = std::min<int64_t>(
        resident_blocks(reinterpret_cast<const void*>(kernel), roles::kThreads, cut.bytes()),
        count);
    return {blocks * S::kSize, [=](float* partial, cudaStream_t stream) {
              const cudaError_t error =
                  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(roles::kThreads),
                         cut.bytes(), stream, slabs, count, cut, partial);
              if (error != cudaSuccess) return error;
              return add_blocks(partial, blocks, int64_t{S::kSize}, roles::Place<S>{}, sum, stream);
            }};
  });
}

#define HESSKERN_ROLES(In)                             \
  template bool roles_pay<In>(const SampleSlabs<In>&); \
  template Work<float> plan_roles<In>(const SampleSlabs<In>&, const SymmetricSum<float>&);
HESSKERN_ROLES(float)
HESSKERN_ROLES(BFloat16)
HESSKERN_ROLES(Float16)
#undef HESSKERN_ROLES

}  // namespace hesskern::cuda
