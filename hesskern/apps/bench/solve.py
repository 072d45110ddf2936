"""Suite ``solve``: vectors times all layers' damped inverse Kronecker products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from hesskern import ops
from hesskern.apps.bench import cases, language, streams
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.machine import installed_version
from hesskern.apps.bench.settings import Settings
from hesskern.apps.bench.streams import Stream
from hesskern.factors.compute import kronecker_factors
from hesskern.operators.network import NetworkOperator
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-4


def problems() -> list[Problem]:
    """One vector and eight, for all layers of a convolutional network and of a GPT-2."""
    networks: dict[str, Callable[[Settings], Stream]] = {
        "resnet18": lambda settings: streams.images(
            cases.resnet18(settings), 8 if settings.quick else 64
        )
    }
    if installed_version("transformers") is not None:
        networks["gpt2"] = lambda settings: streams.text(language.gpt2(settings))
    return [
        Problem("solve", f"{name}-{count}", partial(_build, make, count), _difference)
        for name, make in networks.items()
        for count in (1, 8)
    ]


def _build(
    make: Callable[[Settings], Stream], count: int, settings: Settings, progress: Progress
) -> Built:
    stream = make(settings)
    factors = kronecker_factors(
        stream.model, stream.batches[:2], stream.loss, list(stream.names), "mc"
    )
    operator: NetworkOperator = factors.operator()
    damping = {name: 0.1 * K.trace() / K.shape[0] for name, K in operator.layers.items()}
    generator = torch.Generator().manual_seed(3)
    vectors = {
        name: torch.randn(count, *K.layer_shape, generator=generator)
        for name, K in operator.layers.items()
    }
    flat = torch.randn(operator.shape[0], count, generator=generator)
    left, right, kept, shown = [], [], [], []
    for name, K in operator.layers.items():
        (u,), (v,), (values,) = K.eigenbases
        left.append(u)
        right.append(v)
        kept.append(1.0 / (values + damping[name]))
        shown.append(vectors[name])
    turned = [u.T.contiguous() for u in left], [v.T.contiguous() for v in right]

    def two_products() -> list[Tensor]:
        return ops.grouped_kron_matmul(left, right, ops.grouped_kron_matmul(*turned, shown))

    def loop() -> list[Tensor]:
        return [
            u @ (s * (u.T @ x @ v)) @ v.T
            for u, v, s, x in zip(left, right, kept, shown, strict=True)
        ]

    listed = [
        Contender("hesskern", lambda: lambda: operator.solve(vectors, damping), read=_matrices),
        Contender("hesskern, flat vectors", lambda: lambda: operator.solve(flat, damping)),
        Contender(
            "hesskern, the kernel alone",
            lambda: lambda: ops.grouped_kron_eigen_matmul(left, kept, right, shown),
            read=list,
            limit=_AGREEMENT,
        ),
        Contender("two grouped Kronecker products", lambda: two_products),
        Contender("torch, loop", lambda: loop, read=list, limit=_AGREEMENT),
    ]
    return (
        f"{stream.title}: (K + damping)^-1 of all {len(left)} layers, "
        f"{count} vector{'s' if count > 1 else ''}",
        "Kronecker factors of drawn targets, two batches; eigendecompositions made before; damping "
        "a tenth of each layer's mean eigenvalue",
        listed,
    )


def _matrices(result: Mapping[str, Tensor]) -> list[Tensor]:
    return list(result.values())


def _difference(result: list[Tensor], reference: list[Tensor]) -> float:
    return max(relative_difference(a, b) for a, b in zip(result, reference, strict=True))
