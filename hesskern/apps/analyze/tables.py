"""The report's tables: rows of texts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hesskern.apps.analyze.digest import Digest
from hesskern.apps.analyze.result import NO_OVERLAPS, AnalysisResult, Form
from hesskern.text import number, percent, seconds

__all__ = [
    "input_rows",
    "layer_facts",
    "layer_models",
    "layer_rows",
    "layer_table",
    "model_rows",
    "published_eigenvalues",
    "published_overlaps",
    "published_statistics",
    "tiles",
    "time_rows",
]

Row = dict[str, Any]


def tiles(digest: Digest) -> list[Row]:
    """The two numbers of every layer that matter most."""
    return [
        {
            "name": name,
            "overlap": percent(digest.marked(name, "overlap")),
            "captured": percent(digest.marked(name, "captured")),
        }
        for name in digest.layers
    ]


def layer_rows(digest: Digest) -> list[Row]:
    """Per layer: shape, eigenvalues, overlaps, errors and traces, means over the models."""
    return [_layer_row(digest, name) for name in digest.layers]


def _layer_row(digest: Digest, name: str) -> Row:
    entries = digest.entries(name)
    shape, groups = entries[0]["shape"], entries[0]["groups"]

    def largest(form: Form) -> str:
        return number(digest.mean(name, lambda entry: entry["eigenvalues"][form][0]))

    return {
        "name": name,
        "shape": " × ".join(map(str, shape)) + (f", {groups} groups" if groups > 1 else ""),
        "is_exact": all(entry["is_exact"] for entry in entries),
        "top_exact": largest("exact"),
        "top_kronecker": largest("kronecker"),
        "overlaps": [number(digest.at(name, "overlap", k)) for k in digest.columns],
        "captured": percent(digest.marked(name, "captured")),
        "spectral": number(digest.mean(name, lambda entry: entry["decoupling"]["spectral"])),
        "frobenius": number(digest.mean(name, lambda entry: entry["decoupling"]["frobenius"])),
        "trace_exact": number(digest.mean(name, lambda entry: entry["trace"]["exact"])),
        "trace_kronecker": number(digest.mean(name, lambda entry: entry["trace"]["kronecker"])),
    }


def layer_table(digest: Digest) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the layers' table for a terminal; columns ``k = ...`` are overlaps."""
    last = digest.columns[-1]
    shown = [digest.columns.index(k) for k in dict.fromkeys((1, digest.mark, last))]
    headings = ["layer", "shape", "λ₁ H", "λ₁ K"]
    headings += [f"k = {digest.columns[i]}" for i in shown]
    headings += ["captured", "‖H−K‖₂", "‖H−K‖F"]
    rows = [
        [
            row["name"] + ("" if row["is_exact"] else " *"),
            row["shape"],
            row["top_exact"],
            row["top_kronecker"],
            *(row["overlaps"][i] for i in shown),
            row["captured"],
            row["spectral"],
            row["frobenius"],
        ]
        for row in layer_rows(digest)
    ]
    return headings, rows


def input_rows(digest: Digest) -> list[Row]:
    """Per layer: how nearly rank one its inputs are."""
    rows = []
    for name in digest.with_inputs:
        ratio = digest.ratio(name)
        weight = digest.mean(name, lambda e: fmean(e["correspondence"]["input"][0][: digest.mark]))
        rows.append(
            {
                "name": name,
                "alignment": number(digest.alignment(name)),
                "ratio": "∞" if ratio is None else number(ratio),
                "weight": percent(weight),
            }
        )
    return rows


def layer_facts(digest: Digest, name: str) -> list[tuple[str, str]]:
    """What a layer is, and its numbers as means over the models."""
    entry, row = digest.entries(name)[0], _layer_row(digest, name)
    positions = f", {entry['positions']:,} positions per sample" if entry["positions"] > 1 else ""
    facts = [
        (
            "Layer",
            f"{entry['kind']}, {row['shape']} (m × d), {entry['parameters']:,} weights{positions}",
        ),
        ("Curvature", _kind_of_curvature(digest, name)),
        ("Trace", f"H {row['trace_exact']}, K {row['trace_kronecker']}"),
        ("‖H − K‖ / ‖H‖", f"spectral {row['spectral']}, Frobenius {row['frobenius']}"),
        (
            f"Leading {digest.mark}",
            f"overlap {percent(digest.marked(name, 'overlap'))}, "
            f"curvature captured {percent(digest.marked(name, 'captured'))}",
        ),
    ]
    if name in digest.with_inputs:
        ratio = digest.ratio(name)
        facts.append(
            (
                "Inputs",
                f"(v₁·E[x])² / ‖E[x]‖² {number(digest.alignment(name))}, "
                f"λ₁ / λ₂ of E[x xᵀ] {'∞' if ratio is None else number(ratio)}",
            )
        )
    return facts


def _kind_of_curvature(digest: Digest, name: str) -> str:
    reasons = digest.reasons_of([name])
    if not reasons:
        return "the exact Hessian"
    return f"the Gauss-Newton block, not the whole Hessian: {'; '.join(reasons)}"


def layer_models(digest: Digest, name: str) -> list[Row]:
    """Per model: one layer's eigenvalues, overlaps, errors, and how far the solver came."""
    return [
        {
            "label": model["label"],
            "top_exact": number(entry["eigenvalues"]["exact"][0]),
            "top_kronecker": number(entry["eigenvalues"]["kronecker"][0]),
            "overlaps": [
                number(entry["overlap"][k - 1] if k <= len(entry["overlap"]) else None)
                for k in digest.columns
            ],
            "captured": percent(entry["captured"][digest.mark - 1]),
            "spectral": number(entry["decoupling"]["spectral"]),
            "frobenius": number(entry["decoupling"]["frobenius"]),
            "pairs": f"{len(entry['residuals'])}{'' if entry['converged'] else ' *'}",
            "residual": f"{max(entry['residuals']):.1e}",
        }
        for model, entry in zip(digest.result["models"], digest.entries(name), strict=True)
    ]


def model_rows(result: AnalysisResult) -> list[Row]:
    """Per model: losses and accuracies."""
    return [
        {
            "label": model["label"],
            **{f"{split}_loss": number(model[split]["loss"]) for split in ("train", "test")},
            **{
                f"{split}_accuracy": f"{100 * model[split]['accuracy']:.1f}\u00a0%"
                for split in ("train", "test")
            },
        }
        for model in result["models"]
    ]


def time_rows(result: AnalysisResult) -> list[Row]:
    """Seconds of every step, one column per model; what is done once for all comes last."""
    labels = [model["label"] for model in result["models"]]
    steps: dict[str, dict[str, float]] = {}
    for row in result["times"]:
        steps.setdefault(row["step"], {})[row["model"]] = row["seconds"]
    own = {step: row for step, row in steps.items() if "" not in row}
    common = {step: row[""] for step, row in steps.items() if "" in row}
    return [
        {
            "step": step,
            "values": [seconds(row[label]) if label in row else "–" for label in labels],
            "common": False,
        }
        for step, row in own.items()
    ] + [
        {"step": step, "values": [seconds(value)], "common": True} for step, value in common.items()
    ]


def published_overlaps(digest: Digest) -> list[Row]:
    """Per layer: overlaps of H and its Kronecker form, ours and published."""
    published = digest.result["published"]
    figures = published["overlap"] if published else NO_OVERLAPS
    return [
        {
            "name": name,
            "ours": [number(digest.at(name, "overlap", k)) for k in figures["k"]],
            "published": [number(value) for value in values],
        }
        for name, values in figures["layers"].items()
        if name in digest.layers
    ]


def published_eigenvalues(digest: Digest) -> list[Row]:
    """Per layer with published eigenvalues: ours of every model, and the published ones."""
    published = digest.result["published"]
    figures = published["eigenvalues"] if published else {}
    forms: tuple[tuple[Form, str], ...] = (("exact", "exact"), ("kronecker", "Kronecker"))
    tables = []
    for name in (n for n in figures if n in digest.layers):
        count = len(figures[name]["exact"])
        rows: list[tuple[str, Sequence[float | None], bool]] = []
        for form, label in forms:
            for model in digest.result["models"]:
                values = model["layers"][name]["eigenvalues"][form][:count]
                missing = [None] * (count - len(values))
                rows.append((f"{label}, {model['label']}", [*values, *missing], False))
            rows.append((f"{label}, published", figures[name][form], True))
        tables.append(
            {
                "name": name,
                "index": list(range(1, count + 1)),
                "rows": [
                    {"label": label, "values": [number(v) for v in values], "minor": minor}
                    for label, values, minor in rows
                ],
            }
        )
    return tables


def published_statistics(digest: Digest) -> list[Row]:
    """Input statistics and overlaps between models, ours and published."""
    figures = digest.result["published"]
    if not figures:
        return []
    rows = []
    inner = [name for name in digest.layers[1:] if name in digest.with_inputs]
    ratios = [ratio for name in inner if (ratio := digest.ratio(name)) is not None]
    if inner:
        rows.append(
            {
                "label": "(v₁·E[x])² / ‖E[x]‖², mean of the layers behind the first",
                "ours": f"{fmean(digest.alignment(name) for name in inner):.3f}",
                "published": f"{figures['autocorrelation']['mean_alignment']:.3f}",
            }
        )
    if ratios:
        mean, low, high = figures["autocorrelation"]["eigenvalue_ratio"]
        rows.append(
            {
                "label": "λ₁ / λ₂ of E[x xᵀ], mean [min, max] of these layers",
                "ours": f"{fmean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                "published": f"{mean:.2f} [{low:.2f}, {high:.2f}]",
            }
        )
    for name, point in figures["between"].items():
        k = point["k"]
        exact = digest.between(name, "exact", k) if name in digest.layers else None
        ours = exact
        if ours is None and name in digest.layers:
            ours = digest.between(name, "kronecker", k)
        if ours is not None:
            form = "" if exact is not None else " (ours: of the Kronecker forms)"
            rows.append(
                {
                    "label": f"overlap between seeds, {name}, k = {k}{form}",
                    "ours": number(ours),
                    "published": number(point["overlap"]),
                }
            )
    return rows
