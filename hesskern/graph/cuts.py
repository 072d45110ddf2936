"""Values that a forward pass takes out of the graph although they depend on its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

__all__ = ["Cuts", "counting_is_paused", "uncounted"]

# Of what they are given they take the shape, dtype or device alone.
_SHAPE_ALONE = frozenset(
    (
        "empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros"
        " ones_like rand_like randint_like randn_like type_as zeros_like __len__ __repr__"
        " __format__ size stride dim numel element_size requires_grad_ retain_grad"
    ).split()
)
# Constant between their steps.
_STEPS = frozenset("ceil floor round sign sgn trunc heaviside sign_ floor_ round_ ceil_".split())
# Functions made of several operations that take something out inside.
_OPAQUE = frozenset((F.gumbel_softmax,))

_data: Any = Tensor.data

_paused = 0


class uncounted:
    """Inside a ``with`` block nothing counts as taken out."""

    def __enter__(self) -> None:
        global _paused
        _paused += 1

    def __exit__(self, *_: Any) -> None:
        global _paused
        _paused -= 1


def counting_is_paused() -> bool:
    """Whether the package's own code runs now."""
    return _paused > 0


class Cuts(TorchFunctionMode):
    """Notes, inside a ``with`` block, which values are detached, read, or used without gradients.

    Attributes:
        edges: where these values stand in the graph.
        unknown: whether some stand where the graph does not show them (inside ``torch.func``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.edges: list[GradientEdge] = []
        self.unknown = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Equal, not the same: torch makes such a method anew whenever it is asked for.
        if func == _data.__get__ and not _paused:
            # What is written there, or read from it, leaves no trace.
            self.unknown = True
        sources = [t for t in _tensors((*args, *kwargs.values())) if t.requires_grad]
        if not sources or _paused or _name(func) in _SHAPE_ALONE:
            return func(*args, **kwargs)
        # Before the call: an operation in place would change what the tensor stands for.
        with uncounted():
            edges = [_edge(t) for t in sources]
        result = func(*args, **kwargs)
        if func in _OPAQUE or _is_cut(func, sources, args, result):
            self.edges += [edge for edge in edges if edge is not None]
            self.unknown |= None in edges
        return result


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where the tensor stands; None where its graph is another level's of torch.func."""
    try:
        return get_gradient_edge(tensor)
    except (AttributeError, RuntimeError):
        return None


def _is_cut(func: Any, sources: list[Tensor], args: tuple[Any, ...], result: Any) -> bool:
    """Whether the result depends on its sources by more than the graph says."""
    name = _name(func)
    if name in _STEPS:
        return False
    if name in ("__setitem__", "copy_") and not args[0].requires_grad:
        return True
    if name in ("to", "__get__", "__set__") and args and isinstance(args[0], Tensor):
        if name == "to" and not args[0].requires_grad:
            # x.to(weight): only the kind of the weight counts.
            return False
        if name != "to" and not isinstance(result, Tensor):
            return False
    if isinstance(result, (float, complex)) or name in (
        "numpy",
        "tolist",
        "__array__",
        "__dlpack__",
    ):
        return True
    return any(
        (t.is_floating_point() or t.is_complex()) and not t.requires_grad
        for t in _tensors((result,))
    )


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values and in lists, tuples and dicts of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
