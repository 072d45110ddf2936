// Output Hessian from rows of a root of it: a Gram matrix of the Jacobian's rows.
//
// Contiguous rows of positions have kernels of their own (narrow_positions.cu, block_gram.cu,
// block_gram/halves.cu); all others are an input covariance (input_covariance.cu), which has some
// for narrow rows.
#include <type_traits>

#include "block_gram/block_gram.h"
#include "block_gram/halves.h"
#include "input_covariance.h"
#include "narrow_positions.h"
#include "root_rows.h"

namespace hesskern::cuda {

namespace {

// Samples and classes as one axis of rows, of so many elements from one to the next.
template <typename In, typename T>
bool joined(const RootRows<In, T>& call, int64_t& step) {
  step = call.classes == 1 ? call.sample_stride : call.class_stride;
  return call.samples == 1 || call.classes == 1 ||
         call.sample_stride == call.classes * call.class_stride;
}

// Rows of the Jacobian without regard to their order.
template <typename In, typename T>
Axis row_axis(const RootRows<In, T>& call) {
  int64_t step = 0;
  const bool joins = joined(call, step);
  if (call.positions == 1) {
    return joins ? Axis{step} : Axis{call.class_stride, call.classes, call.sample_stride};
  }
  const int64_t rows = call.samples * call.classes;
  // All rows one after another, as where channels come last.
  if (rows == 1 || step == call.positions * call.position_stride) return {call.position_stride};
  return {call.position_stride, call.positions, step};
}

template <typename In, typename T>
bool contiguous_positions(const RootRows<In, T>& call) {
  int64_t step = 0;
  const int64_t size = call.outputs * call.positions;
  return joined(call, step) && call.positions > 1 && call.position_stride == 1 &&
         (call.outputs == 1 || call.output_stride == call.positions) &&
         (call.samples * call.classes == 1 || step == size);
}

}  // namespace

template <typename In, typename T>
bool RootRows<In, T>::readable() const {
  int64_t step = 0;
  return positions == 1 || joined(*this, step);
}

template <typename In, typename T>
Work<T> RootRows<In, T>::plan() const {
  if constexpr (std::is_same_v<T, float>) {
    const NarrowPositions<In> narrow{jacobian, samples * classes, outputs, positions, sum};
    if (contiguous_positions(*this)) {
      if (narrow.fits()) return narrow.plan();
      const int64_t size = outputs * positions, all = samples * classes;
      const auto block = [&] {
        if constexpr (sizeof(In) == 2) {
          return BlockHalves<In>{jacobian, all, outputs, positions, size, positions, true, sum};
        } else {
          return BlockPositions{jacobian, all, outputs, positions, size, positions, sum};
        }
      }();
      if (outputs >= kFewestBlockColumns && block.fits()) return block.plan();
    }
  }
  const InputCovariance<In, T> rows{jacobian,
                                    row_axis(*this),
                                    {output_stride},
                                    samples * classes * positions,
                                    outputs,
                                    false,
                                    tf32,
                                    sum};
  return rows.plan();
}

template struct RootRows<float, float>;
template struct RootRows<BFloat16, float>;
template struct RootRows<Float16, float>;
template struct RootRows<double, double>;

}  // namespace hesskern::cuda
