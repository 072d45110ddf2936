"""Diagonals of parameters that are no matrices, against loops over samples; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, randn, seeded
from per_sample import diagonal_loops, plain_predictions
from torch import Tensor, nn

import hesskern as hk

Data = list[tuple[Any, Tensor]]


class Own(nn.Module):
    """What modules of other packages hold: a scale, an RMS norm, vectors for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.norm = nn.Parameter(1 + 0.1 * torch.randn(6))
        self.place, self.first = (
            nn.Parameter(torch.randn(1, 2, 6)),
            nn.Parameter(torch.randn(1, 1, 6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x).tanh() * self.gain
        z = torch.cat([self.first.expand(len(x), -1, -1), z], 1) if x.dim() == 3 else z
        z = (z[:, 1:] - self.place).sin() + z[:, :1]
        z = z * (z.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()
        scores: Tensor = self.head((1 + self.norm) * z).movedim(-1, 1)
        return scores


class Twice(nn.Module):
    """A norm, a bias and an embedding that act twice each; the embedding is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2)
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + 0.5 * self.embed((tokens + 1) % 7)
        x = self.norm(x + self.mix(self.norm(x)).tanh())
        scores: Tensor = (self.mix(x) @ self.embed.weight.T).movedim(-1, 1)
        return scores


def _mlp() -> nn.Module:
    parts = (nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.RMSNorm(5))
    return nn.Sequential(*parts, nn.ReLU(), nn.Linear(5, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 2, 1),
        nn.LayerNorm([2, 3, 3]),
        nn.Flatten(),
        nn.BatchNorm1d(18),
        nn.Linear(18, 3),
    )


def _tokens(n: int, t: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    # Some rows are looked up several times by a sample.
    return torch.randint(4, (n, t), generator=g), torch.randint(7, (n, t), generator=g)


def _pair(*shape: int, seed: int = 0, positions: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return randn(*shape, seed=seed), torch.randint(3, (shape[0], *positions), generator=g)


def _trained(model: nn.Module) -> nn.Module:
    """Statistics of batch norms, weights and biases that are not one and zero."""
    model = seeded(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor += 0.3 * torch.rand_like(tensor)
    return model.eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "mlp": (_mlp, lambda: [_pair(4, 4), _pair(1, 4, seed=1)]),
    "cnn": (_cnn, lambda: [_pair(3, 2, 5, 5), _pair(2, 2, 5, 5, seed=1)]),
    "own": (Own, lambda: [_pair(3, 2, 4, positions=(2,)), _pair(2, 2, 4, seed=1, positions=(2,))]),
    "twice": (Twice, lambda: [_tokens(3), _tokens(5, seed=1)]),
}


def _alone(data: Data) -> Data:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]


def _check(found: hk.Factors, expected: dict[str, Tensor], limit: float = 1e-10) -> None:
    assert set(found.diagonals) == set(expected)
    for name, diagonal in expected.items():
        assert found.diagonals[name].shape == diagonal.shape
        error = float((found.diagonals[name] - diagonal).norm() / diagonal.norm())
        assert error <= limit, (name, error)


def _rest(model: nn.Module, factors: hk.Factors) -> set[str]:
    return {n for n, _ in model.named_parameters()} - {f"{layer}.weight" for layer in factors}


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("output", ["exact", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_of_all_parameters(name: str, output: Any) -> None:
    make, data = CASES[name][0], CASES[name][1]()
    model = _trained(make())
    found = hk.kronecker_factors(model, data, CE, output=output, diagonal=True)
    names = _rest(model, found)
    _check(found, diagonal_loops(model, _alone(data), plain_predictions, names, output))
    assert not found.skipped
    # Layers have the factors that they have without, and the draws are the same.
    plain = hk.kronecker_factors(model, data, CE, output=output)
    assert not plain.diagonals
    assert "diagonal" not in plain.settings
    for layer, factors in plain.items():
        assert torch.equal(factors.output_hessian, found[layer].output_hessian)


@pytest.mark.filterwarnings("ignore:left out")
def test_row_by_row_where_only_autograd_knows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesskern.graph.propagation._DEVICES", ())
    test_of_all_parameters("cnn", "exact")


def test_a_few_samples_and_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesskern.factors.diagonal_sums._ENTRIES", 8)
    monkeypatch.setattr("hesskern.passes.diagonals._ENTRIES", 8)
    test_of_all_parameters("twice", "exact")
    test_of_all_parameters("mlp", "exact")


def test_drawn_targets_are_those_of_the_layers() -> None:
    """A bias of a layer on plain rows has the diagonal of the layer's E[M]."""
    model, data = seeded(_mlp()), [_pair(6, 4)]
    found = hk.kronecker_factors(model, data, CE, output="mc", mc_samples=3, diagonal=True)
    for layer in ("0", "3", "6"):
        diagonal = found[layer].output_hessian.diagonal()
        assert torch.allclose(found.diagonals[f"{layer}.bias"], diagonal, rtol=1e-12, atol=0)


def test_weights_of_samples() -> None:
    model, (x, y) = seeded(_mlp()), _pair(4, 4)
    weights = [0.5, 0.0, 2.0, 1.25]
    found = hk.kronecker_factors(
        model, [(x, y)], CE, sample_weight=torch.tensor(weights), diagonal=True
    )
    names = _rest(model, found)
    expected = diagonal_loops(model, _alone([(x, y)]), plain_predictions, names, "exact", weights)
    _check(found, expected)


def test_a_joint_bias_belongs_to_its_layer() -> None:
    model, data = seeded(_mlp()), [_pair(4, 4)]
    found = hk.kronecker_factors(model, data, CE, bias="joint", diagonal=True)
    assert set(found.diagonals) == {"1.weight", "1.bias", "4.weight"}


def test_chosen_layers_have_their_own_alone() -> None:
    model, data = seeded(_mlp()), [_pair(4, 4)]
    found = hk.kronecker_factors(model, data, CE, layers=["0", "3"], diagonal=True)
    assert set(found.diagonals) == {"0.bias", "3.bias"}
    assert "1" in found.skipped


def test_narrow_models_have_sums_in_float32() -> None:
    model, data = seeded(_mlp()), [_pair(4, 4)]
    exact = hk.kronecker_factors(model, data, CE, diagonal=True)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        narrow = [(x.to(dtype), y) for x, y in data]
        found = hk.kronecker_factors(seeded(_mlp()).to(dtype), narrow, CE, diagonal=True)
        assert {d.dtype for d in found.diagonals.values()} == {torch.float32}
        _check(found, exact.diagonals, limit)


def _same(one: hk.Factors, other: hk.Factors) -> None:
    _check(one, other.diagonals, 1e-12)


def test_accumulators_go_on_merge_and_average(tmp_path: Path) -> None:
    model, data = _trained(Twice()), [_tokens(3), _tokens(5, seed=1)]
    whole = hk.kronecker_factors(model, data, CE, diagonal=True)
    first, second = (hk.FactorAccumulator(model, CE, diagonal=True) for _ in range(2))
    first.update(*data[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    second.update(*data[1])
    _same(second.factors(), whole)
    last = hk.FactorAccumulator(model, CE, diagonal=True)
    last.update(*data[1])
    last.merge(first)
    _same(last.factors(), whole)
    moving = hk.FactorAccumulator(model, CE, decay=0.5, diagonal=True)
    for batch in data:
        moving.update(*batch)
    parts = [hk.kronecker_factors(model, [b], CE, diagonal=True).diagonals for b in data]
    # 0.5 of the second, 0.25 of the first, divided by what they add up to.
    expected = {n: (parts[0][n] + 2 * parts[1][n]) / 3 for n in parts[0]}
    _check(moving.factors(), expected, 1e-12)
    plain = hk.FactorAccumulator(model, CE)
    with pytest.raises(ValueError, match="settings"):
        plain.load_state_dict(first.state_dict())


def test_files(tmp_path: Path) -> None:
    model, data = _trained(Twice()), [_tokens(3)]
    found = hk.kronecker_factors(model, data, CE, diagonal=True)
    found.save(tmp_path / "f.safetensors")
    loaded = hk.load_factors(tmp_path / "f.safetensors")
    assert list(loaded.diagonals) == list(found.diagonals)
    for name, diagonal in found.diagonals.items():
        assert torch.equal(loaded.diagonals[name], diagonal)
    hk.kronecker_factors(model, data, CE).save(tmp_path / "g.safetensors")
    assert hk.load_factors(tmp_path / "g.safetensors").diagonals == {}


class Strange(nn.Module):
    """Vectors that act in ways that are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)
        self.power, self.twisted = nn.Parameter(torch.rand(6) + 1), nn.Parameter(torch.randn(6))
        self.bag = nn.EmbeddingBag(5, 6)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.fc(x)).abs().pow(self.power)
        z = z + self.bag((x > 0).long()) + self.twisted.roll(1)
        scores: Tensor = self.head(z)
        return scores


@pytest.mark.filterwarnings("ignore:left out")
def test_what_is_not_understood_has_a_reason() -> None:
    model, data = seeded(Strange()), [_pair(4, 4)]
    found = hk.kronecker_factors(model, data, CE, diagonal=True)
    assert set(found.diagonals) == {"fc.bias", "head.bias"}
    for name, text in (
        ("act.weight", "PreluKernel"),
        ("power", "Pow"),
        ("twisted", "Roll"),
        ("bag.weight", "EmbeddingBag"),
        ("unused", "never reached"),
    ):
        assert text in found.skipped[name]


def test_gradients_that_hooks_change_are_refused() -> None:
    """What the graph does not show is seen when sums are held against autograd's own."""
    model, data = seeded(_mlp()), [_pair(4, 4)]
    model[1].weight.register_hook(lambda g: 2 * g)
    found = hk.kronecker_factors(model, data, CE, diagonal=True)
    assert "add up" in found.skipped["1.weight"]
    assert "1.bias" in found.diagonals


def test_values_overwritten_in_place() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            scaled = self.scale * z.detach()
            with torch.no_grad():
                z.mul_(0.5)
            scores: Tensor = self.head(scaled)
            return scores

    with pytest.raises(RuntimeError, match="inplace"):
        # Autograd itself has no gradient there.
        seeded(Overwrites())(randn(4, 4)).sum().backward()
    found = hk.kronecker_factors(seeded(Overwrites()), [_pair(4, 4)], CE, diagonal=True)
    assert "overwritten in place" in found.skipped["scale"]


def test_halves_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = seeded(_mlp()), [_pair(4, 4)]
    whole = hk.kronecker_factors(model, data, CE, diagonal=True)
    from hesskern.factors.batch_sums import BatchSums

    calls, of = [], BatchSums.of

    def failing(self: BatchSums, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return of(self, *args)

    monkeypatch.setattr(BatchSums, "of", failing)
    _same(hk.kronecker_factors(model, data, CE, diagonal=True), whole)
    assert len(calls) == 3


def test_a_bad_batch_leaves_what_was_there() -> None:
    model, data = seeded(_mlp()), [_pair(4, 4)]
    acc = hk.FactorAccumulator(model, CE, diagonal=True)
    acc.update(*data[0])
    before = acc.factors()
    x, y = _pair(4, 4, seed=3)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        acc.update(x, y)
    _same(acc.factors(), before)


def test_diagonal_is_yes_or_no() -> None:
    with pytest.raises(TypeError, match="diagonal"):
        hk.kronecker_factors(seeded(_mlp()), [_pair(4, 4)], CE, diagonal="yes")  # type: ignore[arg-type]
