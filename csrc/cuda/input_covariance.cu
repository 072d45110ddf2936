// Input covariance: acc += alpha x^T x.
//
// Tiles of 128 x 128 (or 64 x 64) of one triangle, rows of x in steps of 16, of 32 in bfloat16 and
// float16. N d (d + 1) operations, three times as many on tensor cores with float32 split into two
// tf32 numbers, and N d elements of memory once per row of tiles: bound by the tensor cores for
// d >= 128, by memory below. Rows whose elements lie side by side at multiples of 16 bytes are
// copied to shared memory three steps ahead; others, and those with ones, go through registers.
// Contiguous rows of few columns have a kernel of their own (narrow_rows.cu).
#include <type_traits>

#include "core/elements.h"
#include "core/stage.h"
#include "core/symmetric.h"
#include "input_covariance.h"
#include "narrow_rows.h"

namespace hesskern::cuda {

namespace {

// x [K, I] of In with one more column, of ones.
template <typename In>
struct RowsWithOnes {
  using Value = In;
  Elements<In> x;
  bool ones;

  using Row = typename Elements<In>::Row;
  struct Column {
    Row x;
    bool one;
  };

  __device__ void select(int64_t) {}
  __device__ Row row(int64_t k) const { return x.row(k); }
  __device__ Column column(int64_t i) const { return {x.column(i), ones && i == x.i_end}; }
  __device__ Value load(const Row& row, const Column& column) const {
    if (column.one && row.inside) return one<Value>();
    return x.load(row, column.x);
  }
};

// Rows of a tile: more of 16-bit elements, unless registers have to hold them.
constexpr int kDepth = 16, kCopiedHalfDepth = 32;

template <typename In, typename T>
bool along_k(const InputCovariance<In, T>& call) {
  return call.column_axis.step != 1 && call.row_axis.step == 1;
}

template <typename In, typename T>
bool copied(const InputCovariance<In, T>& call) {
  if (sizeof(In) == 8 || call.ones) return false;
  return along_k(call) ? copies_in_pieces(call.x, call.row_axis, call.column_axis)
                       : copies_in_pieces(call.x, call.column_axis, call.row_axis);
}

// Whether the rows are one piece of memory.
template <typename In, typename T>
bool contiguous(const InputCovariance<In, T>& call) {
  const bool columns =
      call.columns == 1 || (call.column_axis.inner == 0 && call.column_axis.step == 1);
  const bool rows = call.row_axis.inner == 0 && call.row_axis.step == call.columns;
  return columns && (call.rows == 1 || rows);
}

template <typename In, typename T, class Visit>
auto with_tile(const InputCovariance<In, T>& call, Visit visit) {
  if constexpr (sizeof(In) == 2) {
    if (copied(call)) {
      return with_symmetric_tile<In, kCopiedHalfDepth>(call.sum.order, call.tf32, visit);
    }
  }
  return with_symmetric_tile<In, kDepth>(call.sum.order, call.tf32, visit);
}

}  // namespace

template <typename In, typename T>
Work<T> InputCovariance<In, T>::plan() const {
  if constexpr (std::is_same_v<T, float>) {
    if (!ones && contiguous(*this)) {
      const NarrowRows<In> narrow{x, rows, columns, nullptr, 1, sum};
      if (narrow.fits()) return narrow.plan();
    }
  }
  return with_tile(*this, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    constexpr bool kHalf = sizeof(In) == 2, kCopiedHalf = kHalf && Tile::kDepth == kCopiedHalfDepth;
    const Elements<In> elements{x, row_axis, column_axis, rows, columns};
    if constexpr (kCopiedHalf || sizeof(In) == 4) {
      if (kCopiedHalf || copied(*this)) {
        using Copies = CopyStage<In, Tile::kRows, Tile::kDepth>;
        return along_k(*this)
                   ? plan_update<Tile, Copies, Order::kAlongK>(elements, true, rows, sum)
                   : plan_update<Tile, Copies, Order::kAlongI>(elements, false, rows, sum);
      }
    }
    if constexpr (!kCopiedHalf) {
      using Source = RowsWithOnes<In>;
      return plan_update<Tile, Stage<Source, Tile::kRows, Tile::kDepth>, Order::kEither>(
          Source{elements, ones}, along_k(*this), rows, sum);
    }
  });
}

template struct InputCovariance<float, float>;
template struct InputCovariance<BFloat16, float>;
template struct InputCovariance<Float16, float>;
template struct InputCovariance<double, double>;

}  // namespace hesskern::cuda
