"""The function that is differentiated is the user's: switches, randomness, hooks, cuts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import CE, Net, batches, check_blocks, quietly, sample_loss
from dense import gauss_newton, loss_hessian, relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hesskern as hk


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("layers", [None, ["head"]])
def test_fused_attention_is_not_switched_on_by_freezing(layers: list[str] | None) -> None:
    model = seeded(Padded()).eval()
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[:, 2:] = True
    data = [((randn(5, 4, 8), padding), classes(5, c=3))]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = gauss_newton(model, data, sample_loss, "head")
        x = model.encoder(randn(5, 4, 8), src_key_padding_mask=padding).mean(1).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    H = quietly(hk.layer_hessians, model, data, CE, layers)["head"]
    G = quietly(hk.GaussNewton, model, data, CE, layers)
    A = hk.AutogradHessian(model, data, CE, ["head.weight"])
    f = quietly(hk.kronecker_factors, model, data, CE, layers)["head"]
    assert relative_error(H.to_dense(), expected) <= 1e-10
    assert relative_error(G.to_dense()[G.slices["head"], G.slices["head"]], expected) <= 1e-10
    assert relative_error(A.to_dense(), expected) <= 1e-10
    assert relative_error(f.input_covariance, x.T @ x / 5) <= 1e-10
    assert torch.backends.mha.get_fastpath_enabled()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.c(checkpoint(self.b, h, use_reentrant=self.reentrant).tanh())

    def plain(self) -> nn.Module:
        layers = OrderedDict(a=self.a, t=nn.Tanh(), b=self.b, u=nn.Tanh(), c=self.c)
        return nn.Sequential(layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_both_kinds(reentrant: bool) -> None:
    model = seeded(Checkpointed(reentrant))
    data = batches(5, 3)
    check_blocks(model, data, {"a", "b", "c"}, model.plain())
    found = hk.AutogradHessian(model, data, CE, ["b.weight"]).to_dense()
    expected = loss_hessian(model.plain(), data, sample_loss, "b")
    assert relative_error(found, expected) <= 1e-10


def test_dropout_that_is_always_on_is_refused_everywhere() -> None:
    model = seeded(
        Net(lambda m, x: m.b(F.dropout(m.a(x), 0.2)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    )
    data = batches(6)
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(ValueError, match="same outputs for the same inputs"):
            function(model, data, CE)
    H = hk.AutogradHessian(model, data, CE, ["a.weight"])
    with pytest.raises(ValueError, match="same outputs for the same inputs"):
        H @ randn(20)
    stream = hk.FactorAccumulator(model, CE)
    with pytest.raises(ValueError, match="same outputs for the same inputs"):
        stream.update(*data[0])


def test_random_inputs_of_a_layer_are_refused_though_the_outputs_are_the_same() -> None:
    # Behind closed units nothing is random, but E[x x^T] is.
    model = seeded(
        Net(
            lambda m, x: m.b((m.a(x * torch.rand(1)) - 1e6).relu()),
            a=nn.Linear(4, 5),
            b=nn.Linear(5, 3),
        )
    )
    with pytest.raises(ValueError, match="same outputs for the same inputs"):
        hk.kronecker_factors(model, batches(6), CE)


def test_random_derivatives_are_refused_though_all_values_are_the_same() -> None:
    model = seeded(
        Net(lambda m, x: m.b(F.dropout(m.a(x))), a=nn.Linear(4, 5, bias=False), b=nn.Linear(5, 3))
    )
    with pytest.raises(ValueError, match="same outputs for the same inputs"):
        hk.kronecker_factors(model, [(torch.zeros(6, 4).double(), classes(6, c=3))], CE)


def test_random_numbers_that_change_nothing_are_no_matter() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        torch.rand(3)
        return m.a(x)

    data = batches(6)
    check_blocks(seeded(Net(run, a=nn.Linear(4, 3))), data, {"a"})


def test_autograd_hessian_refuses_what_runs_without_gradients() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.a(x)
        return m.b(h)

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    with pytest.raises(ValueError, match=r"'a.weight' belongs to a module that runs under"):
        hk.AutogradHessian(model, batches(4), CE, ["a.weight"]).trace()
    assert hk.AutogradHessian(model, batches(4), CE, ["b.weight"]).trace() > 0


def test_hooks_on_gradients_are_part_of_the_function() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        h.register_hook(lambda g: 3 * g)
        return m.b(h)

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    data = batches(6)
    expected = gauss_newton(model, data, sample_loss, "a")
    H = quietly(hk.layer_hessians, model, data, CE)["a"]
    assert relative_error(H.to_dense(), expected) <= 1e-10
    assert not H.is_exact
    factors = hk.kronecker_factors(model, data, CE)["a"]
    plain = nn.Sequential(model.a, nn.ReLU(), model.b)
    other = hk.kronecker_factors(plain, data, CE)["0"]
    assert relative_error(factors.output_hessian, 9 * other.output_hessian) <= 1e-10


def test_behind_a_complex_modulus_nothing_is_exact() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        # Of operations that are linear, were it not for the kind of number.
        return m.b((m.a(x).to(torch.cdouble) + 1j * x).abs())

    found = check_blocks(
        seeded(Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 3))), batches(5), {"a", "b"}
    )
    assert not found["a"].is_exact
    assert found["b"].is_exact


def test_training_mode_is_not_what_weights_are_looked_at_in() -> None:
    # Asked for in training mode, a spectral norm moves its vectors.
    model = seeded(
        nn.Sequential(
            torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)),
            nn.ReLU(),
            nn.Linear(5, 3),
        )
    ).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        skipped = function(model, batches(4), CE).skipped
        assert list(skipped) == ["0.parametrizations.weight"]
        assert "makes the weight of '0'" in skipped["0.parametrizations.weight"]
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["hook", "prehook"])
def test_hooks_on_nodes_are_part_of_the_function(kind: str) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        if h.grad_fn is not None:
            if kind == "hook":
                h.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 0.5,))
            else:
                h.grad_fn.register_prehook(lambda outputs: (outputs[0] * 0.5,))
        return m.b(h)

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    data = batches(6)
    H = quietly(hk.layer_hessians, model, data, CE)["a"]
    assert not H.is_exact
    expected = gauss_newton(model, data, sample_loss, "a")
    assert relative_error(H.to_dense(), expected) <= 1e-10
    # The user's class is left as it was.
    assert "grad_fn" not in vars(torch.Tensor)


# Each takes a value out in one way alone: the flag must not come from another one.
TAKEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "new_tensor": lambda h: h * h.new_tensor(h),
    "written under no_grad": lambda h: h * _written(h),
    "written to .data": lambda h: h * _written_to_data(h),
    "read from .data": lambda h: h * h.data,
    "a number": lambda h: h * h.sum().item(),
}


def _written(h: Tensor) -> Tensor:
    buffer = torch.zeros(h.shape, dtype=h.dtype)
    with torch.no_grad():
        buffer[:] = h
    return buffer


def _written_to_data(h: Tensor) -> Tensor:
    buffer = torch.zeros(h.shape, dtype=h.dtype)
    buffer.data[:] = h
    return buffer


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", TAKEN_OUT)
def test_values_taken_out_of_the_graph_make_nothing_exact(name: str) -> None:
    take = TAKEN_OUT[name]
    model = seeded(Net(lambda m, x: m.b(take(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    assert not quietly(hk.layer_hessians, model, batches(5), CE)["a"].is_exact


class Recurrent(nn.Module):
    """Notes at every run whether cuDNN may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        return self.head(self.recurrent(x)[0][:, -1])


def test_recurrences_without_cudnn() -> None:
    """Whatever precisions the user has chosen, which cuDNN keeps by operation; all come back."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        model, x = Recurrent().eval(), torch.randn(5, 2, 3)
        hk.kronecker_factors(model, [(x, torch.arange(5) % 3)], nn.CrossEntropyLoss())
        assert model.seen
        assert not any(model.seen)
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
