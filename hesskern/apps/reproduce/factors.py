"""What is said of the factors alone: inputs, output Hessians, the weights behind a layer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.items import strip_power
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Chart, Curve, Outcome, Table, judge
from hesskern.diagnostics.metrics import input_autocorrelation
from hesskern.diagnostics.output_space import row_space_overlap, weight_product

__all__ = ["autocorrelation", "output_spectra", "row_space"]

_ALIGNED, _NOT_ALIGNED = 0.99, 0.3
_ROW_SPACE_WITHIN = 0.03
_SHOWN = 25


def autocorrelation(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """(v_1^T E[x])² / ‖E[x]‖² and lambda_1 / lambda_2 of layers behind the first."""
    out = Outcome()
    rows = []
    for network in networks:
        figures = published.AUTOCORRELATION.get((network.data, strip_power(network.model)), {})
        normalized = network.model.endswith("-bn")
        found: dict[str, dict[str, list[Any]]] = {}
        for seed in lab.seeds():
            for factors in list(lab.factors(network, seed).values())[1:]:
                kind = "fc" if factors.kind == "linear" else "conv"
                numbers = input_autocorrelation(factors)
                entry = found.setdefault(kind, {"alignment": [], "ratio": [], "layers": []})
                entry["layers"].append(f"{factors.name}, seed {seed}")
                entry["alignment"].append(numbers.mean_alignment)
                entry["ratio"].append(numbers.eigenvalue_ratio)
        out.numbers[network.name] = found
        for kind, entry in found.items():
            shown = figures.get(kind)
            words = f"{network.name}, {'fully connected' if kind == 'fc' else 'conv'} layers"
            bounds = (0.0, _NOT_ALIGNED) if normalized else (_ALIGNED, 1.0)
            out.verdicts.append(
                judge(
                    f"{words}: (v₁·E[x])² / ‖E[x]‖²",
                    entry["alignment"],
                    None if shown is None else f"{shown[0]:.3f}",
                    between=bounds if shown else None,
                    withheld=lab.withheld(network) or ("" if shown else "no published figure"),
                )
            )
            span = shown[2] if shown else None
            out.verdicts.append(
                judge(
                    f"{words}: λ₁ / λ₂ of E[x xᵀ]",
                    entry["ratio"],
                    None
                    if shown is None
                    else f"{shown[1]:g}" + (f" [{span[0]:g}, {span[1]:g}]" if span else ""),
                    between=span,
                    withheld=lab.withheld(network)
                    or ("" if span else "published without a range" if shown else "not published"),
                )
            )
            rows.append(
                [
                    words,
                    f"{fmean(entry['alignment']):.3f}",
                    f"{shown[0]:.3f}" if shown else "–",
                    f"{fmean(entry['ratio']):.2f} [{min(entry['ratio']):.2f}, "
                    f"{max(entry['ratio']):.2f}]",
                    (f"{shown[1]:.2f}" + (f" [{span[0]:.2f}, {span[1]:.2f}]" if span else ""))
                    if shown
                    else "–",
                ]
            )
    out.tables.append(
        Table(
            "Input auto-correlation",
            ["network", "(v₁·E[x])²", "published", "λ₁ / λ₂, mean [min, max]", "published"],
            rows,
            "Means over layers behind the first and seeds; v₁ is the first eigenvector of E[x xᵀ].",
        )
    )
    return out


def _linear_chain(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The Linear layers at the end of a sequential network, with ReLUs alone between them.

    Raises:
        ValueError: the model is not sequential or has another module between the layers.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"row spaces need a sequential network, got {type(model).__name__}")
    chain: list[tuple[str, nn.Linear]] = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            chain.append((name, module))
        elif chain and not isinstance(module, nn.ReLU):
            raise ValueError(f"row spaces need ReLUs alone between Linear layers, got {module}")
    return chain


def row_space(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Row space of S against the top c - 1 eigenvectors of E[M]."""
    out = Outcome()
    for network in networks:
        figures = published.ROW_SPACE.get((network.data, strip_power(network.model)), {})
        found: dict[str, dict[str, list[float]]] = {}
        for seed in lab.seeds(quick=2):
            factors = lab.factors(network, seed)
            chain = _linear_chain(lab.model(network, seed))
            for position, (name, layer) in enumerate(chain):
                behind = [module.weight for _, module in chain[position + 1 :]]
                S = weight_product(behind, layer.out_features)
                overlap = row_space_overlap(S, factors[name].output_hessian)
                entry = found.setdefault(name, {"orthogonal": [], "centred": []})
                entry["orthogonal"].append(overlap.orthogonal)
                entry["centred"].append(overlap.centred)
        out.numbers[network.name] = found
        for name, entry in found.items():
            figure = figures.get(name)
            out.verdicts.append(
                judge(
                    f"{name} of {network.name}: row space of S without 1ᵀS",
                    entry["orthogonal"],
                    figure,
                    within=None if figure is None else _ROW_SPACE_WITHIN,
                    withheld=lab.withheld(network) or ("" if figure else "no published figure"),
                )
            )
        out.tables.append(
            Table(
                f"Row space of S, {network.name}",
                ["layer", "without 1ᵀS", "published", "of the centred S"],
                [
                    [
                        name,
                        f"{fmean(entry['orthogonal']):.3f}",
                        f"{figures[name]:.3f}" if name in figures else "–",
                        f"{fmean(entry['centred']):.3f}",
                    ]
                    for name, entry in found.items()
                ],
                "Overlap with the top c − 1 eigenvectors of E[M]. Centred: the row space of "
                "(I − 1 1ᵀ / c) S, which is the range of Sᵀ E[A] S.",
            )
        )
    return out


def output_spectra(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Eigenvalues of E[M] at initialization, after training, and with random labels."""
    out = Outcome()
    stages: dict[str, dict[str, list[list[float]]]] = {}
    fits: dict[str, Any] = {}
    classes = lab.classes(networks[0])
    for network in networks:
        for seed in lab.seeds():
            kinds: list[tuple[str, int | None]] = [("after training", None)]
            if network.random_labels:
                kinds = [("random labels", None)]
            else:
                kinds.insert(0, ("initialization", 0))
            for stage, epochs in kinds:
                found = lab.factors(network, seed, epochs)
                fits.setdefault(stage, []).append(
                    lab.training(network, seed, epochs)["train_accuracy"]
                )
                for name, factors in found.items():
                    values = torch.linalg.eigvalsh(factors.output_hessian.double()).flip(0)
                    rows = stages.setdefault(name, {}).setdefault(stage, [])
                    rows.append((values[:_SHOWN] / values[0]).clamp(min=1e-9).tolist())
    out.numbers = {"spectra": stages, "train accuracy": fits}
    for name, by_stage in stages.items():
        curves = [
            Curve(stage, rows, colour=index) for index, (stage, rows) in enumerate(by_stage.items())
        ]
        out.charts.append(
            Chart(
                f"output-spectrum-{name}",
                f"E[M] of {name}",
                "index",
                "eigenvalue / the largest",
                curves,
                mark=(classes - 1, f"c − 1 = {classes - 1}"),
                log=True,
            )
        )
        for stage, rows in by_stage.items():
            if len(rows[0]) <= classes:
                continue
            gaps = [row[classes - 2] / row[classes - 1] for row in rows]
            out.verdicts.append(
                judge(
                    f"{name}, {stage}: λ_(c−1) / λ_c of E[M]",
                    gaps,
                    "c − 1 eigenvalues stand out",
                    withheld="published as a plot",
                )
            )
    shown = {stage: fmean(values) for stage, values in fits.items()}
    out.notes.append(
        "Accuracy on the training labels: "
        + ", ".join(f"{stage} {100 * value:.1f} %" for stage, value in shown.items())
        + "."
    )
    return out
