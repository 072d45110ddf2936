"""Suite ``factors``: Kronecker factors of every layer, exact and from drawn targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hesskern.apps.bench import cases, peers
from hesskern.apps.bench.cases import Case, double
from hesskern.apps.bench.contenders import (
    Built,
    Call,
    Contender,
    Problem,
    gradient,
    hesskern_factors,
    relative_difference,
)
from hesskern.apps.bench.settings import Settings
from hesskern.choices import Output
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-5
_NETWORKS = {"mlp": cases.mlp, "lenet5": cases.lenet5, "cnn": cases.cnn}

Pairs = dict[str, tuple[Tensor | None, Tensor]]
"""Per layer, output Hessian [m, m] (None: drawn, not comparable) and input covariance [d, d]."""
References = tuple[Pairs, ...]


def problems() -> list[Problem]:
    """Exact factors of three networks, then factors from drawn targets."""
    return [
        Problem(
            "factors",
            f"{network}-{output}",
            partial(_build, make, output),
            _difference,
            memory=True,
        )
        for output in ("exact", "mc")
        for network, make in _NETWORKS.items()
    ]


def _build(
    make: Callable[[Settings], Case], output: Output, settings: Settings, progress: Progress
) -> Built:
    case = make(settings)
    drawn = output == "mc"
    counts = peers.positions(case)

    def ours(factors: Any) -> Pairs:
        return {
            name: (None if drawn else f.output_hessian, f.input_covariance)
            for name, f in factors.items()
        }

    def curvlinops(operator: Any) -> Pairs:
        # It averages input outer products over positions and sums the gradients' over them.
        return {
            name: (
                None if drawn else operator._gradient_covariances[name] / counts[name],
                operator._input_covariances[name] * counts[name],
            )
            for name in counts
        }

    def backpack(factors: dict[str, list[Tensor]]) -> Pairs:
        return {
            name: (None if drawn else output_factor / counts[name], input_factor)
            for name, (output_factor, input_factor) in factors.items()
        }

    kind = "from one drawn target per sample (MC)" if drawn else "exact (type 2)"
    return (
        f"{case.title}: factors {kind}",
        f"{case.description}; weights only, all layers",
        [
            Contender(
                "hesskern",
                lambda: hesskern_factors(case, output),
                read=ours,
                limit=_AGREEMENT,
            ),
            Contender(
                "curvlinops KFAC",
                lambda: peers.curvlinops_factors(case, output),
                "curvlinops-for-pytorch",
                "curvlinops",
                read=curvlinops,
            ),
            Contender(
                f"BackPACK {'KFAC' if drawn else 'KFLR'}",
                lambda: peers.backpack_factors(case, output),
                "backpack-for-pytorch",
                "backpack.extensions",
                read=backpack,
            ),
            gradient(case),
            # The other packages' float32 sums over all positions of all samples lose digits, so all
            # are held against curvlinops in float64. A ReLU or a maximum within rounding of a tie
            # falls another way there: against float32 as well, and the nearer counts.
            Contender(
                "curvlinops KFAC, float64 and float32",
                lambda: _both(
                    peers.curvlinops_factors(double(case), output),
                    peers.curvlinops_factors(case, output),
                ),
                "curvlinops-for-pytorch",
                read=lambda operators: tuple(map(curvlinops, operators)),
                reference=True,
            ),
            Contender(
                "hesskern, float64 and float32",
                lambda: _both(
                    hesskern_factors(double(case), output), hesskern_factors(case, output)
                ),
                read=lambda factors: tuple(map(ours, factors)),
                reference=True,
            ),
        ],
    )


def _both(first: Call, second: Call) -> Call:
    return lambda: (first(), second())


def _difference(result: Pairs, references: References) -> float:
    """The largest relative difference of any factor of any layer to the nearest reference."""
    worst = 0.0
    for name, pair in result.items():
        for i, factor in enumerate(pair):
            found = [reference[name][i] for reference in references]
            known = [expected for expected in found if expected is not None]
            if factor is not None and known:
                worst = max(worst, min(relative_difference(factor, e) for e in known))
    return worst
