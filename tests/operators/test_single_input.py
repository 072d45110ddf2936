"""A layer with one input: its samples' inputs [N, 1] are not the ones of stored rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.pruning import prune
from hesskern.operators.samples import SampleRows, join

LOSS = nn.CrossEntropyLoss()


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 4)))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 1, seed=n), classes(n, c=4)) for n in (6, 9, 5)]


def dense() -> Tensor:
    """[P, P] by double backward, weights alone."""
    return hk.AutogradHessian(network(), batches(), LOSS, ["0.weight"]).to_dense()


def hessian(**options: object) -> hk.LayerHessian:
    return hk.layer_hessians(network(), batches(), LOSS, ["0"], **options)["0"]


@pytest.mark.parametrize("budget", [None, 0])
def test_layer_hessians(budget: int | None) -> None:
    H, expected = hessian(memory_budget=budget), dense()
    assert H.is_exact
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10, atol=1e-14)
    assert torch.allclose(H.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-14)
    assert H.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
    v = randn(6, 3)
    assert torch.allclose(H @ v, expected @ v, rtol=1e-10, atol=1e-13)
    if H.cached:
        assert not any(chunk.stored for chunk in H._chunks)


def test_inner_and_diagonal_in() -> None:
    H, expected = hessian(), dense()
    K = hk.kronecker_factors(network(), batches(), LOSS)["0"].operator()
    assert K.layer_shape == (6, 1)
    assert H.inner(K) == pytest.approx(float((expected * K.to_dense()).sum()), rel=1e-10)
    basis = torch.kron(K.eigenbases[0][0], K.eigenbases[1][0])
    along = (basis.T @ expected @ basis).diagonal().reshape(6, 1)
    assert torch.allclose(H.diagonal_in(K), along, rtol=1e-10, atol=1e-14)
    corrected = hk.eigenvalue_corrected(H, K)
    assert corrected.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
    # With d = 1 one product is all there is to H.
    nearest = hk.nearest_kronecker(H)
    assert torch.allclose(nearest.to_dense(), expected, rtol=1e-8, atol=1e-12)


def test_gauss_newton() -> None:
    G = hk.GaussNewton(network(), batches(), LOSS)
    block = G.to_dense()[G.slices["0"], G.slices["0"]]
    assert torch.allclose(block, dense(), rtol=1e-10, atol=1e-14)
    v = randn(G.shape[0], 2)
    assert torch.allclose(G @ v, G.to_dense() @ v, rtol=1e-10, atol=1e-13)
    stacked = G.stacked()
    assert stacked.sizes == [6, 4]


@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_pruning_leaves_out_whole_samples_under_the_bound(tolerance: float) -> None:
    H, expected = hessian(tolerance=tolerance), dense()
    gap = expected - H.to_dense()
    assert float(torch.linalg.eigvalsh(gap)[0]) > -1e-12
    assert float(torch.linalg.eigvalsh(gap)[-1]) <= H.pruning_error + 1e-12
    assert H.pruning_error <= tolerance * float(expected.trace()) * (1 + 1e-9)
    assert H.pruned_trace == pytest.approx(float(gap.trace()), rel=1e-9, abs=1e-12)


def test_pruning_takes_the_bound_of_single_inputs() -> None:
    x, s = randn(300, 1), randn(300, 3, 6, seed=1)
    rows = SampleRows(x, s)
    pruned = prune([rows], [rows.shares()], 0.1)
    # Gradients spread over six directions: the norm is far below the trace.
    assert 0 < pruned.norm < 0.6 * pruned.trace
    assert all(chunk.s.shape[1] == 3 for chunk in pruned.chunks)


def test_gradient_clusters() -> None:
    model, data = network(), batches()
    found = hk.gradient_clusters(model, data, "0")
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    z = model[0](x).detach().requires_grad_()
    logits = model[1:](z)
    G = [torch.autograd.grad(logits[:, i].sum(), z, retain_graph=True)[0] for i in range(4)]
    flat, label = torch.cat(G), y.repeat(4)
    means = torch.stack([flat[label == k].mean(0) for k in label.unique()])
    sizes = torch.stack([(label == k).sum() for k in label.unique()])
    gap = (flat - flat.mean(0)).square().sum()
    share = (sizes[:, None] * (means - flat.mean(0)).square()).sum() / gap
    assert found.by_class == pytest.approx(float(share), rel=1e-9)


def test_sequences_are_still_refused_by_gradient_clusters() -> None:
    model = seeded(nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)))
    with pytest.raises(ValueError, match="must be a Linear layer with one input per sample"):
        hk.gradient_clusters(model, [(randn(8, 3, 1), classes(8, c=4))], "0")


def test_the_field_goes_with_the_rows() -> None:
    stored = SampleRows(torch.ones(5, 1), randn(5, 2, 6).float(), stored=True)
    plain = SampleRows(torch.ones(5, 1), randn(5, 2, 6).float())
    keep = torch.tensor([True, False, True, True, False])
    for rows in (stored, plain):
        assert rows.select(keep).stored == rows.stored
        assert [c.stored for c in join([rows, replace(rows, x=rows.x.clone())], 2**25)] == [
            rows.stored
        ]
    assert stored.rotated().stored
    other = replace(plain, x=plain.x.clone())
    joined = join([stored, plain, other, stored], 2**25)
    assert [(c.stored, len(c.x)) for c in joined] == [(True, 5), (False, 10), (True, 5)]


def test_pieces_are_joined_as_far_as_they_may_be_held_twice() -> None:
    pieces = [SampleRows(randn(4, 3, seed=i).float(), randn(4, 2, 5).float()) for i in range(6)]
    size = pieces[0].nbytes
    assert [len(c.x) for c in join(list(pieces), 2 * size)] == [8, 8, 8]
    assert [len(c.x) for c in join(list(pieces), 0)] == [4] * 6
    whole = join(list(pieces), 2**25)
    assert [len(c.x) for c in whole] == [24]
    assert torch.equal(whole[0].x, torch.cat([c.x for c in pieces]))


def test_layers_that_come_both_ways_have_a_bound() -> None:
    """Sequences in one batch, single inputs in another: two kinds of rows of one layer."""
    stored = SampleRows(torch.ones(5, 1).double(), randn(5, 2, 6), stored=True)
    plain = SampleRows(randn(7, 2), randn(7, 3, 3, seed=1))
    R = torch.cat([rows for c in (stored, plain) for rows in c.dense_rows()])
    pruned = prune([stored, plain], [stored.shares(), plain.shares()], 0.3)
    kept = torch.cat([rows for c in pruned.chunks for rows in c.dense_rows()])
    gap = R.T @ R - kept.T @ kept
    assert float(torch.linalg.eigvalsh(gap)[-1]) <= pruned.norm <= 0.3 * float(R.square().sum())
