"""A weight's calls as its layer's uses: an input and gradients by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.evidence import ArrangedCall
from hesskern.graph.nodes import kind, product
from hesskern.graph.routed_rows import RoutedRows
from hesskern.graph.sample_axes import Arrangement
from hesskern.graph.weight_uses import WeightUse
from hesskern.passes.layers import LayerSpec
from hesskern.passes.position_mask import PositionMask

__all__ = [
    "LayerUse",
    "before_autocast",
    "inputs_by_call",
    "layer_uses",
    "positions_of",
    "positions_of_image",
]


@dataclass(frozen=True)
class LayerUse:
    """One linear call by a layer's weight in a forward pass.

    Attributes:
        x: input [N, d], [N, t, d] or [N, C, (H,) W], detached, padded.
        edge: where the gradient with respect to the call's result arrives.
        arrangement: which rows of the result belong to which sample.
        window: which rows of the result are the call's; None for all.
        routed: whether they are some rows of a larger tensor, in an order of their own.
        outputs: m.
        part: the rows of the weight that the call used; None for all.
        convolution: whether the result is [B, m, (H,) W] rather than rows [..., m].
        index: of a convolution that takes several images of a sample, which one this is.
        ambiguous: whether only rows that act on an output are known to be where they belong.
        mask: which positions are data; None for all.
    """

    x: Tensor
    edge: GradientEdge
    arrangement: Arrangement | RoutedRows
    outputs: int
    part: slice | None = None
    convolution: bool = False
    index: int = 0
    ambiguous: bool = False
    mask: PositionMask | None = None
    window: slice | None = None
    routed: bool = False

    @property
    def contiguous(self) -> bool:
        """Whether a sample's rows follow one another in the result, and there are no others."""
        arrangement = self.arrangement
        whole = isinstance(arrangement, Arrangement) and arrangement.outer == 1
        return whole and self.window is None

    def by_sample(self, gradient: Tensor) -> Tensor:
        """[N, m], [N, t, m] or [N, m, (H,) W] of a gradient of the call's result."""
        if self.window is not None:
            gradient = gradient.reshape(-1, gradient.shape[-1])[self.window]
        if isinstance(self.arrangement, RoutedRows):
            return self._whole(self.arrangement.by_sample(gradient.reshape(-1, gradient.shape[-1])))
        one = self.arrangement.positions == 1
        if self.convolution:
            return gradient if one else self.arrangement.by_sample(gradient)[:, self.index]
        if one and gradient.dim() == 2:
            return self._whole(gradient)
        rows = self.arrangement.by_sample(gradient.reshape(-1, gradient.shape[-1]))
        return self._whole(rows[:, 0] if one else rows)

    def in_block(self, gradient: Tensor) -> Tensor:
        """[n, r, m], [n, r, t, m] or [n, r, m, (H,) W] of [n, r, ...]; samples stand first."""
        if self.convolution:
            return gradient if self.arrangement.positions == 1 else gradient[:, :, self.index]
        if self.arrangement.positions == 1:
            return self._whole(gradient.flatten(2))
        return self._whole(gradient.flatten(2, -2))

    def _whole(self, rows: Tensor) -> Tensor:
        """[..., m] with zeros where the call did not use the weight."""
        if self.part is None:
            return rows
        return F.pad(rows, (self.part.start, self.outputs - self.part.stop))


def inputs_by_call(given: list[tuple[Any, Tensor, int]]) -> dict[Any, Tensor]:
    """Layers' inputs by the calls that they went into.

    Args:
        given: nodes of layers' results, inputs, and the inputs' versions when they were read; what
            was overwritten since is left out.
    """
    inputs: dict[Any, Tensor] = {}
    for node, x, version in given:
        if x._version != version:
            continue
        # Behind views and the addition of a bias.
        while node is not None and kind(node) in ("Add", "UnsafeView", "View"):
            node = node.next_functions[0][0]
        inputs[node] = x
    return inputs


def before_autocast(
    calls: dict[str, list[WeightUse]], given: dict[Any, Tensor]
) -> dict[str, list[WeightUse]]:
    """The calls with inputs as the layers were given them, before autocast narrowed them."""

    def widened(use: WeightUse) -> WeightUse:
        x = given.get(use.node)
        if x is None or x.numel() != use.x.numel() or not x.is_floating_point():
            return use
        return replace(use, x=x.detach().reshape(use.x.shape))

    return {name: [widened(use) for use in uses] for name, uses in calls.items()}


def layer_uses(spec: LayerSpec, use: WeightUse, call: ArrangedCall) -> list[LayerUse]:
    """A call as uses that have one input of a sample each."""
    edge, arrangement, ambiguous = GradientEdge(use.node, 0), call.arrangement, call.ambiguous
    if isinstance(arrangement, RoutedRows):
        x = arrangement.by_sample(use.x.reshape(-1, use.x.shape[-1]))
        mask = PositionMask(arrangement.valid, arrangement.valid.device)
        return [
            LayerUse(
                x,
                edge,
                arrangement,
                spec.outputs,
                use.part,
                mask=mask,
                window=use.window,
                routed=True,
            )
        ]
    one = arrangement.positions == 1
    if use.settings is None:
        if one and use.x.dim() == 2:
            x = use.x
        else:
            x = arrangement.by_sample(use.x.reshape(-1, use.x.shape[-1]))
            x = x[:, 0] if one else x
        plain = LayerUse(x, edge, arrangement, spec.outputs, use.part, ambiguous=ambiguous)
        return [replace(plain, window=use.window, routed=True) if call.routed else plain]
    x = use.x
    more = [p - q for p, q in zip(use.settings[1], spec.padding, strict=True)]
    if any(more):
        x = F.pad(x, [amount for axis in reversed(more) for amount in (axis, axis)])
    if one:
        images = [x]
    else:
        by_sample = arrangement.by_sample(x)
        images = [by_sample[:, i] for i in range(arrangement.positions)]
    return [
        LayerUse(image, edge, arrangement, spec.outputs, None, True, i, ambiguous)
        for i, image in enumerate(images)
    ]


def positions_of(spec: LayerSpec, use: LayerUse) -> int:
    """Positions per sample of one use, masked ones among them."""
    x = use.x
    if spec.kind == "linear":
        return product(x.shape[1:-1]) if len(x) and x.shape[-1] else 1
    return positions_of_image(spec, x.shape)


def positions_of_image(spec: LayerSpec, shape: Sequence[int]) -> int:
    """Positions of a convolution in one image of a batch [B, C, (H,) W]."""
    count = 1
    axes = zip(shape[2:], spec.kernel_size, spec.stride, spec.padding, spec.dilation, strict=True)
    for size, kernel, stride, padding, dilation in axes:
        count *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return count
