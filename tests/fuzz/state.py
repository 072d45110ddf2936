"""Whether a model, its data and torch's settings come back as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """The state of a model, a batch list and torch before a call."""

    def __init__(self, model: nn.Module, data: list[Any]) -> None:
        self._model, self._data = model, data
        self._before = self._state()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        for name, tensor in tensors:
            state[f"value of {name}"] = tensor.detach().clone()
            state[f"identity of {name}"] = (id(tensor), tensor.data_ptr())
            state[f"requires_grad of {name}"] = tensor.requires_grad
            state[f"grad of {name}"] = None if tensor.grad is None else tensor.grad.clone()
        for name, module in self._model.named_modules():
            state[f"mode of {name!r}"] = module.training
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                state[f"{kind} of {name!r}"] = list(getattr(module, kind))
            state[f"attributes of {name!r}"] = sorted(
                key for key in vars(module) if not key.startswith("_")
            )
            state[f"forward of {name!r}"] = id(vars(module).get("forward"))
        for i, element in enumerate(self._data):
            for j, tensor in enumerate(_tensors(element)):
                state[f"tensor {j} of batch {i}"] = tensor.clone()
                state[f"requires_grad of tensor {j} of batch {i}"] = tensor.requires_grad
        state["random state"] = torch.get_rng_state()
        state["fused attention"] = torch.backends.mha.get_fastpath_enabled()
        state["grad mode"] = torch.is_grad_enabled()
        state["default dtype"] = torch.get_default_dtype()
        return state

    def changes(self) -> list[str]:
        """What is not as it was."""
        after = self._state()
        keys = self._before.keys() | after.keys()
        return sorted(key for key in keys if not _same(self._before.get(key), after.get(key)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and bool(((a == b) | ((a != a) & (b != b))).all())
        )
    return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False
