"""The published methods: BASE, APPR, ITER, ITER(D), ITER.M (arXiv 2010.04261, section 5).

All start from the given (trained) weights and minimize surrogate + sqrt(BRE / 2) over the mean, the
log variances and one log lambda by RMSprop (rate 1e-3, a tenth of it after each fifth of the
budget), with one network drawn per batch. They differ in the basis of the variances:

=======  ============================================================================
base     standard
appr     U (x) V of the Kronecker factors at the start
iter     U (x) V at the current mean, anew every 10 of 2000 epochs
iter_d   the interval times 10 at every fall of the learning rate
iter_m   as iter, the output Hessian replaced by 4^-(L - p) S^T E[A] S, S = W^(L) ... W^(p+1)
=======  ============================================================================

The schedule is scaled to the budget: with 2000 epochs it is the published one. The start is that of
Dziugaite and Roy 2017: s = |w| (of the coordinates in the first basis), lambda = e^-6. At a
refresh the new basis takes over the covariance's diagonal in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from hesskern import ops
from hesskern.choices import PublishedMethod, check_choice, check_counts, check_positive
from hesskern.pacbayes.evaluate import wrong
from hesskern.pacbayes.loop import Draft
from hesskern.pacbayes.posterior import eigenbasis, gaussian_kl
from hesskern.pacbayes.problem import Problem, mean_over_groups
from hesskern.pacbayes.slots import evaluating, replaced
from hesskern.pacbayes.surrogates import log_loss

__all__ = ["METHODS", "Published", "PublishedSettings"]

METHODS: tuple[str, ...] = get_args(PublishedMethod)
_INTERVALS = 200
_FALLS = 5
_SMALLEST = 1e-12


@dataclass(frozen=True)
class PublishedSettings:
    """Optimizer of the published methods.

    Attributes:
        batch_size: examples per step.
        rate: RMSprop's learning rate at the start.
        prior_variance: lambda at the start.
    """

    batch_size: int = 100
    rate: float = 1e-3
    prior_variance: float = math.exp(-6)

    def __post_init__(self) -> None:
        check_counts(self, "batch_size")
        check_positive(self, "rate", "prior_variance")


class Published:
    """One of the published methods, one step at a time."""

    def __init__(
        self,
        name: str,
        problem: Problem,
        settings: PublishedSettings,
        generator: torch.Generator,
    ) -> None:
        check_choice("method", name, PublishedMethod)
        self.batch_size = settings.batch_size
        self._name, self._problem, self._samples = name, problem, problem.samples
        self._settings, self._generator = settings, generator
        slots = problem.slots
        self._centres = {key: slot.matrix(problem.prior) for key, slot in slots.items()}
        self._means = {
            key: slot.matrix(problem.start).requires_grad_(True) for key, slot in slots.items()
        }
        any_mean = next(iter(self._means.values()))
        self._log_prior = torch.tensor(
            math.log(settings.prior_variance), dtype=any_mean.dtype, device=any_mean.device
        ).requires_grad_(True)
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        if name != "base":
            self._bases = self._fresh_bases()
        self._log_variances = {
            key: self._coordinates(key, mean.detach())
            .abs()
            .clamp(min=1e-6)
            .log()
            .requires_grad_(True)
            for key, mean in self._means.items()
        }
        parameters = [*self._means.values(), *self._log_variances.values(), self._log_prior]
        self._optimizer = torch.optim.RMSprop(parameters, lr=settings.rate, foreach=True)
        self._refreshed = 0
        self._errors: list[tuple[Tensor, int]] = []

    def _coordinates(self, key: str, matrix: Tensor) -> Tensor:
        if key not in self._bases:
            return matrix.clone()
        U, V = (basis.to(matrix.dtype) for basis in self._bases[key])
        return ops.to_eigenbasis(U, V, matrix)

    def _fresh_bases(self) -> dict[str, tuple[Tensor, Tensor]]:
        factors = self._problem.factors({k: mean.detach() for k, mean in self._means.items()})
        closed = self._closed_form_hessians() if self._name == "iter_m" else {}
        return {
            key: (
                eigenbasis(closed.get(key, f.output_hessian))[1],
                eigenbasis(mean_over_groups(f.input_covariance))[1],
            )
            for key, f in factors.items()
        }

    def _closed_form_hessians(self) -> dict[str, Tensor]:
        """4^-(L - p) S^T E[A] S for every layer p of a chain of Linear layers."""
        names = list(self._problem.slots)
        weights = []
        for a, slot in self._problem.slots.items():
            if not slot.per_example:
                raise NotImplementedError(
                    f"method iter_m needs a chain of Linear layers, but {a!r} is none"
                )
            weights.append(self._means[a].detach()[:, : slot.spec.weight_inputs])
        for below, above in pairwise(weights):
            if below.shape[0] != above.shape[1]:
                raise NotImplementedError("method iter_m needs a plain chain of Linear layers")
        with torch.no_grad(), evaluating(self._problem.model):
            outputs = torch.cat([self._problem.model(x) for x in self._samples.inputs.split(2000)])
        if outputs.shape[1] == 1:
            p = torch.sigmoid(outputs)
            curvature = (p * (1 - p)).mean(0, keepdim=True)
        else:
            p = outputs.softmax(1)
            curvature = torch.diag(p.mean(0)) - p.T @ p / len(p)
        above = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        found: dict[str, Tensor] = {}
        for depth, key in enumerate(reversed(names)):
            found[key] = above.T @ curvature @ above / 4**depth
            above = above @ weights[len(names) - 1 - depth]
        return found

    def begin_epoch(self, fraction: float) -> None:
        """Computes the bases anew where the method's schedule asks for it."""
        self._errors = []
        if self._name in ("base", "appr"):
            return
        due = int(_INTERVALS * fraction)
        if self._name == "iter_d":
            due //= 10 ** int(_FALLS * fraction)
        if due == self._refreshed:
            return
        self._refreshed = due
        fresh = self._fresh_bases()
        for key, (U, V) in fresh.items():
            old_U, old_V = self._bases[key]
            variance = self._log_variances[key].detach().double().exp()
            carried = (U.T @ old_U).square() @ variance @ (V.T @ old_V).square().T
            with torch.no_grad():
                self._log_variances[key].copy_(carried.clamp(min=_SMALLEST).log())
        self._bases = fresh

    def _draw(self) -> dict[str, Tensor]:
        """One weight [m, d] per layer."""
        spread = {
            key: (0.5 * log).exp()
            * torch.randn(log.shape, generator=self._generator, dtype=log.dtype, device=log.device)
            for key, log in self._log_variances.items()
        }
        if self._bases:
            dtype = self._log_prior.dtype
            U, V = ([self._bases[key][i].to(dtype) for key in spread] for i in (0, 1))
            rotated = ops.grouped_kron_matmul(U, V, list(spread.values()))
            spread = dict(zip(spread, rotated, strict=True))
        return {key: self._means[key] + noise for key, noise in spread.items()}

    def _divergence(self) -> Tensor:
        prior = self._log_prior.double().exp()
        return sum(
            (
                gaussian_kl(
                    self._means[key].double(),
                    self._centres[key].double(),
                    self._log_variances[key].double().exp(),
                    prior,
                )
                for key in self._means
            ),
            torch.zeros((), dtype=torch.float64),
        )

    def step(self, rows: Tensor, fraction: float) -> Tensor:
        """One step of RMSprop on surrogate + sqrt(BRE / 2)."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate * 0.1 ** int(_FALLS * fraction)
        weights = self._draw()

        def forward(key: str) -> Any:
            return lambda x: self._problem.slots[key].apply(x, weights[key])

        forwards = {key: forward(key) for key in weights}
        with evaluating(self._problem.model), replaced(self._problem.slots, forwards):
            outputs = self._problem.model(self._samples.inputs[rows])
        n, p = len(self._samples), self._problem.protocol
        grid = p.grid
        # j = b log(c / lambda) as a real number; below 1 it is outside the union bound.
        index = (grid.b * (math.log(grid.c) - self._log_prior.double())).clamp(min=1)
        price = 2 * index.log() + math.log(math.pi**2 * n / (6 * p.delta))
        rate = (self._divergence() + price) / (n - 1)
        targets = self._samples.targets[rows]
        surrogate = log_loss(outputs, targets).mean()
        objective = surrogate + (rate / 2).sqrt()
        self._optimizer.zero_grad()
        objective.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._log_prior.clamp_(max=math.log(grid.variance(1)))
        self._errors.append((wrong(outputs.detach(), targets).sum(), len(rows)))
        return objective.detach()

    def error(self) -> float:
        """Mean error of the steps since :meth:`begin_epoch`, under their noise."""
        if not self._errors:
            return 0.0
        wrongs = torch.stack([e for e, _ in self._errors]).tolist()
        return float(sum(wrongs)) / sum(n for _, n in self._errors)

    def kl(self) -> float:
        """KL(Q ‖ P) at the current parameters, off the grid."""
        with torch.no_grad():
            return float(self._divergence())

    def drafts(self) -> dict[str, Draft]:
        """The current posterior."""
        prior = float(self._log_prior.detach().double().exp())
        drafts = {}
        for key, mean in self._means.items():
            U, V = self._bases.get(key, (None, None))
            # In float32 it may be below the least number there is.
            variance = self._log_variances[key].detach().double().exp()
            drafts[key] = Draft(mean.detach().clone(), variance, U, V, prior)
        return drafts

    def state(self) -> dict[str, Any]:
        """Parameters, bases, RMSprop's moments, the noise's generator."""
        return {
            "means": {k: v.detach().clone() for k, v in self._means.items()},
            "log_variances": {k: v.detach().clone() for k, v in self._log_variances.items()},
            "log_prior": self._log_prior.detach().clone(),
            "bases": {k: list(v) for k, v in self._bases.items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "refreshed": self._refreshed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""
        with torch.no_grad():
            for key in self._means:
                self._means[key].copy_(state["means"][key])
                self._log_variances[key].copy_(state["log_variances"][key])
            self._log_prior.copy_(state["log_prior"])
        device = self._samples.inputs.device
        self._bases = {k: (U.to(device), V.to(device)) for k, (U, V) in state["bases"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self._refreshed = state["refreshed"]

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self._settings)
