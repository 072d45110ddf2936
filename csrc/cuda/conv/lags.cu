// Input covariance of a convolution with stride 1 and several channels, by lags.
//
// conv_plan.h writes the covariance in products of signals with themselves, shifted: whole images,
// border rows, border columns, corner pixels. Samples are packed with channels last and zeros
// between lines, so that a shift of two axes is one of a flat array [K, C], and neighbouring shifts
// are columns beside each other: a product is [C, K] by [K, shifts C], whose rows overlap in
// memory. Where the device can and there are channels enough, signals are packed as 16-bit parts,
// and core/parts_product.h multiplies all of them in one launch: borders fill what whole images
// leave of the device. Else they are multiplied in float32 by core/products.h.
// The sums go to their blocks in the end.
// ((2 k - 1)^2 + 1) / 2 blocks [C, C] of 2 N H W operations each where unfolding takes
// k^2 (k^2 + 1) / 2 (3 x 3: 13 instead of 45), three times on tensor cores with float32; two reads
// and one write of the images to pack them; a read and a write of the sum's triangle.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/core/launch.h"
#include "cuda/core/parts_product.h"
#include "cuda/core/products.h"
#include "cuda/core/splits.h"
#include "cuda/core/triangle.h"
#include "lags.h"
#include "lags_pack.h"
#include "lags_plan.h"

namespace hesskern::cuda {

namespace {

// Table entries in one launch.
constexpr size_t kEntriesPerLaunch = 4096;
// Elements of images that are packed at a time: 256 MB.
constexpr int64_t kPacked = 1 << 26;
constexpr int64_t kMostSplits = 32;
// How much longer the same operations take where images are unfolded on the way.
constexpr double kUnfolding = 2.5;

// Numbers that travel as a parameter, so that a captured graph keeps them.
struct Numbers {
  int count;
  int32_t values[kEntriesPerLaunch];
};

__global__ void __launch_bounds__(kThreads)
    store_kernel(const __grid_constant__ Numbers numbers, int32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < numbers.count; i += kThreads) {
    out[i] = numbers.values[i];
  }
}

// sums [splits, rows, columns]: those of the first row of splits become the sums over all, in
// order, in their first count columns.
__global__ void __launch_bounds__(kThreads)
    add_up_kernel(float* sums, int64_t splits, int64_t rows, int64_t columns, int64_t count) {
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       index < rows * count; index += static_cast<int64_t>(gridDim.x) * kThreads) {
    float* own = sums + index / count * columns + index % count;
    float total = *own;
    for (int64_t split = 1; split < splits; ++split) total += own[split * rows * columns];
    *own = total;
  }
}

int64_t padded(int64_t elements, int64_t to = 4) {
  return ceil_div(elements, to) * to;
}

// How the sum is assembled: a block takes 8 by 32 channels, an entry of the kernel on the left and
// some on the right.
struct AssemblyCut {
  static constexpr int kRows = 8, kColumns = 32;
  static_assert(kRows * kColumns == kThreads);

  int taps, share, pieces;

  explicit AssemblyCut(int64_t taps_)
      : taps(static_cast<int>(taps_)),
        share(static_cast<int>(ceil_div(taps_, ceil_div(taps_, kMost)))),
        pieces(taps * static_cast<int>(ceil_div(taps_, share))) {}

  // A block's values of a row of channels, and of one of its channels. Odd, and four more: of 8
  // rows and 4 neighbouring columns, and of 32 columns of a row, all are in different banks.
  __host__ __device__ static int step(int count) { return count | 1; }
  __host__ __device__ int pitch() const { return kColumns * step(share) + 4; }
  size_t bytes() const { return sizeof(float) * kRows * static_cast<size_t>(pitch()); }
  // What the entries on the right of a piece are: from first on, so many.
  __host__ __device__ int first(int piece) const { return piece % (pieces / taps) * share; }
  __host__ __device__ int count(int piece) const {
    return taps - first(piece) < share ? taps - first(piece) : share;
  }
  int64_t blocks(int64_t groups, int64_t channels) const {
    return groups * ceil_div(channels, kRows) * ceil_div(channels, kColumns) * pieces;
  }

 private:
  // Entries on the right of a block.
  static constexpr int64_t kMost = 32;
};

// sum += alpha times the blocks' sums, sums [groups, group_size] in rows of row_step. Of a piece p
// of the cut these are the terms starts[2 p], ..., starts[2 p + 1] - 1 as they lie and from there
// to starts[2 (p + 1)] - 1 transposed: where the block begins, then twice the entry on the right,
// counted from the piece's first, plus one where the block is subtracted.
// Blocks are read along their rows, 128 or, transposed, 32 bytes at a time, and the sum's rows too:
// the values change places in shared memory.
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(SymmetricSum<float> sum, AssemblyCut cut, int64_t group_size, int64_t row_step,
                    const float* sums, const int32_t* starts, const int32_t* terms) {
  constexpr int kRows = AssemblyCut::kRows, kColumns = AssemblyCut::kColumns;
  float* const values = reinterpret_cast<float*>(dynamic_shared());
  const int64_t channels = sum.order / cut.taps;
  const int64_t across = ceil_div(channels, kColumns), down = ceil_div(channels, kRows);
  const int piece = static_cast<int>(blockIdx.x % cut.pieces);
  const int64_t tile = blockIdx.x / cut.pieces, group = tile / across / down;
  const int64_t row0 = tile / across % down * kRows, column0 = tile % across * kColumns;
  // Below the diagonal.
  if (row0 >= column0 + kColumns) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int count = cut.count(piece), step = AssemblyCut::step(count), pitch = cut.pitch();
  const float* const own = sums + group * group_size;
  const auto add = [&](int row, int column, int begin, int end, int64_t row_by, int64_t column_by) {
    if (row0 + row >= channels || column0 + column >= channels) return;
    const float* const from = own + (row0 + row) * row_by + (column0 + column) * column_by;
    float* const to = values + row * pitch + column * step;
    // Several are on their way at once, the last ones too.
    constexpr int kBatch = 4;
    for (int first = begin; first < end; first += kBatch) {
      float value[kBatch];
      int what[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int32_t* const term = terms + 2 * (first + i < end ? first + i : first);
        value[i] = read_only(from + read_only(term));
        what[i] = read_only(term + 1);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < end) to[what[i] / 2] += what[i] % 2 != 0 ? -value[i] : value[i];
      }
    }
  };
  const int begin = read_only(starts + 2 * piece), middle = read_only(starts + 2 * piece + 1);
  const int end = read_only(starts + 2 * piece + 2);
  const int row = thread / kColumns, column = thread % kColumns;
  for (int i = 0; i < count; ++i) values[row * pitch + column * step + i] = 0.0f;
  add(row, column, begin, middle, row_step, 1);
  __syncthreads();
  add(thread % kRows, thread / kRows, middle, end, 1, row_step);
  __syncthreads();

  if (row0 + row >= channels) return;
  const int64_t left = (row0 + row) * cut.taps + piece / (cut.pieces / cut.taps);
  float* const to = sum.acc + group * sum.group_stride + left * sum.row_stride;
  // What is added to is read before anything is written, several times at once.
  constexpr int kBatch = 5;
  for (int first = column; first < kColumns * count; first += kBatch * kColumns) {
    float old[kBatch], value[kBatch];
    int64_t place[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kColumns, channel = index / count, entry = index % count;
      const int64_t right = (column0 + channel) * cut.taps + cut.first(piece) + entry;
      const bool wanted = channel < kColumns && column0 + channel < channels && right >= left;
      place[i] = wanted ? right * sum.column_stride : -1;
      old[i] = wanted ? to[place[i]] : 0.0f;
      value[i] = wanted ? values[row * pitch + channel * step + entry] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (place[i] >= 0) to[place[i]] = old[i] + sum.alpha * value[i];
    }
  }
}

// Whether signals are multiplied in parts: all groups' products fit into a launch or two then, and
// tiles of 128 channels are not mostly empty.
template <typename In>
bool multiplies_parts(const ConvLags<In>& lags, const LagPlan& plan, int64_t samples) {
  constexpr int64_t kFewestChannels = 32, kMostGroups = 4;
  const ConvInputCovariance<In, float>& call = lags.call;
  return call.group_channels >= kFewestChannels && call.sum.groups <= kMostGroups &&
         plan.families[0].inner(samples) >= lags.fewest_part_rows && parts_products_available();
}

// Products in parts, one run of shifts: A is the signal at `stack` neighbouring shifts beside each
// other, so that tiles of 128 rows are full, B every stack'th shift.
struct PartsRun {
  LagRun run;
  int64_t stack, shifts;
  // Where its sums [stack C, shifts C] begin in the rows of a group's.
  int64_t column;
};

// Those of one launch, from that row of the signals on.
struct PartsLaunch {
  struct Product {
    size_t run;
    int64_t group, rows;
  };
  int64_t first;
  std::vector<Product> products;
  GroupedPartsProduct all;
};

// Where everything lies in the workspace, and how the products are cut, for so many samples.
template <typename In>
struct Layout {
  static constexpr PartsType kType = parts_type_of<In>();
  static constexpr int kParts = sizeof(In) == 4 ? 2 : 1;

  std::shared_ptr<const LagPlan> geometry;
  bool in_parts;
  int64_t samples, groups, channels, packed_channels, splits;
  std::vector<PartsRun> parts;
  std::vector<PartsLaunch> launches;
  // Shifts of the longest of them.
  int64_t repeats = 0;
  AssemblyCut assembly;
  // Of a group's sums, and where every block begins among them.
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> places;
  // What the assembly is told: its starts, then its terms.
  std::vector<int32_t> numbers;
  int64_t packed[4], group_size = 0, sums, table, largest, exponents, scratch, size = 0;

  Layout(const ConvLags<In>& lags, std::shared_ptr<const LagPlan> plan, int64_t samples_)
      : geometry(std::move(plan)),
        in_parts(multiplies_parts(lags, *geometry, samples_)),
        samples(samples_),
        groups(lags.call.sum.groups),
        channels(lags.call.group_channels),
        packed_channels(padded(channels, in_parts ? 8 : 4)),
        splits(in_parts ? 1 : splits_of_whole_images()),
        assembly(geometry->h.taps * geometry->w.taps) {
    int64_t most_scratch = 0;
    if (in_parts) {
      most_scratch = plan_parts(lags.most_part_rows);
    } else {
      rows = channels;
      columns = geometry->blocks * packed_channels;
      for (int64_t block = 0; block < geometry->blocks; ++block) {
        places.push_back(block * packed_channels);
      }
    }
    group_size = rows * columns;
    for (int f = 0; f < 4; ++f) {
      const LagFamily& family = geometry->families[f];
      const int64_t elements = groups * family.signals * family.rows(samples) * packed_channels;
      packed[f] = take(in_parts ? elements * kParts / 2 : elements);
    }
    sums = take(splits * groups * group_size);
    tell_assembly();
    table = take(static_cast<int64_t>(numbers.size()));
    const bool scaled = in_parts && sizeof(In) == 4;
    largest = take(scaled ? LargestCut::kMostParts * groups * channels : 0);
    exponents = take(scaled ? groups * repeats * packed_channels : 0);
    scratch = take(most_scratch);
  }

  int64_t whole_rows() const { return geometry->families[0].inner(samples); }

  // Sums of signals from their parts.
  cudaError_t multiply_parts(float* workspace, cudaStream_t stream) const {
    for (const PartsLaunch& one : launches) {
      std::vector<GroupedPart> list;
      for (const PartsLaunch::Product& product : one.products) {
        list.push_back(part_of(product, one.first, workspace));
      }
      const cudaError_t error = one.all.run(list, workspace + scratch, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // Products of float32 signals.
  std::vector<Product<float>> products(float* workspace) const {
    std::vector<Product<float>> list;
    for (const LagRun& run : geometry->runs) {
      const LagFamily& family = geometry->families[run.family];
      const int64_t rows = family.rows(samples), inner = family.inner(samples);
      const int64_t share = run.family == 0 ? ceil_div(inner, splits) : inner;
      for (int64_t group = 0; group < groups; ++group) {
        const float* signals =
            workspace + packed[run.family] + group * family.signals * rows * packed_channels;
        Product<float> product{};
        product.a = signals + (run.a * rows + family.margin) * packed_channels;
        product.b = signals + (run.b * rows + family.margin + run.shift) * packed_channels;
        product.a_k = product.b_k = {packed_channels};
        product.a_row = product.b_column = {1};
        product.m = channels;
        product.n = run.count * packed_channels;
        product.c_row = {columns};
        product.c_column = {1};
        for (int64_t begin = 0, split = 0; begin < inner; begin += share, ++split) {
          product.k_begin = begin;
          product.k_end = std::min(begin + share, inner);
          product.c = workspace + sums + (split * groups + group) * group_size +
                      places[static_cast<size_t>(run.first)];
          list.push_back(product);
        }
      }
    }
    return list;
  }

  // Splits that rows are left for.
  int64_t used_splits() const {
    const int64_t inner = whole_rows();
    return ceil_div(inner, ceil_div(inner, splits));
  }

 private:
  int64_t take(int64_t elements) {
    const int64_t begin = size;
    size += padded(elements);
    return begin;
  }

  // The products in parts and where their sums are; elements of float that they need besides.
  int64_t plan_parts(int64_t most_rows) {
    // Boxes of 64 columns each lie within one shift then.
    const bool pairs = packed_channels == 64;
    rows = channels;
    places.resize(static_cast<size_t>(geometry->blocks));
    int64_t longest = 0;
    for (const LagRun& run : geometry->runs) {
      const int64_t stack = pairs && run.count > 1 ? 2 : 1, shifts = ceil_div(run.count, stack);
      parts.push_back({run, stack, shifts, columns});
      rows = std::max(rows, rows_of(parts.back()));
      repeats = std::max({repeats, shifts, stack});
      longest = std::max(longest, geometry->families[run.family].inner(samples));
      columns += shifts * packed_channels;
    }
    for (const PartsRun& one : parts) {
      for (int64_t i = 0; i < one.run.count; ++i) {
        // Of A's shift stack - 1 - i % stack and B's i / stack.
        places[static_cast<size_t>(one.run.first + i)] =
            (one.stack - 1 - i % one.stack) * packed_channels * columns + one.column +
            i / one.stack * packed_channels;
      }
    }
    int64_t most = 0;
    for (int64_t first = 0; first < longest; first += most_rows) {
      std::vector<PartsLaunch::Product> products;
      std::vector<PartsSize> sizes;
      const auto close = [&] {
        if (products.empty()) return;
        launches.push_back({first, std::move(products), GroupedPartsProduct(kType, false, sizes)});
        most = std::max(most, launches.back().all.workspace());
        products.clear();
        sizes.clear();
      };
      for (int64_t group = 0; group < groups; ++group) {
        for (size_t i = 0; i < parts.size(); ++i) {
          const PartsRun& one = parts[i];
          const int64_t left = geometry->families[one.run.family].inner(samples) - first;
          if (left <= 0) continue;
          if (products.size() == static_cast<size_t>(kMostProducts)) close();
          products.push_back({i, group, std::min(left, most_rows)});
          sizes.push_back({rows_of(one), one.shifts * packed_channels, products.back().rows});
        }
      }
      close();
    }
    return most;
  }

  int64_t rows_of(const PartsRun& one) const {
    return one.stack == 1 ? channels : one.stack * packed_channels;
  }

  GroupedPart part_of(const PartsLaunch::Product& product, int64_t first, float* workspace) const {
    const PartsRun& one = parts[product.run];
    const LagRun& run = one.run;
    const LagFamily& family = geometry->families[run.family];
    const int64_t signal = family.rows(samples) * packed_channels;
    const int64_t part_step = groups * family.signals * signal;
    // Pairs of shifts begin a row before, which is zero, and leave out the last one, which is zero
    // too where there are shifts.
    const auto* const begin = reinterpret_cast<const uint16_t*>(workspace + packed[run.family]) +
                              product.group * family.signals * signal +
                              (family.margin - (one.stack - 1) + first) * packed_channels;
    const int* const scale = sizeof(In) == 4 ? reinterpret_cast<const int*>(workspace + exponents) +
                                                   product.group * repeats * packed_channels
                                             : nullptr;
    // A's shift i and B's shift j are that far apart: stack - 1 - i + stack j.
    const int64_t shift = run.shift + one.stack - 1, gap = (one.stack - 1) * packed_channels;
    const PartsMatrix a{begin + run.a * signal, product.rows, rows_of(one),
                        packed_channels,        part_step,    scale};
    const PartsMatrix b{begin + run.b * signal + shift * packed_channels,
                        product.rows,
                        one.shifts * packed_channels,
                        packed_channels,
                        part_step,
                        scale,
                        gap == 0 ? 0 : packed_channels,
                        gap};
    float* const c = workspace + sums + product.group * group_size + one.column;
    return {a, b, {c, columns, 1, 1.0f, first > 0}, {}};
  }

  // Every piece's terms: those that are read as they lie, then those that are transposed.
  void tell_assembly() {
    const std::vector<int32_t>&starts = geometry->starts, &entries = geometry->entries;
    std::vector<int32_t> terms;
    for (int piece = 0; piece < assembly.pieces; ++piece) {
      const int pair = piece / (assembly.pieces / assembly.taps) * assembly.taps;
      for (const bool transposed : {false, true}) {
        numbers.push_back(static_cast<int32_t>(terms.size() / 2));
        for (int i = 0; i < assembly.count(piece); ++i) {
          const auto at = static_cast<size_t>(pair + assembly.first(piece) + i);
          for (int32_t e = starts[at]; e < starts[at + 1]; ++e) {
            const int32_t entry = entries[static_cast<size_t>(e)];
            if (((entry & 2) != 0) != transposed) continue;
            terms.push_back(static_cast<int32_t>(places[static_cast<size_t>(entry / 4)]));
            terms.push_back(2 * i + (entry & 1));
          }
        }
      }
    }
    numbers.push_back(static_cast<int32_t>(terms.size() / 2));
    numbers.insert(numbers.end(), terms.begin(), terms.end());
  }

  int64_t splits_of_whole_images() const {
    int64_t tiles = 0;
    for (const LagRun& run : geometry->runs) {
      if (run.family == 0) {
        tiles += groups * ceil_div(channels, 64) * ceil_div(run.count * packed_channels, 64);
      }
    }
    // In rows.
    constexpr int64_t kWrite = 128, kFewest = 512;
    return plan_splits(tiles, whole_rows(), 2 * current_device().processors, kWrite, 1,
                       std::min(whole_rows() / kFewest, kMostSplits))
        .count;
  }
};

template <typename In>
int64_t chunk_samples(const ConvInputCovariance<In, float>& call, const LagPlan& plan) {
  const int64_t sample = plan.families[0].inner(1) * padded(call.group_channels) * call.sum.groups;
  return std::clamp<int64_t>(kPacked / std::max<int64_t>(sample, 1), 1, call.samples);
}

// Exponents of the channels for their parts.
template <typename In>
cudaError_t find_exponents(const ConvInputCovariance<float, float>& call, const Layout<In>& layout,
                           float* workspace, cudaStream_t stream) {
  auto* const largest = reinterpret_cast<uint32_t*>(workspace + layout.largest);
  const LargestCut cut(call);
  const cudaError_t error =
      launch(largest_of_channels_kernel,
             dim3(static_cast<unsigned>(cut.blocks(call)), static_cast<unsigned>(cut.parts)),
             dim3(kThreads), 0, stream, call, cut, largest);
  if (error != cudaSuccess) return error;
  const int64_t count = layout.groups * layout.packed_channels;
  return launch(channel_exponents_kernel,
                dim3(static_cast<unsigned>(ceil_div(count, kThreads / 32))), dim3(kThreads), 0,
                stream, static_cast<const uint32_t*>(largest), cut.parts, layout.channels,
                layout.groups, layout.packed_channels, layout.repeats,
                reinterpret_cast<int*>(workspace + layout.exponents));
}

template <typename In>
cudaError_t pack(const ConvInputCovariance<In, float>& call, const Layout<In>& layout,
                 float* workspace, cudaStream_t stream) {
  const ConvAxis &h = layout.geometry->h, &w = layout.geometry->w;
  LagBorders borders{};
  for (size_t i = 0; i < h.borders.size(); ++i) {
    borders.h[i] = static_cast<int32_t>(h.borders[i].position);
  }
  for (size_t i = 0; i < w.borders.size(); ++i) {
    borders.w[i] = static_cast<int32_t>(w.borders[i].position);
  }
  LagPackings<In> all{};
  int64_t blocks = 0;
  for (int f = 0; f < 4; ++f) {
    if (layout.geometry->families[f].signals == 0) continue;
    const LagPacking<In> packing(call, *layout.geometry, f, layout.packed_channels,
                                 layout.packed[f]);
    blocks += packing.blocks();
    all.families[all.count] = packing;
    all.ends[all.count++] = blocks;
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(kPackSide, kPackLines);
  if (!layout.in_parts) {
    return launch(pack_signals_kernel<In>, grid, block, 0, stream, all, borders, workspace);
  }
  if constexpr (sizeof(In) == 4) {
    const cudaError_t error = find_exponents(call, layout, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(pack_parts_kernel<In>, grid, block, 0, stream, all, borders,
                reinterpret_cast<const int*>(workspace + layout.exponents),
                layout.repeats * layout.packed_channels, reinterpret_cast<uint32_t*>(workspace));
}

cudaError_t store(const std::vector<int32_t>& values, int32_t* out, cudaStream_t stream) {
  for (size_t first = 0; first < values.size(); first += kEntriesPerLaunch) {
    Numbers numbers{};
    numbers.count = static_cast<int>(std::min<size_t>(kEntriesPerLaunch, values.size() - first));
    std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(first), numbers.count, numbers.values);
    const cudaError_t error =
        launch(store_kernel, dim3(1), dim3(kThreads), 0, stream, numbers, out + first);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The samples of one layout; workspace: what that asks for.
template <typename In>
cudaError_t run(const ConvInputCovariance<In, float>& call, const Layout<In>& layout,
                float* workspace, cudaStream_t stream) {
  const LagPlan& plan = *layout.geometry;
  cudaError_t error = pack(call, layout, workspace, stream);
  if (error != cudaSuccess) return error;
  // Numbers of 8 and 11 bits are tf32 numbers: one term is exact.
  error = layout.in_parts
              ? layout.multiply_parts(workspace, stream)
              : multiply_all(layout.products(workspace), call.tf32 || sizeof(In) == 2, stream);
  if (error != cudaSuccess) return error;
  float* sums = workspace + layout.sums;
  const int64_t splits = layout.used_splits();
  if (splits > 1) {
    const int64_t rows = layout.groups * layout.channels;
    const int64_t count = plan.whole_blocks * layout.packed_channels;
    error = launch(add_up_kernel, grid_for(rows * count), dim3(kThreads), 0, stream, sums, splits,
                   rows, layout.columns, count);
    if (error != cudaSuccess) return error;
  }
  const AssemblyCut& cut = layout.assembly;
  int32_t* starts = reinterpret_cast<int32_t*>(workspace + layout.table);
  error = store(layout.numbers, starts, stream);
  if (error != cudaSuccess) return error;
  return launch(
      assemble_kernel, dim3(static_cast<unsigned>(cut.blocks(layout.groups, layout.channels))),
      dim3(kThreads), cut.bytes(), stream, call.sum, cut, layout.group_size, layout.columns,
      static_cast<const float*>(sums), static_cast<const int32_t*>(starts),
      static_cast<const int32_t*>(starts + 2 * cut.pieces + 1));
}

}  // namespace

template <typename In>
bool ConvLags<In>::pays() const {
  constexpr int64_t kFewestChannels = 8;
  if (call.stride_h != 1 || call.stride_w != 1 || call.kernel_h * call.kernel_w == 1 ||
      call.group_channels < kFewestChannels) {
    return false;
  }
  const std::shared_ptr<const LagPlan> geometry = lag_plan(geometry_of(call));
  const LagPlan& plan = *geometry;
  if (!plan.fits) return false;
  // Multiplications of a sample, tiles that are not full included.
  const int64_t packed_channels = padded(call.group_channels);
  double lags = 0;
  for (const LagRun& run : plan.runs) {
    lags +=
        static_cast<double>(plan.families[run.family].inner(1) * ceil_div(call.group_channels, 64) *
                            ceil_div(run.count * packed_channels, 64) * (64 * 64));
  }
  const double tiles = static_cast<double>(triangle_size(ceil_div(call.sum.order, 64)) * (64 * 64));
  return lags < kUnfolding * tiles * static_cast<double>(call.out_h * call.out_w);
}

template <typename In>
Work<float> ConvLags<In>::plan() const {
  const std::shared_ptr<const LagPlan> geometry = lag_plan(geometry_of(call));
  const int64_t step = chunk_samples(call, *geometry), left = call.samples % step;
  const Layout<In> whole(*this, geometry, step);
  const Layout<In> last = left == 0 ? whole : Layout<In>(*this, geometry, left);
  return {std::max(whole.size, last.size),
          [whole, last, step, call = call](float* memory, cudaStream_t stream) {
            for (int64_t first = 0; first < call.samples; first += step) {
              ConvInputCovariance<In, float> some = call;
              some.samples = std::min(step, call.samples - first);
              some.x += first * call.sample_stride;
              const cudaError_t error =
                  run(some, some.samples == step ? whole : last, memory, stream);
              if (error != cudaSuccess) return error;
            }
            return cudaSuccess;
          }};
}

template struct ConvLags<float>;
template struct ConvLags<BFloat16>;
template struct ConvLags<Float16>;

}  // namespace hesskern::cuda
