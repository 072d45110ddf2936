"""VGG11 and ResNet18 end to end: every layer, within a memory budget."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence

from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Outcome, Table, judge, spread_words
from hesskern.diagnostics.metrics import input_autocorrelation, subspace_overlap

__all__ = ["architectures"]


def architectures(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Every layer of convolutional networks, end to end within the memory budget."""
    out = Outcome()
    for network in networks:
        k = lab.classes(network) - 1
        rows = []
        found: dict[str, dict[str, list[float]]] = {}
        stored = 0
        for seed in lab.seeds(quick=1, paper=3):
            for name, factors in lab.factors(network, seed).items():
                exact = lab.eigenpairs(network, seed, name, k)
                form = factors.eigsh(len(exact.values)).vectors
                entry = found.setdefault(name, {"overlap": [], "aligned": [], "ratio": []})
                entry["overlap"].append(float(subspace_overlap(exact.vectors, form)[-1]))
                numbers = input_autocorrelation(factors)
                entry["aligned"].append(numbers.mean_alignment)
                entry["ratio"].append(numbers.eigenvalue_ratio)
                stored += lab.hessian(network, seed, name).cached
                if seed == 0:
                    m, d = factors.layer_shape
                    rows.append([name, f"{m} × {d}"])
        out.numbers[network.name] = found
        for row, entry in zip(rows, found.values(), strict=True):
            row += [
                spread_words(entry["overlap"]),
                spread_words(entry["aligned"]),
                spread_words(entry["ratio"], 2),
            ]
        out.tables.append(
            Table(
                network.name,
                ["layer", "shape", f"overlap, k = {k}", "(v₁·E[x])²", "λ₁ / λ₂ of E[x xᵀ]"],
                rows,
                f"{_images(lab, network)} images in the curvature; samples of "
                f"{stored} of {len(found) * len(lab.seeds(1, 3))} Hessians fit "
                f"{lab.memory_budget / 2**30:g} GiB together, the others run the network again; "
                f"peak memory of the process {_peak_gib():.1f} GiB.",
            )
        )
        first = next(iter(found))
        convolutions = [
            name
            for name, factors in lab.factors(network, 0).items()
            if factors.kind != "linear" and name != first
        ]
        family = network.model.split("-")[0]
        figures = published.AUTOCORRELATION_DEEP.get((network.data, family))
        if figures is not None and convolutions:
            for what, key, figure in zip(
                ("(v₁·E[x])² / ‖E[x]‖²", "λ₁ / λ₂ of E[x xᵀ]"),
                ("aligned", "ratio"),
                figures,
                strict=True,
            ):
                out.verdicts.append(
                    judge(
                        f"{network.name}, convolutions behind the first: {what}",
                        [value for name in convolutions for value in found[name][key]],
                        figure,
                        withheld=f"published for other widths, {_images(lab, network)} images here",
                    )
                )
    return out


def _images(lab: Lab, network: Network) -> str:
    return f"{len(lab.batches(network).inputs):,}"


def _peak_gib() -> float:
    """The process's largest resident set so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
