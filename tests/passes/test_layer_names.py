"""Layers chosen by name and by pattern."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(3, 3)
        self.mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        mlp: Tensor = self.mlp(x)
        return x + mlp


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(3, 2)).double()


def _data() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.double), torch.tensor([0, 1, 1, 0]))]


LOSS = nn.CrossEntropyLoss()

CHOSEN = {
    "*.mlp.*": ["0.mlp.0", "0.mlp.2", "1.mlp.0", "1.mlp.2"],
    "1.*": ["1.attn", "1.mlp.0", "1.mlp.2"],
    "[01].attn": ["0.attn", "1.attn"],
    "?": ["2"],
    "*": ["0.attn", "0.mlp.0", "0.mlp.2", "1.attn", "1.mlp.0", "1.mlp.2", "2"],
}


@pytest.mark.parametrize("pattern", CHOSEN)
def test_a_pattern_is_the_names_it_matches(pattern: str) -> None:
    """In every place that takes layers."""
    model, data = _model(), _data()
    names = CHOSEN[pattern]
    by_name = hk.kronecker_factors(model, data, LOSS, names)
    factors = hk.kronecker_factors(model, data, LOSS, pattern)
    assert list(factors) == names
    for name in names:
        assert torch.equal(factors[name].output_hessian, by_name[name].output_hessian)
        assert torch.equal(factors[name].input_covariance, by_name[name].input_covariance)
    acc = hk.FactorAccumulator(model, LOSS, pattern)
    acc.update(*data[0])
    assert list(acc.factors()) == names
    with warnings.catch_warnings():
        # Of the layer norms behind.
        warnings.simplefilter("ignore")
        assert list(hk.layer_hessians(model, data, LOSS, pattern)) == names
    assert list(hk.GaussNewton(model, data, LOSS, pattern).layer_shapes) == names


def test_names_and_patterns_together_keep_the_models_order() -> None:
    factors = hk.kronecker_factors(_model(), _data(), LOSS, ["2", "1.mlp.*", "0.attn", "0.at*"])
    assert list(factors) == ["0.attn", "1.mlp.0", "1.mlp.2", "2"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("*.mpl.*", r"pattern '\*\.mpl\.\*' matches no layer; the nearest names are .*mlp"),
        (["2", "0.Attn*"], r"pattern '0\.Attn\*' matches no layer; the nearest names are 0\.attn"),
        ("*.norm", r"matches no supported layer, but '0\.norm', '1\.norm' alone"),
        ([], "layers is empty"),
    ],
)
def test_a_pattern_without_a_layer_is_refused(layers: Any, message: str) -> None:
    model, data = _model(), _data()
    for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(ValueError, match=message):
            call(model, data, LOSS, layers)  # type: ignore[operator]


def test_numbers_in_the_list_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="got a int in it"):
        hk.kronecker_factors(_model(), _data(), LOSS, [2])  # type: ignore[list-item]


class Partly(nn.Module):
    """``aside`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.used(x)
        return z


def test_a_layer_that_only_a_pattern_names_may_be_skipped() -> None:
    model, data = Partly().double(), _data()
    for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        result = call(model, data, LOSS, "*")  # type: ignore[operator]
        assert "never reached" in result.skipped["aside"]
        with pytest.raises(ValueError, match="'aside' was never reached"):
            call(model, data, LOSS, ["*", "aside"])  # type: ignore[operator]
