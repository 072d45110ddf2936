"""Overlaps of leading eigenspaces between differently seeded models, and their prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.items import K_AXIS, pairs_of, strip_power
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import (
    Chart,
    Curve,
    Outcome,
    Table,
    judge,
    published_points,
    spread_words,
)
from hesskern.diagnostics.metrics import subspace_overlap
from hesskern.diagnostics.predictor import classify_peak, peak_position, predict_overlap

__all__ = ["between_models", "width_variants"]

_BETWEEN_WITHIN = 0.05
# Bytes for the Kronecker eigenvectors of one layer of one model.
_PAIR_BUDGET = 384 * 2**20
_FORMS = {"exact": "exact H", "kronecker": "Kronecker form"}


def between_models(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Overlap of a layer's leading spaces in differently seeded models, with the prediction."""
    out = Outcome()
    scores: list[_Score] = []
    rows: list[list[str]] = []
    for network in networks:
        reference = published.BETWEEN.get((network.data, strip_power(network.model)), {})
        seeds = _two_or_more_seeds(lab)
        layers = list(lab.factors(network, seeds[0]))
        for seed in seeds:
            # All layers of one model together: the lab keeps the Hessians of one model at a time.
            for name in layers:
                lab.eigenpairs(network, seed, name, lab.top)
        for index, name in enumerate(layers):
            found = _compare(lab, network, name, seeds)
            out.numbers.setdefault(network.name, {})[name] = found
            out.charts.append(_between_chart(network, name, index, found))
            k, figure = reference.get(name, (0, 0.0))
            enough = min(1.25 * max(k, found["outputs"]), 2.25 * found["outputs"])
            long = [form for form in _FORMS if len(found[form][0]) >= math.floor(enough)]
            if k and index < len(layers) - 1 and long:
                form = long[0]
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: k of the peak ({_FORMS[form]})",
                        [float(peak_position(c, found["outputs"])) for c in found[form]],
                        f"{k}",
                        between=(0.8 * k, 1.25 * k),
                        withheld=lab.withheld(network),
                    )
                )
            if k:
                form = "exact" if len(found["exact"][0]) >= k else "kronecker"
                ours = [curve[k - 1] for curve in found[form] if len(curve) >= k]
                if ours:
                    out.verdicts.append(
                        judge(
                            f"{name} of {network.name}: overlap between models at k = {k} "
                            f"({_FORMS[form]})",
                            ours,
                            figure,
                            within=_BETWEEN_WITHIN,
                            withheld=lab.withheld(network),
                        )
                    )
            if network.model.endswith("-bn") and 0 < index < len(layers) - 1:
                # The first layer sees images and the last gives classes, with or without it.
                k = min(found["outputs"], len(found["kronecker"][0]))
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: overlap between models at k = m = {k} "
                        "(Kronecker form)",
                        [curve[k - 1] for curve in found["kronecker"]],
                        published.BETWEEN_BATCH_NORM,
                        within=_BETWEEN_WITHIN,
                        withheld=lab.withheld(network),
                    )
                )
            row, cases = _prediction_row(network, name, found)
            rows.append(row)
            if index < len(layers) - 1:
                scores += [replace(case, first=index == 0) for case in cases]
    _add_predictor(out, rows, scores)
    return out


@dataclass(frozen=True)
class _Score:
    """The predictor and what was found, of one layer and pair of models.

    Attributes:
        first: whether the layer sees the data themselves, which all models share.
        applies: the published condition.
        predicted, found: kinds of peak.
        line_error: distance of the overlap at k = m from (t^T t')².
        height_error: distance of the highest values, predicted and found, up to 9/4 m.
    """

    first: bool
    applies: bool
    predicted: str
    found: str
    line_error: float
    height_error: float

    @property
    def rule_right(self) -> bool:
        """The published rule: a peak near k = m where the condition holds, and only there."""
        return self.applies == (self.found == "normal")


def _add_predictor(out: Outcome, rows: list[list[str]], scores: list[_Score]) -> None:
    """The table of the predictor, and how often it is right."""
    out.tables.append(
        Table(
            "The predictor",
            [
                "layer",
                "condition holds",
                "predicted",
                "found",
                "peak at k, predicted",
                "found",
                "its height, predicted",
                "found",
                "(t·t′)²",
                "found at k = m",
            ],
            rows,
            "Condition: τ_m γ₁ > τ₁ γ₂ in both models of a pair. Predicted and found: where the "
            "overlap of the Kronecker forms peaks up to k = 9/4 m: early, normal (near k = m), "
            "delayed, or none (it still rises there). Peaks: mean [range] over pairs of models.",
        )
    )
    if not scores:
        return
    out.numbers["scores"] = [asdict(score) for score in scores]
    for words, part in (
        ("Layers before the last", scores),
        ("Of these, layers behind the first", [s for s in scores if not s.first]),
    ):
        if not part:
            continue
        count, flat = len(part), sum(s.found == "none" for s in part)
        line = [s.line_error for s in part if s.applies]
        out.notes.append(
            f"{words}: the published rule (a peak near k = m where τ_m γ₁ > τ₁ γ₂, elsewhere "
            f"early or late) is right in {sum(s.rule_right for s in part)} of {count} cases"
            + (f", its height (t·t′)² off by {fmean(line):.3f}" if line else "")
            + ". Carried on to all input directions it names the kind in "
            f"{sum(s.predicted == s.found for s in part)} of {count}"
            + (f" ({flat} without a peak)" if flat else "")
            + f", its height off by {fmean(s.height_error for s in part):.3f}."
        )


def _two_or_more_seeds(lab: Lab) -> list[int]:
    seeds = lab.seeds()
    if len(seeds) < 2:
        raise ValueError(f"seeds must be at least 2 to compare models, got {len(seeds)}")
    return seeds


def _compare(lab: Lab, network: Network, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Curves of all pairs of seeds, exact and of the Kronecker forms, and predictions."""
    if name not in lab.factors(network, seeds[0]):
        raise ValueError(f"{network.name} has no layer {name!r} to compare")
    factors = {seed: lab.factors(network, seed)[name] for seed in seeds}
    m, d = factors[seeds[0]].layer_shape
    reference = published.BETWEEN.get((network.data, strip_power(network.model)), {})
    wanted = max(math.ceil(2.25 * m), lab.top, reference.get(name, (0, 0.0))[0])
    affordable = _PAIR_BUDGET // (4 * m * d)
    k = max(1, min(wanted, m * d, affordable))
    pairs: dict[int, Tensor] = {
        seed: lab.eigenpairs(network, seed, name, lab.top).vectors for seed in seeds
    }
    forms = {seed: f.eigsh(k).vectors for seed, f in factors.items()}
    found: dict[str, Any] = {"outputs": m, "parameters": m * d, "exact": [], "kronecker": []}
    found["predictions"] = []
    for first, second in pairs_of(seeds):
        found["exact"].append(subspace_overlap(pairs[first], pairs[second]).tolist())
        found["kronecker"].append(subspace_overlap(forms[first], forms[second]).tolist())
        prediction = predict_overlap(factors[first], factors[second], k)
        found["predictions"].append(
            {
                "applies": prediction.applies,
                "squared_cosine": prediction.squared_cosine,
                "kind": prediction.kind,
                "peak": prediction.peak,
                "curve": prediction.curve.tolist(),
            }
        )
    return found


def _between_chart(network: Network, name: str, index: int, found: dict[str, Any]) -> Chart:
    m = found["outputs"]
    longest = len(found["kronecker"][0])
    curves = [
        Curve("Kronecker form", found["kronecker"], colour=index, style="dashed"),
        Curve("exact H", found["exact"], colour=index),
        Curve(
            "predicted",
            [p["curve"] for p in found["predictions"]],
            colour=6,
            style="dotted",
        ),
    ]
    reference = published.BETWEEN.get((network.data, strip_power(network.model)), {})
    if name in reference:
        k, figure = reference[name]
        curves.append(published_points("published", [[figure]], [float(k)], 6))
    return Chart(
        f"between-{name}-{network.data}-{strip_power(network.model)}",
        f"{name}, {network.name}",
        K_AXIS,
        "overlap between models",
        curves,
        mark=(m, f"k = m = {m}") if m <= longest else None,
    )


def _prediction_row(
    network: Network, name: str, found: dict[str, Any]
) -> tuple[list[str], list[_Score]]:
    """A line of the predictor's table, and the scores of the pairs with long enough curves."""
    m, predictions = found["outputs"], found["predictions"]
    curves, foretold = found["kronecker"], [p["curve"] for p in predictions]
    tops = [[_highest(curve, m) for curve in both] for both in (foretold, curves)]
    scores = [
        _Score(
            False,
            prediction["applies"],
            prediction["kind"],
            classify_peak(curve, m),
            abs(curve[m - 1] - prediction["squared_cosine"]),
            abs(_highest(prediction["curve"], m)[1] - _highest(curve, m)[1]),
        )
        for curve, prediction in zip(curves, predictions, strict=True)
        if len(curve) >= 1.25 * m
    ]
    height = [curve[m - 1] for curve in curves if len(curve) >= m]
    return [
        f"{name} of {network.name}",
        _counted([str(p["applies"]).lower() for p in predictions]),
        _counted([p["kind"] for p in predictions]),
        _counted([score.found for score in scores]) or "–",
        *(spread_words((top[0] for top in both), 0) for both in tops),
        *(spread_words(top[1] for top in both) for both in tops),
        f"{sum(p['squared_cosine'] for p in predictions) / len(predictions):.3f}",
        f"{sum(height) / len(height):.3f}" if height else "–",
    ], scores


def _highest(curve: Sequence[float], outputs: int) -> tuple[float, float]:
    """Position and value of a curve's peak."""
    position = peak_position(curve, outputs)
    return float(position), curve[position - 1]


def _counted(words: Sequence[str]) -> str:
    """``normal (2), early (1)``, or a single word where all are the same."""
    kinds = dict.fromkeys(words)
    if len(kinds) == 1:
        return words[0]
    return ", ".join(f"{kind} ({list(words).count(kind)})" for kind in kinds)


def width_variants(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """fc1 of LeNet5 with different widths: overlap between models at k = m."""
    out = Outcome()
    curves = []
    scores: list[_Score] = []
    rows: list[list[str]] = []
    for index, network in enumerate(networks):
        found = _compare(lab, network, "fc1", _two_or_more_seeds(lab))
        out.numbers[network.name] = found
        m = found["outputs"]
        curves.append(Curve(f"m = {m}", found["kronecker"], colour=index))
        row, cases = _prediction_row(network, "fc1", found)
        rows.append(row)
        scores += cases
        if len(found["kronecker"][0]) >= m:
            figure = published.LENET5_WIDTHS.get(m) if "lenet5" in network.model else None
            out.verdicts.append(
                judge(
                    f"fc1 of {network.name}, m = {m}: overlap between models at k = m",
                    [curve[m - 1] for curve in found["kronecker"]],
                    figure,
                    within=None if figure is None else _BETWEEN_WITHIN,
                    withheld=lab.withheld(network) or ("" if figure else "no published figure"),
                )
            )
    out.charts.append(
        Chart(
            "widths",
            "fc1 with different widths m (Kronecker forms)",
            K_AXIS,
            "overlap between models",
            curves,
        )
    )
    _add_predictor(out, rows, scores)
    return out
