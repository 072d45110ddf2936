"""Metrics against naive loops and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from hypothesis import given
from hypothesis import strategies as st
from networks import CASES, CE, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk


def orthonormal(size: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(size, k, seed=seed)).Q


# Overlap of subspaces


@given(size=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 5), double=st.booleans())
def test_overlap_against_a_loop(size: int, k: int, seed: int, double: bool) -> None:
    k = min(k, size)
    dtype = torch.float64 if double else torch.float32
    U, V = orthonormal(size, k, seed), orthonormal(size, k, seed + 10)
    curve = hk.subspace_overlap(U.to(dtype), V.to(dtype))
    assert curve.shape == (k,)
    assert curve.dtype == torch.float64
    for j in range(1, k + 1):
        total = sum(float(U[:, a] @ V[:, b]) ** 2 for a in range(j) for b in range(j))
        assert float(curve[j - 1]) == pytest.approx(total / j, abs=1e-12 if double else 1e-5)
    assert bool(((curve >= -1e-12) & (curve <= 1 + 1e-5)).all())
    if k == size:
        assert float(curve[-1]) == pytest.approx(1.0, abs=1e-5)


def test_overlap_closed_forms() -> None:
    U = orthonormal(10, 4)
    ones = torch.ones(4).double()
    assert torch.allclose(hk.subspace_overlap(U, U), ones)
    # Signs do not matter; an orthogonal space overlaps with nothing.
    assert torch.allclose(hk.subspace_overlap(U, -U), ones)
    full = orthonormal(10, 10)
    assert float(hk.subspace_overlap(full[:, :4], full[:, 4:8]).abs().max()) <= 1e-12
    # Another basis of the same space: one only where the spans agree.
    swapped = hk.subspace_overlap(U[:, [1, 0, 3, 2]], U)
    assert torch.allclose(swapped, torch.tensor([0.0, 1.0, 2 / 3, 1.0]).double())
    # A plane turned by 60 degrees in one direction: (1 + cos²) / 2.
    eye = torch.eye(3).double()
    turned = torch.stack([eye[0], 0.5 * eye[1] + 0.75**0.5 * eye[2]], 1)
    curve = hk.subspace_overlap(eye[:, :2], turned)
    assert torch.allclose(curve, torch.tensor([1.0, 0.625]).double())
    mixed = hk.subspace_overlap(U.float(), U)
    assert torch.allclose(mixed, ones, atol=1e-5)


@pytest.mark.parametrize(
    ("U", "V", "message"),
    [
        (orthonormal(5, 2), orthonormal(5, 3), r"\[P, K\], got \[5, 2\] and \[5, 3\]"),
        (orthonormal(5, 1)[:, 0], orthonormal(5, 1)[:, 0], r"\[P, K\], got \[5\] and \[5\]"),
        (2 * orthonormal(5, 2), orthonormal(5, 2), r"U must have orthonormal columns; .* is 3"),
        (orthonormal(5, 2), torch.ones(5, 2).double(), "V must have orthonormal columns"),
        (orthonormal(5, 2), torch.full((5, 2), torch.nan).double(), "V must have orthonormal"),
    ],
)
def test_overlap_of_what_is_no_basis(U: Tensor, V: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hk.subspace_overlap(U, V)


# Eigenvectors as matrices


def test_rank_one_ratio() -> None:
    m, d = 3, 5
    rank_one = torch.outer(randn(m), randn(d, seed=1)).flatten()
    eye = torch.eye(m, d).double().flatten()
    two = torch.zeros(m, d).double()
    two[0, 0], two[1, 1] = 3.0, 4.0
    found = hk.rank_one_ratio(torch.stack([rank_one, -7 * eye, two.flatten()], 1), (m, d))
    assert torch.allclose(found, torch.tensor([1.0, 3**-0.5, 0.8]).double())
    vectors = randn(m * d, 6, seed=2)
    for j, ratio in enumerate(hk.rank_one_ratio(vectors, (m, d))):
        matrix = vectors[:, j].reshape(m, d)
        expected = torch.linalg.matrix_norm(matrix, 2) / torch.linalg.matrix_norm(matrix)
        assert float(ratio) == pytest.approx(float(expected), rel=1e-12)
    assert hk.rank_one_ratio(vectors.float(), (m, d)).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"vectors must be \[m d, k\] = \[15, k\] .* got \[14, 6\]"
    ):
        hk.rank_one_ratio(vectors[1:], (m, d))
    with pytest.raises(ValueError, match=r"= \[15, k\] .* got \[15\]"):
        hk.rank_one_ratio(vectors[:, 0], (m, d))


@pytest.mark.parametrize("name", ["relu", "conv stride", "sequence"])
@pytest.mark.parametrize("bias", ["none", "joint"])
def test_correspondence_against_a_loop(name: str, bias: str) -> None:
    case = CASES[name]
    for f in hk.kronecker_factors(case.model(), case.data(), CE, bias=bias).values():
        m, d = f.layer_shape
        k = min(5, m * d)
        vectors = orthonormal(m * d, k)
        found = hk.eigenvector_correspondence(vectors, f)
        assert found.output.shape == (m, k)
        assert found.input.shape == (d, k)
        u = torch.linalg.eigh(f.output_hessian).eigenvectors.flip(1)
        v = torch.linalg.eigh(f.input_covariance).eigenvectors.flip(1)
        for j in range(k):
            matrix = vectors[:, j].reshape(m, d)
            for i in range(m):
                expected = float((matrix.T @ u[:, i]).square().sum())
                assert float(found.output[i, j]) == pytest.approx(expected, abs=1e-12)
            for i in range(d):
                expected = float((matrix @ v[:, i]).square().sum())
                assert float(found.input[i, j]) == pytest.approx(expected, abs=1e-12)
        ones = torch.ones(k).double()
        assert torch.allclose(found.output.sum(0), ones)
        assert torch.allclose(found.input.sum(0), ones)


def test_correspondence_of_the_factors_own_eigenvectors_is_one_to_one() -> None:
    case = CASES["relu"]
    f = hk.kronecker_factors(case.model(), case.data(), CE)["2"]
    top = f.eigsh(1)
    found = hk.eigenvector_correspondence(top.vectors, f)
    assert float(found.output[0, 0]) == pytest.approx(1.0, abs=1e-10)
    assert float(found.input[0, 0]) == pytest.approx(1.0, abs=1e-10)
    assert float(hk.rank_one_ratio(top.vectors, f.layer_shape)) == pytest.approx(1.0, abs=1e-10)
    exact = hk.layer_hessians(case.model(), case.data(), CE)["2"].to_dense()
    vectors = torch.linalg.eigh(exact).eigenvectors.flip(1)[:, :4]
    close = hk.eigenvector_correspondence(vectors.float(), f)
    assert close.output.dtype == torch.float32
    assert torch.allclose(close.input.sum(0), torch.ones(4), atol=1e-5)


def test_correspondence_of_what_does_not_fit() -> None:
    case = CASES["conv groups"]
    factors = hk.kronecker_factors(case.model(), case.data(), CE)
    with pytest.raises(NotImplementedError, match="layer '0' has 2 groups"):
        hk.eigenvector_correspondence(orthonormal(48, 2), factors["0"])
    with pytest.raises(NotImplementedError, match="layer '2' has 6 groups"):
        hk.input_autocorrelation(factors["2"])
    with pytest.raises(
        ValueError, match=r"\[72, k\] for a layer of shape \(3, 24\), got \[71, 2\]"
    ):
        hk.eigenvector_correspondence(orthonormal(72, 2)[1:], factors["4"])


# Rank-one part of the inputs


def inputs_only(x: Tensor) -> hk.LayerFactors:
    model = seeded(nn.Linear(x.shape[-1], 2))
    targets = torch.zeros(*x.shape[:-1], 2, dtype=x.dtype)
    return hk.kronecker_factors(model, [(x, targets)], nn.MSELoss())[""]


def test_input_autocorrelation_closed_forms() -> None:
    # E[x x^T] = diag(9, 4, 1) / 6 with mean along the first axis.
    eye = torch.eye(3).double()
    x = torch.stack([3 * eye[0], 3 * eye[0], 2 * eye[1], -2 * eye[1], eye[2], -eye[2]])
    found = hk.input_autocorrelation(inputs_only(x))
    assert found.mean_alignment == pytest.approx(1.0, abs=1e-12)
    assert found.eigenvalue_ratio == pytest.approx(18 / 8, rel=1e-12)
    # Mean along the second axis, first eigenvector along the first.
    x = torch.stack([3 * eye[0], -3 * eye[0], eye[1], eye[1]])
    found = hk.input_autocorrelation(inputs_only(x))
    assert found.mean_alignment == pytest.approx(0.0, abs=1e-12)
    assert found.eigenvalue_ratio == pytest.approx(9.0, rel=1e-12)
    # One sample: rank one.
    found = hk.input_autocorrelation(inputs_only(eye[:1]))
    assert found.mean_alignment == pytest.approx(1.0)
    assert found.eigenvalue_ratio == float("inf")
    assert hk.input_autocorrelation(inputs_only(x[:, :1])).eigenvalue_ratio == float("inf")


def test_input_autocorrelation_with_positions_uses_the_mean_image() -> None:
    case = CASES["conv stride"]
    f = hk.kronecker_factors(case.model(), case.data(), CE)["0"]
    mean = f.input_mean
    left = torch.linalg.svd(mean).U[:, 0]
    values, vectors = torch.linalg.eigh(f.input_covariance)
    found = hk.input_autocorrelation(f)
    assert found.mean_alignment == pytest.approx(float(vectors[:, -1] @ left) ** 2, rel=1e-10)
    assert found.eigenvalue_ratio == pytest.approx(float(values[-1] / values[-2]), rel=1e-10)


# The decoupling


def pair(name: str, layer: str, **kwargs: Any) -> tuple[hk.LayerHessian, hk.KroneckerOperator]:
    case = CASES[name]
    model, data = case.model(), case.data()
    H = hk.layer_hessians(model, data, CE, layers=[layer], **kwargs)[layer]
    return H, hk.kronecker_factors(model, data, CE, layers=[layer], **kwargs)[layer].operator()


def test_singular_values_of_vectors_as_matrices() -> None:
    vectors = randn(12, 5)
    found = hk.singular_values(vectors, (3, 4))
    matrices = vectors.T.reshape(5, 3, 4)
    for row, matrix in zip(found, matrices, strict=True):
        expected = torch.linalg.svdvals(matrix) / matrix.norm()
        torch.testing.assert_close(row, expected)
        assert float(row.square().sum()) == pytest.approx(1)
    torch.testing.assert_close(found[:, 0], hk.rank_one_ratio(vectors, (3, 4)))
    with pytest.raises(ValueError, match=r"\[m d, k\] = \[10, k\]"):
        hk.singular_values(vectors, (2, 5))


@pytest.mark.parametrize(
    ("name", "layer", "bias"),
    [
        ("relu", "0", "none"),
        ("relu", "0", "joint"),
        ("conv groups", "0", "none"),
        ("conv groups", "2", "joint"),
        ("conv stride", "5", "none"),
        ("sequence", "4", "none"),
    ],
)
def test_decoupling_error(name: str, layer: str, bias: str) -> None:
    H, K = pair(name, layer, bias=bias)
    dense, difference = H.to_dense(), H.to_dense() - K.to_dense()
    spectral = float(torch.linalg.matrix_norm(difference, 2) / torch.linalg.matrix_norm(dense, 2))
    frobenius = float(difference.norm() / dense.norm())
    exact = hk.decoupling_error(H, K)
    assert exact.spectral == pytest.approx(spectral, rel=1e-10)
    assert exact.frobenius == pytest.approx(frobenius, rel=1e-10)
    assert exact.frobenius_error == 0.0
    assert frobenius > 0.05
    free = hk.decoupling_error(H, K, dense_below=0)
    assert free.spectral == pytest.approx(spectral, rel=1e-2)
    assert abs(free.frobenius - frobenius) <= 5 * free.frobenius_error + 1e-10 * frobenius
    assert free.frobenius_error <= 0.2 * frobenius
    assert hk.decoupling_error(H, K, dense_below=0) == free


@pytest.mark.parametrize("double_backward", [False, True])
def test_as_many_probes_as_parameters_are_exact(double_backward: bool) -> None:
    H, K = pair("relu", "0")
    exact = hk.decoupling_error(H, K)
    case = CASES["relu"]
    R = hk.AutogradHessian(case.model(), case.data(), CE, params="0.weight")
    free = hk.decoupling_error(R if double_backward else H, K, probes=H.shape[0], dense_below=0)
    assert free.frobenius == pytest.approx(exact.frobenius, rel=1e-9)
    assert free.frobenius_error == 0.0


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0])
def test_decoupling_error_of_a_scaled_product(scale: float) -> None:
    """K far from H, and K = 0: the projection on K holds for any size of it."""
    H, K = pair("conv stride", "5")
    K = hk.KroneckerOperator(scale * K.A, K.B)
    exact = hk.decoupling_error(H, K)
    free = hk.decoupling_error(H, K, dense_below=0)
    assert free.spectral == pytest.approx(exact.spectral, rel=1e-2)
    assert abs(free.frobenius - exact.frobenius) <= 5 * free.frobenius_error + 1e-10
    if scale == 0:
        assert free.frobenius == 1.0


def test_a_tiny_distance_does_not_cancel() -> None:
    """One sample more than K knows of: the distance, 1e-6 of H, keeps its digits."""
    case = CASES["prelu and relu6"]
    model = case.model()
    x, y = case.inputs(2, 1), classes(2, c=3)
    weight = torch.tensor([1.0, 1e-6]).double()
    H = hk.layer_hessians(model, [(x, y, weight)], CE)["0"]
    K = hk.kronecker_factors(model, [(x[:1], y[:1])], CE, layers=["0"])["0"].operator()
    exact, free = (hk.decoupling_error(H, K, dense_below=limit) for limit in (2048, 0))
    assert 1e-8 < exact.frobenius < 1e-4
    assert (
        abs(free.frobenius - exact.frobenius) <= 5 * free.frobenius_error + 1e-6 * exact.frobenius
    )
    assert free.frobenius_error < exact.frobenius


def test_frobenius_estimate_and_its_standard_error_are_honest() -> None:
    # Few probes, so that part of the norm lies outside the sketch of the range.
    H, K = pair("conv stride", "5")
    exact = hk.decoupling_error(H, K).frobenius
    found = [hk.decoupling_error(H, K, dense_below=0, probes=6, seed=seed) for seed in range(30)]
    deviations = torch.tensor([(e.frobenius - exact) / e.frobenius_error for e in found])
    assert 0.3 < float(deviations.square().mean().sqrt()) < 2.5
    mean = sum(e.frobenius for e in found) / len(found)
    assert mean == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dense_below", [2048, 0])
def test_one_sample_decouples_exactly(dense_below: int) -> None:
    for name, layer in (("prelu and relu6", "0"), ("residual", "inner"), ("conv 1x1", "3")):
        case = CASES[name]
        model = case.model()
        data = [(case.inputs(1, 1), classes(1, c=3))]
        H = hk.layer_hessians(model, data, CE)[layer]
        K = hk.kronecker_factors(model, data, CE)[layer].operator()
        found = hk.decoupling_error(H, K, dense_below=dense_below)
        assert found.spectral <= 1e-12
        assert found.frobenius <= 1e-12


def test_decoupling_error_of_kronecker_products_in_closed_form() -> None:
    A, B = torch.diag(torch.tensor([2.0, 1.0])).double(), torch.eye(3).double()
    H, K = hk.KroneckerOperator(A, B), hk.KroneckerOperator(torch.eye(2).double(), B)
    for dense_below in (2048, 0):
        found = hk.decoupling_error(H, K, dense_below=dense_below)
        assert found.spectral == pytest.approx(0.5, rel=1e-6)
        assert found.frobenius == pytest.approx((3 / 15) ** 0.5, rel=1e-6)


def test_decoupling_error_of_hessians_by_double_backward() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    H, K = pair("relu", "2")
    R = hk.AutogradHessian(model, data, CE, params="2.weight")
    for dense_below in (2048, 0):
        ours = hk.decoupling_error(H, K, probes=H.shape[0], dense_below=dense_below)
        theirs = hk.decoupling_error(R, K, probes=H.shape[0], dense_below=dense_below)
        assert theirs.spectral == pytest.approx(ours.spectral, rel=1e-6)
        assert theirs.frobenius == pytest.approx(ours.frobenius, rel=1e-6)


def test_decoupling_error_bad_arguments() -> None:
    H, K = pair("relu", "0")
    wrong = hk.KroneckerOperator(torch.eye(2).double(), torch.eye(3).double())
    with pytest.raises(ValueError, match=r"same shape, got \(24, 24\) and \(6, 6\)"):
        hk.decoupling_error(H, wrong)
    single = hk.KroneckerOperator(K.A.float(), K.B.float())
    with pytest.raises(ValueError, match=r"agree in dtype and device, got torch\.float64 on cpu"):
        hk.decoupling_error(H, single)
    with pytest.raises(ValueError, match="probes must be at least 2, got 1"):
        hk.decoupling_error(H, K, probes=1)
    zero = hk.KroneckerOperator(0 * K.A, K.B)
    for dense_below in (2048, 0):
        with pytest.raises(ValueError, match="H is zero"):
            hk.decoupling_error(zero, K, dense_below=dense_below)


def test_overlap_of_a_layers_spaces_end_to_end() -> None:
    # The paper's comparison in small: top eigenvectors of H and of its Kronecker form.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    model = seeded(Net())
    data = [(randn(40, 6).abs(), classes(40, c=3))]
    H = hk.layer_hessians(model, data, CE)["a"]
    f = hk.kronecker_factors(model, data, CE)["a"]
    exact = hk.eigsh(H, 4, tol=1e-8)
    curve = hk.subspace_overlap(exact.vectors, f.eigsh(4).vectors)
    vectors = torch.linalg.eigh(H.to_dense()).eigenvectors.flip(1)[:, :4]
    K = torch.linalg.eigh(f.operator().to_dense()).eigenvectors.flip(1)[:, :4]
    assert relative_error(curve, hk.subspace_overlap(vectors, K)) <= 1e-6
    assert float(curve[0]) > 0.8
