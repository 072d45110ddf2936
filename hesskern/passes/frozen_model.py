"""A model as one fixed function, for the time of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hesskern.passes.forward_pass import (
    frozen_eval,
    model_device,
    noted_hooks,
    random_state,
    run_model,
)
from hesskern.passes.layers import LayerSpec, bias_of, own_parameters, weight_of

__all__ = ["FrozenModel"]


class FrozenModel:
    """A model inside a ``with`` block: in eval mode, frozen but for the weights of some layers.

    The caller's autocast reaches the model alone: sums are never taken in its narrow dtype.

    Args:
        model: any module.
        specs: the layers, by name.
        call: gives the outputs [N, ...] for the model and the inputs of a batch.
        beside: more leaf parameters that require gradients inside.

    Attributes:
        modules: the model's, by name.
        weights: by layer, where it is a parameter; those computed from others are missing.
        biases: by layer, where the bias is one more input.
        autocast: whether the model runs under it.
        hooked: whether a run has put hooks on gradients.
        drew: whether the last run has drawn random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: dict[str, LayerSpec],
        call: Callable[[nn.Module, Any], Tensor] = run_model,
        beside: Iterable[Tensor] = (),
    ) -> None:
        self._model, self._device, self._call = model, model_device(model), call
        self.modules = dict(model.named_modules())
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.hooked = self.drew = False
        self._trainable: list[Tensor] = list(beside)
        for name, spec in specs.items():
            module, attribute = weight_of(self.modules, name)
            weight = own_parameters(module).get(attribute)
            if weight is not None:
                self.weights[name] = weight
                self._trainable.append(weight)
            else:
                # Computed from others: a norm and a direction, a mask and a weight.
                self._trainable += [p for p in module.parameters() if p.is_floating_point()]
            bias = bias_of(self.modules, spec) if spec.joint else None
            if bias is not None:
                self.biases[name] = bias
                self._trainable.append(bias)

    def __enter__(self) -> FrozenModel:
        kind = self._device.type
        self._state = ExitStack()
        self._state.enter_context(frozen_eval(self._model, self._trainable))
        self.autocast = torch.is_autocast_enabled(kind)
        self._narrow = torch.get_autocast_dtype(kind)
        self._state.enter_context(torch.autocast(kind, enabled=False))
        return self

    def __exit__(self, *error: Any) -> None:
        self._state.__exit__(*error)

    def run(self, inputs: Any, watched: AbstractContextManager[Any] | None = None) -> Tensor:
        """Outputs [N, ...].

        Args:
            inputs: of a batch.
            watched: around the model's own code, if anything.
        """
        before = random_state(self._device)
        with (
            torch.autocast(self._device.type, self._narrow) if self.autocast else nullcontext(),
            parametrize.cached(),
            noted_hooks(self._note_hook),
            nullcontext() if watched is None else watched,
        ):
            outputs = self._call(self._model, inputs)
        self.drew = random_state(self._device) != before
        return outputs

    def _note_hook(self) -> None:
        self.hooked = True
