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

// Elements that a thread is worth starting for.
constexpr int64_t kElements = 1 << 15;

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

Addend start_triangle_(const at::Tensor& acc, const Addend& addend) {
  const at::Tensor& base = addend.base;
  if (acc.is_same(base) && addend.beta == 1) return addend;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "start_triangle_", [&] {
    const auto* from = base.const_data_ptr<scalar_t>();
    auto* to = acc.mutable_data_ptr<scalar_t>();
    const int64_t d = acc.size(0), row = acc.stride(0), column = acc.stride(1);
    const int64_t base_row = base.stride(0), base_column = base.stride(1);
    const bool whole = column == 1 && base_column == 1;
    const auto factor = static_cast<scalar_t>(addend.beta);
    const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, d));
    at::parallel_for(0, d, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* target = to + i * row;
        const scalar_t* source = from + i * base_row;
        if (factor == 0 && whole) {
          std::fill(target + i, target + d, scalar_t(0));
        } else if (factor == 1 && whole) {
          std::copy(source + i, source + d, target + i);
        } else {
          for (int64_t j = i; j < d; ++j) {
            const scalar_t value = factor == 0 ? scalar_t(0) : factor * source[j * base_column];
            target[j * column] = value;
          }
        }
      }
    });
  });
  return {acc, 1};
}

void symmetric_update_(const at::Tensor& acc, const Addend& addend, const at::Tensor& rows,
                       double alpha) {
  const int64_t d = acc.size(0), count = rows.size(0);
  if (d == 0) return;
  if (count == 0) {
    start_triangle_(acc, addend);
    return;
  }
  if (acc.stride(1) != 1) {
    const at::Tensor sum = at::zeros({d, d}, acc.options());
    symmetric_update_(sum, {sum, 1}, rows, alpha);
    start_triangle_(acc, addend);
    acc.add_(sum);
    return;
  }
  const bool few = count <= kFewRows && rows.stride(1) == 1;
  const Addend from = few || addend.base.stride(1) != 1 ? start_triangle_(acc, addend) : addend;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "symmetric_update_", [&] {
    const auto* data = rows.const_data_ptr<scalar_t>();
    auto* sum = acc.mutable_data_ptr<scalar_t>();
    const auto factor = static_cast<scalar_t>(alpha);
    if (few) {
      few_rows_update(sum, acc.stride(0), data, rows.stride(0), count, d, factor);
      return;
    }
    const Triangle<scalar_t> to{sum, acc.stride(0), from.base.const_data_ptr<scalar_t>(),
                                from.base.stride(0), static_cast<scalar_t>(from.beta)};
    update<scalar_t>(to, data, count, d, rows.stride(0), rows.stride(1), factor);
  });
}

}  // namespace hesskern::cpu
