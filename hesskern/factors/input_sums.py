"""Running sums of layers' inputs, one for all layers that were always given the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.layer_sums import bordered
from hesskern.passes.layers import LayerSpec

__all__ = ["InputSums", "SharedSums"]


@dataclass(eq=False)
class InputSums:
    """Running sums of one or several layers' inputs.

    Attributes:
        inputs: [d, d] or [g, d, d], the upper triangle of the sum of x x^T, without the bias.
        column: [g d] sum of x over samples and positions.
        squares: sum of all squared entries, which bounds every entry of ``inputs``.
        positions: weighted sum of positions per sample.
    """

    inputs: Tensor
    column: Tensor
    squares: float = 0.0
    positions: float = 0.0

    @staticmethod
    def zeros(spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> InputSums:
        g, d = spec.groups, spec.weight_inputs
        shape = (d, d) if g == 1 else (g, d, d)
        return InputSums(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(g * d, dtype=dtype, device=device),
        )

    def copy(self) -> InputSums:
        return InputSums(self.inputs.clone(), self.column.clone(), self.squares, self.positions)

    def add(self, other: InputSums) -> None:
        """Adds other sums of the same shapes."""
        self.inputs += other.inputs.to(self.inputs)
        self.column += other.column.to(self.column)
        self.squares += other.squares
        self.positions += other.positions

    def covariance(self, spec: LayerSpec, count: float) -> Tensor:
        """[(g,) d, d] mean over ``count`` samples, with the bias's row and column if joint."""
        mean = ops.mirror_(self.inputs / count)
        if spec.joint:
            mean = bordered(mean, self.column / count, self.positions / count)
        return mean


class SharedSums:
    """Sums by layer. Layers that were always given the same inputs have theirs in common."""

    def __init__(self) -> None:
        self.by_layer: dict[str, InputSums] = {}

    def copy(self) -> SharedSums:
        """The same sums in memory of their own, shared as here."""
        copies = {id(sums): sums.copy() for sums in self.by_layer.values()}
        found = SharedSums()
        found.by_layer = {name: copies[id(sums)] for name, sums in self.by_layer.items()}
        return found

    def arrange(
        self, groups: Mapping[Hashable, list[str]], made: Mapping[Hashable, InputSums]
    ) -> list[tuple[Hashable, InputSums]]:
        """Makes room for more, and says where it is to be added.

        Sums that several layers have had in common are copied where only some of these are given
        the same now; a layer without sums begins with none.

        Args:
            groups: layers that are given the same now, by what that is.
            made: zeros for each group, which are taken where layers are new.

        Returns:
            pairs of a group and sums that it is to be added to.
        """
        before: dict[int, set[str]] = {}
        for name, sums in self.by_layer.items():
            before.setdefault(id(sums), set()).add(name)
        places: list[tuple[Hashable, InputSums]] = []
        for key, names in groups.items():
            parts: dict[int | None, list[str]] = {}
            for name in names:
                known = self.by_layer.get(name)
                parts.setdefault(None if known is None else id(known), []).append(name)
            for part, members in parts.items():
                if part is None:
                    sums = made[key]
                else:
                    sums = self.by_layer[members[0]]
                    if before[part] != set(members):
                        before[part] -= set(members)
                        sums = sums.copy()
                self.by_layer.update(dict.fromkeys(members, sums))
                places.append((key, sums))
        return places
