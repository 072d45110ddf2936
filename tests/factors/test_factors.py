"""Kronecker factors against a loop over single samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import layer_factors, relative_error
from networks import CASES, CE, SharedOverPositions, Twice, classes, randn, sample_loss, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


def columns(mean: Tensor) -> Tensor:
    """[d, t] of an ``input_mean``, which is [d] for one position."""
    return mean[:, None] if mean.dim() == 1 else mean


def check(found: hk.LayerFactors, expected: dict[str, Tensor], bound: float) -> None:
    assert relative_error(found.input_covariance, expected["input_covariance"]) <= bound
    assert relative_error(found.output_hessian, expected["output_hessian"]) <= bound
    assert relative_error(columns(found.input_mean), expected["input_mean"]) <= bound
    assert found.positions == expected["input_mean"].shape[1]
    # Both factors are whole matrices, not triangles.
    assert torch.equal(found.output_hessian, found.output_hessian.T)
    assert torch.equal(found.input_covariance, found.input_covariance.mT)


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop_over_samples(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    layers = case.layers
    if (name, bias) == ("tied", "joint"):
        # Two biases, one weight: neither bias belongs to all of its calls.
        layers = ("out",)
    factors = hk.kronecker_factors(model, data, CE, layers=layers, bias=bias)
    assert list(factors) == [n for n, _ in model.named_modules() if n in layers]
    assert factors.num_samples == 7
    for layer, found in factors.items():
        module = model.get_submodule(layer)
        joint = bias == "joint" and module.bias is not None
        expected = layer_factors(model, data, sample_loss, layer, joint=joint)
        check(found, expected, 1e-12)
        assert found.name == layer
        assert found.kind == ("linear" if isinstance(module, nn.Linear) else "conv")
        assert found.groups == getattr(module, "groups", 1)
        assert found.layer_shape == (len(module.weight), module.weight[0].numel() + joint)
        assert found.num_samples == 7
        assert found.output_hessian.dtype == torch.float64


@pytest.mark.parametrize(
    "name", ["relu", "conv groups", "conv1d", "sequence", "twice", "conv same"]
)
def test_float32(name: str) -> None:
    case = CASES[name]
    found = hk.kronecker_factors(case.model(torch.float32), case.data(torch.float32), CE)
    model = case.model(torch.float32).double()
    data = [(x.double(), y) for x, y in case.data(torch.float32)]
    for layer, f in found.items():
        assert f.output_hessian.dtype == f.input_covariance.dtype == torch.float32
        check(f, layer_factors(model, data, sample_loss, layer), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["relu", "conv stride", "sequence"])
def test_half_precision_accumulates_in_float32(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = case.model(dtype)
    data = [(x.to(dtype), y) for x, y in case.data()]
    found = hk.kronecker_factors(model, data, CE)
    wide = case.model(dtype).double()
    expected = {
        layer: layer_factors(wide, [(x.double(), y) for x, y in data], sample_loss, layer)
        for layer in found
    }
    for layer, f in found.items():
        assert f.output_hessian.dtype == f.input_covariance.dtype == torch.float32
        assert relative_error(f.output_hessian, expected[layer]["output_hessian"]) <= 0.05
    # The first layer's inputs are exact, so only its accumulation could lose digits.
    first = next(iter(found))
    covariance = expected[first]["input_covariance"]
    assert relative_error(found[first].input_covariance, covariance) <= 1e-6


@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "shared convolution", "dict"])
def test_sample_weights(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    weights = [randn(len(y), seed=i).abs() for i, (_, y) in enumerate(data)]
    weights[1][0] = 0.0
    in_data = [(x, y, w) for (x, y), w in zip(data, weights, strict=True)]
    for bias in ("none", "joint"):
        by_keyword = hk.kronecker_factors(
            model, data, CE, sample_weight=torch.cat(weights), bias=bias
        )
        by_data = hk.kronecker_factors(model, in_data, CE, bias=bias)
        for layer, found in by_data.items():
            joint = bias == "joint" and model.get_submodule(layer).bias is not None
            expected = layer_factors(model, data, sample_loss, layer, joint=joint, weights=weights)
            check(found, expected, 1e-12)
            assert found.num_samples == pytest.approx(float(torch.cat(weights).sum()))
            assert torch.equal(by_keyword[layer].output_hessian, found.output_hessian)
            assert torch.equal(by_keyword[layer].input_covariance, found.input_covariance)


def test_a_batch_of_zero_weights_and_an_empty_batch_add_nothing() -> None:
    for name in ("relu", "conv groups", "sequence"):
        case = CASES[name]
        model, data = case.model(), case.data()
        (x, y), _ = data
        expected = hk.kronecker_factors(model, data, CE, bias="joint")
        more = [(x[:0], y[:0]), *data, (5 * x, y, torch.zeros(4)), (x[:0], y[:0])]
        found = hk.kronecker_factors(model, more, CE, bias="joint")
        assert found.num_samples == 7
        for layer in expected:
            assert (
                relative_error(found[layer].output_hessian, expected[layer].output_hessian) <= 1e-14
            )
            assert (
                relative_error(found[layer].input_covariance, expected[layer].input_covariance)
                <= 1e-14
            )


@pytest.mark.parametrize("output", ["exact", "empirical", "mc"])
def test_memory_budget_changes_nothing_but_memory(output: str) -> None:
    for name in ("relu", "conv stride", "sequence"):
        case = CASES[name]
        model, data = case.model(), case.data()
        wide = hk.kronecker_factors(model, data, CE, output=output, mc_samples=3)
        tight = hk.kronecker_factors(model, data, CE, output=output, mc_samples=3, memory_budget=0)
        for layer in wide:
            error = relative_error(tight[layer].output_hessian, wide[layer].output_hessian)
            assert error <= 1e-14


def test_lengths_that_vary_between_batches() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    data = [(randn(2, t, 3, seed=t), randn(2, t, 2, seed=t + 50)) for t in (3, 5)]

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, target)

    for bias in ("none", "joint"):
        factors = hk.kronecker_factors(model, data, nn.MSELoss(), bias=bias)
        for layer, f in factors.items():
            parts = [
                layer_factors(model, [batch], loss, layer, joint=bias == "joint") for batch in data
            ]
            # Inputs are summed over a sample's positions; of output Hessians all positions of all
            # samples have their mean, 3 of the first and 5 of the second batch's samples.
            inputs = (parts[0]["input_covariance"] + parts[1]["input_covariance"]) / 2
            outputs = (3 * parts[0]["output_hessian"] + 5 * parts[1]["output_hessian"]) / 8
            assert relative_error(f.input_covariance, inputs) <= 1e-12
            assert relative_error(f.output_hessian, outputs) <= 1e-12
            assert f.positions == 4
            with pytest.raises(ValueError, match=f"input_mean of layer '{layer}' is not defined"):
                _ = f.input_mean


def test_images_that_vary_between_batches() -> None:
    model = seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    )
    data = [(randn(2, 2, s, 3, seed=s), classes(2, c=4, seed=s)) for s in (3, 4)]
    f = hk.kronecker_factors(model, data, CE, bias="joint")["0"]
    parts = [layer_factors(model, [batch], sample_loss, "0", joint=True) for batch in data]
    inputs = (parts[0]["input_covariance"] + parts[1]["input_covariance"]) / 2
    # Images of 2 x 2 and of 3 x 2 positions.
    outputs = (4 * parts[0]["output_hessian"] + 6 * parts[1]["output_hessian"]) / 10
    assert relative_error(f.input_covariance, inputs) <= 1e-12
    assert relative_error(f.output_hessian, outputs) <= 1e-12


def test_input_mean_direction() -> None:
    case = CASES["relu"]
    f = hk.kronecker_factors(case.model(), case.data(), CE)["2"]
    assert f.input_mean.shape == (6,)
    assert relative_error(f.input_mean_direction, f.input_mean / f.input_mean.norm()) <= 1e-14
    case = CASES["conv stride"]
    f = hk.kronecker_factors(case.model(), case.data(), CE)["0"]
    assert f.input_mean.shape == (12, 12)
    _, vectors = torch.linalg.eigh(f.input_mean @ f.input_mean.T)
    direction = f.input_mean_direction
    assert direction.shape == (12,)
    assert abs(float(direction @ vectors[:, -1])) == pytest.approx(1, abs=1e-12)
    assert float(direction.sum()) >= 0


@pytest.mark.parametrize("positions", [1, 4])
def test_input_mean_direction_of_a_zero_mean_is_zero(positions: int) -> None:
    model = seeded(nn.Linear(3, 2))
    # Small integers, so that the sum is zero without rounding.
    x = classes(2, positions, 3, c=9).double().squeeze(1)
    data = [(torch.cat([x, -x]), torch.zeros(4, *x.shape[1:-1], 2).double())]
    f = hk.kronecker_factors(model, data, nn.MSELoss())[""]
    assert torch.equal(f.input_mean_direction, torch.zeros(3).double())


def test_a_layer_used_twice_sums_inputs_and_averages_curvature_over_uses() -> None:
    # Spelt out once more, without the loop that the other tests share.
    model = seeded(Twice())
    x, y = randn(5, 4), classes(5, c=3)
    f = hk.kronecker_factors(model, [(x, y)], CE)["shared"]
    first = model.shared(x).detach().requires_grad_()
    h = F.relu(first)
    second = model.shared(h)
    logits = model.out(F.relu(second))
    expected = torch.zeros(4, 4).double()
    p = logits.detach().softmax(1)
    rows = [
        torch.autograd.grad(logits[:, c].sum(), [first, second], retain_graph=True)
        for c in range(3)
    ]
    for z in range(2):
        g = torch.stack([row[z] for row in rows], 1)
        A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        expected += torch.einsum("nci,ncb,nbj->ij", g, A, g) / 5 / 2
    assert relative_error(f.output_hessian, expected) <= 1e-12
    assert relative_error(f.input_covariance, (x.T @ x + (h.T @ h).detach()) / 5) <= 1e-12
    assert f.positions == 2
    assert relative_error(f.input_mean, torch.stack([x.mean(0), h.detach().mean(0)], 1)) <= 1e-12


# Which layers


class Various(nn.Module):
    """Supported layers among others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)
        self.bilinear = nn.Bilinear(3, 3, 2)
        self.unused = nn.Linear(4, 4)
        self.relu = nn.ReLU()

        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        self.scaled = Scaled(2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.relu(self.fc(self.norm(self.embed(tokens)).mean(1)))
        return self.scaled(self.bilinear(h, h))


def test_layers_without_factors_are_listed_with_reasons() -> None:
    model = seeded(Various())
    data = [(classes(4, 6, c=5), classes(4, c=3))]
    with pytest.warns(UserWarning, match="left out: 'unused' was never reached"):
        factors = hk.kronecker_factors(model, data, CE)
    assert list(factors) == ["fc", "scaled"]
    assert set(factors.skipped) == {"embed", "norm", "bilinear", "unused"}
    assert "Embedding" in factors.skipped["embed"]
    assert "never reached" in factors.skipped["unused"]
    # A forward() of its own is no matter: what counts is how the weight acts.
    expected = layer_factors(model, data, sample_loss, "scaled")
    # What it doubles is the call's result, in which E[M] is the Hessian.
    expected["output_hessian"] *= 4
    check(factors["scaled"], expected, 1e-12)
    with pytest.raises(KeyError, match="no factors for layer 'norm': it is a LayerNorm"):
        _ = factors["norm"]
    with pytest.raises(KeyError, match="no factors for layer 'nothing'; there are fc, scaled"):
        _ = factors["nothing"]
    with pytest.raises(NotImplementedError, match="layers: 'embed' is an Embedding"):
        hk.kronecker_factors(model, data, CE, layers=["fc", "embed"])
    text = repr(factors)
    assert "fc" in text
    assert "(3, 4)" in text


def test_a_forward_replaced_on_the_instance_counts() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    plain = model[0].forward
    model[0].forward = lambda x: 3 * plain(x)
    data = [(randn(4, 4), classes(4, c=3))]
    factors = hk.kronecker_factors(model, data, CE)
    assert list(factors) == ["0", "2"]
    assert not factors.skipped

    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    first = nn.Linear(4, 5).double()
    first.load_state_dict(model[0].state_dict())
    spelt_out = nn.Sequential(first, Three(), nn.ReLU(), model[2])
    for name, other in (("0", "0"), ("2", "3")):
        check(factors[name], layer_factors(spelt_out, data, sample_loss, other), 1e-12)


def test_kinds_of_data_agree() -> None:
    case = CASES["residual"]
    model = case.model()
    x, y = randn(7, 4), classes(7, c=3)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    expected = hk.kronecker_factors(model, batches, CE)
    sources: list[Any] = [
        DataLoader(TensorDataset(x, y), batch_size=4),
        iter(batches),
        (batch for batch in batches),
        [[x[:4], y[:4]], [x[4:], y[4:]]],
    ]
    for source in sources:
        found = hk.kronecker_factors(model, source, CE)
        for layer in expected:
            assert torch.equal(found[layer].output_hessian, expected[layer].output_hessian)
            assert torch.equal(found[layer].input_covariance, expected[layer].input_covariance)


def test_progress_is_reported_per_batch() -> None:
    case = CASES["relu"]
    seen: list[tuple[str, int, int | None]] = []
    hk.kronecker_factors(case.model(), case.data(), CE, progress=lambda *event: seen.append(event))
    assert [(done, total) for _, done, total in seen] == [(1, 2), (2, 2)]


# The operator and its eigenpairs


@pytest.mark.parametrize("name", ["relu", "conv stride", "conv groups", "sequence"])
def test_operator_and_eigenpairs(name: str) -> None:
    case = CASES[name]
    for f in hk.kronecker_factors(case.model(), case.data(), CE).values():
        K = f.operator()
        m, step = f.layer_shape[0], f.layer_shape[0] // f.groups
        blocks = f.input_covariance if f.groups > 1 else f.input_covariance[None]
        expected = torch.block_diag(
            *[
                torch.kron(
                    f.output_hessian[i * step : (i + 1) * step, i * step : (i + 1) * step],
                    blocks[i],
                )
                for i in range(f.groups)
            ]
        )
        assert K.shape == (m * f.layer_shape[1],) * 2
        assert relative_error(K.to_dense(), expected) <= 1e-14
        top = f.eigsh(4)
        values = torch.linalg.eigvalsh(expected).flip(0)[:4]
        assert relative_error(top.values, values) <= 1e-12
        assert relative_error(expected @ top.vectors, top.vectors * top.values) <= 1e-10


def test_shared_convolution_counts_positions_of_both_images() -> None:
    model = seeded(SharedOverPositions())
    f = hk.kronecker_factors(model, CASES["shared convolution"].data(), CE)["conv"]
    assert f.positions == 1 + 9
    assert f.input_mean.shape == (8, 10)
