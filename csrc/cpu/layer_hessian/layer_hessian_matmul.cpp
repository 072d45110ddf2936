// H V = alpha sum_n sum_c <V, R_nc> R_nc with R_nc = sum_t s_nct x_nt^T, in one
// read of x and s; no [N, m] intermediate reaches memory.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "checks.h"
#include "layer_hessian.h"
#include "panel_product.h"
#include "row_product.h"
#include "sparse_product.h"

namespace hesskern::cpu {

namespace {

// Columns (outputs times vectors) multiplied at a time.
constexpr int64_t kMaxColumns = 2048;
// Elements that all threads' sums may have together.
constexpr int64_t kSumElements = int64_t{1} << 28;
// Elements of s that are copied at a time where its rows are not contiguous.
constexpr int64_t kCopyElements = int64_t{1} << 20;
// Bytes of V that are read again for every sample: those of a second-level cache.
constexpr int64_t kResidentBytes = 1 << 20;
// Multiply-adds from which it pays to look for a frequent value in x.
constexpr int64_t kProbeWork = 1 << 23;
// Multiply-adds below which another thread does not pay.
constexpr int64_t kThreadWork = 1 << 17;

template <typename T>
LayerHessian<T> operands(const at::Tensor& x, const at::Tensor& s) {
  LayerHessian<T> h{};
  h.x = x.const_data_ptr<T>();
  h.s = s.const_data_ptr<T>();
  h.n = x.size(0);
  h.d = x.size(1);
  h.t = x.dim() == 3 ? x.size(2) : 1;
  h.c = s.size(1);
  h.m = s.size(2);
  h.x_n = x.stride(0);
  h.x_d = x.stride(1);
  h.x_t = x.dim() == 3 ? x.stride(2) : 0;
  h.s_n = s.stride(0);
  h.s_c = s.stride(1);
  h.s_by_position = h.t > 1 && h.m > 1 && s.stride(2) == 1;
  return h;
}

// Whether one class of one sample is a contiguous run, in either order of m and t.
bool has_runs(const at::Tensor& s) {
  const int64_t m = s.size(2), t = s.dim() == 4 ? s.size(3) : 1;
  const int64_t along_m = m > 1 ? s.stride(2) : 0, along_t = t > 1 ? s.stride(3) : 0;
  if (t == 1) return along_m <= 1;
  if (m == 1) return along_t == 1;
  return (along_m == t && along_t == 1) || (along_m == 1 && along_t == m);
}

// total [size] := the product over samples [begin, end). Float32 sums of many equal
// terms drift (half a million lose 1e-5): every kLevel samples have a sum of their own,
// in the memory after total.
template <class Product, typename T>
void accumulate(const Product& product, T* total, int64_t size, const T* packed, int64_t begin,
                int64_t end) {
  T* recent = total + size;
  std::fill_n(total, size, T(0));
  for (int64_t first = begin; first < end; first += Product::kLevel) {
    const int64_t last = std::min(first + Product::kLevel, end);
    if (first == begin) {
      product.accumulate(total, packed, first, last);
      continue;
    }
    std::fill_n(recent, size, T(0));
    product.accumulate(recent, packed, first, last);
    for (int64_t i = 0; i < size; ++i) total[i] += recent[i];
  }
}

// out [k m, d] := alpha H V with one of the algorithms, make(vectors) for a block of
// them. Each thread sums over its samples and the sums are added in fixed order: the
// result depends on the number of threads but not on their timing.
template <class Make, typename T>
void multiply(T* out, const LayerHessian<T>& h, const at::Tensor& V, int64_t k, int64_t block,
              double alpha, const Make& make) {
  const int64_t work = h.n * h.t * h.m * k * (h.d + h.c);
  const auto largest = make(block);
  const int64_t sum_size = largest.rows() * largest.sum_stride();
  const int64_t affordable = kSumElements / sum_size;
  const int64_t threads = std::clamp<int64_t>(std::min({work / kThreadWork, h.n, affordable}), 1,
                                              at::get_num_threads());
  const at::Tensor operand = at::empty({largest.packed_size()}, V.options());
  const at::Tensor partial = at::empty({threads, 2, sum_size}, V.options());
  T *packed = operand.mutable_data_ptr<T>(), *sums = partial.mutable_data_ptr<T>();
  for (int64_t vector = 0; vector < k; vector += block) {
    const auto product = make(std::min(block, k - vector));
    const T* v = V.const_data_ptr<T>() + vector * h.m * h.d;
    const int64_t rows = product.rows(), stride = product.sum_stride();
    at::parallel_for(0, product.pack_items(), 8, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) product.pack(packed, v, item);
    });
    product.finish_packing(packed);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        accumulate(product, sums + i * 2 * sum_size, rows * stride, packed, h.n * i / threads,
                   h.n * (i + 1) / threads);
      }
    });
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* sum = sums + row * stride;
        for (int64_t i = 1; i < threads; ++i) {
          const T* other = sum + i * 2 * sum_size;
          for (int64_t j = 0; j < stride; ++j) sum[j] += other[j];
        }
        product.join(out + vector * h.m * h.d, row, sum, static_cast<T>(alpha));
      }
    });
  }
}

// Vectors of a block in which V is read again for every sample.
template <typename T>
int64_t resident_vectors(const LayerHessian<T>& h, int64_t k) {
  const int64_t bytes = h.m * h.d * static_cast<int64_t>(sizeof(T));
  return std::clamp<int64_t>(std::min(kResidentBytes / bytes, kMaxColumns / h.m), 1, k);
}

// Whether x [N, d] has whole rows in memory.
template <typename T>
bool row_major(const LayerHessian<T>& h) {
  return h.t == 1 && h.x_d == 1;
}

template <typename T>
std::string_view fastest(const LayerHessian<T>& h, int64_t k) {
  const int64_t lanes = microkernels<T>().lanes;
  if (row_major(h)) {
    if (k * h.m <= lanes / 2) return "rows";
    if (h.n * h.d * k * h.m >= kProbeWork) {
      const Frequent<T> frequent = most_frequent(h.x, h.n, h.d, h.x_n);
      const SparseProduct<T> product(h, frequent.value, resident_vectors(h, k));
      if (product.pays(frequent.share)) return "frequent";
    }
  }
  // Multiply-adds per sample of the two ways to a layer with positions; those
  // that run from cache without the microkernels cost about twice.
  const int64_t by_panels = 2 * k * h.m * h.d * h.t + 4 * k * h.c * h.m * h.t;
  const int64_t by_rows =
      h.c * h.m * round_up(h.d, lanes) * h.t + 4 * k * h.c * h.m * round_up(h.d, lanes);
  return h.t > 1 && by_rows < by_panels ? "outer" : "panels";
}

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [k m, d], out [k m, d]
template <typename T>
void run(T* out, const at::Tensor& x, const at::Tensor& s, const at::Tensor& V, double alpha,
         std::string_view path) {
  const LayerHessian<T> h = operands<T>(x, s);
  const int64_t k = V.size(0) / h.m;
  if (path.empty()) path = fastest(h, k);
  if (path == "rows" && row_major(h)) {
    multiply(out, h, V, k, k, alpha, [&](int64_t vectors) { return RowProduct<T>(h, vectors); });
  } else if (path == "frequent" && row_major(h)) {
    const T value = most_frequent(h.x, h.n, h.d, h.x_n).value;
    multiply(out, h, V, k, resident_vectors(h, k), alpha,
             [&](int64_t vectors) { return SparseProduct<T>(h, value, vectors); });
  } else if (path == "outer") {
    multiply(out, h, V, k, k, alpha, [&](int64_t vectors) { return OuterProduct<T>(h, vectors); });
  } else {
    TORCH_CHECK_VALUE(path == "panels",
                      "layer_hessian_matmul_by: path must be panels, outer or, where rows of x are "
                      "whole in memory, rows or frequent, got ",
                      path);
    multiply(out, h, V, k, std::clamp<int64_t>(kMaxColumns / h.m, 1, k), alpha,
             [&](int64_t vectors) { return PanelProduct<T>(h, vectors); });
  }
}

// Whether s [N, c, m] or [N, c, m, t] must be copied; with whole rows it is used as [N c, m].
bool needs_copy(const at::Tensor& s, bool whole_rows) {
  if (!whole_rows) return !has_runs(s);
  const bool joins = s.size(0) == 1 || s.size(1) == 1 || s.stride(0) == s.size(1) * s.stride(1);
  return !joins || !(s.size(2) == 1 || s.stride(2) == 1);
}

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]
at::Tensor multiply_by(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V, double alpha,
                       std::string_view path) {
  check_layer_hessian_matmul(x, s, V);
  if (s.numel() == 0 || x.numel() == 0 || V.numel() == 0) return at::zeros(V.sizes(), V.options());
  const int64_t n = x.size(0), c = s.size(1), m = s.size(2), d = x.size(1);
  const bool whole_rows = x.dim() == 2 && d == 1;
  const int64_t part = std::max<int64_t>(1, kCopyElements / (s.numel() / n));
  if (part < n && needs_copy(s, whole_rows)) {
    const at::Tensor total = at::zeros(V.sizes(), V.options());
    for (int64_t first = 0; first < n; first += part) {
      const int64_t count = std::min(part, n - first);
      const at::Tensor copy = s.narrow(0, first, count).contiguous();
      total.add_(multiply_by(x.narrow(0, first, count), copy, V, alpha, path));
    }
    return total;
  }
  const at::Tensor out = at::empty(V.sizes(), V.options());
  at::Tensor rows = x, roots = s, vectors = V.reshape({-1, d}).contiguous();
  if (whole_rows) {
    // s holds whole rows of the Jacobian: the same product with s in the place of
    // x and the scale of each row in the place of s.
    rows = s.reshape({n * c, m});
    roots = x.expand({n, c}).reshape({n * c, 1, 1});
    vectors = vectors.view({-1, m});
  }
  if (!has_runs(roots)) roots = roots.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "layer_hessian_matmul", [&] {
    run<scalar_t>(out.mutable_data_ptr<scalar_t>(), rows, roots, vectors, alpha, path);
  });
  return out;
}

at::Tensor layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                                double alpha, const std::optional<at::Tensor>& packed) {
  if (packed.has_value()) check_packed(x, *packed, 0);
  return multiply_by(x, s, V, alpha, "");
}

at::Tensor pack_layer_inputs(const at::Tensor& x, int64_t columns) {
  check_pack_layer_inputs(x, columns);
  return at::empty({0}, x.options().dtype(at::kInt));
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("layer_hessian_matmul", &layer_hessian_matmul);
  m.impl("pack_layer_inputs", &pack_layer_inputs);
}

TORCH_LIBRARY_IMPL(hesskern_internal, CPU, m) {
  m.impl("layer_hessian_matmul_by", &multiply_by);
}

}  // namespace hesskern::cpu
