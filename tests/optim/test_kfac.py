"""Preconditioned gradients against dense inverses in float64, made sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import layer_factors, relative_error
from networks import CASES, CE, Routed, Tied, classes, randn, routed_data, sample_loss, seeded
from torch import Tensor, nn

import hesskern as hk

DAMPING = 0.03


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def backward(model: nn.Module, inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss, left in the parameters; what is returned is a copy."""
    model.zero_grad()
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    outputs = model(*args, **(inputs if isinstance(inputs, dict) else {}))
    F.cross_entropy(getattr(outputs, "logits", outputs), targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def damped(factors: dict[str, Tensor], damping: float, groups: int = 1) -> Tensor:
    """[P, P] dense (B + sqrt(damping) / pi I) (x) (A + pi sqrt(damping) I), group by group."""
    A, B = factors["input_covariance"], factors["output_hessian"]
    step = len(B) // groups
    blocks = []
    for i in range(groups):
        a = A[i] if groups > 1 else A
        b = B[i * step : (i + 1) * step, i * step : (i + 1) * step]
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5
        a = a + pi * damping**0.5 * torch.eye(len(a), dtype=a.dtype)
        b = b + damping**0.5 / pi * torch.eye(len(b), dtype=b.dtype)
        blocks.append(torch.kron(b.contiguous(), a.contiguous()))
    return torch.block_diag(*blocks)


def as_matrix(gradients: dict[str, Tensor], layer: str, joint: bool) -> Tensor:
    prefix = f"{layer}." if layer else ""
    matrix = gradients[f"{prefix}weight"].flatten(1)
    if joint:
        matrix = torch.cat([matrix, gradients[f"{prefix}bias"][:, None]], 1)
    return matrix


def now(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", ["joint", "none"])
@pytest.mark.parametrize(
    "name", ["linear", "relu", "conv stride", "conv groups", "conv1d", "sequence", "twice", "dict"]
)
def test_dense_inverse(name: str, bias: Any) -> None:
    case = CASES[name]
    model, batch = case.model(), case.data()[0]
    plain = backward(model, *batch)
    kfac = hk.optim.KFAC(
        model, sgd(model), CE, output="exact", bias=bias, damping=DAMPING, kl_clip=None
    )
    kfac.step(*batch)
    found = now(model)
    assert set(kfac.layers) == set(case.layers)
    touched = set()
    for layer in case.layers:
        module = model.get_submodule(layer)
        joint = bias == "joint" and module.bias is not None
        factors = layer_factors(model, [batch], sample_loss, layer, joint=joint)
        matrix = as_matrix(plain, layer, joint)
        dense = damped(factors, DAMPING, getattr(module, "groups", 1))
        expected = torch.linalg.solve(dense, matrix.flatten()).reshape(matrix.shape)
        assert relative_error(as_matrix(found, layer, joint), expected) < 1e-9, layer
        prefix = f"{layer}." if layer else ""
        touched |= {f"{prefix}weight"} | ({f"{prefix}bias"} if joint else set())
    for other in plain.keys() - touched:
        assert torch.equal(found[other], plain[other]), other


class Conv1D(nn.Module):
    """As transformers has it: the weight is kept [d, m]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


def test_conv1d_of_transformers_is_the_linear_layer() -> None:
    kept = seeded(nn.Sequential(Conv1D(5, 4), nn.ReLU(), nn.Linear(5, 3)))
    plain = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    plain[0].weight.data.copy_(kept[0].weight.data.T)
    plain[0].bias.data.copy_(kept[0].bias.data)
    x, y = randn(6, 4), classes(6, c=3)
    for model in (kept, plain):
        backward(model, x, y)
        hk.optim.KFAC(model, sgd(model), CE, output="exact").step(x, y)
    assert relative_error(kept[0].weight.grad.T, plain[0].weight.grad) < 1e-12
    assert relative_error(kept[0].bias.grad, plain[0].bias.grad) < 1e-12


def test_moving_averages_and_when_inverses_are_made() -> None:
    # Inverses of steps 0, 1, 2 and then of every fourth, of averages without their start-up bias.
    model = seeded(nn.Linear(4, 3))
    batches = [(randn(5, 4, seed=i), classes(5, c=3, seed=i)) for i in range(9)]
    kfac = hk.optim.KFAC(
        model, sgd(model), CE, output="exact", damping=DAMPING, decay=0.7, inverse_every=4,
        kl_clip=None,
    )  # fmt: skip
    single = [layer_factors(model, [batch], sample_loss, "", joint=True) for batch in batches]
    made = 0
    for i, batch in enumerate(batches):
        made = i if i < 3 or i % 4 == 0 else made
        plain = backward(model, *batch)
        kfac.step(*batch)
        weights = [0.3 * 0.7 ** (made - j) for j in range(made + 1)]
        mean = {
            key: sum(w * f[key] for w, f in zip(weights, single, strict=False)) / sum(weights)
            for key in ("input_covariance", "output_hessian")
        }
        matrix = as_matrix(plain, "", True)
        expected = torch.linalg.solve(damped(mean, DAMPING), matrix.flatten())
        assert relative_error(as_matrix(now(model), "", True).flatten(), expected) < 1e-9, i
    assert kfac.steps == 9


@pytest.mark.parametrize("groups", [1, 2])
def test_kl_clip_scales_by_the_step_that_the_optimizer_would_take(groups: int) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    parts = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = (
        torch.optim.SGD(parts, lr=0.2) if groups == 2 else torch.optim.SGD(model.parameters(), 0.2)
    )
    rates = (0.5, 0.2) if groups == 2 else (0.2, 0.2)
    x, y = randn(6, 4), classes(6, c=3)
    free, clipped = (
        hk.optim.KFAC(model, optimizer, CE, output="exact", kl_clip=clip) for clip in (None, 1e-4)
    )
    plain = backward(model, x, y)
    free.step(x, y)
    unscaled = now(model)
    squared = sum(
        rate**2 * float((unscaled[name] * plain[name]).sum())
        for layer, rate in zip(("0", "2"), rates, strict=True)
        for name in (f"{layer}.weight", f"{layer}.bias")
    )
    assert squared > 1e-4
    backward(model, x, y)
    clipped.step(x, y)
    for name, value in now(model).items():
        assert relative_error(value, unscaled[name] * (1e-4 / squared) ** 0.5) < 1e-12
    clipped.kl_clip = 2 * squared
    backward(model, x, y)
    clipped.step(x, y)
    # Within the bound nothing is scaled; factors of the same batch twice are the same.
    for name, value in now(model).items():
        assert relative_error(value, unscaled[name]) < 1e-12


@pytest.mark.parametrize("rates", [(0.2, 3.0), (3.0, 0.2)])
def test_kl_clip_takes_the_higher_rate_of_a_weight_and_its_bias(rates: tuple[float, float]) -> None:
    model = seeded(nn.Linear(4, 3))
    parts = [{"params": [p], "lr": r} for p, r in zip(model.parameters(), rates, strict=True)]
    found = []
    for given in (parts, [{"params": model.parameters(), "lr": 3.0}]):
        kfac = hk.optim.KFAC(model, torch.optim.SGD(given), CE, output="exact", kl_clip=1e-4)
        plain = backward(model, randn(6, 4), classes(6, c=3))
        kfac.step(randn(6, 4), classes(6, c=3))
        found.append(now(model))
    apart, together = found
    assert float(together["bias"].norm()) < 0.1 * float(plain["bias"].norm())
    for name, value in together.items():
        assert relative_error(apart[name], value) < 1e-12, name


def test_what_has_no_place_keeps_its_gradient_and_is_named() -> None:
    model = seeded(
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))
    )
    model[3].requires_grad_(False)
    x, y = randn(6, 4), classes(6, c=3)
    plain = backward(model, x, y)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1)
    kfac = hk.optim.KFAC(model, optimizer, CE)
    with pytest.warns(UserWarning, match="left out: '3' is frozen"):
        kfac.step(x, y)
    assert kfac.layers == ("0",)
    assert "does not require gradients" in kfac.skipped["3"]
    assert "not among the optimizer's parameters" in kfac.skipped["4"]
    assert "LayerNorm" in kfac.skipped["1"]
    found = now(model)
    for name in plain:
        assert torch.equal(found[name], plain[name]) == (name not in ("0.weight", "0.bias")), name
    # It is said once.
    backward(model, x, y)
    kfac.step(x, y)


def test_a_frozen_bias_leaves_the_weight_alone_in_its_block() -> None:
    model = seeded(nn.Linear(4, 3))
    model.bias.requires_grad_(False)
    x, y = randn(6, 4), classes(6, c=3)
    plain = backward(model, x, y)
    kfac = hk.optim.KFAC(model, sgd(model), CE, output="exact", damping=DAMPING, kl_clip=None)
    kfac.step(x, y)
    dense = damped(layer_factors(model, [(x, y)], sample_loss, ""), DAMPING)
    expected = torch.linalg.solve(dense, plain["weight"].flatten()).reshape(3, 4)
    assert relative_error(model.weight.grad, expected) < 1e-9
    assert model.bias.grad is None


def test_a_shared_weight_is_preconditioned_once() -> None:
    model = seeded(Tied())
    x, y = randn(6, 4), classes(6, c=3)
    plain = backward(model, x, y)
    settings: dict[str, Any] = {"output": "exact", "damping": DAMPING, "kl_clip": None}
    kfac = hk.optim.KFAC(model, sgd(model), CE, bias="none", **settings)
    with pytest.warns(UserWarning, match="'second' has the weight of 'first'"):
        kfac.step(x, y)
    dense = damped(layer_factors(model, [(x, y)], sample_loss, "first"), DAMPING)
    expected = torch.linalg.solve(dense, plain["first.weight"].flatten()).reshape(4, 4)
    assert relative_error(model.first.weight.grad, expected) < 1e-9
    for name in ("first.bias", "second.bias"):
        assert torch.equal(now(model)[name], plain[name])
    # With two biases the weight's block has no bias in it.
    joint = hk.optim.KFAC(model, sgd(model), CE, **settings)
    plain = backward(model, x, y)
    with pytest.warns(UserWarning, match="also called without its bias"):
        joint.step(x, y)
    assert joint.layers == ("out",)
    assert torch.equal(model.first.weight.grad, plain["first.weight"])


@pytest.mark.filterwarnings("ignore:left out")
def test_layers_without_a_gradient_are_passed_by() -> None:
    model = seeded(Routed())
    kfac = hk.optim.KFAC(model, sgd(model), CE)
    for x, y in routed_data():
        plain = backward(model, x, y)
        kfac.step(x, y)
        assert now(model).keys() == plain.keys()
    assert set(kfac.layers) == {"stem", "positive", "negative"}
    assert "never reached" in kfac.skipped["unused"]


def bad_batch(kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "targets":
        return x, y + 7
    x = x.clone()
    x[2, 1] = float(kind)
    return x, y


@pytest.mark.parametrize("kind", ["nan", "inf", "targets"])
def test_a_bad_batch_leaves_everything_as_it_was(kind: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x, y = randn(6, 4), classes(6, c=3)
    kfac = hk.optim.KFAC(model, sgd(model), CE)
    backward(model, x, y)
    kfac.step(x, y)
    before = kfac.state_dict()
    plain = backward(model, x, y)
    match = "targets" if kind == "targets" else "NaN or Inf in batch 1"
    with pytest.raises(ValueError, match=match):
        kfac.step(*bad_batch(kind, x, y))
    assert same(kfac.state_dict(), before)
    assert same(now(model), plain)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_modes_statistics_and_random_numbers_stay() -> None:
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)
    )
    x, y = randn(6, 4, dtype=torch.float32), classes(6, c=3)
    model[3].eval()
    kfac = hk.optim.KFAC(model, sgd(model), CE)
    backward(model, x, y)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    kfac.step(x, y)
    assert same(dict(model.named_buffers()), buffers)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_summed_gradients_and_steps_without_a_batch() -> None:
    model = seeded(nn.Linear(4, 3))
    batches = [(randn(5, 4, seed=i), classes(5, c=3, seed=i)) for i in range(3)]
    kfac = hk.optim.KFAC(
        model, sgd(model), CE, output="exact", damping=DAMPING, decay=0.5, kl_clip=None
    )
    with pytest.raises(ValueError, match="no samples"):
        kfac.step()
    for batch in batches:
        kfac.update(*batch)
    plain = backward(model, *batches[0])
    kfac.step()
    single = [layer_factors(model, [batch], sample_loss, "", joint=True) for batch in batches]
    mean = {
        key: (single[0][key] + 2 * single[1][key] + 4 * single[2][key]) / 7 for key in single[0]
    }
    expected = torch.linalg.solve(damped(mean, DAMPING), as_matrix(plain, "", True).flatten())
    assert relative_error(as_matrix(now(model), "", True).flatten(), expected) < 1e-9


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"damping": 0.0}, ValueError, "damping must be positive, got 0"),
        ({"damping": -1}, ValueError, "damping must be finite and >= 0, got -1"),
        ({"damping": "median"}, ValueError, "damping must be a number or 'mean', got 'median'"),
        ({"kl_clip": -1.0}, ValueError, "kl_clip must be positive and finite, got -1.0"),
        ({"decay": 1.0}, ValueError, r"decay must lie in \[0, 1\), got 1.0"),
        ({"decay": None}, TypeError, r"decay must be a number in \[0, 1\), got NoneType"),
        ({"inverse_every": 0}, ValueError, "inverse_every must be at least 1, got 0"),
        ({"factor_every": 1.5}, TypeError, "factor_every must be an integer, got float"),
        ({"output": "fisher"}, ValueError, "output must be"),
        ({"layers": "nowhere"}, ValueError, "no module named 'nowhere'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model = seeded(nn.Linear(4, 3))
    arguments = {"model": model, "optimizer": sgd(model), "loss": CE, **change}
    with pytest.raises(error, match=match):
        hk.optim.KFAC(**arguments)


def test_nothing_to_precondition() -> None:
    model = seeded(nn.Linear(4, 3))
    other = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="no layer of the model can be preconditioned: '' has"):
        hk.optim.KFAC(model, torch.optim.SGD([other], lr=0.1), CE)
