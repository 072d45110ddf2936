"""Suite ``matvec``: one exact H v of every layer of F-200^2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesskern.apps.bench import peers
from hesskern.apps.bench.cases import f200
from hesskern.apps.bench.contenders import (
    LOSS,
    Built,
    Call,
    Contender,
    Problem,
    compiled_product,
    eager_product,
    gradient,
    kept_graph_product,
    relative_difference,
)
from hesskern.apps.bench.settings import Settings
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.progress import Progress

__all__ = ["LAYERS", "TOLERANCE", "problems"]

LAYERS = ("fc1", "fc2", "fc3")
TOLERANCE = 1e-4
_AGREEMENT = 1e-4


def _as_it_is(product: Tensor) -> Tensor:
    return product.reshape(-1)


_agreeing = partial(Contender, read=_as_it_is, limit=_AGREEMENT)
"""A contender whose result must be the subject's."""


def problems() -> list[Problem]:
    """One problem per layer; memory is measured on the first, the largest."""
    return [
        Problem("matvec", layer, partial(_build, layer), relative_difference, layer == LAYERS[0])
        for layer in LAYERS
    ]


def _build(layer: str, settings: Settings, progress: Progress) -> Built:
    case = f200(settings)
    parameter = f"{layer}.weight"
    weight = case.model.get_parameter(parameter)
    vector = torch.randn(weight.numel(), generator=torch.Generator().manual_seed(2))
    pruned: dict[str, Any] = {}

    def prepare(tolerance: float) -> Call:
        H = layer_hessians(case.model, case.batch, LOSS, layers=[layer], tolerance=tolerance)
        if tolerance:
            pruned["error"] = H[layer].pruning_error
        return lambda: H[layer] @ vector

    def certified(reference: Tensor) -> float:
        """What pruning promises for this vector, relative, and rounding."""
        bound = pruned["error"] * float(vector.norm() / reference.norm())
        return float(bound + _AGREEMENT)

    def peer(name: str, package: str, module: str, make: Any, **options: Any) -> Contender:
        return _agreeing(name, lambda: make(case, parameter, vector, **options), package, module)

    return (
        f"{case.title}: one H v of {layer} {list(weight.shape)}",
        case.description,
        [
            Contender("hesskern", lambda: prepare(0.0), read=_as_it_is),
            Contender(
                f"hesskern, tolerance={TOLERANCE:g}",
                lambda: prepare(TOLERANCE),
                read=_as_it_is,
                limit=certified,
            ),
            _agreeing("autograd, double backward", lambda: eager_product(case, parameter, vector)),
            _agreeing("autograd, graph kept", lambda: kept_graph_product(case, parameter, vector)),
            _agreeing(
                "autograd, torch.compile(jvp of grad)",
                lambda: compiled_product(case, parameter, vector),
                warm=True,
            ),
            peer(
                "curvlinops Hessian",
                "curvlinops-for-pytorch",
                "curvlinops",
                peers.curvlinops_product,
            ),
            peer(
                "curvlinops GGN",
                "curvlinops-for-pytorch",
                "curvlinops",
                peers.curvlinops_product,
                ggn=True,
            ),
            peer(
                "hessian-eigenthings",
                "hessian-eigenthings",
                "hessian_eigenthings",
                peers.eigenthings_product,
            ),
            peer("PyHessian", "pyhessian", "pyhessian", peers.pyhessian_product),
            gradient(case),
        ],
    )
