"""The calls that can be planned: one function for each word."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from hesskern.choices import Bias, Output, Precision
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.compute_ekfac import ekfac
from hesskern.factors.compute_inputs import input_covariances
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.progress import Progress
from hesskern.spill.rooms import Spill

__all__ = ["Request", "What"]

What = Literal["factors", "ekfac", "hessians", "inputs"]
"""kronecker_factors, ekfac, layer_hessians or input_covariances."""


@dataclass(frozen=True)
class Request:
    """A call to be planned.

    Attributes:
        what: which function.
        loss, layers, output, bias, mc_samples, output_root, memory_budget, check, max_outputs,
            position_mask, diagonal, precision, spill: as in the function; those that it lacks are
            not used.
    """

    what: What
    loss: Any = None
    layers: str | Iterable[str] | None = None
    output: Output = "exact"
    bias: Bias = "none"
    mc_samples: int = 1
    output_root: Callable[..., Tensor] | None = None
    memory_budget: int | None = None
    check: bool = True
    max_outputs: int = 8192
    position_mask: Callable[[Any], Any] | None = None
    diagonal: bool = False
    precision: Precision = "float32"
    spill: Spill | None = None

    def changed(self, **options: Any) -> Request:
        """The same with other options."""
        return replace(self, **options)

    def run(self, model: nn.Module, data: Iterable[Any], progress: Progress | bool = False) -> Any:
        """Makes the call; its result."""
        if self.what == "inputs":
            return input_covariances(
                model,
                data,
                layers=self.layers,
                bias=self.bias,
                position_mask=self.position_mask,
                progress=progress,
            )
        function, own = _FUNCTIONS[self.what]
        names = (*own, "bias", "mc_samples", "output_root", "memory_budget", "check")
        options = {name: getattr(self, name) for name in (*names, "position_mask")}
        return function(
            model, data, self.loss, self.layers, output=self.output, progress=progress, **options
        )


_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "factors": (kronecker_factors, ("max_outputs", "diagonal", "spill")),
    "ekfac": (ekfac, ("max_outputs", "precision")),
    "hessians": (layer_hessians, ("spill",)),
}
