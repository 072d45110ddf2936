"""Layers with more than max_outputs outputs: the diagonal of E[M], and operators of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, randn, seeded
from tensors import relative_error
from torch import Tensor, nn

import hesskern as hk


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 9))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 12, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


def _data(*shape: int, classes: int = 9) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(randn(n, *shape, seed=n), torch.randint(classes, (n,), generator=g)) for n in (3, 5)]


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("bias", ["none", "joint"])
def test_the_diagonal_is_that_of_the_whole_matrix(output: Any, bias: Any) -> None:
    for make, layer, data in (
        (_model, "2", _data(4)),
        (_conv, "0", _data(2, 4, 4, classes=3)),
    ):
        model = seeded(make())
        options: dict[str, Any] = {"output": output, "bias": bias, "mc_samples": 2}
        found = hk.kronecker_factors(model, data, CE, diagonal=True, max_outputs=8, **options)
        whole = hk.kronecker_factors(model, data, CE, **options)
        large, right = found.large[layer], whole[layer]
        assert layer not in {*found, *found.skipped}
        assert relative_error(large.output_diagonal, right.output_hessian.diagonal()) <= 1e-12
        assert relative_error(large.input_covariance, right.input_covariance) <= 1e-12
        assert (large.positions, large.num_samples) == (right.positions, right.num_samples)
        for other in found:
            assert torch.equal(found[other].output_hessian, whole[other].output_hessian)
        with pytest.raises(KeyError, match=r"\.large"):
            found[layer]


def test_heads_asked_for_by_name() -> None:
    model, data = seeded(_model()), _data(4)
    with pytest.raises(ValueError, match="max_outputs"):
        hk.kronecker_factors(model, data, CE, layers=["2"], max_outputs=8)
    found = hk.kronecker_factors(model, data, CE, layers=["2"], max_outputs=8, diagonal=True)
    assert (list(found), list(found.large)) == ([], ["2"])


def test_files_states_and_merge(tmp_path: Path) -> None:
    model, data = seeded(_model()), _data(4)
    options: dict[str, Any] = {"diagonal": True, "max_outputs": 8}
    whole = hk.kronecker_factors(model, data, CE, **options)
    whole.save(tmp_path / "f.safetensors")
    loaded = hk.load_factors(tmp_path / "f.safetensors").large["2"]
    assert torch.equal(loaded.output_diagonal, whole.large["2"].output_diagonal)
    assert loaded.spec == whole.large["2"].spec
    one, other = (hk.FactorAccumulator(model, CE, **options) for _ in range(2))
    one.update(*data[0])
    other.load_state_dict(one.state_dict())
    other.update(*data[1])
    second = hk.FactorAccumulator(model, CE, **options)
    second.update(*data[1])
    second.merge(one)
    right = whole.large["2"].output_diagonal
    for acc in (other, second):
        assert relative_error(acc.factors().large["2"].output_diagonal, right) <= 1e-12
    parts = [hk.kronecker_factors(model, [batch], CE, **options) for batch in data]
    added = hk.add_factors(*parts)
    assert relative_error(added.large["2"].output_diagonal, right) <= 1e-12
    assert set(added.diagonals) == set(whole.diagonals)
    for name, diagonal in whole.diagonals.items():
        assert relative_error(added.diagonals[name], diagonal) <= 1e-12
    with pytest.raises(ValueError, match="have other"):
        hk.add_factors(parts[0], hk.kronecker_factors(model, data, CE, layers=["0"]))
    with pytest.raises(ValueError, match="max_outputs"):
        hk.FactorAccumulator(model, CE, diagonal=True).load_state_dict(one.state_dict())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators(groups: int, transposed: bool) -> None:
    a, root = randn(6).square(), randn(groups, 4, 4, seed=1)
    B = root @ root.mT
    B = B[0] if groups == 1 else B
    K = hk.DiagonalKroneckerOperator(a, B, transposed=transposed)
    same = hk.KroneckerOperator(torch.diag(a), B, transposed=transposed)
    dense, v = same.to_dense(), randn(24, 3, seed=2)
    assert relative_error(K.to_dense(), dense) <= 1e-12
    assert relative_error(K @ v, dense @ v) <= 1e-12
    assert K.trace() == pytest.approx(float(dense.trace()))
    assert K.squared_norm() == pytest.approx(float(dense.square().sum()))
    assert relative_error(K.diagonal(), dense.diagonal()) <= 1e-12
    for damping, number in ((0.3, 0.3), ("mean", 0.1 * float(dense.trace()) / 24)):
        expected = torch.linalg.solve(dense + number * torch.eye(24).double(), v)
        assert relative_error(K.solve(v, damping), expected) <= 1e-10
    with pytest.raises(ValueError, match="singular"):
        hk.DiagonalKroneckerOperator(a * (a > a.min()), B).solve(v, 0.0)


def test_no_matrix_of_outputs_is_made() -> None:
    """[m, m] would take 20 GB here."""
    m = 50_000
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, m, bias=False))
    data = [(torch.randn(2, 4), torch.randint(m, (2,)))]
    found = hk.kronecker_factors(model, data, nn.CrossEntropyLoss(), output="mc", diagonal=True)
    K = found.large["1"].operator()
    assert K.shape == (3 * m, 3 * m)
    v = torch.randn(3 * m)
    back = K @ K.solve(v, "mean") + 0.1 * K.trace() / (3 * m) * K.solve(v, "mean")
    assert relative_error(back, v) <= 1e-3


def test_bad_factors() -> None:
    a, B = randn(4), torch.eye(3).double()
    for bad, match in (((a[None], B), "a must"), ((a, B[:2]), "B must"), ((a.float(), B), "dtype")):
        with pytest.raises(ValueError, match=match):
            hk.DiagonalKroneckerOperator(*bad)
    with pytest.raises(TypeError, match="a must"):
        hk.DiagonalKroneckerOperator([1.0], B)  # type: ignore[arg-type]
