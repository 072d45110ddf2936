// Input covariance: acc += alpha x^T x.
//
// Tiles of 128 x 128 (or 64 x 64) of one triangle, rows of x in steps of 16. N d (d + 1)
// operations, three times as many on tensor cores with float32 split into two tf32 numbers, and
// N d words of memory once per row of tiles: bound by the tensor cores for d >= 128, by memory
// below.
#include "elements.h"
#include "input_covariance.h"
#include "stage.h"
#include "symmetric.h"

namespace hesskern::cuda {

namespace {

// x [K, I] of In with one more column, of ones.
template <typename In, typename Value_>
struct RowsWithOnes {
  using Value = Value_;
  Elements<In, Value> x;
  bool ones;

  using Row = typename Elements<In, Value>::Row;
  struct Column {
    Row x;
    bool one;
  };

  __device__ void select(int64_t) {}
  __device__ Row row(int64_t k) const { return x.row(k); }
  __device__ Column column(int64_t i) const { return {x.column(i), ones && i == x.i_end}; }
  __device__ Value load(const Row& row, const Column& column) const {
    if (column.one && row.inside) return Value(1);
    return x.load(row, column.x);
  }
};

constexpr int kDepth = 16;

}  // namespace

template <typename In, typename T>
int64_t InputCovariance<In, T>::workspace() const {
  return with_symmetric_tile<In, T, kDepth>(sum.order, tf32, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    return symmetric_workspace<Tile>(plan_symmetric<Tile>(1, sum.order, rows), 1);
  });
}

template <typename In, typename T>
cudaError_t InputCovariance<In, T>::run(T* workspace, cudaStream_t stream) const {
  return with_symmetric_tile<In, T, kDepth>(sum.order, tf32, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    using Source = RowsWithOnes<In, T>;
    const Source source{{x, row_axis, column_axis, rows, columns}, ones};
    const bool along_k = column_axis.step != 1 && row_axis.step == 1;
    return update_symmetric<Tile, Stage<Source, Tile::kRows, Tile::kDepth>>(
        source, along_k, rows, plan_symmetric<Tile>(1, sum.order, rows), sum, workspace, stream);
  });
}

template struct InputCovariance<float, float>;
template struct InputCovariance<BFloat16, float>;
template struct InputCovariance<Float16, float>;
template struct InputCovariance<double, double>;

}  // namespace hesskern::cuda
