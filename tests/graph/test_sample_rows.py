"""Which rows of a layer belong to which samples: proved, probed or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import CE, Data, Net, batches, check_blocks, check_refused, quietly, sample_loss
from dense import gauss_newton, relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.zoo.models import build


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
    assert hk.kronecker_factors(coupled, single, CE).settings["checked"]["a"] == "not checked"
    assert quietly(hk.layer_hessians, coupled, single, CE)["a"].checked == "not checked"
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


@pytest.mark.parametrize("mix", ["cumsum", "mean"])
def test_a_mixing_behind_closed_gates_is_looked_for_again(mix: str) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        mixed = h.cumsum(0) if mix == "cumsum" else h.mean(0).expand(len(x), 5)
        return m.b(h + (x[:, :1] > 0) * mixed)

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


def test_a_layer_beside_the_outputs_has_rows_of_unknown_samples() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        m.a(x.transpose(0, 1))
        return m.b(x.mean(1))

    model = seeded(Net(run, a=nn.Linear(4, 2), b=nn.Linear(4, 3)))
    data = [(randn(3, 2, 4), classes(3, c=3))]
    # Without weights it does not matter whose they are.
    factors = hk.kronecker_factors(model, data, CE)
    rows = data[0][0].flatten(0, 1)
    assert relative_error(factors["a"].input_covariance, rows.T @ rows / 3) <= 1e-12
    with pytest.raises(ValueError, match="layer 'a' sees rows that act on no output"):
        hk.kronecker_factors(model, data, CE, sample_weight=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("dtype", "samples", "passes"),
    [
        (torch.float32, 64, 2),
        (torch.float32, 65, 3),
        (torch.float32, 4096, 3),
        (torch.float32, 4097, 4),
        (torch.float64, 256, 2),
        (torch.float64, 257, 3),
        (torch.float16, 9, 3),
    ],
)
def test_how_many_passes_a_probe_takes(
    dtype: torch.dtype, samples: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(Net(lambda m, x: m.a(x).unfold(1, 1, 1)[:, :, 0], a=nn.Linear(1, 2))).to(dtype)
    data = [(randn(samples, 1).to(dtype), classes(samples, c=2))]
    calls = _count_backwards(monkeypatch)
    factors = hk.kronecker_factors(model, data, CE)
    assert factors.settings["checked"] == {"a": "probe"}
    # One root row of two classes.
    assert len(calls) == passes + 1


def test_known_networks_are_proved_without_a_pass() -> None:
    """Evidence then costs a walk over the graph alone."""
    networks: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "f8x2": (build("f8x2", (6,), 3), (6,)),
        "lenet5": (build("lenet5", (3, 32, 32), 3), (3, 32, 32)),
        "resnet18": (build("resnet18-w4-bn", (3, 32, 32), 3), (3, 32, 32)),
        "vgg11": (build("vgg11-w4-bn", (3, 32, 32), 3), (3, 32, 32)),
        "encoder": (
            nn.Sequential(
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
                nn.Flatten(),
                nn.Linear(32, 3),
            ),
            (4, 8),
        ),
    }
    for name, (model, shape) in networks.items():
        data = [(randn(3, *shape).float(), classes(3, c=3))]
        factors = hk.kronecker_factors(model, data, CE, output="mc")
        assert set(factors.settings["checked"].values()) == {"graph"}, name


def test_without_the_check_axis_0_counts() -> None:
    model = seeded(Net(COUPLED["neighbour"], a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    data = batches(6)
    found = quietly(hk.layer_hessians, model, data, CE, check=False)
    assert found["a"].checked == "switched off"
    assert found["b"].checked == "graph"
    factors = hk.kronecker_factors(model, data, CE, check=False)
    assert factors.settings["checked"]["a"] == "switched off"
    assert hk.GaussNewton(model, data, CE, check=False).checked["a"] == "switched off"


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
        # Behind unfold, of which the graph proves nothing, but which does the same in all batches.
        return m.a(x).transpose(0, int(axis[0, 0])).unfold(3, 2, 1).mean((1, 2, 4))

    model = seeded(Net(run, a=nn.Linear(2, 4)))
    data = [
        ((randn(3, 3, 3, 2, seed=i), torch.full((3, 1), i)), classes(3, c=3, seed=i))
        for i in (1, 2)
    ]
    check_right_or_refused(model, data, "a")
