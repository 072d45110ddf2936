"""EKFAC of native transformers against a loop over samples: tied heads, Conv1D, routed experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_loop import NARROW_NORMS, PLACES, SAMPLES, SEED, Loop, close, with_experts_apart
from torch import Tensor
from transformer_models import NATIVE

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")


def expected(found: Any, products: list[Tensor], weight: float) -> Tensor:
    """[m, d] mean of squares of the products' coefficients in the operator's eigenvectors."""
    left, right, _ = found.eigenbases
    assert len(left) == 1
    turned = [left[0].T @ R @ right[0] for R in products]
    return torch.stack(turned).square().sum(0) / weight


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "vit", "t5"])
def test_every_layer_of_native_models(name: str, output: Any) -> None:
    case = NATIVE[name]
    model = case.model()
    data = [case.batch(2), case.batch(3, seed=1)]
    loop = Loop(with_experts_apart(model), PLACES.get(name, "same"), output)
    for batch in data:
        loop.add(batch)
    E = hk.ekfac(model, data, case.loss, output=output, mc_samples=SAMPLES, seed=SEED)
    assert E.num_samples == pytest.approx(loop.weight)
    assert loop.layers.keys() - set(E) == set()
    for layer in loop.layers:
        found = E[layer]
        assert found.transposed == E.specs[layer].transposed
        values = expected(found, loop.products[layer], loop.weight)
        close(found.values, values, NARROW_NORMS.get(name, 1e-10), layer)
    if name == "gpt2":
        assert E["transformer.h.0.attn.c_attn"].transposed


@pytest.mark.parametrize("output", ["mc", "empirical"])
def test_the_mean_over_all_tokens_weights_samples(output: Any) -> None:
    case = NATIVE["gpt2"]
    model = case.model()
    data = [case.batch(2), case.batch(3, seed=1)]
    loop = Loop(model, "next", output, by_token=True)
    for batch in data:
        loop.add(batch)
    loss = hk.CausalLM(reduction="token")
    E = hk.ekfac(model, data, loss, output=output, mc_samples=SAMPLES, seed=SEED)
    assert E.num_samples == pytest.approx(loop.weight)
    for layer in loop.layers:
        close(E[layer].values, expected(E[layer], loop.products[layer], loop.weight), 1e-10, layer)
