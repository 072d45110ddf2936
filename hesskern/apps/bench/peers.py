"""Contenders from other packages, each as its documentation uses it. All imports are inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.contenders import LOSS, Call
from hesskern.choices import Output

__all__ = [
    "backpack_factors",
    "curvlinops_factors",
    "curvlinops_kfac",
    "curvlinops_product",
    "eigenthings_lanczos",
    "eigenthings_product",
    "positions",
    "pyhessian_product",
]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """The layers' weights: hesskern's factors are those of weights."""
    return [layer.get_parameter("weight") for layer in _layers(model).values()]


def positions(case: Case) -> dict[str, int]:
    """Output positions per sample of every layer: the packages normalize factors by them."""
    counts: dict[str, int] = {}
    handles = [
        layer.register_forward_hook(
            lambda _module, _inputs, out, name=name: counts.update({name: out[0, 0].numel()})
        )
        for name, layer in _layers(case.model).items()
    ]
    try:
        with torch.no_grad():
            case.model(case.inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    return counts


def curvlinops_kfac(case: Case, output: Output) -> Any:
    """curvlinops' KFAC operator of all weights, KFAC-expand; "exact" is its type-2 Fisher."""
    from curvlinops import FisherType, KFACLinearOperator, KFACType

    return KFACLinearOperator(
        case.model,
        LOSS,
        _weights(case.model),
        case.batch,
        check_deterministic=False,
        fisher_type={"exact": FisherType.TYPE2, "mc": FisherType.MC}[output],
        kfac_approx=KFACType.EXPAND,
        # Known numbers, so that it does not walk over the data to count.
        num_data=case.samples,
        num_per_example_loss_terms=1,
    )


def curvlinops_factors(case: Case, output: Output) -> Call:
    """Factors by curvlinops; touching ``trace`` computes them."""

    def call() -> Any:
        operator = curvlinops_kfac(case, output)
        _ = operator.trace
        return operator

    return call


def backpack_factors(case: Case, output: Output) -> Call:
    """Factors by BackPACK: KFLR is exact, KFAC draws targets."""
    from backpack import backpack, extend
    from backpack.extensions import KFAC, KFLR

    # extend() leaves hooks on the modules for good, so it gets a model of its own.
    model = extend(copy.deepcopy(case.model))
    loss = extend(nn.CrossEntropyLoss())
    extension, attribute = {"exact": (KFLR, "kflr"), "mc": (KFAC, "kfac")}[output]
    weights = dict(zip(_layers(model), _weights(model), strict=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in weights)

    def call() -> dict[str, list[Tensor]]:
        with backpack(extension()):
            loss(model(case.inputs), case.targets).backward()
        factors = {name: getattr(weight, attribute) for name, weight in weights.items()}
        for weight in weights.values():
            delattr(weight, attribute)
            weight.grad = None
        return factors

    return call


def curvlinops_product(case: Case, parameter: str, vector: Tensor, ggn: bool = False) -> Call:
    """H v (or the Gauss-Newton product) by curvlinops."""
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    weight = case.model.get_parameter(parameter)
    operator = (GGNLinearOperator if ggn else HessianLinearOperator)(
        case.model,
        LOSS,
        [weight],
        case.batch,
        check_deterministic=False,
        num_data=case.samples,
    )
    return lambda: operator @ vector


def _eigenthings_operator(case: Case, parameter: str) -> Any:
    from hessian_eigenthings import HessianOperator, match_names, supervised_loss

    return HessianOperator(
        case.model, case.batch, supervised_loss(LOSS), param_filter=match_names(parameter)
    )


def eigenthings_product(case: Case, parameter: str, vector: Tensor) -> Call:
    """H v by hessian-eigenthings."""
    operator = _eigenthings_operator(case, parameter)
    return lambda: operator.matvec(vector)


def eigenthings_lanczos(
    case: Case, parameter: str, k: int, steps: int, progress: Callable[[int], None]
) -> Call:
    """Top k eigenpairs by hessian-eigenthings' Lanczos, as many steps as asked for."""
    from hessian_eigenthings import LambdaOperator, lanczos

    operator = _eigenthings_operator(case, parameter)
    done = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal done
        done += 1
        progress(done)
        return operator.matvec(vector)

    counted = LambdaOperator(product, operator.size, device=operator.device, dtype=operator.dtype)
    return lambda: lanczos(counted, k=k, max_iter=steps, which="LA", reorthogonalize=True, seed=0)


def pyhessian_product(case: Case, parameter: str, vector: Tensor) -> Call:
    """H v by PyHessian over a data loader (given one batch it keeps the gradient's graph)."""
    from pyhessian import hessian

    model = copy.deepcopy(case.model)
    for name, value in model.named_parameters():
        value.requires_grad_(name == parameter)
    operator = hessian(model, LOSS, dataloader=case.batch, cuda=False)
    shaped = [vector.reshape(model.get_parameter(parameter).shape)]
    return lambda: operator.dataloader_hv_product(shaped)[1][0].flatten()
