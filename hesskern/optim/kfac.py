"""K-FAC: gradients times the inverse of every layer's Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.choices import Bias, Output, check_positive
from hesskern.factors.accumulator import FactorAccumulator
from hesskern.factors.result import LayerFactors
from hesskern.operators.damping import Damping, check_damping
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.ops import foreach
from hesskern.optim.layer_gradients import LayerGradient, layer_gradients
from hesskern.passes.roots import check_fraction

__all__ = ["KFAC"]

_FORMAT = 1
_STATE = ("format", "steps", "settings", "factors", "inverses")

# Steps at the beginning, while moving averages still are of few batches, that all make inverses.
_FIRST_STEPS = 3

# Stand for a batch that was not given, and for targets that it holds itself.
_NO_BATCH: Any = object()
_IN_BATCH: Any = object()


class KFAC:
    """Preconditions gradients by Kronecker-factored curvature, before any torch optimizer steps.

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> kfac = hk.optim.KFAC(model, optimizer, nn.CrossEntropyLoss(), damping=1e-2)
    >>> for inputs, targets in loader:
    ...     optimizer.zero_grad()
    ...     loss_function(model(inputs), targets).backward()
    ...     kfac.step(inputs, targets)  # the factors; then .grad, in place
    ...     optimizer.step()

    A layer's gradient V [m, d] becomes (B + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1
    with its input covariance A and output Hessian B, both moving averages over batches, and
    pi^2 = (tr A / d) / (tr B / m): Martens & Grosse 2015 (arXiv 1503.05671), sections 5 and 6.3;
    for convolutions Grosse & Martens 2016 (arXiv 1602.01407). All other parameters keep their
    gradients, with the reason in :attr:`skipped`.

    The factors come from a forward and a backward pass of their own through the batch, in eval
    mode: batch norms use and keep their running statistics, dropout is off, the model's modes,
    gradients and random numbers stay as they are. The loss of the gradients should be a mean over
    samples, as the factors are.

    Args:
        model: any module.
        optimizer: whose parameters are preconditioned, and whose learning rates ``kl_clip`` needs;
            it is never stepped here.
        loss, output_root, layers, output, mc_samples, seed, memory_budget, check, max_outputs,
            position_mask: as in :func:`hesskern.kronecker_factors`; ``output`` is "mc" here, the
            Fisher matrix by targets drawn from the model.
        damping: positive, or "mean" for a tenth of each layer's mean eigenvalue. A layer without
            curvature so far (its factors are zero: dead units, or a layer behind it that starts at
            zero) then keeps its gradient, with the reason in :attr:`skipped`, until it has some.
        decay: of the factors' moving averages, in [0, 1): ``decay * old + (1 - decay) * new`` with
            the start-up bias removed; 0.95 as in the sections above.
        inverse_every: steps from one computation of the inverses to the next; the first three
            steps have their own, and one that reaches a layer for the first time.
        factor_every: steps from one update of the factors to the next.
        kl_clip: bound of the preconditioned step: all preconditioned gradients are scaled by
            min(1, sqrt(kl_clip / sum_layers lr^2 <V, K^-1 V>)), with the learning rates that the
            optimizer has at the time, of a weight and its bias the higher (Ba, Grosse & Martens
            2017, section 5; the default is the one of kfac-pytorch); None for none. It presumes an
            optimizer that steps by the learning rate times what it is given, as SGD does.
        bias: "joint": weight and bias of a layer are preconditioned together, as one matrix with
            the bias as its last column; "none": biases keep their gradients.

    Attributes:
        damping, kl_clip, inverse_every, factor_every: as above; all may be assigned between steps.
            A damping counts from the next inverses on.
        steps: number of steps so far.

    Raises:
        TypeError, ValueError: an argument is none of those above, or no layer is left.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Any = None,
        layers: str | Iterable[str] | None = None,
        output: Output = "mc",
        *,
        damping: Damping = 1e-3,
        decay: float = 0.95,
        inverse_every: int = 20,
        factor_every: int = 1,
        kl_clip: float | None = 1e-3,
        bias: Bias = "joint",
        mc_samples: int = 1,
        seed: int = 0,
        output_root: Callable[..., Tensor] | None = None,
        memory_budget: int | None = None,
        check: bool = True,
        max_outputs: int = 8192,
        position_mask: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        self.damping, self.kl_clip = damping, kl_clip
        self.inverse_every, self.factor_every = inverse_every, factor_every
        self._check_settings()
        check_fraction("decay", decay)
        self._accumulator = FactorAccumulator(
            model,
            loss,
            layers,
            output,
            decay=decay,
            bias=bias,
            mc_samples=mc_samples,
            seed=seed,
            output_root=output_root,
            memory_budget=memory_budget,
            check=check,
            max_outputs=max_outputs,
            position_mask=position_mask,
        )
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._gradients, reasons = layer_gradients(model, self._accumulator.specs, trained)
        if not self._gradients:
            text = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
            raise ValueError(f"no layer of the model can be preconditioned: {text}")
        self._accumulator.leave_out(reasons)
        self._inverses: dict[str, KroneckerOperator] = {}
        self._tied: dict[str, str] = {}
        self._flat: dict[str, str] = {}
        self._told = False
        self.steps = 0

    @property
    def skipped(self) -> dict[str, str]:
        """Modules and layers whose parameters keep their gradients, with the reason.

        What only a batch can tell is among them from the first step on.
        """
        return {**self._accumulator.skipped, **self._tied, **self._flat}

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are preconditioned, as of the last inverses."""
        return tuple(self._inverses)

    def step(
        self, inputs: Any = _NO_BATCH, targets: Any = _IN_BATCH, sample_weight: Tensor | None = None
    ) -> None:
        """Updates factors and inverses where they are due, and preconditions the gradients.

        To be called behind ``backward()`` (and behind ``GradScaler.unscale_``), and before
        ``optimizer.step()`` (and before gradients are clipped). A layer without gradient is passed
        by.

        Args:
            inputs: what the model takes; the batch as a whole for losses that find the targets in
                it. Left out, the step does without new factors: see :meth:`update`.
            targets: what the loss takes; left out where they are in the batch.
            sample_weight: [N] non-negative weights.

        Raises:
            ValueError: bad targets or weights, NaN or Inf in the batch, no factors so far. Factors,
                inverses, gradients and :attr:`steps` then are as before. Gradients that are not
                finite are no error: they stay so, and a ``GradScaler`` leaves their step out.
        """
        self._check_settings()
        if inputs is not _NO_BATCH and self.steps % self.factor_every == 0:
            self.update(inputs, targets, sample_weight)
        # A layer that is reached for the first time would keep its gradient in silence.
        new = set(self._accumulator.reached).difference(self._inverses, self._flat)
        due = self.steps < _FIRST_STEPS or self.steps % self.inverse_every == 0 or bool(new)
        inverses, flat = self._inverses, self._flat
        if due or not (inverses or flat):
            inverses, flat = self._made_inverses(4)
        elif flat:
            inverses, flat = self._made_inverses(4, inverses)
        self._precondition(inverses)
        self._inverses, self._flat = inverses, flat
        self.steps += 1

    def update(
        self, inputs: Any, targets: Any = _IN_BATCH, sample_weight: Tensor | None = None
    ) -> None:
        """Adds a batch to the factors alone; arguments and errors as those of :meth:`step`.

        For gradients that are summed over several batches: ``update`` with each of them, or with
        some, and one ``step()`` without a batch.
        """
        if targets is _IN_BATCH:
            self._accumulator.update(inputs, sample_weight=sample_weight)
        else:
            self._accumulator.update(inputs, targets, sample_weight)

    def _made_inverses(
        self, stacklevel: int, known: Mapping[str, KroneckerOperator] = MappingProxyType({})
    ) -> tuple[dict[str, KroneckerOperator], dict[str, str]]:
        """Of the factors as they are, and why others have none; warns once of layers left out.

        Args:
            stacklevel: as in ``warnings.warn``.
            known: those that are not made again.
        """
        factors = self._accumulator.finished(None if self._told else stacklevel)
        self._told = True
        inverses: dict[str, KroneckerOperator] = {}
        flat: dict[str, str] = {}
        for name, layer in factors.items():
            if name in known:
                inverses[name] = known[name]
                continue
            if layer.tied_to is not None:
                self._tied[name] = (
                    f"has the weight of {layer.tied_to!r}, which looks rows of it up: factors are "
                    "those of the linear use alone"
                )
                continue
            operator = _without_frozen_bias(layer, self._gradients[name])
            if self.damping == "mean" and operator.trace() == 0:
                flat[name] = "has no curvature so far: of its factors, the mean eigenvalue is zero"
                continue
            inverses[name] = operator.factored_inverse(self.damping)
        return inverses, flat

    @torch.no_grad()
    def _precondition(self, inverses: dict[str, KroneckerOperator]) -> None:
        """Multiplies the gradients in place, all of them or none."""
        layers, found = [], []
        for name, inverse in inverses.items():
            gradient = self._gradients[name].read(inverse.dtype)
            if gradient is not None:
                layers.append(name)
                found.append(gradient)
        products = _products([inverses[name] for name in layers], found)
        if self.kl_clip is not None and layers:
            rates = self._rates()
            squared: Any = 0.0
            for name, product, gradient in zip(layers, products, found, strict=True):
                rate = self._gradients[name].rate(rates)
                squared = squared + rate * rate * (product * gradient).sum(dtype=torch.float64)
            foreach.scale_(products, (self.kl_clip / squared).sqrt().clamp(max=1.0))
        for name, product in zip(layers, products, strict=True):
            self._gradients[name].write(product)

    def _rates(self) -> dict[int, Any]:
        """Learning rates by the ids of parameters."""
        return {
            id(parameter): group["lr"]
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }

    def _check_settings(self) -> None:
        check_damping(self.damping, None)
        if self.damping == 0:
            raise ValueError("damping must be positive, got 0: factors of few samples are singular")
        if isinstance(self.kl_clip, bool) or not isinstance(self.kl_clip, (int, float, NoneType)):
            raise TypeError(f"kl_clip must be a number or None, got {type(self.kl_clip).__name__}")
        check_positive(self, "kl_clip")
        for name in ("inverse_every", "factor_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kl_clip is not None and any("lr" not in g for g in self._optimizer.param_groups):
            raise ValueError(
                "kl_clip needs the learning rates of the optimizer's parameter groups, but a "
                f"{type(self._optimizer).__name__} has none; pass kl_clip=None"
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "damping": self.damping,
            "kl_clip": self.kl_clip,
            "inverse_every": self.inverse_every,
            "factor_every": self.factor_every,
        }

    def state_dict(self) -> dict[str, Any]:
        """Factors, inverses and settings: with those of model and optimizer, all that is needed to
        go on bit by bit."""
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "settings": self._settings(),
            "factors": self._accumulator.state_dict(),
            "inverses": {
                name: (inverse.A.clone(), inverse.B.clone())
                for name, inverse in self._inverses.items()
            },
            "flat": dict(self._flat),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, ``damping`` and the like included.

        Raises:
            ValueError: the state is none, or belongs to other layers or other settings of the
                factors; everything then stays as it was.
        """
        missing = [key for key in _STATE if key not in state]
        if missing:
            raise ValueError(f"state must come from state_dict(); it lacks {', '.join(missing)}")
        if state["format"] != _FORMAT:
            raise ValueError(f"state has format {state['format']!r}, this version {_FORMAT}")
        for name, (left, right) in state["inverses"].items():
            gradient = self._gradients.get(name)
            if gradient is None:
                raise ValueError(f"state has a layer {name!r} that is not preconditioned here")
            found, here = (len(left), right.shape[-1]), (gradient.spec.outputs, gradient.columns)
            if found != here:
                raise ValueError(
                    f"state has layer {name!r} with (m, d) = {found}, here it is {here}"
                )
        self._accumulator.load_state_dict(state["factors"])
        self._inverses = {
            name: KroneckerOperator.of_symmetric(
                *(factor.to(self._gradients[name].weight.device, copy=True) for factor in pair)
            )
            for name, pair in state["inverses"].items()
        }
        self._flat = dict(state.get("flat", {}))
        for name, value in state["settings"].items():
            setattr(self, name, value)
        self.steps = state["steps"]


def _without_frozen_bias(layer: LayerFactors, gradient: LayerGradient) -> KroneckerOperator:
    """A layer's operator, output first, over the parameters whose gradient is preconditioned."""
    covariance = layer.input_covariance[..., : gradient.columns, : gradient.columns]
    return KroneckerOperator.of_symmetric(layer.output_hessian, covariance, name=layer.name)


def _products(inverses: list[KroneckerOperator], gradients: list[Tensor]) -> list[Tensor]:
    """Every layer's inverse times its gradient [m, d], all in one call, in memory of their own."""
    left, right, matrices, groups = [], [], [], []
    for inverse, gradient in zip(inverses, gradients, strict=True):
        groups.append(inverse.groups)
        if inverse.B.dim() == 2:
            left.append(inverse.A)
            right.append(inverse.B)
            matrices.append(gradient)
            continue
        step = len(inverse.A) // inverse.groups
        for i, covariance in enumerate(inverse.B):
            part = slice(i * step, (i + 1) * step)
            left.append(inverse.A[part, part])
            right.append(covariance)
            matrices.append(gradient[part])
    found = iter(ops.grouped_kron_matmul(left, right, matrices))
    return [
        next(found) if count == 1 else torch.cat([next(found) for _ in range(count)])
        for count in groups
    ]
