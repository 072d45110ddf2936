"""What a result lacks, and how it says so."""

from __future__ import annotations

import pytest
import torch
from blocks import CE, Net, batches, check_blocks, quietly
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk


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
    R = hk.AutogradHessian(model, data, CE)
    assert R.params == ["b.weight", "b.bias"]
    assert set(R.skipped) == {"a.weight", "a.bias"}
    check_blocks(model, data, {"b"})


def test_sparse_inputs_are_refused() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 3)))
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(TypeError, match="must be dense, got a tensor"):
            function(model, [(randn(5, 4).to_sparse(), classes(5, c=3))], CE)
