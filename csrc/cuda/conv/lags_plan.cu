#include <algorithm>
#include <map>
#include <tuple>

#include "lags_plan.h"

namespace hesskern::cuda {

namespace {

// Table entries in all.
constexpr size_t kMostEntries = 1 << 16;

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

LagPlan make_plan(const LagGeometry& g) {
  LagPlan plan;
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
    LagFamily& family = plan.families[f];
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
    LagRun* last = plan.runs.empty() ? nullptr : &plan.runs.back();
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

}  // namespace

std::shared_ptr<const LagPlan> lag_plan(const LagGeometry& geometry) {
  thread_local std::map<LagGeometry, std::shared_ptr<const LagPlan>> plans;
  constexpr size_t kMost = 256;
  const auto found = plans.find(geometry);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(geometry, std::make_shared<const LagPlan>(make_plan(geometry)))
      .first->second;
}

}  // namespace hesskern::cuda
