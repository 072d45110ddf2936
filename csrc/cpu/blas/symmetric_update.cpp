#include "symmetric_update.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "few_rows.h"
#include "pack.h"
#include "triangle.h"

namespace hesskern::cpu {

namespace {

// rows [K, d] with element strides stride_row, stride_col
template <typename T>
void update(const Triangle<T>& to, const T* rows, int64_t K, int64_t d, int64_t stride_row,
            int64_t stride_col, T alpha) {
  const int64_t W = panel_width<T>();
  const int64_t threads = gram_threads(K, d);
  auto pack = [&](T* dst, int64_t panel, int64_t row, int64_t count) {
    pack_panel<T>(dst, W, rows + row * stride_row + panel * W * stride_col, stride_row, stride_col,
                  count, std::min(W, d - panel * W));
  };
  // Vectors that fill up a row's last panel read up to W - 1 elements past the row's end.
  const int64_t safe_rows = d % W == 0 ? K : std::max<int64_t>(0, K - (W + d - 1) / d);
  const int64_t filled = (d + W - 1) / W * W;
  const bool direct = stride_col == 1 && stride_row >= d;
  gram<T>(to, d, K, alpha, threads, pack, [&](int64_t row, int64_t count) -> Panels<T> {
    if (!direct) return {};
    const int64_t columns = row + count <= safe_rows ? filled : d;
    return {rows + row * stride_row, W, stride_row, columns};
  });
}

}  // namespace

void copy_triangle_(const at::Tensor& acc, const at::Tensor& base) {
  if (acc.is_same(base)) return;
  if (acc.stride(1) != 1 || base.stride(1) != 1) {
    acc.copy_(base);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "copy_triangle_", [&] {
    const auto* from = base.const_data_ptr<scalar_t>();
    auto* to = acc.mutable_data_ptr<scalar_t>();
    const int64_t d = acc.size(0), ld = acc.stride(0), base_ld = base.stride(0);
    for (int64_t i = 0; i < d; ++i) {
      std::copy(from + i * base_ld + i, from + i * base_ld + d, to + i * ld + i);
    }
  });
}

void symmetric_update_(const at::Tensor& acc, const at::Tensor& base, const at::Tensor& rows,
                       double alpha) {
  const int64_t d = acc.size(0), count = rows.size(0);
  if (d == 0) return;
  if (count == 0) {
    copy_triangle_(acc, base);
    return;
  }
  if (acc.stride(1) != 1) {
    const at::Tensor sum = at::zeros({d, d}, acc.options());
    symmetric_update_(sum, sum, rows, alpha);
    copy_triangle_(acc, base);
    acc.add_(sum);
    return;
  }
  const bool few = count <= kFewRows && rows.stride(1) == 1;
  const bool copied = few || base.stride(1) != 1;
  if (copied) copy_triangle_(acc, base);
  const at::Tensor& from = copied ? acc : base;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "symmetric_update_", [&] {
    const auto* data = rows.const_data_ptr<scalar_t>();
    auto* sum = acc.mutable_data_ptr<scalar_t>();
    const auto factor = static_cast<scalar_t>(alpha);
    if (few) {
      few_rows_update(sum, acc.stride(0), data, rows.stride(0), count, d, factor);
      return;
    }
    const Triangle<scalar_t> to{sum, acc.stride(0), from.const_data_ptr<scalar_t>(),
                                from.stride(0)};
    update<scalar_t>(to, data, count, d, rows.stride(0), rows.stride(1), factor);
  });
}

}  // namespace hesskern::cpu
