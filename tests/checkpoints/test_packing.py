"""States as files hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hesskern.checkpoints.packing import packed, unpacked

VIEWS: dict[str, Tensor] = {
    "plain": torch.arange(24.0).view(2, 3, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(24.0).view(2, 3, 4).transpose(1, 2),
    "with gaps": torch.arange(24.0).view(4, 6)[:, 1:4],
    "expanded": torch.arange(3.0)[:, None].expand(3, 5),
    "one column": torch.arange(24.0).view(4, 6)[:, 3:4],
    "later": torch.arange(24.0)[5:9],
    "boolean": torch.tensor([True, False, True])[1:],
    "bfloat16": torch.arange(6.0).bfloat16().view(2, 3).T,
}


@pytest.mark.parametrize("view", VIEWS)
def test_values_and_layout(view: str) -> None:
    tensor = VIEWS[view]
    tensors, plain = packed({"a": tensor})
    # A file holds what is contiguous.
    kept = {name: value.contiguous() for name, value in tensors.items()}
    found = unpacked(kept, plain)["a"]
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    if tensor.numel():
        assert found.stride() == tensor.stride()
        assert found.data_ptr() % 64 == tensor.data_ptr() % 64


def test_an_expanded_tensor_is_held_once() -> None:
    tensors, _ = packed([torch.zeros(1).expand(1000)])
    assert [tensor.numel() for tensor in tensors.values()] == [1]


def test_a_tensor_in_two_places_stays_one() -> None:
    shared = torch.arange(3.0)
    tensors, plain = packed({"a": [shared, shared.clone()], "b": {"c": shared}})
    assert len(tensors) == 2
    found = unpacked(tensors, plain)
    assert found["a"][0] is found["b"]["c"]
    assert found["a"][1] is not found["b"]["c"]


def test_plain_values() -> None:
    state: dict[str, Any] = {
        "none": None,
        "numbers": [1, 0.1, -0.0, float("inf"), 2**70, True],
        "tensor": {"tensor": "a name", "items": {}, "layout": [1]},
        "empty": [{}, []],
    }
    tensors, plain = packed(state)
    assert tensors == {}
    assert unpacked(tensors, plain) == state
