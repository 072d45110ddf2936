"""What the items about factors and eigenvectors compare with published figures."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from judging import (
    BN,
    CLASSES,
    EDGES,
    LAYERS,
    LIMIT,
    PLAIN,
    SEEDS,
    at,
    by_name,
    check,
    exact,
    overlaps_of_pairs,
)
from torch import nn

import hesskern as hk
from hesskern.apps.reproduce import beyond, factors, published, vectors
from hesskern.apps.reproduce.lab import Network


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
