"""Eigenvectors as matrices: how near to rank one, and along which factors' eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.items import strip_power
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Chart, Curve, HeatMap, Outcome, judge, published_points
from hesskern.diagnostics.metrics import eigenvector_correspondence, rank_one_ratio

__all__ = ["correspondence", "rank_one"]

_SHOWN = 20


def rank_one(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """‖Mat(h)‖_2 / ‖Mat(h)‖_F of the leading eigenvectors of H."""
    out = Outcome()
    for network in networks:
        curves: dict[str, list[list[float]]] = {}
        for seed in lab.seeds():
            for name, factors in lab.factors(network, seed).items():
                exact = lab.eigenpairs(network, seed, name, lab.top)
                ratios = rank_one_ratio(exact.vectors, factors.layer_shape)
                curves.setdefault(name, []).append(ratios.tolist())
        out.numbers[network.name] = curves
        classes = lab.classes(network)
        is_lenet5 = (network.data, strip_power(network.model)) == ("cifar10", "lenet5")
        drawn = [Curve(name, rows, colour=i) for i, (name, rows) in enumerate(curves.items())]
        for index, (name, rows) in enumerate(curves.items()):
            figure = published.RANK_ONE.get(name) if is_lenet5 else None
            count = min(figure[0] if figure else classes - 1, len(rows[0]))
            means = [fmean(row[:count]) for row in rows]
            what = f"{name} of {network.name}: mean ratio of the first {count} eigenvectors"
            if figure is None:
                out.verdicts.append(judge(what, means, withheld="no published figure"))
                continue
            _, low, high = figure
            drawn.append(
                published_points("", [[low, low], [high, high]], [1.0, float(count)], index)
            )
            out.verdicts.append(
                judge(
                    what,
                    means,
                    f"{low:g} to {high:g}",
                    between=(low, high),
                    withheld=lab.withheld(network),
                )
            )
        out.charts.append(
            Chart(
                f"rank-one-{network.data}-{strip_power(network.model)}",
                f"Rank-one ratio, {network.name}",
                "index of the eigenvector of H",
                "‖Mat(h)‖₂ / ‖Mat(h)‖_F",
                drawn,
                mark=(classes - 1, f"c − 1 = {classes - 1}"),
                unit=True,
            )
        )
    return out


def correspondence(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Squared components of H's eigenvectors along the eigenvectors of both factors."""
    out = Outcome()
    for network in networks:
        first_row: dict[str, list[float]] = {}
        diagonal: dict[str, list[float]] = {}
        for seed in lab.seeds(quick=1, paper=1):
            for index, (name, factors) in enumerate(lab.factors(network, seed).items()):
                exact = lab.eigenpairs(network, seed, name, min(lab.top, _SHOWN))
                along = eigenvector_correspondence(exact.vectors, factors)
                k = min(lab.classes(network) - 1, along.output.shape[1])
                first_row.setdefault(name, []).append(float(along.input[0, :k].mean()))
                count = min(k, along.output.shape[0])
                diagonal.setdefault(name, []).append(float(along.output.diagonal()[:count].mean()))
                if seed > 0:
                    continue
                for side, squares in (("input", along.input), ("output", along.output)):
                    factor = "E[x xᵀ]" if side == "input" else "E[M]"
                    out.heat_maps.append(
                        HeatMap(
                            f"correspondence-{side}-{name}-{network.data}-"
                            f"{strip_power(network.model)}",
                            f"{name}, {side} side, {network.name}",
                            "eigenvector of H",
                            f"eigenvector of {factor}",
                            squares[:_SHOWN, :_SHOWN].tolist(),
                            index,
                        )
                    )
        out.numbers[network.name] = {"first input row": first_row, "output diagonal": diagonal}
        for index, name in enumerate(first_row):
            k = lab.classes(network) - 1
            if index > 0:
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: weight of the first {k} eigenvectors on v₁",
                        first_row[name],
                        "dark first row",
                        withheld="published as a heat map",
                    )
                )
            out.verdicts.append(
                judge(
                    f"{name} of {network.name}: mean of the output side's diagonal up to {k}",
                    diagonal[name],
                    "dark diagonal",
                    withheld="published as a heat map",
                )
            )
    return out
