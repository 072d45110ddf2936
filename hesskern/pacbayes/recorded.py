"""Steps whose launches are recorded once and then repeated as a whole: CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorded"]

# Calls before a recording: what is made at first use (moments of an optimizer, workspaces of
# libraries) is then there.
_PLAIN_CALLS = 3


@dataclass
class _Recording:
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor


class Recorded:
    """Calls a function of tensors that is the same at every call, by a graph where that can be.

    A function may be recorded if it launches the same operations at every call, on the same memory
    but for its inputs, and never looks at a value. What it draws comes from ``generator``.

    Args:
        device: where it runs; anything but a CUDA device calls it as it is.
        generator: of its random numbers, on the device.
    """

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._device, self._generator = device, generator
        self._usable = device.type == "cuda"
        # One: libraries keep workspaces for every stream.
        self._stream: Any = torch.cuda.Stream(device) if self._usable else None
        self._plain_calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    def forget(self) -> None:
        """What was recorded no longer holds: the function works on other memory from now on."""
        self._plain_calls, self._recordings = {}, {}

    def __call__(
        self, key: Hashable, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """``function(*inputs)``.

        Args:
            key: which of several functions it is; one key's inputs keep their shapes.
            function: of the inputs, to one tensor.
            inputs: on the device.
        """
        if not self._usable:
            return function(*inputs)
        recording = self._recordings.get(key)
        if recording is None:
            calls = self._plain_calls[key] = self._plain_calls.get(key, 0) + 1
            if calls <= _PLAIN_CALLS:
                return self._beside(function, inputs)
            recording = self._record(function, inputs)
            if recording is None:
                return function(*inputs)
            self._recordings[key] = recording
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.result.clone()

    def _beside(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """On the stream of the recordings: memory is kept by stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function(*inputs)
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def _record(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> _Recording | None:
        """The recording, which runs nothing; None where the function cannot be recorded."""
        own = tuple(tensor.clone() for tensor in inputs)
        drawn = self._generator.clone_state()
        current = torch.cuda.current_stream(self._device)
        try:
            # A recording that fails leaves its stream as the current one.
            with torch.cuda.device(self._device), torch.cuda.stream(current):
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self._generator)
                with torch.cuda.graph(graph, stream=self._stream):
                    result = function(*own)
        except (RuntimeError, AttributeError) as error:
            torch.cuda.synchronize(self._device)
            self._generator.graphsafe_set_state(drawn)
            self._usable = False
            self.forget()
            warnings.warn(
                f"steps cannot be recorded as a CUDA graph ({error}); they take longer one by one",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return _Recording(graph, own, result)
