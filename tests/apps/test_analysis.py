"""The numbers of ``hesskern analyze`` against dense matrices and definitions."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import hesskern as hk
from hesskern.apps.analyze.analysis import Settings, analyze
from hesskern.zoo import data

TINY = Settings(model="f8x2", top=12, limit=150, epochs=4, dtype="float64")


@pytest.fixture(scope="module")
def analysis():
    return analyze(TINY, command="hesskern analyze")


def dense(network, name):
    """The Hessian in one weight by double backward, [P, P]."""
    inputs = data.load("digits", limit=TINY.limit).to("cpu", torch.float64)
    batches = inputs.batches(64)
    operator = hk.AutogradHessian(
        network.model, batches, nn.CrossEntropyLoss(), params=[f"{name}.weight"]
    )
    return operator.to_dense()


@pytest.mark.parametrize("name", ["fc2", "fc3"])
def test_eigenvalues_trace_and_exactness(analysis, name):
    for network, model in zip(analysis.networks, analysis.result["models"], strict=True):
        layer, matrix = model["layers"][name], dense(network, name)
        expected = torch.linalg.eigvalsh(matrix).flip(0)[:12]
        found = torch.tensor(layer["eigenvalues"]["exact"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected[0]))
        assert layer["trace"]["exact"] == pytest.approx(float(matrix.trace()), rel=1e-5)
        assert layer["is_exact"]
        assert layer["converged"]
        assert max(layer["residuals"]) <= 1e-4


def test_comparison_of_exact_and_kronecker_form(analysis):
    network, name = analysis.networks[0], "fc3"
    layer, H = analysis.result["models"][0]["layers"][name], dense(network, name)
    inputs = data.load("digits", limit=TINY.limit).to("cpu", torch.float64)
    factors = hk.kronecker_factors(network.model, inputs.batches(150), nn.CrossEntropyLoss())
    K = torch.kron(factors[name].output_hessian, factors[name].input_covariance)
    U, V = (torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :9] for matrix in (H, K))
    overlap = float((U.T @ V).square().sum()) / 9
    captured = float((V.T @ H @ V).trace() / (U.T @ H @ U).trace())
    assert layer["overlap"][8] == pytest.approx(overlap, abs=1e-3)
    assert layer["captured"][8] == pytest.approx(captured, abs=1e-3)
    ratio = torch.linalg.svdvals(U[:, 0].reshape(layer["shape"]))[0]
    assert layer["rank_one"][0] == pytest.approx(float(ratio), abs=1e-3)
    error = torch.linalg.matrix_norm(H - K, 2) / torch.linalg.matrix_norm(H, 2)
    assert layer["decoupling"]["spectral"] == pytest.approx(float(error), rel=1e-3)


def test_correspondence_rows_belong_to_leading_factor_eigenvectors(analysis):
    layer = analysis.result["models"][0]["layers"]["fc2"]
    output = torch.tensor(layer["correspondence"]["output"])
    assert output.shape == (8, 12)
    torch.testing.assert_close(output.sum(0), torch.ones(12), rtol=1e-4, atol=1e-4)
    assert layer["factors"]["output_eigenvalues"] == sorted(
        layer["factors"]["output_eigenvalues"], reverse=True
    )


def test_between_models_curves_and_prediction(analysis):
    (pair,) = analysis.result["pairs"]
    assert pair["models"] == [0, 1]
    factors = []
    for network in analysis.networks:
        inputs = data.load("digits", limit=TINY.limit).to("cpu", torch.float64)
        factors.append(
            hk.kronecker_factors(network.model, inputs.batches(150), nn.CrossEntropyLoss())["fc2"]
        )
    k = len(pair["layers"]["fc2"]["kronecker"])
    assert k == 18  # 2.25 m
    expected = hk.subspace_overlap(*(f.eigsh(k).vectors for f in factors))
    found = torch.tensor(pair["layers"]["fc2"]["kronecker"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    spectra = [torch.linalg.eigh(f.input_covariance) for f in factors]
    t, u = (s.eigenvectors[:, -1] for s in spectra)
    prediction = pair["layers"]["fc2"]["prediction"]
    assert prediction["squared_cosine"] == pytest.approx(float(t @ u) ** 2, rel=1e-4)
    assert prediction["m"] == 8
    tau = [torch.linalg.eigvalsh(f.output_hessian) for f in factors]
    gamma = [s.eigenvalues for s in spectra]
    assert prediction["applies"] == all(
        bool(a[0] * g[-1] > a[-1] * g[-2]) for a, g in zip(tau, gamma, strict=True)
    )


def test_result_is_plain_json_with_everything_a_reader_needs(analysis):
    result = json.loads(json.dumps(analysis.result, allow_nan=False))
    assert result == analysis.result
    assert result["format"] == "hesskern.analyze/1"
    assert result["network"]["layers"] == ["fc1", "fc2", "fc3"]
    assert [model["seed"] for model in result["models"]] == [0, 1]
    assert result["settings"]["model"] == "f8x2"
    assert {"torch", "device", "threads", "build"} <= result["versions"].keys()
    steps = {row["step"] for row in result["times"]}
    assert {"train", "Kronecker factors", "top eigenpairs of fc1"} <= steps
    assert sum(row["seconds"] for row in result["times"]) <= result["seconds"]
    assert result["published"] is None


def test_same_settings_give_the_same_numbers(analysis):
    again = analyze(replace(TINY, seeds=1)).result
    first = analysis.result["models"][0]
    assert again["pairs"] == []
    assert again["models"][0]["layers"]["fc2"] == first["layers"]["fc2"]


def test_layers_are_chosen_and_unsupported_ones_explained(analysis):
    only = analyze(replace(TINY, layers=("fc2",), seeds=1)).result
    assert only["network"]["layers"] == ["fc2"]
    assert list(only["models"][0]["layers"]) == ["fc2"]


def test_top_is_cut_to_the_size_of_a_layer():
    result = analyze(Settings(model="f2x1", top=500, limit=60, epochs=1, seeds=1)).result
    layer = result["models"][0]["layers"]["fc2"]
    assert len(layer["eigenvalues"]["exact"]) == layer["parameters"] == 20


def test_an_inexact_layer_is_marked(tmp_path, monkeypatch):
    (tmp_path / "smooth_net.py").write_text(
        "from torch import nn\n"
        "def net(inputs, classes):\n"
        "    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = analyze(Settings(model="smooth_net:net", top=6, limit=80, epochs=1, seeds=1)).result
    layers = result["models"][0]["layers"]
    assert not layers["0"]["is_exact"]
    assert layers["0"]["inexact_reason"]
    assert layers["2"]["is_exact"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must not be negative, got -1"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64; got 'float16'"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"layers": ("fc9",)}, "fc9"),
        ({"recipe": "best"}, "recipe must be one of"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        analyze(replace(TINY, epochs=0, seeds=1) if not changes else replace(TINY, **changes))
