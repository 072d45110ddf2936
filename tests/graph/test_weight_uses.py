"""Where a weight acts: whatever calls it, its block is that of the weight, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import CE, Net, batches, check_blocks, check_refused, quietly, sample_loss
from dense import gauss_newton, relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn
from torch.nn.utils import prune

import hesskern as hk


def test_a_derivative_as_output_is_refused() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.b(m.a(x).tanh()).sum(), x, create_graph=True)[0]

    model = seeded(Net(run, a=nn.Linear(3, 5), b=nn.Linear(5, 1)))
    data = batches(4, shape=(3,))
    for layer in ("a", "b"):
        for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
            with pytest.raises(ValueError, match="which is no linear call by it"):
                function(model, data, CE, layers=[layer])


def test_a_weight_in_functional_calls_and_by_hand() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = F.linear(x, m.a.weight, m.a.bias).relu()
        h = (h @ m.b.weight.t() + m.b.bias).relu()
        return torch.addmm(m.c.bias, h, m.c.weight.t()) + torch.einsum("nd,md->nm", x, m.d.weight)

    model = seeded(
        Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 6), c=nn.Linear(6, 3), d=nn.Linear(4, 3))
    )
    found = check_blocks(model, batches(5, 3), {"a", "b", "c", "d"})
    assert all(H.is_exact for H in found.values())


@pytest.mark.parametrize("relation", ["parallel", "series"])
def test_tied_weights_have_the_block_of_all_their_uses(relation: str) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        second = m.b((x if relation == "parallel" else m.a(x)).relu())
        return m.c((m.a(x) + second).relu())

    model = Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    model.b.weight = model.a.weight
    model = seeded(model)
    data = batches(5, 3)
    found = quietly(hk.layer_hessians, model, data, CE)
    assert set(found) == {"a", "b", "c"}
    assert torch.equal(found["a"].to_dense(), found["b"].to_dense())
    assert found["a"].is_exact == (relation == "parallel")
    for name in found:
        expected = gauss_newton(model, data, sample_loss, name)
        assert relative_error(found[name].to_dense(), expected) <= 1e-10
    G = quietly(hk.GaussNewton, model, data, CE)
    assert list(G.slices) == ["a", "c"]
    assert G.skipped["b"] == "shares its weight with 'a', which stands for both"
    factors = hk.kronecker_factors(model, data, CE)
    assert torch.equal(factors["a"].input_covariance, factors["b"].input_covariance)


LOOKED_AT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "to": lambda m, x: m.b(m.a(x.to(m.a.weight)).relu().to(m.b.weight)),
    "type_as": lambda m, x: m.b(m.a(x.type_as(m.a.weight)).relu()),
    "new_zeros": lambda m, x: m.b(m.a(x).relu()) + m.b.weight.new_zeros(3),
    "zeros_like": lambda m, x: m.b(m.a(x).relu()) + torch.zeros_like(m.b.weight)[:, 0],
    "shape": lambda m, x: m.b(m.a(x).relu()).reshape(-1, len(m.b.weight)),
    "comparison": lambda m, x: m.b(m.a(x).relu()) * (m.b.weight.sum() > -1e9),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_look_at_a_weight_is_no_use(name: str) -> None:
    model = seeded(Net(LOOKED_AT[name], a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    found = check_blocks(model, batches(5), {"a", "b"})
    assert all(H.is_exact for H in found.values())


OTHER_USES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "norm": lambda m, x: m.b(m.a(x).relu()) * m.a.weight.norm(),
    "elementwise": lambda m, x: m.b((m.a(x) + (x[:, None] * m.a.weight).sum(2)).relu()),
    "squared": lambda m, x: m.b((m.a(x) + F.linear(x, m.a.weight.square())).relu()),
    "from the left": lambda m, x: m.b((m.a(x) + (m.a.weight @ x.T).T).relu()),
    "transposed": lambda m, x: m.b((m.a(x) @ m.a.weight).relu() @ m.a.weight.T),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_other_uses_of_a_weight_are_refused(name: str) -> None:
    model = seeded(Net(OTHER_USES[name], a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    check_refused(model, batches(5), "a", "which is no linear call by it")
    assert "b" in quietly(hk.layer_hessians, model, batches(5), CE)


class Conv1D(nn.Module):
    """As in the transformers package: the weight is kept [inputs, outputs]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("bias", ["none", "joint"])
def test_transposed_weights_keep_their_order(bias: str) -> None:
    model = seeded(
        Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu().mean(1)),
            a=Conv1D(5, 4),
            b=nn.Linear(5, 6),
            c=Conv1D(3, 6),
        )
    )
    data = batches(5, 3, shape=(2, 4))
    if bias == "none":
        check_blocks(model, data, {"a", "b", "c"})
    H = hk.layer_hessians(model, data, CE, bias=bias)["a"]
    f = hk.kronecker_factors(model, data, CE, bias=bias)["a"]
    assert H.layer_shape == (5, 4 + (bias == "joint"))
    assert H.weight_shape == f.weight_shape == H.layer_shape[::-1]
    dense, K = H.to_dense(), f.operator()
    v, V = randn(len(dense)), randn(len(dense), 3)
    assert relative_error(H @ v, dense @ v) <= 1e-12
    assert relative_error(H.diagonal(), dense.diagonal()) <= 1e-12
    assert relative_error(K.to_dense(), torch.kron(f.input_covariance, f.output_hessian)) <= 1e-12
    for operator in (K, hk.nearest_kronecker(H), hk.eigenvalue_corrected(H, K)):
        matrix = operator.to_dense()
        assert relative_error(operator @ V, matrix @ V) <= 1e-12
        assert relative_error(operator.diagonal(), matrix.diagonal()) <= 1e-12
        top = operator.eigsh(3)
        assert float(top.residuals.max()) <= 1e-12
        shifts = torch.full((3,), -0.3, dtype=torch.float64)
        solved = operator.solve_shifted(V, shifts)
        assert relative_error(matrix @ solved + 0.3 * solved, V) <= 1e-10
    if bias == "none":
        assert H.inner(K) == pytest.approx(float((dense * K.to_dense()).sum()), rel=1e-12)
        top = hk.eigsh(H, 2, start=K)
        exact = torch.linalg.eigh(dense)
        assert relative_error(top.values, exact.eigenvalues.flip(0)[:2]) <= 1e-8
        values = hk.singular_values(top.vectors, H.weight_shape)
        assert values.shape == (2, 4)
        shares = hk.eigenvector_correspondence(top.vectors, f)
        assert relative_error(shares.output.sum(0), torch.ones(2).double()) <= 1e-10
        other = hk.AutogradHessian(model, data, CE, ["a.weight"]).to_dense()
        assert relative_error(dense, other) <= 1e-10


def test_a_matrix_of_a_module_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.zeros(5, 4))
            self.shift = nn.Parameter(torch.zeros(2, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.W) + self.shift.sum(0)

    model = seeded(Net(lambda m, x: m.b(m.own(x).relu()), own=Own(), b=nn.Linear(5, 3)))
    found = check_blocks(model, batches(5), {"own.W", "b"})
    assert "acts through Sum" in found.skipped["own.shift"]


def test_pruned_and_doubly_used_parametrized_weights() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.c(m.a(x).relu() + m.a(x.tanh()))

    for wrap in (
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        torch.nn.utils.parametrizations.weight_norm,
    ):
        model = seeded(Net(run, a=nn.Linear(4, 5), c=nn.Linear(5, 3)))
        wrap(model.a)
        plain = seeded(Net(run, a=nn.Linear(4, 5), c=nn.Linear(5, 3)))
        plain.a.weight.data.copy_(model.a.weight.detach())
        check_blocks(model, batches(5), {"a", "c"}, plain)


def test_a_convolution_with_other_groups_is_no_use_of_the_same_layer() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return F.conv1d(x, m.c.weight, groups=2).mean(-1)

    model = seeded(Net(run, c=nn.Conv1d(2, 4, 3)))
    data = [(randn(4, 4, 6), classes(4, c=4))]
    with pytest.raises(ValueError, match="another stride, padding, dilation or groups"):
        hk.layer_hessians(model, data, CE)


JOINT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "scaled bias": lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.t(), beta=3),
    "along the samples": lambda m, x: F.linear(x, m.a.weight) + m.a.bias[:, None],
    "every unit and bias": lambda m, x: (
        (F.linear(x, m.a.weight)[:, :, None] + m.a.bias).relu().sum(2)
    ),
    "rows of one": lambda m, x: (
        (F.linear(x, m.a.weight).view(-1, 4, 1) + m.a.bias.view(1, 1, 4)).tanh().sum(2)
    ),
}


@pytest.mark.parametrize("name", JOINT)
def test_biases_that_are_added_otherwise_are_refused(name: str) -> None:
    model = seeded(Net(JOINT[name], a=nn.Linear(4, 4)))
    data = [(randn(4, 4), classes(4, c=4))]
    with pytest.raises(ValueError, match="has a bias that acts through"):
        hk.layer_hessians(model, data, CE, bias="joint")


def test_a_bias_along_the_columns_of_an_image_is_refused() -> None:
    model = seeded(Net(lambda m, x: (m.c(x) + m.c.bias).relu().mean((2, 3)), c=nn.Conv2d(1, 4, 2)))
    with pytest.raises(ValueError, match="has a bias that acts through Add"):
        hk.layer_hessians(model, [(randn(4, 1, 3, 5), classes(4, c=4))], CE, bias="joint")


def test_inputs_that_autocast_narrowed_and_forward_overwrote() -> None:
    def run(m: Net, x: Tensor, in_place: bool) -> Tensor:
        h = x * 1.0
        z = m.b(h)
        if in_place:
            h.mul_(7.0)
        return z

    x, y = randn(6, 4).float(), classes(6, c=3)
    found = []
    for in_place in (False, True):
        model = seeded(Net(lambda m, x, p=in_place: run(m, x, p), b=nn.Linear(4, 3))).float()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(hk.kronecker_factors(model, [(x, y)], CE)["b"].input_covariance)
    assert relative_error(found[1], found[0]) <= 1e-2
