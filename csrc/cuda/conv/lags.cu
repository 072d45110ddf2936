// Input covariance of a convolution with stride 1 and several channels, by lags.
//
// conv_plan.h writes the covariance in products of signals with themselves, shifted: whole images,
// border rows, border columns, corner pixels. Samples are packed with channels last and zeros
// between lines, so that a shift of two axes is one of a flat array [K, C], and neighbouring shifts
// are columns beside each other: a product is [C, K] by [K, shifts C], whose rows overlap in
// memory. Whole images are packed as 16-bit parts and multiplied by core/parts_product.h where the
// device can and there are channels enough; else, as borders are, in float32 by core/products.h.
// The sums go to their blocks in the end.
// ((2 k - 1)^2 + 1) / 2 blocks [C, C] of 2 N H W operations each where unfolding takes
// k^2 (k^2 + 1) / 2 (3 x 3: 13 instead of 45), three times on tensor cores with float32; two reads
// and one write of the images to pack them.
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

// sum += alpha times the blocks' sums: element (channel c, entry o; channel d, entry p) from
// sums [groups, group_size], where block b begins at places[2 b], its rows places[2 b + 1] apart.
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(SymmetricSum<float> sum, int64_t taps, int64_t group_size, const float* sums,
                    const int32_t* starts, const int32_t* entries, const int32_t* places) {
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       index < sum.groups * sum.order * sum.order;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = index % sum.order, row = index / sum.order % sum.order;
    if (column < row) continue;
    const int64_t group = index / sum.order / sum.order;
    const int64_t c = row / taps, d = column / taps;
    const int64_t pair = row % taps * taps + column % taps;
    const float* own = sums + group * group_size;
    float total = 0.0f;
    for (int32_t e = starts[pair]; e < starts[pair + 1]; ++e) {
      const int32_t entry = entries[e];
      const int64_t left = (entry & 2) != 0 ? d : c, right = (entry & 2) != 0 ? c : d;
      const int32_t* place = places + entry / 4 * 2;
      const float value = own[place[0] + left * place[1] + right];
      total += (entry & 1) != 0 ? -value : value;
    }
    sum.acc[group * sum.group_stride + row * sum.row_stride + column * sum.column_stride] +=
        sum.alpha * total;
  }
}

int64_t padded(int64_t elements, int64_t to = 4) {
  return ceil_div(elements, to) * to;
}

// Whether whole images are multiplied in parts: what a launch for every run and group costs is
// little then, and tiles of 128 channels are not mostly empty.
template <typename In>
bool multiplies_parts(const ConvLags<In>& lags, const LagPlan& plan, int64_t samples) {
  constexpr int64_t kFewestChannels = 32, kMostGroups = 4;
  const ConvInputCovariance<In, float>& call = lags.call;
  return call.group_channels >= kFewestChannels && call.sum.groups <= kMostGroups &&
         plan.families[0].inner(samples) >= lags.fewest_part_rows && parts_products_available();
}

// Products of whole images in parts, one run of shifts: A is the images at `stack` neighbouring
// shifts beside each other, so that tiles of 128 rows are full, B every stack'th shift.
struct PartsRun {
  LagRun run;
  int64_t stack, shifts;
  // Of full blocks of rows, and of the last one.
  PartsProduct whole, last;
  // Where its sums [stack C, shifts C] begin among those of a group.
  int64_t sums;
};

// Where everything lies in the workspace, and how the products are cut, for so many samples.
template <typename In>
struct Layout {
  static constexpr PartsType kType = parts_type_of<In>();
  static constexpr int kParts = sizeof(In) == 4 ? 2 : 1;

  std::shared_ptr<const LagPlan> geometry;
  int64_t samples, groups, channels, packed_channels, splits;
  // Of products in parts: all, and rows of a launch. A pair of shifts needs a row more, before the
  // first: of images one is zero there.
  std::vector<PartsRun> parts;
  int64_t part_rows = 0, block_rows = 0, before = 0;
  // Shifts of the longest of them.
  int64_t repeats = 0;
  // Of blocks that are not of these: the first, and columns of their sums [C, columns].
  int64_t first_block = 0, columns = 0;
  // By block: where it begins among a group's sums, and how far its rows are apart.
  std::vector<int32_t> places;
  // What the device is told: the geometry's starts and entries, then these.
  std::vector<int32_t> numbers;
  int64_t packed[4], group_size = 0, sums, table, largest, exponents, scratch, size = 0;

  Layout(const ConvLags<In>& lags, std::shared_ptr<const LagPlan> plan, int64_t samples_)
      : geometry(std::move(plan)),
        samples(samples_),
        groups(lags.call.sum.groups),
        channels(lags.call.group_channels) {
    const bool in_parts = multiplies_parts(lags, *geometry, samples);
    packed_channels = padded(channels, in_parts ? 8 : 4);
    splits = in_parts ? 1 : splits_of_whole_images();
    places.resize(2 * static_cast<size_t>(geometry->blocks));
    int64_t most_scratch = 0;
    if (in_parts) most_scratch = plan_parts(lags.most_part_rows);
    const int64_t parts_size = group_size;
    columns = (geometry->blocks - first_block) * packed_channels;
    for (int64_t block = first_block; block < geometry->blocks; ++block) {
      place(block, parts_size + (block - first_block) * packed_channels, columns);
    }
    group_size += padded(channels * columns);
    for (int f = 0; f < 4; ++f) {
      const LagFamily& family = geometry->families[f];
      const int64_t elements = groups * family.signals * family.rows(samples) * packed_channels;
      packed[f] = take(f == 0 && in_parts ? elements * kParts / 2 : elements);
    }
    sums = take(splits * groups * group_size);
    numbers = geometry->starts;
    numbers.insert(numbers.end(), geometry->entries.begin(), geometry->entries.end());
    numbers.insert(numbers.end(), places.begin(), places.end());
    table = take(static_cast<int64_t>(numbers.size()));
    const bool scaled = in_parts && sizeof(In) == 4;
    largest = take(scaled ? kLargestParts * groups * channels : 0);
    exponents = take(scaled ? groups * repeats * packed_channels : 0);
    scratch = take(most_scratch);
  }

  int64_t whole_rows() const { return geometry->families[0].inner(samples); }

  // Sums of whole images from their parts.
  cudaError_t multiply_parts(float* workspace, cudaStream_t stream) const {
    const LagFamily& family = geometry->families[0];
    const int64_t signal = family.rows(samples) * packed_channels, part_step = groups * signal;
    const auto* all = reinterpret_cast<const uint16_t*>(workspace + packed[0]);
    for (int64_t group = 0; group < groups; ++group) {
      const uint16_t* const own = all + group * signal + (family.margin - before) * packed_channels;
      const int* const scale = sizeof(In) == 4
                                   ? reinterpret_cast<const int*>(workspace + exponents) +
                                         group * repeats * packed_channels
                                   : nullptr;
      for (const PartsRun& one : parts) {
        // A's shift i and B's shift j are that far apart: stack - 1 - i + stack j.
        const int64_t shift = one.run.shift + one.stack - 1;
        const int64_t gap = (one.stack - 1) * packed_channels;
        const int64_t lines = one.stack == 1 ? channels : one.stack * packed_channels;
        for (int64_t first = 0; first < part_rows; first += block_rows) {
          const int64_t rows = std::min(block_rows, part_rows - first);
          const PartsMatrix a{
              own + first * packed_channels, rows, lines, packed_channels, part_step, scale};
          const PartsMatrix b{own + (first + shift) * packed_channels,
                              rows,
                              one.shifts * packed_channels,
                              packed_channels,
                              part_step,
                              scale,
                              gap == 0 ? 0 : packed_channels,
                              gap};
          const PartsTarget to{workspace + sums + group * group_size + one.sums,
                               one.shifts * packed_channels, 1, 1.0f, first > 0};
          const PartsProduct& product = rows == block_rows ? one.whole : one.last;
          const cudaError_t error = product.run(a, b, to, workspace + scratch, stream);
          if (error != cudaSuccess) return error;
        }
      }
    }
    return cudaSuccess;
  }

  // Products of float32 signals.
  std::vector<Product<float>> products(float* workspace) const {
    std::vector<Product<float>> list;
    for (const LagRun& run : geometry->runs) {
      if (run.first < first_block) continue;
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
                      places[2 * static_cast<size_t>(run.first)];
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
  void place(int64_t block, int64_t begin, int64_t row_step) {
    places[2 * static_cast<size_t>(block)] = static_cast<int32_t>(begin);
    places[2 * static_cast<size_t>(block) + 1] = static_cast<int32_t>(row_step);
  }

  // The products in parts and their sums; elements of float that they need besides.
  int64_t plan_parts(int64_t most_rows) {
    // Boxes of 64 columns each lie within one shift then.
    const bool pairs = packed_channels == 64;
    before = pairs ? 1 : 0;
    part_rows = whole_rows() + before;
    block_rows = std::min(part_rows, most_rows);
    const int64_t last_rows = (part_rows - 1) % block_rows + 1;
    int64_t most = 0;
    for (const LagRun& run : geometry->runs) {
      if (run.family != 0) continue;
      const int64_t stack = pairs && run.count > 1 ? 2 : 1, shifts = ceil_div(run.count, stack);
      const int64_t m = stack == 1 ? channels : stack * packed_channels;
      const int64_t n = shifts * packed_channels;
      parts.push_back({run, stack, shifts, PartsProduct(kType, false, m, n, block_rows, false),
                       PartsProduct(kType, false, m, n, last_rows, false), group_size});
      for (int64_t i = 0; i < run.count; ++i) {
        // Of A's shift stack - 1 - i % stack and B's i / stack.
        place(run.first + i,
              group_size + (stack - 1 - i % stack) * packed_channels * n +
                  i / stack * packed_channels,
              n);
      }
      group_size += padded(m * n);
      repeats = std::max({repeats, shifts, stack});
      most = std::max({most, parts.back().whole.workspace(), parts.back().last.workspace()});
    }
    first_block = geometry->whole_blocks;
    return most;
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

// Parts of whole images.
template <typename In>
cudaError_t pack_parts(const ConvInputCovariance<In, float>& call, const Layout<In>& layout,
                       const LagPacking<In>& packing, float* workspace, cudaStream_t stream) {
  int* const exponents = reinterpret_cast<int*>(workspace + layout.exponents);
  const int64_t pitch = layout.repeats * layout.packed_channels;
  if constexpr (sizeof(In) == 4) {
    auto* const largest = reinterpret_cast<uint32_t*>(workspace + layout.largest);
    const int64_t channels = layout.groups * layout.channels;
    const int parts = static_cast<int>(std::min<int64_t>(kLargestParts, call.samples));
    cudaError_t error =
        launch(largest_of_channels_kernel<In>,
               dim3(static_cast<unsigned>(ceil_div(channels, 32)), static_cast<unsigned>(parts)),
               dim3(kThreads), 0, stream, call, largest);
    if (error == cudaSuccess) {
      const int64_t count = layout.groups * layout.packed_channels;
      error =
          launch(channel_exponents_kernel, dim3(static_cast<unsigned>(ceil_div(count, kThreads))),
                 dim3(kThreads), 0, stream, static_cast<const uint32_t*>(largest), parts,
                 layout.channels, layout.groups, layout.packed_channels, layout.repeats, exponents);
    }
    if (error != cudaSuccess) return error;
  }
  const int64_t part_words = layout.groups * packing.rows * layout.packed_channels / 2;
  return launch(pack_parts_kernel<In>, dim3(static_cast<unsigned>(packing.tiles())),
                dim3(kPackSide, kPackLines), 0, stream, packing, static_cast<const int*>(exponents),
                pitch, part_words, reinterpret_cast<uint32_t*>(workspace + layout.packed[0]));
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
    if (f == 0 && !layout.parts.empty()) {
      const cudaError_t error = pack_parts(call, layout, packing, workspace, stream);
      if (error != cudaSuccess) return error;
    } else {
      blocks += packing.tiles();
      all.families[all.count] = packing;
      all.ends[all.count++] = blocks;
    }
  }
  if (blocks == 0) return cudaSuccess;
  return launch(pack_signals_kernel<In>, dim3(static_cast<unsigned>(blocks)),
                dim3(kPackSide, kPackLines), 0, stream, all, borders, workspace);
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
  if (error == cudaSuccess) error = layout.multiply_parts(workspace, stream);
  if (error != cudaSuccess) return error;
  // Numbers of 8 and 11 bits are tf32 numbers: one term is exact.
  error = multiply_all(layout.products(workspace), call.tf32 || sizeof(In) == 2, stream);
  if (error != cudaSuccess) return error;
  float* sums = workspace + layout.sums;
  const int64_t splits = layout.used_splits();
  if (splits > 1) {
    // Without products in parts a group's sums are all [C, columns].
    const int64_t rows = layout.groups * layout.channels;
    const int64_t count = plan.whole_blocks * layout.packed_channels;
    error = launch(add_up_kernel, grid_for(rows * count), dim3(kThreads), 0, stream, sums, splits,
                   rows, layout.columns, count);
    if (error != cudaSuccess) return error;
  }
  int32_t* starts = reinterpret_cast<int32_t*>(workspace + layout.table);
  int32_t* entries = starts + plan.starts.size();
  int32_t* places = entries + plan.entries.size();
  error = store(layout.numbers, starts, stream);
  if (error != cudaSuccess) return error;
  return launch(assemble_kernel, grid_for(call.sum.groups * call.sum.order * call.sum.order),
                dim3(kThreads), 0, stream, call.sum, plan.h.taps * plan.w.taps, layout.group_size,
                static_cast<const float*>(sums), static_cast<const int32_t*>(starts),
                static_cast<const int32_t*>(entries), static_cast<const int32_t*>(places));
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
