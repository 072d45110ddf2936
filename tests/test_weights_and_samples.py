"""Whose block it is, and whose samples: uses of weights, rows of samples, the user's function."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import gauss_newton, loss_hessian, relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import hesskern as hk

CE = nn.CrossEntropyLoss()
Data = list[tuple[Any, Tensor]]


def sample_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


class Net(nn.Module):
    """Modules, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The answer where its warnings are not what is looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the Gauss-Newton block|left out", UserWarning)
        return function(*args, **kwargs)


def check_blocks(
    model: nn.Module, data: Data, layers: set[str], plain: nn.Module | None = None
) -> hk.LayerHessians:
    """Every layer's block by layer_hessians and GaussNewton, against torch's Jacobian.

    Args:
        model: to look at.
        data: batches.
        layers: that must be there.
        plain: the same function where torch cannot differentiate the model as it is.
    """
    found = quietly(hk.layer_hessians, model, data, CE)
    assert set(found) == layers, found.skipped
    G = quietly(hk.GaussNewton, model, data, CE).to_dense()
    slices = quietly(hk.GaussNewton, model, data, CE).slices
    factors = quietly(hk.kronecker_factors, model, data, CE)
    assert set(factors) == layers
    for name, H in found.items():
        expected = gauss_newton(plain or model, data, sample_loss, name)
        if H.transposed:
            m, d = H.layer_shape
            assert expected.shape == (m * d, m * d)
        assert relative_error(H.to_dense(), expected) <= 1e-10
        assert relative_error(G[slices[name], slices[name]], expected) <= 1e-10
        if H.is_exact:
            whole = loss_hessian(plain or model, data, sample_loss, name)
            assert relative_error(H.to_dense(), whole) <= 1e-10
    return found


def said(function: Callable[..., Any], model: nn.Module, data: Data, layer: str) -> str:
    """Why a layer is left out, or why all are."""
    try:
        return quietly(function, model, data, CE).skipped[layer]
    except ValueError as error:
        return str(error)


def check_refused(model: nn.Module, data: Data, layer: str, reason: str) -> None:
    """The layer is left out with the reason, and refused when it is asked for by name."""
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        assert reason in said(function, model, data, layer)
        with pytest.raises(ValueError, match=f"'{layer}'"):
            function(model, data, CE, layers=[layer])


def batches(*sizes: int, shape: tuple[int, ...] = (4,)) -> Data:
    return [
        (randn(n, *shape, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes, start=1)
    ]


# The function that is differentiated


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


# Which rows belong to which samples


def _sequence_first(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x.transpose(0, 1)).tanh().mean(0))


@pytest.mark.parametrize("length", [5, 3, 1])
def test_sequences_with_time_first(length: int) -> None:
    model = seeded(Net(_sequence_first, a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    data = batches(5, 5, 2, shape=(length, 4))
    found = check_blocks(model, data, {"a", "b"})
    assert found["b"].checked == "graph"


ATTENTION = {
    "self": lambda m, x: m.h(m.att(x, x, x, need_weights=False)[0].relu().mean(1)),
    "with weights": lambda m, x: m.h(m.att(x, x, x)[0].relu().mean(1)),
    "cross": lambda m, x: m.h(m.att(x, x.flip(1), x.flip(1))[0].relu().mean(1)),
    "all different": lambda m, x: m.h(m.att(x, x.flip(1), x.tanh())[0].relu().mean(1)),
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_of_attention(kind: str, batch_first: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    run = ATTENTION[kind] if batch_first else lambda m, x: _time_first(m, x, kind)
    model = seeded(Net(run, att=attention, h=nn.Linear(4, 3)))
    data = batches(4, 3, shape=(4, 4))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check_blocks(model, data, {"att.in_proj", "att.out_proj", "h"})


def _time_first(m: Net, x: Tensor, kind: str) -> Tensor:
    t = x.transpose(0, 1)
    key = t if kind in ("self", "with weights") else t.flip(0)
    value = t.tanh() if kind == "all different" else key
    return m.h(m.att(t, key, value, need_weights=kind == "with weights")[0].relu().mean(0))


def test_projections_of_attention_with_other_widths() -> None:
    model = seeded(
        Net(
            lambda m, x: m.h(m.att(x, x[..., :3], x[..., :2])[0].mean(1)),
            att=nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True),
            h=nn.Linear(4, 3),
        )
    )
    projections = {f"att.{p}_proj" for p in ("q", "k", "v", "out")}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check_blocks(model, batches(4, shape=(3, 4)), projections | {"h"})


COUPLED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mean over the batch": lambda m, x: m.b((m.a(x) - m.a(x).mean(0)).relu()),
    "softmax over the batch": lambda m, x: m.b(m.a(x).softmax(0)),
    "attention over the batch": lambda m, x: m.b((m.a(x) @ m.a(x).T).softmax(1) @ m.a(x)),
    "adjacency": lambda m, x: m.b((x @ x.T).sigmoid() @ m.a(x)),
    "running sum": lambda m, x: m.b(m.a(x).cumsum(0).relu()),
    "neighbour": lambda m, x: m.b(m.a(x) + m.a(x).roll(1, 0)),
    "reversed": lambda m, x: m.b(m.a(x).flip(0).relu()),
    "one row for all": lambda m, x: m.b(m.a(x)[:1] * x.sum(1, keepdim=True)),
    "sorted": lambda m, x: m.b(m.a(x[x[:, 0].argsort()]).relu()[(-x[:, 0]).argsort()]),
    "weakly": lambda m, x: m.b(m.a(x) + 1e-4 * m.a(x).mean(0)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_or_moved_rows_are_refused(name: str) -> None:
    model = seeded(Net(COUPLED[name], a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    check_refused(model, batches(6, 4), "a", "rows of its input act on the outputs of several")


def test_of_contrastive_logits_one_side_is_refused() -> None:
    model = seeded(Net(lambda m, x: m.a(x) @ m.b(x).T, a=nn.Linear(4, 5), b=nn.Linear(4, 5)))
    data = [(randn(6, 4), torch.arange(6))]
    check_refused(model, data, "b", "act on the outputs of several samples")
    # Logits n depend on row n of the other side alone.
    H = quietly(hk.layer_hessians, model, data, CE)["a"]
    assert relative_error(H.to_dense(), gauss_newton(model, data, sample_loss, "a")) <= 1e-10


def test_detached_batch_statistics_are_constants() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b((h - h.mean(0).detach()).relu())

    found = check_blocks(
        seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3))), batches(6), {"a", "b"}
    )
    assert not found["a"].is_exact


def test_flattened_tokens_are_samples_of_their_own() -> None:
    model = seeded(
        Net(lambda m, x: m.b(m.a(x).relu()).flatten(0, 1), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    )
    data = [(randn(5, 2, 4), classes(10, c=3)), (randn(3, 3, 4), classes(9, c=3))]
    check_blocks(model, data, {"a", "b"})


def test_rows_moved_by_values_are_looked_at_in_every_batch() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.b(m.a(x[order])[order.argsort()].relu())

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    ordered, other = randn(6, 4), randn(6, 4, seed=1)
    ordered[:, 0] = torch.arange(6)
    y = classes(6, c=3)
    check_blocks(model, [(ordered, y)], {"a", "b"})
    with pytest.raises(ValueError, match="layer 'a' sees rows that are no samples"):
        quietly(hk.layer_hessians, model, [(ordered, y), (other, y)], CE)


def test_single_samples_say_that_nothing_was_checked() -> None:
    model = seeded(Net(_sequence_first, a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    coupled = seeded(Net(COUPLED["neighbour"], a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    ones = batches(1, 1, shape=(2, 4))
    factors = hk.kronecker_factors(model, ones, CE)
    assert factors.settings["checked"]["b"] == "graph"
    single = batches(1)
    assert hk.kronecker_factors(coupled, single, CE).settings["checked"]["a"] == "single samples"
    assert quietly(hk.layer_hessians, coupled, single, CE)["a"].checked == "single samples"
    # A later batch of several is looked at.
    with pytest.raises(ValueError, match="layer 'a' sees rows that are no samples"):
        hk.kronecker_factors(coupled, batches(1, 5), CE)


def _count_backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    plain = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


def test_a_stream_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # No rule covers unfold: autograd does one pass for each of the two root rows.
    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).unfold(1, 2, 2).prod(2))

    model = seeded(Net(run, a=nn.Linear(4, 6), b=nn.Linear(3, 3)))
    data = batches(6, 6, 6)
    calls = _count_backwards(monkeypatch)
    stream = hk.FactorAccumulator(model, CE)
    counts = []
    for batch in data:
        calls.clear()
        stream.update(*batch)
        counts.append(len(calls))
    assert counts == [2 + 2, 2, 2]
    assert stream.factors().settings["checked"] == {"a": "probe", "b": "graph"}
    calls.clear()
    hk.kronecker_factors(model, data, CE, check=False)
    assert len(calls) == 6


def test_a_mixing_behind_closed_gates_is_looked_for_again() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h + (x[:, :1] > 0) * h.cumsum(0))

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    closed, opened = randn(5, 4), randn(5, 4, seed=1)
    closed[:, 0], opened[:, 0] = -1.0, 1.0
    y = classes(5, c=3)
    check_blocks(model, [(closed, y)], {"a", "b"})
    with pytest.raises(ValueError, match="layer 'a' sees rows that are no samples"):
        quietly(hk.layer_hessians, model, [(closed, y), (opened, y)], CE)


def test_rows_that_cannot_be_told_apart_have_no_weights() -> None:
    # Only the last position of two acts, for two samples: which row is the first one's other row?
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x.transpose(0, 1)) * x.new_tensor([0.0, 1.0])[:, None, None]
        return m.b((h * x.new_tensor([0.0, 1.0])[None, :, None]).unfold(2, 6, 6).sum((0, 3)))

    model = seeded(Net(run, a=nn.Linear(4, 6), b=nn.Linear(1, 3)))
    data = [(randn(2, 2, 4), classes(2, c=3))]
    check_blocks(model, data, {"a", "b"})
    with pytest.raises(ValueError, match="layer 'a' sees rows that act on no output"):
        hk.kronecker_factors(model, data, CE, sample_weight=torch.tensor([1.0, 2.0]))


def test_without_the_check_axis_0_counts() -> None:
    model = seeded(Net(COUPLED["neighbour"], a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    data = batches(6)
    found = quietly(hk.layer_hessians, model, data, CE, check=False)
    assert found["a"].checked == "unchecked"
    assert found["b"].checked == "graph"
    factors = hk.kronecker_factors(model, data, CE, check=False)
    assert factors.settings["checked"]["a"] == "unchecked"
    assert hk.GaussNewton(model, data, CE, check=False).checked["a"] == "unchecked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_samples_in_narrow_dtypes(dtype: torch.dtype) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).unfold(1, 2, 2).prod(2))

    model = seeded(Net(run, a=nn.Linear(4, 6), b=nn.Linear(3, 3))).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches(300)]
    assert hk.kronecker_factors(model, data, CE).settings["checked"]["a"] == "probe"
    swapped = seeded(
        Net(
            lambda m, x: m.b(m.a(x)[[1, 0, *range(2, len(x))]]),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
        )
    ).to(dtype)
    with pytest.warns(UserWarning, match="left out: 'a' sees rows that are no samples"):
        hk.kronecker_factors(swapped, data, CE)


# Where a weight acts


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


# What is left out


def test_layers_left_out_are_named_with_the_share_that_is_covered() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) * m.a.weight.norm()

    model = seeded(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3), dead=nn.Conv1d(1, 1, 1)))
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.warns(UserWarning, match="left out") as caught:
            found = function(model, batches(5), CE)
        assert set(found.skipped) == {"a", "dead"}
        message = next(str(w.message) for w in caught if "left out" in str(w.message))
        assert "'dead' was never reached" in message
        assert "'a' has a weight" in message
        assert "covers 33.3% of the model's parameters" in message


def test_a_model_without_layers_says_what_it_met() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="its parameters are in Embedding, 2 LayerNorm"):
        hk.kronecker_factors(model, batches(2), CE)


def test_complex_layers_are_skipped_by_name() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x.to(torch.cdouble)).abs()),
        a=nn.Linear(4, 5, dtype=torch.cdouble),
        b=nn.Linear(5, 3).double(),
    )
    data = batches(5)
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        assert "complex" in quietly(function, model, data, CE).skipped["a"]
        with pytest.raises(NotImplementedError, match="'a' has complex weights"):
            function(model, data, CE, layers=["a"])
    with pytest.raises(NotImplementedError, match=r"'a.weight' is torch\.complex128"):
        hk.AutogradHessian(model, data, CE, ["a.weight"])
    check_blocks(model, data, {"b"})


def test_behind_a_complex_modulus_nothing_is_exact() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(torch.complex(m.a(x), x).abs())

    found = check_blocks(
        seeded(Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 3))), batches(5), {"a", "b"}
    )
    assert not found["a"].is_exact
    assert found["b"].is_exact


def test_sparse_inputs_are_refused() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 3)))
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(TypeError, match="must be dense, got a tensor"):
            function(model, [(randn(5, 4).to_sparse(), classes(5, c=3))], CE)


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


# What an adversary would try


def answer(model: nn.Module, data: Data, layer: str) -> hk.LayerHessian | str:
    """The layer's Hessian, or why there is none."""
    try:
        found = quietly(hk.layer_hessians, model, data, CE)
    except ValueError as error:
        return str(error)
    return found[layer] if layer in found else f"layer '{layer}' {found.skipped[layer]}"


def check_right_or_refused(model: nn.Module, data: Data, layer: str) -> None:
    """In this order of the batches and in the other."""
    for order in (data, data[::-1]):
        found = answer(model, order, layer)
        if isinstance(found, str):
            assert f"layer '{layer}' sees rows" in found
        else:
            expected = gauss_newton(model, order, sample_loss, layer)
            assert relative_error(found.to_dense(), expected) <= 1e-10


def _times(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


LENGTHS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "repeat": lambda m, x: m.a(_times(x)).repeat(1, 1, 2).sum(0),
    "pad": lambda m, x: F.pad(m.a(_times(x)), (1, 1), mode="reflect").sum(0),
    "interpolate": lambda m, x: F.interpolate(m.a(_times(x)), 5, mode="linear").sum(0),
    "unfold": lambda m, x: m.a(_times(x)).unfold(2, 2, 1).sum((0, 3)),
    "cumprod": lambda m, x: m.a(_times(x)).cumprod(2).sum(0),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_one_position_says_nothing_about_several(name: str) -> None:
    model = seeded(Net(LENGTHS[name], a=nn.Linear(4, 4)))
    data = [(randn(4, t, 4, seed=t), classes(4, c=3, seed=t)) for t in (1, 3)]
    check_right_or_refused(model, data, "a")


HIDDEN_COUPLING: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "weighted sum, then repeat": lambda m, x, A: (m.a(x)[None] * A[:, :, None]).sum(1).repeat(1, 2),
    "product, then repeat": lambda m, x, A: (A @ m.a(x)).repeat(1, 2),
    "in place on a part": lambda m, x, A: _added_product(m, x, A),
    "attention, then repeat": lambda m, x, A: (
        (m.a(x) @ m.a(x).T).masked_fill(A == 0, -torch.inf).softmax(1) @ x
    ).repeat(1, 2),
    "cummax": lambda m, x, A: (m.a(x) + 1e3 * A.sum(1).cumsum(0)[:, None]).cummax(0).values,
}


def _added_product(m: Net, x: Tensor, A: Tensor) -> Tensor:
    rows = torch.zeros(len(x), 4, dtype=x.dtype)
    rows[:, :3].addmm_(A, m.a(x))
    return rows


@pytest.mark.parametrize("name", HIDDEN_COUPLING)
def test_a_coupling_that_the_first_batch_hides(name: str) -> None:
    model = seeded(Net(HIDDEN_COUPLING[name], a=nn.Linear(4, 3)))
    eye, dense = torch.eye(4).double(), 0.2 * randn(4, 4, seed=9).abs()
    data = [((randn(4, 4, seed=i), A), classes(4, c=3, seed=i)) for i, A in enumerate((eye, dense))]
    check_right_or_refused(model, data, "a")


def test_the_axis_of_a_transposition_may_change_between_batches() -> None:
    def run(m: Net, x: Tensor, axis: Tensor) -> Tensor:
        h = m.a(x).cumprod(3)
        return h.transpose(0, int(axis[0, 0])).sum((1, 2))

    model = seeded(Net(run, a=nn.Linear(2, 3)))
    data = [
        ((randn(3, 3, 3, 2, seed=i), torch.full((3, 1), i)), classes(3, c=3, seed=i))
        for i in (1, 2)
    ]
    check_right_or_refused(model, data, "a")


def test_a_convolution_with_other_groups_is_no_use_of_the_same_layer() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return F.conv1d(x, m.c.weight, groups=2).mean(-1)

    model = seeded(Net(run, c=nn.Conv1d(2, 4, 3)))
    data = [(randn(4, 4, 6), classes(4, c=4))]
    with pytest.raises(ValueError, match="another stride, padding, dilation or groups"):
        hk.layer_hessians(model, data, CE)


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


TAKEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "new_tensor": lambda h: h * h.detach().new_tensor(h.tolist()),
    "written under no_grad": lambda h: h * _written(h, False),
    "written to .data": lambda h: h * _written(h, True),
}


def _written(h: Tensor, data: bool) -> Tensor:
    buffer = torch.zeros(h.shape, dtype=h.dtype)
    if data:
        buffer.data[:] = h.detach()
        return buffer
    with torch.no_grad():
        buffer[:] = h
    return buffer


@pytest.mark.parametrize("name", TAKEN_OUT)
def test_values_taken_out_of_the_graph_make_nothing_exact(name: str) -> None:
    take = TAKEN_OUT[name]
    model = seeded(Net(lambda m, x: m.b(take(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    assert not quietly(hk.layer_hessians, model, batches(5), CE)["a"].is_exact
