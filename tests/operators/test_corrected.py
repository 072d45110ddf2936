"""EKFAC against its definition on dense matrices."""

import pytest
import torch
from networks import randn, small_network
from torch import nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def layer(kind):
    model, data = small_network(kind)
    H = hk.layer_hessians(model, data, LOSS)["0"]
    return H, hk.kronecker_factors(model, data, LOSS)["0"].operator()


def basis(K):
    left, right, _ = K.eigenbases
    return torch.block_diag(*(torch.kron(u, v) for u, v in zip(left, right, strict=True)))


@pytest.mark.parametrize("kind", ["linear", "positions", "rows", "groups"])
def test_equals_its_definition(kind):
    H, K = layer(kind)
    E = hk.eigenvalue_corrected(H, K)
    Q, dense = basis(K), H.to_dense()
    diagonal = (Q * (dense @ Q)).sum(0)
    expected = Q @ torch.diag(diagonal) @ Q.T
    torch.testing.assert_close(E.values.flatten(), diagonal, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(E.to_dense(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(E.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-12)
    assert E.trace() == pytest.approx(H.trace(), rel=1e-9)
    assert E.squared_norm() == pytest.approx(float(expected.square().sum()), rel=1e-9)
    found = E.eigsh(4)
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(expected).flip(0)[:4], rtol=1e-9, atol=1e-12
    )
    assert float(found.residuals.max()) < 1e-9
    vectors, shifts = randn(E.shape[0], 2, seed=4), torch.tensor([-0.3, -2.0]).double()
    solved = E.solve_shifted(vectors, shifts)
    again = expected @ solved - solved * shifts
    torch.testing.assert_close(again, vectors, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "rows"])
def test_nearer_to_the_hessian_than_the_kronecker_form(kind):
    H, K = layer(kind)
    E = hk.eigenvalue_corrected(H, K)
    plain, corrected = (hk.decoupling_error(H, form).frobenius for form in (K, E))
    assert corrected < plain
    # Moving any eigenvalue only takes it farther away.
    moved = hk.CorrectedOperator(E, E.values + 1e-3 * randn(*E.values.shape))
    assert hk.decoupling_error(H, moved).frobenius > corrected


def test_serves_as_start_and_bad_input():
    H, K = layer("linear")
    E = hk.eigenvalue_corrected(H, K)
    torch.testing.assert_close(
        hk.eigsh(H, 3, start=E).values, hk.eigsh(H, 3).values, rtol=1e-6, atol=1e-9
    )
    with pytest.raises(TypeError, match="H must be a LayerHessian, got KroneckerOperator"):
        hk.eigenvalue_corrected(K, K)
    with pytest.raises(TypeError, match="K must be of EigenbasisOperator, got LayerHessian"):
        hk.eigenvalue_corrected(H, H)
    with pytest.raises(ValueError, match=r"values must be \[m, d\] = \[4, 5\], got \[5, 4\]"):
        hk.CorrectedOperator(K, torch.zeros(5, 4))


@pytest.mark.parametrize("kind", ["linear", "positions", "groups"])
def test_forms_that_share_their_eigenvectors_are_compared_without_noise(kind):
    """(‖H - K‖² - ‖H - E‖²) / ‖H‖² is ‖E - K‖² / ‖H‖², whatever the probes."""
    H, K = layer(kind)
    E = hk.eigenvalue_corrected(H, K)
    for seed in range(4):
        plain, corrected = (
            hk.decoupling_error(H, form, dense_below=0, probes=2, seed=seed) for form in (K, E)
        )
        assert corrected.frobenius < plain.frobenius
        # ‖H‖² of the estimate, from that of H - E, and ‖E‖².
        square = E.squared_norm() / (1 - corrected.frobenius**2)
        apart = float((E.to_dense() - K.to_dense()).square().sum())
        difference = plain.frobenius**2 - corrected.frobenius**2
        assert difference == pytest.approx(apart / square, rel=1e-6)
