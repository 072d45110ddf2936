#include "microkernel.h"

#include <utility>

#include "cpu/vector.h"

namespace hesskern::cpu {

namespace {

enum class Order { rows, columns };

// Rows of A are addressed from a few base pointers, so that the row stride may
// be a run-time value without a register for each row.
template <typename T, class Isa, int kRows, int kVectors, Order kOrder>
HESSKERN_FORCE_INLINE void multiply(const BlockProduct<T>& p) {
  constexpr int kWidth = kLanes<T, Isa>;
  Vector<T, Isa> sum[kRows][kVectors];
  HESSKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HESSKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = Vector<T, Isa>{};
      HESSKERN_PREFETCH(p.c + i * p.c_stride + v * kWidth);
    }
  }
  const T* b = p.b;
  const char* ahead = p.ahead;
  const int64_t stride = p.a_stride, ahead_step = p.ahead_step;
  const T* segment = p.a;
  for (int64_t left = p.inner; left > 0; left -= p.segment, segment += p.a_jump) {
    const T* a = segment;
    const int64_t count = left < p.segment ? left : p.segment;
    for (int64_t k = 0; k < count; ++k) {
      HESSKERN_PREFETCH_FAR(ahead);
      ahead += ahead_step;
      Vector<T, Isa> row[kVectors];
      HESSKERN_UNROLL
      for (int v = 0; v < kVectors; ++v) load<T, Isa>(row[v], b + v * kWidth);
      HESSKERN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const T scale = kOrder == Order::columns ? a[i] : a[i * stride];
        HESSKERN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] += scale * row[v];
      }
      b += 2 * kWidth;
      a += kOrder == Order::columns ? stride : 1;
    }
  }
  HESSKERN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HESSKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* c = p.c + i * p.c_stride + v * kWidth;
      if (p.square) sum[i][v] *= sum[i][v];
      if (p.accumulate) {
        Vector<T, Isa> old;
        load<T, Isa>(old, c);
        sum[i][v] += old;
      }
      store<T, Isa>(c, sum[i][v]);
    }
  }
}

template <typename T, class Isa, int kRows, int kVectors>
HESSKERN_FORCE_INLINE void gather(const GatherProduct<T>& p) {
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

// One function per instruction set; a block's rows are chosen for its number of
// registers: sums, the row of B and a broadcast element of A.
struct OnBaseline : Baseline {
  static constexpr int kBlockRows = 6;
  template <typename T, int kR, int kV, Order kOrder>
  static void run(const BlockProduct<T>& p) {
    multiply<T, Baseline, kR, kV, kOrder>(p);
  }
  template <typename T, int kR, int kV>
  static void run_gathered(const GatherProduct<T>& p) {
    gather<T, Baseline, kR, kV>(p);
  }
};

#if HESSKERN_X86
struct OnAvx2 : Avx2 {
  static constexpr int kBlockRows = 6;
  template <typename T, int kR, int kV, Order kOrder>
  HESSKERN_TARGET_AVX2 static void run(const BlockProduct<T>& p) {
    multiply<T, Avx2, kR, kV, kOrder>(p);
  }
  template <typename T, int kR, int kV>
  HESSKERN_TARGET_AVX2 static void run_gathered(const GatherProduct<T>& p) {
    gather<T, Avx2, kR, kV>(p);
  }
};

struct OnAvx512 : Avx512 {
  static constexpr int kBlockRows = 14;
  template <typename T, int kR, int kV, Order kOrder>
  HESSKERN_TARGET_AVX512 static void run(const BlockProduct<T>& p) {
    multiply<T, Avx512, kR, kV, kOrder>(p);
  }
  template <typename T, int kR, int kV>
  HESSKERN_TARGET_AVX512 static void run_gathered(const GatherProduct<T>& p) {
    gather<T, Avx512, kR, kV>(p);
  }
};
#endif

template <typename T, class Isa, int... kR>
Microkernels<T> make_table(std::integer_sequence<int, kR...>) {
  Microkernels<T> table{};
  table.lanes = kLanes<T, Isa>;
  table.rows = Isa::kBlockRows;
  table.width = 2 * table.lanes;
  ((table.by_rows[kR + 1][1] = &Isa::template run<T, kR + 1, 1, Order::rows>), ...);
  ((table.by_rows[kR + 1][2] = &Isa::template run<T, kR + 1, 2, Order::rows>), ...);
  ((table.by_columns[kR + 1][1] = &Isa::template run<T, kR + 1, 1, Order::columns>), ...);
  ((table.by_columns[kR + 1][2] = &Isa::template run<T, kR + 1, 2, Order::columns>), ...);
  ((table.gathered[kR + 1][1] = &Isa::template run_gathered<T, kR + 1, 1>), ...);
  ((table.gathered[kR + 1][2] = &Isa::template run_gathered<T, kR + 1, 2>), ...);
  return table;
}

template <typename T, class Isa>
Microkernels<T> table_for() {
  static_assert(Isa::kBlockRows <= Microkernels<T>::kMaxRows);
  return make_table<T, Isa>(std::make_integer_sequence<int, Isa::kBlockRows>{});
}

}  // namespace

template <typename T>
const Microkernels<T>& microkernels() {
  static const Microkernels<T> table = [] {
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
  return table;
}

template const Microkernels<float>& microkernels<float>();
template const Microkernels<double>& microkernels<double>();

}  // namespace hesskern::cpu
