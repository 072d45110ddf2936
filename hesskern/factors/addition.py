"""Kronecker factors of several data sets, made apart, as those of all data together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesskern.factors.large_layers import LargeLayerFactors
from hesskern.factors.result import Factors, LayerFactors

__all__ = ["add_factors"]

# How sure it is which rows belong to which samples, from the surest.
_CHECKED = ("graph", "probe", "not checked", "switched off")


def add_factors(*factors: Factors) -> Factors:
    """Adds output Hessians with output Hessians and input covariances with input covariances.

    All are means, so each counts with what it is a mean of: with N_i samples (``num_samples``, in
    which sample weights count) and P_i positions per sample of a layer,

        B = sum_i N_i B_i / sum_i N_i,    A = sum_i N_i P_i A_i / sum_i N_i P_i,

    B = E[x x^T] and A = E[M]: the factors that one pass over all the data together would give,
    output drawn ("mc") or not. laplace-torch (``KronLaplace.fit(override=False)``) adds its Kron
    in the same way: its output factors are sums over samples and are added as they are, its input
    factors are means and are weighted by their share of the samples; what it arrives at is
    ``num_samples`` times the operator of these factors.

    This is no sum of matrices: sum_i N_i A_i (x) B_i has as many Kronecker products as there are
    summands. Where that is meant, add operators (``f.operator() + g.operator()``).

    Args:
        factors: of one model at the same weights, with the same loss, which nobody can check here.

    Returns:
        factors of all samples. The settings are those that all share; where they differ ("seed",
        "mc_samples", "precision") a list, and of "checked" the less sure.

    Raises:
        TypeError: an argument is no :class:`hesskern.Factors`.
        ValueError: there is none, or a part of some alone; they were made with another ``output``
            or ``bias``; a layer is missing in one of them, or diagonals are, or it has another
            shape, dtype, device or tied module there.
    """
    if not factors:
        raise ValueError("factors must hold at least one result of kronecker_factors")
    for given in factors:
        if not isinstance(given, Factors):
            raise TypeError(f"factors must be of Factors, got {type(given).__name__}")
        if given.part is not None:
            raise ValueError(f"factors: {given.part.refusal('factors', 'load_factors')}")
    first, *others = factors
    for i, other in enumerate(others, start=2):
        _check_alike(first, other, f"factors {i}")
    layers = {name: _sum([given[name] for given in factors]) for name in first}
    skipped: dict[str, str] = {}
    for given in factors:
        skipped = {**given.skipped, **skipped}
    total = sum(given.num_samples for given in factors)
    diagonals = {
        name: _mean([given.diagonals[name] for given in factors], [f.num_samples for f in factors])
        for name in first.diagonals
    }
    large = {name: _sum_large([given.large[name] for given in factors]) for name in first.large}
    settings = _settings([given.settings for given in factors])
    return Factors(layers, total, skipped, settings, diagonals, large)


def _check_alike(first: Factors, other: Factors, which: str) -> None:
    """Raises ValueError unless both are of the same layers, made in the same way."""
    for word in ("output", "bias"):
        a, b = first.settings.get(word), other.settings.get(word)
        if a != b:
            raise ValueError(f"{which} were made with {word}={b!r}, the first with {word}={a!r}")
    for what, mine, theirs in (
        ("diagonals", _shapes(first.diagonals), _shapes(other.diagonals)),
        ("large layers", _large_shapes(first), _large_shapes(other)),
    ):
        if mine != theirs:
            raise ValueError(
                f"{which} have other {what} than the first: "
                f"{', '.join(sorted(set(mine.items()) ^ set(theirs.items()), key=str)[0][:1])}"
            )
    for one, another, holder in ((first, other, which), (other, first, "the first factors")):
        for name in one:
            if name not in another:
                reason = another.skipped.get(name)
                raise ValueError(
                    f"layer {name!r} is missing in {holder}" + (f": it {reason}" if reason else "")
                )
    for name, f in first.items():
        g = other[name]
        facts: dict[str, Callable[[LayerFactors], Any]] = {
            "geometry": lambda f: f.spec,
            "input covariance's shape": lambda f: list(f.input_covariance.shape),
            "output Hessian's shape": lambda f: list(f.output_hessian.shape),
            "dtype": lambda f: f.input_covariance.dtype,
            "device": lambda f: f.input_covariance.device,
            "tied module": lambda f: f.tied_to,
        }
        for what, of in facts.items():
            if of(f) != of(g):
                raise ValueError(
                    f"layer {name!r} has another {what} in {which}: {of(g)}, in the first {of(f)}"
                )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype, t.device) for name, t in tensors.items()}


def _large_shapes(factors: Factors) -> dict[str, Any]:
    return {
        name: (f.spec, tuple(f.input_covariance.shape), f.output_diagonal.dtype, f.tied_to)
        for name, f in factors.large.items()
    }


def _sum_large(parts: Sequence[LargeLayerFactors]) -> LargeLayerFactors:
    """One large layer's factors of all samples."""
    first, samples = parts[0], [f.num_samples for f in parts]
    positions = [f.num_samples * f.positions for f in parts]
    return LargeLayerFactors(
        first.spec,
        _mean([f.input_covariance for f in parts], samples),
        _mean([f.output_diagonal for f in parts], positions),
        sum(samples),
        sum(positions) / sum(samples),
        first.tied_to,
    )


def _sum(parts: Sequence[LayerFactors]) -> LayerFactors:
    """One layer's factors of all samples."""
    first = parts[0]
    samples = [f.num_samples for f in parts]
    positions = [f.num_samples * f.positions for f in parts]
    total = sum(samples)
    images = [f.input_images for f in parts]
    shapes = {None if image is None else tuple(i.shape for i in image) for image in images}
    mean_images = None
    if len(shapes) == 1 and None not in shapes:
        uses = zip(*(image for image in images if image is not None), strict=True)
        mean_images = tuple(_mean(use, samples) for use in uses)
    return LayerFactors(
        first.spec,
        _mean([f.input_covariance for f in parts], samples),
        _mean([f.output_hessian for f in parts], positions),
        total,
        sum(positions) / total,
        mean_images,
        first.tied_to,
    )


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, summed in float64; zero where all weights are."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return (total / (sum(weights) or 1.0)).to(tensors[0].dtype)


def _settings(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all share; lists of what they have apart, in order."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for settings in given for key in settings):
        values = [settings.get(key) for settings in given]
        if key == "checked":
            found[key] = _less_sure([checked or {} for checked in values])
            continue
        apart = [v for i, v in enumerate(values) if v not in values[:i]]
        found[key] = apart[0] if len(apart) == 1 else apart
    return found


def _less_sure(given: Sequence[dict[str, str]]) -> dict[str, str]:
    """By layer the least sure of the words."""

    def doubt(word: str) -> int:
        return _CHECKED.index(word) if word in _CHECKED else len(_CHECKED)

    names = dict.fromkeys(name for checked in given for name in checked)
    return {n: max((c[n] for c in given if n in c), key=doubt) for n in names}
