#include "symmetric_update.h"

namespace hesskern::cpu {

namespace {

// Below this order one GEMM beats the saving of half a smaller one.
constexpr int64_t kLeaf = 128;

}  // namespace

void symmetric_update_(at::Tensor acc, const at::Tensor& rows, double alpha) {
  const int64_t d = acc.size(0);
  if (d == 0 || rows.size(0) == 0) return;
  if (d <= kLeaf) {
    acc.addmm_(rows.t(), rows, 1, alpha);
    return;
  }
  // Halve at a multiple of 64 so that the blocks stay aligned for the GEMM.
  const int64_t half = (d / 2 + 63) / 64 * 64;
  const at::Tensor left = rows.narrow(1, 0, half);
  const at::Tensor right = rows.narrow(1, half, d - half);
  symmetric_update_(acc.narrow(0, 0, half).narrow(1, 0, half), left, alpha);
  acc.narrow(0, 0, half).narrow(1, half, d - half).addmm_(left.t(), right, 1, alpha);
  symmetric_update_(acc.narrow(0, half, d - half).narrow(1, half, d - half), right, alpha);
}

}  // namespace hesskern::cpu
