#include "symmetric_update.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "few_rows.h"
#include "pack.h"
#include "triangle.h"

namespace hesskern::cpu {

namespace {

// rows [K, d] with element strides stride_row, stride_col
template <typename T>
void update(T* acc, int64_t ld, const T* rows, int64_t K, int64_t d, int64_t stride_row,
            int64_t stride_col, T alpha) {
  if (K <= kFewRows && stride_col == 1) {
    few_rows_update(acc, ld, rows, stride_row, K, d, alpha);
    return;
  }
  const int64_t W = panel_width<T>();
  const int64_t threads = gram_threads(K, d);
  auto pack = [&](T* dst, int64_t panel, int64_t row, int64_t count) {
    pack_panel<T>(dst, W, rows + row * stride_row + panel * W * stride_col, stride_row, stride_col,
                  count, std::min(W, d - panel * W));
  };
  // Vectors read up to W - 1 elements past the end of a row that does not fill its last panel.
  const int64_t safe_rows = d % W == 0 ? K : std::max<int64_t>(0, K - (W + d - 1) / d);
  const bool direct = stride_col == 1 && stride_row >= d;
  gram<T>(acc, ld, d, K, alpha, threads, pack, [&](int64_t row, int64_t count) -> Panels<T> {
    if (direct && row + count <= safe_rows) return {rows + row * stride_row, W, stride_row};
    return {nullptr, 0, 0};
  });
}

}  // namespace

void symmetric_update_(at::Tensor acc, const at::Tensor& rows, double alpha) {
  const int64_t d = acc.size(0);
  if (d == 0 || rows.size(0) == 0) return;
  if (acc.stride(1) != 1) {
    const at::Tensor sum = at::zeros({d, d}, acc.options());
    symmetric_update_(sum, rows, alpha);
    acc.add_(sum);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "symmetric_update_", [&] {
    update<scalar_t>(acc.mutable_data_ptr<scalar_t>(), acc.stride(0),
                     rows.const_data_ptr<scalar_t>(), rows.size(0), d, rows.stride(0),
                     rows.stride(1), static_cast<scalar_t>(alpha));
  });
}

}  // namespace hesskern::cpu
