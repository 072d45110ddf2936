"""Our method: mean, variances and prior variances trained together, from the prior's centre.

Every layer's weight is W = w0 + sqrt(lambda) (u + U (sqrt(r) . noise) V^T): u is the mean's
distance from the prior's in prior deviations, r = s / lambda the ratio of variances. Then

    KL = 1/2 [ sum(r - 1 - log r) + ‖u‖^2 ]

does not depend on lambda, so that each layer's prior variance is one more parameter that the data
alone decide. What makes it fast and tight:

* Noise per example (:class:`hesskern.pacbayes.posterior.ExampleDraw`) and big batches.
* Truncated bases. Only the leading ``rank_in`` and ``rank_out`` directions of V and U have
  variances of their own; the rest of a row or column shares one. An example then costs its
  components along the leading directions and one norm, instead of two products with whole
  weights. In the layer that reads the data the inputs are rotated once, the mean moves in the
  leading directions alone, and w0's part of the output is computed once.
* The 0-1 error itself as objective: given what enters the last layer, the probability of a wrong
  prediction is known in closed form (:func:`hesskern.pacbayes.surrogates.error_probability`), as
  the last layer's variances are the same for all outputs but for the common shift of all scores,
  which changes no prediction. A log loss leads there, in the first part of the budget.
* Bases for inputs under noise, computed anew in the course of the optimization: at the mean weights
  what enters a layer lies in fewer directions than it does behind noisy layers.
* The weights of error and KL follow the bound: its gradient in the two, by kl^-1's derivatives.
* Variances start at s = 1 / (1 / lambda + beta h), h the products of the Kronecker factors'
  eigenvalues (the minimizer of the bound's quadratic model, arXiv 2010.04261, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import check_counts, check_positive
from hesskern.devices import on_host
from hesskern.factors.result import Factors
from hesskern.pacbayes.bound import bound_rate, kl_inverse
from hesskern.pacbayes.evaluate import wrong
from hesskern.pacbayes.loop import Draft
from hesskern.pacbayes.posterior import eigenbasis
from hesskern.pacbayes.problem import Problem, mean_over_groups
from hesskern.pacbayes.recorded import Recorded
from hesskern.pacbayes.slots import Slot, evaluating, replaced
from hesskern.pacbayes.surrogates import error_probability, log_loss
from hesskern.pacbayes.truncated_layer import Rotated, TruncatedLayer, rows_of

__all__ = ["TRAINED_PRIOR", "Truncated", "TruncatedSettings"]

_FACTOR_SAMPLES = 10_000
_FORWARD_BATCH = 1000
_WEIGHT_STEPS = 10
# Of the mean error, from one step to the next.
_MEMORY = 0.99


@dataclass(frozen=True)
class TruncatedSettings:
    """Numbers of the method; none of them matters for a certificate's validity.

    Attributes:
        batch_size: examples per step.
        rate_mean, rate_ratio, rate_prior: Adam's learning rates for u, log r and log lambda at the
            start; all fall to zero linearly.
        averaged: last part of the budget over which the parameters are averaged. At a rate a the
            means of directions that matter little jitter with a variance of the order of a: it
            costs KL, and part of it would outlast the fall of the rates.
        beta2: Adam's second moment's memory.
        rank_in: leading input directions with variances of their own, in the layer that reads the
            data; rank_last: in the last layer; rank_hidden: in the layers between.
        rank_out: leading output directions with variances of their own.
        prior_hidden, prior_last: prior deviation at the start over that of w0's entries, in all
            layers but the last, and in the last one. Large: hidden layers learn; small: they stay
            near w0's random features, at hardly any KL. None for ``prior_hidden``: 1 for one
            output, 0.1 for several, whichever gave the lower bounds (docs/certificates.md).
        warm_up: part of the budget in which the log loss stands in for the error.
        log_loss_weight: what one unit of log loss counts there, in units of error.
        error_weight: what one unit of error counts there, in units of KL / n.
        refreshes: parts of the budget at which bases are computed anew: U at the current mean, V
            from inputs under the current noise.
    """

    batch_size: int = 500
    rate_mean: float = 0.2
    rate_ratio: float = 0.05
    rate_prior: float = 0.04
    averaged: float = 0.15
    beta2: float = 0.999
    rank_in: int = 256
    rank_hidden: int = 128
    rank_last: int = 256
    rank_out: int = 32
    prior_hidden: float | None = None
    prior_last: float = 5.0
    warm_up: float = 0.3
    log_loss_weight: float = 0.5
    error_weight: float = 1.7
    refreshes: tuple[float, ...] = (0.05, 0.15, 0.3, 0.5, 0.7, 0.82)

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "rank_in", "rank_hidden", "rank_last", "rank_out")
        check_positive(self, "rate_mean", "rate_ratio", "rate_prior", "prior_hidden", "prior_last")


TRAINED_PRIOR = TruncatedSettings(
    rate_mean=0.03, prior_hidden=0.2, prior_last=0.2, warm_up=0.0, refreshes=(0.5,)
)
"""For a centre that was trained on other samples: less noise, and no need for the log loss."""


def _rank(settings: TruncatedSettings, slot: Slot, last: bool) -> int:
    if slot.reads_data:
        return settings.rank_in
    return settings.rank_last if last else settings.rank_hidden


class InputMoments:
    """Sums of x x^T [d, d], float64, of what enters layers, by their names."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Takes up the inputs x [N, d] of a layer."""
        x = x.double()
        own = x.T @ x
        self._sums[name] = self._sums[name] + own if name in self._sums else own

    def get(self, name: str) -> Tensor | None:
        """A layer's sum, None where none of its inputs were taken up."""
        return self._sums.get(name)


class Truncated:
    """The optimization of :mod:`hesskern.pacbayes.truncated_method`, one step at a time."""

    def __init__(
        self, problem: Problem, settings: TruncatedSettings, generator: torch.Generator
    ) -> None:
        self.batch_size = settings.batch_size
        self._problem, self._settings, self._generator = problem, settings, generator
        self._samples, self._protocol = problem.samples, problem.protocol
        slots, samples = problem.slots, problem.samples
        self._last = next((n for n, slot in slots.items() if slot.writes_output), None)
        device = samples.inputs.device
        rows = torch.randperm(len(samples), generator=generator, device=device)
        self._factor_rows = rows[:_FACTOR_SAMPLES]
        self._layers: dict[str, TruncatedLayer] = {}
        hidden = settings.prior_hidden or (1.0 if problem.outputs == 1 else 0.1)
        for i, (name, slot) in enumerate(slots.items()):
            centre = slot.matrix(problem.prior)
            weights = centre[:, : slot.spec.weight_inputs]
            scale = float(weights.std()) if bool(weights.any()) else weights.shape[1] ** -0.5
            last = i == len(slots) - 1
            factor = settings.prior_last if last else hidden
            largest = math.sqrt(self._protocol.grid.variance(1))
            self._layers[name] = TruncatedLayer(
                slot,
                centre,
                slot.matrix(problem.start),
                min(scale * factor, largest),
                _rank(settings, slot, last),
                settings.rank_out,
                name == self._last,
                generator,
            )
        self._known: dict[str, Rotated] = {}
        self._start_bases()
        self._error: Tensor | None = None
        self._divergence = torch.zeros((), dtype=torch.float64, device=device)
        self._slope, self._age = 0.0, 0
        # On the CPU a launch costs nothing.
        self._recorded = None if on_host(samples.inputs) else Recorded(device, generator)
        self._errors: list[tuple[Tensor, int]] = []
        self._refreshed = 0
        self._averages = 0
        self._averaged: dict[str, list[Tensor]] = {}
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        s = self._settings
        groups = []
        for parameters, rate in zip(
            zip(*(layer.parameters() for layer in self._layers.values()), strict=True),
            (s.rate_mean, s.rate_ratio, s.rate_prior),
            strict=True,
        ):
            for parameter in parameters:
                parameter.requires_grad_(True)
            groups.append({"params": list(parameters), "lr": rate, "full": rate})
        there = self._recorded is not None
        self._optimizer = torch.optim.Adam(
            groups, betas=(0.9, s.beta2), foreach=True, capturable=there
        )
        self._keep_on_device()

    def _keep_on_device(self) -> None:
        """Rates and numbers of steps as tensors on the device, where a recording reads them."""
        if self._recorded is None:
            return
        device = self._samples.inputs.device
        for group in self._optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            group["capturable"] = True
        for state in self._optimizer.state.values():
            state["step"] = state["step"].to(device)

    def _factors(self, means: Mapping[str, Tensor]) -> Factors:
        return self._problem.factors(means, self._factor_rows)

    def _start_bases(self) -> None:
        slots, start = self._problem.slots, self._problem.start
        factors = self._factors({name: slot.matrix(start) for name, slot in slots.items()})
        beta = self._settings.error_weight * self._settings.log_loss_weight * len(self._samples)
        for name, layer in self._layers.items():
            tau, U = eigenbasis(factors[name].output_hessian)
            gamma, V = eigenbasis(mean_over_groups(factors[name].input_covariance))
            layer.set_first_bases(U, V, beta * torch.outer(tau, gamma))
            if layer.moves_in_basis:
                self._known[name] = self._rotated(layer)

    def _rotated(self, layer: TruncatedLayer) -> Rotated:
        """The samples in the leading directions [N, k], what is left [N], and w0 x [N, m]."""
        x = layer.slot.extended(self._samples.inputs.flatten(1))
        y = x @ layer.V
        whole = layer.rank_in == layer.V.shape[0]
        rest = None if whole else (x.square().sum(1) - y.square().sum(1)).clamp(min=0)
        return y, rest, x @ layer.prior_mean.T

    def begin_epoch(self, fraction: float) -> None:
        """Computes the bases anew where the settings ask for it."""
        self._errors = []
        due = sum(fraction >= part for part in self._settings.refreshes)
        if due > self._refreshed:
            self._refreshed = due
            # Averages of variances along other directions would mean nothing.
            self._averages, self._averaged = 0, {}
            if self._recorded is not None:
                self._recorded.forget()
            moments = self._noisy_moments()
            factors = self._factors({name: layer.mean() for name, layer in self._layers.items()})
            for name, layer in self._layers.items():
                V = None
                if not layer.moves_in_basis:
                    covariance = moments.get(name)
                    if covariance is None:
                        covariance = mean_over_groups(factors[name].input_covariance)
                    V = eigenbasis(covariance)[1]
                layer.rotate(eigenbasis(factors[name].output_hessian)[1], V)

    @torch.no_grad()
    def _noisy_moments(self) -> InputMoments:
        """Of what enters the per-example layers, noise included.

        Noise in the layers before adds to every direction of x. At the mean weights these inputs
        nearly lie in a few directions, and variances along the others would be laid out for inputs
        that the layer never sees.
        """
        moments = InputMoments()
        for rows in self._factor_rows.split(_FORWARD_BATCH):
            self._forward(rows, moments)
        return moments

    def step(self, rows: Tensor, fraction: float) -> Tensor:
        """One step of Adam; see the module."""
        self._set_rates(fraction)
        warm = fraction < self._settings.warm_up
        averaging = fraction >= 1 - self._settings.averaged
        if averaging:
            self._averages += 1
            if not self._averaged:
                self._averaged = {
                    name: [p.detach().clone() for p in layer.parameters()]
                    for name, layer in self._layers.items()
                }
        share = 1 / max(self._averages, 1)
        if self._recorded is None or not (warm or self._last is None or self._error is not None):
            found = self._update(rows, warm, self._weight, share if averaging else None)
        else:
            found = self._recorded_step(self._recorded, rows, warm, share if averaging else None)
        self._errors.append((found[1], len(rows)))
        return found[0]

    def _set_rates(self, fraction: float) -> None:
        for group in self._optimizer.param_groups:
            rate = group["full"] * (1 - fraction)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _recorded_step(
        self, recorded: Recorded, rows: Tensor, warm: bool, share: float | None
    ) -> Tensor:
        """:meth:`_update`, recorded: what changes from step to step goes in as tensors.

        What error counts is that of the steps before, so that it is known beforehand.
        """
        device = self._samples.inputs.device
        if not warm and self._last is not None:
            assert self._error is not None
            self._age += 1
            if self._age % _WEIGHT_STEPS == 1:
                self._slope = self._found_slope(self._error, self._divergence)
        numbers = torch.tensor([self._slope, share or 0.0], dtype=torch.float64)
        numbers = numbers.to(device, non_blocking=True)

        def update(rows: Tensor, numbers: Tensor) -> Tensor:
            def weigh(error: Tensor, kl: Tensor) -> Tensor:
                assert self._error is not None
                self._error.mul_(_MEMORY).add_((1 - _MEMORY) * error.double())
                self._divergence.copy_(kl)
                return numbers[0]

            return self._update(rows, warm, weigh, None if share is None else numbers[1])

        key = (warm, share is not None, len(rows))
        return recorded(key, update, (rows.to(device, non_blocking=True), numbers))

    def _update(
        self,
        rows: Tensor,
        warm: bool,
        weigh: Callable[[Tensor, Tensor], float | Tensor],
        share: float | Tensor | None,
    ) -> Tensor:
        """One step of Adam on the samples ``rows``, and the average's.

        Args:
            rows: [B].
            warm: whether the log loss stands in for the error.
            weigh: what error counts in units of KL / n, from the error and KL.
            share: of the parameters in their running mean; None: it stays as it is.

        Returns:
            [2] float64, the objective and the error.
        """
        targets = self._samples.targets[rows]
        mean, deviation = self._forward(rows)
        n = len(self._samples)
        first, *others = [layer.kl() for layer in self._layers.values()]
        kl = sum(others, first)
        if warm or deviation is None:
            scores = mean
            if deviation is not None and self._last is not None:
                scores = self._layers[self._last].noisy(mean, deviation)
            weight = self._settings.error_weight * self._settings.log_loss_weight
            objective = weight * log_loss(scores, targets).mean() + kl / n
            error = wrong(scores.detach(), targets).to(mean.dtype).mean()
        else:
            error = error_probability(mean, deviation[:, -1:], targets).mean()
            objective = weigh(error.detach(), kl.detach()) * error + kl / n
        self._optimizer.zero_grad()
        objective.backward()
        self._optimizer.step()
        with torch.no_grad():
            ceiling = math.log(self._protocol.grid.variance(1))
            for layer in self._layers.values():
                layer.log_prior.clamp_(max=ceiling)
            if share is not None:
                for name, layer in self._layers.items():
                    for average, p in zip(self._averaged[name], layer.parameters(), strict=True):
                        average.lerp_(p, share.to(p) if isinstance(share, Tensor) else share)
        return torch.stack([objective.detach().double(), error.detach().double()])

    def _weight(self, error: Tensor, kl: Tensor) -> float:
        """What error counts in units of KL / n: the ratio of the bound's two derivatives.

        Args:
            error, kl: 0-dim; looked at only in the steps that find the ratio anew.
        """
        error = error.double()
        previous = error if self._error is None else self._error
        self._error = _MEMORY * previous + (1 - _MEMORY) * error
        self._divergence = kl.double().clone()
        self._age += 1
        if self._age % _WEIGHT_STEPS == 1:
            self._slope = self._found_slope(self._error, self._divergence)
        return self._slope

    def _found_slope(self, error: Tensor, kl: Tensor) -> float:
        """The ratio at a mean error and a KL, 0-dim."""
        q, divergence = torch.stack([error, kl.to(error)]).cpu().unbind()
        if not bool(torch.isfinite(q + divergence)):
            # The loop says so when it looks at the objective.
            return self._slope
        q = q.detach().clone().requires_grad_()
        rate = bound_rate(
            float(divergence), len(self._samples), [1], self._protocol.delta, self._protocol.form
        )
        rate.requires_grad_(True)
        kl_inverse(q, rate).backward()
        assert q.grad is not None
        assert rate.grad is not None
        slope = float(q.grad / rate.grad)
        # Where KL is so large that the bound is 1 to the last digit, both derivatives are zero.
        return slope if math.isfinite(slope) else self._slope or self._settings.error_weight

    def _forward(
        self, rows: Tensor, moments: InputMoments | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [B, c] under noise; with a closed-form last layer, its mean and deviations.

        Args:
            rows: [B].
            moments: takes up what enters the layers whose bases follow it.
        """
        kept: list[Tensor] = []

        def forward(name: str, layer: TruncatedLayer) -> Any:
            def run(x: Tensor) -> Tensor:
                if not layer.slot.per_example:
                    return layer.slot.apply(x, layer.weight())
                known = self._known.get(name)
                if moments is not None and known is None:
                    moments.add(name, layer.slot.extended(x))
                mean, deviation = layer.moments(x, None if known is None else rows_of(known, rows))
                if name == self._last:
                    kept.append(deviation)
                    return mean
                return layer.noisy(mean, deviation)

            return run

        forwards = {name: forward(name, layer) for name, layer in self._layers.items()}
        with evaluating(self._problem.model), replaced(self._problem.slots, forwards):
            outputs = self._problem.model(self._samples.inputs[rows])
        return outputs, kept[0] if kept else None

    def error(self) -> float:
        """Mean error of the steps since :meth:`begin_epoch`, under their noise."""
        if not self._errors:
            return 0.0
        errors = torch.stack([e for e, _ in self._errors]).tolist()
        sizes = [n for _, n in self._errors]
        return sum(e * n for e, n in zip(errors, sizes, strict=True)) / sum(sizes)

    def kl(self) -> float:
        """KL(Q ‖ P) at the current parameters, off the grid."""
        with torch.no_grad():
            return sum(float(layer.kl()) for layer in self._layers.values())

    def drafts(self) -> dict[str, Draft]:
        """The current posterior."""
        with self._at_average():
            return {name: layer.draft() for name, layer in self._layers.items()}

    @contextmanager
    def _at_average(self) -> Iterator[None]:
        """Inside, the parameters are their averages, once there are some."""
        current = {
            name: [p.detach().clone() for p in layer.parameters()]
            for name, layer in self._layers.items()
        }

        def put(values: Mapping[str, list[Tensor]]) -> None:
            with torch.no_grad():
                for name, tensors in values.items():
                    own = self._layers[name].parameters()
                    for parameter, value in zip(own, tensors, strict=True):
                        parameter.copy_(value)

        put(self._averaged)
        try:
            yield
        finally:
            put(current)

    def state(self) -> dict[str, Any]:
        """Parameters, bases, Adam's moments, the noise's generator."""
        layers = {
            name: {
                "parameters": [p.detach().clone() for p in layer.parameters()],
                "U": layer.U_full,
                "V": layer.V_full,
            }
            for name, layer in self._layers.items()
        }
        return {
            "layers": layers,
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "error": None if self._error is None else float(self._error),
            "divergence": float(self._divergence),
            "averages": self._averages,
            "averaged": self._averaged,
            "slope": self._slope,
            "age": self._age,
            "refreshed": self._refreshed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""
        for name, layer in self._layers.items():
            saved = state["layers"][name]
            layer.restore(saved["parameters"], saved["U"], saved["V"])
            if layer.moves_in_basis:
                self._known[name] = self._rotated(layer)
        self._optimizer.load_state_dict(state["optimizer"])
        self._keep_on_device()
        if self._recorded is not None:
            self._recorded.forget()
        self._generator.set_state(state["generator"])
        device = self._samples.inputs.device
        self._averages = state["averages"]
        # What a file holds comes back on the CPU.
        self._averaged = {
            name: [tensor.to(device) for tensor in tensors]
            for name, tensors in state["averaged"].items()
        }
        error, self._refreshed = state["error"], state["refreshed"]
        self._error = (
            None if error is None else torch.tensor(error, dtype=torch.float64, device=device)
        )
        self._slope, self._age = state["slope"], state["age"]
        self._divergence = torch.tensor(
            state.get("divergence", 0.0), dtype=torch.float64, device=device
        )

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self._settings)
