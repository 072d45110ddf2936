"""What comes after the factors, held against plain loops: EKFAC, diagonals and others."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hesskern as hk
from fuzz.reference import weight_name
from fuzz.scores import influence, joint, one_root_row, samples_alone
from fuzz.verdict import Judge

__all__ = ["CURVATURE", "kronecker", "saved_and_read"]


def kronecker(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Block diagonal matrix of the groups' Kronecker products, in float64."""
    pairs = zip(left, right, strict=True)
    return torch.block_diag(
        *(torch.kron(a.double().contiguous(), b.double().contiguous()) for a, b in pairs)
    )


def saved_and_read(result: Any, load: Callable[[Any], Any]) -> Any:
    """A result behind its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        result.save(path)
        return load(path)


def _outputs_first(order: Tensor, operator: Any) -> Tensor:
    """Entries in the order of the weight's memory as the matrix [m, d] has them."""
    if not operator.transposed:
        return order
    return order.reshape(operator.weight_shape).T.reshape(-1)


# EKFAC


def ekfac(judge: Judge, rng: random.Random) -> None:
    """Corrections along the eigenvectors that are kept: of the block in all classes."""
    options: dict[str, Any] = {"output": "exact", **joint(rng)}
    kind = rng.choice(("plain", "plain", "factors", "in parts", "float64"))
    if kind == "factors" and isinstance(judge.factors, hk.Factors):
        options = {"output": "exact", "factors": judge.factors}
    if kind == "in parts":
        options["memory_budget"] = 1
    if kind == "float64":
        options["precision"] = "float64"
    block = judge.reference.gauss_newton
    judge.call(f"ekfac {kind}", lambda E: _see_ekfac(judge, f"ekfac {kind}", E, block), **options)


def ekfac_empirical(judge: Judge, rng: random.Random) -> None:
    if not one_root_row(judge):
        return
    entry, found = "ekfac empirical", samples_alone(judge)
    if found is None:
        return
    gradients, weights = found
    block = (gradients.T * weights) @ gradients / judge.reference.count
    options = {"output": "empirical", **joint(rng)}
    judge.call(entry, lambda E: _see_ekfac(judge, entry, E, block), **options)


def _see_ekfac(judge: Judge, entry: str, E: hk.EKFAC, block: Tensor) -> None:
    judge.account(entry, list(E), E.skipped)
    biased = E.settings["bias"] == "joint"
    read = saved_and_read(E, hk.load_ekfac)
    for name, operator in E.items():
        order = judge.entries(name, biased)
        if order is None:
            judge.add(entry, name, "WRONG", "a number for a weight that has no such block")
            continue
        if name in judge.case.program.odd:
            judge.add(entry, name, "unchecked", "no reference for uses like these")
            continue
        left, right, values = operator.eigenbases
        vectors = kronecker(left, right)
        eye = torch.eye(len(vectors), dtype=torch.float64)
        error = judge.error(vectors.T @ vectors, eye, 1e-4 if judge.narrow else 1e-9)
        own = torch.cat(values).double().flatten()
        order = _outputs_first(order, operator)
        if error is None:
            rotated = vectors.T @ block[order][:, order] @ vectors
            error = judge.error(own, rotated.diagonal())
        if error is None:
            dense = vectors @ own.diag() @ vectors.T
            weights = _outputs_first(torch.arange(len(dense)), operator).argsort()
            error = judge.error(operator.to_dense(), dense[weights][:, weights])
        again = read[name].eigenbases
        if any(
            not torch.equal(a, b)
            for x, y in zip(operator.eigenbases, again, strict=True)
            for a, b in zip(x, y, strict=True)
        ):
            error = "another one behind its file"
        if abs(E.num_samples - judge.reference.count) > (1e-2 if judge.narrow else 1e-9):
            error = f"num_samples {E.num_samples}, not {judge.reference.count}"
        judge.add(entry, name, "right" if error is None else "WRONG", error or "")


# Others


def diagonals(judge: Judge, rng: random.Random) -> None:
    """Diagonal blocks of every parameter outside of layers, and of layers with many outputs."""
    limit = rng.choice((1, 2, 8192))
    entry = "kronecker_factors diagonal"

    def see(factors: hk.Factors) -> None:
        reference = judge.reference
        read = saved_and_read(factors, hk.load_factors)
        for name, found in factors.diagonals.items():
            expected = reference.gauss_newton.diagonal()[reference.slices[name]]
            error = judge.error(found.reshape(-1), expected)
            if not torch.equal(read.diagonals[name], found):
                error = "another one behind its file"
            judge.add(entry, name, "right" if error is None else "WRONG", error or "")
        for name, layer in factors.large.items():
            right = reference.layers.get(name)
            if right is None or right.output_hessian is None or right.input_covariance is None:
                judge.add(entry, name, "unchecked", "no reference for uses like these")
                continue
            error = judge.error(
                layer.output_diagonal, right.output_hessian.diagonal(), floor=1e-10
            ) or judge.error(layer.input_covariance, right.input_covariance)
            if not torch.equal(read.large[name].output_diagonal, layer.output_diagonal):
                error = "another one behind its file"
            judge.add(entry, name, "right" if error is None else "WRONG", error or "")
        judge.see_layers(entry, factors)
        _account_parameters(judge, entry, factors)

    judge.call(entry, see, diagonal=True, max_outputs=limit)


def _account_parameters(judge: Judge, entry: str, factors: hk.Factors) -> None:
    slices = {name: slice(0) for name, _ in judge.model.named_parameters(remove_duplicate=False)}
    slices.update({f"{name}.weight": slice(0) for name in judge.case.program.pruned})
    covered = {weight_name(key, slices) for key in (*factors, *factors.large)}
    alike: dict[int, list[str]] = {}
    for name, parameter in judge.model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    for name, parameter in judge.model.named_parameters():
        names = alike[id(parameter)]
        owners = [other.rpartition(".")[0] for other in names]
        keys = [*names, *owners, *(other.removesuffix("_weight") for other in names)]
        keys += [owner.partition(".parametrizations")[0] for owner in owners]
        known = any(other in covered or other in factors.diagonals for other in names)
        known = known or (name.endswith("weight_orig") and f"{owners[0]}.weight" in covered)
        if not known and not any(key in factors.skipped for key in keys):
            judge.add(entry, name, "DROPPED", "neither there nor in .skipped")


def input_covariances(judge: Judge, rng: random.Random) -> None:
    """By forward passes alone what the factors have, wherever both have it."""
    entry, bias = "input_covariances", joint(rng)

    def make() -> Any:
        function, given = judge.functions["input_covariances"], judge.case.sample_weight
        return function(judge.model, judge.data, sample_weight=given, **bias)

    def see(found: Any) -> None:
        judge.account(entry, list(found), found.skipped)
        read = saved_and_read(found, hk.load_input_covariances)
        try:
            factors = judge.made("kronecker_factors", dict(bias))
        except (ValueError, TypeError, NotImplementedError):
            factors = {}
        for name, layer in found.items():
            if not torch.equal(read[name].input_covariance, layer.input_covariance):
                judge.add(entry, name, "WRONG", "another one behind its file")
            same = name in factors and factors.num_samples == layer.num_samples
            hidden = "without gradients" in judge.case.program.features
            if not same or hidden:
                judge.add(entry, name, "unchecked", "factors of other samples, or none")
                continue
            expected = factors[name].input_covariance.double()
            error = judge.error(layer.input_covariance, expected)
            judge.add(entry, name, "right" if error is None else "WRONG", error or "")

    judge.watched(entry, make, see)


def add_factors(judge: Judge, rng: random.Random) -> None:
    """Factors of every batch by itself, added."""
    if judge.case.sample_weight is not None or len(judge.data) < 2:
        return
    entry = "add_factors"

    def make() -> hk.Factors:
        function = judge.functions["kronecker_factors"]
        options = {"diagonal": True} if rng.random() < 0.5 else {}
        loss = judge.case.loss.loss
        parts = [function(judge.model, [part], loss, **options) for part in judge.data]
        return hk.add_factors(*parts)

    judge.watched(entry, make, lambda factors: judge.see_layers(entry, factors))


CURVATURE = (
    ekfac,
    ekfac_empirical,
    influence,
    diagonals,
    input_covariances,
    add_factors,
)
"""Checks that are drawn for a case."""
