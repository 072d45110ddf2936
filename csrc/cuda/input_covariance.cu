// Input covariance: acc += alpha x^T x.
//
// Tiles of 128 x 128 (or 64 x 64) of one triangle, rows of x in steps of 16, of 32 in bfloat16 and
// float16. N d (d + 1) operations, three times as many on tensor cores with float32 split into two
// tf32 numbers, and N d elements of memory once per row of tiles: bound by the tensor cores for
// d >= 128, by memory below. Rows whose elements lie side by side at multiples of 16 bytes are
// copied to shared memory three steps ahead; others, and those with ones, go through registers.
// On compute capability 9.0 larger sums are products of core/parts_product.h.
// Contiguous rows of few columns have kernels of their own (narrow_rows.cu, block_gram.cu,
// block_gram/halves.cu).
#include <type_traits>

#include "block_gram/block_gram.h"
#include "block_gram/halves.h"
#include "core/elements.h"
#include "core/stage.h"
#include "core/symmetric.h"
#include "core/symmetric_parts.h"
#include "input_covariance.h"
#include "narrow_rows.h"

namespace hesskern::cuda {

namespace {

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

// Whether products of 16-bit parts are faster: packing and multiplying are up to five launches,
// about 15 microseconds before anything is done, as long as the tiles below take for so much work.
template <typename In, typename T>
bool as_parts(const InputCovariance<In, T>& call) {
  constexpr double kLeast = 1 << 30;
  const double order = static_cast<double>(call.sum.order);
  return sizeof(T) == 4 && call.sum.groups == 1 && call.sum.order > 64 &&
         order * order * static_cast<double>(call.rows) >= kLeast && parts_products_available();
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
  if constexpr (sizeof(T) == 4) {
    if (!ones && contiguous(*this)) {
      const NarrowRows<In> narrow{x, rows, columns, nullptr, 1, sum};
      if (narrow.fits()) return narrow.plan();
    }
    if (!ones && columns >= kFewestBlockColumns && row_axis.inner == 0 && column_axis.inner == 0 &&
        column_axis.step == 1) {
      const auto block = [&] {
        if constexpr (sizeof(In) == 2) {
          return BlockHalves<In>{x, rows, columns, 1, row_axis.step, 1, false, sum};
        } else {
          return BlockRows{x, rows, columns, row_axis.step, sum};
        }
      }();
      if (block.fits()) return block.plan();
    }
    if (as_parts(*this)) {
      if constexpr (sizeof(In) == 2) {
        if (!ones && rows_are_parts(x, row_axis, column_axis, rows, columns)) {
          return plan_symmetric_parts(x, row_axis.step, rows, sum);
        }
      }
      const auto source = rows_by_axes(x, row_axis, column_axis, rows, columns, ones);
      if constexpr (sizeof(In) == 4) {
        if (!tf32) return plan_packed_symmetric<2>(source, along_k(*this), rows, sum);
      }
      return plan_packed_symmetric<1>(source, along_k(*this), rows, sum);
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
