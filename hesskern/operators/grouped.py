"""Products of many layers' operators, all groups of all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.kronecker import KroneckerOperator

__all__ = ["eigen_products", "eigenvectors", "kronecker_products", "whole_layers"]


def whole_layers(layers: Sequence[EigenbasisOperator], parts: Sequence[Tensor]) -> list[Tensor]:
    """Per layer [k, m, d] of its groups' [k, m/g, d]."""
    rest = iter(parts)
    whole = []
    for layer in layers:
        own = [next(rest) for _ in range(layer.groups)]
        whole.append(own[0] if layer.groups == 1 else torch.cat(own, 1))
    return whole


def cut_in_groups(layers: Sequence[EigenbasisOperator], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Every layer's groups [k, m/g, d], one after the other."""
    return [
        part
        for layer, block in zip(layers, blocks, strict=True)
        for part in ([block] if layer.groups == 1 else layer._blocks(block))
    ]


def eigenvectors(layers: Sequence[EigenbasisOperator]) -> tuple[list[Tensor], list[Tensor]]:
    """U and V of every layer's groups, one after the other."""
    bases = [layer.eigenbases for layer in layers]
    return [u for left, _, _ in bases for u in left], [v for _, right, _ in bases for v in right]


def kronecker_products(
    layers: Sequence[EigenbasisOperator], blocks: Sequence[Tensor]
) -> list[Tensor]:
    left, right = [], []
    for layer in layers:
        assert isinstance(layer, KroneckerOperator)
        left += layer.factors[0]
        right += layer.factors[1]
    return whole_layers(layers, ops.grouped_kron_matmul(left, right, cut_in_groups(layers, blocks)))


def eigen_products(
    layers: Sequence[EigenbasisOperator],
    blocks: Sequence[Tensor],
    scales: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """U (scale . (U^T X V)) V^T of every layer, by its eigenvalues where there is no scale."""
    left, right = eigenvectors(layers)
    if scales is None:
        scales = [s for layer in layers for s in layer.eigenbases[2]]
    parts = ops.grouped_kron_eigen_matmul(left, scales, right, cut_in_groups(layers, blocks))
    return whole_layers(layers, parts)
