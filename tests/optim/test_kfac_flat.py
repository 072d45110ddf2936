"""K-FAC's damping by the mean eigenvalue, where a layer has no curvature (yet)."""

from __future__ import annotations

import copy

import torch
from dense import relative_error
from networks import classes, randn, seeded
from torch import nn

import hesskern as hk

CE = nn.CrossEntropyLoss()


def behind_zero() -> nn.Sequential:
    """The head's weight begins at zero, as in networks whose blocks begin as identities."""
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert isinstance(model, nn.Sequential)
    nn.init.zeros_(model[2].weight)
    return model


def preconditioner(model: nn.Module) -> hk.optim.KFAC:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"output": "exact", "damping": "mean", "kl_clip": None, "inverse_every": 100}
    return hk.optim.KFAC(model, optimizer, CE, **options)


def random_gradients(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    for i, (_, p) in enumerate(model.named_parameters()):
        p.grad = randn(*p.shape, seed=10 * seed + i)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_layer_without_curvature_keeps_its_gradient_until_it_has_some() -> None:
    model = behind_zero()
    x, y = randn(6, 4), classes(6, c=3)
    kfac = preconditioner(model)
    for step in range(4):
        plain = random_gradients(model, step)
        kfac.step(x, y)
        assert kfac.layers == ("2",)
        assert "no curvature so far" in kfac.skipped["0"]
        for name in ("0.weight", "0.bias"):
            assert torch.equal(model.get_parameter(name).grad, plain[name])
        assert not torch.equal(model[2].weight.grad, plain["2.weight"])
    # It gets an inverse at once, and the others keep theirs.
    resumed = behind_zero()
    again = preconditioner(resumed)
    again.load_state_dict(copy.deepcopy(kfac.state_dict()))
    before = kfac.state_dict()["inverses"]["2"]
    for one in (model, resumed):
        one[2].weight.data.copy_(randn(3, 5, seed=7))
    plain = random_gradients(model, 5)
    random_gradients(resumed, 5)
    kfac.step(x, y)
    again.step(x, y)
    assert set(kfac.layers) == {"0", "2"}
    assert "0" not in kfac.skipped
    assert all(map(torch.equal, kfac.state_dict()["inverses"]["2"], before))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    # Five batches' moving average of output Hessians, of which the last alone is not zero.
    fresh = hk.kronecker_factors(model, [(x, y)], CE, bias="joint")["0"]
    share = 0.05 / (1 - 0.95**5)
    K = hk.KroneckerOperator(share * fresh.output_hessian, fresh.input_covariance)
    inverse = K.factored_inverse("mean")
    V = torch.cat([plain["0.weight"], plain["0.bias"][:, None]], 1)
    expected = inverse.A @ V @ inverse.B
    assert relative_error(model[0].weight.grad, expected[:, :-1]) < 1e-9


def test_all_layers_without_curvature() -> None:
    """Nothing is preconditioned, and nothing is lost."""
    model = behind_zero()
    constant = nn.Sequential(model[0], nn.Threshold(1e6, 0.0), nn.Linear(5, 1).double())
    kfac = hk.optim.KFAC(
        constant,
        torch.optim.SGD(constant.parameters(), lr=0.1),
        CE,
        output="exact",
        damping="mean",
    )
    plain = random_gradients(constant, 0)
    kfac.step(randn(6, 4), torch.zeros(6, dtype=torch.int64))
    assert kfac.layers == ()
    for name, gradient in plain.items():
        assert torch.equal(constant.get_parameter(name).grad, gradient)
