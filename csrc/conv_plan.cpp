#include "conv_plan.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace hesskern {

namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return a >= 0 ? (a + b - 1) / b : -(-a / b);
}

// Index of the product with the sides of product i exchanged.
std::vector<size_t> exchanged(const std::vector<AxisProduct>& list) {
  std::vector<size_t> other(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    for (size_t j = 0; j < list.size(); ++j) {
      if (list[i].single == list[j].single && list[i].a == list[j].b && list[i].b == list[j].a &&
          list[i].lag == -list[j].lag) {
        other[i] = j;
      }
    }
  }
  return other;
}

}  // namespace

ConvAxis make_axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                   int64_t positions) {
  ConvAxis axis{};
  axis.size = size;
  axis.stride = stride;
  axis.padding = padding;
  axis.taps = kernel;
  axis.positions = positions;

  std::vector<int64_t> phase(kernel), shift(kernel);
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t offset = dilation * i % stride;
    const auto found = std::find(axis.phase_offset.begin(), axis.phase_offset.end(), offset);
    phase[i] = found - axis.phase_offset.begin();
    if (found == axis.phase_offset.end()) axis.phase_offset.push_back(offset);
    shift[i] = dilation * i / stride;
  }
  axis.phases = static_cast<int64_t>(axis.phase_offset.size());

  // Inside the image, and inside some window of the phase.
  for (int64_t p = 0; p < axis.phases; ++p) {
    int64_t least = INT64_MAX, most = INT64_MIN;
    for (int64_t i = 0; i < kernel; ++i) {
      if (phase[i] != p) continue;
      least = std::min(least, shift[i]);
      most = std::max(most, shift[i] + positions);
    }
    const int64_t offset = axis.phase_offset[p];
    const int64_t low = std::max(least, ceil_div(padding - offset, stride));
    const int64_t high = std::min(most, ceil_div(size + padding - offset, stride));
    axis.low.push_back(low);
    axis.high.push_back(std::max(low, high));
  }
  axis.first = *std::min_element(axis.low.begin(), axis.low.end());
  axis.span = *std::max_element(axis.high.begin(), axis.high.end()) - axis.first;

  std::map<std::tuple<int64_t, int64_t, int64_t>, std::vector<std::pair<int64_t, int64_t>>> chains;
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t j = 0; j < kernel; ++j) {
      chains[{phase[i], phase[j], shift[j] - shift[i]}].emplace_back(i, j);
    }
  }

  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t>;
  std::map<Key, int64_t> single_index;
  axis.term_of_pair.assign(kernel * kernel, -1);
  for (auto& [key, pairs] : chains) {
    const auto [a, b, lag] = key;
    std::sort(pairs.begin(), pairs.end(),
              [&](const auto& l, const auto& r) { return shift[l.first] < shift[r.first]; });
    axis.max_lag = std::max(axis.max_lag, std::abs(lag));
    auto nonzero = [&, a = a, b = b, lag = lag](int64_t v) {
      return v >= axis.low[a] && v < axis.high[a] && v + lag >= axis.low[b] &&
             v + lag < axis.high[b];
    };
    auto add_single = [&, a = a, b = b, lag = lag](int64_t v, int64_t term, int sign) {
      const auto [found, fresh] =
          single_index.emplace(Key{a, b, v, v + lag}, static_cast<int64_t>(axis.singles.size()));
      if (fresh) axis.singles.push_back({a, b, v, v + lag, {}});
      axis.singles[found->second].terms.emplace_back(term, sign);
    };
    int64_t term = axis.terms++;
    axis.previous.push_back(-1);
    axis.lags.push_back({a, b, lag, term});
    const int64_t begin = shift[pairs[0].first], end = begin + positions;
    for (int64_t v = axis.low[a]; v < axis.high[a]; ++v) {
      if (nonzero(v) && (v < begin || v >= end)) add_single(v, term, -1);
    }
    axis.term_of_pair[pairs[0].first * kernel + pairs[0].second] = term;
    for (size_t n = 1; n < pairs.size(); ++n) {
      const int64_t before = shift[pairs[n - 1].first], now = shift[pairs[n].first];
      std::vector<std::pair<int64_t, int>> changes;
      for (int64_t v = before; v < std::min(now, before + positions); ++v) {
        if (nonzero(v)) changes.emplace_back(v, -1);
      }
      for (int64_t v = std::max(now, before + positions); v < now + positions; ++v) {
        if (nonzero(v)) changes.emplace_back(v, +1);
      }
      if (!changes.empty()) {
        axis.previous.push_back(term);
        term = axis.terms++;
        for (const auto& [v, sign] : changes) add_single(v, term, sign);
      }
      axis.term_of_pair[pairs[n].first * kernel + pairs[n].second] = term;
    }
  }

  auto border = [&](int64_t p, int64_t position) {
    for (size_t n = 0; n < axis.borders.size(); ++n) {
      if (axis.borders[n].phase == p && axis.borders[n].position == position) {
        return static_cast<int64_t>(n);
      }
    }
    axis.borders.push_back({p, position});
    return static_cast<int64_t>(axis.borders.size()) - 1;
  };
  for (const auto& single : axis.singles) {
    axis.border_a.push_back(border(single.phase_a, single.position_a));
    axis.border_b.push_back(border(single.phase_b, single.position_b));
  }
  return axis;
}

std::vector<AxisProduct> axis_products(const ConvAxis& axis) {
  std::vector<AxisProduct> list;
  for (const auto& lag : axis.lags) {
    list.push_back({false, lag.phase_a, lag.phase_b, lag.lag, {{lag.term, 1}}});
  }
  for (size_t i = 0; i < axis.singles.size(); ++i) {
    list.push_back({true, axis.border_a[i], axis.border_b[i], 0, axis.singles[i].terms});
  }
  return list;
}

std::array<ConvFamily, 4> make_families(const ConvAxis& h, const ConvAxis& w) {
  std::array<ConvFamily, 4> families{};
  for (size_t f = 0; f < families.size(); ++f) {
    ConvFamily& family = families[f];
    family.border_h = (f & 1) != 0;
    family.border_w = (f & 2) != 0;
    family.signals_w = family.border_w ? static_cast<int64_t>(w.borders.size()) : w.phases;
    family.signals =
        (family.border_h ? static_cast<int64_t>(h.borders.size()) : h.phases) * family.signals_w;
    family.lines = family.border_h ? 1 : h.span + h.max_lag;
    family.pitch = family.border_w ? 1 : w.span + w.max_lag;
    family.margin =
        (family.border_h ? 0 : h.max_lag * family.pitch) + (family.border_w ? 0 : w.max_lag);
  }
  return families;
}

std::vector<ConvProduct> conv_products(const std::array<ConvFamily, 4>& families,
                                       const std::vector<AxisProduct>& list_h,
                                       const std::vector<AxisProduct>& list_w) {
  const auto other_h = exchanged(list_h), other_w = exchanged(list_w);
  std::vector<ConvProduct> products;
  for (size_t i = 0; i < list_h.size(); ++i) {
    for (size_t j = 0; j < list_w.size(); ++j) {
      if (std::tie(other_h[i], other_w[j]) < std::tie(i, j)) continue;
      const AxisProduct &ph = list_h[i], &pw = list_w[j];
      const int f = (ph.single ? 1 : 0) + (pw.single ? 2 : 0);
      const ConvFamily& family = families[static_cast<size_t>(f)];
      products.push_back({f, ph.a * family.signals_w + pw.a, ph.b * family.signals_w + pw.b,
                          ph.lag * family.pitch + pw.lag, i, j, other_h[i], other_w[j]});
    }
  }
  std::sort(products.begin(), products.end(), [](const ConvProduct& l, const ConvProduct& r) {
    return std::tie(l.family, l.a, l.b, l.shift, l.h, l.w) <
           std::tie(r.family, r.a, r.b, r.shift, r.h, r.w);
  });
  return products;
}

}  // namespace hesskern
