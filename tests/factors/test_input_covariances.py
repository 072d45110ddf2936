"""Input covariances by forward hooks, against loops over samples and the factors of the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import layer_factors, relative_error
from networks import CASES, classes, randn, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hesskern as hk

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings(
    "ignore:left out:UserWarning", "ignore:Using padding='same' with even:UserWarning"
)


def sample_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


class Gated(nn.Module):
    """Over sequences [N, T, 6]: two layers with one input, and a pooler on the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 5), nn.Linear(6, 5)
        self.down = nn.Linear(5, 6, bias=False)
        self.pooler = nn.Linear(6, 4)

    def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        assert labels is None
        x = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return self.pooler(x[:, 0])


def gated() -> nn.Module:
    return seeded(Gated()).double()


def sequences(n: int = 3, t: int = 4, seed: int = 0) -> Tensor:
    return randn(n, t, 6, seed=seed)


class Through(nn.Module):
    """A layer, then a function of it and its input, then another layer."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first, x))


def equal(one: hk.InputCovariances, other: hk.InputCovariances, bound: float = 0.0) -> None:
    assert list(one) == list(other)
    assert one.num_samples == pytest.approx(other.num_samples, rel=1e-12)
    for name in one:
        a, b = one[name], other[name]
        assert relative_error(a.input_covariance, b.input_covariance) <= bound
        assert relative_error(a.input_mean, b.input_mean) <= bound
        assert a.positions == pytest.approx(b.positions, rel=1e-12)


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"tied"}))
def test_against_a_loop_over_samples(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    found = hk.input_covariances(model, data, bias=bias)
    assert found.num_samples == 7
    assert {*case.layers} <= {*found}
    for layer in case.layers:
        module = model.get_submodule(layer)
        joint = bias == "joint" and module.bias is not None
        expected = layer_factors(model, data, sample_loss, layer, joint=joint)
        ours = found[layer]
        assert relative_error(ours.input_covariance, expected["input_covariance"]) <= 1e-12
        assert torch.equal(ours.input_covariance, ours.input_covariance.mT)
        assert relative_error(ours.input_mean, expected["input_mean"].mean(1)) <= 1e-12
        assert ours.positions == expected["input_mean"].shape[1]


@pytest.mark.parametrize("name", ["relu", "conv stride", "sequence", "attention", "conv groups"])
def test_one_batch_equals_the_factors_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, data = case.model().float(), case.data()[:1]
    data = [(x.float(), targets) for x, targets in data]
    factors, found = hk.kronecker_factors(model, data, CE), hk.input_covariances(model, data)
    for layer in factors:
        assert torch.equal(found[layer].input_covariance, factors[layer].input_covariance)
    weight = torch.tensor([0.5, 2.0, 1.25, 0.0, 3.0])[: len(data[0][0])]
    factors = hk.kronecker_factors(model, data, CE, sample_weight=weight)
    found = hk.input_covariances(model, data, sample_weight=weight)
    assert found.num_samples == factors.num_samples
    for layer in factors:
        ours, theirs = found[layer].input_covariance, factors[layer].input_covariance
        assert relative_error(ours, theirs) <= 1e-6


def test_data_in_every_form() -> None:
    model, parts = gated(), [sequences(seed=0), sequences(2, seed=1)]
    expected = hk.input_covariances(model, parts)
    whole = torch.cat(parts).reshape(-1, 6)
    assert relative_error(expected["gate"].input_covariance, whole.T @ whole / 5) <= 1e-12
    labels = torch.zeros(3)
    forms: list[Callable[[Tensor], Any]] = [
        lambda x: (x,),
        lambda x: [x, labels],
        lambda x: {"x": x, "labels": labels},
        lambda x: ({"x": x, "labels": labels}, labels),
        lambda x: ((x,), labels, torch.ones(len(x))),
        lambda x: {"x": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long)},
    ]
    for form in forms:
        equal(hk.input_covariances(model, map(form, parts)), expected)


def test_labels_stay_where_forward_needs_them() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.layer(x * labels[:, None, None])

    model, x = seeded(Needs()).double(), sequences()
    labels = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = hk.input_covariances(model, [{"x": x, "labels": labels}])
    rows = (x * labels[:, None, None]).reshape(-1, 6)
    assert relative_error(found["layer"].input_covariance, rows.T @ rows / 3) <= 1e-12


def test_a_shared_input_is_summed_once_until_it_is_not_shared() -> None:
    class Sometimes(Gated):
        def forward(self, x: Tensor) -> Tensor:
            other = x if x.shape[1] == 4 else 2 * x
            return self.down(self.gate(x) * self.up(other))

    model = seeded(Sometimes()).double()
    seen = hk.input_covariances(model, [sequences()])
    sums = seen._sums.by_layer
    assert sums["gate"] is sums["up"] is not sums["down"]
    hk.input_covariances(model, [sequences(t=5, seed=1)], accumulate=seen)
    assert sums["gate"] is not sums["up"]
    first, second = sequences().reshape(-1, 6), sequences(t=5, seed=1).reshape(-1, 6)
    for name, factor in (("gate", 1), ("up", 4)):
        expected = (first.T @ first + factor * second.T @ second) / 6
        assert relative_error(seen[name].input_covariance, expected) <= 1e-12


def masked_rows(x: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([one[keep] for one, keep in zip(x, mask.bool(), strict=True)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", ["attention_mask", "position_mask"])
def test_padding_counts_nowhere(how: str, weighted: bool) -> None:
    model, x = gated(), sequences()
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    # What is at masked positions matters to nobody, as long as it can be computed.
    x = torch.where(mask[..., None] == 0, 1e3 * x, x)
    batch = {"x": x, "attention_mask": mask} if how == "attention_mask" else {"x": x}
    given = None if how == "attention_mask" else lambda inputs: mask
    found = hk.input_covariances(
        model, [batch], bias="joint", position_mask=given, sample_weight=weight
    )
    one = torch.ones(3, dtype=torch.float64) if weight is None else weight
    rows = F.pad(masked_rows(x, mask), (0, 1), value=1.0)
    by_row = one.repeat_interleave(mask.sum(1))
    total = one.sum()
    for name in ("gate", "up"):
        ours = found[name]
        expected = (rows * by_row[:, None]).T @ rows / total
        assert relative_error(ours.input_covariance, expected) <= 1e-12
        assert ours.positions == pytest.approx(float((one * mask.sum(1)).sum() / total))
        mean = (rows * by_row[:, None]).sum(0) / by_row.sum()
        assert relative_error(ours.input_mean, mean) <= 1e-12
    # One row per sample is not the mask's.
    assert found["pooler"].positions == 1
    factors = hk.kronecker_factors(
        model,
        [(x, torch.tensor([0, 1, 2]))],
        CE,
        bias="joint",
        position_mask=lambda inputs: mask,
        sample_weight=weight,
    )
    for name in factors:
        ours, theirs = found[name].input_covariance, factors[name].input_covariance
        assert relative_error(ours, theirs) <= 1e-6


def test_masked_convolutions_over_sequences() -> None:
    model = seeded(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.ReLU())).double()
    x, mask = randn(3, 4, 5), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 0, 1, 1, 1]])
    found = hk.input_covariances(model, [x], position_mask=lambda inputs: mask)["0"]
    columns = F.pad(x, (1, 1)).unfold(2, 3, 1).permute(0, 2, 1, 3)
    rows = masked_rows(columns.reshape(3, 5, 12), mask).reshape(-1, 2, 6)
    expected = torch.einsum("rgi,rgj->gij", rows, rows) / 3
    assert relative_error(found.input_covariance, expected) <= 1e-12
    assert found.positions == pytest.approx(11 / 3)


def test_rows_in_another_order_are_left_out() -> None:
    class Crosswise(nn.Module):
        """Its second layer sees [T, N, d], flattened."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).transpose(0, 1).reshape(-1, 6))

    model, x = seeded(Crosswise()).double(), sequences()
    plain = hk.input_covariances(model, [x])
    assert list(plain) == ["first", "second"]
    with pytest.warns(UserWarning, match="left out: 'second' was given rows that are not"):
        masked = hk.input_covariances(model, [x], position_mask=lambda x: torch.ones(3, 4).triu(-1))
    assert list(masked) == ["first"]
    with pytest.raises(ValueError, match="'second' was given rows that are not"):
        hk.input_covariances(model, [x], "second", sample_weight=torch.tensor([1.0, 2.0, 3.0]))


class Reordered(nn.Module):
    """A layer before and one behind what changes the order of the rows."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.change(self.first(x)))


def positions_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def with_large_feature(x: Tensor, value: float) -> Tensor:
    return torch.cat([x[..., :5], torch.full_like(x[..., :1], value)], -1)


def only_first(model: nn.Module, x: Tensor, mask: list[list[int]]) -> None:
    """Of these masked rows, no covariance is made for the second layer."""
    with pytest.warns(UserWarning, match="left out: 'second' was given rows that are not"):
        found = hk.input_covariances(model, [x], position_mask=lambda x: torch.tensor(mask))
    assert list(found) == ["first"]


def test_the_order_shows_beside_padding_that_is_not_finite() -> None:
    model, x = seeded(Reordered(positions_first)).double(), sequences(2)
    x[1, 3, 2] = torch.nan
    only_first(model, x, [[1, 1, 1, 0], [1, 1, 1, 0]])
    # Where the order is right, what is in the padding matters to nobody.
    same = seeded(Reordered(lambda x: x)).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    found = hk.input_covariances(same, [x], position_mask=lambda x: mask)
    assert list(found) == ["first", "second"]


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e4, torch.float32), (150.0, torch.bfloat16), (1e9, torch.float64)]
)
def test_the_order_shows_beside_a_large_feature(value: float, dtype: torch.dtype) -> None:
    def change(x: Tensor) -> Tensor:
        return with_large_feature(x.transpose(0, 1).reshape(-1, 6), value)

    mask = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    x = sequences().to(dtype)
    only_first(seeded(Reordered(change)).to(dtype), x, mask)
    right = seeded(Reordered(lambda x: with_large_feature(x, value))).to(dtype)
    found = hk.input_covariances(right, [x], position_mask=lambda x: torch.tensor(mask))
    assert list(found) == ["first", "second"]


def test_the_order_shows_though_the_last_row_is_the_same() -> None:
    model = seeded(Reordered(positions_first)).double()
    only_first(model, sequences(2), [[1, 1, 1, 0], [0, 0, 0, 1]])


def test_samples_that_are_alike_tell_nothing_of_the_order() -> None:
    model = seeded(Reordered(lambda x: x.flip(0))).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    alike = sequences(1).expand(2, -1, -1).contiguous()
    found = hk.input_covariances(model, [alike], position_mask=lambda x: mask)
    assert list(found) == ["first", "second"]
    with pytest.raises(ValueError, match="'second' was given rows that are not"):
        hk.input_covariances(model, [alike, sequences(2)], position_mask=lambda x: mask)
    # In the right order both batches count.
    same = seeded(Reordered(lambda x: x)).double()
    found = hk.input_covariances(same, [alike, sequences(2)], position_mask=lambda x: mask)
    assert found["second"].num_samples == 4


@pytest.mark.parametrize("size", [40, 400])
def test_rounding_is_no_other_order(size: int) -> None:
    """Of samples alone, entries next to zero have other roundings."""
    layers = [nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()]
    model = seeded(nn.Sequential(*layers, nn.Linear(size, 3)))
    x, weight = randn(33, size, dtype=torch.float32), torch.arange(33.0)
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype)]
        assert len(hk.input_covariances(model.to(dtype), given, sample_weight=weight)) == 3


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        given = inputs["input_ids"] if "input_ids" in inputs else inputs["tokens"]
        return self.layer(self.words(given))


def test_what_counts_the_samples_of_a_dict() -> None:
    model, ids = seeded(Embedded()).double(), torch.arange(16).reshape(2, 8) % 11
    positions = torch.arange(8)[None]
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    plain = {"position_ids": positions, "input_ids": ids}
    for extra in ({}, {"attention_mask": mask}):
        expected = hk.input_covariances(model, [{"input_ids": ids, **extra}])
        found = hk.input_covariances(model, [{**plain, **extra}])
        assert found.num_samples == 2
        equal(found, expected)
    weight = torch.tensor([0.5, 2.0])
    expected = hk.input_covariances(model, [{"input_ids": ids}], sample_weight=weight)
    equal(hk.input_covariances(model, [plain], sample_weight=weight), expected)
    # Names that tell nothing: the mask does, or nothing.
    batch = {"position_ids": positions, "tokens": ids}
    found = hk.input_covariances(model, [{**batch, "attention_mask": mask}])
    equal(found, hk.input_covariances(model, [{"input_ids": ids, "attention_mask": mask}]))
    equal(hk.input_covariances(model, [batch], position_mask=lambda inputs: mask), found)
    with pytest.raises(ValueError, match="contradict each other: 'position_ids' has 1, 'tokens'"):
        hk.input_covariances(model, [batch])


def test_weights_that_are_pieces_of_one_vector() -> None:
    model = seeded(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2))).double()
    x = randn(5, 6)
    expected = hk.input_covariances(model, [x])
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    equal(hk.input_covariances(model, [x]), expected)
    # What reads one of the pieces is still seen, by whatever view.
    through = seeded(Through(lambda layer, x: layer(x) * layer.weight[1])).double()
    flat = nn.utils.parameters_to_vector(through.parameters()).detach()
    nn.utils.vector_to_parameters(flat, through.parameters())
    assert list(hk.input_covariances(through, [randn(5, 4)])) == ["last"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    model = seeded(nn.Linear(6, 3)).to(dtype)
    x = randn(4096, 6, dtype=torch.float32).to(dtype)
    found = hk.input_covariances(model, [x])[""]
    assert found.input_covariance.dtype == found.input_mean.dtype == torch.float32
    wide = x.double()
    assert relative_error(found.input_covariance, wide.T @ wide / 4096) <= 1e-6
    assert relative_error(found.input_mean, wide.mean(0)) <= 1e-5


def test_autocast_reaches_the_model_alone() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))).float()
    x = randn(64, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = hk.input_covariances(model, [x])
    assert relative_error(found["0"].input_covariance, x.T @ x / 64) <= 1e-6
    assert found["2"].input_covariance.dtype == torch.float32
    assert found.settings["precision"].startswith("float32 model under bfloat16 autocast")


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [None, torch.ones(9, dtype=torch.float64)])
def test_a_bad_batch_adds_nothing(value: float, weight: Tensor | None) -> None:
    model, seen = gated(), hk.InputCovariances()
    bad = sequences(seed=1)
    # Only the last layer's input is bad.
    spoilt = gated()
    spoilt.load_state_dict(model.state_dict())
    parts = [sequences(), bad, sequences(seed=2)]

    def spoil(module: nn.Module, args: Any) -> Any:
        return (args[0] * value,) if torch.equal(given[-1], bad) else None

    given: list[Tensor] = []
    spoilt.gate.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    spoilt.pooler.register_forward_pre_hook(spoil)
    with pytest.raises(ValueError, match=r"inputs of layer 'pooler' contain NaN or Inf in batch 1"):
        hk.input_covariances(spoilt, parts, accumulate=seen, sample_weight=weight)
    if weight is not None:
        # Its entries belong to the data as a whole.
        assert seen.num_samples == len(seen) == 0
        return
    equal(seen, hk.input_covariances(model, parts[:1]))


def test_squares_that_overflow_add_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen = hk.input_covariances(model, [torch.ones(3, 2)])
    before = seen["0"].input_covariance
    with pytest.raises(ValueError, match="squared inputs of layer '0' overflow"):
        hk.input_covariances(model, [torch.full((3, 2), 1e19)], accumulate=seen)
    most = torch.finfo(torch.float32).max ** 0.5
    hk.input_covariances(model, [torch.full((1, 2), 0.5 * most)], ["0"])
    assert torch.equal(seen["0"].input_covariance, before)


def test_streams_go_on_merge_and_are_saved(tmp_path: Path) -> None:
    model, parts = gated().float(), [sequences(seed=i).float() for i in range(4)]
    whole = hk.input_covariances(model, parts, bias="joint")
    seen = hk.InputCovariances()
    for part in parts[:2]:
        assert hk.input_covariances(model, [part], bias="joint", accumulate=seen) is seen
    path = tmp_path / "seen.safetensors"
    seen.save(path)
    loaded = hk.load_input_covariances(path)
    equal(loaded, seen)
    assert loaded.skipped == seen.skipped
    assert loaded.settings == seen.settings
    with safe_open(path, framework="pt") as file:
        # Gate and up have one matrix in common.
        assert len(file.keys()) == 2 * 3
    for more in (seen, loaded):
        hk.input_covariances(model, parts[2:], bias="joint", accumulate=more)
        equal(more, whole)
    halves = [hk.input_covariances(model, part, bias="joint") for part in (parts[:2], parts[2:])]
    halves[0].merge(halves[1])
    equal(halves[0], whole, 1e-6)
    assert halves[0]._sums.by_layer["gate"] is halves[0]._sums.by_layer["up"]
    empty = hk.InputCovariances()
    empty.merge(whole)
    equal(empty, whole)
    empty.merge(empty)
    assert empty.num_samples == 2 * whole.num_samples
    assert relative_error(empty["up"].input_covariance, whole["up"].input_covariance) <= 1e-6


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    hk.input_covariances(gated(), [sequences()]).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["hesskern"])
    tensors["0.inputs"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"hesskern": json.dumps(header)})
    with pytest.raises(ValueError, match="damaged: the sums of layer 'gate'"):
        hk.load_input_covariances(path)
    with pytest.raises(FileNotFoundError):
        hk.load_input_covariances(tmp_path / "none")
    hk.kronecker_factors(gated(), [(sequences(), classes(3, c=4))], CE).save(path)
    with pytest.raises(ValueError, match="does not hold hesskern input covariances"):
        hk.load_input_covariances(path)


def test_what_does_not_fit_is_refused() -> None:
    model, x = gated(), sequences()
    seen = hk.input_covariances(model, [x])
    kept = seen["gate"].input_covariance
    with pytest.raises(ValueError, match="bias='joint'"):
        hk.input_covariances(model, [x], bias="joint", accumulate=seen)
    with pytest.raises(ValueError, match="other layers than what was accumulated"):
        hk.input_covariances(model, [x], ["gate"], accumulate=seen)
    with pytest.raises(ValueError, match="other layers"):
        seen.merge(hk.input_covariances(model, [x], ["gate"]))
    with pytest.raises(TypeError, match="other must be"):
        seen.merge(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="accumulate must be"):
        hk.input_covariances(model, [x], accumulate={})  # type: ignore[arg-type]
    assert torch.equal(seen["gate"].input_covariance, kept)
    with pytest.raises(KeyError, match="no input covariance for layer 'nope'"):
        seen["nope"]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data yielded no samples"),
        (torch.zeros(3, 4, 6), TypeError, "data must be an iterable"),
        ([3], TypeError, "batch 0 is a int"),
        ([(1, 2, 3, 4)], TypeError, "batch 0 is a tuple of 4"),
        ([{"x": [[1, 2], [3]]}], TypeError, "return_tensors"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.zeros(3, 4)}], ValueError, "padding"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.ones(3, 4, 4)}], ValueError, "N, T"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.ones(3, 7)}], ValueError, "7 pos"),
        ([(torch.zeros(3, 4, 6), 0, torch.tensor([1.0, -1.0, 1.0]))], ValueError, "non-negative"),
        ([(torch.zeros(3, 4, 6), 0, torch.ones(2))], ValueError, "sample_weight must be"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.input_covariances(gated().float(), data)


def test_a_model_that_is_random_is_refused() -> None:
    model = seeded(Through(lambda layer, x: F.dropout(layer(x)))).double()
    with pytest.raises(ValueError, match="draws random numbers"):
        hk.input_covariances(model, [randn(5, 4)])


def test_an_interruption_amid_a_batch_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = hk.input_covariances(gated(), [sequences()])
    add, calls = hk.ops.input_covariance_, []

    def interrupted(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(*args)

    monkeypatch.setattr(hk.ops, "input_covariance_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hk.input_covariances(gated(), [sequences()], accumulate=seen)
    with pytest.raises(RuntimeError, match="interrupted while a batch was being added"):
        seen["gate"]
