"""Input covariances of native models of transformers, padded and not, against their factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import relative_error
from torch import Tensor
from transformer_models import NATIVE, lora, text

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out:UserWarning")


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with padding on the right of its first sample and on the left of its second."""
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -2:] = 0
    mask[1, :1] = 0
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_every_layer_equals_its_factor(name: str, pad: bool) -> None:
    native = NATIVE[name]
    model, batch = native.model(), native.batch(2)
    if pad and "input_ids" not in batch:
        pytest.skip("images are not padded")
    batch = padded(batch) if pad else batch
    factors = hk.kronecker_factors(model, [batch], native.loss, output="empirical")
    found = hk.input_covariances(model, [batch])
    left = [layer for layer in factors if layer not in found]
    # The router, and experts whose weights are slices of one parameter, are no modules of torch's.
    assert name == "mixtral" or not left
    assert all(any(layer.startswith(module) for module in found.skipped) for layer in left)
    assert len(found) >= 5
    for layer in found:
        if layer in factors:
            expected = factors[layer]
            assert relative_error(found[layer].input_covariance, expected.input_covariance) < 1e-10
            assert found[layer].positions == pytest.approx(expected.positions, rel=1e-12)


def test_adapters_and_their_base() -> None:
    model, batch = lora(), text()
    factors = hk.kronecker_factors(model, [batch], hk.CausalLM(), output="empirical")
    found = hk.input_covariances(model, [batch])
    assert any("lora_A" in name for name in found)
    assert any("base_layer" in name for name in found)
    for name in factors.keys() & found.keys():
        ours, theirs = found[name].input_covariance, factors[name].input_covariance
        assert relative_error(ours, theirs) <= 1e-5


def test_no_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = NATIVE["gpt2"].model(), text()
    kept: list[Any] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: kept.append(kwargs), with_kwargs=True)
    hk.input_covariances(model, [batch])
    assert "labels" in batch
    assert all("labels" not in kwargs for kwargs in kept)
