"""Suite ``lm``: factors and input covariances of a native model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hesskern.apps.bench import language, lm_peers
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.language import Pairs, TextCase
from hesskern.apps.bench.settings import Settings
from hesskern.choices import Output
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.compute_inputs import input_covariances
from hesskern.passes.transformers import CausalLM
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-5


def problems() -> list[Problem]:
    """MC and empirical factors and input covariances of a GPT-2, MC and inputs with padding too."""
    listed: list[tuple[str, Callable[..., Built]]] = [
        ("mc", partial(_factors, "mc", False)),
        ("mc-padded", partial(_factors, "mc", True)),
        ("empirical", partial(_factors, "empirical", False)),
        ("empirical-padded", partial(_factors, "empirical", True)),
        ("inputs", partial(_inputs, language.gpt2, False)),
        ("inputs-padded", partial(_inputs, language.gpt2, True)),
        ("inputs-llama", partial(_inputs, language.llama, False)),
    ]
    return [Problem("lm", key, build, _difference, memory=True) for key, build in listed]


def _factors(output: Output, padded: bool, settings: Settings, progress: Progress) -> Built:
    case = language.gpt2(settings, padded)
    drawn = output == "mc"
    names = list(language.layers(case.model))

    def subject() -> Any:
        return kronecker_factors(case.model, case.batches, CausalLM(), names, output)

    def ours(factors: Any) -> Pairs:
        return {n: (f.output_hessian, f.input_covariance) for n, f in factors.items()}

    def compared(pairs: Pairs) -> Pairs:
        # Drawn gradients are not those of another package.
        return {n: (None if drawn else g, a) for n, (g, a) in pairs.items()}

    kind = "from one drawn target per token (MC)" if drawn else "empirical"
    return (
        f"{case.title}: factors {kind}",
        "random weights, float32; the 4 Linear-like layers of every block, as the head is tied to "
        "the embedding; weights only",
        [
            Contender(
                "hesskern",
                lambda: subject,
                read=lambda factors: compared(ours(factors)),
                limit=_AGREEMENT,
            ),
            Contender(
                "hooks and addmm (torch), empirical",
                lambda: lambda: language.hooked_factors(case),
                read=compared,
            ),
            *(
                Contender(
                    peer.name,
                    partial(peer.prepare, case, drawn),
                    peer.package,
                    peer.module,
                    read=lambda pairs: compared(pairs),
                )
                for peer in lm_peers.PEERS
                if padded <= peer.padding
            ),
            language.gradient(case),
            Contender(
                "hooks and addmm, float64",
                lambda: lambda: language.hooked_factors(language.double(case)),
                read=compared,
                reference=True,
            ),
        ],
    )


def _inputs(
    make: Callable[[Settings, bool], TextCase], padded: bool, settings: Settings, progress: Progress
) -> Built:
    case = make(settings, padded)

    def theirs(sums: Any) -> Pairs:
        return {name: (None, total / case.samples) for name, total in sums.items()}

    return (
        f"{case.title}: input covariances",
        "random weights, float32; forward passes alone; inputs that layers share once",
        [
            Contender(
                "hesskern",
                lambda: lambda: input_covariances(case.model, case.batches),
                read=lambda found: {n: (None, f.input_covariance) for n, f in found.items()},
                limit=_AGREEMENT,
            ),
            Contender("one forward pass", lambda: lambda: language.forward(case)),
            Contender(
                "hooks and addmm (torch)",
                lambda: lambda: language.hooked_inputs(case),
                read=theirs,
            ),
            language.gradient(case),
            Contender(
                "hooks and addmm, float64",
                lambda: lambda: language.hooked_inputs(language.double(case)),
                read=theirs,
                reference=True,
            ),
        ],
    )


def _difference(result: Pairs, reference: Pairs) -> float:
    """The largest relative difference of any factor of any layer that both have."""
    shared = result.keys() & reference.keys()
    if not shared:
        raise ValueError("there is no layer in common with the reference")
    return max(
        relative_difference(factor, expected)
        for name in shared
        for factor, expected in zip(result[name], reference[name], strict=True)
        if factor is not None and expected is not None
    )
