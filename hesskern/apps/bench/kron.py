"""Suite ``kron``: products with Kronecker factors, for one layer, a network, and many layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.apps.bench import cases, peers
from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.settings import Settings
from hesskern.factors.compute import kronecker_factors
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-4
_DAMPING = 1e-2
_CURVLINOPS = ("curvlinops-for-pytorch", "curvlinops")


def problems() -> list[Problem]:
    """Networks, one large layer, the eigenbasis form, and many small layers."""
    return [
        Problem("kron", "mlp", partial(_network, cases.mlp), _difference),
        Problem("kron", "cnn", partial(_network, cases.cnn), _difference),
        Problem("kron", "large", _large, _difference),
        Problem("kron", "eigenbasis", _eigenbasis, _difference),
        Problem("kron", "small-layers", _small_layers, _difference),
    ]


def _difference(result: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(
        relative_difference(a.reshape(b.shape), b) for a, b in zip(result, reference, strict=True)
    )


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


_agreeing = partial(Contender, read=_as_list, limit=_AGREEMENT)
"""A contender whose result must be the subject's."""


def _factors(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Output factors A, input factors B as curvlinops scales them, and one matrix X per layer."""
    counts = peers.positions(case)
    factors = kronecker_factors(case.model, case.batch, nn.CrossEntropyLoss())
    generator = torch.Generator().manual_seed(3)
    A = [factors[name].output_hessian * counts[name] for name in counts]
    B = [factors[name].input_covariance / counts[name] for name in counts]
    X = [torch.randn(len(a), len(b), generator=generator) for a, b in zip(A, B, strict=True)]
    return A, B, X


def _loop(A: list[Tensor], B: list[Tensor], X: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [a @ x @ b.T for a, b, x in zip(A, B, X, strict=True)]


def _network(make: Callable[[Settings], Case], settings: Settings, progress: Progress) -> Built:
    case = make(settings)
    A, B, X = _factors(case)
    shapes = [m.weight.shape for m in case.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    def curvlinops() -> Callable[[], Any]:
        operator = peers.curvlinops_kfac(case, "exact")
        _ = operator.trace
        vectors = [x.reshape(shape) for x, shape in zip(X, shapes, strict=True)]
        return lambda: operator @ vectors

    return (
        f"{case.title}: Kronecker product of all layers with one vector",
        "factors of the same samples, exact",
        [
            Contender("hesskern", lambda: partial(ops.grouped_kron_matmul, A, B, X), read=_as_list),
            _agreeing("torch, loop of A @ X @ B.T", lambda: _loop(A, B, X)),
            _agreeing("curvlinops KFAC", curvlinops, *_CURVLINOPS),
        ],
    )


def _symmetric(size: int, generator: torch.Generator) -> Tensor:
    """[size, size] positive definite, with a trace of about ``size``."""
    root = torch.randn(size, size, generator=generator)
    return root @ root.T / size


def _random(settings: Settings, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = 8 if settings.quick else 1
    generator = torch.Generator().manual_seed(4)
    A = _symmetric(m // scale, generator)
    B = _symmetric(d // scale, generator)
    return A, B, torch.randn(m // scale, d // scale, generator=generator)


def _flops(A: Tensor, B: Tensor) -> float:
    """Of A X B^T: 2 m d (m + d)."""
    m, d = len(A), len(B)
    return 2.0 * m * d * (m + d)


def _large(settings: Settings, progress: Progress) -> Built:
    A, B, X = _random(settings, 1024, 2048)
    m, d = X.shape
    left = torch.randn(m, m + d)
    right = torch.randn(m + d, d)
    return (
        f"A X B^T, A [{m}, {m}], B [{d}, {d}]",
        f"random factors; {_flops(A, B) / 1e9:.3g} GFLOP. One GEMM of as many operations stands "
        "beside it: its time is the machine's GEMM rate",
        [
            Contender("hesskern", lambda: partial(ops.kron_matmul, A, B, X), read=_as_list),
            _agreeing("torch, A @ X @ B.T", lambda: lambda: A @ X @ B.T),
            _agreeing("curvlinops KFAC", lambda: _curvlinops_with(A, B, X), *_CURVLINOPS),
            Contender(
                f"one GEMM [{m}, {m + d}] [{m + d}, {d}], as many operations",
                lambda: lambda: left @ right,
            ),
        ],
    )


def _curvlinops_operator(A: Tensor, B: Tensor) -> tuple[Any, torch.Size]:
    """Its KFAC operator of one linear layer, with given factors."""
    m, d = len(A), len(B)
    model = nn.Linear(d, m, bias=False)
    case = Case("", "", model, torch.zeros(2, d), torch.zeros(2, dtype=torch.int64))
    operator = peers.curvlinops_kfac(case, "mc")
    _ = operator.trace
    # Its only layer is the model itself, whose name is empty.
    operator._gradient_covariances[""] = A
    operator._input_covariances[""] = B
    return operator, model.weight.shape


def _curvlinops_with(A: Tensor, B: Tensor, X: Tensor) -> Callable[[], Any]:
    operator, shape = _curvlinops_operator(A, B)
    vectors = [X.reshape(shape)]
    return lambda: operator @ vectors


def _eigenbasis(settings: Settings, progress: Progress) -> Built:
    A, B, X = _random(settings, 256, 2304)
    tau, U = torch.linalg.eigh(A)
    gamma, V = torch.linalg.eigh(B)
    S = 1.0 / (torch.outer(tau, gamma) + _DAMPING)
    m, d = X.shape

    def two_products() -> Callable[[], Tensor]:
        return lambda: A @ (A @ X @ B.T) @ B.T

    def curvlinops_twice() -> Callable[[], Any]:
        operator, shape = _curvlinops_operator(A, B)
        vectors = [X.reshape(shape)]
        return lambda: operator @ (operator @ vectors)

    def curvlinops_inverse() -> Callable[[], Any]:
        from curvlinops import KFACInverseLinearOperator

        operator, shape = _curvlinops_operator(A, B)
        inverse = KFACInverseLinearOperator(operator, damping=_DAMPING, use_exact_damping=True)
        vectors = [X.reshape(shape)]
        # The first product computes the eigenbases.
        _ = inverse @ vectors
        return lambda: inverse @ vectors

    return (
        f"U (S . (U^T X V)) V^T, U [{m}, {m}], V [{d}, {d}]: (A (x) B + {_DAMPING:g} I)^-1 X",
        "random factors; two Kronecker products have as many operations, and are not the same "
        "result",
        [
            Contender(
                "hesskern", lambda: partial(ops.kron_eigen_matmul, U, S, V, X), read=_as_list
            ),
            _agreeing(
                "torch, U @ (S * (U.T @ X @ V)) @ V.T",
                lambda: lambda: U @ (S * (U.T @ X @ V)) @ V.T,
            ),
            _agreeing("curvlinops KFAC inverse, exact damping", curvlinops_inverse, *_CURVLINOPS),
            Contender("torch, two Kronecker products", two_products),
            Contender("curvlinops, two KFAC products", curvlinops_twice, *_CURVLINOPS),
        ],
    )


def _small_layers(settings: Settings, progress: Progress) -> Built:
    count, m, d = (20 if settings.quick else 200), 16, 48
    generator = torch.Generator().manual_seed(5)
    A = [_symmetric(m, generator) for _ in range(count)]
    B = [_symmetric(d, generator) for _ in range(count)]
    X = [torch.randn(m, d, generator=generator) for _ in range(count)]
    return (
        f"A X B^T of {count} layers, A [{m}, {m}], B [{d}, {d}]",
        "random factors",
        [
            Contender(
                "hesskern, grouped",
                lambda: partial(ops.grouped_kron_matmul, A, B, X),
                read=_as_list,
            ),
            _agreeing(
                "hesskern, loop",
                lambda: lambda: [ops.kron_matmul(a, b, x) for a, b, x in zip(A, B, X, strict=True)],
            ),
            _agreeing("torch, loop of A @ X @ B.T", lambda: _loop(A, B, X)),
        ],
    )
