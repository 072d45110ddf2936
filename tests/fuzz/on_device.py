"""What hesskern says about a case on another device, held against what it says on the CPU.

The CPU's answers are held against the reference by :mod:`fuzz.verdict`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from devices import moved
from torch import Tensor, nn

import hesskern as hk
from fuzz.grammar import Case
from fuzz.program import plain_torch
from fuzz.state import Snapshot
from fuzz.verdict import Finding, Verdict, thrown

__all__ = ["ANSWERS", "judge_on"]

Numbers = dict[str, Tensor]


def _factors(output: str) -> Callable[..., Numbers]:
    def answer(model: nn.Module, data: Any, loss: Any, **options: Any) -> Numbers:
        found = hk.kronecker_factors(model, data, loss, output=output, **options)
        return {
            f"{name} {what}": getattr(layer, what)
            for name, layer in found.items()
            for what in ("input_covariance", "output_hessian", "input_mean")
        }

    return answer


def _ekfac(model: nn.Module, data: Any, loss: Any, **options: Any) -> Numbers:
    """Sums over eigenvectors alone: those of equal eigenvalues are any of their space."""
    found = hk.ekfac(model, data, loss, output="exact", precision="float64", **options)
    return {name: torch.tensor(layer.trace()) for name, layer in found.items()}


def _hessians(model: nn.Module, data: Any, loss: Any, **options: Any) -> Numbers:
    found = hk.layer_hessians(model, data, loss, **options)
    return {name: _products(H) for name, H in found.items()}


def _gauss_newton(model: nn.Module, data: Any, loss: Any, **options: Any) -> Numbers:
    return {"all": _products(hk.GaussNewton(model, data, loss, **options))}


def _covariances(model: nn.Module, data: Any, loss: Any, **options: Any) -> Numbers:
    found = hk.input_covariances(model, data, **options)
    return {name: layer.input_covariance for name, layer in found.items()}


def _products(H: Any) -> Tensor:
    """With a vector and a block."""
    source = torch.Generator().manual_seed(0)
    V = torch.randn(H.shape[0], 3, generator=source, dtype=torch.float64).to(H.device, H.dtype)
    found: Tensor = torch.cat([H @ V, (H @ V[:, 0])[:, None]], 1)
    return found


ANSWERS: dict[str, Callable[..., Numbers]] = {
    "kronecker_factors": _factors("exact"),
    "kronecker_factors empirical": _factors("empirical"),
    "layer_hessians": _hessians,
    "GaussNewton": _gauss_newton,
    "ekfac": _ekfac,
    "input_covariances": _covariances,
}


def judge_on(
    device: torch.device,
    case: Case,
    answers: dict[str, Callable[..., Numbers]] | None = None,
) -> Verdict:
    """Every entry point on the CPU and on a device: equal numbers, or a refusal on both.

    Args:
        device: the other one.
        case: to be judged.
        answers: what is asked on the device, by entry; for tests of this.
    """
    verdict = Verdict(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, data = case.model(), case.data()
        there = case.model().to(device), moved(data, device)
        if case.program.random or not _agrees(case, device):
            verdict.findings.append(Finding("model", "*", "unchecked", "random, or not of there"))
            return verdict
        weight = case.sample_weight
        for entry, ask in ANSWERS.items():
            here = _asked(ask, model, data, case, weight)
            before = Snapshot(*there)
            other = (answers or ANSWERS)[entry]
            far = _asked(other, *there, case, None if weight is None else weight.to(device))
            changes = before.changes()
            if changes:
                verdict.findings.append(Finding(entry, "*", "CHANGED", ", ".join(changes[:5])))
            verdict.findings += _compared(entry, here, far, case, device)
    return verdict


def _agrees(case: Case, device: torch.device) -> bool:
    """Whether the program is one function on both.

    Programs that make tensors of their own make them on the CPU; and on CUDA some of torch's
    functions round float64 to float32 on their way.
    """
    here, there = case.model().eval(), case.model().to(device).eval()
    wide = case.dtype == torch.float64
    try:
        with plain_torch():
            for batch in case.batches:
                given = case.inputs(batch, wide=False)
                one, other = here(*given), there(*moved(given, device))
                one, other = (getattr(out, "logits", out) for out in (one, other))
                if wide and not torch.allclose(one, other.cpu(), rtol=1e-11, atol=1e-12):
                    return False
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _asked(
    ask: Callable[..., Numbers], model: nn.Module, data: Any, case: Case, weight: Tensor | None
) -> Numbers | tuple[str, str]:
    """Numbers, or outcome and detail of what was raised."""
    options = {} if weight is None else {"sample_weight": weight}
    try:
        return ask(model, data, case.loss.loss, **options)
    except Exception as error:
        return thrown(error, model)


def _compared(
    entry: str,
    here: Numbers | tuple[str, str],
    far: Numbers | tuple[str, str],
    case: Case,
    device: torch.device,
) -> list[Finding]:
    if isinstance(here, tuple) or isinstance(far, tuple):
        if isinstance(here, tuple) and isinstance(far, tuple):
            return [Finding(entry, "*", far[0], far[1])]
        if isinstance(far, tuple):
            return [Finding(entry, "*", "CRASH", f"not on the CPU: {far[0]} {far[1]}")]
        return [Finding(entry, "*", "WRONG", f"numbers where the CPU has: {here}")]
    if list(here) != list(far):
        return [Finding(entry, "*", "WRONG", f"{list(far)}, on the CPU {list(here)}")]
    return [
        Finding(entry, name, *_difference(here[name], far[name], case, device)) for name in here
    ]


def _difference(here: Tensor, far: Tensor, case: Case, device: torch.device) -> tuple[str, str]:
    if here.is_floating_point() and far.dim() and far.device.type != device.type:
        return "WRONG", f"on {far.device}"
    if here.shape != far.shape or here.dtype != far.dtype:
        return "WRONG", f"{list(far.shape)} {far.dtype}, not {list(here.shape)} {here.dtype}"
    limit = {torch.float64: max(1e-8, case.program.tolerance), torch.float32: 2e-3}
    off = float((far.double().cpu() - here.double()).norm())
    scale = float(here.double().norm())
    # Sums that cancel leave what their terms' rounding leaves.
    floor = 1e-12 if case.dtype == torch.float64 else 1e-5
    if off <= limit.get(case.dtype, 0.25) * scale + floor:
        return "right", ""
    return "WRONG", f"off by {off:.2g} of {scale:.6g}"
