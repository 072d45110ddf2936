// Output Hessian of softmax cross-entropy: acc += alpha sum (rows of Q G)^T (rows of Q G) with
// Q G = sqrt(p_c) (g_c - sum_c' p_c' g_c').
//
// Up to 32 classes: a tile of 32 rows takes whole samples; the thread that reads the classes of one
// output centres and scales them on their way into shared memory, so that G is read once per row
// of tiles: once in all for m <= 128, which memory bounds. More classes: their means first, then
// rows centred as they are read, so that G is read twice.
// N t (c m (m + 1)) operations on one triangle, three times on tensor cores.
#include <cmath>

#include "elements.h"
#include "output_hessian.h"
#include "stage.h"
#include "symmetric.h"

namespace hesskern::cuda {

namespace {

// Rows of a tile: whole samples of up to that many classes, or rows on their own.
constexpr int kSampleDepth = 32, kRowDepth = 16;

// A sample and one of its positions.
struct Place {
  int64_t sample, position;
};

template <typename T>
__device__ inline Place place_of(const OutputHessian<T>& call, int64_t index) {
  return {index / call.positions, index % call.positions};
}

template <typename T>
__device__ inline const T* values_of(const OutputHessian<T>& call, Place place, int64_t output) {
  return call.jacobian + place.sample * call.sample_stride + output * call.output_stride +
         place.position * call.position_stride;
}

// Rows of whole samples: what Stage is to single elements.
template <typename T>
struct WholeSamples {
  using Value = T;
  OutputHessian<T> call;
  __device__ void select(int64_t) {}
};

template <typename T, int Extent>
class CentredStage {
 public:
  using Value = T;
  using Layout = TileLayout<T, Extent, kSampleDepth>;
  static constexpr int kBuffers = 2;
  static constexpr size_t kTableBytes = 0;

  __device__ CentredStage(const WholeSamples<T>& source, bool along_k, int64_t first,
                          unsigned char*)
      : call_(source.call), layout_(along_k), first_output_(first) {}

  __device__ const Layout& layout() const { return layout_; }
  __device__ void load(int64_t k) { tile_ = k / kSampleDepth; }

  __device__ void store(T* tile) const {
    const int classes = static_cast<int>(call_.classes), samples = kSampleDepth / classes;
    for (int pair = static_cast<int>(threadIdx.x); pair < samples * Extent; pair += kThreads) {
      const int i = pair % Extent, row = pair / Extent * classes;
      const int64_t index = tile_ * samples + pair / Extent, output = first_output_ + i;
      if (index < call_.samples * call_.positions && output < call_.outputs) {
        const Place place = place_of(call_, index);
        const T* values = values_of(call_, place, output);
        const T* p = call_.probabilities + place.sample * call_.classes;
        T mean = T(0);
        for (int c = 0; c < classes; ++c) {
          const T value = values[c * call_.class_stride];
          tile[layout_.index(row + c, i)] = value;
          mean += p[c] * value;
        }
        for (int c = 0; c < classes; ++c) {
          T& value = tile[layout_.index(row + c, i)];
          value = std::sqrt(p[c]) * (value - mean);
        }
      } else {
        for (int c = 0; c < classes; ++c) tile[layout_.index(row + c, i)] = T(0);
      }
    }
    const int used = samples * classes;
    for (int rest = static_cast<int>(threadIdx.x); rest < (kSampleDepth - used) * Extent;
         rest += kThreads) {
      tile[layout_.index(used + rest / Extent, rest % Extent)] = T(0);
    }
  }

 private:
  const OutputHessian<T>& call_;
  Layout layout_;
  int64_t first_output_, tile_ = 0;
};

// mean [N t, m] := sum_c p_c g_c
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_kernel(OutputHessian<T> call, T* mean) {
  const int64_t count = call.samples * call.positions * call.outputs;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Place place = place_of(call, index / call.outputs);
    const T* values = values_of(call, place, index % call.outputs);
    const T* p = call.probabilities + place.sample * call.classes;
    T total = T(0);
    for (int64_t c = 0; c < call.classes; ++c) total += p[c] * values[c * call.class_stride];
    mean[index] = total;
  }
}

// Row (n, t, c), centred by the means as it is read.
template <typename T>
struct CentredRows {
  using Value = T;
  OutputHessian<T> call;
  const T* mean;

  struct Row {
    const T* values;
    const T* mean;
    T scale;
  };
  struct Column {
    int64_t offset, output;
  };

  __device__ void select(int64_t) {}
  __device__ Row row(int64_t k) const {
    const int64_t c = k % call.classes, index = k / call.classes;
    if (index >= call.samples * call.positions) return {call.jacobian, mean, T(0)};
    const Place place = place_of(call, index);
    return {values_of(call, place, 0) + c * call.class_stride, mean + index * call.outputs,
            std::sqrt(call.probabilities[place.sample * call.classes + c])};
  }
  __device__ Column column(int64_t i) const { return {i * call.output_stride, i}; }
  __device__ T load(const Row& row, const Column& column) const {
    if (row.scale == T(0) || column.output >= call.outputs) return T(0);
    return row.scale * (row.values[column.offset] - row.mean[column.output]);
  }
};

template <typename T>
bool whole_samples(const OutputHessian<T>& call) {
  return call.classes <= kSampleDepth;
}

template <typename T, class Visit>
auto with_tile(const OutputHessian<T>& call, Visit visit) {
  return whole_samples(call) ? with_symmetric_tile<T, kSampleDepth>(call.outputs, call.tf32, visit)
                             : with_symmetric_tile<T, kRowDepth>(call.outputs, call.tf32, visit);
}

template <typename T>
int64_t row_count(const OutputHessian<T>& call) {
  const int64_t places = call.samples * call.positions;
  if (!whole_samples(call)) return places * call.classes;
  return ceil_div(places, kSampleDepth / call.classes) * kSampleDepth;
}

template <typename T>
int64_t mean_size(const OutputHessian<T>& call) {
  return whole_samples(call) ? 0 : call.samples * call.positions * call.outputs;
}

}  // namespace

template <typename T>
int64_t OutputHessian<T>::workspace() const {
  return mean_size(*this) + with_tile(*this, [&](auto tag) {
           using Tile = typename decltype(tag)::Type;
           return symmetric_workspace<Tile>(plan_symmetric<Tile>(1, outputs, row_count(*this)), 1);
         });
}

template <typename T>
cudaError_t OutputHessian<T>::run(T* workspace, cudaStream_t stream) const {
  const int64_t rows = row_count(*this), means = mean_size(*this);
  if (means > 0) {
    const int64_t blocks = std::min<int64_t>(ceil_div(means, kThreads), 16 * multiprocessors());
    const cudaError_t error = launch(mean_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                                     dim3(kThreads), 0, stream, *this, workspace);
    if (error != cudaSuccess) return error;
  }
  return with_tile(*this, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    const SymmetricPlan plan = plan_symmetric<Tile>(1, outputs, rows);
    if constexpr (Tile::kDepth == kSampleDepth) {
      return update_symmetric<Tile, CentredStage<T, Tile::kRows>, Order::kAlongI>(
          WholeSamples<T>{*this}, false, rows, plan, sum, workspace, stream);
    } else {
      using Source = CentredRows<T>;
      return update_symmetric<Tile, Stage<Source, Tile::kRows, Tile::kDepth>, Order::kEither>(
          Source{*this, workspace}, output_stride != 1, rows, plan, sum, workspace + means, stream);
    }
  });
}

template struct OutputHessian<float>;
template struct OutputHessian<double>;

}  // namespace hesskern::cuda
