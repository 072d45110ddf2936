#include <algorithm>
#include <map>
#include <utility>

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
  // Every term holds those before it in its chain, less what has left the window again.
  for (size_t t = 0; t < parts.size(); ++t) {
    if (axis.previous[t] < 0) continue;
    for (const auto& [i, sign] : parts[static_cast<size_t>(axis.previous[t])]) {
      const auto other = std::find(parts[t].begin(), parts[t].end(), std::pair(i, -sign));
      if (other != parts[t].end()) {
        parts[t].erase(other);
      } else {
        parts[t].emplace_back(i, sign);
      }
    }
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
  const auto families = make_families(h, w);
  for (size_t f = 0; f < families.size(); ++f) plan.families[f] = {families[f]};

  const auto number = [&](size_t i, size_t j) { return i * list_w.size() + j; };
  // A block of a pair of axis products, and whether it is that block transposed.
  std::vector<std::pair<int32_t, bool>> block_of(list_h.size() * list_w.size());
  for (const ConvProduct& product : conv_products(families, list_h, list_w)) {
    LagRun* last = plan.runs.empty() ? nullptr : &plan.runs.back();
    if (last == nullptr || last->family != product.family || last->a != product.a ||
        last->b != product.b || last->shift + last->count != product.shift) {
      plan.runs.push_back({product.family, product.a, product.b, product.shift, 0, plan.blocks});
      last = &plan.runs.back();
    }
    ++last->count;
    const auto block = static_cast<int32_t>(plan.blocks++);
    block_of[number(product.transposed_h, product.transposed_w)] = {block, true};
    block_of[number(product.h, product.w)] = {block, false};
    if (product.family == 0) plan.whole_blocks = plan.blocks;
  }

  const int64_t taps = h.taps * w.taps;
  for (int64_t pair = 0; pair < taps * taps; ++pair) {
    plan.starts.push_back(static_cast<int32_t>(plan.entries.size()));
    const int64_t o = pair / taps, p = pair % taps;
    const int64_t term_h = h.term_of_pair[static_cast<size_t>(o / w.taps * h.taps + p / w.taps)];
    const int64_t term_w = w.term_of_pair[static_cast<size_t>(o % w.taps * w.taps + p % w.taps)];
    for (const auto& [i, sign_h] : parts_h[static_cast<size_t>(term_h)]) {
      for (const auto& [j, sign_w] : parts_w[static_cast<size_t>(term_w)]) {
        const auto& [block, transposed] = block_of[number(i, j)];
        plan.entries.push_back(4 * block + (transposed ? 2 : 0) + (sign_h * sign_w < 0 ? 1 : 0));
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
