"""Hessians above the memory budget: products by a new pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import hessians
from dense import relative_error
from networks import CASES, CE, classes, generator, randn, seeded
from pruned import check_pruned, heavy_tailed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk


@pytest.mark.parametrize("name", ["residual", "conv groups", "sequence", "pooling", "twice"])
@pytest.mark.parametrize("budget", [0, 700, 3000])
def test_recomputed_products_equal_cached_ones(name: str, budget: int) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    cached = hessians(model, data, CE, bias="joint")
    rerun = hessians(model, data, CE, bias="joint", memory_budget=budget)
    assert all(H.cached for H in cached.values())
    if budget == 0:
        assert not any(H.cached for H in rerun.values())
    for layer, H in cached.items():
        other = rerun[layer]
        assert other.pruning_error == 0.0
        assert relative_error(other.to_dense(), H.to_dense()) <= 1e-12
        block = randn(H.shape[0], 2, seed=1)
        assert relative_error(other @ block, H @ block) <= 1e-12
        assert relative_error(other.diagonal(), H.diagonal()) <= 1e-12
        assert other.trace() == pytest.approx(H.trace(), rel=1e-12)


def test_memory_budget_evicts_the_largest_layers_first() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    cached = hk.layer_hessians(model, data, CE)
    # Inputs and two root rows of every sample, in float64.
    needed = {name: 7 * 8 * (H.layer_shape[1] + 2 * H.layer_shape[0]) for name, H in cached.items()}
    budget = sum(needed.values()) - 1
    found = hk.layer_hessians(model, data, CE, memory_budget=budget)
    largest = max(needed, key=lambda name: needed[name])
    assert {name for name, H in found.items() if not H.cached} == {largest}


@pytest.mark.parametrize("name", ["residual", "conv groups", "sequence", "pooling"])
@pytest.mark.parametrize("budget", [0, 500, 2500])
def test_recomputing_with_pruning(name: str, budget: int) -> None:
    # A small budget also cuts a batch into pieces of few root rows, differently in both passes.
    case = CASES[name]
    model = case.model()
    data = heavy_tailed(case, seed=3)
    exact = hk.layer_hessians(model, data, CE)
    for tolerance in (1e-6, 0.05, 0.3):
        found = hk.layer_hessians(model, data, CE, tolerance=tolerance, memory_budget=budget)
        for layer, H in found.items():
            check_pruned(H, exact[layer].to_dense(), tolerance)
            block = randn(H.shape[0], 2, seed=1)
            assert relative_error(H @ block, H.to_dense() @ block) <= 1e-10
            assert H.trace() == pytest.approx(float(H.to_dense().trace()), rel=1e-10)


def test_recomputing_with_pruning_notices_another_order_of_the_data() -> None:
    case = CASES["relu"]
    model = case.model()
    x = randn(12, 4) * randn(12, 1, seed=1).exp()
    loader = DataLoader(
        TensorDataset(x, classes(12, c=3)), batch_size=4, shuffle=True, generator=generator(3)
    )
    found = hk.layer_hessians(model, loader, CE, tolerance=0.1, memory_budget=0)
    for H in found.values():
        with pytest.raises(RuntimeError, match="data must come in the same order"):
            _ = H @ torch.ones(H.shape[0]).double()
    # Without pruning the order does not matter.
    exact = hk.layer_hessians(model, [(x, loader.dataset.tensors[1])], CE)
    for layer, H in hk.layer_hessians(model, loader, CE, memory_budget=0).items():
        assert relative_error(H.to_dense(), exact[layer].to_dense()) <= 1e-12


def test_recomputing_with_pruning_notices_fewer_or_more_batches() -> None:
    case = CASES["relu"]
    model, data = case.model(), list(case.data())
    found = hk.layer_hessians(model, data, CE, tolerance=0.1, memory_budget=0)["0"]
    data.append(data[0])
    with pytest.raises(RuntimeError, match="same order"):
        found.to_dense()
    del data[1:]
    with pytest.raises(RuntimeError, match="same order"):
        found.trace()


def test_generator_with_too_small_a_budget() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    with pytest.raises(ValueError, match=r"memory_budget of 100 bytes is too small for layer '.'"):
        hk.layer_hessians(model, iter(data), CE, memory_budget=100)
    with pytest.raises(ValueError, match="memory_budget"):
        hk.layer_hessians(model, iter(data), CE, memory_budget=100, tolerance=0.5)


def test_cached_layers_outlive_the_model_recomputed_ones_notice_its_change() -> None:
    case = CASES["residual conv"]
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "step in place": lambda m: m.conv1.weight.detach().add_(0.1),
        "load_state_dict": lambda m: m.load_state_dict(dict(m.state_dict())),
        "new parameter": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
        "new data": lambda m: setattr(m.fc.weight, "data", m.fc.weight.detach() * 2),
        "running statistics": lambda m: m.train()(case.inputs(4)),
        "dtype": lambda m: m.float(),
    }
    for change in changes.values():
        model, data = case.model(), case.data()
        cached = hk.layer_hessians(model, data, CE)
        rerun = hk.layer_hessians(model, data, CE, memory_budget=0)
        before = {layer: H.to_dense() for layer, H in cached.items()}
        change(model)
        for layer, H in rerun.items():
            with pytest.raises(RuntimeError, match=f"the model changed .* layer '{layer}'"):
                _ = H @ torch.ones(H.shape[0]).double()
            assert torch.equal(cached[layer].to_dense(), before[layer])


class _Stops(nn.Module):
    """Raises in its n-th forward pass from now on."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.error = error
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        h = F.relu(self.a(x))
        if self.left < 0:
            raise self.error("stopped")
        return self.b(h)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("grad", [True, False])
def test_error_while_recomputing_leaves_the_model_and_gradient_mode_alone(
    error: type[BaseException], grad: bool
) -> None:
    model = seeded(_Stops(error)).train()
    data = CASES["relu"].data()
    found = hk.layer_hessians(model, data, CE, memory_budget=0)
    for method in (lambda H: H @ torch.ones(H.shape[0]).double(), lambda H: H.trace()):
        for H in found.values():
            model.left = 1
            with torch.set_grad_enabled(grad):
                with pytest.raises(error, match="stopped") as caught:
                    method(H)
                # Also while the traceback still holds the frames.
                assert caught.value is not None
                assert torch.is_grad_enabled() == grad
                assert model.training
                assert all(p.requires_grad for p in model.parameters())
                assert not model.a._forward_hooks
            model.left = 10**9


def test_error_between_recomputed_pieces_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The product itself fails after the first piece: the pass over the model must end as well.
    case = CASES["relu"]
    model = case.model().train()
    H = hk.layer_hessians(model, case.data(), CE, memory_budget=0)["0"]

    def fail(*args: Any) -> Tensor:
        raise MemoryError("full")

    monkeypatch.setattr(hk.ops, "layer_hessian_matmul", fail)
    with torch.no_grad():
        with pytest.raises(MemoryError) as caught:
            _ = H @ torch.ones(H.shape[0]).double()
        assert caught.traceback is not None
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model[0]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())
