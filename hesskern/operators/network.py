"""Block diagonal curvature of a network: every layer's operator, in one call each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.base import CurvatureOperator, Layout
from hesskern.operators.damping import Damping, check_damping
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.grouped import (
    eigen_products,
    eigenvectors,
    kronecker_products,
    whole_layers,
)
from hesskern.operators.kronecker import KroneckerOperator, decompose
from hesskern.operators.vectors import draws, require_finite
from hesskern.ops import foreach

__all__ = ["LayerDamping", "NetworkOperator"]

LayerDamping = Damping | Mapping[str, Damping]
"""One damping for every layer ("mean": a tenth of the layer's own mean eigenvalue), or by layer."""

Blocks = dict[str, Tensor]

# Weights up to which the eigenvalues' inverses are kept for the next solve: of small networks they
# take a share of the time, of large ones memory.
_KEPT = 1 << 22


class NetworkOperator(CurvatureOperator):
    """The block diagonal matrix of all layers' operators.

    Vectors are flat, [P] or [P, k]: the layers one after the other, each in the order of its
    operator (the weight's memory, or output first); or by layer, {name: [k, m, d]} or {name:
    [m, d]}, output first always. Answers come in the form that was asked. Every call takes all
    layers together: one launch of a grouped product, not one a layer.

    Keep the operator: it holds the factors' eigendecompositions, made when they are first needed.

    Args:
        layers: by name.

    Attributes:
        layers: the same.
        slices: by layer, where its weights stand in a flat vector.
        dtype: of flat vectors, the widest of the layers'; vectors by layer have the layer's own.

    Raises:
        TypeError: ``layers`` is no mapping of operators with a Kronecker eigenbasis.
        ValueError: there is none, or devices differ.
    """

    def __init__(self, layers: Mapping[str, EigenbasisOperator]) -> None:
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must map names to operators, got {type(layers).__name__}")
        self.layers = dict(layers)
        if not self.layers:
            raise ValueError("layers must hold at least one operator")
        for name, layer in self.layers.items():
            if not isinstance(layer, EigenbasisOperator):
                raise TypeError(
                    "layers must be operators with a Kronecker eigenbasis, got "
                    f"{type(layer).__name__} for layer {name!r}"
                )
        first, one = next(iter(self.layers.items()))
        self.dtype, self.device = one.dtype, one.device
        self.slices: dict[str, slice] = {}
        size = 0
        for name, layer in self.layers.items():
            if layer.device != self.device:
                raise ValueError(
                    f"layers must be on one device, got {first!r} on {self.device} and {name!r} "
                    f"on {layer.device}"
                )
            self.dtype = torch.promote_types(self.dtype, layer.dtype)
            self.slices[name] = slice(size, size + layer.shape[0])
            size += layer.shape[0]
        self.shape = (size, size)
        self._inverse: tuple[list[float], list[Tensor]] | None = None

    def __repr__(self) -> str:
        rows = [f"  {name}: {layer!r}" for name, layer in self.layers.items()]
        return "\n".join([f"{super().__repr__()} of {len(rows)} layers:", *rows])

    # Forms of vectors

    def split(self, vectors: Tensor) -> Blocks:
        """By layer, the matrices [m, d] of a flat vector [P], or [k, m, d] of a block [P, k]."""
        self._check_flat(vectors)
        blocks = dict(zip(self.layers, self._cut(vectors), strict=True))
        return {n: b[0] for n, b in blocks.items()} if vectors.dim() == 1 else blocks

    def flat(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """The flat vector [P] of matrices {layer: [m, d]}, or [P, k] of {layer: [k, m, d]}."""
        single, parts = self._read(blocks)
        return self._joined(parts, single)

    def _check_flat(self, vectors: Tensor) -> None:
        # Raises where shape, dtype or device do not fit.
        if not isinstance(vectors, Tensor):
            raise TypeError(
                "vectors must be a tensor or a mapping from layers to tensors, got "
                f"{type(vectors).__name__}"
            )
        self._check(vectors)

    def _cut(self, vectors: Tensor) -> list[Tensor]:
        """Per layer [k, m, d] in its dtype, of flat vectors [P] or [P, k]; views where they can."""
        rows = vectors.unsqueeze(0) if vectors.dim() == 1 else vectors.T
        blocks = []
        for name, layer in self.layers.items():
            block = rows[:, self.slices[name]].unflatten(1, layer.weight_shape)
            block = block.mT if layer.transposed else block
            blocks.append(block if block.dtype == layer.dtype else block.to(layer.dtype))
        return blocks

    def _joined(self, blocks: Sequence[Tensor], single: bool) -> Tensor:
        """Flat vectors [P] or [P, k] of blocks [k, m, d]."""
        turned = [
            (block.mT if layer.transposed else block).flatten(1)
            for layer, block in zip(self.layers.values(), blocks, strict=True)
        ]
        rows = torch.cat([b if b.dtype == self.dtype else b.to(self.dtype) for b in turned], 1)
        return rows[0] if single else rows.T

    def _read(self, blocks: Mapping[str, Tensor]) -> tuple[bool, list[Tensor]]:
        """Whether vectors by layer are single matrices, and per layer [k, m, d]."""
        _check_names("vectors", blocks, self.layers)
        first = next(iter(self.layers))
        shapes: list[tuple[int, ...]] = []
        for name, layer in self.layers.items():
            block, (m, d) = blocks[name], layer.layer_shape
            if not isinstance(block, Tensor):
                raise TypeError(
                    f"vectors must be tensors, got {type(block).__name__} for layer {name!r}"
                )
            if block.dim() not in (2, 3) or tuple(block.shape[-2:]) != (m, d):
                raise ValueError(
                    f"vectors of layer {name!r} must be [m, d] = [{m}, {d}] or [k, {m}, {d}], got "
                    f"{list(block.shape)}"
                )
            if block.dtype != layer.dtype:
                raise TypeError(
                    f"vectors of layer {name!r} must be {layer.dtype}, got {block.dtype}"
                )
            if block.device != self.device:
                raise ValueError(
                    f"vectors of layer {name!r} must be on {self.device}, got {block.device}"
                )
            shapes.append(tuple(block.shape[:-2]))
            if shapes[-1] != shapes[0]:
                raise ValueError(
                    f"vectors must be as many in every layer, got {list(blocks[first].shape)} for "
                    f"{first!r} and {list(block.shape)} for {name!r}"
                )
        single = not shapes[0]
        given = [blocks[name] for name in self.layers]
        return single, [block.unsqueeze(0) for block in given] if single else given

    def _on_blocks(self, vectors: Any, function: Callable[[list[Tensor]], list[Tensor]]) -> Any:
        """A function of every layer's blocks [k, m, d], on vectors in either form."""
        by_layer = isinstance(vectors, Mapping)
        with torch.inference_mode(False), torch.no_grad():
            if by_layer:
                single, blocks = self._read(vectors)
            else:
                self._check_flat(vectors)
                single, blocks = vectors.dim() == 1, self._cut(vectors)
            blocks = [b.clone() if b.is_inference() else b for b in blocks]
            # Flat vectors are looked at all together, and by layer for the message alone.
            if by_layer or not math.isfinite(vectors.sum()):
                require_finite(blocks, list(self.layers))
            found = function(blocks)
            if not by_layer:
                return self._joined(found, single)
            answers = [b[0] for b in found] if single else found
            return dict(zip(self.layers, answers, strict=True))

    # Products

    def __matmul__(self, vectors: Any) -> Any:
        """Product with vectors in either form.

        Raises:
            TypeError: ``vectors`` are no tensors, or of another dtype.
            ValueError: shapes, devices or names do not fit, or a layer's hold NaN or Inf.
        """
        return self._on_blocks(vectors, self._products)

    def _matmul(self, block: Tensor) -> Tensor:
        return self._joined(self._products(self._cut(block.T)), False).T

    def _products(self, blocks: list[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        layers = list(self.layers.values())
        for kind, product in ((True, kronecker_products), (False, eigen_products)):
            chosen = [i for i, x in enumerate(layers) if isinstance(x, KroneckerOperator) is kind]
            if chosen:
                products = product([layers[i] for i in chosen], [blocks[i] for i in chosen])
                found.update(zip(chosen, products, strict=True))
        return [found[i] for i in range(len(layers))]

    def trace(self) -> float:
        return math.fsum(layer.trace() for layer in self.layers.values())

    def diagonal(self) -> Tensor:
        return torch.cat([layer.diagonal().to(self.dtype) for layer in self.layers.values()])

    def to_dense(self) -> Tensor:
        """[P, P]; for small networks."""
        return torch.block_diag(*(x.to_dense().to(self.dtype) for x in self.layers.values()))

    def _layout(self) -> Layout:
        return tuple((name, x.layer_shape, x.transposed) for name, x in self.layers.items())

    def _scaled(self, factor: float) -> NetworkOperator:
        return NetworkOperator({n: x._scaled(factor) for n, x in self.layers.items()})

    # What the eigenvectors give

    def _decompose(self) -> None:
        """Decomposes the factors that have not been, all together."""
        new = {n: x for n, x in self.layers.items() if isinstance(x, KroneckerOperator)}
        decompose(list(new.values()), list(new))

    def _numbers(self, damping: LayerDamping) -> dict[str, float]:
        """By layer what is added to its eigenvalues."""
        if isinstance(damping, Mapping):
            _check_names("damping", damping, self.layers)
            return {n: x._damping(damping[n], n) for n, x in self.layers.items()}
        check_damping(damping, None)
        return {n: x._damping(damping, n) for n, x in self.layers.items()}

    @overload
    def solve(self, vectors: Tensor, damping: LayerDamping) -> Tensor: ...
    @overload
    def solve(self, vectors: Mapping[str, Tensor], damping: LayerDamping) -> Blocks: ...
    def solve(self, vectors: Any, damping: LayerDamping) -> Any:
        """(K + damping)^-1 times vectors, all layers in one grouped product to the eigenbasis and
        back.

        Args:
            vectors: [P], [P, k], {layer: [k, m, d]} or {layer: [m, d]}.
            damping: a number >= 0, "mean" (a tenth of each layer's mean eigenvalue), or either by
                layer.

        Returns:
            the form of ``vectors``.

        Raises:
            TypeError, ValueError: ``vectors`` do not fit, as in ``@``, or hold NaN or Inf;
                ``damping`` is no such number or lacks a layer; a layer's K + damping is singular.
        """
        numbers = self._numbers(damping)
        self._decompose()
        layers = list(self.layers.values())

        def inverse(blocks: list[Tensor]) -> list[Tensor]:
            return eigen_products(layers, blocks, self._inverses(numbers))

        return self._on_blocks(vectors, inverse)

    def _inverses(self, numbers: dict[str, float]) -> list[Tensor]:
        """Per layer and group 1 / (S + number) [m/g, d]."""
        key = list(numbers.values())
        if self._inverse is not None and self._inverse[0] == key:
            return self._inverse[1]
        values: list[Tensor] = []
        shifts: list[float] = []
        for name, layer in self.layers.items():
            layer._require_invertible(numbers[name], "solve", name)
            values += layer._settled[0]
            shifts += [numbers[name]] * layer.groups
        scales = foreach.inverse_shifted(values, shifts)
        if self.shape[0] <= _KEPT:
            self._inverse = key, scales
        return scales

    def power(self, p: float, damping: LayerDamping = 0.0) -> NetworkOperator:
        """(K + damping)^p of every layer, as :meth:`hesskern.KroneckerOperator.power`.

        Args:
            p: any finite number; 0 is the identity.
            damping: as in :meth:`solve`.

        Raises:
            TypeError, ValueError: an argument is no such number; a layer has a negative eigenvalue
                where p is no integer, or a zero one where p is negative.
        """
        numbers = self._numbers(damping)
        self._decompose()
        return NetworkOperator(
            {name: layer._power(p, numbers[name], name) for name, layer in self.layers.items()}
        )

    def logdet(self, damping: LayerDamping) -> float:
        """log det(K + damping), in float64.

        Args:
            damping: as in :meth:`solve`.

        Raises:
            TypeError, ValueError: ``damping`` is no such number; an eigenvalue of a layer's
                K + damping is not positive.
        """
        numbers = self._numbers(damping)
        self._decompose()
        return math.fsum(layer._logdet(numbers[name], name) for name, layer in self.layers.items())

    @overload
    def sample(
        self,
        n: int,
        damping: LayerDamping,
        generator: torch.Generator | None = None,
        *,
        blocks: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def sample(
        self,
        n: int,
        damping: LayerDamping,
        generator: torch.Generator | None = None,
        *,
        blocks: Literal[True],
    ) -> Blocks: ...
    def sample(
        self,
        n: int,
        damping: LayerDamping,
        generator: torch.Generator | None = None,
        *,
        blocks: bool = False,
    ) -> Any:
        """n draws from N(0, (K + damping)^-1), drawn layer by layer.

        Args:
            n: number of draws.
            damping: as in :meth:`solve`.
            generator: on any device; the same one gives the same draws. None: torch's own.
            blocks: whether the answer is by layer.

        Returns:
            [P, n], one draw a column; with ``blocks`` {layer: [n, m, d]}.

        Raises:
            TypeError, ValueError: an argument is no such number; an eigenvalue of a layer's
                K + damping is not positive.
        """
        numbers = self._numbers(damping)
        self._decompose()
        layers = list(self.layers.values())
        with torch.inference_mode(False), torch.no_grad():
            scales = [
                scale
                for name, layer in self.layers.items()
                for scale in layer._roots(numbers[name], "sample", name)
            ]
            left, right = eigenvectors(layers)
            drawn = ops.grouped_kron_matmul(left, right, draws(n, scales, generator))
            found = whole_layers(layers, drawn)
            if blocks:
                return dict(zip(self.layers, found, strict=True))
            return self._joined(found, False)

    def factored_inverse(self, damping: LayerDamping) -> NetworkOperator:
        """K-FAC's inverse of every layer: :meth:`hesskern.KroneckerOperator.factored_inverse`.

        Args:
            damping: as in :meth:`solve`.

        Raises:
            TypeError: a layer is no single Kronecker product.
            ValueError: as there.
        """
        numbers = self._numbers(damping)
        inverses = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, KroneckerOperator):
                raise TypeError(
                    f"factored_inverse needs Kronecker factors, but layer {name!r} is a "
                    f"{type(layer).__name__}"
                )
            inverses[name] = layer.factored_inverse(numbers[name])
        return NetworkOperator(inverses)


def _check_names(what: str, given: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Raises ValueError unless a mapping has every layer and nothing else."""
    for name in given:
        if name not in layers:
            raise ValueError(
                f"{what} must be by layer, but there is no layer {name!r}; there are "
                f"{', '.join(layers)}"
            )
    for name in layers:
        if name not in given:
            raise ValueError(f"{what} must have every layer, but lacks layer {name!r}")
