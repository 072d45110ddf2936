// Output Hessian of softmax cross-entropy: acc += alpha sum (rows of Q G)^T (rows of Q G) with
// Q G = sqrt(p_c) (g_c - sum_c' p_c' g_c').
//
// Rows of few columns have kernels of their own (narrow_rows.cu, block_gram.cu). Up to 32 classes,
// rows of G at multiples of 16 bytes: a tile of 128 x 128 (or 64 x 64) takes up to 32 rows, whole
// samples, which are copied to shared memory three tiles ahead and centred and scaled there, so
// that G is read once per row of tiles: once in all for m <= 128, which memory bounds. On compute
// capability 9.0 more columns than that are centred into 16-bit parts (centre_split.cu), which
// core/parts_product.h multiplies. More classes, or another layout: some samples at a time are
// centred into a workspace, whose covariance follows (input_covariance.cu). N t (c m (m + 1))
// operations on one triangle, three times on tensor cores.
#include <cmath>
#include <type_traits>

#include "block_gram/block_gram.h"
#include "centre_split.h"
#include "core/elements.h"
#include "core/stage.h"
#include "core/symmetric.h"
#include "core/symmetric_parts.h"
#include "input_covariance.h"
#include "narrow_rows.h"
#include "output_hessian.h"

namespace hesskern::cuda {

namespace {

// Rows of a tile: whole samples of up to that many classes.
constexpr int kSampleDepth = 32;
// Elements that are centred into the workspace at a time: 64 MB of float32.
constexpr int64_t kCentred = 1 << 24;

// How the rows of a tile's samples are centred: weights [rows] are their probabilities.
template <int Extent>
__device__ void centre(float* tile, const TileLayout<float, Extent, kSampleDepth>& layout,
                       const float* weights, int classes) {
  const int pairs = kSampleDepth / classes * Extent;
  for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += kThreads) {
    const int first = pair / Extent * classes, i = pair % Extent;
    float mean = 0.0f;
#pragma unroll 4
    for (int c = 0; c < classes; ++c) mean += weights[first + c] * tile[layout.index(first + c, i)];
#pragma unroll 4
    for (int c = 0; c < classes; ++c) {
      float& value = tile[layout.index(first + c, i)];
      value = square_root(weights[first + c]) * (value - mean);
    }
  }
}

template <class Tile>
struct CentredMemory {
  using Copies = CopyStage<float, Tile::kRows, kSampleDepth>;
  using Tiles = ProductMemory<Copies, Copies>;
  static constexpr int kAhead = Tiles::kBuffers - 1;
  static constexpr size_t kBytes = Tiles::kBytes + Tiles::kBuffers * kSampleDepth * sizeof(float);

  __device__ static float* tiles(int step) {
    return Tiles::tiles() + (step & kAhead) * Tiles::kSize;
  }
  __device__ static float* weights(int step) {
    return reinterpret_cast<float*>(dynamic_shared() + Tiles::kBytes) +
           (step & kAhead) * kSampleDepth;
  }
};

// partial as in symmetric_kernel; rows of the plan are those of the tiles, full or not.
template <class Tile>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<Tile>())
    centred_kernel(OutputHessian<float> call, int64_t rows, SymmetricPlan plan, float* partial) {
  using Memory = CentredMemory<Tile>;
  const SymmetricBlock<Tile> block(plan, call.sum.order, rows);
  const int classes = static_cast<int>(call.classes), used = kSampleDepth / classes * classes;
  const Elements<float> elements{
      call.jacobian, {call.class_stride}, {1}, call.samples * call.classes, call.outputs};
  typename Memory::Copies a(elements, false, block.row0, nullptr, used);
  typename Memory::Copies b(elements, false, block.column0, nullptr, used);
  int64_t row = block.begin / kSampleDepth * used;
  a.start(row);
  b.start(row);
  const int steps =
      block.begin < block.end ? static_cast<int>((block.end - block.begin) / kSampleDepth) : 0;
  const auto start = [&](int step) {
    if (step < steps) {
      a.copy(Memory::tiles(step));
      if (!block.diagonal) b.copy(Memory::tiles(step) + Memory::Tiles::kSizeA);
      const int thread = static_cast<int>(threadIdx.x);
      if (thread < kSampleDepth) {
        const bool inside = thread < used && row + thread < elements.k_end;
        copy_word(Memory::weights(step) + thread, call.probabilities + (inside ? row + thread : 0),
                  inside);
      }
      row += used;
    }
    close_copies();
  };
  Tile tile;
#pragma unroll
  for (int step = 0; step < Memory::kAhead; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Memory::kAhead - 1>();
    __syncthreads();
    start(step + Memory::kAhead);
    float *left = Memory::tiles(step), *right = left + Memory::Tiles::kSizeA;
    centre<Tile::kRows>(left, a.layout(), Memory::weights(step), classes);
    if (!block.diagonal) centre<Tile::kRows>(right, b.layout(), Memory::weights(step), classes);
    __syncthreads();
    tile.add(left, a.layout(), block.diagonal ? left : right, b.layout());
  }
  block.finish(tile, call.sum, partial);
}

// out := the rows of Q G: element (n, t, c), i at row k = (n t + t) c + c of [k, pitch], or, along
// positions, at k = (n c + c) t + t of [m, pitch].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    centre_kernel(OutputHessian<T> call, bool along_positions, int64_t pitch, T* out) {
  const int64_t count = call.samples * call.positions * call.outputs;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t inner = along_positions ? call.positions : call.outputs;
    const int64_t middle = along_positions ? call.outputs : call.positions;
    const int64_t sample = index / inner / middle, second = index / inner % middle;
    const int64_t i = along_positions ? second : index % inner;
    const int64_t position = along_positions ? index % inner : second;
    const T* values = call.jacobian + sample * call.sample_stride + i * call.output_stride +
                      position * call.position_stride;
    const T* p = call.probabilities + sample * call.classes;
    T* target = along_positions
                    ? out + i * pitch + sample * call.classes * call.positions + position
                    : out + (sample * call.positions + position) * call.classes * pitch + i;
    const int64_t step = along_positions ? call.positions : pitch;
    T mean = T(0);
    for (int64_t c = 0; c < call.classes; ++c) mean += p[c] * values[c * call.class_stride];
    for (int64_t c = 0; c < call.classes; ++c) {
      target[c * step] = std::sqrt(p[c]) * (values[c * call.class_stride] - mean);
    }
  }
}

template <typename T>
bool rows_are_copied(const OutputHessian<T>& call) {
  if (sizeof(T) == 8 || call.classes > kSampleDepth || call.positions > 1) return false;
  return copies_in_pieces(call.jacobian, {call.output_stride}, {call.class_stride}) &&
         (call.samples == 1 || call.sample_stride == call.classes * call.class_stride);
}

// Larger tiles where the device has the shared memory for them.
template <class Visit>
auto with_tile(const OutputHessian<float>& call, Visit visit) {
  return with_symmetric_tile<float, kSampleDepth>(call.outputs, call.tf32, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    using Small = TensorTile<Tile::kTerms, 64, 64, kSampleDepth>;
    if (CentredMemory<Tile>::kBytes > current_device().shared) return visit(Tag<Small>());
    return visit(tag);
  });
}

// Rows of the tiles, those included that no sample fills.
int64_t tile_rows(const OutputHessian<float>& call) {
  return ceil_div(call.samples, kSampleDepth / call.classes) * kSampleDepth;
}

// The samples that are centred at a time, and what becomes of them.
template <typename T>
struct CentredSamples {
  int64_t samples, pitch, size;
  bool along_positions;

  explicit CentredSamples(const OutputHessian<T>& call)
      : samples(std::clamp<int64_t>(kCentred / (call.classes * call.outputs * call.positions), 1,
                                    call.samples)),
        along_positions(call.positions > 1 && call.position_stride == 1) {
    const int64_t rows = samples * call.classes * call.positions;
    // Rows that can be copied in pieces.
    pitch = ceil_div(along_positions ? rows : call.outputs, 4) * 4;
    size = pitch * (along_positions ? call.outputs : rows);
  }

  InputCovariance<T, T> covariance(const OutputHessian<T>& call, const T* rows,
                                   int64_t count) const {
    const Axis along{1}, across{pitch};
    return {rows,
            along_positions ? along : across,
            along_positions ? across : along,
            count * call.classes * call.positions,
            call.outputs,
            false,
            call.tf32,
            call.sum};
  }
};

template <typename T>
Work<T> plan_centred(const OutputHessian<T>& call) {
  const CentredSamples<T> part(call);
  const int64_t last = (call.samples - 1) % part.samples + 1;
  const auto covariance = [=](const T* rows, int64_t count) {
    return part.covariance(call, rows, count).plan();
  };
  const int64_t workspace = part.size + std::max(covariance(nullptr, part.samples).workspace,
                                                 covariance(nullptr, last).workspace);
  return {workspace, [=](T* memory, cudaStream_t stream) {
            for (int64_t first = 0; first < call.samples; first += part.samples) {
              OutputHessian<T> some = call;
              some.samples = std::min(part.samples, call.samples - first);
              some.jacobian += first * call.sample_stride;
              some.probabilities += first * call.classes;
              cudaError_t error =
                  launch(centre_kernel<T>, grid_for(some.samples * call.positions * call.outputs),
                         dim3(kThreads), 0, stream, some, part.along_positions, part.pitch, memory);
              if (error == cudaSuccess) {
                error = covariance(memory, some.samples).run(memory + part.size, stream);
              }
              if (error != cudaSuccess) return error;
            }
            return cudaSuccess;
          }};
}

// The call for the narrow rows' kernel; without rows if that cannot take its layout.
template <typename In>
NarrowRows<In> narrow_rows(const OutputHessian<In, float>& call) {
  const bool columns = call.outputs == 1 || call.output_stride == 1;
  const bool rows = call.class_stride == call.outputs;
  const bool samples = call.samples == 1 || call.sample_stride == call.classes * call.outputs;
  const bool contiguous = call.positions == 1 && columns && rows && samples;
  return {call.jacobian, contiguous ? call.samples * call.classes : 0,
          call.outputs,  call.probabilities,
          call.classes,  call.sum};
}

// The call for the kernel of 65 to 256 columns; without samples if that cannot take its layout.
template <typename In>
BlockSamples<In> block_samples(const OutputHessian<In, float>& call) {
  const bool neighbours = call.positions == 1 && call.output_stride == 1;
  return {call.jacobian,
          call.probabilities,
          neighbours && call.outputs >= kFewestBlockColumns ? call.samples : 0,
          call.classes,
          call.outputs,
          call.sample_stride,
          call.class_stride,
          call.sum};
}

// The centred rows of samples first_row / classes, ..., as 16-bit parts.
CentreSplit centred_parts(const OutputHessian<float>& call, int64_t first_row,
                          const PackedRows& to) {
  const int64_t first = first_row / call.classes;
  return {call.jacobian + first * call.sample_stride,
          call.probabilities + first * call.classes,
          to.rows / call.classes,
          call.classes,
          call.outputs,
          call.sample_stride,
          call.class_stride,
          to.parts,
          to.padded(),
          to.part_step(),
          to.exponents,
          to.flags};
}

// Whether products of 16-bit parts are faster: they begin with four launches or so.
bool as_parts(const OutputHessian<float>& call) {
  const double order = static_cast<double>(call.outputs);
  const double rows = static_cast<double>(call.samples) * static_cast<double>(call.classes);
  const PackedRows all{nullptr, call.samples * call.classes, call.outputs, nullptr, nullptr};
  return order * order * rows >= call.least_in_parts && call.classes <= kLongestPartsSum &&
         parts_products_available() && centred_parts(call, 0, all).fits();
}

// The same with the rows of Q G as two float16: one read of G, one write of the parts, and the
// products of core/parts_product.h.
Work<float> plan_parts(const OutputHessian<float>& call) {
  return plan_packed_symmetric(PartsType::kTwoFloat16, true, call.samples * call.classes,
                               call.classes, call.sum, {},
                               [call](int64_t first, const PackedRows& to, cudaStream_t stream) {
                                 return centred_parts(call, first, to).run(stream);
                               });
}

}  // namespace

template <typename In, typename T>
bool OutputHessian<In, T>::readable() const {
  if constexpr (!std::is_same_v<In, T>) {
    return narrow_rows(*this).fits() || block_samples(*this).fits();
  }
  return true;
}

template <typename In, typename T>
Work<T> OutputHessian<In, T>::plan() const {
  if constexpr (!std::is_same_v<In, T>) {
    const NarrowRows<In> narrow = narrow_rows(*this);
    return narrow.fits() ? narrow.plan() : block_samples(*this).plan();
  } else {
    if constexpr (sizeof(T) == 4) {
      const NarrowRows<T> narrow = narrow_rows(*this);
      if (narrow.fits()) return narrow.plan();
      const BlockSamples<T> block = block_samples(*this);
      if (block.fits()) return block.plan();
      if (positions == 1 && output_stride == 1 && as_parts(*this)) return plan_parts(*this);
      if (rows_are_copied(*this)) {
        return with_tile(*this, [&](auto tag) {
          using Tile = typename decltype(tag)::Type;
          const int64_t rows = tile_rows(*this);
          const SymmetricPlan plan = plan_symmetric<Tile>(1, outputs, rows);
          return symmetric_work<Tile>(centred_kernel<Tile>, CentredMemory<Tile>::kBytes, plan, sum,
                                      [=, call = *this](auto start, float* partial) {
                                        return start(call, rows, plan, partial);
                                      });
        });
      }
    }
    return plan_centred(*this);
  }
}

template struct OutputHessian<float>;
template struct OutputHessian<BFloat16, float>;
template struct OutputHessian<Float16, float>;
template struct OutputHessian<double>;

}  // namespace hesskern::cuda
