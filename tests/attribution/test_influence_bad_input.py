"""What cannot be scored is refused with one message; the model comes back as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import classes, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def mlp(hidden: int = 5, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()


MODEL = mlp()
TRAIN = [(randn(12, 4), classes(12, c=3)), (randn(8, 4, seed=1), classes(8, c=3, seed=1))]
QUERIES = [(randn(3, 4, seed=2), classes(3, c=3, seed=2))]
E = {name: f.operator() for name, f in hk.kronecker_factors(MODEL, TRAIN, LOSS).items()}


def refuse(message: str, error: type[BaseException] = ValueError, **changed: Any) -> None:
    given = {"E": E, "model": MODEL, "queries": QUERIES, "train": TRAIN, "loss": LOSS, **changed}
    model = given["model"]
    if isinstance(model, nn.Module):
        model.train()
    with pytest.raises(error, match=message):
        hk.influence(**given)
    if isinstance(model, nn.Module):
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(not module._forward_hooks for module in model.modules())


def changed(data: list[tuple[Tensor, Tensor]], batch: int, row: int, value: float) -> Any:
    found = [(x.clone(), y) for x, y in data]
    found[batch][0][row, 1] = value
    return found


class TestCurvature:
    def test_of_another_model(self) -> None:
        refuse("E has a layer '0', which the model has not", model=nn.Sequential(mlp()))
        refuse(
            r"E: layer '0' has \[m, d\] = \[5, 4\] there, .* \[7, 4\] in the model", model=mlp(7)
        )

    def test_of_other_groups(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 3)).double()
        other = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 3)).double()
        data = [(randn(6, 2, 1, 1), classes(6, c=3))]
        wrong = hk.kronecker_factors(other, data, LOSS)
        refuse(r"'0' has .* there, .* and 2 groups,", model=model, E=wrong)

    def test_of_other_strides(self) -> None:
        def net(stride: int) -> nn.Module:
            convolution = nn.Conv2d(2, 4, 2, stride=stride, padding=1)
            return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()

        data = [(randn(6, 2, 4, 4), classes(6, c=4))]
        wrong = hk.ekfac(net(1), data, LOSS, output="empirical")
        message = r"'0' has .* stride \(1, 1\).* there, .* stride \(2, 2\)"
        refuse(message, model=net(2), E=wrong, queries=data, train=data)

    def test_of_a_bias_in_place_of_an_input(self) -> None:
        other = nn.Sequential(nn.Linear(3, 5)).double()
        wrong = hk.ekfac(other, [(randn(6, 3), classes(6, c=3))], LOSS, bias="joint")
        message = r"'0' has \[m, d\] = \[5, 4\] with a bias there, \[m, d\] = \[5, 4\] in"
        refuse(message, E=wrong)

    def test_of_something_else(self) -> None:
        refuse("E must be a mapping", TypeError, E=3)
        refuse("E is empty", E={})
        refuse(r"E\['0'\] must have a Kronecker eigenbasis", TypeError, E={"0": torch.eye(20)})
        refuse("layers: '2' is not in E, which has 0", E={"0": E["0"]}, layers="2")

    def test_with_nan(self) -> None:
        bad = hk.CorrectedOperator(E["0"], torch.full((5, 4), math.nan).double())
        refuse("the eigenvalues of layer '0' hold NaN", E={**E, "0": bad}, damping=1.0)


class TestDamping:
    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_that_is_no_damping(self, value: float) -> None:
        refuse("damping must be finite and >= 0", damping=value)
        refuse("finite and >= 0, got .* for layer '2'", damping={"0": 0.1, "2": value})

    def test_of_other_types(self) -> None:
        refuse("damping must be a number", TypeError, damping=True)
        refuse("damping must be a number or 'mean', got 'most'", damping="most")
        refuse("it lacks 2", damping={"0": 0.1})
        refuse("it names 4, too", damping={"0": 0.1, "2": 0.1, "4": 0.1})
        refuse("no meaning without E", E=None, damping=0.1)

    def test_none_on_a_singular_block(self) -> None:
        values = E["0"].eigenbases[2][0].clone()
        values[0] = 0
        singular = {**E, "0": hk.CorrectedOperator(E["0"], values)}
        refuse(
            "influence needs damping > 0: layer '0' is singular, of rank 16 of 20",
            E=singular,
            damping=0,
        )
        values = values.clone()
        values[0] = -0.01
        below = {**E, "0": hk.CorrectedOperator(E["0"], values)}
        refuse(
            "influence needs positive eigenvalues, .* give one above 0.01", E=below, damping=0.005
        )
        dead = {**E, "0": hk.CorrectedOperator(E["0"], torch.zeros_like(values))}
        refuse("the trace of layer '0' is 0: give a number", E=dead)
        found = hk.influence(singular, MODEL, QUERIES, TRAIN, LOSS, damping={"0": 1e-3, "2": 1e-3})
        assert isinstance(found.scores, Tensor)


class TestData:
    def test_nan_is_named_by_its_number(self) -> None:
        bad = changed(QUERIES, 0, 2, math.nan)
        refuse("queries: the model's outputs for query 2 contain NaN", queries=bad)
        bad = changed(TRAIN, 1, 4, math.inf)
        refuse("train: the model's outputs for sample 16 contain NaN", train=bad)

    def test_gradients_that_overflow(self) -> None:
        model = mlp().float()
        queries = [(torch.ones(2, 4), torch.ones(2, 3))]
        train = [(x.float(), torch.ones(len(x), 3)) for x, _ in TRAIN]
        queries[0][1][1] = 3e38
        given = {"model": model, "E": None, "loss": nn.MSELoss(reduction="sum"), "train": train}
        refuse("queries: the gradient at layer '.' for query 1 contain", queries=queries, **given)

    def test_of_another_structure(self) -> None:
        refuse("train: data must yield", TypeError, train=[{"x": TRAIN[0][0]}])
        refuse("queries: data must be an iterable", TypeError, queries=TRAIN[0][0])
        refuse("queries: data must yield", TypeError, queries=TRAIN[0][0].unbind())
        regression = [(x, torch.rand(len(x), 3)) for x, _ in QUERIES]
        refuse("queries: targets given as probabilities", queries=regression)
        refuse("train: targets must have the outputs' shape", loss=nn.MSELoss(), queries=regression)
        hk.influence(E, MODEL, regression, TRAIN, LOSS, query_loss=nn.MSELoss())

    def test_none(self) -> None:
        refuse("queries: data yielded no samples", queries=[])
        refuse("train: data yielded no samples", train=[])
        refuse("train: data yielded no samples", train=[(TRAIN[0][0][:0], TRAIN[0][1][:0])])

    def test_a_model_that_joins_samples(self) -> None:
        class Pairs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x)[::2]

        refuse(
            r"outputs \[2, 3\] for 3 samples|layer 'layer'|targets must be", model=Pairs(), E=None
        )


class TestChoices:
    @pytest.mark.parametrize("name", ["top", "query_rank", "batch_size"])
    def test_counts(self, name: str) -> None:
        refuse(f"{name} must be at least 1", **{name: 0})
        refuse(f"{name} must be an integer", TypeError, **{name: 2.0})
        refuse(f"{name} must be an integer", TypeError, **{name: True})

    def test_top_is_of_whole_samples(self) -> None:
        refuse("not per_layer", top=3, per_layer=True)
        refuse("not per_token", top=3, per_token=True)

    def test_flags(self) -> None:
        refuse("per_layer must be True or False", TypeError, per_layer=3)


@pytest.mark.parametrize("name", ["queries", "train"])
def test_a_loader_that_shuffles_is_warned_of(name: str) -> None:
    samples = TensorDataset(*TRAIN[0])
    given = {"queries": QUERIES, "train": TRAIN}
    loader = DataLoader(samples, batch_size=5, shuffle=True)
    with pytest.warns(UserWarning, match=f"^{name}: the loader shuffles") as caught:
        hk.influence(E, MODEL, loss=LOSS, **{**given, name: loader})
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DataLoader(samples, batch_size=5)
        hk.influence(E, MODEL, loss=LOSS, **{**given, name: loader})


class Stop(BaseException):
    """An interruption, which no handler for errors sees."""


def test_an_interruption_hands_the_model_back() -> None:
    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield TRAIN[0]
        raise Stop("enough")

    refuse("enough", Stop, train=data())

    def progress(description: str, done: int, total: int | None) -> None:
        if description.endswith("samples") and done == 2:
            raise Stop("enough")

    refuse("enough", Stop, progress=progress)


def test_progress_and_file(tmp_path: Any) -> None:
    from safetensors import safe_open

    seen: list[tuple[str, int, int | None]] = []
    found = hk.influence(E, MODEL, QUERIES, TRAIN, LOSS, progress=lambda *told: seen.append(told))
    assert seen == [
        ("Influence: queries", 1, 1),
        ("Influence: samples", 1, 2),
        ("Influence: samples", 2, 2),
    ]
    assert "20 training samples on 3 queries through 2 layers" in repr(found)
    found.save(tmp_path / "scores.safetensors")
    with safe_open(tmp_path / "scores.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("scores"), found.scores)
        assert "hesskern.influence/1" in file.metadata()["hesskern"]
