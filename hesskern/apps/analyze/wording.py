"""The report's sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hesskern.apps.analyze.digest import Digest
from hesskern.apps.analyze.result import AnalysisResult
from hesskern.text import counted, listed, number, percent, seconds, span

__all__ = ["eigen_words", "facts", "network_name", "notes", "subject", "summary", "training_words"]

_DATA_NAMES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}
_SUFFIXES = {
    "bn": " with batch norm",
    "ln": " with layer norm",
    "tanh": " (tanh)",
    "gelu": " (GELU)",
}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def subject(result: AnalysisResult) -> str:
    """The network and the data, e.g. ``F-200² on MNIST``."""
    data = result["data"]["name"]
    return f"{network_name(result['network']['name'])} on {_DATA_NAMES.get(data, data)}"


def network_name(spec: str) -> str:
    """``f200x2`` as the paper writes it, F-200²; other names as they are."""
    if ":" in spec:
        return spec
    body, *suffixes = spec.lower().split("-")
    extra = "".join(_SUFFIXES.get(part, "") for part in suffixes)
    given = next((p[1:] for p in suffixes if p[:1] == "w" and p[1:].isdigit()), "")
    if body in ("vgg11", "resnet18"):
        return (
            ("VGG11" if body == "vgg11" else "ResNet18") + (f"-W{given}" if given else "") + extra
        )
    if body == "lenet5":
        return "LeNet5" + (f" (fc1 {given})" if given else "") + extra
    width, _, depth = body[1:].replace("^", "x").partition("x")
    if body[:1] == "f" and width.isdigit() and (depth.isdigit() or not depth):
        power = depth.translate(_SUPERSCRIPT) if depth not in ("", "1") else ""
        return f"F-{width}{power}{extra}"
    return spec


def training_words(result: AnalysisResult) -> str:
    """How the models were trained."""
    trained = [m["training"] for m in result["models"] if m["training"]]
    if not trained:
        return "loaded from checkpoints"
    recipe = trained[0]["recipe"]
    momentum, decay = recipe["momentum"], recipe["weight_decay"]
    return ", ".join(
        [
            f"{counted(recipe['epochs'], 'epoch')} of SGD",
            f"learning rate {recipe['learning_rate']:g}",
            f"batch {recipe['batch_size']}",
            f"momentum {momentum:g}" if momentum else "no momentum",
            f"weight decay {decay:g}" if decay else "no weight decay",
            counted(len(trained), "seed"),
        ]
    )


def summary(digest: Digest) -> list[str]:
    """What was found, a few sentences."""
    sentences = [_leading_space(digest), _as_a_matrix(digest)]
    sentences += _inputs(digest) + _two_models(digest) + _beside_published(digest)
    return sentences


def _leading_space(digest: Digest) -> str:
    mark = digest.mark
    overlaps = {name: digest.marked(name, "overlap") for name in digest.layers}
    worst, best = (pick(overlaps, key=overlaps.__getitem__) for pick in (min, max))
    low, high = overlaps[worst], overlaps[best]
    amount = "most" if low >= 0.75 else "a good part" if low >= 0.5 else "a part"
    share = (
        f"{percent(high)} ({best})"
        if best == worst
        else f"between {percent(low)} ({worst}) and {percent(high)} ({best})"
    )
    captured = span([digest.marked(name, "captured") for name in digest.layers], percent)
    return (
        f"The Kronecker form captures {amount} of the leading eigenspace: its top {mark} "
        f"directions share {share} of the space of the exact Hessian's top {mark}, and hold "
        f"{captured} of the curvature that the best {mark} directions hold."
    )


def _as_a_matrix(digest: Digest) -> str:
    spectral = span(digest.mean(n, lambda e: e["decoupling"]["spectral"]) for n in digest.layers)
    frobenius = span(digest.mean(n, lambda e: e["decoupling"]["frobenius"]) for n in digest.layers)
    return (
        f"As a matrix it is coarser: the relative error of H ≈ K is {spectral} in the spectral "
        f"norm and {frobenius} in the Frobenius norm."
    )


def _inputs(digest: Digest) -> list[str]:
    inner = [name for name in digest.layers[1:] if name in digest.with_inputs]
    if not inner:
        return []
    alignment = [digest.alignment(name) for name in inner]
    ratios = [r for name in inner if (r := digest.ratio(name)) is not None]
    rank_one = min(alignment) >= 0.95 and bool(ratios) and min(ratios) >= 3
    times = f", and its eigenvalue is {span(ratios)} times the second" if ratios else ""
    return [
        f"The inputs of the layers behind the first {'share' if rank_one else 'do not all share'} "
        "one dominant direction, their mean: the first eigenvector of E[x xᵀ] lies along it with a "
        f"squared cosine of {span(alignment)}{times}."
    ]


def _two_models(digest: Digest) -> list[str]:
    mark = digest.mark
    shared = {
        name: share
        for name in digest.layers
        if (share := digest.between(name, "exact", mark)) is not None
    }
    if not shared:
        return []
    most = max(shared, key=shared.__getitem__)
    weights = digest.entries(most)[0]["parameters"]
    return [
        f"Two models share most in {most}: {percent(shared[most])} of their top {mark} directions "
        f"(two random spaces: {percent(mark / weights)})."
    ]


def _beside_published(digest: Digest) -> list[str]:
    published = digest.result["published"]
    if not published or digest.mark not in published["overlap"]["k"]:
        return []
    position = published["overlap"]["k"].index(digest.mark)
    beside = [
        f"{name} {number(digest.marked(name, 'overlap'))} "
        f"({number(published['overlap']['layers'][name][position])})"
        for name in digest.layers
        if name in published["overlap"]["layers"]
    ]
    if not beside:
        return []
    return [f"Overlaps at k = {digest.mark}, and in brackets the published ones: {listed(beside)}."]


def facts(result: AnalysisResult) -> list[tuple[str, str]]:
    """How the result was made: pairs of a name and a text."""
    data, versions, network = result["data"], result["versions"], result["network"]
    return [
        ("data", f"{data['source']}; {data['samples']:,} training samples in the Hessians"),
        ("network", f"{network_name(network['name'])}, {network['parameters']:,} parameters"),
        ("training", training_words(result)),
        ("loss", "cross-entropy, mean over the training samples"),
        (
            "arithmetic",
            f"{result['settings']['dtype']} on {versions['device']}, "
            f"{counted(versions['threads'], 'thread')}",
        ),
        (
            "versions",
            f"hesskern {versions['hesskern']}, torch {versions['torch']}, numpy "
            f"{versions['numpy']}, scipy {versions['scipy']}, Python {versions['python']}, "
            f"{versions['system']}",
        ),
        ("kernels", _kernels(versions["build"])),
        ("started", result["created"].replace("T", " ").replace("+00:00", " UTC")),
        ("took", seconds(result["seconds"]) + " s"),
    ]


def _kernels(build: Mapping[str, Any]) -> str:
    texts = {
        "simd": "SIMD {}",
        "compiler": "compiler {}",
        "cuda": "CUDA {}",
        "cuda_architectures": "architectures {}",
    }
    return ", ".join(text.format(build[key]) for key, text in texts.items() if build.get(key))


def eigen_words(result: AnalysisResult) -> str:
    """How many eigenpairs there are, what they cost and how good they are."""
    entries = [entry for model in result["models"] for entry in model["layers"].values()]
    pairs = sum(len(entry["residuals"]) for entry in entries)
    products = sum(entry["matvecs"] for entry in entries)
    worst = max(max(entry["residuals"]) for entry in entries)
    return (
        f"{pairs:,} exact eigenpairs took {products:,} products with a Hessian; the largest "
        f"residual ‖Hv − λv‖ / λ₁ is {worst:.1e}."
    )


def notes(result: AnalysisResult) -> list[str]:
    """What a reader has to know before trusting the numbers."""
    texts = [
        f"Layer {name} was left out: it {why}."
        for name, why in result["network"]["skipped"].items()
    ]
    for model in result["models"]:
        texts += [
            f"Eigenpairs of {name} ({model['label']}) did not all reach the tolerance: the worst "
            f"residual is {max(entry['residuals']):.1e}."
            for name, entry in model["layers"].items()
            if not entry["converged"]
        ]
    return texts + [f"Warning: {text}" for text in result["warnings"]]
