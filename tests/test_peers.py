"""Against curvlinops 3.0.1, an independent implementation, where both define the same thing.

Normalizations. With N samples, t positions of a layer and per-sample losses as here, curvlinops'
``expand`` factors (type-2 Fisher, ``reduction="mean"``) are

    input covariance     1 / (N t) sum_n sum_t x_nt x_nt^T        = ours / t
    gradient covariance  1 / N     sum_n sum_t G_nt^T A_n G_nt    = ours * t

since our ``input_covariance`` sums over positions and our ``output_hessian`` averages over them;
the Kronecker products are equal. With ``reduction="sum"`` its gradient covariance is a sum over
samples, so its product is N times ours. Samples must have equally many loss terms there; A_n is
then the mean over them, as here.

Two definitions differ. It averages the groups of a convolution, ours are kept apart, so only
``groups=1`` is compared. Its empirical Fisher for the mean of c squared errors or logistic losses
is c times the outer product of the sample's gradient, ours is that outer product; and it takes
the gradients of a sample's tokens one by one, so tokens are compared for the type-2 Fisher only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense import relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

curvlinops = pytest.importorskip(
    "curvlinops",
    reason="curvlinops-for-pytorch==3.0.1 (extra 'test') is not installed, so there is no peer",
)


@dataclass(frozen=True)
class Problem:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[str], nn.Module]
    targets: Callable[[int, int], Tensor]

    def data(self) -> list[tuple[Tensor, Tensor]]:
        return [(randn(n, *self.shape, seed=n), self.targets(n, n)) for n in (5, 3)]


class Tokens(nn.Module):
    """Logits per token, classes on axis 1 as cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).transpose(1, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2, dilation=(1, 2)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def sequences() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 3)
    )


def labels(n: int, seed: int) -> Tensor:
    return classes(n, c=3, seed=seed)


PROBLEMS: dict[str, Problem] = {
    "mlp": Problem(mlp, (4,), lambda r: nn.CrossEntropyLoss(reduction=r), labels),
    "conv": Problem(conv, (2, 5, 5), lambda r: nn.CrossEntropyLoss(reduction=r), labels),
    "sequences": Problem(sequences, (5, 3), lambda r: nn.CrossEntropyLoss(reduction=r), labels),
    "mse": Problem(
        mlp, (4,), lambda r: nn.MSELoss(reduction=r), lambda n, seed: randn(n, 3, seed=seed)
    ),
    "bce": Problem(
        conv,
        (2, 5, 5),
        lambda r: nn.BCEWithLogitsLoss(reduction=r),
        lambda n, seed: classes(n, 3, c=2, seed=seed).double(),
    ),
    "tokens": Problem(
        Tokens,
        (6, 3),
        lambda r: nn.CrossEntropyLoss(reduction=r),
        lambda n, seed: classes(n, 6, c=4, seed=seed),
    ),
}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def kfac(model: nn.Module, data: Any, loss: nn.Module, params: list[Tensor], **kwargs: Any) -> Any:
    return curvlinops.KFACLinearOperator(
        model, loss, params, data, check_deterministic=False, kfac_approx="expand", **kwargs
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [(name, "type-2", "exact") for name in PROBLEMS]
    + [(name, "empirical", "empirical") for name in PROBLEMS],
)
def test_factors(name: str, theirs: str, ours: str, reduction: str) -> None:
    problem = PROBLEMS[name]
    model, data = seeded(problem.build()), problem.data()
    loss = problem.loss(reduction)
    factors = hk.kronecker_factors(model, data, loss, output=ours)
    scale = 8 if reduction == "sum" else 1
    for layer, module in layers_of(model).items():
        operator = kfac(model, data, loss, [module.weight], fisher_type=theirs)
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        f = factors[layer]
        t = f.positions
        covariance = state["input_covariances"][layer]
        gradients = state["gradient_covariances"][layer]
        assert relative_error(covariance, f.input_covariance / t) <= 1e-12
        assert relative_error(gradients, f.output_hessian * t * scale) <= 1e-12
        vector = randn(module.weight.numel(), seed=3)
        assert relative_error(operator @ vector, scale * (f.operator() @ vector)) <= 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_factors_with_the_bias(name: str) -> None:
    problem = PROBLEMS[name]
    model, data = seeded(problem.build()), problem.data()
    loss = problem.loss("mean")
    ours = hk.kronecker_factors(model, data, loss, bias="joint")
    for layer, module in layers_of(model).items():
        theirs = kfac(
            model,
            data,
            loss,
            [module.weight, module.bias],
            fisher_type="type-2",
            separate_weight_and_bias=False,
        )
        theirs.compute_kronecker_factors()
        state = theirs.state_dict()
        f = ours[layer]
        covariance = state["input_covariances"][layer]
        assert relative_error(covariance, f.input_covariance / f.positions) <= 1e-12
        gradients = state["gradient_covariances"][layer]
        assert relative_error(gradients, f.output_hessian * f.positions) <= 1e-12
        # Its vectors hold the weight first and then the bias, ours a matrix [m, d + 1].
        m, d = f.layer_shape
        matrix = randn(m, d, seed=3)
        product = (f.operator() @ matrix.flatten()).reshape(m, d)
        flat = torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]])
        expected = torch.cat([product[:, :-1].flatten(), product[:, -1]])
        assert relative_error(theirs @ flat, expected) <= 1e-12


@pytest.mark.filterwarnings("ignore:the Gauss-Newton block:UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_layer_blocks_are_its_generalized_gauss_newton_matrix(name: str) -> None:
    problem = PROBLEMS[name]
    model, data = seeded(problem.build()), problem.data()
    loss = problem.loss("mean")
    for layer, H in hk.layer_hessians(model, data, loss).items():
        weight = model.get_submodule(layer).weight
        theirs = curvlinops.GGNLinearOperator(
            model, loss, [weight], data, check_deterministic=False
        )
        block = randn(weight.numel(), 3, seed=3)
        assert relative_error(theirs @ block, H @ block) <= 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_double_backward_is_its_hessian(name: str) -> None:
    problem = PROBLEMS[name]
    model, data = seeded(problem.build()), problem.data()
    loss = problem.loss("mean")
    names = list(dict(model.named_parameters()))[:3]
    params = [dict(model.named_parameters())[name] for name in names]
    theirs = curvlinops.HessianLinearOperator(model, loss, params, data, check_deterministic=False)
    R = hk.AutogradHessian(model, data, loss, params=names)
    block = randn(R.shape[0], 2, seed=3)
    assert relative_error(theirs @ block, R @ block) <= 1e-10
