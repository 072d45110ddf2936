"""A random model as a program: text that a person reads, and the modules made from it.

The text holds marks that the model which is tested does not have:

* ``tap(name, x, z)`` is z; the reference notes that the weight of layer ``name`` was applied to x.
* ``cut(x)`` is ``x.detach()``, ``number(x)`` is ``x.item()``, ``no_grad()`` is ``torch.no_grad()``:
  places where a derivative is left out; a Hessian that is called exact must not miss them.
* ``checkpoint(...)`` recomputes; the reference just calls.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fuzz.vocabulary import NAMES

__all__ = ["Program", "Taps", "plain_torch"]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """No fused attention path, whatever is frozen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Bare(ast.NodeTransformer):
    """The program without its marks."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "tap":
            return node.args[2]
        if name in ("cut", "number"):
            method = "detach" if name == "cut" else "item"
            return ast.Call(ast.Attribute(node.args[0], method, ast.Load()), [], [])
        if name == "no_grad":
            return ast.parse("torch.no_grad()", mode="eval").body
        return node


class Taps(list[tuple[str, Tensor, Tensor]]):
    """What ``tap`` has noted: layer, input (detached), output."""

    def __call__(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        if not z.requires_grad:
            return z
        self.append((name, x.detach().clone(), z))
        # In-place operations must not reach the noted output.
        return z.clone()


class _Identity:
    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return x.clone()


def _call(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


@dataclass
class Program:
    """A model's text.

    Attributes:
        arguments: of ``forward``.
        init: lines of ``__init__``.
        body: lines of ``forward``, the last one a return.
        features: words for what is in it.
        odd: layers whose weight is used in other ways than the linear calls that are tapped.
        pruned: layers whose weight is made anew at every call.
        single: layers in float32.
        plain: nothing in it that hesskern may refuse.
        random: two calls of the model give different outputs.
        tolerance: relative; wider for models that compute below float64.
    """

    arguments: tuple[str, ...]
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    odd: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    single: set[str] = field(default_factory=set)
    plain: bool = True
    random: bool = False
    tolerance: float = 1e-9

    def marked(self) -> str:
        """The source with its marks."""
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {', '.join(self.arguments)}):"]
        lines += [f"        {line}" for line in self.body]
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """The source of the model that is tested."""
        return _bare(self.marked())

    def build(self) -> nn.Module:
        """The model that is tested."""
        return self._made(self.text(), {"checkpoint": checkpoint})

    def build_reference(self, taps: Any) -> nn.Module:
        """The same function, noted by ``taps``, without checkpoints."""
        names = {"cut": torch.Tensor.detach, "number": torch.Tensor.item, "no_grad": torch.no_grad}
        return self._made(self.marked(), {"checkpoint": _call, "tap": taps, **names})

    def build_through(self) -> nn.Module:
        """The function with the derivatives that the model leaves out; None if it has them all."""
        names = {
            "cut": lambda x: x,
            "number": lambda x: x,
            "no_grad": contextlib.nullcontext,
            "Reversed": _Identity,
            "hooked": lambda x: x * 1.0,
            "tap": lambda name, x, z: z,
        }
        return self._made(self.marked(), {"checkpoint": _call, **names})

    @property
    def cuts(self) -> bool:
        """Whether derivatives are left out somewhere."""
        marks = ("cut(", "number(", "no_grad(", "Reversed", "hooked(")
        return any(mark in line for line in self.body for mark in marks)

    @staticmethod
    def _made(source: str, names: dict[str, Any]) -> nn.Module:
        scope = {**NAMES, **names}
        exec(_compiled(source), scope)
        return scope["Model"]()


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return compile(source, "<fuzz>", "exec")


@functools.lru_cache(maxsize=16)
def _bare(source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(_Bare().visit(ast.parse(source))))
