// core/pack_along_k.cu, grouped products of core/parts_product.cu, and large_products.cu on the
// CPU.
#include <algorithm>
#include <memory>
#include <utility>

#include "check.h"
#include "checks.h"
#include "core/large_products.h"
#include "core/pack_along_k.h"
#include "core/parts_product.h"

namespace hesskern::cuda::check {

namespace {

// How a matrix lies in memory: k in order, rows in order, or neither; or at an odd address.
enum class Lies { kAlongK, kAcrossK, kApart, kUnaligned };

// [rows, k] of random numbers, with NaN around them.
class Source {
 public:
  // decades: rows and columns of very different sizes, some of them zero, some denormal.
  Source(int64_t rows, int64_t k, Lies lies, bool decades)
      : rows_(rows),
        k_(k),
        row_step_(lies == Lies::kAcrossK ? 1
                  : lies == Lies::kApart ? 3 * k + 2
                                         : k + k % 2),
        k_step_(lies == Lies::kAcrossK ? rows + 3
                : lies == Lies::kApart ? 3
                                       : 1),
        begin_(lies == Lies::kUnaligned ? 1 : 0),
        memory_((rows - 1) * row_step_ + (k - 1) * k_step_ + 1 + begin_) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        double value = normal();
        if (decades) value *= std::pow(10.0, 5 * (i % 5) - 10);
        if (decades && i % 7 == 3) value = i % 2 == 0 ? 0 : value * 1e-30;
        at(i, j) = static_cast<float>(value);
      }
    }
  }
  float& at(int64_t i, int64_t j) const { return memory_[begin_ + i * row_step_ + j * k_step_]; }
  const float* data() const { return memory_.data() + begin_; }
  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  int64_t row_step() const { return row_step_; }
  int64_t k_step() const { return k_step_; }

 private:
  int64_t rows_, k_, row_step_, k_step_, begin_;
  Memory<float> memory_;
};

// A source's packed rows in memory of their own.
struct Packed {
  PackedPlace place;
  Memory<float> memory;
  PackedRows rows;

  explicit Packed(const Source& source)
      : place(0, 2, source.rows(), source.k(), true),
        memory(place.end),
        rows(place.in(memory.data(), source.rows())) {}

  double value(int64_t i, int64_t j) const {
    double total = 0;
    for (int part = 0; part < 2; ++part) {
      total += value_of(Float16{rows.parts[part * rows.part_step() + i * rows.padded() + j]});
    }
    return total;
  }
};

struct PackCase {
  int64_t rows, k;
  Lies lies = Lies::kAlongK;
  // With exponents along k; a NaN or an infinity in one row.
  bool exponents = false;
  float bad = 0;
};

// The worst error of what is packed, in units of 2^-23 of a value or 2^-39 of its row's largest
// one, and what else must hold.
double pack_error(const PackCase& s, const Source& source, const Memory<int>& exponents,
                  const Packed& packed) {
  double worst = 0;
  for (int64_t i = 0; i < s.rows; ++i) {
    const auto exact = [&](int64_t j) {
      const double value = source.at(i, j);
      return s.exponents ? std::ldexp(value, -exponents[j]) : value;
    };
    double largest = 0, found = 0;
    bool finite = true;
    for (int64_t j = 0; j < s.k; ++j) {
      finite = finite && std::isfinite(exact(j));
      largest = std::max(largest, std::fabs(exact(j)));
    }
    for (int64_t j = 0; j < s.k; ++j) {
      if (!finite) {
        // What is not finite stays so.
        if (!std::isfinite(exact(j)) && std::isfinite(packed.value(i, j))) return 1e9;
        continue;
      }
      const double value = std::ldexp(packed.value(i, j), -packed.rows.exponents[i]);
      found = std::max(found, std::fabs(packed.value(i, j)));
      const double limit = std::max(std::ldexp(std::fabs(exact(j)), -23), std::ldexp(largest, -39));
      const double error = std::fabs(value - exact(j)) / (limit > 0 ? limit : 1e-300);
      worst = error <= worst ? worst : error;
      if (std::isnan(error)) return 1e9;
    }
    // The top of float16's range is used.
    if (finite && largest > 0 && !(found >= 16384 && found < 32769)) return 1e9;
    for (int64_t j = s.k; j < packed.rows.padded(); ++j) {
      if (packed.value(i, j) != 0) return 1e9;
    }
  }
  return worst;
}

void pack(const std::vector<PackCase>& cases) {
  std::vector<std::unique_ptr<Source>> sources;
  std::vector<std::unique_ptr<Packed>> packed;
  std::vector<std::unique_ptr<Memory<int>>> exponents;
  std::vector<AlongK> matrices;
  for (const PackCase& s : cases) {
    sources.push_back(std::make_unique<Source>(s.rows, s.k, s.lies, s.rows % 2 == 1));
    const Source& source = *sources.back();
    if (s.bad != 0) source.at(s.rows / 2, s.k - 1) = s.bad;
    packed.push_back(std::make_unique<Packed>(source));
    exponents.push_back(std::make_unique<Memory<int>>(s.k));
    for (int64_t j = 0; j < s.k; ++j) {
      (*exponents.back())[j] = static_cast<int>(std::floor(15 * normal()));
    }
    matrices.push_back({source.data(), source.row_step(), source.k_step(),
                        s.exponents ? exponents.back()->data() : nullptr, packed.back()->rows});
  }
  // Of no rows.
  AlongK none = matrices.front();
  none.to.rows = 0;
  matrices.insert(matrices.begin(), none);
  matrices.push_back(none);
  const std::string name = "pack_along_k of " + std::to_string(cases.size()) + ", first [" +
                           std::to_string(cases[0].rows) + ", " + std::to_string(cases[0].k) + "]";
  if (pack_along_k(matrices, nullptr) != cudaSuccess) return report(name + ": not launched", 1, 0);
  double worst = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    worst = std::max(worst, pack_error(cases[i], *sources[i], *exponents[i], *packed[i]));
  }
  report(name, worst, 1);
}

// One of several products; scale: none, one for every element, or rows that repeat.
struct One {
  int64_t m, n, k;
  Lies a = Lies::kAlongK, b = Lies::kAlongK;
  bool columns_of_c = false, decades = false;
  enum { kNone, kEach, kRows } scale = kNone;
};

// A product's matrices, and what it must give.
struct Operands {
  Source a, b, scale;
  int64_t c_row, c_column;
  Memory<float> c;
  One one;
  int64_t scale_rows;

  explicit Operands(const One& s)
      : a(s.m, s.k, s.a, s.decades),
        b(s.n, s.k, s.b, s.decades),
        scale(s.m, s.n, Lies::kAlongK, false),
        c_row(s.columns_of_c ? 1 : s.n + 1),
        c_column(s.columns_of_c ? s.m + 2 : 1),
        c((s.m - 1) * c_row + (s.n - 1) * c_column + 1),
        one(s),
        scale_rows(s.scale == One::kRows ? (s.m + 2) / 3 : s.m) {}

  float at(int64_t i, int64_t j) const { return c[i * c_row + j * c_column]; }

  // In the norm; of rows of many sizes also every element's against its row's and column's norm.
  double error() const {
    double difference = 0, norm = 0, worst = 0;
    int64_t touched = 0;
    for (int64_t i = 0; i < one.m; ++i) {
      for (int64_t j = 0; j < one.n; ++j) {
        double total = 0, row = 0, column = 0;
        for (int64_t k = 0; k < one.k; ++k) {
          const double x = a.at(i, k), y = b.at(j, k);
          total += x * y;
          row += x * x;
          column += y * y;
        }
        const double by = one.scale == One::kNone ? 1 : scale.at(i % scale_rows, j);
        const double delta = at(i, j) - by * total;
        if (!std::isfinite(delta)) return std::numeric_limits<double>::infinity();
        difference += delta * delta;
        norm += by * by * total * total;
        // Denormal results have no more bits.
        const double size =
            std::sqrt(row) * std::sqrt(column) * std::fabs(by) + 1e-38 * (1 + std::fabs(by));
        worst = std::max(worst, std::fabs(delta) / size);
      }
    }
    for (int64_t i = 0; i < c.size(); ++i) touched += std::isnan(c[i]) ? 0 : 1;
    if (touched != one.m * one.n) return std::numeric_limits<double>::infinity();
    return std::max(norm > 0 ? std::sqrt(difference / norm) : 0.0, worst);
  }
};

// All of them in one launch, with tiles of so many columns.
void grouped(const std::vector<One>& all, int tile, int processors) {
  multiprocessor_count_is(processors);
  std::vector<std::unique_ptr<Operands>> operands;
  std::vector<std::unique_ptr<Packed>> packed;
  std::vector<AlongK> matrices;
  std::vector<PartsSize> sizes;
  std::vector<GroupedPart> parts;
  for (const One& one : all) {
    operands.push_back(std::make_unique<Operands>(one));
    const Operands& o = *operands.back();
    const auto add = [&](const Source& source) {
      packed.push_back(std::make_unique<Packed>(source));
      matrices.push_back(
          {source.data(), source.row_step(), source.k_step(), nullptr, packed.back()->rows});
      return matrix_of(packed.back()->rows, packed.back()->rows.exponents);
    };
    sizes.push_back({one.m, one.n, one.k});
    const PartsMatrix a = add(o.a), b = add(o.b);
    PartsScale scale;
    if (one.scale != One::kNone) {
      scale = {o.scale.data(), o.scale.row_step(), o.scale.k_step(),
               one.scale == One::kRows ? static_cast<int>(o.scale_rows) : 0};
    }
    parts.push_back({a, b, {o.c.data(), o.c_row, o.c_column, 1.0f, false}, scale});
  }
  const GroupedPartsProduct plan(PartsType::kTwoFloat16, true, sizes, tile);
  const Memory<float> workspace(plan.workspace());
  const bool ran = pack_along_k(matrices, nullptr) == cudaSuccess &&
                   plan.run(parts, workspace.data(), nullptr) == cudaSuccess;
  int items = 0, split = 0;
  for (const PartsSchedule& schedule : plan.schedules()) {
    items += schedule.items();
    split += schedule.split_tiles() > 0 ? 1 : 0;
  }
  double worst = 0;
  for (const auto& one : operands) worst = std::max(worst, one->error());
  report("grouped product of " + std::to_string(all.size()) + ", tile " + std::to_string(tile) +
             ", " + std::to_string(items) + " items on " + std::to_string(processors) + ", " +
             std::to_string(split) + " with splits",
         ran ? worst : 1, 1e-6);
}

// Products across k of several sizes in one launch, with gaps in the second one's B; a long one and
// short ones.
template <typename T>
void across_k(PartsType type, const char* name, int tile, int processors) {
  multiprocessor_count_is(processors);
  const int64_t count = type == PartsType::kTwoFloat16 ? 2 : 1;
  const std::vector<PartsSize> sizes = {{70, 136, 700}, {136, 192, 90}, {9, 64, 40}, {8, 300, 1}};
  std::vector<std::unique_ptr<Memory<T>>> matrices;
  std::vector<std::unique_ptr<Memory<float>>> sums;
  std::vector<GroupedPart> parts;
  const auto matrix = [&](int64_t rows, int64_t columns, int64_t width) {
    const int64_t gap = width == 0 ? 0 : 8, pieces = width == 0 ? 1 : ceil_div(columns, width);
    const int64_t step = ceil_div(columns + (pieces - 1) * gap, 8) * 8;
    matrices.push_back(std::make_unique<Memory<T>>(count * rows * step));
    for (int64_t i = 0; i < count * rows * step; ++i) {
      (*matrices.back())[i] = store<T>(normal() * (i < rows * step ? 1 : 5e-4));
    }
    return PartsMatrix{
        matrices.back()->data(), rows, columns, step, rows * step, nullptr, width, gap};
  };
  for (const PartsSize& size : sizes) {
    sums.push_back(std::make_unique<Memory<float>>(size.m * size.n));
    const PartsMatrix a = matrix(size.k, size.m, 0);
    const PartsMatrix b = matrix(size.k, size.n, parts.size() == 1 ? 64 : 0);
    parts.push_back({a, b, {sums.back()->data(), size.n, 1, 0.5f, false}, {}});
  }
  const GroupedPartsProduct plan(type, false, sizes, tile);
  const Memory<float> workspace(plan.workspace());
  double worst = plan.run(parts, workspace.data(), nullptr) == cudaSuccess ? 0 : 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto value = [&](const PartsMatrix& x, int64_t part, int64_t k, int64_t j) {
      const int64_t place = x.width == 0 ? j : j + j / x.width * x.gap;
      return value_of(static_cast<const T*>(x.data)[part * x.part_step + k * x.row_step + place]);
    };
    worst = std::max(worst, relative_error(
                                sizes[i].m * sizes[i].n, [&](int64_t e) { return (*sums[i])[e]; },
                                [&](int64_t e) {
                                  double total = 0;
                                  for (int64_t k = 0; k < sizes[i].k; ++k) {
                                    double left = 0, right = 0;
                                    for (int64_t part = 0; part < count; ++part) {
                                      left += value(parts[i].a, part, k, e / sizes[i].n);
                                      right += value(parts[i].b, part, k, e % sizes[i].n);
                                    }
                                    total += left * right;
                                  }
                                  return 0.5 * total;
                                }));
  }
  int split = 0;
  for (const PartsSchedule& schedule : plan.schedules()) split += schedule.split_tiles() > 0;
  report(std::string("grouped product across k of ") + name + ", tile " + std::to_string(tile) +
             ", " + std::to_string(split) + " of 4 with splits",
         worst, 1e-6);
}

// Products by their addresses: some by parts, others not.
void planned(const std::string& what, const std::vector<One>& all, const LargeFrom& from,
             size_t by_parts, bool tf32 = false) {
  multiprocessor_count_is(2);
  std::vector<std::unique_ptr<Operands>> operands;
  std::vector<Product<float>> products;
  for (const One& one : all) {
    operands.push_back(std::make_unique<Operands>(one));
    const Operands& o = *operands.back();
    Product<float> product{};
    // k begins behind what is not there.
    product.k_begin = 5;
    product.k_end = one.k + 5;
    product.a = o.a.data() - 5 * o.a.k_step();
    product.a_row = {o.a.row_step()};
    product.a_k = {o.a.k_step()};
    product.b = o.b.data() - 5 * o.b.k_step();
    product.b_column = {o.b.row_step()};
    product.b_k = {o.b.k_step()};
    product.c = o.c.data();
    product.c_row = {o.c_row};
    product.c_column = {o.c_column};
    product.m = one.m;
    product.n = one.n;
    if (one.scale != One::kNone) {
      product.scale = o.scale.data();
      product.scale_row = {o.scale.row_step()};
      product.scale_column = {o.scale.k_step()};
      if (one.scale == One::kRows) product.scale_row.inner = o.scale_rows;
    }
    products.push_back(product);
  }
  const PlannedProducts plan(products, tf32, from);
  const Memory<float> workspace(plan.workspace());
  const bool ran = plan.run(products, workspace.data(), nullptr) == cudaSuccess;
  double worst = 0;
  for (const auto& one : operands) worst = std::max(worst, one->error());
  report("planned products, " + what + ", " + std::to_string(plan.by_parts()) + " of " +
             std::to_string(all.size()) + " by parts",
         ran && plan.by_parts() == by_parts ? worst : 1, tf32 ? 3e-3 : 1e-6);
}

// What goes by parts on a device with so many processors.
void chosen() {
  const auto by_parts = [](const std::vector<PartsSize>& sizes, bool tf32 = false) {
    std::vector<Product<float>> products;
    for (const PartsSize& size : sizes) {
      Product<float> product{};
      product.a_row = {size.k};
      product.a_k = product.c_column = {1};
      product.b_k = product.c_row = {size.n};
      product.b_column = {1};
      product.m = size.m;
      product.n = size.n;
      product.k_end = size.k;
      products.push_back(product);
    }
    return PlannedProducts(products, tf32).by_parts();
  };
  multiprocessor_count_is(132);
  const std::vector<PartsSize> small(48, {120, 160, 160});
  bool good = by_parts(small) == 0 && by_parts({{512, 4608, 4608}, {20, 4608, 512}}) == 1 &&
              by_parts(std::vector<PartsSize>(10, {512, 1024, 1024})) == 10 &&
              by_parts(std::vector<PartsSize>(200, {128, 1152, 1152})) == 200 &&
              by_parts({{1024, 1024, 1024}}, true) <= by_parts({{1024, 1024, 1024}}) &&
              by_parts({}) == 0;
  emulation::device().capability = 80;
  good = good && by_parts({{512, 4608, 4608}}) == 0;
  emulation::device().capability = emulation::Properties().capability;
  report("products by parts where it pays", good ? 0 : 1, 0);
}

}  // namespace

void check_pack_along_k(bool few) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  pack({{9, 70}, {2, 1100, Lies::kUnaligned}, {33, 130, Lies::kAcrossK}});
  if (few) return;
  pack({{1, 1}, {17, 5, Lies::kApart}, {8, 1024}, {3, 1023, Lies::kUnaligned}, {2, 1030}});
  pack({{3, 8193}, {1, 9001, Lies::kUnaligned}, {2, 8192, Lies::kApart}});
  pack({{70, 1, Lies::kAcrossK}, {1, 40, Lies::kAcrossK}, {31, 257, Lies::kAcrossK}});
  pack({{9, 60, Lies::kAlongK, true},
        {3, 1500, Lies::kAlongK, true},
        {33, 140, Lies::kAcrossK, true}});
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    for (const bool exponents : {false, true}) {
      pack({{9, 60, Lies::kAlongK, exponents, bad},
            {2, 1500, Lies::kAlongK, exponents, bad},
            {40, 140, Lies::kAcrossK, exponents, bad}});
    }
  }
  // More than one launch takes.
  pack(std::vector<PackCase>(150, {3, 9}));
  // So many rows that a block takes several shares of them: of blocks, warps and neighbours.
  multiprocessor_count_is(1);
  pack({{37, 1100}, {75, 60}, {5, 1030, Lies::kAlongK, true}, {70, 130, Lies::kAcrossK}});
  multiprocessor_count_is(132);
}

void check_grouped_products(bool few) {
  grouped({{130, 20, 70}, {5, 3, 200, Lies::kAlongK, Lies::kAcrossK}}, 128, 2);
  if (few) return;
  const One all_kinds[] = {
      {130, 140, 70, Lies::kAlongK, Lies::kAcrossK, false, false, One::kEach},
      {1, 1, 1},
      {20, 260, 130, Lies::kUnaligned, Lies::kAlongK, true, false, One::kRows},
      {257, 9, 64, Lies::kAcrossK, Lies::kApart, false, true, One::kEach},
      {40, 33, 65, Lies::kAlongK, Lies::kAlongK, true, true},
  };
  const std::vector<One> mixed(std::begin(all_kinds), std::end(all_kinds));
  for (const int tile : {128, 256}) {
    // Several rounds of blocks, forwards and back; all at once.
    grouped(mixed, tile, 2);
    grouped(mixed, tile, 40);
    // Splits, in some of them; of a product alone.
    grouped({{20, 30, 330, Lies::kAlongK, Lies::kAlongK, false, true, One::kEach},
             {9, 8, 60},
             {7, 140, 200, Lies::kAcrossK, Lies::kAlongK, true, false, One::kRows}},
            tile, 12);
    grouped({{10, 12, 520, Lies::kAlongK, Lies::kAlongK, false, false, One::kEach}}, tile, 5);
  }
  for (const int tile : {128, 256}) {
    across_k<Float16>(PartsType::kTwoFloat16, "two float16", tile, 9);
    across_k<Float16>(PartsType::kFloat16, "float16", tile, 2);
    across_k<BFloat16>(PartsType::kBFloat16, "bfloat16", tile, 9);
  }
  // All go by parts however small; those with short sides not; of two groups.
  planned("all", mixed, {1, 1e-6}, 5);
  // Tiles lose denormal numbers.
  std::vector<One> of_one_size = mixed;
  for (One& one : of_one_size) one.decades = false;
  planned("some", of_one_size, {20, 1e-6}, 3);
  planned("none", of_one_size, {}, 0);
  planned("two groups", std::vector<One>(70, {2, 3, 4}), {1, 1e-6}, 70);
  planned("tf32", {{20, 20, 20}, {40, 40, 40}}, {30, 1e-6}, 1, true);
  chosen();
}

}  // namespace hesskern::cuda::check
