"""Experts that tokens are routed to: every row belongs to the sample of its token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import CE, quietly, sample_loss
from dense import gauss_newton, relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

D, M, C, EXPERTS, TOP = 4, 8, 3, 4, 2

Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, M), nn.Linear(M, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh())
        return y


class Routed(nn.Module):
    """[N, T, D] -> logits [N, C]; ``run`` gives [N T, D] of tokens, their experts and weights."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.head = nn.Linear(D, C)
        self.run = run

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [R, TOP] and their weights."""
        weights, chosen = self.gate(tokens).softmax(-1).topk(TOP, -1)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        flat = h.reshape(-1, D)
        chosen, weights = self.choose(flat)
        out = self.run(self, flat, chosen, weights).reshape(h.shape)
        z: Tensor = self.head((h + out).sin().mean(1))
        return z


def _index_add(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tokens, place = torch.where(chosen == e)
        y = expert(x[tokens]) * weights[tokens, place, None]
        out.index_add_(0, tokens, y)
    return out


def _one_more_axis(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for e, expert in enumerate(m.experts):
        place, tokens = torch.where(mask[e])
        current = x[None, tokens].reshape(-1, D)
        out.index_add_(0, tokens, expert(current) * weights[tokens, place, None])
    return out


def _sorted(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Sorted by expert, in slices, and back."""
    order = chosen.reshape(-1).argsort(stable=True)
    counts = chosen.reshape(-1).bincount(minlength=EXPERTS).tolist()
    rows = x[order // TOP]
    parts, begin = [], 0
    for expert, count in zip(m.experts, counts, strict=True):
        if count:
            parts.append(expert(rows[begin : begin + count]))
        begin += count
    y = torch.cat(parts)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (y[back].view(len(x), TOP, -1) * weights.unsqueeze(2)).sum(1)


def _split(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As before with split, and products scattered by row."""
    order = chosen.reshape(-1).argsort(stable=True)
    counts = chosen.reshape(-1).bincount(minlength=EXPERTS).tolist()
    tokens = order // TOP
    rows = x.index_select(0, tokens).split(counts)
    y = torch.cat([expert(part) for expert, part in zip(m.experts, rows, strict=True)])
    y = y * weights.reshape(-1)[order].unsqueeze(1)
    return torch.zeros_like(x).scatter_add(0, tokens.unsqueeze(1).expand_as(y), y)


def _masked(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        here = (chosen == e).any(1)
        share = (weights * (chosen == e)).sum(1)
        out[here] = out[here] + expert(x[here]) * share[here].unsqueeze(1)
    return out


RUNS: dict[str, Run] = {
    "index_add": _index_add,
    "one more axis": _one_more_axis,
    "sorted": _sorted,
    "split": _split,
    "masked": _masked,
}
LAYERS = [f"experts.{e}.{part}" for e in range(EXPERTS) for part in ("up", "down")]


def _data(*sizes: int, t: int = 3) -> list[Any]:
    return [(randn(n, t, D, seed=i), classes(n, c=C, seed=i)) for i, n in enumerate(sizes, start=1)]


def _expected(
    model: Routed, data: list[Any], weights: list[Tensor] | None = None, joint: bool = False
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, E[M] and rows per sample of every expert, token by token of one sample at a time."""
    A: dict[str, Any] = dict.fromkeys(LAYERS, 0.0)
    E: dict[str, Any] = dict.fromkeys(LAYERS, 0.0)
    rows: dict[str, float] = dict.fromkeys(LAYERS, 0.0)
    total = 0.0
    for b, (inputs, _) in enumerate(data):
        for n, sample in enumerate(inputs):
            share = 1.0 if weights is None else float(weights[b][n])
            calls: list[tuple[str, Tensor, Tensor]] = []
            hidden = []
            for token in sample:
                h = model.inp(token)
                probability = model.gate(h).softmax(0)
                top = probability.sort(descending=True).indices[:TOP].tolist()
                mixed = h
                for e in top:
                    expert: Any = model.experts[e]
                    z1 = expert.up.weight @ h + expert.up.bias
                    a = z1.tanh()
                    z2 = expert.down.weight @ a + expert.down.bias
                    calls += [(f"experts.{e}.up", h, z1), (f"experts.{e}.down", a, z2)]
                    mixed = mixed + z2 * probability[e] / probability[top].sum()
                hidden.append(mixed.sin())
            logits = model.head(torch.stack(hidden).mean(0))
            p = logits.detach().softmax(0)
            curvature = p.diag() - torch.outer(p, p)
            grads = [
                torch.autograd.grad(logits[c], [z for *_, z in calls], retain_graph=True)
                for c in range(C)
            ]
            for i, (name, x, _) in enumerate(calls):
                J = torch.stack([grads[c][i] for c in range(C)])
                x = torch.cat([x, x.new_ones(1)]) if joint else x
                A[name] = A[name] + share * torch.outer(x, x).detach()
                E[name] = E[name] + share * J.T @ curvature @ J
                rows[name] += share
            total += share
    return {n: (A[n] / total, E[n] / rows[n], rows[n] / total) for n in LAYERS if rows[n]}


def _check(factors: hk.Factors, expected: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    assert set(factors) >= set(expected)
    for name, (A, E, positions) in expected.items():
        assert relative_error(factors[name].input_covariance, A) <= 1e-10, name
        assert relative_error(factors[name].output_hessian, E) <= 1e-10, name
        assert factors[name].positions == pytest.approx(positions, rel=1e-12)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bias", ["none", "joint"])
def test_factors_of_routed_experts(run: str, bias: Any) -> None:
    model, data = seeded(Routed(RUNS[run])), _data(4, 3, 1, 5)
    factors = quietly(hk.kronecker_factors, model, data, CE, bias=bias)
    assert {"inp", "gate", "head", *LAYERS} == set(factors)
    _check(factors, _expected(model, data, joint=bias == "joint"))
    assert {factors.settings["checked"][name] for name in LAYERS} == {"graph"}


@pytest.mark.parametrize("run", RUNS)
def test_weighted_samples_of_routed_experts(run: str) -> None:
    model, data = seeded(Routed(RUNS[run])), _data(4, 3)
    weights = [randn(4, seed=8).abs(), torch.tensor([0.0, 2.0, 0.5], dtype=torch.double)]
    weighted = [(*batch, weight) for batch, weight in zip(data, weights, strict=True)]
    factors = quietly(hk.kronecker_factors, model, weighted, CE)
    _check(factors, _expected(model, data, weights))


@pytest.mark.parametrize("run", RUNS)
def test_hessians_of_routed_experts(run: str) -> None:
    model, data = seeded(Routed(RUNS[run])), _data(4, 3, 1)
    found = quietly(hk.layer_hessians, model, data, CE)
    G = quietly(hk.GaussNewton, model, data, CE)
    whole = G.to_dense()
    for name in LAYERS:
        expected = gauss_newton(model, data, sample_loss, name)
        assert relative_error(found[name].to_dense(), expected) <= 1e-10, name
        assert relative_error(whole[G.slices[name], G.slices[name]], expected) <= 1e-10, name


def test_of_one_sample_alone_all_rows_are_its_own() -> None:
    model, data = seeded(Routed(_index_add)), _data(1, 1, t=7)
    _check(quietly(hk.kronecker_factors, model, data, CE), _expected(model, data))


def test_an_expert_without_a_token_is_skipped_with_the_reason() -> None:
    model, data = seeded(Routed(_index_add)), _data(4)
    with torch.no_grad():
        # Positive tokens, to which the last expert is the worst.
        model.inp.weight.copy_(torch.eye(D))
        model.inp.bias.fill_(0.0)
        model.gate.weight[-1] = -9.0
    data = [(x.abs(), y) for x, y in data]
    factors = quietly(hk.kronecker_factors, model, data, CE)
    last = f"experts.{EXPERTS - 1}"
    assert "never reached" in factors.skipped[f"{last}.up"]
    with pytest.raises(ValueError, match=f"'{last}.up' was never reached"):
        hk.kronecker_factors(model, data, CE, layers=[f"{last}.up"])
    _check(factors, _expected(model, data))
    # A batch that does reach it counts all samples in A, and its rows alone in E[M].
    both = [*data, *_data(3)]
    _check(quietly(hk.kronecker_factors, model, both, CE), _expected(model, both))


def _mixing(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """An expert's tokens see their mean, over all samples."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tokens, place = torch.where(chosen == e)
        rows = x[tokens]
        y = expert(rows)
        y = (y + y.mean(0, keepdim=True)) * weights[tokens, place, None]
        out.index_add_(0, tokens, y)
    return out


def _doubled(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What an expert gives goes to the token and to one of another sample as well."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tokens, place = torch.where(chosen == e)
        y = expert(x[tokens]) * weights[tokens, place, None]
        out = out.index_add(0, tokens, y).index_add(0, len(x) - 1 - tokens, y)
    return out


def _unrouted(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Numbers that a product with a matrix of zeros and ones stands for show no samples."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tokens, place = torch.where(chosen == e)
        y = expert(x[tokens]) * weights[tokens, place, None]
        out = out + F.one_hot(tokens, len(x)).to(y).T @ y
    return out


@pytest.mark.parametrize("run", [_mixing, _doubled, _unrouted])
def test_rows_that_cannot_be_told_are_left_out(run: Run) -> None:
    model, data = seeded(Routed(run)), _data(4, 3)
    factors = quietly(hk.kronecker_factors, model, data, CE, layers=["head", "experts.*"])
    assert list(factors) == ["head"]
    for name in LAYERS:
        assert "no samples" in factors.skipped[name] or "does not count" in factors.skipped[name]
        with pytest.raises(ValueError, match=f"layer '{name}' sees"):
            hk.kronecker_factors(model, data, CE, layers=[name])


def test_layers_before_a_router_that_moves_tokens_are_left_out() -> None:
    """Each token's result goes to the token of another sample."""

    def run(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return _index_add(m, x, chosen, weights).flip(0)

    model, data = seeded(Routed(run)), _data(4, 3)
    for function in (hk.kronecker_factors, hk.layer_hessians):
        found = quietly(function, model, data, CE)
        for name in ("inp", "gate", *LAYERS):
            assert "sees" in found.skipped[name]


class TestPadding:
    """Which rows of a router are padding is not known, so that a mask leaves its experts out."""

    @staticmethod
    def _masked(keep: Tensor | None) -> Callable[[Any], Any]:
        return lambda inputs: keep

    def test_a_mask_leaves_experts_out_and_masks_the_rest(self) -> None:
        model, data = seeded(Routed(_index_add)), _data(4)
        keep = torch.ones(4, 3)
        keep[0, 2] = keep[2, 1] = 0
        factors = quietly(hk.kronecker_factors, model, data, CE, position_mask=self._masked(keep))
        assert set(factors) == {"inp", "gate", "head"}
        x = data[0][0][keep.bool()]
        assert relative_error(factors["inp"].input_covariance, x.T @ x / 4) <= 1e-12
        for name in LAYERS:
            assert "cannot be told" in factors.skipped[name]
        with pytest.raises(ValueError, match=r"'experts\.0\.up' sees rows that a router"):
            hk.kronecker_factors(
                model, data, CE, ["experts.0.up"], position_mask=self._masked(keep)
            )

    def test_a_mask_without_padding_changes_nothing(self) -> None:
        model, data = seeded(Routed(_index_add)), _data(4)
        whole = self._masked(torch.ones(4, 3))
        factors = quietly(hk.kronecker_factors, model, data, CE, position_mask=whole)
        _check(factors, _expected(model, data))

    def test_experts_to_which_every_token_goes(self) -> None:
        """They have the mask's positions, yet in an order of their own."""

        def run(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            tokens = torch.arange(len(x)).reshape(-1, 3).flip(1).reshape(-1)
            for expert in m.experts:
                out = out.index_add(0, tokens, expert(x[tokens]))
            return out

        model, data = seeded(Routed(run)), _data(4)
        keep = torch.ones(4, 3)
        keep[0, 2] = 0
        factors = quietly(hk.kronecker_factors, model, data, CE, position_mask=self._masked(keep))
        assert set(factors) == {"inp", "gate", "head"}
        assert "cannot be told" in factors.skipped["experts.0.up"]
        # Padding may be asked to count.
        some = self._masked(None)
        factors = quietly(hk.kronecker_factors, model, data, CE, position_mask=some)
        assert set(LAYERS) <= set(factors)
        named: Any = lambda inputs: {"experts.*": None, "*": keep}  # noqa: E731
        factors = quietly(hk.kronecker_factors, model, data, CE, position_mask=named)
        assert factors["experts.0.up"].positions == 3


class Fused(nn.Module):
    """Experts in one parameter: "select", "unbind", "bmm" (all tokens to all experts)."""

    def __init__(self, way: str, transposed: bool = False) -> None:
        super().__init__()
        self.way, self.is_transposed = way, transposed
        self.up = nn.Parameter(torch.empty(EXPERTS, *((D, M) if transposed else (M, D))))
        self.down = nn.Parameter(torch.empty(EXPERTS, *((M, D) if transposed else (D, M))))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        up, down = self.up, self.down
        if self.way == "bmm":
            if not self.is_transposed:
                up, down = up.transpose(1, 2), down.transpose(1, 2)
            y = torch.bmm(torch.bmm(x.expand(EXPERTS, -1, -1), up).tanh(), down)
            return y.sum(0)
        matrices = list(zip(up.unbind(0), down.unbind(0), strict=True))
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            place, tokens = torch.where((chosen == e).T)
            first, second = matrices[e] if self.way == "unbind" else (up[e], down[e])
            if self.is_transposed:
                y = (x[tokens] @ first).tanh() @ second
            else:
                y = F.linear(F.linear(x[tokens], first).tanh(), second)
            out = out.index_add(0, tokens, y * weights[tokens, place, None])
        return out


def _fused(way: str, transposed: bool = False) -> Any:
    model: Any = Routed(lambda m, *given: m.experts(*given))
    model.experts = Fused(way, transposed)
    model = seeded(model)
    with torch.no_grad():
        for i, weight in enumerate((model.experts.up, model.experts.down)):
            weight.copy_(0.5 * randn(*weight.shape, seed=5 + i))
    return model


def _apart(fused: Any, way: str) -> Routed:
    """The same function with a module for each matrix."""

    def dense(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return sum((expert(x) for expert in m.experts), torch.zeros_like(x))

    apart = Routed(dense if way == "bmm" else _index_add).double()
    apart.load_state_dict(fused.state_dict(), strict=False)
    for e, expert in enumerate(apart.experts):
        for part, weight in (("up", fused.experts.up[e]), ("down", fused.experts.down[e])):
            layer = getattr(expert, part)
            layer.weight.data = (
                weight.detach().T if fused.experts.is_transposed else weight.detach()
            )
            layer.bias.data.zero_()
    return apart


@pytest.mark.parametrize("way", ["select", "unbind", "bmm"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_layers_one_by_one(way: str, transposed: bool) -> None:
    """Against experts that are modules, which the loop over samples has checked."""
    model, data = _fused(way, transposed), _data(4, 3, 1)
    apart = _apart(model, way)
    assert relative_error(model(data[0][0]).detach(), apart(data[0][0]).detach()) <= 1e-12
    factors = quietly(hk.kronecker_factors, model, data, CE)
    if way != "bmm":
        expected = _expected(apart, data)
    else:
        plain = quietly(hk.kronecker_factors, apart, data, CE)
        expected = {
            n: (plain[n].input_covariance, plain[n].output_hessian, plain[n].positions)
            for n in LAYERS
        }
    hessians = quietly(hk.layer_hessians, model, data, CE)
    G = quietly(hk.GaussNewton, model, data, CE)
    for name, (A, E, positions) in expected.items():
        _, e, part = name.split(".")
        f = factors[f"experts.{part}.{e}"]
        assert relative_error(f.input_covariance, A) <= 1e-10
        assert relative_error(f.output_hessian, E) <= 1e-10
        assert f.positions == pytest.approx(positions)
        assert f.weight_shape == tuple(getattr(model.experts, part).shape[1:])
        H = hessians[f"experts.{part}.{e}"]
        m, d = H.layer_shape
        block = gauss_newton(apart, data, sample_loss, name)
        if transposed:
            block = block.reshape(m, d, m, d).permute(1, 0, 3, 2).reshape(m * d, m * d)
        assert relative_error(H.to_dense(), block) <= 1e-10
        at = G.slices[H.name]
        assert relative_error(G.to_dense()[at, at], block) <= 1e-10


def test_fused_experts_by_pattern_and_in_a_file(tmp_path: Any) -> None:
    model, data = _fused("select"), _data(4, 3)
    factors = hk.kronecker_factors(model, data, CE, layers="experts.up.[02]")
    assert list(factors) == ["experts.up.0", "experts.up.2"]
    factors.save(tmp_path / "f.safetensors")
    loaded = hk.load_factors(tmp_path / "f.safetensors")
    assert loaded["experts.up.2"].spec == factors["experts.up.2"].spec


def test_fused_experts_that_act_otherwise_have_one_reason() -> None:
    """Chosen matrix by matrix for each row; and together, as one sum."""

    def chosen_matrices(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        up, down = m.experts.up[chosen[:, 0]], m.experts.down.sum(0)
        return torch.bmm(up, x.unsqueeze(2)).squeeze(2).tanh() @ down.T

    model = _fused("select")
    model.run = chosen_matrices
    factors = quietly(hk.kronecker_factors, model, _data(4), CE)
    assert set(factors) == {"inp", "gate", "head"}
    assert "acts through Index" in factors.skipped["experts.up"]
    assert "acts through Sum" in factors.skipped["experts.down"]
    assert "experts.up.0" not in factors.skipped


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="needs torch.nn.functional.grouped_mm")
def test_grouped_products_in_float32() -> None:
    """torch knows none in float64."""

    def run(m: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        _, order = chosen.reshape(-1).sort(stable=True)
        ends = chosen.reshape(-1).bincount(minlength=EXPERTS).cumsum(0).int()
        rows = x[order // TOP]
        rows = F.grouped_mm(rows, m.experts.up.transpose(1, 2), offs=ends).tanh()
        rows = F.grouped_mm(rows, m.experts.down.transpose(1, 2), offs=ends)
        rows = rows * weights.reshape(-1)[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return rows[back].view(len(x), TOP, -1).sum(1)

    model = _fused("select")
    expected = _expected(_apart(model, "select"), _data(4, 3, 1))
    model.run = run
    model = model.float()
    data = [(x.float(), y) for x, y in _data(4, 3, 1)]
    factors = quietly(hk.kronecker_factors, model, data, CE)
    for name, (A, E, _) in expected.items():
        _, e, part = name.split(".")
        f = factors[f"experts.{part}.{e}"]
        assert relative_error(f.input_covariance.double(), A) <= 1e-5
        assert relative_error(f.output_hessian.double(), E) <= 1e-5
