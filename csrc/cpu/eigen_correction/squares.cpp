#include "squares.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/blas/gemm.h"
#include "cpu/blas/microkernel.h"
#include "cpu/blas/panels.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"
#include "tile_squares.h"

namespace hesskern::cpu {

namespace {

// Columns whose sums stay in the first-level cache while matrix after matrix is read.
constexpr int64_t kColumns = 1024;
// Numbers below which another thread does not pay.
constexpr int64_t kThreadNumbers = 1 << 15;
// Panels of the right operand from which a block of the left one is laid out anew for them.
constexpr int64_t kFewPanels = 4;

// Matrices [k, m, d], d contiguous.
template <typename T>
struct Matrices {
  const T* data;
  int64_t k, m, d, k_stride, m_stride;

  // sum [m, d] with rows stride apart += their squares
  void add_squares(T* sum, int64_t stride) const {
    const int64_t parts = (d + kColumns - 1) / kColumns;
    const int64_t grain = std::max<int64_t>(1, kThreadNumbers / (k * std::min(d, kColumns)));
    at::parallel_for(0, m * parts, grain, [&](int64_t begin, int64_t end) {
      with_simd([&](auto) HESSKERN_INLINE {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / parts, first = item % parts * kColumns;
          const int64_t count = std::min(kColumns, d - first);
          T* target = sum + i * stride + first;
          const T* row = data + i * m_stride + first;
          for (int64_t n = 0; n < k; ++n, row += k_stride) {
            for (int64_t j = 0; j < count; ++j) target[j] += row[j] * row[j];
          }
        }
      });
    });
  }
};

// Left and right rows of n samples, r root rows and t positions each.
template <typename T>
struct SquaredProducts {
  const T* left;   // [n, r, t, m]
  const T* right;  // [n, t, d]
  int64_t n, r, t, m, d;

  int64_t width() const { return microkernels<T>().width; }
  int64_t panels() const { return (d + width() - 1) / width(); }
  int64_t panels_size() const { return panels() * t * width(); }
  int64_t bands() const { return (m + microkernels<T>().rows - 1) / microkernels<T>().rows; }

  // sum's rows of band, columns of panels [first, last), of every sample in turn
  void add(T* sum, int64_t stride, const T* packed, T* block, int64_t sample, int64_t band,
           int64_t first, int64_t last) const {
    const auto& kernels = microkernels<T>();
    const int64_t row = m * band / bands(), used = m * (band + 1) / bands() - row;
    BlockProduct<T> p{};
    p.segment = p.inner = t;
    p.c_stride = stride;
    p.accumulate = p.square = true;
    for (int64_t c = 0; c < r; ++c) {
      p.a = left + (sample * r + c) * t * m + row;
      p.a_stride = m;
      if (last - first >= kFewPanels) {
        for (int64_t k = 0; k < t; ++k) std::copy_n(p.a + k * m, used, block + k * kernels.rows);
        p.a = block;
        p.a_stride = kernels.rows;
      }
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t vectors = d - panel * width() > kernels.lanes ? 2 : 1;
        p.b = packed + sample * panels_size() + panel * t * width();
        p.ahead = reinterpret_cast<const char*>(p.b);
        p.c = sum + row * stride + panel * width();
        kernels.by_columns[used][vectors](p);
      }
    }
  }

  // Every element is one thread's, and its terms come in the order of the samples.
  void run(T* sum, int64_t stride) const {
    const Scratch<T> packed(n * panels_size());
    const int64_t threads = product_threads(n * r * t * m * d);
    at::parallel_for(0, n, (n + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pack_panels(packed.data() + i * panels_size(), t, 0, right + i * t * d, t, d, d, 1);
      }
    });
    // Shared out in bands of rows where there are enough of them, else in panels as well.
    const int64_t parts =
        std::min(panels(), bands() >= 4 * threads ? 1 : (4 * threads + bands() - 1) / bands());
    const int64_t items = bands() * parts, used = std::min(threads, items);
    at::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> block(t * microkernels<T>().rows);
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t sample = 0; sample < n; ++sample) {
          for (int64_t i = items * thread / used; i < items * (thread + 1) / used; ++i) {
            const int64_t part = i % parts;
            add(sum, stride, packed.data(), block.data(), sample, i / parts,
                panels() * part / parts, panels() * (part + 1) / parts);
          }
        }
      }
    });
  }
};

}  // namespace

void add_squares(const at::Tensor& sum, const at::Tensor& rows) {
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "add_squares", [&] {
    const Matrices<scalar_t> matrices{rows.const_data_ptr<scalar_t>(),
                                      rows.size(0),
                                      rows.size(1),
                                      rows.size(2),
                                      rows.stride(0),
                                      rows.stride(1)};
    matrices.add_squares(sum.mutable_data_ptr<scalar_t>(), sum.stride(0));
  });
}

void add_squared_products(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  if (sum.scalar_type() == at::kFloat) {
    const TileSquares tiles{left.const_data_ptr<float>(),
                            right.const_data_ptr<float>(),
                            left.size(0),
                            left.size(1),
                            left.size(2),
                            left.size(3),
                            right.size(2)};
    if (tiles.pay()) return tiles.run(sum.mutable_data_ptr<float>(), sum.stride(0));
  }
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "add_squared_products", [&] {
    const SquaredProducts<scalar_t> products{left.const_data_ptr<scalar_t>(),
                                             right.const_data_ptr<scalar_t>(),
                                             left.size(0),
                                             left.size(1),
                                             left.size(2),
                                             left.size(3),
                                             right.size(2)};
    products.run(sum.mutable_data_ptr<scalar_t>(), sum.stride(0));
  });
}

int64_t squares_width(at::ScalarType type) {
  return type == at::kDouble ? microkernels<double>().width : microkernels<float>().width;
}

}  // namespace hesskern::cpu
