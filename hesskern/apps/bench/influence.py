"""Suite ``influence``: scores of all training samples on a few queries, the fit included."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesskern.apps.bench import influence_peers, language, streams
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.settings import Settings
from hesskern.apps.bench.streams import Stream
from hesskern.attribution.influence import influence
from hesskern.choices import Output, Precision
from hesskern.factors.compute_ekfac import ekfac
from hesskern.progress import Progress

__all__ = ["problems"]

# Eigenvectors of close eigenvalues turn with every rounding of float32, and corrections with them:
# torch's own leave 4.6e-3 as well.
_AGREEMENT = 1e-2
# Of factors that are still summed in float32, as kronfluence and bergson have it.
_AGREEMENT_OF_FLOAT64 = 1e-4


def problems() -> list[Problem]:
    """MC as one would fit it; empirical, where scores can be compared."""
    outputs: tuple[Output, ...] = ("mc", "empirical")
    return [
        Problem(
            "influence",
            f"gpt2-{output}",
            partial(_build, output),
            None if output == "mc" else relative_difference,
            memory=True,
        )
        for output in outputs
    ]


def _build(output: Output, settings: Settings, progress: Progress) -> Built:
    case = language.gpt2(settings)
    queries = language.queries(case, 2 if settings.quick else 8)
    stream, drawn = streams.text(case), output == "mc"

    def ours(precision: Precision) -> Any:
        fitted = ekfac(
            case.model,
            case.batches,
            stream.loss,
            list(stream.names),
            output,
            precision=precision,
        )
        return influence(fitted, case.model, [queries], case.batches, stream.loss)

    kind = "drawn targets (MC)" if drawn else "the targets (empirical)"
    return (
        f"{case.title}: influence of all samples on {len(queries['labels'])} queries, EKFAC of "
        f"{kind} included",
        "random weights, float32; the 4 Linear-like layers of every block; damping a tenth of each "
        "layer's mean eigenvalue; gradients of a sample's mean loss; all queries in one batch",
        [
            Contender(
                "hesskern",
                lambda: partial(ours, "float32"),
                read=lambda found: found.scores,
                limit=_AGREEMENT,
            ),
            Contender(
                "hesskern, eigenvectors in float64",
                lambda: partial(ours, "float64"),
                read=lambda found: found.scores,
                limit=_AGREEMENT_OF_FLOAT64,
            ),
            Contender(
                "hooks and torch",
                lambda: lambda: _plain(stream, queries, drawn),
                read=lambda scores: scores,
            ),
            *(
                Contender(
                    peer.name,
                    partial(peer.prepare, stream, queries, drawn),
                    peer.package,
                    peer.module,
                    read=lambda scores: scores,
                )
                for peer in influence_peers.PEERS
            ),
            streams.gradient(stream),
            Contender(
                "hooks and torch, float64",
                lambda: lambda: _plain(streams.double(stream), queries, drawn),
                read=lambda scores: scores,
                reference=True,
            ),
        ],
    )


def _plain(stream: Stream, queries: Any, drawn: bool) -> Tensor:
    """[q, n] scores by hooks alone: EKFAC, the queries' gradients times its inverse, and a pass
    over the training samples that makes each gradient and multiplies."""
    bases = streams.plain_ekfac(stream, drawn)
    turned: dict[str, Tensor] = {}

    def precondition(name: str, x: Tensor, g: Tensor) -> None:
        u, v, s = bases[name]
        damped = s + 0.1 * s.mean()
        turned[name] = (u @ ((u.T @ (g.mT @ x) @ v) / damped) @ v.T).flatten(1)

    parts: list[Tensor] = []

    def score(name: str, x: Tensor, g: Tensor) -> None:
        parts[-1] += turned[name] @ (g.mT @ x).flatten(1).T

    def losses(batch: Any) -> Tensor:
        parts.append(
            next(iter(turned.values())).new_zeros(len(queries["labels"]), len(batch["labels"]))
        )
        return stream.losses(stream.model, batch)

    streams.watched(
        stream, [queries], lambda batch: stream.losses(stream.model, batch), precondition
    )
    streams.watched(stream, stream.batches, losses, score)
    return torch.cat(parts, 1)
