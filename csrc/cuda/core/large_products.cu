// Both matrices of every product are packed along k in one launch, then multiplied along k in
// another. 8 bytes of memory an element of both, then 6 m n k operations at the rate of 16-bit
// products.
#include <algorithm>

#include "large_products.h"
#include "launch.h"
#include "pack_along_k.h"

namespace hesskern::cuda {

namespace {

int64_t depth(const Product<float>& p) {
  return p.k_end - p.k_begin;
}

// Whether it can be multiplied by parts, and should where others are.
bool fits(const Product<float>& p, const LargeFrom& from) {
  constexpr int64_t kMost = 1 << 30;
  const auto straight = [](const Axis& axis) { return axis.inner == 0; };
  // The rows of the scale may repeat: several vectors, one after another.
  const bool repeats = p.scale_row.outer == 0 && p.scale_row.inner < kMost;
  return p.m >= from.side && p.n >= from.side && p.m < kMost && p.n < kMost && depth(p) > 0 &&
         depth(p) <= kLongestPartsSum && straight(p.a_row) && straight(p.a_k) && straight(p.b_k) &&
         straight(p.b_column) && straight(p.c_row) && straight(p.c_column) &&
         straight(p.scale_column) && (straight(p.scale_row) || repeats);
}

// Elements of float that its packed matrices take.
int64_t packed_size(const Product<float>& p) {
  return PackedPlace(0, 2, p.m, depth(p), true).end + PackedPlace(0, 2, p.n, depth(p), true).end;
}

// Microseconds that packing takes: 8 bytes of memory an element.
double packing_time(const Product<float>& p) {
  return static_cast<double>(p.m + p.n) * static_cast<double>(depth(p)) * 8 / 4e6;
}

// Microseconds that multiply_all takes for one of many, whose tiles are 64 x 64 at least.
double tiles_time(const Product<float>& p, double rate) {
  const auto whole = [](int64_t size) { return static_cast<double>(ceil_div(size, 64) * 64); };
  return 2 * whole(p.m) * whole(p.n) * static_cast<double>(depth(p)) / rate;
}

}  // namespace

PlannedProducts::PlannedProducts(const std::vector<Product<float>>& products, bool tf32,
                                 const LargeFrom& from)
    : tf32_(tf32) {
  // One GiB of packed matrices, or a single product's.
  constexpr int64_t kMostPacked = 1 << 28;
  // One product of tf32 instead of three.
  const double rate = tf32 ? 3 * from.rate : from.rate, a_launch = 4;
  const bool available = parts_products_available();
  std::vector<size_t> together;
  double tiles = 0, packing = 0;
  int64_t packed = 0;
  const auto close = [&] {
    if (together.empty()) return;
    std::vector<PartsSize> sizes;
    for (const size_t i : together) {
      sizes.push_back({products[i].m, products[i].n, depth(products[i])});
    }
    GroupedPartsProduct product(PartsType::kTwoFloat16, true, sizes);
    const double parts = packing + product.cost() + (product.workspace() > 0 ? 3 : 2) * a_launch;
    if (parts < tiles + a_launch) {
      Group group{std::move(together), product, {}, {}};
      int64_t end = whole_pieces(product.workspace());
      for (const size_t i : group.products) {
        const Product<float>& p = products[i];
        group.a.emplace_back(end, 2, p.m, depth(p), true);
        group.b.emplace_back(group.a.back().end, 2, p.n, depth(p), true);
        end = group.b.back().end;
      }
      workspace_ = std::max(workspace_, end);
      groups_.push_back(std::move(group));
    } else {
      others_.insert(others_.end(), together.begin(), together.end());
    }
    together.clear();
    tiles = packing = 0;
    packed = 0;
  };
  for (size_t i = 0; i < products.size(); ++i) {
    const Product<float>& p = products[i];
    if (!available || !fits(p, from)) {
      others_.push_back(i);
      continue;
    }
    if (together.size() == kMostProducts || packed + packed_size(p) > kMostPacked) close();
    together.push_back(i);
    tiles += tiles_time(p, rate);
    packing += packing_time(p);
    packed += packed_size(p);
  }
  close();
}

size_t PlannedProducts::by_parts() const {
  size_t count = 0;
  for (const Group& group : groups_) count += group.products.size();
  return count;
}

cudaError_t PlannedProducts::run(const Group& group, const std::vector<Product<float>>& products,
                                 float* workspace, cudaStream_t stream) const {
  std::vector<AlongK> matrices;
  std::vector<GroupedPart> parts;
  for (size_t i = 0; i < group.products.size(); ++i) {
    const Product<float>& p = products[group.products[i]];
    const PackedRows a = group.a[i].in(workspace, p.m), b = group.b[i].in(workspace, p.n);
    matrices.push_back({p.a + p.a_k.offset(p.k_begin), p.a_row.step, p.a_k.step, nullptr, a});
    matrices.push_back({p.b + p.b_k.offset(p.k_begin), p.b_column.step, p.b_k.step, nullptr, b});
    PartsScale scale;
    if (p.scale != nullptr) {
      scale = {p.scale, p.scale_row.step, p.scale_column.step, static_cast<int>(p.scale_row.inner)};
    }
    parts.push_back({matrix_of(a, a.exponents),
                     matrix_of(b, b.exponents),
                     {p.c, p.c_row.step, p.c_column.step, 1.0f, false},
                     scale});
  }
  const cudaError_t error = pack_along_k(matrices, stream);
  return error != cudaSuccess ? error : group.product.run(parts, workspace, stream);
}

cudaError_t PlannedProducts::run(const std::vector<Product<float>>& products, float* workspace,
                                 cudaStream_t stream) const {
  for (const Group& group : groups_) {
    const cudaError_t error = run(group, products, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  std::vector<Product<float>> others;
  for (const size_t i : others_) others.push_back(products[i]);
  return others.empty() ? cudaSuccess : multiply_all(others, tf32_, stream);
}

}  // namespace hesskern::cuda
