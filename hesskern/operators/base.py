"""Curvature operators: symmetric matrices known by their products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesskern import ops
from hesskern.passes.batches import Batch, batches, check_iterable, no_samples
from hesskern.passes.checks import Checks
from hesskern.passes.forward_pass import (
    check_repeatable,
    frozen_eval,
    model_device,
    random_state,
)
from hesskern.passes.losses import resolve_loss
from hesskern.passes.roots import checked_targets, sample_weights
from hesskern.portable import Portable
from hesskern.progress import Progress, reporter

if TYPE_CHECKING:
    from hesskern.solvers.result import EigenResult

__all__ = [
    "AutogradHessian",
    "CurvatureOperator",
    "EigenbasisOperator",
    "KroneckerOperator",
    "LayerOperator",
]


class CurvatureOperator(ABC):
    """A symmetric [P, P] matrix: ``H @ v`` for v [P], ``H @ V`` for a block V [P, k].

    Attributes:
        shape: (P, P).
        dtype, device: of the vectors it takes and gives.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def _matmul(self, block: Tensor) -> Tensor:
        """Product with rows: block [k, P] -> [k, P], matrices [m, d] output first."""

    def _inward(self, rows: Tensor) -> Tensor:
        """[k, P] output first of rows in the order of the weight's memory."""
        return rows

    def _outward(self, rows: Tensor) -> Tensor:
        """[k, P] in the order of the weight's memory of rows output first."""
        return rows

    def _outward_matrix(self, matrix: Tensor) -> Tensor:
        """[P, P] with both axes in the order of the weight's memory."""
        return self._outward(self._outward(matrix).T).T

    @abstractmethod
    def trace(self) -> float:
        """Sum of the eigenvalues."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """[P] diagonal."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with one vector [P] or a block [P, k].

        Raises:
            TypeError: ``vectors`` is not a tensor, or of another dtype.
            ValueError: its shape or device do not fit.
        """
        if not isinstance(vectors, Tensor):
            raise TypeError(f"vectors must be a tensor, got {type(vectors).__name__}")
        size = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"vectors must be [{size}] or [{size}, k], got {list(vectors.shape)}")
        if vectors.dtype != self.dtype:
            raise TypeError(f"vectors must be {self.dtype}, got {vectors.dtype}")
        if vectors.device != self.device:
            raise ValueError(f"vectors must be on {self.device}, got {vectors.device}")
        with torch.inference_mode(False), torch.no_grad():
            if vectors.is_inference():
                vectors = vectors.clone()
            if vectors.dim() == 1:
                return self._outward(self._matmul(self._inward(vectors.unsqueeze(0))))[0]
            return self._outward(self._matmul(self._inward(vectors.T.contiguous()))).T

    def to_dense(self) -> Tensor:
        """[P, P]; for small layers."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        dense = self @ eye
        return (dense + dense.T) / 2

    def to_scipy(self) -> sparse.LinearOperator:
        """The same operator for ``scipy.sparse.linalg``."""

        def product(array: np.ndarray) -> np.ndarray:
            flat = array.reshape(self.shape[0], -1)
            vectors = torch.as_tensor(flat.copy(), dtype=self.dtype, device=self.device)
            return (self @ vectors).cpu().numpy().reshape(array.shape)

        numpy_dtype = np.float64 if self.dtype == torch.float64 else np.float32
        return sparse.LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=product, dtype=numpy_dtype
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype})"


class LayerOperator(CurvatureOperator):
    """A symmetric matrix over one layer's weight.

    Attributes:
        layer_shape: (m, d) of the weight as a matrix.
        transposed: whether the weight is kept as [d, m], and flat vectors with it.
    """

    layer_shape: tuple[int, int]
    transposed: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(m, d), or (d, m) if transposed: vectors are such matrices, flattened."""
        m, d = self.layer_shape
        return (d, m) if self.transposed else (m, d)

    def _inward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, self.weight_shape)

    def _outward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, self.layer_shape)

    def _turned(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        return rows.unflatten(-1, shape).mT.flatten(-2) if self.transposed else rows


class EigenbasisOperator(LayerOperator):
    """A symmetric matrix that is diagonal in a Kronecker eigenbasis u_i (x) v_j.

    Attributes:
        layer_shape: (m, d); vectors are such matrices, flattened.
        groups: with groups the matrix is block diagonal.
    """

    groups: int

    @property
    @abstractmethod
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: U [m/g, m/g] and V [d, d], orthogonal, and the eigenvalues S [m/g, d]."""

    def squared_norm(self) -> float:
        """The squared Frobenius norm, the sum of S²."""
        return sum(float(s.double().square().sum()) for s in self.eigenbases[2])

    def _blocks(self, block: Tensor) -> list[Tensor]:
        """[k, P] -> per group [k, m/g, d]."""
        m, d = self.layer_shape
        shaped = block.reshape(len(block), self.groups, m // self.groups, d)
        return list(shaped.unbind(1))

    @staticmethod
    def _joined(blocks: list[Tensor]) -> Tensor:
        return torch.stack(blocks, 1).flatten(1)

    def eigsh(self, k: int) -> EigenResult:
        """The k largest eigenpairs: the largest entries of S, u (x) v.

        Raises:
            ValueError: k is not in [1, P].
        """
        from hesskern.solvers.result import EigenResult

        if not 1 <= k <= self.shape[0]:
            raise ValueError(f"k must lie in [1, {self.shape[0]}], got {k}")
        left, right, products = self.eigenbases
        flat = torch.cat([s.flatten() for s in products])
        values, index = flat.topk(k)
        m, d = left[0].shape[0], right[0].shape[0]
        group = index // (m * d)
        row, column = index % (m * d) // d, index % d
        u = torch.stack(left)[group, :, row]
        v = torch.stack(right)[group, :, column]
        vectors = torch.zeros(k, self.groups, m, d, dtype=self.dtype, device=self.device)
        vectors[torch.arange(k, device=self.device), group] = u.unsqueeze(2) * v.unsqueeze(1)
        vectors = self._outward(vectors.flatten(1)).T
        scale = flat.abs().max().clamp(min=torch.finfo(self.dtype).tiny)
        residuals = (self @ vectors - vectors * values).norm(dim=0) / scale
        return EigenResult(values, vectors, residuals, True, 0)

    def solve_shifted(self, vectors: Tensor, shifts: Tensor, floor: float = 1e-3) -> Tensor:
        """(K - shift_j I)^-1 vectors_j in K's eigenbasis, guarded away from its poles.

        Args:
            vectors: [P, k].
            shifts: [k].
            floor: differences smaller than ``floor * |shift|`` are moved out to it, sign kept; for
                shifts near zero |shift| counts as the rounding of K's largest eigenvalue.

        Returns:
            [P, k].
        """
        left, right, products = self.eigenbases
        blocks = self._blocks(self._inward(vectors.T.contiguous()))
        theta = shifts.to(self.dtype).reshape(-1, 1, 1)
        info = torch.finfo(self.dtype)
        largest = torch.stack([s.abs().max() for s in products]).max()
        gap = (floor * torch.maximum(theta.abs(), info.eps * largest)).clamp(min=info.tiny)
        rotated = ops.grouped_kron_matmul([u.T for u in left], [v.T for v in right], blocks)
        scaled = []
        for y, s in zip(rotated, products, strict=True):
            difference = s - theta
            sign = torch.where(difference >= 0, 1.0, -1.0).to(self.dtype)
            scaled.append(y / (sign * torch.maximum(difference.abs(), gap)))
        return self._outward(self._joined(ops.grouped_kron_matmul(left, right, scaled))).T


class KroneckerOperator(EigenbasisOperator):
    """A (x) B, row-major: vectors are matrices [m, d] flattened, and K vec(X) = vec(A X B^T).

    With groups K is block diagonal: block i is A_ii (x) B_i, A_ii the i-th diagonal block of A.

    Args:
        A: [m, m] symmetric, e.g. the output Hessian.
        B: [d, d] symmetric, e.g. the input covariance; or [g, d, d].
        transposed: whether vectors are matrices [d, m] flattened, as the weight is kept: the matrix
            is then B (x) A.

    Raises:
        TypeError: a factor is not a tensor.
        ValueError: a factor is not square, dtypes or devices differ, or g does not divide m.
    """

    def __init__(self, A: Tensor, B: Tensor, *, transposed: bool = False) -> None:
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(factor).__name__}")
        if A.dim() != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"A must be [m, m], got {list(A.shape)}")
        if B.dim() not in (2, 3) or B.shape[-1] != B.shape[-2]:
            raise ValueError(f"B must be [d, d] or [g, d, d], got {list(B.shape)}")
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"A and B must agree in dtype and device, got {A.dtype} on {A.device} and "
                f"{B.dtype} on {B.device}"
            )
        groups = B.shape[0] if B.dim() == 3 else 1
        if A.shape[0] % groups:
            raise ValueError(f"B has {groups} groups, which do not divide m = {A.shape[0]}")
        self.A, self.B = A, B
        self.groups = groups
        self.transposed = transposed
        self.layer_shape = (A.shape[0], B.shape[-1])
        size = A.shape[0] * B.shape[-1]
        self.shape = (size, size)
        self.dtype, self.device = A.dtype, A.device
        self._cut()

    def _cut(self) -> None:
        """The factors of every group, in the memory of A and B."""
        step = self.A.shape[0] // self.groups
        self._left = [
            self.A[i * step : (i + 1) * step, i * step : (i + 1) * step] for i in range(self.groups)
        ]
        self._right = list(self.B) if self.B.dim() == 3 else [self.B]

    def __getstate__(self) -> dict[str, Any]:
        # Every view would take the whole of its factor with it.
        return {k: v for k, v in self.__dict__.items() if k not in ("_left", "_right")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cut()

    def of_rows(self, rows: Tensor) -> Tensor:
        """[k, P] products with rows [k, P] of matrices [m, d], output first whatever the weight."""
        return self._matmul(rows)

    def _matmul(self, block: Tensor) -> Tensor:
        return self._joined(ops.grouped_kron_matmul(self._left, self._right, self._blocks(block)))

    @cached_property
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: eigenvectors U [m/g, m/g] of A and V [d, d] of B, and the products of their
        eigenvalues S [m/g, d]; ascending along both axes."""
        left, right, values = [], [], []
        for a, b in zip(self._left, self._right, strict=True):
            tau, u = torch.linalg.eigh(a.double())
            gamma, v = torch.linalg.eigh(b.double())
            left.append(u.to(self.dtype))
            right.append(v.to(self.dtype))
            values.append(torch.outer(tau, gamma).to(self.dtype))
        return left, right, values

    def trace(self) -> float:
        return float(
            sum(
                a.diagonal().double().sum() * b.diagonal().double().sum()
                for a, b in zip(self._left, self._right, strict=True)
            )
        )

    def squared_norm(self) -> float:
        """‖A (x) B‖_F² = ‖A‖_F² ‖B‖_F², summed over groups."""
        return float(
            sum(
                a.double().square().sum() * b.double().square().sum()
                for a, b in zip(self._left, self._right, strict=True)
            )
        )

    def diagonal(self) -> Tensor:
        parts = [
            torch.outer(a.diagonal(), b.diagonal()).flatten()
            for a, b in zip(self._left, self._right, strict=True)
        ]
        return self._outward(torch.cat(parts))

    def to_dense(self) -> Tensor:
        pairs = zip(self._left, self._right, strict=True)
        return self._outward_matrix(torch.block_diag(*(torch.kron(a, b) for a, b in pairs)))


class AutogradHessian(Portable, CurvatureOperator):
    """The Hessian of the mean loss in chosen parameters, by double backward passes.

    The reference for everything else here, and the way for layers followed by smooth activations.

    Args:
        model: runs in eval mode and comes back as it was.
        data: re-iterable of (inputs, targets) or (inputs, targets, weight [N]).
        loss: as in :func:`hesskern.kronecker_factors`; an object with ``output_root`` also needs
            ``per_sample(outputs, targets) -> [N]``.
        params: names from ``model.named_parameters()``; None for all real ones. P counts their
            entries, concatenated in this order.
        sample_weight: [total samples].
        progress: True for a bar per product, or a callback.

    Attributes:
        params: the names that P counts.
        skipped: complex parameters and those of integers, with the reason.

    Raises:
        TypeError: ``model`` is not a module, or ``data`` not iterable.
        ValueError: a name is unknown, or the data is empty or can be iterated only once. At a
            product: the outputs are random, or a parameter's module runs under no_grad() alone.
        NotImplementedError: a parameter is complex or of integers. At a product: the model holds an
            operation without a second derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss: Any = None,
        params: Iterable[str] | None = None,
        *,
        sample_weight: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_iterable(data)
        known = dict(model.named_parameters())
        if isinstance(params, str):
            params = [params]
        real = [name for name, parameter in known.items() if parameter.is_floating_point()]
        self.params = real if params is None else list(params)
        self.skipped = {
            name: f"is {known[name].dtype}, in which a loss has no Hessian of this form"
            for name in known.keys() - set(real)
        }
        for name in self.params:
            if name not in known:
                raise ValueError(
                    f"params: the model has no parameter {name!r}; it has {', '.join(known)}"
                )
        if not self.params:
            raise ValueError("params must name at least one parameter")
        if isinstance(data, Iterator):
            raise ValueError("data must be re-iterable (a DataLoader or a list), got an iterator")
        self._model, self._data, self._loss = model, data, resolve_loss(loss)
        self._sample_weight, self._progress = sample_weight, reporter(progress)
        self._bar = progress is True
        self._parameters = [known[name] for name in self.params]
        for name, parameter in zip(self.params, self._parameters, strict=True):
            if not parameter.is_floating_point():
                raise NotImplementedError(
                    f"params: {name!r} is {parameter.dtype}; a Hessian is defined for real "
                    "floating-point parameters"
                )
        size = sum(p.numel() for p in self._parameters)
        self.shape = (size, size)
        self.dtype, self.device = self._parameters[0].dtype, self._parameters[0].device

    def _given(self) -> dict[str, Any]:
        return {"model": self._model, "data": self._data, "loss": self._loss}

    def _about(self) -> str:
        return "an AutogradHessian, which runs the model at every product,"

    def _state(self) -> dict[str, Any]:
        # A bar on the terminal, or a callback, stays with the one it was made for.
        return {**super()._state(), "_progress": reporter(self._bar)}

    def _matmul(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        total_weight: float | Tensor = 0.0
        # Fused attention has no second derivative; its plain form has.
        with (
            Checks() as checks,
            frozen_eval(self._model, self._parameters),
            sdpa_kernel(SDPBackend.MATH),
            _GradientModes(self._model, self.params) as modes,
        ):
            for batch in batches(
                self._data,
                model_device(self._model),
                self._sample_weight,
                self._progress,
                "Autograd Hessian",
                self._loss.split_batch,
            ):
                outputs = self._outputs(batch)
                targets = checked_targets(self._loss, outputs, batch, checks)
                losses = self._loss.per_sample(outputs, targets)
                weight, batch_weight = sample_weights(batch, outputs, self._loss, checks)
                checks.close()
                total_weight = total_weight + batch_weight
                loss = losses.sum() if weight is None else (losses * weight).sum()
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    loss,
                    self._parameters,
                    create_graph=True,
                    materialize_grads=True,
                )
                flat = torch.cat([g.reshape(-1) for g in gradients])
                if not flat.requires_grad:
                    continue
                for j, vector in enumerate(block):
                    total[j] += self._again(flat, vector, keep=j < len(block) - 1)
            modes.check()
        count = float(total_weight)
        if count == 0:
            raise no_samples()
        return total / count

    def _outputs(self, batch: Batch) -> Tensor:
        """[N, ...] of the model; refused if they or their derivatives are random."""
        before = random_state(self.device)
        outputs = self._loss.run(self._model, batch.inputs)
        if random_state(self.device) != before:

            def values(outputs: Tensor) -> list[Tensor]:
                first = outputs.detach()
                if not outputs.requires_grad:
                    return [first]
                return [
                    first,
                    *torch.autograd.grad(
                        outputs.sum(), self._parameters, retain_graph=True, materialize_grads=True
                    ),
                ]

            check_repeatable(
                values(outputs),
                lambda: values(self._loss.run(self._model, batch.inputs)),
                batch.index,
            )
        return outputs

    def _again(self, gradient: Tensor, vector: Tensor, keep: bool) -> Tensor:
        """[P] derivative of <gradient, vector>, both [P]."""
        try:
            products = torch.autograd.grad(
                gradient,
                self._parameters,
                grad_outputs=vector,
                retain_graph=keep,
                materialize_grads=True,
            )
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            raise NotImplementedError(
                "model holds an operation that torch cannot differentiate twice "
                f"({str(error).splitlines()[0]}); layer_hessians needs its first derivative alone"
            ) from error
        return torch.cat([p.reshape(-1) for p in products])

    def trace(self) -> float:
        """Exact, by P products; for small models."""
        return float(self.to_dense().diagonal().double().sum())

    def diagonal(self) -> Tensor:
        """[P], exact, by P products; for small models."""
        return self.to_dense().diagonal().clone()


class _GradientModes:
    """Which parameters belong to modules that run without gradients, inside a ``with`` block."""

    def __init__(self, model: nn.Module, params: list[str]) -> None:
        self._modules = dict(model.named_modules())
        self._params = params
        self._with: set[str] = set()
        self._without: set[str] = set()

    def __enter__(self) -> _GradientModes:
        self._handles = [
            self._modules[owner].register_forward_pre_hook(self._hook(owner))
            for owner in {name.rpartition(".")[0] for name in self._params}
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, owner: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            (self._with if torch.is_grad_enabled() else self._without).add(owner)

        return hook

    def check(self) -> None:
        """Refuses parameters on which the outputs depend in a way that autograd never sees.

        Raises:
            ValueError: naming the first of them.
        """
        for name in self._params:
            owner = name.rpartition(".")[0]
            if owner in self._without and owner not in self._with:
                raise ValueError(
                    f"params: {name!r} belongs to a module that runs under torch.no_grad() inside "
                    "the model, so autograd has no Hessian in it"
                )
