"""Overlaps of leading eigenspaces: of exact and Kronecker form, and of the full Hessian."""

from __future__ import annotations

from collections.abc import Sequence

from hesskern.apps.analyze.result import NO_OVERLAPS, OverlapFigures, Spectra
from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.items import K_AXIS, strip_power
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Chart, Curve, Outcome, judge, published_points
from hesskern.diagnostics.metrics import subspace_overlap

__all__ = ["full_hessian", "hessian_and_kronecker"]

_OVERLAP_WITHIN = 0.03
_SHOWN_EIGENVALUES = 20


def hessian_and_kronecker(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Eigenvalues and leading spaces of H and of E[M] (x) E[x x^T], layer by layer."""
    out = Outcome()
    for network in networks:
        figures = published.figures_for(network.data, strip_power(network.model))
        spectra = figures["eigenvalues"] if figures else {}
        curves: dict[str, list[list[float]]] = {}
        values: dict[str, dict[str, list[list[float]]]] = {}
        worst = 0.0
        for seed in lab.seeds():
            for name, factors in lab.factors(network, seed).items():
                exact = lab.eigenpairs(network, seed, name, lab.top)
                kronecker = factors.eigsh(len(exact.values))
                overlap = subspace_overlap(exact.vectors, kronecker.vectors)
                curves.setdefault(name, []).append(overlap.tolist())
                forms = values.setdefault(name, {"exact": [], "kronecker": []})
                forms["exact"].append(exact.values.tolist())
                forms["kronecker"].append(kronecker.values.tolist())
                worst = max(worst, float(exact.residuals.max()))
        out.numbers[network.name] = {"overlap": curves, "eigenvalues": values, "residual": worst}
        reference = figures["overlap"] if figures else NO_OVERLAPS
        out.charts.append(_overlap_chart(network, curves, reference, lab.classes(network)))
        for index, name in enumerate(curves):
            out.charts.append(
                _eigenvalue_chart(network, name, index, values[name], spectra.get(name))
            )
            for k, figure in zip(reference["k"], reference["layers"].get(name, []), strict=False):
                ours = [curve[k - 1] for curve in curves[name] if len(curve) >= k]
                if ours:
                    out.verdicts.append(
                        judge(
                            f"{name} of {network.name}: overlap at k = {k}",
                            ours,
                            figure,
                            within=_OVERLAP_WITHIN,
                            withheld=lab.withheld(network),
                        )
                    )
            if not reference["layers"].get(name):
                k = min(lab.classes(network) - 1, len(curves[name][0]))
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: overlap at k = {k}",
                        [curve[k - 1] for curve in curves[name]],
                        withheld="no published figure",
                    )
                )
        out.notes.append(
            f"{network.name}: the largest residual ‖Hv − λv‖ / λ₁ of the exact eigenpairs is "
            f"{worst:.1e}."
        )
    return out


def _overlap_chart(
    network: Network,
    curves: dict[str, list[list[float]]],
    reference: OverlapFigures,
    classes: int,
) -> Chart:
    drawn = [
        Curve(name, values, colour=index) for index, (name, values) in enumerate(curves.items())
    ]
    longest = max(len(values[0]) for values in curves.values())
    for index, name in enumerate(curves):
        points = [
            (k, v)
            for k, v in zip(reference["k"], reference["layers"].get(name, []), strict=False)
            if k <= longest
        ]
        if points:
            shown = [float(k) for k, _ in points]
            drawn.append(published_points("", [[v for _, v in points]], shown, index))
    title = f"H and its Kronecker form, {network.name}"
    return _over_k("overlap", network, title, drawn, classes)


def _over_k(
    name: str, network: Network, title: str, curves: Sequence[Curve], classes: int
) -> Chart:
    return Chart(
        f"{name}-{network.data}-{strip_power(network.model)}",
        title,
        K_AXIS,
        "overlap",
        curves,
        mark=(classes - 1, f"k = c − 1 = {classes - 1}"),
        unit=True,
    )


def _eigenvalue_chart(
    network: Network,
    name: str,
    index: int,
    values: dict[str, list[list[float]]],
    figures: Spectra | None,
) -> Chart:
    def shown(rows: list[list[float]]) -> list[list[float]]:
        floor = max(row[0] for row in rows) * 1e-8
        return [[max(v, floor) for v in row[:_SHOWN_EIGENVALUES]] for row in rows]

    drawn = [
        Curve("exact H", shown(values["exact"]), colour=index),
        Curve("Kronecker form", shown(values["kronecker"]), colour=index, style="dashed"),
    ]
    if figures:
        drawn += [
            published_points(label, [points], None, shade)
            for label, points, shade in (
                ("exact H, published", figures["exact"], 6),
                ("Kronecker, published", figures["kronecker"], 1),
            )
        ]
    return Chart(
        f"eigenvalues-{name}-{network.data}-{strip_power(network.model)}",
        f"Eigenvalues of {name}, {network.name}",
        "index",
        "eigenvalue",
        drawn,
        log=True,
    )


def full_hessian(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Leading space of the full Gauss-Newton matrix and of (u^(p) (x) E[x~^(p)])_p."""
    out = Outcome()
    for network in networks:
        figures = published.FULL_OVERLAP.get(strip_power(network.model), {"k": [], "overlap": []})
        curves: dict[str, list[list[float]]] = {"published form": [], "lengths kept": []}
        values: list[list[float]] = []
        for seed in lab.seeds():
            G = lab.full(network, seed)
            k = min(lab.top, sum(m for m, _ in G.layer_shapes.values()))
            exact = lab.full_eigenpairs(network, seed, k, G)
            stacked = G.stacked()
            approximations = (stacked.published_vectors(k), stacked.eigsh(k).vectors)
            for label, vectors in zip(curves, approximations, strict=True):
                curves[label].append(subspace_overlap(exact.vectors, vectors).tolist())
            values.append(exact.values.tolist())
        out.numbers[network.name] = {"overlap": curves, "eigenvalues": values}
        drawn = [
            Curve(label, rows, colour=index, style="solid" if index == 0 else "dashed")
            for index, (label, rows) in enumerate(curves.items())
        ]
        if network.data == "mnist" and figures["k"]:
            drawn.append(published_points("published", [figures["overlap"]], figures["k"], 6))
        classes = lab.classes(network)
        title = f"Full Gauss-Newton matrix, {network.name}"
        out.charts.append(_over_k("full", network, title, drawn, classes))
        for label, rows in curves.items():
            points: list[tuple[int, float | None]] = [(min(classes - 1, len(rows[0])), None)]
            if network.data == "mnist" and figures["k"]:
                points = [
                    (int(k), v) for k, v in zip(figures["k"], figures["overlap"], strict=True)
                ]
            for index, figure in points:
                ours = [row[index - 1] for row in rows if len(row) >= index]
                if not ours:
                    continue
                out.verdicts.append(
                    judge(
                        f"{network.name}, {label}: overlap at k = {index}",
                        ours,
                        figure,
                        within=None if figure is None else _OVERLAP_WITHIN,
                        withheld="no published figure" if figure is None else lab.withheld(network),
                    )
                )
    out.notes.append(
        "Published form: u of the stacked output Hessian, times E[x~] as it stands. Lengths kept: "
        "the exact eigenvectors of the same matrix, in which layers weigh by ‖E[x~]‖."
    )
    return out
