"""Suite ``ekfac``: factors, eigenbases and eigenvalue corrections of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hesskern.apps.bench import cases, ekfac_peers, language, streams
from hesskern.apps.bench.contenders import Built, Contender, Problem
from hesskern.apps.bench.machine import installed_version
from hesskern.apps.bench.settings import Settings
from hesskern.apps.bench.streams import Bases, Stream
from hesskern.choices import Output
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.compute_ekfac import ekfac
from hesskern.operators.corrected import eigenvalue_corrected
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-5


def problems() -> list[Problem]:
    """MC, then empirical, where corrections can be compared."""
    networks: dict[str, Callable[[Settings], Stream]] = {
        "resnet18": lambda settings: streams.images(
            cases.resnet18(settings), 8 if settings.quick else 64
        ),
        "lenet5": lambda settings: streams.images(
            cases.lenet5(settings), 64 if settings.quick else 256
        ),
    }
    if installed_version("transformers") is not None:
        networks = {
            "gpt2": lambda settings: streams.text(language.gpt2(settings)),
            "gpt2-vocabulary": lambda settings: streams.text(
                language.gpt2(settings, full_vocabulary=True)
            ),
            **networks,
        }
    outputs: tuple[Output, ...] = ("mc", "empirical")
    return [
        Problem(
            "ekfac", f"{name}-{output}", partial(_build, make, output), streams.difference, True
        )
        for output in outputs
        for name, make in networks.items()
        if (name, output) != ("gpt2-vocabulary", "empirical")
    ]


def _build(
    make: Callable[[Settings], Stream], output: Output, settings: Settings, progress: Progress
) -> Built:
    stream = make(settings)
    drawn = output == "mc"
    fit = (stream.model, stream.batches, stream.loss)
    limit = streams.MISFIT if drawn else _AGREEMENT
    names = list(stream.names)

    def stored() -> Any:
        factors = kronecker_factors(*fit, names, output)
        hessians = layer_hessians(*fit, names, output=output)
        return {
            name: eigenvalue_corrected(hessians[name], factors[name].operator()) for name in names
        }

    kind = "from one drawn target each (MC)" if drawn else "empirical"
    return (
        f"{stream.title}: EKFAC {kind}",
        stream.description,
        [
            Contender(
                "hesskern",
                lambda: lambda: ekfac(*fit, names, output),
                read=_bases,
                limit=limit,
            ),
            Contender("hesskern, stored samples", lambda: stored, read=_bases, limit=limit),
            Contender(
                "hooks and torch",
                lambda: lambda: streams.plain_ekfac(stream, drawn),
                read=lambda bases: bases,
            ),
            *(
                Contender(
                    peer.name,
                    partial(peer.prepare, stream, drawn),
                    peer.package,
                    peer.module,
                    read=lambda bases: bases,
                )
                for peer in ekfac_peers.PEERS
                if peer.images or isinstance(stream.case, language.TextCase)
            ),
            streams.gradient(stream),
            Contender(
                "hooks and torch, float64",
                lambda: streams.reference(stream, drawn),
                read=lambda found: found,
                reference=True,
            ),
        ],
    )


def _bases(operators: Mapping[str, Any]) -> Bases:
    """Of layers without groups."""
    found = {}
    for name, operator in operators.items():
        (left,), (right,), (values,) = operator.eigenbases
        found[name] = (left, right, values)
    return found
