"""What every layer is given in a forward pass, without a graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
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

__all__ = ["InputCapture"]

_AS_IT_IS: AbstractContextManager[None] = nullcontext()

Take = Callable[[LayerSpec, Tensor, Hashable], Any]
Taker = Callable[[], Take]
Calls = dict[str, list[Any]]


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
        self._drew = self._overwrote = False
        self._found: Calls = {}
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._next = 0
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
            given = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(given, Tensor) or name in self.unfit:
                return
            if torch._C._are_functorch_transforms_active():
                # A tensor there stands for several, and outlives its level no better than they do.
                self.unfit[name] = (
                    "is called inside a transform of torch.func (vmap, grad, jvp), where hooks do "
                    "not see its inputs sample by sample"
                )
                return
            # Inside the model there may be autocast, gradients, and inference mode, whose tensors
            # could not be added to outside it.
            with (
                self._unwatched(),
                _without_inference(),
                torch.no_grad(),
                self._without_autocast(),
            ):
                x = _as_rows(spec, module, given.detach())
                taken = self._take(spec, x, (self._number(given), _padding(module)))
            self._found.setdefault(name, []).append(taken)

        return hook

    def _without_autocast(self) -> AbstractContextManager[Any]:
        if not torch.is_autocast_enabled(self._device.type):
            return _AS_IT_IS
        return torch.autocast(self._device.type, enabled=False)

    def _number(self, given: Tensor) -> Hashable:
        """The same for two calls of one run only if they were given the same tensor, unchanged."""
        if given.is_inference():
            # Whether it changed in between cannot be told.
            self._next += 1
            return self._next
        number, seen = self._numbers.get(id(given), (0, None))
        if seen is None or seen() is not given:
            # Whatever had this address before exists no more.
            number = self._next = self._next + 1
            self._numbers[id(given)] = number, weakref.ref(given)
        return number, given._version

    def run(self, batch: Batch, taker: Taker) -> Calls:
        """What was taken in every call of every layer that was called.

        Args:
            batch: of which the model gets the inputs.
            taker: called before each run of the model, which may have to be repeated; gives what
                takes of a layer's input [..., d], or [B, C, (H,) W] as padded, what is wanted of
                it. The input is the model's own, which may overwrite it later. The third argument
                is the same for two calls only if their inputs are one tensor.

        Raises:
            ValueError: the model's values are random.
        """
        self._overwrote = False
        found = self._checked(batch, taker)
        if self._drew:
            check_repeatable(
                _all(self.copies(batch)), lambda: _all(self.copies(batch)), batch.index
            )
        self.called.update(found)
        return {name: found[name] for name in self._specs if name in found}

    def again(self, batch: Batch, taker: Taker) -> Calls:
        """:meth:`run` once more, of the batch that ran last, without its checks.

        Raises:
            ValueError: the model has overwritten the batch.
        """
        return self._once(batch.inputs, taker)

    def copies(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Copies of every called layer's inputs, one per call."""
        return self._once(batch.inputs, lambda: lambda spec, x, number: x.clone())

    def _checked(self, batch: Batch, taker: Taker) -> Calls:
        if self.called:
            found = self._once(batch.inputs, taker)
            if self.called.issuperset(found):
                return found
            del found
        watch = WeightWatch(self._modules, self._specs)
        found = self._once(batch.inputs, taker, watch)
        for name, operation in watch.elsewhere.items():
            # What no hook sees is unfit already, for the better reason, unless it is a module.
            self.unfit.setdefault(
                name,
                f"has a weight that {operation} reads outside its module's own forward(), where no "
                "hook sees the input",
            )
        return {name: calls for name, calls in found.items() if name not in self.unfit}

    def _once(self, inputs: Any, taker: Taker, watch: WeightWatch | None = None) -> Calls:
        if self._overwrote:
            raise ValueError(
                "model must not overwrite its own inputs in place: they are needed once more, to "
                "check what its layers are given; let its forward() work on a copy"
            )
        versions = _versions(inputs)
        self._found, self._numbers, self._next, self._take = {}, {}, 0, taker()
        self._unwatched = nullcontext if watch is None else watch.paused
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
        self._overwrote = _versions(inputs) != versions
        found, self._found = self._found, {}
        # A layer may turn out unfit behind its first call.
        return {name: calls for name, calls in found.items() if name not in self.unfit}


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


def _padding(module: nn.Module) -> Hashable:
    """What :func:`_as_rows` puts around an image, beyond what the specification has."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return None
    return module.padding_mode, tuple(module._reversed_padding_repeated_twice)


def _without_inference() -> AbstractContextManager[Any]:
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS


def _versions(inputs: Any) -> list[int]:
    """Version counters of the tensors in a batch's inputs; those of inference_mode have none."""
    if isinstance(inputs, Tensor):
        return [] if inputs.is_inference() else [inputs._version]
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        return []
    return [version for value in inputs for version in _versions(value)]


def _all(found: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return [x for calls in found.values() for x in calls]
