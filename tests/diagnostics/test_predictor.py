"""The overlap predictor against its definition and against cases that can be worked out."""

from types import SimpleNamespace

import pytest
import torch
from networks import randn
from torch import nn

import hesskern as hk
from hesskern.diagnostics.predictor import peak_position


def factors(tau, gamma, u, v, groups=1):
    """What the predictor reads of a layer's factors, with chosen eigenpairs."""
    return SimpleNamespace(
        name="fc1",
        groups=groups,
        layer_shape=(len(tau), len(gamma)),
        output_hessian=u @ torch.diag(torch.tensor(tau).double()) @ u.T,
        input_covariance=v @ torch.diag(torch.tensor(gamma).double()) @ v.T,
    )


def rotation(size, seed):
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


def test_dominant_input_direction_gives_the_published_line():
    u, v = rotation(5, 1), rotation(4, 2)
    w, z = rotation(5, 3), torch.linalg.qr(v + 0.2 * randn(4, 4, seed=4)).Q
    first = factors([5.0, 4.0, 3.0, 2.0, 1.0], [100.0, 1.0, 0.5, 0.1], u, v)
    second = factors([2.0, 1.8, 1.5, 1.2, 1.0], [50.0, 1.0, 0.9, 0.8], w, z)
    found = hk.predict_overlap(first, second, 8)
    cosine = float(v[:, 0] @ z[:, 0]) ** 2
    assert found.applies
    assert found.kind == "normal"
    assert found.peak == 5
    assert found.squared_cosine == pytest.approx(cosine)
    for k in range(1, 6):
        assert float(found.curve[k - 1]) == pytest.approx(k / 5 * cosine)
        assert found.height(k) == pytest.approx(k / 5 * cosine)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 5\], got 6"):
        found.height(6)


def test_curve_is_the_mean_overlap_of_spaces_with_random_output_rotations():
    tau, gamma = [3.0, 1.0, 0.2], [2.0, 1.5, 0.3, 0.1]
    v, z = rotation(4, 2), rotation(4, 4)
    predicted = hk.predict_overlap(
        factors(tau, gamma, rotation(3, 0), v), factors(tau, gamma, rotation(3, 1), z), 7
    )
    assert not predicted.applies
    curves = []
    for seed in range(400):
        pair = [
            hk.KroneckerOperator(f.output_hessian, f.input_covariance).eigsh(7).vectors
            for f in (
                factors(tau, gamma, rotation(3, 2 * seed), v),
                factors(tau, gamma, rotation(3, 2 * seed + 1), z),
            )
        ]
        curves.append(hk.subspace_overlap(*pair))
    mean = torch.stack(curves).mean(0)
    torch.testing.assert_close(predicted.curve, mean, atol=0.03, rtol=0)


def test_a_weak_first_direction_peaks_late_and_a_dead_output_early():
    outputs = 8
    u, w, v = rotation(outputs, 1), rotation(outputs, 3), torch.eye(6).double()
    slow = [1.0, 0.95, 0.9, 0.85, 0.5, 0.4, 0.35, 0.3]
    late = hk.predict_overlap(
        factors(slow, [3.0, 1.0, 1e-3, 1e-3, 1e-3, 1e-3], u, v),
        factors(slow, [3.0, 1.0, 1e-3, 1e-3, 1e-3, 1e-3], w, v),
    )
    assert (late.applies, late.kind) == (False, "delayed")
    assert late.peak > outputs
    steep = [1.0, 0.9, 0.8, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4]
    other = torch.linalg.qr(torch.cat([v[:, :1], randn(6, 5, seed=9)], 1)).Q
    early = hk.predict_overlap(
        factors(steep, [5.0, 1.0, 0.9, 0.8, 0.7, 0.6], u, v),
        factors(steep, [5.0, 1.0, 0.9, 0.8, 0.7, 0.6], w, other),
    )
    assert (early.applies, early.kind) == (False, "early")
    assert early.peak == 3


def test_classification_of_measured_curves():
    def peaked(at, length=20):
        return [1.0 - abs(k - at) / length for k in range(1, length + 1)]

    assert hk.classify_peak(peaked(10), 10) == "normal"
    assert hk.classify_peak(peaked(12), 10) == "normal"
    assert hk.classify_peak(peaked(7), 10) == "early"
    assert hk.classify_peak(peaked(13), 10) == "delayed"
    assert hk.classify_peak(peaked(21, 40), 10) == "delayed"
    assert hk.classify_peak(peaked(22, 40), 10) == "none"
    assert hk.classify_peak(peaked(20), 10) == "none"
    # So short a curve can end where a peak counts as one at m.
    assert hk.classify_peak(peaked(12, 13), 10) == "normal"
    with pytest.raises(ValueError, match=r"curve must reach at least k = 5/4 m = 12\.5, got 12"):
        hk.classify_peak(peaked(10, 12), 10)


def test_the_first_of_equal_maxima_is_the_peak():
    assert peak_position([0.1, 0.9995, 1.0, 0.2], 2) == 2
    assert peak_position([0.1, 0.99, 1.0, 0.2], 2) == 3
    # Beyond 9/4 m a curve may rise again.
    assert peak_position([0.1, 0.99, 0.9, 0.2, 1.0], 2) == 2
    assert hk.classify_peak([0.5] * 9 + [1.0] * 20, 10) == "normal"


def test_real_factors_and_bad_input():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double() for _ in "ab"]
    data = [(randn(20, 6), torch.arange(20) % 3)]
    a, b = (hk.kronecker_factors(model, data, nn.CrossEntropyLoss()) for model in models)
    found = hk.predict_overlap(a["0"], b["0"])
    assert len(found.curve) == 9
    assert found.squared_cosine == pytest.approx(1.0)
    same = hk.predict_overlap(a["0"], b["0"], 3)
    torch.testing.assert_close(same.curve, found.curve[:3])
    assert same.kind == found.kind
    with pytest.raises(ValueError, match=r"must be of one shape, got \(4, 6\) and \(3, 4\)"):
        hk.predict_overlap(a["0"], b["2"])
    with pytest.raises(ValueError, match=r"k must lie in \[1, 24\], got 25"):
        hk.predict_overlap(a["0"], b["0"], 25)
    grouped = factors([1.0], [1.0], rotation(1, 0), rotation(1, 0), groups=2)
    with pytest.raises(NotImplementedError, match="2 groups"):
        hk.predict_overlap(grouped, grouped)
