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
* The weights of error and KL follow the bound: its gradient in the two, by kl^-1's derivatives.
* Variances start at s = 1 / (1 / lambda + beta h), h the products of the Kronecker factors'
  eigenvalues (the minimizer of the bound's quadratic model, arXiv 2010.04261, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.factors import kronecker_factors
from hesskern.pacbayes.bound import bound_rate, kl_inverse
from hesskern.pacbayes.evaluate import wrong
from hesskern.pacbayes.loop import Draft
from hesskern.pacbayes.network import Slot, evaluating, replaced
from hesskern.pacbayes.posterior import eigenbasis, spread_out
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.surrogates import error_probability, log_loss

__all__ = ["TRAINED_PRIOR", "Natural", "NaturalSettings"]

_FACTOR_SAMPLES = 10_000
_FACTOR_BATCH = 1000
_SMALLEST = 1e-12
_WEIGHT_STEPS = 10

# Components along the leading directions [N, k], squared norm of the rest [N] or None, w0 x [N, m].
Rotated = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class NaturalSettings:
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
        for name in ("batch_size", "rank_in", "rank_hidden", "rank_last", "rank_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate_mean", "rate_ratio", "rate_prior", "prior_hidden", "prior_last"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


TRAINED_PRIOR = NaturalSettings(
    rate_mean=0.03, prior_hidden=0.2, prior_last=0.2, warm_up=0.0, refreshes=(0.5,)
)
"""For a centre that was trained on other samples: less noise, and no need for the log loss."""


class _Layer:
    """Parameters of one layer and its outputs under noise."""

    def __init__(
        self,
        slot: Slot,
        prior_mean: Tensor,
        start: Tensor,
        deviation: float,
        rank_in: int,
        rank_out: int,
        shift_free: bool,
        generator: torch.Generator,
    ) -> None:
        self.slot, self.prior_mean, self._generator = slot, prior_mean, generator
        m, d = prior_mean.shape
        self.shift_free = shift_free and m > 1
        whole = not slot.per_example
        self.rank_in = d if whole else min(rank_in, d)
        self.rank_out = 1 if self.shift_free else m if whole else min(rank_out, m)
        if m == 1:
            self.rank_out = 0
        self.rows = _multiplicities(self.rank_out, m).to(prior_mean)
        self.columns = _multiplicities(self.rank_in, d).to(prior_mean)
        self.U_full = torch.eye(m, dtype=torch.float64, device=prior_mean.device)
        self.V_full = torch.eye(d, dtype=torch.float64, device=prior_mean.device)
        if self.shift_free:
            self.U_full = _completed(torch.full((m, 1), m**-0.5, dtype=torch.float64))
        self.log_prior = torch.tensor(2 * math.log(deviation)).to(prior_mean)
        self.log_ratio = prior_mean.new_zeros(len(self.rows), len(self.columns))
        self.moves_in_basis = slot.reads_data and slot.per_example
        self.u = (start - prior_mean) / deviation
        self._cut()

    def _cut(self) -> None:
        dtype = self.prior_mean.dtype
        self.U = self.U_full[:, : self.rank_out].to(dtype).contiguous()
        self.V = self.V_full[:, : self.rank_in].to(dtype).contiguous()

    def set_first_bases(self, U: Tensor | None, V: Tensor, curvature: Tensor) -> None:
        """Bases (float64, columns by falling eigenvalue), and log r from ``beta h`` [m, d]."""
        if U is not None and not self.shift_free and self.rank_out:
            self.U_full = U
        self.V_full = V
        self._cut()
        beta_h = _tied(curvature, self.rank_out, self.rank_in)
        if self.shift_free:
            beta_h[0] = 0
        self.log_ratio = -torch.log1p(self.log_prior.exp() * beta_h.to(self.log_prior.dtype))
        if self.moves_in_basis:
            self.u = self.u @ self.V

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.log_ratio, self.log_prior

    def kl(self) -> Tensor:
        spread = self.log_ratio.exp() - 1 - self.log_ratio
        return 0.5 * (self.rows @ spread @ self.columns + self.u.square().sum())

    def rotate(self, U: Tensor | None, V: Tensor | None) -> None:
        """New bases; the covariance's diagonal in them becomes the variances, traces are kept."""
        ratio = self.log_ratio.exp()
        if U is not None and not self.shift_free and self.rank_out:
            ratio = _carried(ratio.T, self.U_full, U, self.rank_out).T
            self.U_full = U
        if V is not None and not self.moves_in_basis:
            ratio = _carried(ratio, self.V_full, V, self.rank_in)
            self.V_full = V
        self._cut()
        with torch.no_grad():
            self.log_ratio.copy_(ratio.clamp(min=_SMALLEST).log())

    def moments(self, x: Tensor, known: Rotated | None) -> tuple[Tensor, Tensor]:
        """Mean [N, m] of W x and deviations [N, rows] along U's leading columns and the rest."""
        deviation = (0.5 * self.log_prior).exp()
        if known is not None:
            y, rest, base = known
            mean = torch.addmm(base, y, (deviation * self.u).T)
        else:
            x = self.slot.extended(x)
            y = x @ self.V
            rest = None
            mean = x @ (self.prior_mean + deviation * self.u).T
            if self.rank_in < self.V.shape[0]:
                rest = (x.square().sum(1) - y.square().sum(1)).clamp(min=0)
        squares = y.square() if rest is None else torch.cat([y.square(), rest[:, None]], 1)
        variance = squares @ (self.log_prior + self.log_ratio).exp().T
        return mean, (variance + _SMALLEST).sqrt()

    def noisy(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """W x under noise, from its moments."""
        return spread_out(mean, deviation, self.U, self._generator)

    def weight(self) -> Tensor:
        """One drawn weight [m, d] (layers that share it over positions; bases are whole)."""
        noise = torch.randn(
            self.prior_mean.shape,
            generator=self._generator,
            dtype=self.u.dtype,
            device=self.u.device,
        )
        spread = (0.5 * self.log_ratio).exp() * noise
        moved = self.u + ops.from_eigenbasis(self.U, self.V, spread)
        return self.prior_mean + (0.5 * self.log_prior).exp() * moved

    @torch.no_grad()
    def mean(self) -> Tensor:
        u = self.u @ self.V.T if self.moves_in_basis else self.u
        return self.prior_mean + (0.5 * self.log_prior).exp() * u

    @torch.no_grad()
    def draft(self) -> Draft:
        m, d = self.prior_mean.shape
        prior = self.log_prior.double().exp()
        ratio = self.log_ratio.double().exp()
        counts = [c.long().to(ratio.device) for c in (self.rows, self.columns)]
        whole = ratio.repeat_interleave(counts[0], 0).repeat_interleave(counts[1], 1)
        assert whole.shape == (m, d)
        return Draft(
            self.mean(),
            whole * prior,
            self.U_full if self.rank_out else None,
            self.V_full,
            float(prior),
            relative=True,
        )


def _rank(settings: NaturalSettings, slot: Slot, last: bool) -> int:
    if slot.reads_data:
        return settings.rank_in
    return settings.rank_last if last else settings.rank_hidden


def _multiplicities(rank: int, size: int) -> Tensor:
    rest = [size - rank] if rank < size else []
    return torch.tensor([1.0] * rank + rest)


def _tied(values: Tensor, rank_out: int, rank_in: int) -> Tensor:
    """[m, d] with everything behind the leading rows and columns replaced by its mean."""
    for axis, rank in ((0, rank_out), (1, rank_in)):
        leading, rest = values.tensor_split([rank], axis)
        if rest.shape[axis]:
            leading = torch.cat([leading, rest.mean(axis, keepdim=True)], axis)
        values = leading
    return values


def _carried(ratio: Tensor, old: Tensor, new: Tensor, rank: int) -> Tensor:
    """Diagonal [.., rank (+ 1)] in the new basis of what is diagonal [.., rank (+ 1)] in the old.

    Entry k is sum_j (new_k . old_j)^2 r_j; the tied rest takes what the trace leaves over.
    """
    size = old.shape[0]
    counts = _multiplicities(rank, size).to(ratio)
    shares = (new[:, :rank].T @ old[:, :rank]).square().to(ratio)
    leading = ratio[..., :rank] @ shares.T
    if rank == size:
        return leading
    leading = leading + ratio[..., rank:] * (1 - shares.sum(1)).clamp(min=0)
    left_over = (ratio * counts).sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)
    return torch.cat([leading, left_over / (size - rank)], -1)


def _completed(columns: Tensor) -> Tensor:
    """An orthogonal matrix whose first columns span the same as ``columns`` one by one."""
    return torch.linalg.qr(columns, mode="complete").Q.contiguous()


class Natural:
    """The optimization of :mod:`hesskern.pacbayes.natural`, one step at a time."""

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, Slot],
        prior: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        samples: Samples,
        protocol: Protocol,
        settings: NaturalSettings,
        generator: torch.Generator,
    ) -> None:
        self.batch_size = settings.batch_size
        self._model, self._slots, self._samples = model, slots, samples
        self._protocol, self._settings, self._generator = protocol, settings, generator
        self._last = next((n for n, slot in slots.items() if slot.writes_output), None)
        self._factor_rows = torch.randperm(len(samples), generator=generator)[:_FACTOR_SAMPLES]
        self._layers: dict[str, _Layer] = {}
        hidden = settings.prior_hidden or (1.0 if self._outputs() == 1 else 0.1)
        for i, (name, slot) in enumerate(slots.items()):
            centre = slot.matrix(prior)
            weights = centre[:, : slot.spec.weight_inputs]
            scale = float(weights.std()) if bool(weights.any()) else weights.shape[1] ** -0.5
            last = i == len(slots) - 1
            factor = settings.prior_last if last else hidden
            largest = math.sqrt(protocol.grid.variance(1))
            self._layers[name] = _Layer(
                slot,
                centre,
                slot.matrix(start),
                min(scale * factor, largest),
                _rank(settings, slot, last),
                settings.rank_out,
                name == self._last,
                generator,
            )
        self._known: dict[str, Rotated] = {}
        self._start_bases(start)
        self._error: float | None = None
        self._slope, self._age = 0.0, 0
        self._errors: list[tuple[float, int]] = []
        self._refreshed = 0
        self._moments: dict[str, Tensor] | None = None
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
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, s.beta2), foreach=True)

    def _factors(self, means: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Kronecker factors of the network with these weights, on a part of the samples."""
        for name, mean in means.items():
            self._slots[name].load(mean)
        rows = self._factor_rows
        inputs, targets = self._samples.inputs[rows], self._samples.targets[rows]
        loss: nn.Module = nn.CrossEntropyLoss()
        if self._outputs() == 1:
            loss, targets = nn.BCEWithLogitsLoss(), targets[:, None].to(inputs.dtype)
        batches = zip(inputs.split(_FACTOR_BATCH), targets.split(_FACTOR_BATCH), strict=True)
        return kronecker_factors(self._model, batches, loss, list(self._layers), bias="joint")

    def _outputs(self) -> int:
        with torch.no_grad(), evaluating(self._model):
            return int(self._model(self._samples.inputs[:2]).shape[1])

    def _start_bases(self, start: Mapping[str, Tensor]) -> None:
        factors = self._factors({name: slot.matrix(start) for name, slot in self._slots.items()})
        beta = self._settings.error_weight * self._settings.log_loss_weight * len(self._samples)
        for name, layer in self._layers.items():
            tau, U = eigenbasis(factors[name].output_hessian)
            gamma, V = eigenbasis(_one_group(factors[name].input_covariance))
            layer.set_first_bases(U, V, beta * torch.outer(tau, gamma))
            if layer.moves_in_basis:
                self._known[name] = self._rotated(layer)

    def _rotated(self, layer: _Layer) -> Rotated:
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
            moments = self._noisy_moments()
            factors = self._factors({name: layer.mean() for name, layer in self._layers.items()})
            for name, layer in self._layers.items():
                V = None
                if not layer.moves_in_basis:
                    covariance = moments.get(name, _one_group(factors[name].input_covariance))
                    V = eigenbasis(covariance)[1]
                layer.rotate(eigenbasis(factors[name].output_hessian)[1], V)

    @torch.no_grad()
    def _noisy_moments(self) -> dict[str, Tensor]:
        """E[x x^T] [d, d] float64 of what enters the per-example layers, noise included.

        Noise in the layers before adds to every direction of x. At the mean weights these inputs
        nearly lie in a few directions, and variances along the others would be laid out for inputs
        that the layer never sees.
        """
        self._moments = {}
        for rows in self._factor_rows.split(_FACTOR_BATCH):
            self._forward(rows)
        found, self._moments = self._moments, None
        return found

    def step(self, rows: Tensor, fraction: float) -> float:
        """One step of Adam; see the module."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["full"] * (1 - fraction)
        targets = self._samples.targets[rows]
        mean, deviation = self._forward(rows)
        warm = fraction < self._settings.warm_up
        n = len(self._samples)
        kl = sum((layer.kl() for layer in self._layers.values()), torch.zeros(()))
        if warm or deviation is None:
            scores = mean
            if deviation is not None and self._last is not None:
                scores = self._layers[self._last].noisy(mean, deviation)
            weight = self._settings.error_weight * self._settings.log_loss_weight
            objective = weight * log_loss(scores, targets).mean() + kl / n
            error = wrong(scores.detach(), targets).to(mean.dtype).mean()
        else:
            error = error_probability(mean, deviation[:, -1:], targets).mean()
            objective = self._weight(float(error.detach()), float(kl.detach())) * error + kl / n
        self._optimizer.zero_grad()
        objective.backward()
        self._optimizer.step()
        with torch.no_grad():
            ceiling = math.log(self._protocol.grid.variance(1))
            for layer in self._layers.values():
                layer.log_prior.clamp_(max=ceiling)
            if fraction >= 1 - self._settings.averaged:
                self._average()
        self._errors.append((float(error.detach()), len(rows)))
        return float(objective.detach())

    def _average(self) -> None:
        """Takes the parameters into the running mean of the last part of the budget."""
        self._averages += 1
        for name, layer in self._layers.items():
            current = [p.detach() for p in layer.parameters()]
            if name not in self._averaged:
                self._averaged[name] = [p.clone() for p in current]
            for mean, p in zip(self._averaged[name], current, strict=True):
                mean.lerp_(p, 1 / self._averages)

    def _weight(self, error: float, kl: float) -> float:
        """What error counts in units of KL / n: the ratio of the bound's two derivatives."""
        previous = error if self._error is None else self._error
        self._error = 0.99 * previous + 0.01 * error
        self._age += 1
        if self._age % _WEIGHT_STEPS != 1:
            return self._slope
        q = torch.tensor(self._error, dtype=torch.float64, requires_grad=True)
        rate = bound_rate(kl, len(self._samples), [1], self._protocol.delta, self._protocol.form)
        rate.requires_grad_(True)
        kl_inverse(q, rate).backward()
        assert q.grad is not None
        assert rate.grad is not None
        self._slope = float(q.grad / rate.grad)
        return self._slope

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [B, c] under noise; with a closed-form last layer, its mean and deviations."""
        kept: list[Tensor] = []

        def forward(name: str, layer: _Layer) -> Any:
            def run(x: Tensor) -> Tensor:
                if not layer.slot.per_example:
                    return layer.slot.apply(x, layer.weight())
                known = self._known.get(name)
                if self._moments is not None and known is None:
                    inputs = layer.slot.extended(x).double()
                    self._moments[name] = self._moments.get(name, 0) + inputs.T @ inputs
                mean, deviation = layer.moments(x, None if known is None else _rows_of(known, rows))
                if name == self._last:
                    kept.append(deviation)
                    return mean
                return layer.noisy(mean, deviation)

            return run

        forwards = {name: forward(name, layer) for name, layer in self._layers.items()}
        with evaluating(self._model), replaced(self._slots, forwards):
            outputs = self._model(self._samples.inputs[rows])
        return outputs, kept[0] if kept else None

    def error(self) -> float:
        """Mean error of the steps since :meth:`begin_epoch`, under their noise."""
        return sum(e * n for e, n in self._errors) / max(1, sum(n for _, n in self._errors))

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
            "error": self._error,
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
            layer.U_full, layer.V_full = saved["U"], saved["V"]
            layer._cut()
            with torch.no_grad():
                for own, value in zip(layer.parameters(), saved["parameters"], strict=True):
                    own.copy_(value)
            if layer.moves_in_basis:
                self._known[name] = self._rotated(layer)
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self._averages, self._averaged = state["averages"], state["averaged"]
        self._error, self._refreshed = state["error"], state["refreshed"]
        self._slope, self._age = state["slope"], state["age"]

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self._settings)


def _rows_of(known: Rotated, rows: Tensor) -> Rotated:
    y, rest, base = known
    return y[rows], None if rest is None else rest[rows], base[rows]


def _one_group(covariance: Tensor) -> Tensor:
    """[d, d]; with groups the mean over them: any basis is valid, only the fit differs."""
    return covariance if covariance.dim() == 2 else covariance.mean(0)
