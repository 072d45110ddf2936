"""Algebra on factors and EKFAC, and K-FAC's step, held against dense float64 matrices."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hesskern as hk
from fuzz.curvature import kronecker
from fuzz.verdict import Judge

__all__ = ["ALGEBRA"]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def network_of_factors(judge: Judge, rng: random.Random) -> None:
    if isinstance(judge.factors, hk.Factors):
        _Algebra(judge, rng, "factors", judge.factors, _dense_of_factors).run()


def network_of_ekfac(judge: Judge, rng: random.Random) -> None:
    try:
        E = judge.made("ekfac", {"output": "exact"})
    except (ValueError, TypeError, NotImplementedError):
        # Looked at elsewhere.
        return
    _Algebra(judge, rng, "ekfac", E, _dense_of_ekfac).run()


def _dense_of_factors(f: hk.LayerFactors) -> tuple[Tensor, tuple[int, int], bool]:
    """[m d, m d] output first, (m, d), and whether the weight is kept as [d, m]."""
    A, B = f.output_hessian, f.input_covariance
    right = list(B) if B.dim() == 3 else [B]
    step = len(A) // len(right)
    left = [A[i * step : (i + 1) * step, i * step : (i + 1) * step] for i in range(len(right))]
    return kronecker(left, right), (len(A), B.shape[-1]), f.spec.transposed


def _dense_of_ekfac(E: Any) -> tuple[Tensor, tuple[int, int], bool]:
    left, right, values = E.eigenbases
    vectors = kronecker(left, right)
    own = torch.cat([s.double() for s in values]).flatten()
    return vectors @ own.diag() @ vectors.T, E.layer_shape, E.transposed


def _singular(layer: Any) -> bool:
    """Whether an eigenvalue is zero to the last digit."""
    if isinstance(layer, hk.KroneckerOperator):
        found = [torch.linalg.eigvalsh(factor) for side in layer.factors for factor in side]
    else:
        found = [s.flatten() for s in layer.eigenbases[2]]
    eps = torch.finfo(layer.dtype).eps
    return any(float(own.abs().min()) <= 0.25 * eps * float(own.abs().max()) for own in found)


class _Algebra:
    """One network's operator beside the dense matrix."""

    def __init__(
        self, judge: Judge, rng: random.Random, what: str, K: Any, dense_of: Callable[..., Any]
    ) -> None:
        self.judge, self.rng, self.K = judge, rng, K
        self.entry = f"operator of {what}"
        self.order = rng.choice(("weight", "output"))
        self.parts = {name: dense_of(layer) for name, layer in K.items()}
        turned = [self._turned(*part) for part in self.parts.values()]
        self.dense = torch.block_diag(*turned)
        self.sizes = [len(part) for part in turned]
        self.source = torch.Generator().manual_seed(rng.getrandbits(31))

    def _turned(self, dense: Tensor, shape: tuple[int, int], transposed: bool) -> Tensor:
        if not transposed or self.order == "output":
            return dense
        m, d = shape
        order = torch.arange(m * d).reshape(m, d).T.reshape(-1)
        return dense[order][:, order]

    def run(self) -> None:
        self.judge.watched(self.entry, lambda: self.K.operator(self.order), self._see)

    def _same(self, what: str, actual: Tensor, expected: Tensor, loose: float = 1.0) -> None:
        limit = loose * (2e-3 if self.judge.narrow else 1e-8)
        error = self.judge.error(actual, expected, limit)
        self.judge.add(self.entry, what, "right" if error is None else "WRONG", error or "")

    def _refused(self, what: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except ValueError:
            self.judge.add(self.entry, what, "right")
            return
        self.judge.add(self.entry, what, "WRONG", "an answer for a singular matrix")

    def _see(self, op: Any) -> None:
        P, dense = len(self.dense), self.dense
        # Of one matrix of some layers' own dtypes.
        single = any(layer.dtype != op.dtype for layer in op.layers.values())
        if single:
            self.judge.add(self.entry, "*", "unchecked", "layers in several dtypes")
            return
        vectors = torch.randn(P, 3, generator=self.source, dtype=torch.float64).to(op.dtype)
        wide = vectors.double()
        self._same("to_dense", op.to_dense(), dense)
        self._same("@", op @ vectors, dense @ wide)
        self._same("@ one", op @ vectors[:, 0], dense @ wide[:, 0])
        self._same("diagonal", op.diagonal(), dense.diagonal())
        self._same("trace", _number(op.trace()), dense.trace())
        blocks = op.split(vectors)
        self._same("flat", op.flat(blocks), wide)
        self._same("@ blocks", op.flat(op @ blocks), dense @ wide)
        self._see_by_layer(blocks, wide)
        self._see_sums(op, vectors)
        values = torch.linalg.eigvalsh(dense)
        if any(_singular(layer) for layer in op.layers.values()):
            zero = 0.0
            self._refused("solve singular", lambda: op.solve(vectors, zero))
            self._refused("logdet singular", lambda: op.logdet(zero))
        damping, added = self._damping()
        whole = dense + added.diag()
        loose = max(1.0, float(values[-1]) / float(added.min()) * 1e-3)
        self._same("solve", op.solve(vectors, damping), torch.linalg.solve(whole, wide), loose)
        solved = op.flat(op.solve(blocks, damping))
        self._same("solve blocks", solved, torch.linalg.solve(whole, wide), loose)
        self._same("logdet", _number(op.logdet(damping)), whole.logdet(), loose)
        eigen, U = torch.linalg.eigh(whole)
        for p in (-0.5, 0.5, -1.0, 2.0, 0.0):
            expected = U @ eigen.pow(p).diag() @ U.T @ wide
            self._same(f"power({p})", op.power(p, damping) @ vectors, expected, loose)
        draws = 4000
        z = op.sample(draws, damping, torch.Generator().manual_seed(self.rng.getrandbits(31)))
        white = torch.linalg.cholesky(whole).T @ z.double()
        off = (white @ white.T / draws - torch.eye(P, dtype=torch.float64)).abs()
        # Seven standard errors.
        bad = float(off.max()) > 7 * (2 / draws) ** 0.5
        detail = f"covariance off by {float(off.max()):.3g}" if bad else ""
        self.judge.add(self.entry, "sample", "WRONG" if bad else "right", detail)

    def _see_by_layer(self, blocks: dict[str, Tensor], wide: Tensor) -> None:
        """Blocks are output first always."""
        begin = 0
        for name, (dense, (m, d), transposed) in self.parts.items():
            own = wide[begin : begin + m * d].T
            begin += m * d
            turned = transposed and self.order == "weight"
            block = own.reshape(-1, d, m).mT if turned else own.reshape(-1, m, d)
            self._same(f"split {name}", blocks[name], block)
            if self.judge.error(blocks[name], block) is None:
                operator = self.K[name]
                if isinstance(operator, hk.LayerFactors):
                    operator = operator.operator("output")
                    rows = blocks[name].flatten(1).T
                    self._same(f"layer {name}", operator @ rows, dense @ rows.double())

    def _see_sums(self, op: Any, vectors: Tensor) -> None:
        total = 2 * op - 0.5 * (op + op.power(1.0))
        self._same("sum", total @ vectors, self.dense @ vectors.double())
        self._same("sum dense", total.to_dense(), self.dense)
        self._same("sum trace", _number(total.trace()), self.dense.trace())
        self._same("sum diagonal", total.diagonal(), self.dense.diagonal())
        self._same("negative", -op @ vectors, -self.dense @ vectors.double())

    def _damping(self) -> tuple[Any, Tensor]:
        """What is passed, and what it adds to the diagonal."""
        positive = all(float(dense.trace()) > 0 for dense, *_ in self.parts.values())
        means = [0.1 * float(dense.trace()) / len(dense) for dense, *_ in self.parts.values()]
        kind = self.rng.choice(("number", "mean", "layers") if positive else ("number",))
        if kind == "number":
            numbers: list[float] = [0.5] * len(means)
            damping: Any = 0.5
        elif kind == "mean":
            numbers, damping = means, "mean"
        else:
            chosen = [self.rng.choice(("mean", 0.3, 1.0)) for _ in means]
            damping = dict(zip(self.parts, chosen, strict=True))
            numbers = [
                mean if own == "mean" else own for mean, own in zip(means, chosen, strict=True)
            ]
        added = [
            torch.full((size,), number, dtype=torch.float64)
            for size, number in zip(self.sizes, numbers, strict=True)
        ]
        return damping, torch.cat(added)


_KINDS = ("Linear", "SubLinear", "Conv1D", "Conv1d", "Conv2d")


def kfac(judge: Judge, rng: random.Random) -> None:
    """One step from random gradients, against the factors of the batch."""
    case = judge.case
    number = rng.randrange(len(judge.data))
    element = judge.data[number]
    weight = element[2] if len(element) == 3 else None
    bias = rng.choice(("joint", "none"))
    clip = rng.choice((None, 1e-2))
    damping: Any = 0.3
    try:
        function = judge.functions["kronecker_factors"]
        factors = function(judge.model, [element], case.loss.loss, bias=bias)
    except (ValueError, TypeError, NotImplementedError):
        return
    model = case.model()
    source = torch.Generator().manual_seed(case.values)
    for p in model.parameters():
        if p.requires_grad and not p.is_complex():
            p.grad = torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.dtype)
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_complex()]
    if not trained:
        return
    optimizer = torch.optim.SGD(trained, lr=0.5)
    before = {
        n: None if p.grad is None else p.grad.clone().double() for n, p in model.named_parameters()
    }

    def make() -> Any:
        preconditioner = hk.optim.KFAC(
            model,
            optimizer,
            case.loss.loss,
            output="exact",
            damping=damping,
            decay=0.9,
            kl_clip=clip,
            bias=bias,
        )
        preconditioner.step(element[0], element[1], weight)
        return preconditioner

    def see(preconditioner: Any) -> None:
        entry = "optim.KFAC"
        expected = dict(before)
        products: dict[str, Tensor] = {}
        inner = 0.0
        modules = dict(model.named_modules())
        for name in preconditioner.layers:
            module = modules.get(name)
            if type(module).__name__ not in _KINDS or name not in factors:
                judge.add(entry, name, "unchecked", "a weight inside of another module")
                return
            f = factors[name]
            assert module is not None
            shape = module.weight.shape
            V = before[f"{name}.weight"]
            assert V is not None
            V = V.T if f.spec.transposed else V.flatten(1)
            trained_bias = f.spec.joint and before.get(f"{name}.bias") is not None
            if trained_bias:
                V = torch.cat([V, before[f"{name}.bias"][:, None]], 1)
            product = _factored(f, V, damping, trained_bias)
            inner += 0.25 * float((product * V).sum())
            own = product[:, :-1] if trained_bias else product
            products[f"{name}.weight"] = own.T if f.spec.transposed else own.reshape(shape)
            if trained_bias:
                products[f"{name}.bias"] = product[:, -1]
        scale = 1.0 if clip is None or not inner > 0 else min(1.0, (clip / inner) ** 0.5)
        expected.update({name: scale * product for name, product in products.items()})
        for name, p in model.named_parameters():
            old = expected[name]
            if old is None:
                continue
            assert p.grad is not None
            error = judge.error(p.grad, old, 1e-8)
            judge.add(entry, name, "right" if error is None else "WRONG", error or "")
        for name in factors:
            if name not in preconditioner.layers and name not in preconditioner.skipped:
                judge.add(entry, name, "DROPPED", "neither there nor in .skipped")

    judge.watched("optim.KFAC", make, see)


def _factored(f: hk.LayerFactors, V: Tensor, damping: float, joint: bool) -> Tensor:
    """(A + pi sqrt(damping))^-1 V (B + sqrt(damping) / pi)^-1, group by group."""
    A, B = f.output_hessian.double(), f.input_covariance.double()
    if f.spec.joint and not joint:
        B = B[..., :-1, :-1]
    right = list(B) if B.dim() == 3 else [B]
    step = len(A) // len(right)
    parts = []
    for i, b in enumerate(right):
        part = slice(i * step, (i + 1) * step)
        a = A[part, part]
        means = float(a.trace()) / len(a), float(b.trace()) / len(b)
        pi = (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0
        left = a + pi * damping**0.5 * torch.eye(len(a), dtype=torch.float64)
        other = b + damping**0.5 / pi * torch.eye(len(b), dtype=torch.float64)
        parts.append(torch.linalg.solve(left, V[part]) @ torch.linalg.inv(other))
    return torch.cat(parts)


ALGEBRA = (network_of_factors, network_of_ekfac, kfac)
"""Checks that are drawn for a case."""
