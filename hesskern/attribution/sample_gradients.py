"""Gradients of single samples, layer by layer, as the inputs and output gradients they are of.

A sample's gradient with respect to a layer's weight is G_n = sum_t g_nt x_nt^T [m, d], summed over
the calls of the weight as well. With groups it is one such matrix [m/g, d] per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.ops.reference import unfold
from hesskern.passes.layer_uses import LayerUse
from hesskern.passes.layers import LayerSpec
from hesskern.passes.roots import BatchRoots, accumulator_dtype

__all__ = ["LayerRows", "layer_rows", "matrices"]


@dataclass(frozen=True)
class LayerRows:
    """One call of a layer: G_n's part sum_t g_nt x_nt^T.

    Attributes:
        x: [N, t, g d] inputs; those of the groups beside each other.
        g: [N, t, m] gradients of the samples' losses with respect to the call's result.
        groups: g.
        routed: whether the rows are some of a larger tensor's, in an order of their own.
        image: of a convolution that takes several images of a sample, which one this is.
    """

    x: Tensor
    g: Tensor
    groups: int
    routed: bool = False
    image: int = 0

    @property
    def positions(self) -> int:
        return self.x.shape[1]

    def grouped(self) -> tuple[Tensor, Tensor]:
        """[g, N t, d] and [g, N t, m/g]; views where the layout permits."""
        n, t = self.x.shape[:2]
        x = self.x.reshape(n * t, self.groups, -1).transpose(0, 1)
        return x, self.g.reshape(n * t, self.groups, -1).transpose(0, 1)

    def matrices(self, samples: slice) -> Tensor:
        """[n, g, m/g, d] of some samples."""
        x, g = self.x[samples], self.g[samples]
        if self.groups == 1:
            return torch.bmm(g.transpose(1, 2), x).unsqueeze(1)
        x = x.unflatten(2, (self.groups, -1)).transpose(1, 2)
        return torch.matmul(g.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1), x)


def matrices(calls: list[LayerRows], samples: slice) -> Tensor:
    """[n, g, m/g, d]: G_n of some samples, of one or more calls of a layer."""
    total = calls[0].matrices(samples)
    for call in calls[1:]:
        total += call.matrices(samples)
    return total


def layer_rows(
    roots: BatchRoots, specs: dict[str, LayerSpec], scale: Tensor | None = None
) -> dict[str, list[LayerRows]]:
    """Every layer's calls in one batch; layers that no output depends on have none.

    Args:
        roots: of the batch, with one root row for each sample.
        specs: of the layers.
        scale: [N] that samples' root rows have been divided by; None: by nothing.
    """
    if not roots.uses:
        return {}
    (gradients,) = roots.gradients()
    found = {}
    for name, uses in roots.uses.items():
        calls = [
            _rows(specs[name], use, gradient, scale)
            for use, gradient in zip(uses, gradients.pop(name), strict=True)
            if gradient is not None
        ]
        if calls:
            found[name] = calls
    return found


def _rows(spec: LayerSpec, use: LayerUse, gradient: Tensor, scale: Tensor | None) -> LayerRows:
    n = len(use.x)
    if spec.kind == "conv":
        shape = spec.kernel_size, spec.stride, spec.padding, spec.dilation
        x = unfold(use.x, *shape).transpose(1, 2)
        g = gradient.flatten(2).transpose(1, 2)
    else:
        t = math.prod(use.x.shape[1:-1])
        x, g = use.x.reshape(n, t, spec.weight_inputs), gradient.reshape(n, t, spec.outputs)
    if use.mask is not None:
        # Whatever masked positions hold counts nowhere, NaN included.
        masked = ~use.mask.on(x.device).unsqueeze(2)
        x, g = x.masked_fill(masked, 0), g.masked_fill(masked, 0)
    dtype = accumulator_dtype(use.x.dtype)
    x, g = x.to(dtype), g.to(dtype)
    if scale is not None:
        g = g * scale.to(g)[:, None, None]
    if spec.joint:
        one = x.new_ones(n, x.shape[1], spec.groups, 1)
        x = torch.cat([x.unflatten(2, (spec.groups, -1)), one], 3).flatten(2)
    return LayerRows(x, g, spec.groups, use.routed, use.index)
