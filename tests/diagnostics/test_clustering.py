"""Variance of gradients between clusters, and networks with centred activations."""

import pytest
import torch
from networks import classes, randn, seeded
from torch import nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def problem():
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()))
    model.append(nn.Linear(5, 3).double())
    x, y = randn(40, 4), classes(40, c=3)
    return model, x, y


def test_shares_by_their_definition():
    model, x, y = problem()
    z = model[0](x).detach().requires_grad_()
    logits = model[1:](z)
    G = torch.stack(
        [torch.autograd.grad(logits[:, i].sum(), z, retain_graph=True)[0] for i in range(3)], 1
    )
    flat = G.reshape(-1, 6)
    logit = torch.arange(3).repeat(40)
    label = y.repeat_interleave(3)
    gap = flat - flat.mean(0)

    def share(groups):
        explained = 0.0
        for group in groups.unique():
            part = flat[groups == group]
            explained += len(part) * float((part.mean(0) - flat.mean(0)).square().sum())
        return explained / float(gap.square().sum())

    found = hk.gradient_clusters(model, list(zip(x.split(7), y.split(7), strict=True)), "0")
    assert found.by_logit == pytest.approx(share(logit))
    assert found.by_class == pytest.approx(share(label))
    assert found.by_both == pytest.approx(share(3 * logit + label))
    assert 0 < found.by_class < found.by_both < 1


def test_gradients_behind_the_last_activation_depend_on_the_logit_alone():
    model, x, y = problem()
    # d logit_i / d (input of the last layer) is a row of its weight, so a linear tail clusters.
    linear = nn.Sequential(model[0], model[4].__class__(6, 3).double())
    found = hk.gradient_clusters(linear, [(x, y)], "0")
    assert found.by_logit == pytest.approx(1.0)
    assert found.by_class == pytest.approx(0.0, abs=1e-12)


def test_bad_input_to_clusters():
    model, x, y = problem()
    with pytest.raises(ValueError, match="no module named 'fc9'"):
        hk.gradient_clusters(model, [(x, y)], "fc9")
    with pytest.raises(ValueError, match="data yielded no samples"):
        hk.gradient_clusters(model, [], "0")
    with pytest.raises(ValueError, match="all gradients are equal"):
        hk.gradient_clusters(nn.Sequential(nn.Linear(4, 1)).double(), [(x, 0 * y)], "0")
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="must be a Linear layer with one input per sample"):
        hk.gradient_clusters(conv, [(randn(5, 1, 3, 3), classes(5, c=3))], "0")


def test_centred_network_computes_the_same_with_centred_inputs():
    model, x, y = problem()
    before = [p.detach().clone() for p in model.parameters()]
    data = [(x, y)]
    centred = hk.centre_inputs(model, data)
    torch.testing.assert_close(centred(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    plain, moved = (hk.kronecker_factors(m, data, LOSS) for m in (model, centred))
    for name in ("0", "2", "4"):
        mean = plain[name].input_mean
        torch.testing.assert_close(
            moved[name].input_covariance, plain[name].input_covariance - torch.outer(mean, mean)
        )
        torch.testing.assert_close(moved[name].output_hessian, plain[name].output_hessian)
        assert float(moved[name].input_mean.abs().max()) < 1e-12
    H = hk.layer_hessians(centred, data, LOSS)["2"].to_dense()
    G = hk.layer_hessians(model, data, LOSS)["2"].to_dense()
    assert float((H - G).norm()) > 0.05 * float(G.norm())


def test_bad_input_to_centring():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Sequential, got Linear"):
        hk.centre_inputs(nn.Linear(2, 3), [])
    with pytest.raises(ValueError, match="no Linear layer with a bias"):
        hk.centre_inputs(nn.Sequential(nn.Linear(2, 3, bias=False)), [])
