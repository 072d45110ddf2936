"""What hooks see of a model, what they do not, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from input_covariance_cases import Gated, Through, equal, sequences
from networks import randn, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hesskern as hk

pytestmark = pytest.mark.filterwarnings(
    "ignore:left out:UserWarning", "ignore:Using padding='same' with even:UserWarning"
)


def functions() -> dict[str, Callable[[nn.Linear, Tensor], Tensor]]:
    return {
        "linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
        "matmul": lambda layer, x: x @ layer.weight.T,
        "both": lambda layer, x: layer(x) + F.linear(x, layer.weight),
        "row": lambda layer, x: layer(x) * layer.weight[0],
        "norm": lambda layer, x: layer(x) / layer.weight.norm(),
    }


@pytest.mark.parametrize("name", functions())
def test_what_hooks_do_not_see_is_left_out(name: str) -> None:
    model, x = seeded(Through(functions()[name])).double(), randn(5, 4)
    with pytest.warns(UserWarning, match="left out: 'first' has a weight that aten"):
        found = hk.input_covariances(model, [x])
    assert list(found) == ["last"]
    assert "outside its module's own forward()" in found.skipped["first"]
    with pytest.raises(ValueError, match="'first' has a weight that aten"):
        hk.input_covariances(model, [x], layers=["first"])


def test_a_layer_that_is_called_later_is_watched_then() -> None:
    def late(layer: nn.Linear, x: Tensor) -> Tensor:
        return x if x.shape[0] == 5 else layer(x) + F.linear(x, layer.weight)

    model = seeded(Through(late)).double()
    found = hk.input_covariances(model, [randn(5, 4), randn(6, 4, seed=1)])
    assert list(found) == ["last"]
    assert "aten" in found.skipped["first"]
    # Both batches are in the other layer's mean once.
    assert found.num_samples == 11
    x = torch.cat([randn(5, 4), model.eval().function(model.first, randn(6, 4, seed=1)).detach()])
    assert relative_error(found["last"].input_covariance, x.T @ x / 11) <= 1e-12


@pytest.mark.parametrize("weight", [None, torch.arange(1.0, 7.0)])
def test_transforms_of_torch_func_are_left_out(weight: Tensor | None) -> None:
    model = seeded(Through(lambda layer, x: torch.vmap(layer)(x).relu())).double()
    with pytest.warns(UserWarning, match="left out: 'first' is called inside a transform"):
        found = hk.input_covariances(model, [randn(6, 4)], sample_weight=weight)
    assert list(found) == ["last"]
    also = seeded(Through(lambda layer, x: layer(x) + torch.vmap(layer)(x))).double()
    assert list(hk.input_covariances(also, [randn(6, 4)], sample_weight=weight)) == ["last"]


class Tied(nn.Module):
    """One weight in two layers, in series."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=bias)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("bias", ["none", "joint"])
def test_layers_of_one_weight_have_the_inputs_of_both(bias: Any) -> None:
    model, x = seeded(Tied(True)).double(), randn(5, 4)
    found = hk.input_covariances(model, [x[:2], x[2:]], bias=bias)
    rows = torch.cat([x, model.first(x).tanh().detach()])
    if bias == "joint":
        rows = torch.cat([rows, torch.ones(10, 1).double()], 1)
    factors = hk.kronecker_factors(model, [(x, torch.arange(5) % 3)], nn.CrossEntropyLoss())
    for name in ("first", "second"):
        assert relative_error(found[name].input_covariance, rows.T @ rows / 5) < 1e-12
        assert found[name].positions == factors[name].positions == 2


def test_layers_of_one_weight_with_a_bias_of_their_own_are_left_out() -> None:
    model, x = seeded(Tied(False)).double(), randn(5, 4)
    assert "first" in hk.input_covariances(model, [x])
    found = hk.input_covariances(model, [x], bias="joint")
    assert list(found) == ["head"]
    assert "shares its weight with 'second'" in found.skipped["first"]


def test_a_model_that_runs_with_no_single_sample_has_no_weighted_covariance() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.GroupNorm(1, 1), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    x = randn(4, 1)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match=r"'layer' has rows .* one sample alone"):
        hk.input_covariances(seeded(Batch()).double(), [x], sample_weight=weight)


def test_modules_that_hooks_do_not_show() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    model = seeded(nn.Sequential(Attends(), Scaled(3, 3))).double()
    found = hk.input_covariances(model, [randn(2, 3, 4)])
    assert list(found) == ["0.out"]
    assert any("MultiheadAttention" in reason for reason in found.skipped.values())
    assert "aten" in found.skipped["0.attention.out_proj"]
    assert "forward() of its own" in found.skipped["1"]
    with pytest.raises(ValueError, match="'1' belongs to a Scaled"):
        hk.input_covariances(model, [randn(2, 3, 4)], layers="1")


def test_checkpoints_weights_of_others_and_operations_in_place() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
            nn.utils.parametrizations.weight_norm(self.first)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.first, x, use_reentrant=True)
            z = self.second(y)
            y.mul_(5.0)
            return z

    model, x = seeded(Strange()).double(), randn(5, 4)
    found = hk.input_covariances(model, [x, x])
    y = F.linear(x, model.first.weight, model.first.bias).detach()
    assert relative_error(found["first"].input_covariance, x.T @ x / 5) <= 1e-12
    assert relative_error(found["second"].input_covariance, y.T @ y / 5) <= 1e-12


def test_inference_mode_inside_the_model() -> None:
    class Inside(Gated):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                x = 1 * x
                y = self.gate(x)
                x.mul_(2.0)
                return self.down(y * self.up(x))

    found = hk.input_covariances(seeded(Inside()).double(), [sequences()])
    rows = sequences().reshape(-1, 6)
    assert relative_error(found["gate"].input_covariance, rows.T @ rows / 3) <= 1e-12
    assert relative_error(found["up"].input_covariance, 4 * rows.T @ rows / 3) <= 1e-12


def test_sums_of_inference_mode_go_on_and_merge() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                hidden = self.encoder(x)
            return self.head(hidden.clone())

    model = seeded(Partly()).double()
    data = [randn(9, 6, seed=i) for i in range(4)]
    seen = hk.input_covariances(model, data)
    rows = torch.cat(data)
    hidden = F.linear(rows, model.encoder.weight, model.encoder.bias).detach()
    for name, x in (("encoder", rows), ("head", hidden)):
        assert relative_error(seen[name].input_covariance, x.T @ x / 36) <= 1e-12
    whole = hk.input_covariances(model, data[:2])
    whole.merge(hk.input_covariances(model, data[2:]))
    equal(whole, seen, 1e-12)


@pytest.mark.parametrize(
    "others",
    [
        [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}],
        [{"padding": 1, "padding_mode": "reflect"}, {"padding": 2, "padding_mode": "reflect"}],
    ],
)
@pytest.mark.parametrize("samples", [2, 40])
def test_one_image_with_several_paddings(others: list[dict[str, Any]], samples: int) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kinds: list[dict[str, Any]] = [{}, *others, {"padding": 1}]
            self.layers = nn.ModuleList(nn.Conv2d(2, 3, 3, **more) for more in kinds)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    model, x = seeded(Beside()).double(), randn(samples, 2, 5, 5)
    seen = hk.input_covariances(model, [x])
    for index, layer in enumerate(model.layers):
        padded = x
        if layer.padding_mode != "zeros":
            padded = F.pad(x, [layer.padding[0]] * 4, mode=layer.padding_mode)
        elif layer.padding == "same" or layer.padding[0]:
            padded = F.pad(x, [1] * 4)
        rows = F.unfold(padded, 3).mT.reshape(-1, 18)
        found = seen[f"layers.{index}"]
        assert relative_error(found.input_covariance, rows.T @ rows / samples) <= 1e-12
        assert found.positions == len(rows) / samples


def test_a_batch_that_its_model_overwrites() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x.mul_(2)
            return self.late(x) if len(x) > 5 else y

    model = seeded(Overwrites()).double()
    seen = hk.input_covariances(model, [randn(5, 4)], ["first"])
    assert relative_error(seen["first"].input_covariance, randn(5, 4).T @ randn(5, 4) / 5) <= 1e-12
    # A layer that comes later has the model run once more, on what the batch has become.
    with pytest.raises(ValueError, match="model must not overwrite its own inputs"):
        hk.input_covariances(model, [randn(5, 4), randn(6, 4)])


@pytest.mark.parametrize("samples", [1, 40])
def test_pixels_that_no_window_holds_are_looked_at(samples: int) -> None:
    x = randn(samples, 2, 4, 4)
    x[0, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="inputs of layer '' contain NaN or Inf in batch 0"):
        hk.input_covariances(nn.Conv2d(2, 3, 1, stride=2).double(), [x])


def test_the_model_comes_back_as_it_was() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))).double()
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for data, fails in (([randn(5, 4)], False), ([randn(5, 4), randn(5, 3)], True)):
        if fails:
            with pytest.raises(RuntimeError):
                hk.input_covariances(model, data)
        else:
            hk.input_covariances(model, data)
        assert model.training
        assert model[1].training
        assert not model[2].training
        assert not model[0].weight.requires_grad
        assert model[2].weight.requires_grad
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        assert torch.is_grad_enabled()


def test_no_graph_is_made() -> None:
    states = []

    def note(layer: nn.Linear, x: Tensor) -> Tensor:
        y = layer(x)
        states.append((torch.is_grad_enabled(), y.requires_grad))
        return y

    hk.input_covariances(seeded(Through(note)).double(), [randn(5, 4)])
    assert states == [(False, False)]
