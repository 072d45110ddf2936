// core/parts_product.cu, packed_rows.h and symmetric_parts.h on the CPU.
#include <algorithm>
#include <utility>

#include "check.h"
#include "checks.h"
#include "core/elements.h"
#include "core/parts_product.h"
#include "core/symmetric_parts.h"
#include "core/warp.h"
#include "input_covariance.h"

namespace hesskern::cuda::check {

namespace {

// c [m, n] or its upper triangle with any strides in memory that is NaN elsewhere, and what it must
// hold.
class Result {
 public:
  Result(int64_t m, int64_t n, int64_t row_step, int64_t column_step, bool triangle, double start)
      : row_step_(row_step),
        column_step_(column_step),
        memory_((m - 1) * row_step + (n - 1) * column_step + 1),
        expected_(m * n),
        scale_(m * n),
        m_(m),
        n_(n),
        triangle_(triangle) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        expected(i, j) = scale(i, j) = 0;
        if (wanted(i, j)) at(i, j) = static_cast<float>(start * normal());
        if (wanted(i, j)) expected(i, j) = at(i, j);
      }
    }
    before_.assign(memory_.data(), memory_.data() + memory_.size());
  }

  float* data() const { return memory_.data(); }
  float& at(int64_t i, int64_t j) { return memory_[i * row_step_ + j * column_step_]; }
  double& expected(int64_t i, int64_t j) { return expected_[i * n_ + j]; }
  // What errors of the element are measured by, besides the norm of all.
  double& scale(int64_t i, int64_t j) { return scale_[i * n_ + j]; }
  bool wanted(int64_t i, int64_t j) const { return !triangle_ || i <= j; }

  // In the norm, or of a single element against its scale, which may be worse by half.
  double error() {
    double worst = relative_error(
        m_ * n_, [&](int64_t e) { return wanted(e / n_, e % n_) ? at(e / n_, e % n_) : 0.0; },
        [&](int64_t e) { return expected_[e]; });
    for (int64_t i = 0; i < m_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        if (!wanted(i, j) || scale(i, j) == 0) continue;
        const double delta = std::fabs(at(i, j) - expected(i, j)) / scale(i, j) / 1.5;
        worst = delta <= worst ? worst : delta;
      }
    }
    return untouched() ? worst : std::numeric_limits<double>::infinity();
  }

  // Whether all that is not wanted is as it was.
  bool untouched() {
    std::vector<bool> ours(before_.size());
    for (int64_t i = 0; i < m_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        if (wanted(i, j)) ours[static_cast<size_t>(i * row_step_ + j * column_step_)] = true;
      }
    }
    for (size_t i = 0; i < before_.size(); ++i) {
      if (!ours[i] && std::memcmp(&before_[i], memory_.data() + i, sizeof(float)) != 0) {
        return false;
      }
    }
    return true;
  }

  int64_t row_step_, column_step_;

 private:
  Memory<float> memory_;
  Memory<double> expected_, scale_;
  std::vector<float> before_;
  int64_t m_, n_;
  bool triangle_;
};

// Random parts [parts, rows, columns], in rows of step with NaN behind, and what they stand for.
template <typename T>
struct RandomParts {
  Memory<T> memory;
  Memory<int> exponents;
  int64_t rows, columns, step;
  int parts;
  bool along_k;

  RandomParts(int part_count, int64_t row_count, int64_t column_count, bool is_along_k)
      : memory(part_count * row_count * ((column_count + 7) / 8 * 8 + 8)),
        exponents(is_along_k ? row_count : column_count),
        rows(row_count),
        columns(column_count),
        step((column_count + 7) / 8 * 8 + 8),
        parts(part_count),
        along_k(is_along_k) {
    for (int64_t j = 0; j < exponents.size(); ++j) {
      exponents[j] = static_cast<int>(std::floor(5 * normal()));
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        double left = normal();
        for (int64_t p = 0; p < parts; ++p) {
          memory[(p * rows + i) * step + j] = store<T>(left);
          left -= value_of(memory[(p * rows + i) * step + j]);
        }
      }
    }
  }

  double value(int64_t i, int64_t j) const {
    if (i < 0 || i >= rows) return 0;
    double total = 0;
    for (int64_t p = 0; p < parts; ++p) total += value_of(memory[(p * rows + i) * step + j]);
    return parts == 1 ? total : std::ldexp(total, -exponents[along_k ? i : j]);
  }
  PartsMatrix matrix() const {
    return {memory.data(), rows,        columns,
            step,          rows * step, parts == 1 ? nullptr : exponents.data()};
  }
};

struct ProductCase {
  int64_t m, n, k;
  int tile, processors;
  bool along_k = false;
  // Behind every 64 of B's columns.
  int64_t gap = 0;
  // c in columns instead of rows.
  bool columns_of_c = false, add = true;
};

template <typename T>
void product(PartsType type, const ProductCase& s) {
  multiprocessor_count_is(s.processors);
  const int parts = type == PartsType::kTwoFloat16 ? 2 : 1;
  const RandomParts<T> a(parts, s.along_k ? s.m : s.k, s.along_k ? s.k : s.m, s.along_k);
  const auto place_b = [&](int64_t j) { return j + j / 64 * s.gap; };
  const RandomParts<T> b(parts, s.along_k ? s.n : s.k, s.along_k ? s.k : place_b(s.n - 1) + 1,
                         s.along_k);
  PartsMatrix matrix_b = b.matrix();
  Memory<int> exponents_b(s.n);
  if (s.gap != 0) {
    for (int64_t j = 0; j < s.n; ++j) exponents_b[j] = b.exponents[place_b(j)];
    matrix_b.columns = s.n;
    matrix_b.width = 64;
    matrix_b.gap = s.gap;
    if (parts == 2) matrix_b.exponents = exponents_b.data();
  }
  Result c(s.m, s.n, s.columns_of_c ? 1 : s.n + s.n % 2, s.columns_of_c ? s.m + 1 : 1, false, 1);
  const PartsTarget target{c.data(), c.row_step_, c.column_step_, 0.7f, s.add};
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double total = 0;
      for (int64_t k = 0; k < s.k; ++k) {
        total += s.along_k ? a.value(i, k) * b.value(j, k) : a.value(k, i) * b.value(k, place_b(j));
      }
      c.expected(i, j) = (s.add ? c.expected(i, j) : 0) + target.alpha * total;
    }
  }
  const PartsProduct plan(type, s.along_k, s.m, s.n, s.k, false, s.tile);
  const Memory<float> workspace(plan.workspace());
  const bool ran = plan.run(a.matrix(), matrix_b, target, workspace.data(), nullptr) == cudaSuccess;
  char name[128];
  std::snprintf(name, sizeof(name), "product %s [%d, %d, %d]%s%s%s, tile %d, %d whole, %d splits",
                parts == 2                     ? "hi/lo"
                : type == PartsType::kBFloat16 ? "bfloat16"
                                               : "float16",
                static_cast<int>(s.m), static_cast<int>(s.n), static_cast<int>(s.k),
                s.along_k ? " along k" : "", s.gap != 0 ? " with gaps" : "",
                s.columns_of_c ? " to columns" : "", s.tile, plan.schedule().whole,
                plan.schedule().splits);
  report(name, ran ? c.error() : 1, 1e-6);
}

enum class Data {
  kNormal,
  kNonNegative,
  kDecades,
  kDenormal,
  kLate,
  kHuge,
  kZeroColumn,
  kSparse,
};

double sample(Data data, int64_t row, int64_t column, int64_t columns) {
  const double value = normal();
  switch (data) {
    case Data::kNormal:
      return value;
    case Data::kNonNegative:
      return std::fmax(value + 0.5, 0.0);
    case Data::kDecades:
      return value * std::pow(10.0, std::round(static_cast<double>(column * 12 / columns) - 6));
    case Data::kDenormal:
      return value * (column < columns / 2 ? 1e-39 : 1e15);
    case Data::kLate:
      // Zero in the rows that a guess sees, or small in them.
      if (column == 4 && row % 32 == 0) return 0;
      if (column == 5) return row % 32 == 0 ? value : 300 * value;
      return column == 6 && row == 33 ? 1e5 : value;
    case Data::kHuge:
      return value * 1e16;
    case Data::kSparse:
      // Nothing in the rows that a guess sees: as large as neighbours, or much smaller.
      if (column % 4 != 1) return value;
      if (row % 32 < 30) return 0;
      return (column < columns / 2 ? 1 : 1e-6) * (1 + std::fabs(value));
    default:
      return column == 5 ? 0.0 : value;
  }
}

struct SymmetricCase {
  int64_t rows, columns;
  Data data = Data::kNormal;
  bool ones = false, transposed = false;
  int64_t offset = 0;  // elements from a multiple of 16 bytes
  int processors = 2;
  bool tf32 = false, columns_of_sum = false;
  SymmetricPartsLimits limits = {};
  int64_t together = 1;  // rows that no block divides
};

template <typename In>
Work<float> work_of(const In* x, const Axis& row, const Axis& column, const SymmetricCase& s,
                    const SymmetricSum<float>& sum) {
  if constexpr (sizeof(In) == 2) {
    if (!s.ones && rows_are_parts(x, row, column, s.rows, s.columns)) {
      return plan_symmetric_parts(x, row.step, s.rows, sum, s.limits);
    }
  }
  const auto source = rows_by_axes(x, row, column, s.rows, s.columns, s.ones);
  if constexpr (sizeof(In) == 4) {
    if (s.together > 1) {
      return plan_packed_symmetric(PartsType::kTwoFloat16, true, s.rows, s.together, sum, s.limits,
                                   [=](int64_t first, const PackedRows& to, cudaStream_t stream) {
                                     if (first % s.together != 0) return cudaErrorInvalidValue;
                                     return pack_rows<2>(source, first, false, to, stream);
                                   });
    }
    if (!s.tf32) return plan_packed_symmetric<2>(source, s.transposed, s.rows, sum, s.limits);
  }
  return plan_packed_symmetric<1>(source, s.transposed, s.rows, sum, s.limits);
}

template <typename In>
void symmetric(const char* type, const SymmetricCase& s, float bad = 0) {
  multiprocessor_count_is(s.processors);
  const int64_t step = s.transposed ? 1 : s.columns + (s.offset == 0 ? -s.columns & 7 : 1);
  const Axis row{step}, column{s.transposed ? s.rows : 1};
  const Memory<In> memory(s.offset + (s.transposed ? s.rows * s.columns : s.rows * step));
  In* const x = memory.data() + s.offset;
  for (int64_t k = 0; k < s.rows; ++k) {
    for (int64_t i = 0; i < s.columns; ++i) {
      x[row.offset(k) + column.offset(i)] = store<In>(sample(s.data, k, i, s.columns));
    }
  }
  const int64_t d = s.columns + (s.ones ? 1 : 0), at = 3;
  if (bad != 0) x[row.offset(s.rows / 2) + column.offset(at)] = store<In>(bad);
  Result sum(d, d, s.columns_of_sum ? 1 : d + d % 2, s.columns_of_sum ? d + 1 : 1, true,
             s.data == Data::kNormal ? 1 : 0);
  const float alpha = 0.7f;
  const auto value = [&](int64_t k, int64_t i) {
    return i == s.columns ? 1.0 : value_of(x[row.offset(k) + column.offset(i)]);
  };
  std::vector<double> columns(static_cast<size_t>(s.rows));
  std::vector<double> norms(static_cast<size_t>(d));
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t k = 0; k < s.rows; ++k) columns[static_cast<size_t>(k)] = value(k, i);
    for (int64_t j = 0; j <= i; ++j) {
      double total = 0;
      for (int64_t k = 0; k < s.rows; ++k) total += columns[static_cast<size_t>(k)] * value(k, j);
      sum.expected(j, i) += alpha * total;
      if (i == j) norms[static_cast<size_t>(i)] = std::sqrt(alpha * total);
      // Smaller sums than float32 has are as good as zero.
      const double scale = norms[static_cast<size_t>(i)] * norms[static_cast<size_t>(j)];
      sum.scale(j, i) = s.data != Data::kNormal && i != j && scale > 1e-30 ? scale : 0;
    }
  }
  const Work<float> work =
      work_of(x, row, column, s, {sum.data(), 1, d, 0, sum.row_step_, sum.column_step_, alpha});
  const Memory<float> workspace(work.workspace);
  const bool ran = work.run(workspace.data(), nullptr) == cudaSuccess;
  char name[128];
  std::snprintf(name, sizeof(name), "parts %s [%d, %d]%s%s%s%s data %d, tile %d, rows %d", type,
                static_cast<int>(s.rows), static_cast<int>(s.columns), s.ones ? " ones" : "",
                s.transposed ? " transposed" : "", s.offset != 0 ? " unaligned" : "",
                s.tf32 ? " tf32" : "", static_cast<int>(s.data), s.limits.column_tile,
                static_cast<int>(s.limits.most_rows));
  if (bad == 0) {
    return report(name, ran ? sum.error() : 1,
                  s.tf32                         ? 1e-3
                  : s.data == Data::kNonNegative ? 2e-6
                                                 : 1e-6);
  }
  bool good = ran && sum.untouched();
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      good = good && std::isfinite(sum.at(i, j)) == (i != at && j != at);
    }
  }
  report(std::string(name) + " with " + std::to_string(bad), good ? 0 : 1, 0);
}

// Limits with so many rows a block.
SymmetricPartsLimits blocks_of(int64_t rows, int tile = 0) {
  SymmetricPartsLimits limits;
  limits.most_rows = rows;
  limits.column_tile = tile;
  return limits;
}

template <typename T>
void one_product(PartsType type) {
  // Half a chunk, and more than the stages hold; the edges of tiles.
  product<T>(type, {130, 257, 70, 256, 2});
  product<T>(type, {3, 5, 300, 256, 2});
  product<T>(type, {129, 127, 270, 128, 1});
  product<T>(type, {7, 130, 515, 128, 4, false, 0, true});
}

// Parts are chosen by the size of the work and by the device: the workspace tells.
void chosen_by_size() {
  const auto workspace = [](int64_t rows, int64_t columns, int capability) {
    emulation::device().capability = capability;
    const Memory<float> x(1);
    const SymmetricSum<float> sum{x.data(), 1, columns, 0, columns, 1, 1.0f};
    const InputCovariance<float, float> call{x.data(), {columns}, {1},   rows,
                                             columns,  false,     false, sum};
    const int64_t elements = call.plan().workspace;
    emulation::device().capability = emulation::Properties().capability;
    return elements;
  };
  multiprocessor_count_is(132);
  const bool large = workspace(1 << 14, 512, 90) != workspace(1 << 14, 512, 80);
  const bool small = workspace(1 << 10, 512, 90) == workspace(1 << 10, 512, 80);
  const bool narrow = workspace(1 << 20, 64, 90) == workspace(1 << 20, 64, 80);
  const bool other = workspace(1 << 14, 512, 100) == workspace(1 << 14, 512, 80);
  // Sixteen thousand rows of two parts, exponents, flags and the sums of splits: 64 MB at most.
  const int64_t wide = workspace(1 << 20, 16384, 90), parts = int64_t{1} << 28;
  const bool bounded = wide >= parts && wide <= parts + (1 << 24) + (1 << 16);
  report("covariance by parts where it pays", large && small && narrow && other && bounded ? 0 : 1,
         0);
}

}  // namespace

void check_core(bool few) {
  product<Float16>(PartsType::kTwoFloat16, {130, 140, 70, 128, 1});
  symmetric<float>("float", {100, 130, Data::kLate});
  if (few) return;
  product<Float16>(PartsType::kTwoFloat16, {130, 257, 33, 256, 2});
  product<Float16>(PartsType::kTwoFloat16, {1, 1, 1, 128, 2});
  product<Float16>(PartsType::kTwoFloat16, {5, 300, 400, 256, 3});
  product<Float16>(PartsType::kTwoFloat16, {140, 20, 500, 128, 40, false, 0, true});
  product<Float16>(PartsType::kTwoFloat16, {40, 200, 100, 128, 2, false, 64, false, false});
  product<Float16>(PartsType::kTwoFloat16, {40, 300, 100, 256, 2, false, 72});
  for (const int tile : {128, 256}) {
    product<Float16>(PartsType::kTwoFloat16, {130, 260, 70, tile, 2, true});
    product<Float16>(PartsType::kTwoFloat16, {257, 9, 200, tile, 40, true, 0, true, false});
  }
  one_product<BFloat16>(PartsType::kBFloat16);
  one_product<Float16>(PartsType::kFloat16);

  for (const Data data : {Data::kNormal, Data::kNonNegative, Data::kDecades, Data::kDenormal,
                          Data::kLate, Data::kHuge, Data::kZeroColumn, Data::kSparse}) {
    symmetric<float>("float", {203, 44, data});
  }
  // Blocks of rows, the last one short; all whole; one row.
  symmetric<float>("float",
                   {203, 44, Data::kLate, false, false, 0, 2, false, false, blocks_of(64)});
  symmetric<float>("float",
                   {128, 44, Data::kNormal, true, false, 0, 2, false, true, blocks_of(64)});
  symmetric<float>("float",
                   {140, 20, Data::kNormal, false, false, 0, 2, false, false, blocks_of(64), 7});
  symmetric<float>("float", {1, 9});
  symmetric<float>("float", {9, 1});
  // Bands of tiles; whole tiles and splits.
  symmetric<float>("float",
                   {6, 1156, Data::kNormal, false, false, 0, 7, false, false, blocks_of(64, 128)});
  symmetric<float>("float",
                   {70, 530, Data::kNormal, false, false, 1, 2, false, false, blocks_of(64, 256)});
  symmetric<float>("float", {300, 129, Data::kNonNegative, true, true, 0, 3});
  symmetric<float>("float", {150, 67, Data::kDecades, true, false, 1});
  symmetric<float>("float", {150, 68, Data::kNormal, true});
  for (const bool transposed : {false, true}) {
    symmetric<float>("float", {150, 70, Data::kLate, true, transposed, 0, 2, true});
  }
  // Long sums of one sign.
  symmetric<float>("float", {6000, 4, Data::kNonNegative, false, false, 0, 1});
  symmetric<float>("float", {6000, 4, Data::kNonNegative, false, false, 0, 1, false, false,
                             blocks_of(8192, 256)});
  symmetric<BFloat16>("bfloat16", {6000, 8, Data::kNonNegative, false, false, 0, 1});
  symmetric<Float16>("float16", {6000, 8, Data::kNonNegative, false, false, 0, 1, false, false,
                                 blocks_of(8192, 256)});
  // As it lies in memory, and packed.
  symmetric<BFloat16>(
      "bfloat16", {270, 132, Data::kNormal, false, false, 0, 2, false, false, blocks_of(128, 256)});
  symmetric<BFloat16>(
      "bfloat16", {170, 132, Data::kNormal, false, false, 0, 2, false, true, blocks_of(1024, 128)});
  symmetric<Float16>("float16", {270, 72, Data::kNormal, false, false, 0, 2});
  symmetric<BFloat16>("bfloat16", {150, 70, Data::kNormal, false, true});
  symmetric<Float16>("float16",
                     {150, 71, Data::kNormal, true, false, 1, 2, false, false, blocks_of(64)});
  symmetric<Float16>("float16", {150, 64, Data::kNormal, true});
  // All bits of the fraction, as CUDA's NaN has them.
  for (const float bad : {float_of(0x7fffffffu), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    symmetric<float>("float", {70, 40}, bad);
    symmetric<float>("float", {70, 40, Data::kNormal, false, false, 0, 2, true}, bad);
    // Rounded, those bits would be no NaN.
    const float half_bad = std::isnan(bad) ? std::numeric_limits<float>::quiet_NaN() : bad;
    symmetric<BFloat16>("bfloat16", {70, 40}, half_bad);
  }
  chosen_by_size();
}

}  // namespace hesskern::cuda::check
