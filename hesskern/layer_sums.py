"""Running sums of one layer: what its Kronecker factors are means of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LayerSums", "bordered", "masked"]


@dataclass
class LayerSums:
    """Running sums of one layer; upper triangles only.

    Attributes:
        inputs: [d, d] or [g, d, d], without the bias.
        outputs: [m, m].
        column: [g d] sum of the inputs over samples and positions; used with a joint bias.
        images: sums of the inputs, one per use; None once their shapes varied.
        positions: weighted sum of positions per sample; a 0-dim float64 tensor while only the
            device knows it.
    """

    inputs: Tensor
    outputs: Tensor
    column: Tensor
    images: list[Tensor] | None = field(default_factory=list)
    positions: float | Tensor = 0.0

    def copy(self, device: torch.device | None = None) -> LayerSums:
        def clone(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True)

        images = None if self.images is None else [clone(image) for image in self.images]
        return LayerSums(
            clone(self.inputs),
            clone(self.outputs),
            clone(self.column),
            images,
            float(self.positions),
        )

    def mask(self, alive: Tensor) -> None:
        """Makes all sums zero where the 0-dim ``alive`` is False, whatever they hold."""
        for tensor in self._tensors():
            tensor.masked_fill_(~alive.to(tensor.device), 0)
        self.positions = masked(self.positions, alive)

    def fits(self, other: LayerSums) -> bool:
        """Whether adding ``other`` changes nothing but sums."""
        if self.images is None:
            return True
        return other.images is not None and [i.shape for i in self.images] == [
            i.shape for i in other.images
        ]

    def scale(self, factor: float | Tensor) -> None:
        for tensor in self._tensors():
            tensor *= factor.to(tensor.device) if isinstance(factor, Tensor) else factor
        self.positions = self.positions * factor

    def _tensors(self) -> list[Tensor]:
        return [self.inputs, self.outputs, self.column, *(self.images or ())]

    def add(self, other: LayerSums) -> None:
        self.inputs += other.inputs
        self.outputs += other.outputs
        self.column += other.column
        self.positions += other.positions
        self.add_images(other.images)

    def add_images(self, images: list[Tensor] | None) -> None:
        if self.images is not None and not self.images and images is not None:
            self.images = [image.clone() for image in images]
        elif (
            self.images is None
            or images is None
            or [i.shape for i in self.images] != [i.shape for i in images]
        ):
            self.images = None
        else:
            for mine, new in zip(self.images, images, strict=True):
                mine += new


def masked(value: float | Tensor, alive: Tensor) -> Tensor:
    """0-dim float64: the value where ``alive`` is True, else 0."""
    if isinstance(value, Tensor):
        return torch.where(alive, value.to(alive.device), 0.0)
    return alive.double() * value


def bordered(matrix: Tensor, column: Tensor, corner: float) -> Tensor:
    """[(g,) d + 1, d + 1]: the matrix with E[sum_t x_t] [g d] and the number of positions added."""
    blocks = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
    g, d, _ = blocks.shape
    out = blocks.new_empty(g, d + 1, d + 1)
    out[:, :d, :d] = blocks
    out[:, :d, d] = out[:, d, :d] = column.reshape(g, d)
    out[:, d, d] = corner
    return out if matrix.dim() == 3 else out[0]
