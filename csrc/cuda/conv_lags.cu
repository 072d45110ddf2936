// Input covariance of a convolution with stride 1 and several channels, by lags.
//
// conv_plan.h writes the covariance in products of signals with themselves, shifted: whole images,
// border rows, border columns, corner pixels. Samples are packed with channels last and zeros
// between lines, so that a shift of two axes is one of a flat array [K, C], and neighbouring shifts
// are columns beside each other: a product of products.cu is [C, K] by [K, shifts C]. The sums go
// to their blocks in the end.
// ((2 k - 1)^2 + 1) / 2 blocks [C, C] of 2 N H W operations each where unfolding takes
// k^2 (k^2 + 1) / 2 (3 x 3: 13 instead of 45), three times on tensor cores with float32; one read
// and one write of the images to pack them.
#include <algorithm>
#include <array>
#include <map>
#include <tuple>

#include "conv_lags.h"
#include "conv_plan.h"
#include "core/launch.h"
#include "core/products.h"
#include "core/splits.h"
#include "core/triangle.h"
#include "core/warp.h"

namespace hesskern::cuda {

namespace {

constexpr int kSide = 32, kLines = 8;
// Border lines of an axis, table entries in all and in one launch.
constexpr size_t kMostBorders = 64, kMostEntries = 1 << 16, kEntriesPerLaunch = 4096;
// Elements of images that are packed at a time: 256 MB.
constexpr int64_t kPacked = 1 << 26;
constexpr int64_t kMostSplits = 32;
// How much longer the same operations take where images are unfolded on the way.
constexpr double kUnfolding = 2.5;

// Signals of one kind: whole images, border rows, border columns or corner pixels; a flat array
// puts zeros behind every line and lines of zeros behind every sample.
struct Family {
  bool border_h, border_w;
  int64_t signals, lines, pitch, margin;

  // Rows of a signal's flat array, between its margins and with them.
  int64_t inner(int64_t samples) const { return samples * lines * pitch; }
  int64_t rows(int64_t samples) const { return inner(samples) + 2 * margin; }
};

// A signal by another at several shifts, one after the other; first: place of its first block.
struct Run {
  int family;
  int64_t a, b, shift, count, first;
};

// All that depends on the geometry of one layer alone.
struct Plan {
  ConvAxis h, w;
  bool fits = false;  // within the limits above; only then there is more than the axes
  Family families[4];
  std::vector<Run> runs;
  int64_t blocks = 0;        // [C, C] each
  int64_t whole_blocks = 0;  // the first of them, of whole images
  // Of pair (o, p) of kernel entries, block * 4 + 2 (transposed) + 1 (subtracted), between
  // starts[o taps + p] and the next.
  std::vector<int32_t> starts, entries;
};

using Geometry = std::array<int64_t, 10>;

std::vector<std::vector<std::pair<size_t, int>>> parts_of_terms(
    const ConvAxis& axis, const std::vector<AxisProduct>& list) {
  std::vector<std::vector<std::pair<size_t, int>>> parts(static_cast<size_t>(axis.terms));
  for (size_t i = 0; i < list.size(); ++i) {
    for (const auto& [term, sign] : list[i].terms) {
      parts[static_cast<size_t>(term)].emplace_back(i, sign);
    }
  }
  // Every term holds those before it in its chain.
  for (size_t t = 0; t < parts.size(); ++t) {
    if (axis.previous[t] < 0) continue;
    const auto& before = parts[static_cast<size_t>(axis.previous[t])];
    parts[t].insert(parts[t].end(), before.begin(), before.end());
  }
  return parts;
}

// Parts of all pairs of an axis.
size_t parts_of_pairs(const ConvAxis& axis,
                      const std::vector<std::vector<std::pair<size_t, int>>>& parts) {
  size_t total = 0;
  for (const int64_t term : axis.term_of_pair) total += parts[static_cast<size_t>(term)].size();
  return total;
}

Plan make_plan(const Geometry& g) {
  Plan plan;
  plan.h = make_axis(g[0], g[2], 1, g[4], g[6], g[8]);
  plan.w = make_axis(g[1], g[3], 1, g[5], g[7], g[9]);
  const ConvAxis &h = plan.h, &w = plan.w;
  const auto list_h = axis_products(h), list_w = axis_products(w);
  if (h.span <= 0 || w.span <= 0 || h.borders.size() > kMostBorders ||
      w.borders.size() > kMostBorders) {
    return plan;
  }
  const auto parts_h = parts_of_terms(h, list_h), parts_w = parts_of_terms(w, list_w);
  if (parts_of_pairs(h, parts_h) * parts_of_pairs(w, parts_w) > kMostEntries) return plan;
  plan.fits = true;
  for (int f = 0; f < 4; ++f) {
    Family& family = plan.families[f];
    family.border_h = (f & 1) != 0;
    family.border_w = (f & 2) != 0;
    family.signals = static_cast<int64_t>((family.border_h ? h.borders.size() : 1) *
                                          (family.border_w ? w.borders.size() : 1));
    family.lines = family.border_h ? 1 : h.span + h.max_lag;
    family.pitch = family.border_w ? 1 : w.span + w.max_lag;
    family.margin =
        (family.border_h ? 0 : h.max_lag * family.pitch) + (family.border_w ? 0 : w.max_lag);
  }

  const auto other_h = exchanged(list_h), other_w = exchanged(list_w);
  const auto number = [&](int64_t i, int64_t j) {
    return static_cast<size_t>(i) * list_w.size() + static_cast<size_t>(j);
  };
  // Family, signals, shift and number of every product; of two that are each other's transpose one.
  using Key = std::tuple<int, int64_t, int64_t, int64_t, size_t>;
  std::vector<Key> keys;
  for (size_t i = 0; i < list_h.size(); ++i) {
    for (size_t j = 0; j < list_w.size(); ++j) {
      const AxisProduct &ph = list_h[i], &pw = list_w[j];
      const size_t index = i * list_w.size() + j;
      if (number(other_h[i], other_w[j]) < index) continue;
      const int f = (ph.single ? 1 : 0) + (pw.single ? 2 : 0);
      const int64_t across = pw.single ? static_cast<int64_t>(w.borders.size()) : 1;
      keys.emplace_back(f, (ph.single ? ph.a : 0) * across + (pw.single ? pw.a : 0),
                        (ph.single ? ph.b : 0) * across + (pw.single ? pw.b : 0),
                        ph.lag * plan.families[f].pitch + pw.lag, index);
    }
  }
  std::sort(keys.begin(), keys.end());
  std::vector<int32_t> block_of(list_h.size() * list_w.size(), -1);
  for (const auto& [f, a, b, shift, index] : keys) {
    Run* last = plan.runs.empty() ? nullptr : &plan.runs.back();
    if (last == nullptr || last->family != f || last->a != a || last->b != b ||
        last->shift + last->count != shift) {
      plan.runs.push_back({f, a, b, shift, 0, plan.blocks});
      last = &plan.runs.back();
    }
    ++last->count;
    block_of[index] = static_cast<int32_t>(plan.blocks++);
    if (f == 0) plan.whole_blocks = plan.blocks;
  }

  const int64_t taps = h.taps * w.taps;
  for (int64_t pair = 0; pair < taps * taps; ++pair) {
    plan.starts.push_back(static_cast<int32_t>(plan.entries.size()));
    const int64_t o = pair / taps, p = pair % taps;
    const int64_t term_h = h.term_of_pair[static_cast<size_t>(o / w.taps * h.taps + p / w.taps)];
    const int64_t term_w = w.term_of_pair[static_cast<size_t>(o % w.taps * w.taps + p % w.taps)];
    for (const auto& [i, sign_h] : parts_h[static_cast<size_t>(term_h)]) {
      for (const auto& [j, sign_w] : parts_w[static_cast<size_t>(term_w)]) {
        const int32_t own = block_of[i * list_w.size() + j];
        const int32_t block = own >= 0 ? own : block_of[number(other_h[i], other_w[j])];
        plan.entries.push_back(4 * block + (own < 0 ? 2 : 0) + (sign_h * sign_w < 0 ? 1 : 0));
      }
    }
  }
  plan.starts.push_back(static_cast<int32_t>(plan.entries.size()));
  return plan;
}

// The plans of the layers that came last.
template <typename In>
const Plan& plan_of(const ConvInputCovariance<In, float>& call) {
  thread_local std::map<Geometry, Plan> plans;
  constexpr size_t kMost = 256;
  const Geometry key{call.height,    call.width,     call.kernel_h,   call.kernel_w,
                     call.padding_h, call.padding_w, call.dilation_h, call.dilation_w,
                     call.out_h,     call.out_w};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(key, make_plan(key)).first->second;
}

struct Borders {
  int32_t h[kMostBorders], w[kMostBorders];
};

// One family's signals, packed [groups, signals, rows, channels] with channels rounded up.
template <typename In>
struct Packing {
  ConvInputCovariance<In, float> call;
  Family family;
  int64_t rows, groups, packed_channels, borders_w;
  // Of the axes, the positions v in [low, high) that are not zero; pixel v - padding.
  int64_t first_h, low_h, high_h, first_w, low_w, high_w;
};

// A block takes a tile of 32 rows and 32 channels through shared memory: it reads along the
// positions of an image and writes along its channels.
template <typename In>
__global__ void __launch_bounds__(kSide* kLines)
    pack_kernel(const __grid_constant__ Packing<In> packing,
                const __grid_constant__ Borders borders, float* out) {
  __shared__ float tile[kSide][kSide + 1];
  const ConvInputCovariance<In, float>& call = packing.call;
  const Family& family = packing.family;
  const int64_t row_tiles = ceil_div(packing.rows, kSide);
  const int64_t channel_tiles = ceil_div(packing.packed_channels, kSide);
  const int64_t row0 = blockIdx.x % row_tiles * kSide;
  const int64_t channel0 = blockIdx.x / row_tiles % channel_tiles * kSide;
  const int64_t signal = blockIdx.x / row_tiles / channel_tiles;  // group and signal
  const int64_t group = signal / family.signals, own = signal % family.signals;
  const int x = static_cast<int>(threadIdx.x), y0 = static_cast<int>(threadIdx.y);

  const int64_t row = row0 + x - family.margin;
  const int64_t line = row / family.pitch, column = row % family.pitch;
  const int64_t n = line / family.lines;
  const int64_t v =
      family.border_h ? borders.h[own / packing.borders_w] : packing.first_h + line % family.lines;
  const int64_t u = family.border_w ? borders.w[own % packing.borders_w] : packing.first_w + column;
  const bool inside = row >= 0 && n < call.samples && v >= packing.low_h && v < packing.high_h &&
                      u >= packing.low_w && u < packing.high_w;
  const In* from = call.x + n * call.sample_stride + (v - call.padding_h) * call.row_stride +
                   (u - call.padding_w) * call.column_stride;
  for (int y = y0; y < kSide; y += kLines) {
    const int64_t channel = channel0 + y;
    tile[y][x] = inside && channel < call.group_channels
                     ? to_float(from[(group * call.group_channels + channel) * call.channel_stride])
                     : 0.0f;
  }
  __syncthreads();
  for (int y = y0; y < kSide; y += kLines) {
    const int64_t target = row0 + y, channel = channel0 + x;
    if (target < packing.rows && channel < packing.packed_channels) {
      out[(signal * packing.rows + target) * packing.packed_channels + channel] = tile[x][y];
    }
  }
}

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
// sums [groups, C, blocks, packed channels].
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(SymmetricSum<float> sum, int64_t taps, int64_t blocks, int64_t channels,
                    int64_t packed_channels, const float* sums, const int32_t* starts,
                    const int32_t* entries) {
  const int64_t group_size = channels * blocks * packed_channels;
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
      const float value = own[(left * blocks + entry / 4) * packed_channels + right];
      total += (entry & 1) != 0 ? -value : value;
    }
    sum.acc[group * sum.group_stride + row * sum.row_stride + column * sum.column_stride] +=
        sum.alpha * total;
  }
}

int64_t padded(int64_t elements) {
  return ceil_div(elements, 4) * 4;
}

// Where everything lies in the workspace, and how the products are cut, for so many samples.
template <typename In>
struct Layout {
  const Plan& plan;
  int64_t groups, channels, packed_channels, samples, splits, columns;
  int64_t packed[4], sums, table, size;

  Layout(const ConvInputCovariance<In, float>& call, const Plan& plan_, int64_t samples_)
      : plan(plan_),
        groups(call.sum.groups),
        channels(call.group_channels),
        packed_channels(padded(channels)),
        samples(samples_),
        columns(plan_.blocks * packed_channels) {
    int64_t tiles = 0;
    for (const Run& run : plan.runs) {
      if (run.family == 0) {
        tiles += groups * ceil_div(channels, 64) * ceil_div(run.count * packed_channels, 64);
      }
    }
    const int64_t rows = plan.families[0].inner(samples);
    // In rows.
    constexpr int64_t kWrite = 128, kFewest = 512;
    splits = plan_splits(tiles, rows, 2 * current_device().processors, kWrite, 1,
                         std::min(rows / kFewest, kMostSplits))
                 .count;
    size = 0;
    for (int f = 0; f < 4; ++f) {
      packed[f] = size;
      size += groups * plan.families[f].signals * plan.families[f].rows(samples) * packed_channels;
    }
    sums = size;
    size += padded(splits * groups * channels * columns);
    table = size;
    size += static_cast<int64_t>(plan.starts.size() + plan.entries.size());
  }

  std::vector<Product<float>> products(float* workspace) const {
    std::vector<Product<float>> list;
    for (const Run& run : plan.runs) {
      const Family& family = plan.families[run.family];
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
          product.c = workspace + sums + ((split * groups + group) * channels) * columns +
                      run.first * packed_channels;
          list.push_back(product);
        }
      }
    }
    return list;
  }

  // Splits that rows are left for.
  int64_t used_splits() const {
    const int64_t inner = plan.families[0].inner(samples);
    return ceil_div(inner, ceil_div(inner, splits));
  }
};

template <typename In>
int64_t chunk_samples(const ConvInputCovariance<In, float>& call, const Plan& plan) {
  const int64_t sample = plan.families[0].inner(1) * padded(call.group_channels) * call.sum.groups;
  return std::clamp<int64_t>(kPacked / std::max<int64_t>(sample, 1), 1, call.samples);
}

template <typename In>
cudaError_t pack(const ConvInputCovariance<In, float>& call, const Layout<In>& layout,
                 float* workspace, cudaStream_t stream) {
  const ConvAxis &h = layout.plan.h, &w = layout.plan.w;
  Borders borders{};
  for (size_t i = 0; i < h.borders.size(); ++i) {
    borders.h[i] = static_cast<int32_t>(h.borders[i].position);
  }
  for (size_t i = 0; i < w.borders.size(); ++i) {
    borders.w[i] = static_cast<int32_t>(w.borders[i].position);
  }
  for (int f = 0; f < 4; ++f) {
    const Family& family = layout.plan.families[f];
    if (family.signals == 0) continue;
    const Packing<In> packing{call,
                              family,
                              family.rows(layout.samples),
                              layout.groups,
                              layout.packed_channels,
                              family.border_w ? static_cast<int64_t>(w.borders.size()) : 1,
                              h.first,
                              h.low[0],
                              h.high[0],
                              w.first,
                              w.low[0],
                              w.high[0]};
    const int64_t tiles = layout.groups * family.signals * ceil_div(packing.rows, kSide) *
                          ceil_div(layout.packed_channels, kSide);
    const cudaError_t error =
        launch(pack_kernel<In>, dim3(static_cast<unsigned>(tiles)), dim3(kSide, kLines), 0, stream,
               packing, borders, workspace + layout.packed[f]);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
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

// workspace: what plan() asks for.
template <typename In>
cudaError_t run(const ConvInputCovariance<In, float>& call, float* workspace, cudaStream_t stream) {
  const Plan& plan = plan_of(call);
  const int64_t step = chunk_samples(call, plan);
  for (int64_t first = 0; first < call.samples; first += step) {
    ConvInputCovariance<In, float> some = call;
    some.samples = std::min(step, call.samples - first);
    some.x += first * call.sample_stride;
    const Layout<In> layout(some, plan, some.samples);
    cudaError_t error = pack(some, layout, workspace, stream);
    if (error != cudaSuccess) return error;
    // Numbers of 8 and 11 bits are tf32 numbers: one term is exact.
    error = multiply_all(layout.products(workspace), call.tf32 || sizeof(In) == 2, stream);
    if (error != cudaSuccess) return error;
    float* sums = workspace + layout.sums;
    const int64_t splits = layout.used_splits(), rows = layout.groups * layout.channels;
    if (splits > 1) {
      const int64_t count = plan.whole_blocks * layout.packed_channels;
      error = launch(add_up_kernel, grid_for(rows * count), dim3(kThreads), 0, stream, sums, splits,
                     rows, layout.columns, count);
      if (error != cudaSuccess) return error;
    }
    int32_t* starts = reinterpret_cast<int32_t*>(workspace + layout.table);
    int32_t* entries = starts + plan.starts.size();
    error = store(plan.starts, starts, stream);
    if (error == cudaSuccess) error = store(plan.entries, entries, stream);
    if (error != cudaSuccess) return error;
    error = launch(assemble_kernel, grid_for(call.sum.groups * call.sum.order * call.sum.order),
                   dim3(kThreads), 0, stream, call.sum, plan.h.taps * plan.w.taps, plan.blocks,
                   layout.channels, layout.packed_channels, static_cast<const float*>(sums),
                   static_cast<const int32_t*>(starts), static_cast<const int32_t*>(entries));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename In>
bool ConvLags<In>::pays() const {
  constexpr int64_t kFewestChannels = 8;
  if (call.stride_h != 1 || call.stride_w != 1 || call.kernel_h * call.kernel_w == 1 ||
      call.group_channels < kFewestChannels) {
    return false;
  }
  const Plan& plan = plan_of(call);
  if (!plan.fits) return false;
  // Multiplications of a sample, tiles that are not full included.
  const int64_t packed_channels = padded(call.group_channels);
  double lags = 0;
  for (const Run& run : plan.runs) {
    lags +=
        static_cast<double>(plan.families[run.family].inner(1) * ceil_div(call.group_channels, 64) *
                            ceil_div(run.count * packed_channels, 64) * (64 * 64));
  }
  const double tiles = static_cast<double>(triangle_size(ceil_div(call.sum.order, 64)) * (64 * 64));
  return lags < kUnfolding * tiles * static_cast<double>(call.out_h * call.out_w);
}

template <typename In>
Work<float> ConvLags<In>::plan() const {
  const Plan& plan = plan_of(call);
  const int64_t step = chunk_samples(call, plan), last = (call.samples - 1) % step + 1;
  const int64_t workspace =
      std::max(Layout<In>(call, plan, step).size, Layout<In>(call, plan, last).size);
  return {workspace,
          [call = call](float* memory, cudaStream_t stream) { return run(call, memory, stream); }};
}

template struct ConvLags<float>;
template struct ConvLags<BFloat16>;
template struct ConvLags<Float16>;

}  // namespace hesskern::cuda
