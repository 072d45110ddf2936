// Both matrices are packed, then multiplied: along k where both lie along it, so that nothing is
// transposed, across k otherwise. 8 bytes of memory an element of both, then 6 m n k operations at
// the rate of 16-bit products.
#include "elements.h"
#include "large_products.h"

namespace hesskern::cuda {

namespace {

bool lies_along_k(const Axis& k, const Axis& other) {
  return k.step == 1 && k.inner == 0 && other.inner == 0;
}

int64_t depth(const Product<float>& p) {
  return p.k_end - p.k_begin;
}

cudaError_t pack(const float* data, const Axis& k, const Axis& other, int64_t k_begin, bool along_k,
                 const PackedRows& to, cudaStream_t stream) {
  if (along_k) return pack_along_k(data + k_begin, other.step, 1, nullptr, to, stream);
  const auto source = rows_by_axes(data, k, other, k_begin + to.rows, to.columns);
  return pack_rows<2>(source, k_begin, k.step == 1 && other.step != 1, to, stream);
}

// c times scale, element by element, after the product.
template <int Threads>
__global__ void __launch_bounds__(Threads) scale_kernel(Product<float> p) {
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x; index < p.m * p.n;
       index += static_cast<int64_t>(gridDim.x) * Threads) {
    const int64_t row = index / p.n, column = index % p.n;
    p.c[p.c_row.offset(row) + p.c_column.offset(column)] *=
        p.scale[p.scale_row.offset(row) + p.scale_column.offset(column)];
  }
}

}  // namespace

bool LargeProduct::fits(const Product<float>& p, const LargeFrom& from) {
  return p.m >= from.side && p.n >= from.side && depth(p) <= kLongestPartsSum &&
         p.c_row.inner == 0 && p.c_column.inner == 0 &&
         static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(depth(p)) >=
             from.operations &&
         parts_products_available();
}

LargeProduct::LargeProduct(const Product<float>& p)
    : along_k_(lies_along_k(p.a_k, p.a_row) && lies_along_k(p.b_k, p.b_column)),
      product_(PartsType::kTwoFloat16, along_k_, p.m, p.n, depth(p), false),
      a_(whole_pieces(product_.workspace()), 2, along_k_ ? p.m : depth(p),
         along_k_ ? depth(p) : p.m, along_k_),
      b_(a_.end, 2, along_k_ ? p.n : depth(p), along_k_ ? depth(p) : p.n, along_k_) {}

cudaError_t LargeProduct::run(const Product<float>& p, float* workspace,
                              cudaStream_t stream) const {
  const PackedRows a = a_.in(workspace, along_k_ ? p.m : depth(p));
  const PackedRows b = b_.in(workspace, along_k_ ? p.n : depth(p));
  cudaError_t error = pack(p.a, p.a_k, p.a_row, p.k_begin, along_k_, a, stream);
  if (error == cudaSuccess) {
    error = pack(p.b, p.b_k, p.b_column, p.k_begin, along_k_, b, stream);
  }
  if (error != cudaSuccess) return error;
  error = product_.run(matrix_of(a, a.exponents), matrix_of(b, b.exponents),
                       {p.c, p.c_row.step, p.c_column.step, 1.0f, false}, workspace, stream);
  if (error != cudaSuccess || p.scale == nullptr) return error;
  return launch(scale_kernel<kThreads>, grid_for(p.m * p.n), dim3(kThreads), 0, stream, p);
}

}  // namespace hesskern::cuda
