"""What the items of ``hesskern reproduce`` find in small networks, computed once more."""

import json
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from tiny_lab import FOLDER, TINY, network
from torch import nn

import hesskern as hk
from hesskern.apps.reproduce import (
    architectures,
    between,
    beyond,
    factors,
    overlaps,
    positions,
    published,
    vectors,
)
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.diagnostics import functional
from hesskern.zoo import data


def test_overlap_item_holds_the_dense_overlap(tiny, everything):
    layer = "fc2"
    sample = data.load("digits", limit=200)
    model = tiny.model(network(tiny), 1)
    H = hk.AutogradHessian(
        model, sample.batches(200), nn.CrossEntropyLoss(), params=[f"{layer}.weight"]
    ).to_dense()
    K = hk.kronecker_factors(model, sample.batches(200), nn.CrossEntropyLoss())[layer].operator()
    U, V = (torch.linalg.eigh(A.double()).eigenvectors.flip(1) for A in (H, K.to_dense()))
    expected = float((U[:, :5].T @ V[:, :5]).square().sum()) / 5
    result = json.loads((everything[0] / FOLDER / "overlap-f200x2" / "result.json").read_text())
    (numbers,) = result["numbers"].values()
    assert numbers["overlap"][layer][1][4] == pytest.approx(expected, abs=2e-3)
    assert numbers["eigenvalues"][layer]["exact"][1][0] == pytest.approx(
        float(torch.linalg.eigvalsh(H.double())[-1]), rel=1e-4
    )


def test_between_models_and_its_prediction(tiny):
    outcome = between.between_models(tiny, [network(tiny)])
    found = outcome.numbers["F-16² on digits"]["fc2"]
    pair = [tiny.eigenpairs(network(tiny), seed, "fc2", 12).vectors for seed in (0, 1)]
    torch.testing.assert_close(
        torch.tensor(found["exact"][0]).double(), hk.subspace_overlap(*pair), rtol=1e-5, atol=1e-6
    )
    forms = [tiny.factors(network(tiny), seed)["fc2"] for seed in (0, 1)]
    expected = hk.predict_overlap(*forms, k=len(found["kronecker"][0]))
    assert found["predictions"][0]["curve"] == expected.curve.tolist()
    assert len(found["kronecker"][0]) == 36
    observed = hk.classify_peak(found["kronecker"][0], 16)
    row = next(row for row in outcome.tables[0].rows if row[0].startswith("fc2"))
    assert row[1:4] == [str(expected.applies).lower(), expected.kind, observed]
    curve, m = found["kronecker"][0], 16
    scores = outcome.numbers["scores"]
    assert [score["first"] for score in scores] == [True, False]
    assert scores[1]["found"] == observed
    assert scores[1]["predicted"] == expected.kind
    assert scores[1]["applies"] == expected.applies
    assert scores[1]["line_error"] == pytest.approx(abs(curve[m - 1] - expected.squared_cosine))
    heights = max(curve), max(expected.curve.tolist())
    assert scores[1]["height_error"] == pytest.approx(abs(heights[0] - heights[1]), abs=2e-3)
    right = sum(s["predicted"] == s["found"] for s in scores)
    rule = sum(s["applies"] == (s["found"] == "normal") for s in scores)
    assert f"elsewhere early or late) is right in {rule} of 2 cases" in outcome.notes[0]
    assert f"names the kind in {right} of 2" in outcome.notes[0]
    assert outcome.notes[1].startswith("Of these, layers behind the first: ")
    one = Lab(tiny.folder, overrides=replace(TINY, seeds=1))
    with pytest.raises(ValueError, match="seeds must be at least 2 to compare models"):
        between.between_models(one, [network(tiny)])


def test_full_hessian_item(tiny):
    outcome = overlaps.full_hessian(tiny, [network(tiny)])
    batches = tiny.batches(network(tiny))
    G = hk.GaussNewton(tiny.model(network(tiny), 0), batches, nn.CrossEntropyLoss(), bias="joint")
    U = torch.linalg.eigh(G.to_dense().double()).eigenvectors.flip(1)[:, :3].float()
    forms = {"published form": G.stacked().published_vectors(3)}
    forms["lengths kept"] = G.stacked().eigsh(3).vectors
    for name, V in forms.items():
        found = outcome.numbers["F-16² on digits"]["overlap"][name][0][:3]
        torch.testing.assert_close(
            torch.tensor(found).double(), hk.subspace_overlap(U, V), atol=5e-3, rtol=0
        )


def test_items_about_factors(tiny):
    outcome = factors.autocorrelation(tiny, [network(tiny), network(tiny, "f200x2-bn")])
    for name, model in (("F-16² on digits", "f200x2"), ("F-16² with batch norm on digits", None)):
        chosen = network(tiny, model or "f200x2-bn")
        expected = [
            hk.input_autocorrelation(tiny.factors(chosen, seed)[layer]).mean_alignment
            for seed in (0, 1)
            for layer in ("fc2", "fc3")
        ]
        assert outcome.numbers[name]["fc"]["alignment"] == expected
        assert outcome.numbers[name]["fc"]["layers"][1:3] == ["fc3, seed 0", "fc2, seed 1"]
    outcome = factors.row_space(tiny, [network(tiny)])
    model = tiny.model(network(tiny), 0)
    S = model.fc3.weight @ model.fc2.weight
    expected = hk.row_space_overlap(S, tiny.factors(network(tiny), 0)["fc1"].output_hessian)
    found = outcome.numbers["F-16² on digits"]["fc1"]
    assert found["orthogonal"][0] == pytest.approx(expected.orthogonal, abs=1e-5)
    assert found["centred"][0] == pytest.approx(expected.centred, abs=1e-5)
    assert outcome.numbers["F-16² on digits"]["fc3"]["centred"] == pytest.approx([1.0, 1.0])


def test_output_spectra_are_of_three_different_stages(tiny):
    networks = tiny.networks([Network("mnist", "f200x2"), Network("mnist", "f200x2", True)])
    outcome = factors.output_spectra(tiny, networks)
    spectra = outcome.numbers["spectra"]["fc1"]
    assert list(spectra) == ["initialization", "after training", "random labels"]
    start = tiny.factors(networks[0], 0, 0)["fc1"].output_hessian
    values = torch.linalg.eigvalsh(start.double()).flip(0)
    assert spectra["initialization"][0][3] == pytest.approx(float(values[3] / values[0]))
    assert len({tuple(rows[0]) for rows in spectra.values()}) == 3
    untrained = tiny.model(networks[0], 0, 0)
    fresh = hk.kronecker_factors(untrained, tiny.batches(networks[0]), nn.CrossEntropyLoss())
    torch.testing.assert_close(fresh["fc1"].output_hessian, start)
    assert not torch.equal(tiny.data(networks[1]).targets, tiny.data(networks[0]).targets)


def test_rank_one_and_correspondence(tiny):
    outcome = vectors.rank_one(tiny, [network(tiny)])
    h = tiny.eigenpairs(network(tiny), 0, "fc2", 12).vectors[:, 3].reshape(16, 16)
    found = outcome.numbers["F-16² on digits"]["fc2"][0][3]
    assert found == pytest.approx(float(torch.linalg.matrix_norm(h, 2) / h.norm()), rel=1e-5)
    outcome = vectors.correspondence(tiny, [network(tiny)])
    heat = next(h for h in outcome.heat_maps if h.name.startswith("correspondence-input-fc2"))
    v = torch.linalg.eigh(tiny.factors(network(tiny), 0)["fc2"].input_covariance).eigenvectors
    assert heat.rows[0][3] == pytest.approx(float((h @ v[:, -1]).square().sum()), abs=1e-4)


def test_width_variants(tiny):
    networks = [network(tiny), replace(network(tiny), model="f12x2")]
    outcome = between.width_variants(tiny, networks)
    forms = [tiny.factors(networks[1], seed)["fc1"].eigsh(12).vectors for seed in (0, 1)]
    found = [verdict.ours for verdict in outcome.verdicts]
    assert found[1] == pytest.approx(float(hk.subspace_overlap(*forms)[-1]), abs=1e-5)
    assert [curve.label for curve in outcome.charts[0].curves] == ["m = 16", "m = 12"]
    factors = [tiny.factors(networks[1], seed)["fc1"] for seed in (0, 1)]
    predicted = hk.predict_overlap(*factors, 27)
    curve = hk.subspace_overlap(*[f.eigsh(27).vectors for f in factors]).tolist()
    row = outcome.tables[0].rows[1]
    assert row[2:4] == [predicted.kind, hk.classify_peak(curve, 12)]
    assert int(row[4]) == predicted.peak
    assert float(row[6]) == pytest.approx(max(predicted.curve.tolist()), abs=1e-3)
    assert float(row[7]) == pytest.approx(max(curve), abs=2e-3)
    assert [score["predicted"] for score in outcome.numbers["scores"]][1] == predicted.kind


def test_forms_and_trajectory(tiny):
    outcome = beyond.forms(tiny, [network(tiny)])
    found = outcome.numbers["F-16² on digits"]["fc2"]
    H, K = tiny.hessian(network(tiny), 1, "fc2"), tiny.factors(network(tiny), 1)["fc2"].operator()
    operators = {
        "E[M] ⊗ E[x xᵀ]": K,
        "EKFAC on its basis": hk.eigenvalue_corrected(H, K),
        "nearest A ⊗ B": hk.nearest_kronecker(H),
    }
    dense = H.to_dense().double()
    for form, operator in operators.items():
        gap = dense - operator.to_dense().double()
        expected = float(gap.norm() / dense.norm())
        assert found[form]["frobenius"][1] == pytest.approx(expected, rel=1e-3)
    means = {form: sum(entry["frobenius"]) for form, entry in found.items()}
    assert means["EKFAC on that basis"] < means["nearest A ⊗ B"] < means["E[M] ⊗ E[x xᵀ]"]
    outcome = beyond.trajectory(tiny, [network(tiny)])
    numbers = outcome.numbers["F-16² on digits"]
    assert numbers["epochs"] == [0, 1, 2]
    assert numbers["error"]["fc2"][1][-1] == pytest.approx(found["E[M] ⊗ E[x xᵀ]"]["frobenius"][1])
    assert numbers["overlap"]["fc2"][0][0] != numbers["overlap"]["fc2"][0][2]
    H = tiny.hessian(network(tiny), 0, "fc2", 1).to_dense().double()
    K = tiny.factors(network(tiny), 0, 1)["fc2"].operator().to_dense().double()
    gap, whole = (float(torch.linalg.matrix_norm(A, 2)) for A in (H - K, H))
    assert numbers["spectral"]["fc2"][0][1] == pytest.approx(gap / whole, rel=1e-4)
    chart = next(c for c in outcome.charts if c.name == "trajectory-spectral")
    shown = {curve.label: curve.values for curve in chart.curves}
    assert shown == numbers["spectral"]


def test_forms_say_how_certain_their_errors_are(tiny, monkeypatch):
    (exact,) = beyond.forms(tiny, [network(tiny)]).tables
    assert exact.note.endswith("Frobenius norms are exact.")
    estimated = partial(hk.decoupling_error, dense_below=64)
    monkeypatch.setattr(beyond, "decoupling_error", estimated)
    outcome = beyond.forms(tiny, [network(tiny)])
    found = outcome.numbers["F-16² on digits"]
    H, K = tiny.hessian(network(tiny), 1, "fc2"), tiny.factors(network(tiny), 1)["fc2"].operator()
    expected = estimated(H, K).frobenius_error
    assert expected > 0
    assert found["fc2"]["E[M] ⊗ E[x xᵀ]"]["frobenius_error"][1] == pytest.approx(expected)
    largest = max(max(e["frobenius_error"]) for forms in found.values() for e in forms.values())
    (table,) = outcome.tables
    assert table.note.endswith(f"are estimated: standard error {largest:.1g} at most.")
    assert [len(row) for row in table.rows] == [len(table.headings)] * len(table.rows)


def test_normalization_compares_centred_and_plain(tiny):
    outcome = beyond.normalization(tiny, [network(tiny)])
    plain, centred = outcome.numbers.values()
    seeds = [tiny.factors(network(tiny), seed)["fc2"] for seed in (0, 1)]
    shared = hk.subspace_overlap(*(f.eigsh(16).vectors for f in seeds))[-1]
    assert plain["fc2"]["between"] == [pytest.approx(float(shared))]
    f = seeds[1]
    values = torch.linalg.eigvalsh(
        f.input_covariance.double() - torch.outer(f.input_mean, f.input_mean).double()
    )
    assert centred["fc2"]["ratio"][1] == pytest.approx(float(values[-1] / values[-2]), rel=1e-4)
    assert centred["fc2"]["ratio"][1] < plain["fc2"]["ratio"][1]


def test_functional_terms_vanish_within_the_layers_of_relu_networks(tiny):
    networks = [network(tiny), network(tiny, "f64x2-tanh")]
    assert networks[1].model == "f16x2-tanh"
    outcome = beyond.functional_terms(tiny, networks)
    relu, tanh = outcome.numbers.values()
    assert max(relu[name]["frobenius"][0] for name in ("fc1", "fc2", "fc3")) < 1e-4
    assert relu["all layers"]["frobenius"][0] > 0.01
    assert tanh["fc1"]["frobenius"][0] > 0.01
    assert tanh["fc3"]["frobenius"][0] < 1e-4
    model, batches = tiny.model(networks[1], 1), tiny.batches(networks[1])
    weights = [f"fc{i}.weight" for i in (1, 2, 3)]
    H = hk.AutogradHessian(model, batches, nn.CrossEntropyLoss(), weights).to_dense()
    G = hk.GaussNewton(model, batches, nn.CrossEntropyLoss()).to_dense()
    U, V = (torch.linalg.eigh(A.double()).eigenvectors.flip(1)[:, :20] for A in (H, G))
    expected = hk.subspace_overlap(U, V)
    overlaps = tanh["overlap of top eigenspaces"]
    assert list(overlaps) == ["1", "9", "10", "20"]
    for k, values in overlaps.items():
        assert values[1] == pytest.approx(float(expected[int(k) - 1]), abs=2e-3)
    _, spaces = outcome.tables
    mean = fmean(overlaps["9"])
    assert spaces.rows[1][0] == "F-16² (tanh) on digits"
    assert spaces.rows[1][2].startswith(f"{mean:.3f} [")
    assert [len(row) for row in spaces.rows] == [len(spaces.headings)] * 2
    density = outcome.charts[0].curves[1]
    area = torch.trapezoid(torch.tensor(density.values[0]), torch.tensor(density.x))
    assert float(area) == pytest.approx(1.0, abs=0.05)


def test_random_data_approach_the_limits_of_the_theorem(tiny):
    outcome = beyond.random_data(tiny, [])
    numbers = outcome.numbers
    assert numbers["widths"] == sorted(numbers["widths"])
    for seed in (0, 1):
        assert numbers["overlap"][seed][-1] > 0.99
        assert numbers["gap"][seed][-1] < 0.3 * numbers["gap"][seed][0]


def test_clusters_item(tiny):
    outcome = beyond.clusters(tiny, [network(tiny)])
    found = outcome.numbers["F-16² on digits"]["fc1, after training"]
    expected = hk.gradient_clusters(
        tiny.model(network(tiny), 1), tiny.batches(network(tiny)), "fc1"
    )
    assert found["logit"][1] == pytest.approx(expected.by_logit)
    assert found["both"][1] == pytest.approx(expected.by_both)
    # Of the variance around the logits' means, what goes when the classes' means are taken off.
    model = tiny.model(network(tiny), 1).double()
    sample = tiny.data(network(tiny))
    z = model.fc1(sample.inputs.double().flatten(1)).detach().requires_grad_()
    logits = model.fc3(torch.relu(model.fc2(torch.relu(z))))
    rows = [torch.autograd.grad(logits[:, i].sum(), z, retain_graph=True)[0] for i in range(10)]
    inside = torch.stack([row - row.mean(0) for row in rows])
    model.float()
    rest = inside.clone()
    for label in range(10):
        members = sample.targets == label
        rest[:, members] -= inside[:, members].mean(1, keepdim=True)
    share = 1 - float(rest.square().sum() / inside.square().sum())
    assert found["within"][1] == pytest.approx(share, rel=1e-4)
    (table,) = outcome.tables
    assert [len(row) for row in table.rows] == [len(table.headings)] * len(table.rows)


def test_a_logit_that_explains_all_leaves_nothing_to_the_class():
    assert beyond._class_within_logits(hk.GradientClusters(1.0, 0.0, 1.0)) == 0.0
    assert beyond._class_within_logits(hk.GradientClusters(0.5, 0.1, 0.75)) == 0.5


def test_items_that_make_their_own_operators_stay_within_memory(tiny, monkeypatch):
    numbers, cached = [], []

    def watched(make):
        def made(*args, **kwargs):
            result = make(*args, **kwargs)
            operators = result.values() if isinstance(result, dict) else [result]
            cached.append([operator.cached for operator in operators])
            return result

        return made

    monkeypatch.setattr(beyond, "layer_hessians", watched(hk.layer_hessians))
    monkeypatch.setattr(functional, "layer_hessians", watched(hk.layer_hessians))
    monkeypatch.setattr(beyond, "GaussNewton", watched(hk.GaussNewton))
    for budget in (2**30, 0):
        limited = Lab(tiny.folder, overrides=replace(TINY, seeds=1), memory_budget=budget)
        cached.clear()
        outcome = beyond.normalization(limited, [network(tiny)])
        numbers.append(outcome.numbers["F-16² on digits, activations centred"]["fc2"]["overlap"])
        outcome = beyond.functional_terms(limited, [network(tiny)])
        numbers.append(outcome.numbers["F-16² on digits"]["all layers"]["frobenius"])
        # The centred network's two layers, every layer's own share, all layers.
        assert cached == [[budget > 0] * 2, *[[budget > 0]] * 4]
    assert numbers[:2] == [pytest.approx(found, rel=1e-4) for found in numbers[2:]]


def test_architectures_within_a_memory_budget(tiny):
    limited = Lab(tiny.folder, overrides=replace(TINY, seeds=1), memory_budget=2**18)
    outcome = architectures.architectures(limited, [network(tiny)])
    (table,) = outcome.tables
    assert [row[:2] for row in table.rows] == [
        ["fc1", "16 × 64"],
        ["fc2", "16 × 16"],
        ["fc3", "10 × 16"],
    ]
    assert "samples of 2 of 3 Hessians fit 0.000244141 GiB" in table.note
    pairs = limited.eigenpairs(network(tiny), 0, "fc2", 9).vectors
    form = limited.factors(network(tiny), 0)["fc2"].eigsh(9).vectors
    expected = float(hk.subspace_overlap(pairs, form)[-1])
    assert outcome.numbers["F-16² on digits"]["fc2"]["overlap"][0] == pytest.approx(expected)


def test_architectures_show_convolutions_beside_published_figures(tmp_path, monkeypatch):
    (tmp_path / "deepnets.py").write_text(
        "from torch import nn\n"
        "def family(classes):\n"
        "    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(),\n"
        "                         nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    figures = {("digits", "deepnets:family"): ("near 1", "5 to 6")}
    monkeypatch.setattr(published, "AUTOCORRELATION_DEEP", figures)
    overrides = replace(TINY, model="deepnets:family", limit=60, seeds=2)
    small = Lab(tmp_path / "lab", overrides=overrides)
    (net,) = small.networks([Network("cifar10", "vgg11-w16")])
    aligned, ratio = architectures.architectures(small, [net]).verdicts
    behind = [
        hk.input_autocorrelation(small.factors(net, seed)[name])
        for seed in (0, 1)
        for name in ("3", "5")
    ]
    assert aligned.ours == pytest.approx(fmean(b.mean_alignment for b in behind))
    assert ratio.ours == pytest.approx(fmean(b.eigenvalue_ratio for b in behind))
    assert (aligned.published, ratio.published) == ("near 1", "5 to 6")
    assert aligned.agrees is None
    assert aligned.note == "published for other widths, 60 images here"


def test_positions_of_convolutions_one_step_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "tinynets.py").write_text(
        "from torch import nn\n"
        "def convolution(classes):\n"
        "    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(),\n"
        "                         nn.MaxPool2d(2), nn.Flatten(),\n"
        "                         nn.Linear(27, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = replace(TINY, model="tinynets:convolution", limit=60, seeds=1)
    small = Lab(tmp_path / "lab", overrides=overrides)
    (net,) = small.networks([Network("cifar10", "lenet5")])
    outcome = positions.position_means(small, [net])
    (found,) = outcome.numbers.values()
    assert list(found) == ["1"]
    model, batches = small.model(net, 0), small.batches(net)
    H = small.hessian(net, 0, "1").to_dense().double()
    mean = hk.position_mean_hessian(model, batches, nn.CrossEntropyLoss(), "1").to_dense().double()
    K = small.factors(net, 0)["1"].operator().to_dense().double()
    numbers = {key: values[0] for key, values in found["1"].items()}
    assert numbers["positions"] == pytest.approx(float((H - mean).norm() / H.norm()), rel=1e-4)
    assert numbers["both"] == pytest.approx(float((H - K).norm() / H.norm()), rel=1e-4)
    assert numbers["decoupling"] == pytest.approx(float((mean - K).norm() / mean.norm()), rel=1e-4)
    assert numbers["trace"] == pytest.approx(float(mean.trace() / H.trace()), rel=1e-5)
    assert 0 < numbers["overlap_form"] <= numbers["overlap"] + 0.2 <= 1.2
    assert 0.3 < min(numbers["outputs"], numbers["inputs"]) <= 1
    scale = float((H * K).sum() / K.square().sum())
    assert numbers["scale"] == pytest.approx(scale, rel=1e-4)
    assert numbers["scaled"] == pytest.approx(float((H - scale * K).norm() / H.norm()), rel=1e-4)
    # Van Loan & Pitsianis: the least error is all but the first singular value of H rearranged.
    rearranged = H.reshape(3, 9, 3, 9).permute(0, 2, 1, 3).reshape(9, 81)
    values = torch.linalg.svdvals(rearranged)
    nearest = float(values[1:].norm() / values.norm())
    assert numbers["nearest"] == pytest.approx(nearest, rel=1e-4)
    assert nearest < numbers["scaled"] < numbers["both"]
    steps, products = outcome.tables
    assert steps.rows[0][0].startswith("1 of ")
    assert products.rows[0][1:5] == [
        f"{numbers[key]:.3f}" for key in ("both", "scale", "scaled", "nearest")
    ]
    assert outcome.notes == []
    limited = Lab(tmp_path / "lab", overrides=overrides, memory_budget=2**10)
    assert not limited.hessian(net, 0, "1").cached
    (again,) = positions.position_means(limited, [net]).numbers.values()
    assert {key: values[0] for key, values in again["1"].items()} == pytest.approx(
        numbers, rel=1e-3
    )


def test_positions_without_convolutions_say_so(tiny):
    outcome = positions.position_means(tiny, [network(tiny)])
    assert (outcome.tables, outcome.verdicts) == ([], [])
    assert outcome.notes == ["None of these networks has a convolution of one group to look at."]
