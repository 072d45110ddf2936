"""What the items of ``hesskern reproduce`` compare with published figures, and by which rules.

The published tables are replaced by figures for small networks on the digits, so that every verdict
can be computed a second time here and moved over the edge of its tolerance.
"""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import nn

import hesskern as hk
from hesskern.apps.reproduce import between, beyond, factors, overlaps, published, vectors
from hesskern.apps.reproduce.lab import Lab, Network, Overrides
from hesskern.diagnostics.predictor import peak_position
from hesskern.zoo import models

LIMIT, EPOCHS, SEEDS, CLASSES = 200, 2, (0, 1, 2), 10
PLAIN = Network("mnist", "f16x2", limit=LIMIT)
BN = Network("mnist", "f16x2-bn", limit=LIMIT)
LAYERS = ("fc1", "fc2", "fc3")
# Names that the items give a meaning to, and the small networks behind them here.
STANDING_FOR = {"lenet5": "f16x2", "lenet5-w12": "f12x2", "lenet5-w14": "f14x2"}
# A figure moved by so many tolerances, and whether it still agrees.
EDGES = pytest.mark.parametrize(
    ("moved", "agrees"), [(-1.02, False), (-0.98, True), (0.98, True), (1.02, False)]
)


class Judging(Lab):
    """The digits stand behind every data set; verdicts are withheld for ``reason`` alone."""

    reason = ""

    def data(self, network):
        return super().data(replace(network, data="digits"))

    def withheld(self, network):
        return self.reason


def convolutions(classes):
    """Two convolutions and two fully connected layers on 64 inputs."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, classes),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture
def lab(folder, monkeypatch):
    build = models.build
    monkeypatch.setattr(
        models, "build", lambda model, *rest: build(STANDING_FOR.get(model, model), *rest)
    )
    return lab_of(folder, 24)


def lab_of(folder, top, reason=""):
    overrides = Overrides(epochs=EPOCHS, seeds=len(SEEDS), top=top)
    found = Judging(folder, overrides=overrides)
    found.reason = reason
    return found


def pairs(values):
    return [(values[0], values[1]), (values[0], values[2]), (values[1], values[2])]


def exact(lab, network, layer, k=24):
    return [lab.eigenpairs(network, seed, layer, k).vectors for seed in SEEDS]


def kronecker(lab, network, layer, k):
    return [lab.factors(network, seed)[layer].eigsh(k).vectors for seed in SEEDS]


def overlaps_of_pairs(spaces):
    """Overlap curves of all pairs."""
    return [hk.subspace_overlap(U, V).tolist() for U, V in pairs(spaces)]


def at(curves, k):
    return [curve[k - 1] for curve in curves]


def check(verdict, ours, published_text, rule, agrees, note=""):
    assert verdict.ours == pytest.approx(fmean(ours), abs=1e-6), verdict.what
    assert verdict.low == pytest.approx(min(ours), abs=1e-6)
    assert verdict.high == pytest.approx(max(ours), abs=1e-6)
    assert verdict.count == len(ours)
    assert (verdict.published, verdict.rule) == (published_text, rule)
    assert verdict.agrees is agrees, verdict.what
    assert verdict.note == note


def by_name(outcome):
    found = {verdict.what: verdict for verdict in outcome.verdicts}
    assert len(found) == len(outcome.verdicts)
    return found


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


def publish_overlaps(monkeypatch, ks, layers):
    table = {"overlap": {"k": ks, "layers": layers}, "eigenvalues": {}}
    monkeypatch.setattr(
        published,
        "figures_for",
        lambda data, model: table if (data, model) == ("mnist", "f16x2") else None,
    )


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


def publish_between(monkeypatch, layers, batch_norm=0.5):
    monkeypatch.setattr(published, "BETWEEN", {("mnist", "f16x2"): layers})
    monkeypatch.setattr(published, "BETWEEN_BATCH_NORM", batch_norm)


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


def inputs_of(lab, network, layers):
    found = [
        hk.input_autocorrelation(lab.factors(network, seed)[layer])
        for seed in SEEDS
        for layer in layers
    ]
    return [f.mean_alignment for f in found], [f.eigenvalue_ratio for f in found]


@pytest.mark.parametrize(
    ("network", "low", "high"),
    [(PLAIN, 0.99, 1.0), (BN, 0.0, 0.3)],
    ids=["plain", "with batch norm"],
)
def test_autocorrelation(lab, monkeypatch, network, low, high):
    aligned, ratios = inputs_of(lab, network, ("fc2", "fc3"))
    mean, name = fmean(ratios), f"{network.name}, fully connected layers"
    for span, agrees in (
        ((mean - 0.01, mean + 1), True),
        ((mean + 0.01, mean + 1), False),
        ((mean - 1, mean + 0.01), True),
        ((mean - 1, mean - 0.01), False),
    ):
        table = {(network.data, network.model): {"fc": (0.9876, 5.25, span)}}
        monkeypatch.setattr(published, "AUTOCORRELATION", table)
        outcome = factors.autocorrelation(lab, [network])
        found = by_name(outcome)
        assert len(found) == 2
        rule = f"in [{low:g}, {high:g}]"
        judged = low <= fmean(aligned) <= high
        check(found[f"{name}: (v₁·E[x])² / ‖E[x]‖²"], aligned, "0.988", rule, judged)
        words = f"[{span[0]:g}, {span[1]:g}]"
        check(found[f"{name}: λ₁ / λ₂ of E[x xᵀ]"], ratios, f"5.25 {words}", f"in {words}", agrees)
    (row,) = outcome.tables[0].rows
    assert row[:3] == [name, f"{fmean(aligned):.3f}", "0.988"]
    assert row[3] == f"{mean:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    assert row[4] == f"5.25 [{span[0]:.2f}, {span[1]:.2f}]"


@pytest.mark.parametrize(
    ("network", "value", "agrees"),
    [
        (PLAIN, 0.9895, False),
        (PLAIN, 0.9905, True),
        (BN, 0.2995, True),
        (BN, 0.3005, False),
    ],
)
def test_alignment_at_its_bounds(lab, monkeypatch, network, value, agrees):
    table = {(network.data, network.model): {"fc": (0.5, 5.0, None)}}
    monkeypatch.setattr(published, "AUTOCORRELATION", table)
    fixed = hk.InputAutocorrelation(value, 5.0)
    monkeypatch.setattr(factors, "input_autocorrelation", lambda of: fixed)
    aligned, ratio = factors.autocorrelation(lab, [network]).verdicts
    assert (aligned.ours, aligned.agrees) == (pytest.approx(value), agrees)
    # A mean without a range says nothing of what is far from it.
    assert (ratio.published, ratio.rule, ratio.agrees) == ("5", "", None)
    assert ratio.note == "published without a range"


def test_autocorrelation_of_both_kinds_of_layers(lab, monkeypatch):
    network = replace(PLAIN, model=f"{__name__}:convolutions")
    table = {("mnist", network.model): {"conv": (0.99, 5.0, (1.0, 9.0))}}
    monkeypatch.setattr(published, "AUTOCORRELATION", table)
    found = by_name(factors.autocorrelation(lab, [network]))
    assert len(found) == 4
    for words, layers in (("conv", ("3",)), ("fully connected", ("6", "8"))):
        aligned, ratios = inputs_of(lab, network, layers)
        first = found[f"{network.name}, {words} layers: (v₁·E[x])² / ‖E[x]‖²"]
        second = found[f"{network.name}, {words} layers: λ₁ / λ₂ of E[x xᵀ]"]
        if words == "conv":
            judged = 0.99 <= fmean(aligned) <= 1
            check(first, aligned, "0.990", "in [0.99, 1]", judged)
            check(second, ratios, "5 [1, 9]", "in [1, 9]", 1 <= fmean(ratios) <= 9)
        else:
            check(first, aligned, "", "", None, "no published figure")
            check(second, ratios, "", "", None, "not published")


@EDGES
def test_row_space(lab, monkeypatch, moved, agrees):
    values = {layer: [] for layer in LAYERS}
    for seed in SEEDS:
        weights = [getattr(lab.model(PLAIN, seed), name).weight for name in LAYERS]
        for position, layer in enumerate(LAYERS):
            S = hk.weight_product(weights[position + 1 :], CLASSES)
            M = lab.factors(PLAIN, seed)[layer].output_hessian
            values[layer].append(hk.row_space_overlap(S, M).orthogonal)
    figures = {layer: fmean(values[layer]) + moved * 0.03 for layer in LAYERS[:2]}
    monkeypatch.setattr(published, "ROW_SPACE", {("mnist", "f16x2"): figures})
    outcome = factors.row_space(lab, [PLAIN])
    found = by_name(outcome)
    assert len(found) == 3
    for layer in LAYERS:
        verdict = found[f"{layer} of F-16² on MNIST: row space of S without 1ᵀS"]
        if layer in figures:
            check(verdict, values[layer], f"{figures[layer]:g}", "within 0.03", agrees)
        else:
            check(verdict, values[layer], "", "", None, "no published figure")
    shown = [f"{figures['fc1']:.3f}", f"{figures['fc2']:.3f}", "–"]
    assert [row[2] for row in outcome.tables[0].rows] == shown


def test_output_spectra_beside_the_number_of_classes(lab):
    noise = replace(PLAIN, random_labels=True)
    outcome = factors.output_spectra(lab, [PLAIN, noise])
    found = by_name(outcome)
    stages = {
        "initialization": (PLAIN, 0),
        "after training": (PLAIN, None),
        "random labels": (noise, None),
    }
    # The last layer has no tenth output to compare with.
    assert len(found) == 6
    for stage, (network, epochs) in stages.items():
        for layer in LAYERS[:2]:
            gaps = []
            for seed in SEEDS:
                M = lab.factors(network, seed, epochs)[layer].output_hessian
                values = torch.linalg.eigvalsh(M.double()).flip(0)
                gaps.append(float(values[8] / values[9]))
            verdict = found[f"{layer}, {stage}: λ_(c−1) / λ_c of E[M]"]
            assert verdict.ours == pytest.approx(fmean(gaps), rel=1e-6)
            assert (verdict.published, verdict.note) == (
                "c − 1 eigenvalues stand out",
                "published as a plot",
            )
            assert (verdict.rule, verdict.agrees) == ("", None)
        fits = [lab.training(network, seed, epochs)["train_accuracy"] for seed in SEEDS]
        assert outcome.numbers["train accuracy"][stage] == fits
        assert f"{stage} {100 * fmean(fits):.1f} %" in outcome.notes[0]


@pytest.mark.parametrize(
    ("low", "high", "agrees"),
    [(-0.001, 0.01, True), (0.001, 0.01, False), (-0.01, 0.001, True), (-0.01, -0.001, False)],
)
def test_rank_one(lab, monkeypatch, low, high, agrees):
    network = Network("cifar10", "lenet5", limit=LIMIT)
    means, counts = {}, {"fc1": 6, "fc2": 14, "fc3": 9}
    for layer, count in counts.items():
        shape = lab.factors(network, 0)[layer].layer_shape
        means[layer] = [
            float(hk.rank_one_ratio(V, shape)[:count].double().mean())
            for V in exact(lab, network, layer)
        ]
    figures = {
        layer: (counts[layer], fmean(means[layer]) + low, fmean(means[layer]) + high)
        for layer in LAYERS[:2]
    }
    monkeypatch.setattr(published, "RANK_ONE", figures)
    found = by_name(vectors.rank_one(lab, [network]))
    assert len(found) == 3
    for layer, count in counts.items():
        verdict = found[
            f"{layer} of LeNet5 on CIFAR-10: mean ratio of the first {count} eigenvectors"
        ]
        if layer in figures:
            _, first, last = figures[layer]
            text, rule = f"{first:g} to {last:g}", f"in [{first:g}, {last:g}]"
            check(verdict, means[layer], text, rule, agrees)
        else:
            check(verdict, means[layer], "", "", None, "no published figure")


def test_rank_one_figures_are_of_one_network(lab, monkeypatch):
    monkeypatch.setattr(published, "RANK_ONE", dict.fromkeys(LAYERS, (6, 0.0, 1.0)))
    for network in (PLAIN, replace(PLAIN, model="lenet5"), replace(PLAIN, data="cifar10")):
        for verdict in vectors.rank_one(lab, [network]).verdicts:
            assert verdict.what.endswith("mean ratio of the first 9 eigenvectors")
            assert (verdict.published, verdict.agrees) == ("", None)
            assert verdict.note == "no published figure"


def test_correspondence(lab):
    found = by_name(vectors.correspondence(lab, [PLAIN]))
    # What the first layer sees has no mean to stand along.
    assert len(found) == 5
    for layer in LAYERS:
        rows, diagonals = [], []
        for seed, H in zip(SEEDS, exact(lab, PLAIN, layer), strict=True):
            of = lab.factors(PLAIN, seed)[layer]
            u, v = (
                torch.linalg.eigh(A.double()).eigenvectors.flip(1)
                for A in (of.output_hessian, of.input_covariance)
            )
            h = H.T.double().reshape(24, *of.layer_shape)[:9]
            rows.append(float((h @ v[:, 0]).square().sum(1).mean()))
            diagonals.append(fmean(float((h[i].T @ u[:, i]).square().sum()) for i in range(9)))
        name = f"{layer} of F-16² on MNIST"
        diagonal = found[f"{name}: mean of the output side's diagonal up to 9"]
        note = "published as a heat map"
        assert diagonal.ours == pytest.approx(fmean(diagonals), abs=1e-5)
        assert (diagonal.published, diagonal.agrees, diagonal.note) == ("dark diagonal", None, note)
        if layer != "fc1":
            row = found[f"{name}: weight of the first 9 eigenvectors on v₁"]
            assert row.ours == pytest.approx(fmean(rows), abs=1e-5)
            assert (row.published, row.agrees, row.note) == ("dark first row", None, note)


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


def normalized(lab, network, centred=False):
    """What the normalization item says of a network, computed once more."""
    by_seed = []
    for seed in SEEDS:
        model, batches = lab.model(network, seed), lab.batches(network)
        of = lab.factors(network, seed)
        names = list(of)[1:]
        if centred:
            model = hk.centre_inputs(model, batches)
            of = hk.kronecker_factors(model, batches, nn.CrossEntropyLoss())
            hessians = hk.layer_hessians(model, batches, nn.CrossEntropyLoss(), names)
            tops = {
                name: torch.linalg.eigh(hessians[name].to_dense().double()).eigenvectors.flip(1)
                for name in names
            }
        else:
            tops = {name: lab.eigenpairs(network, seed, name, 9).vectors for name in names}
        by_seed.append((of, tops))
    expected = {}
    for name in names:
        m = by_seed[0][0][name].layer_shape[0]
        numbers = [hk.input_autocorrelation(of[name]) for of, _ in by_seed]
        expected[name] = {
            "aligned": [n.mean_alignment for n in numbers],
            "ratio": [n.eigenvalue_ratio for n in numbers],
            "overlap": [
                float(hk.subspace_overlap(tops[name][:, :9].float(), of[name].eigsh(9).vectors)[-1])
                for of, tops in by_seed
            ],
            "between": at(overlaps_of_pairs([of[name].eigsh(m).vectors for of, _ in by_seed]), m),
        }
    return expected


def test_numbers_of_normalization(lab):
    outcome = beyond.normalization(lab, [PLAIN, BN])
    expected = {
        "F-16² on MNIST": normalized(lab, PLAIN),
        "F-16² on MNIST, activations centred": normalized(lab, PLAIN, centred=True),
        "F-16² with batch norm on MNIST": normalized(lab, BN),
    }
    assert list(outcome.numbers) == list(expected)
    rows = iter(outcome.tables[0].rows)
    for label, layers in expected.items():
        assert list(outcome.numbers[label]) == ["fc2", "fc3"]
        for name, values in layers.items():
            found, row = outcome.numbers[label][name], next(rows)
            assert row[0] == f"{name} of {label}"
            assert found["ratio"] == pytest.approx(values["ratio"], rel=1e-4)
            assert found["overlap"] == pytest.approx(values["overlap"], abs=1e-3)
            assert found["between"] == pytest.approx(values["between"], abs=1e-4)
            if "centred" in label:
                assert row[1] == "–"
            else:
                assert found["aligned"] == pytest.approx(values["aligned"], abs=1e-6)
                assert row[1].startswith(f"{fmean(values['aligned']):.3f} [")
            for text, key, digits in zip(
                row[2:], ("ratio", "overlap", "between"), (2, 3, 3), strict=True
            ):
                assert float(text.split()[0]) == pytest.approx(
                    fmean(found[key]), abs=0.51 * 10**-digits
                )
    assert not outcome.verdicts


def test_shares_of_the_clusters(lab):
    found = beyond.clusters(lab, [PLAIN]).numbers["F-16² on MNIST"]
    assert list(found) == [
        f"{layer}, {stage}"
        for stage in ("initialization", "after training")
        for layer in LAYERS[:2]
    ]
    for stage, epochs in (("initialization", 0), ("after training", None)):
        for layer in LAYERS[:2]:
            shares = [
                hk.gradient_clusters(lab.model(PLAIN, seed, epochs), lab.batches(PLAIN), layer)
                for seed in SEEDS
            ]
            entry = found[f"{layer}, {stage}"]
            assert entry["logit"] == pytest.approx([s.by_logit for s in shares])
            assert entry["class"] == pytest.approx([s.by_class for s in shares])
            assert entry["both"] == pytest.approx([s.by_both for s in shares])
