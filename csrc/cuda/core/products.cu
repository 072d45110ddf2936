// Products of many matrices in one launch.
//
// A block takes one tile of 64 x 64 or 128 x 128 of one of up to 64 products, whose descriptions
// travel as the kernel's parameter: no copy to the device, and a captured graph keeps them.
// 2 m n k operations, three times on tensor cores with float32 split into two tf32 numbers; bound
// by these, and by the launch for small layers. Matrices whose rows or columns lie at multiples of
// 16 bytes are copied to shared memory three steps ahead, others go through registers: launches of
// their own, by the axes along which the matrices lie.
#include <algorithm>
#include <type_traits>

#include "elements.h"
#include "launch.h"
#include "product.h"
#include "products.h"
#include "stage.h"
#include "tile.h"

namespace hesskern::cuda {

namespace {

constexpr int kMost = 64;

template <typename T>
struct ProductList {
  int count;
  int64_t first_tile[kMost + 1];
  Product<T> products[kMost];
};

template <class Tile>
int64_t tile_count(const Product<typename Tile::Value>& product) {
  return ceil_div(product.m, Tile::kRows) * ceil_div(product.n, Tile::kColumns);
}

// Whether neighbouring threads should take neighbours along k.
__host__ __device__ inline bool along_k(const Axis& k, const Axis& i) {
  return k.step == 1 && i.step != 1;
}

template <typename T>
bool copied_operand(const T* data, const Axis& k, const Axis& i, int64_t k_begin) {
  if (!along_k(k, i)) return copies_in_pieces(data, i, k);
  return copies_in_pieces(data, k, i) && k_begin * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <typename T>
bool copied(const Product<T>& product) {
  return copied_operand(product.a, product.a_k, product.a_row, product.k_begin) &&
         copied_operand(product.b, product.b_k, product.b_column, product.k_begin);
}

template <typename T, int Extent, int Depth, bool Copied>
using Operand =
    std::conditional_t<Copied, CopyStage<T, Extent, Depth>, Stage<Elements<T>, Extent, Depth>>;

// How the matrices of a launch lie in memory: copied, along which axis each.
template <Order A, Order B>
struct CopiedAlong {
  static constexpr bool kCopied = true;
  static constexpr Order kA = A, kB = B;
};
struct AnyMemory {
  static constexpr bool kCopied = false;
  static constexpr Order kA = Order::kEither, kB = Order::kEither;
};

template <class Tile, class Memory>
struct Stages {
  using T = typename Tile::Value;
  using A = Operand<T, Tile::kRows, Tile::kDepth, Memory::kCopied>;
  using B = Operand<T, Tile::kColumns, Tile::kDepth, Memory::kCopied>;
  using Shared = ProductMemory<A, B>;
};

template <class Tile, class Memory>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<Tile>())
    product_kernel(const __grid_constant__ ProductList<typename Tile::Value> list) {
  using T = typename Tile::Value;
  using Way = Stages<Tile, Memory>;
  const int64_t item = blockIdx.x;
  int index = 0;
  while (index + 1 < list.count && item >= list.first_tile[index + 1]) ++index;
  const Product<T>& product = list.products[index];
  const int64_t across = ceil_div(product.n, Tile::kColumns);
  const int64_t tile_index = item - list.first_tile[index];
  const int64_t row0 = tile_index / across * Tile::kRows;
  const int64_t column0 = tile_index % across * Tile::kColumns;

  const Elements<T> a{product.a, product.a_k, product.a_row, product.k_end, product.m};
  const Elements<T> b{product.b, product.b_k, product.b_column, product.k_end, product.n};
  typename Way::A stage_a(a, is_along_k<Memory::kA>(along_k(a.k_axis, a.i_axis)), row0,
                          Way::Shared::table_a());
  typename Way::B stage_b(b, is_along_k<Memory::kB>(along_k(b.k_axis, b.i_axis)), column0,
                          Way::Shared::table_b());
  Tile tile;
  multiply(tile, stage_a, stage_b, false, product.k_begin, product.k_end);
  tile.each([&](int i, int j, T value) {
    const int64_t row = row0 + i, column = column0 + j;
    if (row >= product.m || column >= product.n) return;
    if (product.scale != nullptr) {
      value *= product.scale[product.scale_row.offset(row) + product.scale_column.offset(column)];
    }
    product.c[product.c_row.offset(row) + product.c_column.offset(column)] = value;
  });
}

template <class Tile, class Memory, typename T>
cudaError_t run(const std::vector<Product<T>>& products, cudaStream_t stream) {
  for (size_t first = 0; first < products.size(); first += kMost) {
    ProductList<T> list{};
    list.count = static_cast<int>(std::min<size_t>(kMost, products.size() - first));
    for (int i = 0; i < list.count; ++i) {
      list.products[i] = products[first + static_cast<size_t>(i)];
      list.first_tile[i + 1] = list.first_tile[i] + tile_count<Tile>(list.products[i]);
    }
    const int64_t tiles = list.first_tile[list.count];
    if (tiles == 0) continue;
    const cudaError_t error =
        launch(product_kernel<Tile, Memory>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
               Stages<Tile, Memory>::Shared::kBytes, stream, list);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The products by the kernel that fits them.
template <class Tile, typename T>
cudaError_t run_all(const std::vector<Product<T>>& products, cudaStream_t stream) {
  // Copied: 0 to 3 by the axes along which a and b lie; 4: through registers.
  std::vector<Product<T>> parts[5];
  for (const Product<T>& product : products) {
    const bool a = along_k(product.a_k, product.a_row), b = along_k(product.b_k, product.b_column);
    parts[copied(product) ? 2 * a + b : 4].push_back(product);
  }
  constexpr Order kI = Order::kAlongI, kK = Order::kAlongK;
  cudaError_t error = run<Tile, CopiedAlong<kI, kI>>(parts[0], stream);
  if (error == cudaSuccess) error = run<Tile, CopiedAlong<kI, kK>>(parts[1], stream);
  if (error == cudaSuccess) error = run<Tile, CopiedAlong<kK, kI>>(parts[2], stream);
  if (error == cudaSuccess) error = run<Tile, CopiedAlong<kK, kK>>(parts[3], stream);
  return error != cudaSuccess ? error : run<Tile, AnyMemory>(parts[4], stream);
}

// Large tiles read less per product; they pay where they fill the device and the matrices fill
// them.
template <typename T>
bool large_tiles(const std::vector<Product<T>>& products) {
  int64_t small = 0, large = 0;
  for (const Product<T>& product : products) {
    small += ceil_div(product.m, 64) * ceil_div(product.n, 64);
    large += ceil_div(product.m, 128) * ceil_div(product.n, 128);
  }
  return large >= current_device().processors && 3 * small >= 8 * large;
}

}  // namespace

template <typename T>
cudaError_t multiply_all(std::vector<Product<T>> products, bool tf32, cudaStream_t stream) {
  // Blocks begin in order: the longest first, so that none begins late.
  std::stable_sort(products.begin(), products.end(), [](const auto& one, const auto& other) {
    return one.k_end - one.k_begin > other.k_end - other.k_begin;
  });
  if constexpr (sizeof(T) == 8) {
    return run<FmaTile<64, 64>, AnyMemory>(products, stream);
  } else if (large_tiles(products)) {
    return tf32 ? run_all<TensorTile<1, 128, 128>>(products, stream)
                : run_all<TensorTile<3, 128, 128>>(products, stream);
  } else {
    return tf32 ? run_all<TensorTile<1, 64, 64>>(products, stream)
                : run_all<TensorTile<3, 64, 64>>(products, stream);
  }
}

template cudaError_t multiply_all(std::vector<Product<float>>, bool, cudaStream_t);
template cudaError_t multiply_all(std::vector<Product<double>>, bool, cudaStream_t);

}  // namespace hesskern::cuda
