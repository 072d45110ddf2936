"""What the items about eigenspaces compare with published figures, and by which rules.

The figures are moved over the edge of their tolerances (tests/judging.py).
"""

from dataclasses import replace
from statistics import fmean

import pytest
from judging import (
    BN,
    EDGES,
    LAYERS,
    LIMIT,
    PLAIN,
    SEEDS,
    at,
    by_name,
    check,
    exact,
    kronecker,
    lab_of,
    overlaps_of_pairs,
    pairs,
    publish_between,
    publish_overlaps,
)

import hesskern as hk
from hesskern.apps.reproduce import between, factors, overlaps, published, vectors
from hesskern.apps.reproduce.lab import Network
from hesskern.diagnostics.predictor import peak_position


def overlap_curves(lab, network=PLAIN):
    """Of H and its Kronecker form, by layer and seed."""
    curves = {}
    for layer in LAYERS:
        forms = kronecker(lab, network, layer, 24)
        curves[layer] = [
            hk.subspace_overlap(U, V).tolist()
            for U, V in zip(exact(lab, network, layer), forms, strict=True)
        ]
    return curves


@EDGES
def test_overlap_of_the_hessian_and_its_form(lab, monkeypatch, moved, agrees):
    curves, ks = overlap_curves(lab), [1, 5, 24]
    figures = {
        layer: [fmean(at(curves[layer], k)) + moved * 0.03 for k in ks] for layer in LAYERS[:2]
    }
    # There are 24 pairs, so a figure further out has nothing beside it.
    publish_overlaps(monkeypatch, [*ks, 40], {n: [*row, 0.5] for n, row in figures.items()})
    outcome = overlaps.hessian_and_kronecker(lab, [PLAIN])
    found = by_name(outcome)
    assert len(found) == 7
    for layer in LAYERS[:2]:
        for k, figure in zip(ks, figures[layer], strict=True):
            verdict = found[f"{layer} of F-16² on MNIST: overlap at k = {k}"]
            check(verdict, at(curves[layer], k), f"{figure:g}", "within 0.03", agrees)
    last = found["fc3 of F-16² on MNIST: overlap at k = 9"]
    check(last, at(curves["fc3"], 9), "", "", None, "no published figure")
    points = [curve for curve in outcome.charts[0].curves if curve.published]
    assert [(c.x, c.values) for c in points] == [([1, 5, 24], [figures[n]]) for n in LAYERS[:2]]


def test_overlaps_without_published_figures(lab, monkeypatch):
    publish_overlaps(monkeypatch, [1], {layer: [0.5] for layer in LAYERS})
    network = replace(PLAIN, model="f12x2")
    curves = overlap_curves(lab, network)
    found = by_name(overlaps.hessian_and_kronecker(lab, [network]))
    assert len(found) == 3
    for layer in LAYERS:
        verdict = found[f"{layer} of F-12² on MNIST: overlap at k = 9"]
        check(verdict, at(curves[layer], 9), "", "", None, "no published figure")


def full_curves(lab, network):
    """Of the full Gauss-Newton matrix and its two forms, by label and seed."""
    curves = {"published form": [], "lengths kept": []}
    for seed in SEEDS:
        G = lab.full(network, seed)
        top = lab.full_eigenpairs(network, seed, 24, G).vectors
        stacked = G.stacked()
        forms = (stacked.published_vectors(24), stacked.eigsh(24).vectors)
        for label, form in zip(curves, forms, strict=True):
            curves[label].append(hk.subspace_overlap(top, form).tolist())
    return curves


@EDGES
@pytest.mark.parametrize("label", ["published form", "lengths kept"])
def test_full_hessian(lab, monkeypatch, label, moved, agrees):
    curves, ks = full_curves(lab, PLAIN), [1, 9, 20]
    figures = [fmean(at(curves[label], k)) + moved * 0.03 for k in ks]
    table = {"f16x2": {"k": [*ks, 30], "overlap": [*figures, 0.5]}}
    monkeypatch.setattr(published, "FULL_OVERLAP", table)
    outcome = overlaps.full_hessian(lab, [PLAIN])
    found = by_name(outcome)
    assert len(found) == 6
    for k, figure in zip(ks, figures, strict=True):
        verdict = found[f"F-16² on MNIST, {label}: overlap at k = {k}"]
        check(verdict, at(curves[label], k), f"{figure:g}", "within 0.03", agrees)
    assert outcome.charts[0].curves[-1].published


def test_full_hessian_without_published_figures(lab, monkeypatch):
    table = {"f16x2": {"k": [1], "overlap": [0.5]}}
    monkeypatch.setattr(published, "FULL_OVERLAP", table)
    # The figures are of MNIST alone.
    for network in (replace(PLAIN, data="digits"), replace(PLAIN, model="f12x2")):
        curves = full_curves(lab, network)
        outcome = overlaps.full_hessian(lab, [network])
        found = by_name(outcome)
        assert len(found) == 2
        for label, rows in curves.items():
            verdict = found[f"{network.name}, {label}: overlap at k = 9"]
            check(verdict, at(rows, 9), "", "", None, "no published figure")
        assert not any(curve.published for curve in outcome.charts[0].curves)


@EDGES
def test_overlap_between_models(lab, folder, monkeypatch, moved, agrees):
    of_exact = {layer: overlaps_of_pairs(exact(lab, PLAIN, layer, 12)) for layer in LAYERS}
    of_forms = overlaps_of_pairs(kronecker(lab, PLAIN, "fc2", 36))
    ours = {
        "fc1": (3, "exact H", at(of_exact["fc1"], 3)),
        # There are 12 exact pairs.
        "fc2": (20, "Kronecker form", at(of_forms, 20)),
        "fc3": (12, "exact H", at(of_exact["fc3"], 12)),
    }
    layers = {n: (k, fmean(values) + moved * 0.05) for n, (k, _, values) in ours.items()}
    publish_between(monkeypatch, layers)
    outcome = between.between_models(lab_of(folder, 12), [PLAIN])
    found = {what: v for what, v in by_name(outcome).items() if ": overlap" in what}
    assert len(found) == 3
    for layer, (k, form, values) in ours.items():
        what = f"{layer} of F-16² on MNIST: overlap between models at k = {k} ({form})"
        check(found[what], values, f"{layers[layer][1]:g}", "within 0.05", agrees)
    charts = {chart.name: chart for chart in outcome.charts}
    for layer, (k, figure) in layers.items():
        point = charts[f"between-{layer}-mnist-f16x2"].curves[-1]
        assert (point.published, point.x, point.values) == (True, [k], [[figure]])


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_peak_between_models(folder, monkeypatch, layer):
    lab = lab_of(folder, 36)
    curves = overlaps_of_pairs(exact(lab, PLAIN, layer, 36))
    peaks = [float(peak_position(curve, 16)) for curve in curves]
    mean = fmean(peaks)
    low, high = round(mean / 1.25), round(mean / 0.8)
    verdicts = set()
    for k in (low - 1, low + 1, high - 1, high + 1):
        publish_between(monkeypatch, {layer: (k, 0.5)})
        found = by_name(between.between_models(lab, [PLAIN]))
        assert len(found) == 2
        rule = f"in [{0.8 * k:g}, {1.25 * k:g}]"
        agrees = 0.8 * k <= mean <= 1.25 * k
        verdict = found[f"{layer} of F-16² on MNIST: k of the peak (exact H)"]
        check(verdict, peaks, f"{k}", rule, agrees)
        verdicts.add((k < mean, agrees))
    assert len(verdicts) == 4


def test_which_curves_have_a_peak_to_judge(lab, folder, monkeypatch):
    publish_between(monkeypatch, dict.fromkeys(LAYERS, (9, 0.5)))
    # Twenty pairs are 5/4 of the 16 outputs; those of the last layer are the classes.
    for top, form in ((19, "Kronecker form"), (20, "exact H")):
        outcome = between.between_models(lab_of(folder, top), [PLAIN])
        judged = [v for v in outcome.verdicts if "k of the peak" in v.what]
        assert [v.what.split()[0] for v in judged] == ["fc1", "fc2"]
        assert all(v.what.endswith(f"k of the peak ({form})") for v in judged)
        if form != "exact H":
            curves = overlaps_of_pairs(kronecker(lab, PLAIN, "fc2", 36))
            assert judged[1].ours == fmean(peak_position(curve, 16) for curve in curves)


@EDGES
def test_batch_norm_between_models(lab, monkeypatch, moved, agrees):
    values = at(overlaps_of_pairs(kronecker(lab, BN, "fc2", 36)), 16)
    figure = fmean(values) + moved * 0.05
    publish_between(monkeypatch, {}, figure)
    found = by_name(between.between_models(lab, [BN, PLAIN]))
    (what,) = found
    assert what == (
        "fc2 of F-16² with batch norm on MNIST: overlap between models at k = m = 16 "
        "(Kronecker form)"
    )
    check(found[what], values, f"{figure:g}", "within 0.05", agrees)


def scores_of(lab, network, layer, m, k):
    """Per pair of models: condition, kind predicted and found, both errors of heights."""
    curves = overlaps_of_pairs(kronecker(lab, network, layer, k))
    of = pairs([lab.factors(network, seed)[layer] for seed in SEEDS])
    for both, curve in zip(of, curves, strict=True):
        predicted = hk.predict_overlap(*both, k)
        tops = [c[peak_position(c, m) - 1] for c in (predicted.curve.tolist(), curve)]
        yield (
            predicted.applies,
            predicted.kind,
            hk.classify_peak(curve, m),
            pytest.approx(abs(curve[m - 1] - predicted.squared_cosine), abs=1e-6),
            pytest.approx(abs(tops[0] - tops[1]), abs=1e-6),
        )


SCORE = ("applies", "predicted", "found", "line_error", "height_error")


def test_scores_of_the_predictor(lab, monkeypatch):
    publish_between(monkeypatch, {})
    expected = [score for layer in LAYERS[:2] for score in scores_of(lab, PLAIN, layer, 16, 36)]
    outcome = between.between_models(lab, [PLAIN])
    scores = outcome.numbers["scores"]
    assert [tuple(score[key] for key in SCORE) for score in scores] == expected
    assert [score["first"] for score in scores] == [True] * 3 + [False] * 3
    kinds = [predicted == found for _, predicted, found, _, _ in expected]
    assert 0 < sum(kinds) < 6
    assert f"names the kind in {sum(kinds)} of 6" in outcome.notes[0]
    assert f"names the kind in {sum(kinds[3:])} of 3" in outcome.notes[1]
    rule = [applies == (found == "normal") for applies, _, found, _, _ in expected]
    assert f"is right in {sum(rule)} of 6 cases" in outcome.notes[0]
    flat = sum(found == "none" for _, _, found, _, _ in expected)
    assert (f"({flat} without a peak)" in outcome.notes[0]) == (flat > 0)
    off = fmean(score["height_error"] for score in scores)
    assert f"its height off by {off:.3f}." in outcome.notes[0]


@EDGES
def test_widths(lab, monkeypatch, moved, agrees):
    widths = {"lenet5": 16, "lenet5-w12": 12, "lenet5-w14": 14, "f16x2": 16}
    networks = {model: replace(PLAIN, model=model) for model in widths}
    values = {
        model: at(overlaps_of_pairs(kronecker(lab, networks[model], "fc1", m * 9 // 4)), m)
        for model, m in widths.items()
    }
    figures = {widths[n]: fmean(values[n]) + moved * 0.05 for n in ("lenet5", "lenet5-w12")}
    monkeypatch.setattr(published, "LENET5_WIDTHS", figures)
    outcome = between.width_variants(lab, list(networks.values()))
    found = by_name(outcome)
    assert len(found) == 4
    for model, m in widths.items():
        name = networks[model].name
        verdict = found[f"fc1 of {name}, m = {m}: overlap between models at k = m"]
        if model in ("lenet5", "lenet5-w12"):
            check(verdict, values[model], f"{figures[m]:g}", "within 0.05", agrees)
        else:
            check(verdict, values[model], "", "", None, "no published figure")
    expected = [
        score
        for n, m in widths.items()
        for score in scores_of(lab, networks[n], "fc1", m, m * 9 // 4)
    ]
    scores = outcome.numbers["scores"]
    assert [tuple(score[key] for key in SCORE) for score in scores] == expected


def test_nothing_is_judged_where_the_lab_withholds(lab, folder, monkeypatch):
    publish_overlaps(monkeypatch, [1], {layer: [0.5] for layer in LAYERS})
    publish_between(monkeypatch, dict.fromkeys(LAYERS, (9, 0.5)))
    monkeypatch.setattr(published, "FULL_OVERLAP", {"f16x2": {"k": [1], "overlap": [0.5]}})
    monkeypatch.setattr(published, "LENET5_WIDTHS", {16: 0.5})
    monkeypatch.setattr(
        published,
        "AUTOCORRELATION",
        {("mnist", network.model): {"fc": (0.5, 5.0, (1.0, 9.0))} for network in (PLAIN, BN)},
    )
    monkeypatch.setattr(published, "ROW_SPACE", {("mnist", "f16x2"): dict.fromkeys(LAYERS, 0.5)})
    monkeypatch.setattr(published, "RANK_ONE", dict.fromkeys(LAYERS, (6, 0.0, 1.0)))
    items = {
        overlaps.hessian_and_kronecker: PLAIN,
        overlaps.full_hessian: PLAIN,
        between.between_models: BN,
        between.width_variants: replace(PLAIN, model="lenet5"),
        factors.autocorrelation: BN,
        factors.row_space: PLAIN,
        vectors.rank_one: Network("cifar10", "lenet5", limit=LIMIT),
    }
    silent = lab_of(folder, 24, "other training")
    for item, network in items.items():
        networks = [network, PLAIN] if network is BN else [network]
        assert all(verdict.agrees is not None for verdict in item(lab, networks).verdicts)
        withheld = item(silent, networks).verdicts
        assert withheld
        assert {(verdict.agrees, verdict.note) for verdict in withheld} == {
            (None, "other training")
        }
