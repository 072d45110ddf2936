"""What the paper leaves open or shows in passing: forms, epochs, norms, smooth activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hesskern.apps.reproduce.items import pairs_of
from hesskern.apps.reproduce.lab import LOSS, Lab, Network
from hesskern.apps.reproduce.results import Chart, Curve, Outcome, Table, judge, spread_words
from hesskern.diagnostics.centring import centre_inputs
from hesskern.diagnostics.clustering import GradientClusters, gradient_clusters
from hesskern.diagnostics.functional import functional_share
from hesskern.diagnostics.metrics import decoupling_error, input_autocorrelation, subspace_overlap
from hesskern.diagnostics.output_space import row_space_overlap
from hesskern.factors.compute import kronecker_factors
from hesskern.operators.autograd import AutogradHessian
from hesskern.operators.corrected import eigenvalue_corrected
from hesskern.operators.gauss_newton import GaussNewton
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.operators.nearest import nearest_kronecker
from hesskern.passes.layers import parameter_of
from hesskern.solvers.eigsh import eigsh
from hesskern.solvers.spectrum import SpectralDensity, spectral_density
from hesskern.text import counted
from hesskern.zoo.data import Batches

__all__ = [
    "clusters",
    "forms",
    "functional_terms",
    "normalization",
    "random_data",
    "trajectory",
]

_OPEN = "not in the paper"
_WIDTHS = (50, 100, 200, 400, 800)
# Around c − 1 = 9, where the spectrum of a classifier with ten classes has its gap.
_TOP = (1, 9, 10, 20)


def forms(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """E[M] (x) E[x x^T], the nearest Kronecker product and EKFAC: distance from H, and overlap."""
    out = Outcome()
    for network in networks:
        found: dict[str, dict[str, dict[str, list[float]]]] = {}
        k = lab.classes(network) - 1
        for seed in lab.seeds(quick=2):
            for name, factors in lab.factors(network, seed).items():
                exact = lab.eigenpairs(network, seed, name, k)
                H = lab.hessian(network, seed, name)
                K = factors.operator()
                built = {"E[M] ⊗ E[x xᵀ]": K, "EKFAC on its basis": eigenvalue_corrected(H, K)}
                if factors.groups == 1:
                    nearest = nearest_kronecker(H, tol=1e-4)
                    built["nearest A ⊗ B"] = nearest
                    built["EKFAC on that basis"] = eigenvalue_corrected(H, nearest)
                for count, (form, operator) in enumerate(built.items(), 1):
                    error = decoupling_error(H, operator)
                    top = operator.eigsh(len(exact.values)).vectors
                    numbers = {
                        "spectral": error.spectral,
                        "frobenius": error.frobenius,
                        "frobenius_error": error.frobenius_error,
                        "overlap": float(subspace_overlap(exact.vectors, top)[-1]),
                    }
                    entry = found.setdefault(name, {}).setdefault(
                        form, {key: [] for key in numbers}
                    )
                    for key, value in numbers.items():
                        entry[key].append(value)
                    lab.progress(f"forms of {name}", count, len(built))
        out.numbers[network.name] = found
        rows = [
            [
                f"{name}, {form}",
                *(spread_words(entry[key]) for key in ("spectral", "frobenius", "overlap")),
            ]
            for name, by_form in found.items()
            for form, entry in by_form.items()
        ]
        doubt = max(
            max(entry["frobenius_error"])
            for by_form in found.values()
            for entry in by_form.values()
        )
        certainty = (
            f"Frobenius norms of large layers are estimated: standard error {doubt:.1g} at most."
            if doubt > 0
            else "Frobenius norms are exact."
        )
        out.tables.append(
            Table(
                network.name,
                ["layer and form", "‖H − K‖₂ / ‖H‖₂", "‖H − K‖_F / ‖H‖_F", f"overlap, k = {k}"],
                rows,
                "Relative errors of the form K; overlap of its top c − 1 eigenvectors with H's. "
                + certainty,
            )
        )
        for name, by_form in found.items():
            first, best = by_form["E[M] ⊗ E[x xᵀ]"], by_form.get("nearest A ⊗ B")
            out.verdicts.append(
                judge(
                    f"{name} of {network.name}: Frobenius error of E[M] ⊗ E[x xᵀ]",
                    first["frobenius"],
                    withheld=_OPEN,
                )
            )
            if best:
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: Frobenius error of the nearest A ⊗ B",
                        best["frobenius"],
                        withheld=_OPEN,
                    )
                )
    return out


def trajectory(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Overlap of H and K and their distance, over the epochs of training."""
    out = Outcome()
    for network in networks:
        last = lab.recipe(network).epochs
        epochs = sorted({0, 1, 2, last // 2, last} & set(range(last + 1)))
        k = lab.classes(network) - 1
        keys = ("overlap", "error", "spectral", "aligned")
        curves: dict[str, dict[str, list[list[float]]]] = {key: {} for key in keys}
        for seed in lab.seeds(quick=1, paper=2):
            rows: dict[str, dict[str, list[float]]] = {key: {} for key in keys}
            for epoch in epochs:
                stage = None if epoch == last else epoch
                for name, factors in lab.factors(network, seed, stage).items():
                    exact = lab.eigenpairs(network, seed, name, k, stage)
                    top = factors.eigsh(len(exact.values)).vectors
                    overlap = float(subspace_overlap(exact.vectors, top)[-1])
                    H = lab.hessian(network, seed, name, stage)
                    error = decoupling_error(H, factors.operator())
                    rows["overlap"].setdefault(name, []).append(overlap)
                    rows["error"].setdefault(name, []).append(error.frobenius)
                    rows["spectral"].setdefault(name, []).append(error.spectral)
                    aligned = input_autocorrelation(factors).mean_alignment
                    rows["aligned"].setdefault(name, []).append(aligned)
            for key, by_layer in rows.items():
                for name, values in by_layer.items():
                    curves[key].setdefault(name, []).append(values)
        out.numbers[network.name] = {"epochs": epochs, **curves}
        titles = {
            "overlap": ("overlap of H and K at k = c − 1", "overlap"),
            "error": ("decoupling error", "‖H − K‖_F / ‖H‖_F"),
            "spectral": ("spectral decoupling error", "‖H − K‖₂ / ‖H‖₂"),
            "aligned": ("input direction", "(v₁·E[x])² / ‖E[x]‖²"),
        }
        for key, (title, label) in titles.items():
            out.charts.append(
                Chart(
                    f"trajectory-{key}",
                    f"{network.name}: {title}",
                    "epoch",
                    label,
                    [
                        Curve(name, values, [float(e) for e in epochs], index)
                        for index, (name, values) in enumerate(curves[key].items())
                    ],
                    unit=True,
                )
            )
        for name, overlaps in curves["overlap"].items():
            for position, epoch in ((0, 0), (-1, last)):
                out.verdicts.append(
                    judge(
                        f"{name} of {network.name}: overlap at k = {k} "
                        f"after {counted(epoch, 'epoch')}",
                        [row[position] for row in overlaps],
                        withheld=_OPEN if epoch == 0 else "see the overlap item",
                    )
                )
    return out


def normalization(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """One network plain, centred after training, with norms and with smooth activations."""
    out = Outcome()
    rows = []
    for network in networks:
        k = lab.classes(network) - 1
        kinds = ["as trained"] + ["centred"] * ("-" not in network.model)
        for kind in kinds:
            found: dict[str, dict[str, list[float]]] = {}
            factors_of, seeds = {}, lab.seeds()
            for seed in seeds:
                factors = lab.factors(network, seed)
                model = lab.model(network, seed)
                if kind == "centred":
                    batches = lab.batches(network)
                    model = centre_inputs(_sequential(model), batches)
                    factors = kronecker_factors(model, batches, LOSS, progress=lab.progress)
                    hessians = layer_hessians(
                        model,
                        batches,
                        LOSS,
                        list(factors)[1:],
                        memory_budget=lab.memory_budget,
                        progress=lab.progress,
                    )
                factors_of[seed] = factors
                for name in list(factors)[1:]:
                    if kind == "centred":
                        exact = eigsh(hessians[name], k)
                    else:
                        exact = lab.eigenpairs(network, seed, name, k)
                    numbers = input_autocorrelation(factors[name])
                    form = factors[name].eigsh(k).vectors
                    overlap = float(subspace_overlap(exact.vectors, form)[-1])
                    entry = found.setdefault(
                        name, {"aligned": [], "ratio": [], "overlap": [], "between": []}
                    )
                    entry["aligned"].append(numbers.mean_alignment)
                    entry["ratio"].append(numbers.eigenvalue_ratio)
                    entry["overlap"].append(overlap)
            for first, second in pairs_of(seeds):
                for name, entry in found.items():
                    m = factors_of[first][name].layer_shape[0]
                    spaces = [factors_of[s][name].eigsh(m).vectors for s in (first, second)]
                    entry["between"].append(float(subspace_overlap(*spaces)[-1]))
            label = network.name + (", activations centred" if kind == "centred" else "")
            out.numbers[label] = found
            for name, entry in found.items():
                rows.append(
                    [
                        f"{name} of {label}",
                        # After centring there is no mean left to be aligned with.
                        "–" if kind == "centred" else spread_words(entry["aligned"]),
                        spread_words(entry["ratio"], 2),
                        spread_words(entry["overlap"]),
                        spread_words(entry["between"]) if entry["between"] else "–",
                    ]
                )
    out.tables.append(
        Table(
            "What the mean input does",
            [
                "layer",
                "(v₁·E[x])²",
                "λ₁ / λ₂ of E[x xᵀ]",
                f"overlap H, K at k = {lab.classes(networks[0]) - 1}",
                "between models, k = m",
            ],
            rows,
            "Centred: the trained network with every E[x] moved into the bias; it computes the "
            "same. Layer norm, tanh and GELU are not piecewise linear: there H is the Gauss-Newton "
            "block. "
            "Between models: Kronecker forms.",
        )
    )
    return out


def _sequential(model: nn.Module) -> nn.Sequential:
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"centring needs a sequential network, got {type(model).__name__}")
    return model


def functional_terms(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """The functional term of smooth activations, and between layers of piecewise linear nets.

    How much of H is missing from the Gauss-Newton matrix, and how far their top eigenspaces differ.
    """
    out = Outcome()
    rows, spaces, densities = [], [], []
    for network in networks:
        overlaps: dict[str, list[float]] = {}
        shares: dict[str, dict[str, list[float]]] = {}
        for seed in lab.seeds(quick=2, paper=2):
            model, batches = lab.model(network, seed), lab.batches(network)
            for name in lab.factors(network, seed):
                share = functional_share(
                    model, batches, LOSS, name, memory_budget=lab.memory_budget
                )
                entry = shares.setdefault(name, {"spectral": [], "frobenius": []})
                entry["spectral"].append(share.spectral)
                entry["frobenius"].append(share.frobenius)
                lab.progress(f"{network.name}: functional term of {name}", 1, 1)
            G = GaussNewton(model, batches, LOSS, memory_budget=lab.memory_budget)
            params = [parameter_of(model, name) for name in G.slices]
            H = AutogradHessian(model, batches, LOSS, params)
            whole = decoupling_error(H, G)
            entry = shares.setdefault("all layers", {"spectral": [], "frobenius": []})
            entry["spectral"].append(whole.spectral)
            entry["frobenius"].append(whole.frobenius)
            parts = {"H": H, "Gauss-Newton": G}
            counts = [k for k in _TOP if k <= G.shape[0]]
            tops = [
                eigsh(operator, counts[-1], progress=lab.progress).vectors
                for operator in parts.values()
            ]
            by_count = subspace_overlap(*tops)
            for k in counts:
                overlaps.setdefault(str(k), []).append(float(by_count[k - 1]))
            if seed == 0:
                found = {
                    label: spectral_density(operator, 50, 4, progress=lab.progress)
                    for label, operator in parts.items()
                }
                densities.append((network, found))
        out.numbers[network.name] = {**shares, "overlap of top eigenspaces": overlaps}
        for name, entry in shares.items():
            rows.append([f"{name} of {network.name}", *(spread_words(v) for v in entry.values())])
        spaces.append(
            [
                network.name,
                *(spread_words(overlaps[str(k)]) if str(k) in overlaps else "–" for k in _TOP),
            ]
        )
    out.tables += [
        Table(
            "The functional term",
            ["layer", "‖F‖₂ / ‖H‖₂", "‖F‖_F / ‖H‖_F"],
            rows,
            "H by double backward, F = H − its Gauss-Newton part. Zero within the layers of "
            "piecewise linear networks, and not between them.",
        ),
        Table(
            "Top eigenspaces of H and its Gauss-Newton part, all layers",
            ["network", *(f"overlap, k = {k}" for k in _TOP)],
            spaces,
            "Of the k largest eigenvalues, signs counted; weights of all layers, no biases.",
        ),
    ]
    out.charts += [_density_chart(network, found) for network, found in densities]
    return out


def _density_chart(network: Network, found: dict[str, SpectralDensity]) -> Chart:
    lowest = min(float(d.nodes.min()) for d in found.values())
    highest = max(float(d.nodes.max()) for d in found.values())
    room = 0.05 * (highest - lowest)
    grid = torch.linspace(lowest - room, highest + room, 241, dtype=torch.float64)

    def on(density: SpectralDensity) -> Tensor:
        return density.on(grid, (highest - lowest) / 100).clamp(min=1e-7)

    return Chart(
        f"density-{network.data}-{network.model}",
        f"Spectral density, {network.name}",
        "eigenvalue",
        "density",
        [
            Curve(label, [on(density).tolist()], grid.tolist(), index)
            for index, (label, density) in enumerate(found.items())
        ],
        log=True,
        integers=False,
    )


def random_data(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Two layers, Gaussian data and weights: what the theorem says of E[M] as the width grows."""
    out = Outcome()
    classes = 10
    widths = list(_WIDTHS)
    gaps: list[list[float]] = []
    overlaps: list[list[float]] = []
    samples = 2000 if lab.profile == "quick" else 10_000
    for seed in lab.seeds():
        gap, overlap = [], []
        for width in widths:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(samples, width, generator=generator)
            y = torch.zeros(samples, dtype=torch.int64)
            first = nn.Linear(width, width, bias=False)
            second = nn.Linear(width, classes, bias=False)
            model = nn.Sequential(first, nn.ReLU(), second)
            with torch.no_grad():
                for layer in (first, second):
                    noise = torch.randn(layer.weight.shape, generator=generator)
                    layer.weight.copy_(noise / width**0.5)
            factors = kronecker_factors(model, Batches(x, y, 500), LOSS, ["0"])["0"]
            M = factors.output_hessian
            values = torch.linalg.eigvalsh(M.double()).flip(0)
            gap.append(float(values[classes - 1] / values[classes - 2]))
            overlap.append(row_space_overlap(second.weight, M).orthogonal)
            lab.progress("random two-layer networks", len(gap), len(widths))
        gaps.append(gap)
        overlaps.append(overlap)
    out.numbers = {"widths": widths, "gap": gaps, "overlap": overlaps}
    x_axis = [float(width) for width in widths]
    out.charts = [
        Chart(
            "theorem-overlap",
            "Top c − 1 of E[M] and the row space of S",
            "width n = d",
            "overlap",
            [Curve("without 1ᵀS", overlaps, x_axis)],
            unit=True,
        ),
        Chart(
            "theorem-gap",
            "λ_c / λ_(c−1) of E[M]",
            "width n = d",
            "ratio",
            [Curve("random two-layer networks", gaps, x_axis, 1)],
        ),
    ]
    for label, rows, limit in (
        ("overlap with the row space of S", overlaps, "→ 1"),
        ("λ_c / λ_(c−1)", gaps, "→ 0"),
    ):
        for position in (0, -1):
            out.verdicts.append(
                judge(
                    f"{label}, width {widths[position]}",
                    [row[position] for row in rows],
                    limit,
                    withheld="a limit: see how it moves with the width",
                )
            )
    out.notes.append(
        f"c = {classes}, x ~ N(0, I), weights ~ N(0, 1/n), {samples:,} samples, {len(gaps)} seeds."
    )
    return out


def clusters(lab: Lab, networks: Sequence[Network]) -> Outcome:
    """Do gradients of the logits cluster by logit, by class, or by both?"""
    out = Outcome()
    rows = []
    for network in networks:
        found: dict[str, dict[str, list[float]]] = {}
        for seed in lab.seeds():
            for stage, epochs in (("initialization", 0), ("after training", None)):
                model = lab.model(network, seed, epochs)
                for name in list(lab.factors(network, seed))[:-1]:
                    shares = gradient_clusters(model, lab.batches(network), name)
                    numbers = {
                        "logit": shares.by_logit,
                        "class": shares.by_class,
                        "both": shares.by_both,
                        "within": _class_within_logits(shares),
                    }
                    entry = found.setdefault(f"{name}, {stage}", {key: [] for key in numbers})
                    for key, value in numbers.items():
                        entry[key].append(value)
                    lab.progress(f"{network.name}: gradients of {name}", 1, 1)
        out.numbers[network.name] = found
        rows += [
            [f"{label}, {network.name}", *(spread_words(values) for values in entry.values())]
            for label, entry in found.items()
        ]
    out.tables.append(
        Table(
            "Share of the gradients' variance that cluster means explain",
            ["layer", "by logit", "by class", "by logit and class", "by class, within logits"],
            rows,
            "Vectors: d logit_i / d z of every sample and logit. Logit clusters make the c − 1 "
            "large eigenvalues of E[M]. Means of a class over all logits nearly cancel, so that "
            "the share by class alone is small however much the class matters; within logits is "
            "what it explains of the variance that the logit leaves, (both − logit) / (1 − logit).",
        )
    )
    return out


def _class_within_logits(shares: GradientClusters) -> float:
    """The class's share of the variance within logits; 0 where the logit leaves none."""
    left = 1 - shares.by_logit
    # Below this the quotient would be rounding: a linear network has no variance within logits.
    return (shares.by_both - shares.by_logit) / left if left > 1e-9 else 0.0
