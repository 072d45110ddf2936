#include "amx.h"

#include "cpu/simd.h"

#if HESSKERN_X86 && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HESSKERN_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "cpu/transpose.h"
#include "cpu/vector.h"
#else
#define HESSKERN_AMX 0
#endif

namespace hesskern::cpu::amx {

#if HESSKERN_AMX

// GCC warns of vectors in registers that only functions inlined into others take.
#pragma GCC diagnostic ignored "-Wpsabi"

#define HESSKERN_TARGET_AMX HESSKERN_WIDE_TARGET(HESSKERN_AVX512 ",amx-tile,amx-bf16")

namespace {

// One part of a panel's step: two tiles of 16 rows of 64 bytes.
constexpr int64_t kTile = 512, kPart = 2 * kTile;

bool has_unit() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned int kBfloat16 = 1u << 22, kTiles = 1u << 24;
  return (edx & kBfloat16) != 0 && (edx & kTiles) != 0;
}

// Linux lends the registers to processes that ask, and grants it to all threads.
bool is_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Palette 1 with eight tiles of 16 rows of 64 bytes.
struct Configuration {
  alignas(64) unsigned char bytes[64] = {};
  Configuration() {
    bytes[0] = 1;
    for (int tile = 0; tile < 8; ++tile) {
      bytes[16 + 2 * tile] = 64;
      bytes[48 + tile] = 16;
    }
  }
};
const Configuration kConfiguration;

// The compilers' own intrinsics do not all say which memory they read and write.
HESSKERN_TARGET_AMX inline void configure(const unsigned char* bytes) {
  asm volatile("ldtilecfg (%0)" ::"r"(bytes) : "memory");
}
HESSKERN_TARGET_AMX inline void read_configuration(unsigned char* bytes) {
  asm volatile("sttilecfg (%0)" ::"r"(bytes) : "memory");
}

#define HESSKERN_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"((int64_t)(stride)) : "memory")
#define HESSKERN_TILE_STORE(to, stride, tile)                                           \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) \
               : "memor"                                                                \
                 "y")
#define HESSKERN_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
#define HESSKERN_TILE_ADD(sum, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

typedef int32_t Bits __attribute__((vector_size(64)));
using Floats = Vector<float, Avx512>;

// Rounded to bfloat16, ties away from zero, in the upper half of each number.
HESSKERN_FORCE_INLINE Bits rounded(Bits x) {
  return (x + 0x8000) & static_cast<int32_t>(0xffff0000);
}

HESSKERN_FORCE_INLINE Floats rest(Floats x, Bits part) {
  return x - reinterpret_cast<Floats>(part);
}

// Upper halves of numbers, one of each side by side.
HESSKERN_FORCE_INLINE Bits pair(Bits a, Bits b) {
  return ((a >> 16) & 0xffff) | (b & static_cast<int32_t>(0xffff0000));
}

HESSKERN_FORCE_INLINE Bits larger(Bits a, Bits b) {
  return a > b ? a : b;
}

// Whether all magnitudes are zero, or their largest is between these.
HESSKERN_FORCE_INLINE bool in_range(const Bits& magnitudes) {
  constexpr int32_t kSmallest = (127 - 40) << 23, kLargest = (127 + 63) << 23;
  int32_t largest = 0;
  for (int lane = 0; lane < 16; ++lane) largest = std::max<int32_t>(largest, magnitudes[lane]);
  return largest == 0 || (largest >= kSmallest && largest < kLargest);
}

// The parts of a tile, whose row r has the numbers of x + r ld and of x + r ld + beside in pairs.
// Number k of a step is paired with k + 16: either 16 rows further or 16 columns.
HESSKERN_FORCE_INLINE void split_tile(uint16_t* to, const float* x, int64_t ld, int64_t beside,
                                      Bits& largest, Bits& more) {
  for (int64_t r = 0; r < kStep / 2; ++r, x += ld, to += kStep) {
    Floats a, b;
    load<float, Avx512>(a, x);
    load<float, Avx512>(b, x + beside);
    const Bits a_bits = reinterpret_cast<Bits>(a), b_bits = reinterpret_cast<Bits>(b);
    largest = larger(largest, larger(a_bits & 0x7fffffff, b_bits & 0x7fffffff));
    const Bits a1 = rounded(a_bits), b1 = rounded(b_bits);
    const Floats a_rest = rest(a, a1), b_rest = rest(b, b1);
    more |= reinterpret_cast<Bits>(a_rest) | reinterpret_cast<Bits>(b_rest);
    const Bits a2 = rounded(reinterpret_cast<Bits>(a_rest));
    const Bits b2 = rounded(reinterpret_cast<Bits>(b_rest));
    const Bits a3 = reinterpret_cast<Bits>(rest(a_rest, a2));
    const Bits b3 = reinterpret_cast<Bits>(rest(b_rest, b2));
    const Bits parts[3] = {pair(a1, b1), pair(a2, b2), pair(a3, b3)};
    HESSKERN_UNROLL
    for (int part = 0; part < 3; ++part) {
      std::memcpy(to + part * kPart, &parts[part], sizeof(Bits));
    }
  }
}

// A tile of one operand is that of the other with pairs of numbers transposed.
HESSKERN_FORCE_INLINE void turn_tile(uint16_t* to, const uint16_t* from) {
  transpose_block<float, Avx512>(reinterpret_cast<float*>(to), kStep / 2,
                                 reinterpret_cast<const float*>(from), kStep / 2);
}

// x [kStep, kPanel] or transposed: the operand that lies as x does, and the other.
HESSKERN_TARGET_AVX512 Split split_full(uint16_t* alike, uint16_t* turned, const float* x,
                                        int64_t ld, int64_t beside, int64_t tile) {
  alignas(64) uint16_t unused[kStepSize];
  uint16_t* to = alike == nullptr ? unused : alike;
  Bits largest = {}, more = {};
  split_tile(to, x, ld, beside, largest, more);
  split_tile(to + kTile, x + tile, ld, beside, largest, more);
  if (turned != nullptr) {
    for (int64_t at = 0; at < kStepSize; at += kTile) turn_tile(turned + at, to + at);
  }
  if (!in_range(largest)) return Split::refused;
  int32_t any = 0;
  for (int lane = 0; lane < 16; ++lane) any |= more[lane];
  return any == 0 ? Split::first : Split::all;
}

Split split(uint16_t* alike, uint16_t* turned, const float* x, int64_t ld, int64_t rows,
            int64_t columns, bool along_rows) {
  static_assert(kStep == 32 && kPanel == 32);
  alignas(64) float padded[kStep * kPanel];
  if (rows < kStep || columns < kPanel) {
    for (int64_t i = 0; i < kStep; ++i) {
      const int64_t count = i < rows ? columns : 0;
      std::copy_n(x + i * (count > 0 ? ld : 0), count, padded + i * kPanel);
      std::fill_n(padded + i * kPanel + count, kPanel - count, 0.0f);
    }
    x = padded;
    ld = kPanel;
  }
  const int64_t half_rows = kStep / 2 * ld, half_columns = kPanel / 2;
  return along_rows ? split_full(alike, turned, x, ld, half_rows, half_columns)
                    : split_full(alike, turned, x, ld, half_columns, half_rows);
}

// Tiles 0 to 3 are the sums, 4 and 5 the left operand's, 6 and 7 the right one's.
#define HESSKERN_LEFT(part)                                  \
  HESSKERN_TILE_LOAD(4, left + (part) * kPart, kTileStride); \
  HESSKERN_TILE_LOAD(5, left + (part) * kPart + kTile, kTileStride)
#define HESSKERN_RIGHT(part)                                  \
  HESSKERN_TILE_LOAD(6, right + (part) * kPart, kTileStride); \
  HESSKERN_TILE_LOAD(7, right + (part) * kPart + kTile, kTileStride)
#define HESSKERN_PRODUCTS()   \
  HESSKERN_TILE_ADD(0, 4, 6); \
  HESSKERN_TILE_ADD(1, 4, 7); \
  HESSKERN_TILE_ADD(2, 5, 6); \
  HESSKERN_TILE_ADD(3, 5, 7)

// product [kPanel, kPanel] := left^T right
HESSKERN_TARGET_AMX inline void multiply(float* product, const uint16_t* left,
                                         const uint16_t* right, int64_t steps, Split split) {
  constexpr int64_t kTileStride = 64, kStride = kPanel * sizeof(float);
  HESSKERN_TILE_ZERO(0);
  HESSKERN_TILE_ZERO(1);
  HESSKERN_TILE_ZERO(2);
  HESSKERN_TILE_ZERO(3);
  const uint16_t *const first_left = left, *const first_right = right;
  const int64_t small = split == Split::first ? 0 : steps;
  for (int64_t step = 0; step < small; ++step, left += kStepSize, right += kStepSize) {
    HESSKERN_LEFT(0);
    HESSKERN_RIGHT(2);
    HESSKERN_PRODUCTS();
    HESSKERN_RIGHT(1);
    HESSKERN_PRODUCTS();
    HESSKERN_LEFT(1);
    HESSKERN_PRODUCTS();
    HESSKERN_RIGHT(0);
    HESSKERN_PRODUCTS();
    HESSKERN_LEFT(2);
    HESSKERN_PRODUCTS();
  }
  left = first_left;
  right = first_right;
  for (int64_t step = 0; step < steps; ++step, left += kStepSize, right += kStepSize) {
    HESSKERN_LEFT(0);
    HESSKERN_RIGHT(0);
    HESSKERN_PRODUCTS();
  }
  HESSKERN_TILE_STORE(product, kStride, 0);
  HESSKERN_TILE_STORE(product + kPanel / 2, kStride, 1);
  HESSKERN_TILE_STORE(product + kPanel / 2 * kPanel, kStride, 2);
  HESSKERN_TILE_STORE(product + kPanel / 2 * kPanel + kPanel / 2, kStride, 3);
}

#undef HESSKERN_LEFT
#undef HESSKERN_RIGHT
#undef HESSKERN_PRODUCTS

template <bool kSquare>
HESSKERN_TARGET_AMX void add(float* sum, const uint16_t* left, const uint16_t* right, int64_t steps,
                             Split split) {
  alignas(64) float product[kPanel * kPanel];
  multiply(product, left, right, steps, split);
  for (int64_t i = 0; i < kPanel * kPanel; i += kLanes<float, Avx512>) {
    Floats old, more;
    load<float, Avx512>(old, sum + i);
    load<float, Avx512>(more, product + i);
    store<float, Avx512>(sum + i, old + (kSquare ? more * more : more));
  }
}

}  // namespace

bool available() {
  static const bool granted = [] {
    const char* variable = std::getenv("HESSKERN_SIMD");
    const std::string_view limit = variable == nullptr ? "" : variable;
    return simd_level() == Simd::avx512 && limit != "avx512" && has_unit() && is_granted();
  }();
  return granted;
}

Session::Session() {
  read_configuration(before_);
  configure(kConfiguration.bytes);
}

Session::~Session() {
  configure(before_);
}

Split split_columns(uint16_t* left, uint16_t* right, const float* x, int64_t ld, int64_t rows,
                    int64_t columns) {
  return split(right, left, x, ld, rows, columns, true);
}

Split split_rows(uint16_t* left, uint16_t* right, const float* x, int64_t ld, int64_t rows,
                 int64_t columns) {
  return split(left, right, x, ld, rows, columns, false);
}

void add_product(float* sum, const uint16_t* left, const uint16_t* right, int64_t steps,
                 Split split) {
  add<false>(sum, left, right, steps, split);
}

void add_squares(float* sum, const uint16_t* left, const uint16_t* right, int64_t steps,
                 Split split) {
  add<true>(sum, left, right, steps, split);
}

#else

bool available() {
  return false;
}
Session::Session() = default;
Session::~Session() = default;
Split split_columns(uint16_t*, uint16_t*, const float*, int64_t, int64_t, int64_t) {
  return Split::refused;
}
Split split_rows(uint16_t*, uint16_t*, const float*, int64_t, int64_t, int64_t) {
  return Split::refused;
}
void add_product(float*, const uint16_t*, const uint16_t*, int64_t, Split) {}
void add_squares(float*, const uint16_t*, const uint16_t*, int64_t, Split) {}

#endif

}  // namespace hesskern::cpu::amx
