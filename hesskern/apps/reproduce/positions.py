"""Convolutions: what averaging M over positions costs, apart from the decoupling itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern.apps.reproduce.lab import LOSS, Lab, Network
from hesskern.apps.reproduce.results import Outcome, Table, judge, spread_words
from hesskern.diagnostics.metrics import decoupling_error, subspace_overlap
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.operators.nearest import nearest_kronecker
from hesskern.operators.position_mean import position_mean_hessian
from hesskern.solvers.eigsh import eigsh

__all__ = ["position_means"]

_STEPS = {
    "positions": "‖H − H̄‖_F / ‖H‖_F",
    "both": "‖H − K‖_F / ‖H‖_F",
    "decoupling": "‖H̄ − K‖_F / ‖H̄‖_F",
    "trace": "tr H̄ / tr H",
    "overlap": "overlap H, H̄",
    "overlap_form": "overlap H, K",
}
_PRODUCTS = {
    "both": "‖H − K‖_F / ‖H‖_F",
    "scale": "a = ⟨H, K⟩ / ‖K‖²",
    "scaled": "‖H − a K‖_F / ‖H‖_F",
    "nearest": "‖H − A ⊗ B‖_F / ‖H‖_F",
    "outputs": "cos(E[M], A)",
    "inputs": "cos(E[XXᵀ], B)",
}


def position_means(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """The two steps from a convolution's Hessian to its Kronecker form, one at a time.

    Beside them, the products that are nearest to H: of all multiples of K, and of all.
    """
    out = Outcome()
    steps, products = [], []
    for network in networks:
        k = lab.classes(network) - 1
        found: dict[str, dict[str, list[float]]] = {}
        for seed in lab.seeds():
            factors_of = lab.factors(network, seed)
            for name in [n for n, f in factors_of.items() if f.positions > 1 and f.groups == 1]:
                exact = lab.eigenpairs(network, seed, name, k)
                H, factors = lab.hessian(network, seed, name), factors_of[name]
                mean = position_mean_hessian(
                    lab.model(network, seed),
                    lab.batches(network),
                    LOSS,
                    name,
                    memory_budget=lab.memory_budget,
                    progress=lab.progress,
                )
                K, nearest = factors.operator(), nearest_kronecker(H, tol=1e-4)
                scale = H.inner(K) / K.squared_norm()
                top = eigsh(mean, len(exact.values), tol=1e-4, start=K)
                form = factors.eigsh(len(exact.values))
                numbers = {
                    "positions": decoupling_error(H, mean).frobenius,
                    "both": decoupling_error(H, K).frobenius,
                    "decoupling": decoupling_error(mean, K).frobenius,
                    "trace": mean.trace() / H.trace(),
                    "overlap": float(subspace_overlap(exact.vectors, top.vectors)[-1]),
                    "overlap_form": float(subspace_overlap(exact.vectors, form.vectors)[-1]),
                    "scale": scale,
                    "scaled": decoupling_error(H, KroneckerOperator(scale * K.A, K.B)).frobenius,
                    "nearest": decoupling_error(H, nearest).frobenius,
                    "outputs": _cosine(K.A, nearest.A),
                    "inputs": _cosine(K.B, nearest.B),
                }
                entry = found.setdefault(name, {key: [] for key in numbers})
                for key, value in numbers.items():
                    entry[key].append(value)
                lab.progress(f"{network.name}: positions of {name}", 1, 1)
        out.numbers[network.name] = found
        for name, entry in found.items():
            label = f"{name} of {network.name}"
            steps.append([label, *(spread_words(entry[key]) for key in _STEPS)])
            products.append([label, *(spread_words(entry[key]) for key in _PRODUCTS)])
            out.verdicts.append(
                judge(
                    f"{label}: Frobenius error of M averaged over positions",
                    entry["positions"],
                    withheld="not in the paper",
                )
            )
    if not steps:
        out.notes.append("None of these networks has a convolution of one group to look at.")
        return out
    out.tables += [
        Table(
            "From a convolution's Hessian to its Kronecker form",
            ["layer", *_STEPS.values()],
            steps,
            "H̄ = E[M_n ⊗ X_n X_nᵀ]: gradients averaged over positions, nothing decoupled between "
            "samples. K = E[M] ⊗ E[X Xᵀ]. Overlaps at k = c − 1.",
        ),
        Table(
            "How near a Kronecker product comes to it",
            ["layer", *_PRODUCTS.values()],
            products,
            "a K: the multiple of K nearest to H. A ⊗ B: the Kronecker product nearest to H; "
            "cosines of matrices, ⟨P, Q⟩ / (‖P‖ ‖Q‖).",
        ),
    ]
    return out


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)))
