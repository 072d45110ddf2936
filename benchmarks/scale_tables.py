"""Tables of docs/scale.md, made of shapes, measured rates and assumed links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import scale_shapes as shapes
from scale_activations import per_token
from scale_shapes import FLOAT32, MODELS, RATES, TF32, Model, longest_share

__all__ = ["tables"]

RANKS = (1, 8, 64, 256, 1024)
# Assumptions, bytes a second each way and GPU: NVLink's nominal rate within eight GPUs, one
# 400 Gb/s adapter per GPU between them.
LINKS = {8: 450e9, 1024: 50e9}
# Sequences of all ranks together.
SEQUENCES = 32_768


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left."""
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> list[str]:
    """All of them, in the order of the page."""
    return [copies(), batches(), memory(), times(), eigensolves(), thresholds()]


def copies() -> str:
    """One copy of everything, whole."""
    rows = [
        [
            model.name,
            _bytes(model.parameters * model.number),
            _bytes(model.factors),
            _bytes(model.triangles),
            _bytes(model.factors),
            _bytes(model.corrections),
            _bytes(FLOAT32 * max(n * n for n in model.sides())),
        ]
        for model in MODELS
    ]
    headings = "weights", "factors", "sent", "eigenvectors", "corrections S", "largest factor"
    return table(["model", *headings], rows)


def batches() -> str:
    """What a sequence takes while it is in the pass."""
    rows = [
        [
            model.name,
            f"{model.tokens:,}",
            _bytes(model.blocks * per_token(model) * model.tokens),
            _bytes(model.rows),
            _bytes(2 * FLOAT32 * model.tokens * model.vocabulary),
        ]
        for model in MODELS
    ]
    headings = "tokens", "activations", "rows of all layers", "logits and root row, float32"
    return table(["one sequence of", *headings], rows)


def memory() -> str:
    """Bytes of a rank when eigenvectors are replicated, or left sharded."""
    rows = []
    for model in MODELS:
        sizes = [float(FLOAT32 * n * n) for n in model.sides()]
        for ranks in RANKS:
            share = longest_share(sizes, ranks)
            rows.append(
                [
                    model.name if ranks == RANKS[0] else "",
                    f"{ranks:,}",
                    _bytes(model.parameters * model.number),
                    _bytes(model.factors),
                    _bytes(2 * model.triangles * (ranks - 1) / ranks),
                    _bytes(model.factors + model.corrections),
                    _bytes(share + model.corrections),
                ]
            )
    headings = (
        "GPUs",
        "weights",
        "factors",
        "sent by a rank, once a pass",
        "eigenvectors and S, broadcast",
        "left sharded",
    )
    return table(["model", *headings], rows)


def times() -> str:
    """Seconds of passes over all sequences, part by part."""
    rows = []
    for model in MODELS:
        parts = _parts(model)
        for ranks in RANKS:
            each = -(-SEQUENCES // ranks)
            sent = _sent(model, ranks)
            computed = [each * part for part in parts]
            rows.append(
                [
                    model.name if ranks == RANKS[0] else "",
                    f"{ranks:,}",
                    *map(_seconds, computed[:2]),
                    _seconds(sent),
                    f"{100 * sent / (sum(computed[:2]) + sent):.2g} %",
                    *map(_seconds, computed[2:]),
                ]
            )
    headings = (
        "GPUs",
        "model",
        "sums of factors",
        "over the ranks",
        "of the pass",
        "S, float32 products",
        "S, TF32",
    )
    return table(["model", *headings], rows)


def _parts(model: Model) -> tuple[float, float, float, float]:
    """Seconds of a sequence on one GPU: model, sums of factors, corrections in float32, in TF32."""
    rates = RATES[model.number]
    return (
        model.pass_operations() / rates.product,
        sum(done / rates.gram_at(n) for n, done in model.gram_operations()),
        model.correction_operations() / RATES[4].product,
        model.correction_operations() / TF32,
    )


def _link(ranks: int) -> float:
    return next(rate for most, rate in LINKS.items() if ranks <= most)


def _sent(model: Model, ranks: int) -> float:
    """Seconds of the sum over the ranks: triangles all to all, then gathered."""
    return 2 * model.triangles * (ranks - 1) / ranks / _link(ranks)


def eigensolves() -> str:
    """Operations of the busiest rank, and what it then has to receive."""
    rows = []
    for model in MODELS:
        costs = model.eigen_operations()
        for ranks in RANKS:
            longest = longest_share(costs, ranks)
            received = model.factors * (ranks - 1) / ranks
            saved = sum(costs) - longest
            rows.append(
                [
                    model.name if ranks == RANKS[0] else "",
                    f"{ranks:,}",
                    f"{longest / 1e12:,.2f}",
                    f"{sum(costs) / longest:,.1f}",
                    _seconds(received / _link(ranks)),
                    "–" if ranks == 1 else f"{saved / (received / _link(ranks)) / 1e12:,.0f}",
                ]
            )
    headings = (
        "GPUs",
        "10^12 operations of the busiest rank",
        "speed-up",
        "broadcast, s",
        "pays below, 10^12 a second",
    )
    return table(["model", *headings], rows)


def thresholds() -> str:
    """The order of a factor from which on sharding pays, by link and by the rate of ``eigh``.

    Of two ranks each decomposes half of the factors and sends its own: an n^3 9 operations saved
    for n^2 4 bytes sent.
    """
    links = (1.25e9, 12.5e9, 50e9, 450e9)
    rows = [
        [
            f"{rate / 1e12:g}",
            *(f"{max(1, round(rate * FLOAT32 / (shapes.EIGH * link))):,}" for link in links),
        ]
        for rate in (0.1e12, 1e12, 10e12, RATES[4].product)
    ]
    names = [f"{link / 1e9:g} GB/s" for link in links]
    return table(["rate of `eigh`, 10^12 operations a second", *names], rows)


def _bytes(count: float) -> str:
    """GB with three digits."""
    gigabytes = count / 1e9
    return f"{gigabytes:,.0f}" if gigabytes >= 99.95 else f"{gigabytes:.3g}"


def _seconds(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.1g}" if value else "0"
