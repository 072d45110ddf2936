"""The report's words and tables: what the template shows, from the result's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = ["layer_table", "network_name", "training_words", "view"]

Result = Mapping[str, Any]
_DATA_NAMES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def view(result: Result) -> dict[str, Any]:
    """Everything the template needs besides the figures."""
    layers = result["network"]["layers"]
    mark = _mark(result)
    count = len(result["models"])
    several = count > 1
    data = result["data"]
    network = network_name(result["network"]["name"])
    heading = f"Curvature of {network} on {_DATA_NAMES.get(data['name'], data['name'])}"
    reasons = {m["layers"][n]["inexact_reason"] for m in result["models"] for n in layers}
    return {
        "title": f"{heading} · hesskern",
        "heading": heading,
        "subtitle": (
            f"{result['network']['parameters']:,} parameters, {data['samples']:,} training samples, "
            f"{_listed([m['label'] for m in result['models']])}."
        ),
        "summary": _summary(result, mark),
        "mark": mark,
        "several": several,
        "first_label": result["models"][0]["label"],
        "mean_words": f"Means over {count} models." if several else "One model.",
        "tiles": [
            {
                "name": name,
                "overlap": _percent(_mean(result, name, lambda e: _at(e["overlap"], mark))),
                "captured": _percent(_mean(result, name, lambda e: _at(e["captured"], mark))),
            }
            for name in layers
        ],
        "overlap_columns": _columns(result),
        "layer_rows": [_layer_row(result, name, mark) for name in layers],
        "inexact": "; ".join(sorted(r for r in reasons if r)),
        "published": result["published"],
        "top": max(len(p["exact"]) for pair in result["pairs"] for p in pair["layers"].values())
        if result["pairs"]
        else 0,
        "pair_words": "Overlap of the leading spaces of two models trained alike from different seeds"
        if all(m["seed"] is not None for m in result["models"])
        else "Overlap of the leading spaces of two models",
        "input_rows": [_input_row(result, n, mark) for n in layers if _has_inputs(result, n)],
        "model_rows": [_model_row(m) for m in result["models"]],
        "facts": _facts(result),
        "eigen_words": _eigen_words(result),
        "notes": _notes(result),
        "training_words": training_words(result),
        **_published_tables(result),
        **_times(result),
    }


def layer_table(words: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the layers' table, for a terminal; ``words`` is :func:`view`'s."""
    mark = words["mark"]
    headings = ["layer", "shape", "λ₁ of H", "λ₁ of K"]
    headings += [f"overlap, k = {k}" for k in words["overlap_columns"]]
    headings += [f"captured, k = {mark}", "‖H−K‖₂/‖H‖₂", "‖H−K‖F/‖H‖F"]
    rows = [
        [
            row["name"] + ("" if row["is_exact"] else " *"),
            row["shape"],
            row["top_exact"],
            row["top_kronecker"],
            *row["overlaps"],
            row["captured"],
            row["spectral"],
            row["frobenius"],
        ]
        for row in words["layer_rows"]
    ]
    return headings, rows


def network_name(spec: str) -> str:
    """``f200x2`` as the paper writes it, F-200²; other names as they are."""
    body, _, suffix = spec.lower().partition("-")
    width, _, depth = body[1:].replace("^", "x").partition("x")
    if body[:1] == "f" and width.isdigit() and (depth.isdigit() or not depth):
        power = depth.translate(_SUPERSCRIPT) if depth not in ("", "1") else ""
        return f"F-{width}{power}" + (" with batch norm" if suffix == "bn" else "")
    return {"lenet5": "LeNet5", "lenet5-bn": "LeNet5 with batch norm"}.get(spec.lower(), spec)


def training_words(result: Result) -> str:
    """How the models were trained, in words."""
    trained = [m["training"] for m in result["models"] if m["training"]]
    if not trained:
        return "loaded from checkpoints"
    recipe = trained[0]["recipe"]
    extras = [
        f"momentum {recipe['momentum']:g}" if recipe["momentum"] else "no momentum",
        f"weight decay {recipe['weight_decay']:g}" if recipe["weight_decay"] else "no weight decay",
    ]
    return (
        f"{_count(recipe['epochs'], 'epoch')} of SGD, learning rate {recipe['learning_rate']:g}, "
        f"batch {recipe['batch_size']}, {', '.join(extras)}; {_count(len(trained), 'seed')}"
    )


def _summary(result: Result, mark: int) -> list[str]:
    layers = result["network"]["layers"]
    overlaps = {n: _mean(result, n, lambda e: _at(e["overlap"], mark)) for n in layers}
    captured = [_mean(result, n, lambda e: _at(e["captured"], mark)) for n in layers]
    best, worst = max(overlaps, key=overlaps.__getitem__), min(overlaps, key=overlaps.__getitem__)
    lowest = overlaps[worst]
    amount = "most" if lowest >= 0.75 else "a good part" if lowest >= 0.5 else "a part"
    where = (
        f"between {_percent(lowest)} ({worst}) and {_percent(overlaps[best])} ({best})"
        if best != worst
        else f"{_percent(lowest)} ({best})"
    )
    sentences = [
        f"The Kronecker form captures {amount} of the leading eigenspace: its top {mark} directions share "
        f"{where} of the space of the exact Hessian's top {mark}, and hold {_range(captured, _percent)} of "
        "the curvature that the best directions hold.",
        "As a matrix it is coarser: the relative error of H ≈ K is "
        f"{_range([_mean(result, n, lambda e: e['decoupling']['spectral']) for n in layers])} in the spectral norm and "
        f"{_range([_mean(result, n, lambda e: e['decoupling']['frobenius']) for n in layers])} in the Frobenius norm.",
    ]
    inner = [n for n in layers[1:] if _has_inputs(result, n)]
    if inner:
        alignment = [
            _mean(result, n, lambda e: e["autocorrelation"]["mean_alignment"]) for n in inner
        ]
        ratio = [_ratio(result, n) for n in inner]
        known = [r for r in ratio if r is not None]
        nearly = min(alignment) >= 0.95 and known and min(known) >= 3
        sentences.append(
            f"Inputs of the layers behind the first {'are nearly rank one' if nearly else 'are not rank one'}: the first eigenvector of E[x xᵀ] "
            f"lies along the mean input with a squared cosine of {_range(alignment)}"
            + (f", and its eigenvalue is {_range(known)} times the second." if known else ".")
        )
    if result["pairs"]:
        shared = {
            n: fmean(_at(pair["layers"][n]["exact"], mark) for pair in result["pairs"])
            for n in layers
        }
        most = max(shared, key=shared.__getitem__)
        size = result["models"][0]["layers"][most]["parameters"]
        sentences.append(
            f"Two models share most in {most}: {_percent(shared[most])} of their top {mark} directions "
            f"(two random spaces: {_percent(mark / size)})."
        )
    published = result["published"]
    if published:
        ours = {
            n: _mean(result, n, lambda e: _at(e["overlap"], mark))
            for n in published["overlap"]["layers"]
            if n in layers
        }
        position = published["overlap"]["k"].index(mark)
        beside = [
            f"{n} {_number(value)} ({_number(published['overlap']['layers'][n][position])})"
            for n, value in ours.items()
        ]
        if beside:
            sentences.append(
                f"Beside the published overlaps at k = {mark} (in brackets): {_listed(beside)}."
            )
    return sentences


def _layer_row(result: Result, name: str, mark: int) -> dict[str, Any]:
    def mean(pick: Any) -> str:
        return _number(_mean(result, name, pick))

    entries = _entries(result, name)
    first = entries[0]
    shape = " × ".join(map(str, first["shape"]))
    return {
        "name": name,
        "shape": shape + (f", {first['groups']} groups" if first["groups"] > 1 else ""),
        "is_exact": all(e["is_exact"] for e in entries),
        "top_exact": mean(lambda e: e["eigenvalues"]["exact"][0]),
        "top_kronecker": mean(lambda e: e["eigenvalues"]["kronecker"][0]),
        "overlaps": [
            mean(lambda e, k=k: e["overlap"][k - 1]) if k <= len(first["overlap"]) else "–"
            for k in _columns(result)
        ],
        "captured": _percent(_mean(result, name, lambda e: _at(e["captured"], mark))),
        "spectral": mean(lambda e: e["decoupling"]["spectral"]),
        "frobenius": mean(lambda e: e["decoupling"]["frobenius"]),
        "trace_exact": mean(lambda e: e["trace"]["exact"]),
        "trace_kronecker": mean(lambda e: e["trace"]["kronecker"]),
    }


def _input_row(result: Result, name: str, mark: int) -> dict[str, str]:
    ratio = _ratio(result, name)
    return {
        "name": name,
        "alignment": _number(_mean(result, name, lambda e: e["autocorrelation"]["mean_alignment"])),
        "ratio": "∞" if ratio is None else _number(ratio),
        "weight": _percent(
            _mean(result, name, lambda e: fmean(e["correspondence"]["input"][0][:mark]))
        ),
    }


def _model_row(model: Mapping[str, Any]) -> dict[str, str]:
    return {
        "label": model["label"],
        **{
            f"{split}_{key}": (_percent if key == "accuracy" else _number)(model[split][key])
            for split in ("train", "test")
            for key in ("loss", "accuracy")
        },
    }


def _published_tables(result: Result) -> dict[str, Any]:
    published = result["published"]
    if not published:
        return {"published_overlaps": [], "published_eigenvalues": [], "published_rest": []}
    layers = result["network"]["layers"]
    overlaps = [
        {
            "name": name,
            "published": [_number(v) for v in values],
            "ours": [
                _number(_mean(result, name, lambda e, k=k: e["overlap"][k - 1]))
                if k <= len(_entries(result, name)[0]["overlap"])
                else "–"
                for k in published["overlap"]["k"]
            ],
        }
        for name, values in published["overlap"]["layers"].items()
        if name in layers
    ]
    eigenvalues = []
    for name, values in published["eigenvalues"].items():
        if name in layers:
            shown = len(values["exact"])
            rows = []
            for key, form in (("exact", "exact"), ("kronecker", "Kronecker")):
                for model in result["models"]:
                    own = model["layers"][name]["eigenvalues"][key][:shown]
                    rows.append((f"{form}, {model['label']}", own, False))
                rows.append((f"{form}, published", values[key], True))
            eigenvalues.append(
                {
                    "name": name,
                    "index": list(range(1, shown + 1)),
                    "rows": [
                        {"label": label, "values": [_number(v) for v in row], "minor": minor}
                        for label, row, minor in rows
                    ],
                }
            )
    rest = []
    inner = [n for n in layers[1:] if _has_inputs(result, n)]
    if inner:
        alignment = [
            _mean(result, n, lambda e: e["autocorrelation"]["mean_alignment"]) for n in inner
        ]
        ratios = [r for n in inner if (r := _ratio(result, n)) is not None]
        figures = published["autocorrelation"]
        mean, low, high = figures["eigenvalue_ratio"]
        rest.append(
            {
                "label": "(v₁·E[x])² / ‖E[x]‖², mean of the layers behind the first",
                "ours": f"{fmean(alignment):.3f}",
                "published": f"{figures['mean_alignment']:.3f}",
            }
        )
        if ratios:
            rest.append(
                {
                    "label": "λ₁ / λ₂ of E[x xᵀ], mean [min, max] of these layers",
                    "ours": f"{fmean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                    "published": f"{mean:.2f} [{low:.2f}, {high:.2f}]",
                }
            )
    for name, point in published["between"].items() if result["pairs"] else ():
        k = point["k"]
        curves = [
            pair["layers"][name]["kronecker"] for pair in result["pairs"] if name in pair["layers"]
        ]
        if curves and k <= len(curves[0]):
            rest.append(
                {
                    "label": f"overlap between seeds, {name}, k = {k} (ours: of the Kronecker forms)",
                    "ours": _number(fmean(c[k - 1] for c in curves)),
                    "published": _number(point["overlap"]),
                }
            )
    return {
        "published_overlaps": overlaps,
        "published_eigenvalues": eigenvalues,
        "published_rest": rest,
    }


def _facts(result: Result) -> list[tuple[str, str]]:
    data, versions, settings = result["data"], result["versions"], result["settings"]
    build = versions["build"]
    facts = [
        ("data", f"{data['source']}; {data['samples']:,} training samples in the Hessians"),
        (
            "network",
            f"{network_name(result['network']['name'])}, {result['network']['parameters']:,} parameters",
        ),
        ("training", training_words(result)),
        ("loss", "cross-entropy, mean over the training samples"),
        ("arithmetic", f"{settings['dtype']} on {versions['device']}"),
        ("threads", str(versions["threads"])),
        (
            "versions",
            f"hesskern {versions['hesskern']}, torch {versions['torch']}, numpy {versions['numpy']}, "
            f"scipy {versions['scipy']}, Python {versions['python']}, {versions['system']}",
        ),
        ("kernels", ", ".join(f"{k} {v}" for k, v in build.items() if v not in ("", [], None))),
        ("started", result["created"]),
        ("took", _seconds(result["seconds"]) + " s"),
    ]
    return facts


def _times(result: Result) -> dict[str, Any]:
    columns = [m["label"] for m in result["models"]]
    by_step: dict[str, dict[str, float]] = {}
    for row in result["times"]:
        by_step.setdefault(row["step"], {})[row["model"]] = row["seconds"]
    shared = [
        {"step": step, "values": [_seconds(row[""])] + [""] * (len(columns) - 1)}
        for step, row in by_step.items()
        if "" in row
    ]
    single = [
        {
            "step": step,
            "values": [_seconds(row[c]) if c in row else "–" for c in columns],
        }
        for step, row in by_step.items()
        if "" not in row
    ]
    return {"time_columns": columns, "time_rows": single + shared}


def _eigen_words(result: Result) -> str:
    entries = [e for m in result["models"] for e in m["layers"].values()]
    worst = max(max(e["residuals"]) for e in entries)
    products = sum(e["matvecs"] for e in entries)
    count = sum(len(e["residuals"]) for e in entries)
    return (
        f"{count:,} exact eigenpairs took {products:,} products with a Hessian; the largest residual "
        f"‖Hv − λv‖ / λ₁ is {worst:.1e}."
    )


def _notes(result: Result) -> list[str]:
    notes = [
        f"Layer {name} was left out: it {why}."
        for name, why in result["network"]["skipped"].items()
    ]
    entries = [(m["label"], n, e) for m in result["models"] for n, e in m["layers"].items()]
    notes += [
        f"Eigenpairs of {name} ({label}) did not all reach the tolerance; see the residuals in result.json."
        for label, name, entry in entries
        if not entry["converged"]
    ]
    return notes + [f"Warning: {text}" for text in result["warnings"]]


def _mark(result: Result) -> int:
    """k = c - 1, or less where a layer has fewer eigenpairs."""
    shortest = min(len(e["overlap"]) for m in result["models"] for e in m["layers"].values())
    return min(max(result["data"]["classes"] - 1, 1), shortest)


def _columns(result: Result) -> list[int]:
    longest = max(len(e["overlap"]) for e in result["models"][0]["layers"].values())
    mark = _mark(result)
    return sorted({k for k in (1, mark, mark + 1, 2 * (mark + 1), longest) if k <= longest})


def _entries(result: Result, name: str) -> list[Mapping[str, Any]]:
    return [model["layers"][name] for model in result["models"]]


def _mean(result: Result, name: str, pick: Any) -> float:
    return fmean(pick(entry) for entry in _entries(result, name))


def _ratio(result: Result, name: str) -> float | None:
    """lambda_1 / lambda_2; None where one model's second eigenvalue is zero."""
    ratios = [e["autocorrelation"]["eigenvalue_ratio"] for e in _entries(result, name)]
    return None if any(r is None for r in ratios) else fmean(ratios)


def _has_inputs(result: Result, name: str) -> bool:
    return all("autocorrelation" in e for e in _entries(result, name))


def _at(curve: Sequence[float], k: int) -> float:
    return curve[min(k, len(curve)) - 1]


def _number(value: float) -> str:
    """Three significant digits, without exponents where they can be helped."""
    if value == 0:
        return "0"
    if 0.0005 <= abs(value) < 1:
        return f"{value:.3f}"
    if 1 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:.2e}"


def _percent(share: float) -> str:
    value = 100 * share
    return (
        f"{value:.0f} %"
        if 10 <= value <= 99
        else f"{value:.1f} %"
        if value >= 0.1
        else f"{value:.2g} %"
    )


def _range(values: Iterable[float], show: Any = _number) -> str:
    ordered = sorted(values)
    low, high = show(ordered[0]), show(ordered[-1])
    return low if low == high else f"{low} to {high}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
