"""What every layer is given in a forward pass, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hesskern.passes.batches import Batch
from hesskern.passes.forward_pass import (
    check_repeatable,
    frozen_eval,
    model_device,
    random_state,
)
from hesskern.passes.layers import LayerSpec, calls_itself, weight_of
from hesskern.passes.weight_watch import WeightWatch

__all__ = ["Call", "InputCapture"]

Take = Callable[[LayerSpec, Tensor], Any]
Taker = Callable[[], Take]


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        x: the layer's input [..., d], or [B, C, (H,) W] as padded; the model's own tensor, no copy.
        taken: what was made of ``x`` as the layer was called.
        version: of ``x`` then.
    """

    x: Tensor
    taken: Any
    version: int


Calls = dict[str, list[Call]]


class InputCapture:
    """The inputs of a model's layers, by forward hooks, for the time of a ``with`` block.

    Inside, the model is in eval mode and runs without gradients, as the function that it is for
    :class:`hesskern.passes.capture.Capture`. Hooks see the input of a module whose forward() is
    that of Linear, Conv1d or Conv2d, or of the Conv1D of transformers. That nothing else reads the
    weight is checked on the first batch, and on each in which a layer is called for the first time.

    Args:
        model: any module.
        specs: the layers, by name.

    Attributes:
        unfit: layers whose inputs hooks cannot show, with the reason; they are left out for good.
        called: layers that were called in some batch.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
        self._model, self._device = model, model_device(model)
        self._modules = dict(model.named_modules())
        self._specs = dict(specs)
        self.unfit: dict[str, str] = {}
        self.called: set[str] = set()
        self._copy = self._drew = False
        self._take: Take | None = None
        self._found: Calls = {}
        for name in specs:
            reason = self._unseen(name)
            if reason is not None:
                self.unfit[name] = reason

    def _unseen(self, name: str) -> str | None:
        """Why hooks do not show what a layer's weight is multiplied with."""
        module, attribute = weight_of(self._modules, name)
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return "is scripted: no hook sees its input"
        if isinstance(module, nn.MultiheadAttention):
            return f"is multiplied inside {kind}.forward(), where no hook sees its input"
        if attribute == "weight" and (calls_itself(module) or _is_conv1d(module)):
            return None
        return (
            f"belongs to a {kind} with a forward() of its own, which hooks do not show the "
            "products of"
        )

    def __enter__(self) -> InputCapture:
        self._open = ExitStack()
        self._open.enter_context(frozen_eval(self._model))
        self._autocast = torch.is_autocast_enabled(self._device.type)
        self._narrow = torch.get_autocast_dtype(self._device.type)
        self._open.enter_context(torch.autocast(self._device.type, enabled=False))
        self._open.enter_context(torch.no_grad())
        for name in self._specs:
            if name not in self.unfit:
                module, _ = weight_of(self._modules, name)
                handle = module.register_forward_hook(
                    self._hook(name), prepend=True, with_kwargs=True
                )
                self._open.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._found = {}
        self._open.__exit__(*error)

    def _hook(self, name: str) -> Any:
        spec = self._specs[name]

        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor) or name in self.unfit:
                return
            # Inside the model there may be autocast, and gradients.
            with torch.autocast(self._device.type, enabled=False), torch.no_grad():
                x = _as_rows(spec, module, x.detach())
                if self._copy:
                    x = x.clone()
                taken = None if self._take is None else self._take(spec, x)
            self._found.setdefault(name, []).append(Call(x, taken, x._version))

        return hook

    def run(self, batch: Batch, taker: Taker | None = None) -> Calls:
        """The calls of every layer that was called.

        Nobody else may hold them when the model runs again.

        Args:
            batch: of which the model gets the inputs.
            taker: called before each run of the model, which may have to be repeated; gives what
                takes of a layer's input what is wanted, as long as it is in the processor's caches.

        Raises:
            ValueError: the model's values are random, or it overwrites its own inputs.
        """
        found = self._checked(batch, taker)
        if self._drew:
            check_repeatable(_all(found), lambda: _all(self._stable(batch)), batch.index)
        self.called.update(found)
        return {name: found[name] for name in self._specs if name in found}

    def alone(self, batch: Batch) -> Calls:
        """:meth:`run` on a part of a batch that was run before."""
        return self._stable(batch)

    def _checked(self, batch: Batch, taker: Taker | None) -> Calls:
        if self.called:
            found = self._stable(batch, taker)
            if self.called.issuperset(found):
                return found
        watch = WeightWatch(self._modules, self._specs)
        found = self._stable(batch, taker, watch)
        for name, operation in watch.elsewhere.items():
            # What no hook sees is unfit already, for the better reason, unless it is a module.
            self.unfit.setdefault(
                name,
                f"has a weight that {operation} reads outside its module's own forward(), where no "
                "hook sees the input",
            )
        return {name: calls for name, calls in found.items() if name not in self.unfit}

    def _stable(
        self, batch: Batch, taker: Taker | None = None, watch: WeightWatch | None = None
    ) -> Calls:
        """Calls whose inputs nothing has overwritten since."""
        versions = _versions(batch.inputs)
        found = self._once(batch.inputs, taker, watch)
        if all(call.x._version == call.version for calls in found.values() for call in calls):
            return found
        if _versions(batch.inputs) != versions:
            raise ValueError(
                "model must not overwrite its own inputs in place after a layer has read them; "
                "let its forward() work on a copy"
            )
        # From now on, for what one batch overwrites the next one does as well.
        self._copy = True
        del found
        return self._once(batch.inputs, taker, watch)

    def _once(self, inputs: Any, taker: Taker | None, watch: WeightWatch | None) -> Calls:
        self._found, self._take = {}, None if taker is None else taker()
        before = random_state(self._device)
        watched: AbstractContextManager[Any] = nullcontext() if watch is None else watch
        with (
            torch.autocast(self._device.type, self._narrow, enabled=self._autocast),
            parametrize.cached(),
            watched,
        ):
            if isinstance(inputs, Mapping):
                self._model(**inputs)
            elif isinstance(inputs, (tuple, list)):
                self._model(*inputs)
            else:
                self._model(inputs)
        self._drew = random_state(self._device) != before
        found, self._found, self._take = self._found, {}, None
        return found


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers that keeps its weight as [d, m]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _as_rows(spec: LayerSpec, module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer's input with its rows last, an image padded as the specification lacks it."""
    if spec.kind == "linear":
        return x if x.dim() > 1 else x.unsqueeze(0)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if x.dim() == len(spec.kernel_size) + 1:
        x = x.unsqueeze(0)
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    if isinstance(module.padding, str):
        return F.pad(x, module._reversed_padding_repeated_twice)
    return x


def _all(found: Calls) -> list[Tensor]:
    return [call.x for calls in found.values() for call in calls]


def _versions(inputs: Any) -> list[int]:
    """Version counters of the tensors in a batch's inputs."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            for item in value.values():
                yield from tensors(item)
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from tensors(item)

    return [tensor._version for tensor in tensors(inputs)]
