#include "gather_kernel.h"

#include <utility>

#include "microkernel.h"
#include "vector.h"

namespace hesskern::cpu {

namespace {

template <typename T, class Isa, int kRows, int kVectors>
HESSKERN_FORCE_INLINE void multiply(const GatherProduct<T>& p) {
  constexpr int kLane = kLanes<T, Isa>;
  Vector<T, Isa> sum[kRows][kVectors];
  HESSKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HESSKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<T, Isa>{};
  }
  for (int64_t n = 0; n < p.terms; ++n) {
    const GatheredRows<T>& term = p.term[n];
    const T* values = term.values + p.first;
    const T* weight = term.weight;
    const int32_t* index = term.index;
    for (int64_t k = 0; k < term.count; ++k) {
      const T* from = weight + index[k];
      Vector<T, Isa> row[kVectors];
      HESSKERN_UNROLL
      for (int v = 0; v < kVectors; ++v) load<T, Isa>(row[v], from + v * kLane);
      HESSKERN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const T scale = values[i];
        HESSKERN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] += scale * row[v];
      }
      values += p.r;
    }
  }
  Vector<T, Isa> factor[kVectors];
  if (p.factor != nullptr) {
    HESSKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) load<T, Isa>(factor[v], p.factor + v * kLane);
  }
  HESSKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HESSKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (p.factor != nullptr) sum[i][v] = sum[i][v] * factor[v];
      store<T, Isa>(p.out + i * p.out_stride + v * kLane, sum[i][v]);
    }
  }
}

template <typename T>
struct Table {
  static constexpr int kMaxRows = Microkernels<T>::kMaxRows;
  int rows;
  GatherKernel<T> kernel[kMaxRows + 1][3];
};

struct OnBaseline {
  static constexpr int kBlockRows = 6;
  template <typename T, int kR, int kV>
  static void run(const GatherProduct<T>& p) {
    multiply<T, Baseline, kR, kV>(p);
  }
};

#if HESSKERN_X86
struct OnAvx2 {
  static constexpr int kBlockRows = 6;
  template <typename T, int kR, int kV>
  HESSKERN_TARGET_AVX2 static void run(const GatherProduct<T>& p) {
    multiply<T, Avx2, kR, kV>(p);
  }
};

struct OnAvx512 {
  static constexpr int kBlockRows = 14;
  template <typename T, int kR, int kV>
  HESSKERN_TARGET_AVX512 static void run(const GatherProduct<T>& p) {
    multiply<T, Avx512, kR, kV>(p);
  }
};
#endif

template <typename T, class On, int... kR>
Table<T> make_table(std::integer_sequence<int, kR...>) {
  static_assert(On::kBlockRows <= Table<T>::kMaxRows);
  Table<T> table{};
  table.rows = On::kBlockRows;
  ((table.kernel[kR + 1][1] = &On::template run<T, kR + 1, 1>), ...);
  ((table.kernel[kR + 1][2] = &On::template run<T, kR + 1, 2>), ...);
  return table;
}

template <typename T, class On>
Table<T> table_for() {
  return make_table<T, On>(std::make_integer_sequence<int, On::kBlockRows>{});
}

template <typename T>
const Table<T>& table() {
  static const Table<T> kernels = [] {
#if HESSKERN_X86
    switch (simd_level()) {
      case Simd::avx512:
        return table_for<T, OnAvx512>();
      case Simd::avx2:
        return table_for<T, OnAvx2>();
      default:
        break;
    }
#endif
    return table_for<T, OnBaseline>();
  }();
  return kernels;
}

}  // namespace

template <typename T>
int64_t gather_rows() {
  return table<T>().rows;
}

template <typename T>
GatherKernel<T> gather_kernel(int64_t rows, int64_t vectors) {
  return table<T>().kernel[rows][vectors];
}

template int64_t gather_rows<float>();
template int64_t gather_rows<double>();
template GatherKernel<float> gather_kernel<float>(int64_t, int64_t);
template GatherKernel<double> gather_kernel<double>(int64_t, int64_t);

}  // namespace hesskern::cpu
