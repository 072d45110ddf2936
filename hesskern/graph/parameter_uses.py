"""Where parameters that are no matrices act: what a sample's gradient in them is made of.

A gradient in a parameter is a sum over the operations that take it: of each, what arrives at the
operation's result times what the operation does to the parameter's entries. Biases are added, the
weights of norms scale normalized values, rows of embeddings are looked up; each of them is known
from the operation in the graph, whatever module made it. A parameter that goes into any other
operation is left to the caller, with the operation's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.entry_numbers import CHAIN, Numbers
from hesskern.graph.nodes import batch_norm_eps, kind, output_shape, passes_gradients, product
from hesskern.graph.weight_uses import Target, linear_call

__all__ = ["Leaf", "ParameterUse", "find_parameter_uses"]

# What they do to an operand is a sign, a number or zeros.
_SUMS = frozenset("Add MaskedFill Sub Where".split())
_OVERWRITTEN = "acts on values that were overwritten in place"


@dataclass(frozen=True)
class Leaf:
    """A parameter whose uses are wanted.

    Attributes:
        edge: where its gradient arrives.
        shape: its own.
    """

    edge: GradientEdge
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParameterUse:
    """One operation by which a parameter acts on a result of shape S.

    The gradient in the parameter is that of the result, times ``factor`` and ``scale``, summed over
    the axes along which the operand is repeated; of a look-up, added to the rows that were looked
    up; of a linear call, the outer product with ``x``.

    Attributes:
        node: of the graph; the gradient of the result arrives at its output 0.
        outputs: S.
        operand: the operand's shape with the axes of S, 1 where it is repeated.
        factor: gives what the operand's entries are multiplied with, detached, of a shape that
            broadcasts to S; None for one.
        scale: a number beside it.
        numbers: [operand's entries] int64 on the host, which entry of the parameter stands where,
            -1 for one that has no gradient; None: as they are.
        indices: rows that were looked up, of shape S without its last axis; None otherwise.
        padding: number of the row that has no gradient; -1 for none.
        x: [..., d] rows of a linear call by the whole parameter [m, d]; None otherwise.
        channels: whether the operand belongs to axis 1, that of channels.
    """

    node: Any
    outputs: tuple[int, ...]
    operand: tuple[int, ...] = ()
    factor: Callable[[], Tensor] | None = field(default=None, compare=False)
    scale: float = 1.0
    numbers: Tensor | None = field(default=None, compare=False)
    indices: Tensor | None = field(default=None, compare=False)
    padding: int = -1
    x: Tensor | None = field(default=None, compare=False)
    channels: bool = False

    @property
    def form(self) -> tuple[Any, ...]:
        """What tells this use from others of the same parameter, but for sizes."""
        what = (self.indices is not None, self.x is not None, self.factor is not None)
        repeated = tuple(size == 1 for size in self.operand)
        return kind(self.node), len(self.outputs), repeated, self.scale, *what


def find_parameter_uses(
    alive: list[Any], leaves: dict[str, Leaf], samples: int
) -> tuple[dict[str, list[ParameterUse]], dict[str, str]]:
    """The operations through which the outputs depend on each parameter.

    Args:
        alive: the nodes that the outputs depend on, by :func:`hesskern.graph.nodes.behind`.
        leaves: by name.
        samples: N >= 1.

    Returns:
        by name, the uses of every parameter all of whose uses are known; and what the others do. A
        parameter on which the outputs do not depend is in neither.
    """
    parents: dict[Any, list[tuple[Any, int, int]]] = {}
    for node in alive:
        for operand, (follower, number) in enumerate(node.next_functions):
            if follower is not None:
                parents.setdefault(follower, []).append((node, operand, number))
    uses: dict[str, list[ParameterUse]] = {}
    others: dict[str, str] = {}
    for name, leaf in leaves.items():
        search = _Search(leaf, parents, samples)
        try:
            search.run()
        except RuntimeError as error:
            # A value that an operation has kept is not there any more.
            if "inplace operation" not in str(error):
                raise
            search.other = _OVERWRITTEN
        if search.other:
            others[name] = search.other
        elif search.uses:
            uses[name] = search.uses
    return uses, others


@dataclass(frozen=True)
class _Operand:
    """What stands where an operation takes an operand.

    Attributes:
        numbers: of the parameter's entries.
        scale: times this number.
    """

    numbers: Numbers
    scale: float = 1.0


class _Search:
    """The search for one parameter's uses."""

    def __init__(
        self, leaf: Leaf, parents: dict[Any, list[tuple[Any, int, int]]], samples: int
    ) -> None:
        self._leaf, self._parents, self._samples = leaf, parents, samples
        self.uses: list[ParameterUse] = []
        self.other = ""

    def run(self) -> None:
        for parent, operand, number in self._parents.get(self._leaf.edge.node, ()):
            if number == self._leaf.edge.output_nr:
                self._follow(parent, operand, _Operand(Numbers(self._leaf.shape)))

    def _behind(self, node: Any, number: int, here: _Operand) -> None:
        for parent, place, arriving in self._parents.get(node, ()):
            if arriving == number:
                self._follow(parent, place, here)

    def _follow(self, node: Any, operand: int, here: _Operand) -> None:
        """Goes on to a node that takes this as an operand."""
        name = kind(node)
        if passes_gradients(node):
            self._behind(node, 0, here)
        elif name == "Expand" and self._brings_samples(node):
            self._use(node, self._padded(node, here), here)
        elif name in CHAIN:
            for number in range(len(node._input_metadata)):
                moved = here.numbers.through(node, number)
                if moved is None:
                    self._unknown(node)
                    return
                self._behind(node, number, _Operand(moved, here.scale))
        elif name == "Embedding" and operand == 0:
            self._look_up(node, here)
        elif _is_sum(name, operand):
            self._sum(node, operand, here)
        else:
            self._act(node, operand, name, here)

    def _act(self, node: Any, operand: int, name: str, here: _Operand) -> None:
        """An operation that ends the way."""
        rule = _RULES.get((name, operand))
        shape = output_shape(node)
        if rule is not None and shape is not None:
            found = rule(node, shape, here.numbers.tensor.shape)
            if found is not None:
                padded, factor, scale = found
                channels = name in _OF_CHANNELS
                here = _Operand(here.numbers, here.scale * scale)
                self._use(node, padded, here, factor, channels)
                return
        target = Target(self._leaf.shape, ())
        call = None
        if here.scale == 1.0 and len(self._leaf.shape) == 2:
            call = linear_call(node, operand, here.numbers, target)
        if call is None or call.part is not None or call.settings is not None:
            self._unknown(node)
            return
        self.uses.append(ParameterUse(node, tuple(call.outputs), x=call.x))

    def _use(
        self,
        node: Any,
        padded: tuple[int, ...],
        here: _Operand,
        factor: Callable[[], Tensor] | None = None,
        channels: bool = False,
    ) -> None:
        shape = output_shape(node)
        numbers = here.numbers.tensor.flatten()
        if shape is None or len(numbers) != product(padded):
            self._unknown(node)
            return
        same = here.numbers.plain == "same" or (
            len(numbers) == product(self._leaf.shape)
            and torch.equal(numbers, torch.arange(len(numbers), device="cpu"))
        )
        kept = None if same else numbers
        self.uses.append(
            ParameterUse(node, shape, padded, factor, here.scale, kept, channels=channels)
        )

    def _unknown(self, node: Any) -> None:
        self.other = f"acts through {kind(node)}, where its gradients by sample are not known here"

    @staticmethod
    def _padded(node: Any, here: _Operand) -> tuple[int, ...]:
        shape, own = output_shape(node) or (), tuple(here.numbers.tensor.shape)
        return (1,) * (len(shape) - len(own)) + own

    def _brings_samples(self, node: Any) -> bool:
        """Whether an expansion gives every sample a copy."""
        shape = output_shape(node)
        follower, number = node.next_functions[0]
        source = output_shape(follower, number)
        if not shape or source is None or shape[0] != self._samples:
            return False
        return len(source) < len(shape) or source[0] == 1

    def _repeats(self, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
        """Whether every sample of a result has this operand: it is repeated at least N times."""
        size = max(1, product(own))
        return product(shape) // size % self._samples == 0

    def _sum(self, node: Any, operand: int, here: _Operand) -> None:
        """A sum, difference or choice: with something of every sample, or of this one's shape."""
        shape, own, name = output_shape(node), tuple(here.numbers.tensor.shape), kind(node)
        if shape is None:
            self._unknown(node)
            return
        scale, stays = here.scale, None
        if name == "Where":
            stays = node._saved_condition if operand == 0 else ~node._saved_condition
        elif name == "MaskedFill":
            stays = ~node._saved_mask
        elif operand == 1:
            scale *= float(node._saved_alpha) * (1.0 if name == "Add" else -1.0)
        if self._repeats(shape, own):
            factor = None if stays is None else stays.float
            self._use(node, self._padded(node, here), _Operand(here.numbers, scale), factor)
            return
        numbers = here.numbers
        if own != shape or stays is not None:
            moved = numbers.tensor.expand(shape)
            if stays is not None:
                moved = moved.masked_fill(~stays.cpu(), -1)
            numbers = Numbers(self._leaf.shape, "", moved)
        self._behind(node, 0, _Operand(numbers, scale))

    def _look_up(self, node: Any, here: _Operand) -> None:
        """Rows by numbers: of every sample, or the same for all until they meet a sample's."""
        if node._saved_scale_grad_by_freq:
            self.other = (
                "is an embedding with scale_grad_by_freq, whose gradients depend on the batch"
            )
            return
        if here.numbers.plain != "same" or here.scale != 1.0:
            self._unknown(node)
            return
        indices, shape = node._saved_indices, output_shape(node)
        padding = int(node._saved_padding_idx)
        padding = -1 if padding >= 2**63 else padding
        if shape is None:
            self._unknown(node)
            return
        if self._samples == 1 or not self._for_all(node, shape):
            use = ParameterUse(node, shape, indices=indices, padding=padding)
            self.uses.append(use)
            return
        # The same rows for all samples.
        rows = torch.arange(product(self._leaf.shape), device="cpu").reshape(self._leaf.shape)
        if padding >= 0:
            rows[padding] = -1
        found = rows[indices.cpu()]
        self._behind(node, 0, _Operand(Numbers(self._leaf.shape, "", found)))

    def _for_all(self, node: Any, shape: tuple[int, ...]) -> bool:
        """Whether rows of this shape go nowhere but into sums that repeat them for every sample."""
        pending: list[tuple[Any, int, tuple[int, ...]]] = [(node, 0, shape)]
        found = False
        while pending:
            behind, number, own = pending.pop()
            for parent, operand, arriving in self._parents.get(behind, ()):
                if arriving != number:
                    continue
                name, result = kind(parent), output_shape(parent)
                if result is None:
                    return False
                if name == "Expand" and self._brings_samples(parent):
                    found = True
                elif _is_sum(name, operand):
                    if self._repeats(result, own):
                        found = True
                    else:
                        pending.append((parent, 0, result))
                elif name in CHAIN or passes_gradients(parent):
                    pending += [
                        (parent, i, output_shape(parent, i) or ())
                        for i in range(len(parent._input_metadata))
                    ]
                else:
                    return False
        return found


def _is_sum(name: str, operand: int) -> bool:
    return name in _SUMS and operand < (1 if name == "MaskedFill" else 2)


_Found = tuple[tuple[int, ...], Callable[[], Tensor] | None, float] | None
_Rule = Callable[[Any, tuple[int, ...], tuple[int, ...]], _Found]


def _added(attribute: str) -> _Rule:
    """A bias [m] of a product, times a number of the operation."""

    def rule(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
        padded = (1,) * (len(shape) - len(own)) + tuple(own)
        return padded, None, float(getattr(node, attribute, 1))

    return rule


def _channels(shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...] | None:
    """Of an operand [C] that belongs to axis 1."""
    if len(shape) < 2 or tuple(own) != (shape[1],):
        return None
    return 1, shape[1], *(1,) * (len(shape) - 2)


def _added_to_channels(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
    padded = _channels(shape, own)
    return None if padded is None else (padded, None, 1.0)


def _scaled_by(attribute: str) -> _Rule:
    """A product, entry by entry, with a value of every sample."""

    def rule(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
        other = getattr(node, attribute)
        if not isinstance(other, Tensor) or other.layout != torch.strided:
            return None
        other = other.detach()
        return (1,) * (len(shape) - len(own)) + tuple(own), lambda: other, 1.0

    return rule


def _layer_norm(scales: bool) -> _Rule:
    def rule(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
        padded = (1,) * (len(shape) - len(own)) + tuple(own)
        if not scales:
            return padded, None, 1.0
        x, mean, rstd = (
            t.detach() for t in (node._saved_input, node._saved_result1, node._saved_result2)
        )
        return padded, lambda: (_wide(x) - _wide(mean)) * _wide(rstd), 1.0

    return rule


def _rms_norm(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
    """torch's fused one, which CUDA has; elsewhere it is a product."""
    padded = (1,) * (len(shape) - len(own)) + tuple(own)
    x, rstd = node._saved_input.detach(), node._saved_result1.detach()
    return padded, lambda: _wide(x) * _wide(rstd), 1.0


def _group_norm(scales: bool) -> _Rule:
    def rule(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
        padded = _channels(shape, own)
        if padded is None or not scales:
            return None if padded is None else (padded, None, 1.0)
        x, mean, rstd = (
            t.detach() for t in (node._saved_input, node._saved_result1, node._saved_result2)
        )
        groups = int(node._saved_group)

        def normalized() -> Tensor:
            parts = _wide(x).reshape(len(x), groups, -1)
            around = _wide(mean).reshape(len(x), groups, 1)
            return ((parts - around) * _wide(rstd).reshape(len(x), groups, 1)).reshape(x.shape)

        return padded, normalized, 1.0

    return rule


def _batch_norm(scales: bool) -> _Rule:
    """By running statistics: an affine map of every channel."""

    def rule(node: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> _Found:
        padded = _channels(shape, own)
        if padded is None or node._saved_training or node._saved_running_var is None:
            return None
        if not scales:
            return padded, None, 1.0
        x, eps = node._saved_input.detach(), batch_norm_eps(node)
        mean, variance = node._saved_running_mean.detach(), node._saved_running_var.detach()

        def normalized() -> Tensor:
            rstd = (_wide(variance) + eps).rsqrt()
            return (_wide(x) - _wide(mean).reshape(padded)) * rstd.reshape(padded)

        return padded, normalized, 1.0

    return rule


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_RULES: dict[tuple[str, int], _Rule] = {
    ("Addmm", 0): _added("_saved_beta"),
    ("Linear", 2): _added(""),
    ("Convolution", 2): _added_to_channels,
    ("Mul", 0): _scaled_by("_saved_other"),
    ("Mul", 1): _scaled_by("_saved_self"),
    ("FusedRmsNorm", 1): _rms_norm,
    ("NativeLayerNorm", 1): _layer_norm(True),
    ("NativeLayerNorm", 2): _layer_norm(False),
    ("NativeGroupNorm", 1): _group_norm(True),
    ("NativeGroupNorm", 2): _group_norm(False),
    ("CudnnBatchNorm", 1): _batch_norm(True),
    ("CudnnBatchNorm", 2): _batch_norm(False),
    ("NativeBatchNorm", 1): _batch_norm(True),
    ("NativeBatchNorm", 2): _batch_norm(False),
}
_OF_CHANNELS = frozenset(("Convolution", "CudnnBatchNorm", "NativeBatchNorm", "NativeGroupNorm"))
