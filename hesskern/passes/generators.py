"""The generators that an iteration over data may draw from: their states, and how to go back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesskern.digests import digest

__all__ = ["generator_states", "generators_digest", "global_generators", "go_back"]

# Where a DataLoader keeps a generator of its own.
_OWN = ("", "sampler", "batch_sampler", "batch_sampler.sampler")


def generator_states(data: Iterable[Any], device: torch.device) -> dict[str, Any]:
    """States of torch's, Python's and numpy's global generators and of a loader's own ones.

    Workers of a DataLoader are seeded from the first of them.

    Args:
        data: that is about to be iterated.
        device: of the model.
    """
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": _lists(random.getstate()),
        "own": [generator.get_state() for generator in _own(data)],
    }
    kind, key, *rest = np.random.get_state()
    if kind == "MT19937":
        found["numpy"] = [torch.from_numpy(np.asarray(key).astype(np.int64)), *rest]
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def global_generators() -> tuple[Tensor, bytes, bytes]:
    """The states of torch's, Python's and numpy's global generators, to be compared quickly."""
    python, numpy = pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())
    return torch.get_rng_state(), python, numpy


def generators_digest(data: Iterable[Any], device: torch.device) -> str:
    """Of what :func:`generator_states` gives."""
    own = [generator.get_state() for generator in _own(data)]
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return digest([global_generators(), own, cuda])


def go_back(states: Mapping[str, Any], data: Iterable[Any], device: torch.device) -> str | None:
    """Sets them all; gives what does not fit, where the data have other generators of their own."""
    own = _own(data)
    if len(own) != len(states["own"]):
        return f"a loader with {len(states['own'])} generators of its own, this one has {len(own)}"
    torch.set_rng_state(states["torch"])
    random.setstate(_tuples(states["python"]))
    if "numpy" in states:
        key, *rest = states["numpy"]
        np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    for generator, state in zip(own, states["own"], strict=True):
        generator.set_state(state)
    return None


def _own(data: Iterable[Any]) -> list[torch.Generator]:
    """A loader's generators, each once."""
    found: dict[int, torch.Generator] = {}
    for path in _OWN:
        holder: Any = data
        for name in filter(None, path.split(".")):
            holder = getattr(holder, name, None)
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
