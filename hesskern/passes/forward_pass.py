"""The user's function as it is: what freezing, eval mode or recomputation would switch is held."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from hesskern.graph.cuts import counting_is_paused, uncounted

__all__ = [
    "check_repeatable",
    "checked_outputs",
    "frozen_eval",
    "grad_fn_of",
    "model_device",
    "noted_hooks",
    "random_state",
    "refuse_sharded",
    "run_model",
]

# Bytes of the largest block that the C library learns from, but for its own few.
_LARGEST_BLOCK = 2**25 - 2**16

# Relative to the largest output, what two runs of one batch may differ by through rounding alone.
_REPEATED = {torch.float64: 1e-10, torch.float32: 1e-5}
_REPEATED_NARROW = 1e-2
_REPEATS = 16


def _keep_what_is_freed() -> None:
    """Has the C library keep what a model frees for its next run.

    The one of GNU gives the end of its heap back to the system where more than twice as much is
    free there as its largest block so far, which counts up to 32 MiB, and then asks for it again,
    page by page, in every batch. A block of that size, of which no page is touched, does what the
    first large tensor of a process would, and for as long. Others have no such rule.
    """
    np.empty(_LARGEST_BLOCK, dtype=np.uint8)


@contextmanager
def frozen_eval(model: nn.Module, trainable: Iterable[Tensor] = ()) -> Iterator[None]:
    """Eval mode, with all parameters frozen but some; modes and flags come back, also after errors.

    Inside, the model computes the function that it computes in eval mode with gradients: torch's
    fused attention, which is another function where positions are padded, is switched off,
    recurrent layers on a GPU go without cuDNN, whose own have no derivatives in eval mode, and
    re-entrant checkpoints, which cut the graph where their inputs are frozen, simply run. From the
    first time on, the C library keeps more of what is freed.

    Args:
        model: any module.
        trainable: the leaf parameters that require gradients inside.

    Raises:
        ValueError: the model was made under ``torch.inference_mode()``, or is on the meta device.
        NotImplementedError: its parameters are shards.
    """
    modules = list(model.modules())
    parameters = _each_once(module._parameters for module in modules)
    tensors = (*parameters, *_each_once(module._buffers for module in modules))
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            "model must not be made under torch.inference_mode(): autograd cannot run through it"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("model must hold values, but it has tensors on the meta device")
    refuse_sharded(model, parameters)
    _keep_what_is_freed()
    modes = [(module, module.training) for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        if any(training for _, training in modes):
            model.eval()
        chosen = list(trainable)
        kept = {id(parameter) for parameter in chosen}
        for parameter, flag in flags:
            if flag and id(parameter) not in kept:
                parameter.requires_grad_(False)
        for weight in chosen:
            if not weight.requires_grad:
                weight.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(False)
        # Compiled models run eagerly: hooks and double backward need the plain graph.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            _plain_checkpoints(),
            _plain_recurrences(modules),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _each_once(held: Iterable[Mapping[str, Tensor | None]]) -> list[Tensor]:
    """The tensors that modules hold, by name."""
    return list({id(t): t for own in held for t in own.values() if t is not None}.values())


@contextmanager
def _plain_recurrences(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Models with recurrent layers run without cuDNN."""
    if not any(isinstance(module, nn.RNNBase) for module in modules):
        yield
        return
    # Not cudnn.flags(), which asks for and sets precisions that need not be of one word.
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A class with another attribute, for the time of the block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            # It was inherited.
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Re-entrant checkpoints of this thread call their function and keep its graph."""
    inherited: Any = CheckpointFunction.apply
    thread = threading.get_ident()

    def apply(function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        if threading.get_ident() != thread:
            return inherited(function, preserve_rng_state, *args)
        return function(*args)

    with _replaced(CheckpointFunction, "apply", staticmethod(apply)):
        yield


@contextmanager
def noted_hooks(note: Callable[[], None]) -> Iterator[None]:
    """Calls ``note`` whenever this thread puts a hook on a gradient, or may do so.

    Such a hook changes gradients behind the graph's back and leaves no trace in it. Whoever puts
    one there asks a tensor for its node, as ``Tensor.register_hook`` does itself.
    """
    thread = threading.get_ident()

    def grad_fn(self: Tensor) -> Any:
        if threading.get_ident() == thread and not counting_is_paused():
            note()
        return grad_fn_of(self)

    with _replaced(Tensor, "grad_fn", property(grad_fn)):
        yield


def grad_fn_of(tensor: Tensor) -> Any:
    """The tensor's node, asked for by this package itself."""
    descriptor: Any = torch._C.TensorBase.grad_fn
    with uncounted():
        return descriptor.__get__(tensor)


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; CPU if it has none."""
    # One after the other: the first is there at once, all of them take long in a large model.
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def refuse_sharded(model: Any, parameters: Iterable[Tensor] | None = None) -> None:
    """Raises NotImplementedError where a parameter is a shard, which other processes complete.

    Args:
        model: whose parameters are looked at.
        parameters: all of them, where they are known; they are named where one is a shard.
    """
    if not isinstance(model, nn.Module):
        return
    if parameters is not None and not any(hasattr(p, "device_mesh") for p in parameters):
        return
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise NotImplementedError(
                f"model: parameter {name!r} is a DTensor, a shard of the whole; with group= models "
                "of fully_shard are taken, and their parameters are whole on every rank while a "
                "pass lasts"
            )


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs [N, ...] for a tensor, a tuple or list of arguments, or a dict of them.

    Raises:
        TypeError: the model returns neither a tensor nor something with ``logits``.
    """
    if isinstance(inputs, Mapping):
        return checked_outputs(model(**inputs))
    if isinstance(inputs, (tuple, list)):
        return checked_outputs(model(*inputs))
    return checked_outputs(model(inputs))


def checked_outputs(outputs: Any) -> Tensor:
    """The outputs [N, ...] in what a model has returned: a tensor, or something with ``logits``.

    Raises:
        TypeError: it is neither, or the tensor is no dense one of floating-point numbers.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    elif hasattr(outputs, "logits"):
        outputs = outputs.logits
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model must return a tensor (or an object with .logits), got {type(outputs).__name__}"
        )
    if not outputs.is_floating_point():
        raise TypeError(f"model must return a floating-point tensor, got {outputs.dtype}")
    if outputs.layout != torch.strided:
        raise TypeError(f"model must return a dense tensor, got one of layout {outputs.layout}")
    if outputs.dim() == 0:
        raise ValueError("model must return outputs per sample [N, ...], got a scalar")
    return outputs


def random_state(device: torch.device) -> tuple[bytes, ...]:
    """State of torch's global generators that a model on this device draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    # States lie on the host; as bytes they are compared without an operation on tensors.
    return tuple(ctypes.string_at(state.data_ptr(), state.nbytes) for state in states)


def check_repeatable(first: list[Tensor], again: Callable[[], list[Tensor]], batch: int) -> None:
    """Refuses a model that has drawn random numbers and whose values are random.

    Args:
        first: outputs, and whatever else must not change.
        again: runs the model on the same inputs once more; the same tensors.
        batch: index of the batch, for the message.

    Raises:
        ValueError: the same inputs give other values.
    """
    # Small masks are often drawn alike.
    for _ in range(_REPEATS):
        repeated = again()
        if len(repeated) != len(first) or not all(map(_same, repeated, first)):
            raise ValueError(
                "model must give the same outputs for the same inputs, but it draws random "
                f"numbers in eval mode and two runs of batch {batch} differ (functional dropout "
                "without training=self.training? noise added in forward()?)"
            )


def _same(again: Tensor, first: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding."""
    if again.shape != first.shape or not first.numel():
        return again.shape == first.shape
    limit = _REPEATED.get(first.dtype, _REPEATED_NARROW) * float(first.abs().max())
    return not float((again - first).abs().max()) > limit
