"""Losses as their curvature: rows whose outer products sum to the Hessian in the model's outputs.

For one sample with outputs f and loss l, A = d²l/df² is written as Q^T Q. A layer's output Hessian
is then (Q G)^T (Q G) with G = df/dz, so every row of Q is one backward pass. l is torch's loss on
that sample alone; a reduction of ``mean`` divides by the number T of outputs (or unmasked tokens)
of the sample, ``sum`` does not.

The terms of a sample's loss are independent given the outputs: A is block diagonal, 1/T times the
terms' own for ``mean``. Sampled and empirical rows are therefore the gradient of the sum of the
terms divided by sqrt(T), not by T: with targets drawn from the model (cross-entropy: class k with
probability p_k; binary: 1 with probability sigma(f); squared error: normal around f with variance
1/2) their outer product has the mean A, as exact rows have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern import ops
from hesskern.devices import on_host, sent
from hesskern.passes.batches import Batch, Parts, pair
from hesskern.passes.checks import Checks, check_dense
from hesskern.passes.draws import SampleDraws, without_padding
from hesskern.passes.forward_pass import run_model

__all__ = ["MOST_ROWS", "Loss", "Rows", "Unread", "resolve_loss", "with_root"]

MOST_ROWS = 2**16
"""Exact root rows per sample, each a backward pass, beyond which a loss refuses to give them."""

# Bytes of a batch's root rows that are made at a time.
_TOGETHER_BYTES = 2**22


@dataclass(frozen=True)
class Rows:
    """Root rows of a batch, made one at a time.

    Attributes:
        count: number of rows r per sample.
        row: ``row(j)`` is [N, *outputs.shape[1:]], in the outputs' dtype; to be called once for
            each j, in order, since random rows are drawn as they are taken.
    """

    count: int
    row: Callable[[int], Tensor]


class Unread(NamedTuple):
    """Tokens without a term in the loss.

    Attributes:
        tokens: [N, T] bool.
        axis: of the outputs, in which a token's classes stand.
    """

    tokens: Tensor
    axis: int


class Loss(ABC):
    """Curvature of a loss in the outputs of the model.

    Attributes:
        weighs: whether :meth:`counted` tells weights of samples instead of which ones count.
    """

    weighs = False

    def split_batch(self, element: Any, index: int) -> Parts:
        """The model's inputs, the targets, weights and mask in an element of the data.

        Args:
            element: as the data yields it.
            index: of the batch, for messages.

        Raises:
            TypeError, ValueError: the element is not of the form that the loss knows.
        """
        return pair(element, index)

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        """The model's outputs [N, ...] for the inputs of a batch."""
        return run_model(model, inputs)

    def compare(self, model: nn.Module, batch: Batch, outputs: Tensor, checks: Checks) -> bool:
        """Refuses a model whose own loss is known to be another one.

        Args:
            model: as it runs in the pass.
            batch: gave the outputs.
            outputs: [N, ...].
            checks: of the pass.

        Returns:
            whether it need not be looked at again: the host has seen it, or there is nothing to
            see. False where a device has yet to tell, or the batch does not.

        Raises:
            ValueError: on the host, where the model's own loss takes its targets otherwise.
        """
        return True

    @abstractmethod
    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        """The targets, safe to compute with where ``checks`` has still to look at them.

        Raises:
            ValueError, TypeError: the targets do not fit the outputs [N, ...].
        """

    @abstractmethod
    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        """Rows of Q with Q^T Q = A exactly.

        Raises:
            ValueError: a sample has more than :data:`MOST_ROWS`.
        """

    @abstractmethod
    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        """Random rows whose mean outer product is A: gradients at targets drawn from the model.

        Args:
            outputs: [N, ...] of the model.
            targets: as :meth:`check` gives them.
            samples: r, draws per sample.
            draws: of these N samples.
        """

    @abstractmethod
    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        """Loss of every sample alone, [N]; differentiable."""

    def counted(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """[N] bool: samples that count at all (False: everything masked); None: all do.

        Numbers [N] instead where the loss :attr:`weighs` its samples, zero for those left out.
        Targets on the host need no device to wait for, so they may come from there.
        """
        return None

    def empirical(self, outputs: Tensor, targets: Any) -> Rows:
        """One row: the gradient of the sample's loss at its own target, times the root of terms.

        As other rows it is rounded to the outputs' dtype only once that is done: the gradient of a
        mean over T terms leaves the range of float16, and so may T.
        """
        return self._gradient(outputs, targets, _wide(outputs.dtype))

    def _gradient(self, outputs: Tensor, targets: Any, dtype: torch.dtype) -> Rows:
        """:meth:`empirical`, differentiated in a dtype."""
        with torch.enable_grad():
            # A copy even where nothing changes would be an operation.
            free = outputs.detach() if outputs.dtype == dtype else outputs.detach().to(dtype)
            free.requires_grad_()
            total = self.per_sample(free, targets).sum()
            (gradient,) = torch.autograd.grad(total, free)
        unread = self.unread(outputs, targets)
        if unread is not None:
            # What is no number there stays one, also times zero.
            gradient = gradient.masked_fill(unread.tokens.unsqueeze(unread.axis), 0)
        terms = self._terms(outputs, targets)
        if terms is not None:
            roots = terms.to(gradient.dtype).sqrt()
            gradient = gradient * roots.reshape(-1, *(1,) * (gradient.dim() - 1))
        gradient = gradient if dtype == outputs.dtype else gradient.to(outputs.dtype)
        return Rows(1, lambda _: gradient)

    def unread(self, outputs: Tensor, targets: Any) -> Unread | None:
        """Tokens on whose outputs the loss does not depend; None where there are no tokens."""
        return None

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """[N] or [1]: terms that the sample's loss is the mean of; None where it is no mean."""
        return None


def resolve_loss(loss: Any, output_root: Callable[..., Tensor] | None = None) -> Loss:
    """The curvature of a torch loss, or of a custom one.

    Args:
        loss: ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss`` (instances), or an
            object with a method ``output_root(outputs, targets) -> [N, r, c]``.
        output_root: the same as a function; ``loss`` is then None.

    Raises:
        TypeError: neither is given, or the loss is not one of these.
        NotImplementedError: an option of the loss that has no defined curvature here.
    """
    if output_root is None and hasattr(loss, "output_root"):
        output_root = loss.output_root
    if output_root is not None:
        if not callable(output_root):
            raise TypeError(f"output_root must be callable, got {type(output_root).__name__}")
        return _Custom(output_root, loss)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None:
            raise NotImplementedError(_class_weights(_mean(loss)))
        return _CrossEntropy(_mean(loss), loss.ignore_index, loss.label_smoothing)
    if isinstance(loss, nn.MSELoss):
        return _MeanSquaredError(_mean(loss))
    if isinstance(loss, nn.BCEWithLogitsLoss):
        for option in ("weight", "pos_weight"):
            if getattr(loss, option) is not None:
                raise NotImplementedError(_binary_weights(option, _mean(loss)))
        return _BinaryCrossEntropy(_mean(loss))
    raise TypeError(
        "loss must be nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(), a loss of "
        "transformers such as hk.CausalLM(), or have a method output_root(outputs, targets) -> "
        f"[N, r, c]; got {loss!r}"
    )


def with_root(output_root: Callable[..., Tensor], known: Loss | None = None) -> Loss:
    """Curvature given by rows, of batches and models as another loss takes them.

    Args:
        output_root: ``output_root(outputs, targets) -> [N, r, *outputs.shape[1:]]``.
        known: takes batches apart and runs the model; None: (inputs, targets) as they are.
    """
    return _Custom(output_root, None, known)


def _class_weights(mean: bool) -> str:
    """What to do about CrossEntropyLoss(weight=w)."""
    scale = "w[targets] / (sum of w[targets] over the sample)" if mean else "w[targets]"
    plain = (
        "With outputs [N, c], where a class weight cancels for a sample alone, leave w out and "
        "pass sample_weight=w[targets]. For tokens and pixels pass"
        if mean
        else "Pass"
    )
    return (
        f"CrossEntropyLoss(weight=w) is not supported. {plain} an object with "
        "output_root(outputs, targets), which gives the rows sqrt(p_j) (e_j - p) of every token, "
        f"p = softmax(logits), times sqrt({scale}), and with per_sample(outputs, targets) -> [N] "
        "for autograd and output='empirical'; docs/losses.md shows one"
    )


def _binary_weights(option: str, mean: bool) -> str:
    """What to do about BCEWithLogitsLoss(weight=w) and BCEWithLogitsLoss(pos_weight=w)."""
    factor = "w" if option == "weight" else "(w targets + 1 - targets)"
    scale = f"{factor} / (outputs per sample)" if mean else factor
    return (
        f"BCEWithLogitsLoss({option}=w) is not supported. Pass an object with "
        "output_root(outputs, targets), which gives a row for every output with nothing but "
        f"sqrt(sigma (1 - sigma) {scale}) in its place, sigma = sigmoid(outputs), and with "
        "per_sample(outputs, targets) -> [N] for autograd and output='empirical'; docs/losses.md "
        "shows one"
    )


def _mean(loss: nn.Module) -> bool:
    reduction = loss.reduction
    if reduction not in ("mean", "sum"):
        raise ValueError(f"loss.reduction must be 'mean' or 'sum', got {reduction!r}")
    return bool(reduction == "mean")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    # torch.promote_types would be an operator.
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat(outputs: Tensor) -> Tensor:
    """[N, c, t] in float32 or float64 of outputs [N, c, t...], detached; also for N = 0."""
    tokens = math.prod(outputs.shape[2:])
    return _at_least_float32(outputs.detach()).reshape(*outputs.shape[:2], tokens)


def _per_sample(values: Tensor) -> Tensor:
    """[N, everything else] of [N, ...], also for N = 0."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _check_count(rows: int, outputs: Tensor) -> int:
    """The number of exact root rows per sample, or a ValueError."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"output='exact' takes {rows:,} root rows per sample for outputs "
            f"{list(outputs.shape)}, each of them a backward pass; the limit is {MOST_ROWS:,}. "
            "Take kronecker_factors(..., output='mc'), fewer tokens or outputs per sample, or a "
            "loss with an output_root(outputs, targets) of fewer rows"
        )
    return rows


def _drawn_rows(count: int, draw: Callable[[], Tensor]) -> Rows:
    """Random rows that need not be held until they are used."""
    numbers = iter(range(count))

    def row(index: int) -> Tensor:
        if next(numbers, None) != index:
            raise RuntimeError(f"row {index} is out of order: random rows are drawn one by one")
        return draw()

    return Rows(count, row)


def _some_at_a_time(count: int, step: int, together: Callable[[int], Tensor]) -> Rows:
    """Rows of which ``together(j)`` makes ``step``, from the j-th on: [step, N, ...]."""
    made: tuple[int, Tensor] | None = None

    def row(index: int) -> Tensor:
        nonlocal made
        begin = index - index % step
        if made is None or made[0] != begin:
            # The ones before are let go first.
            made = None
            made = begin, together(begin)
        return made[1][index - begin]

    return Rows(count, row)


def _same_shape(outputs: Tensor, targets: Any, name: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor for {name}, got {type(targets).__name__}")
    check_dense(targets, "targets")
    if targets.is_complex():
        raise TypeError(f"targets must be real for {name}, got {targets.dtype}")
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the outputs' shape {list(outputs.shape)} for {name}, "
            f"got {list(targets.shape)}"
        )
    return targets


@dataclass(frozen=True)
class _CrossEntropy(Loss):
    """Softmax cross-entropy on outputs [N, c] or [N, c, t...] (tokens, pixels).

    Label smoothing and probabilistic targets leave A = diag(p) - p p^T as it is, since the smoothed
    target also sums to one. A sample whose targets are all ``ignore_index`` does not count.
    """

    mean: bool
    ignore_index: int
    label_smoothing: float

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        if outputs.dim() < 2:
            raise ValueError(
                f"outputs must be [N, c] or [N, c, t...] for cross-entropy, got "
                f"{list(outputs.shape)}"
            )
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
        check_dense(targets, "targets")
        if targets.is_floating_point():
            _same_shape(outputs, targets, "cross-entropy with probabilities")
            if targets.numel():
                least = targets.amin()
                lowest, highest = targets.sum(1).aminmax()
                checks.require(
                    # Written so that NaN fails.
                    (least >= 0) & (lowest >= 1 - 1e-3) & (highest <= 1 + 1e-3),
                    lambda least, lowest, highest: (
                        "targets given as probabilities must be non-negative and sum to one over "
                        f"the class axis; found values down to {least:g} and sums from "
                        f"{lowest:g} to {highest:g}"
                    ),
                    least,
                    lowest,
                    highest,
                )
            return targets
        expected = [outputs.shape[0], *outputs.shape[2:]]
        self._check_class_axis(outputs, targets)
        if list(targets.shape) != expected:
            raise ValueError(f"targets must be {expected}, got {list(targets.shape)}")
        if targets.dtype not in (torch.int64, torch.uint8):
            raise TypeError(
                f"targets must be class indices (int64) or probabilities, got {targets.dtype}"
            )
        if targets.numel():
            classes = outputs.shape[1]
            if on_host(targets):
                least, most = targets.aminmax()
                if int(least) >= 0 and int(most) < classes:
                    return targets
            # Of uint8 neither ignore_index nor the number of classes need be one.
            labels = targets.long()
            labels = labels.masked_fill(labels == self.ignore_index, 0).flatten()
            least, most = labels.aminmax(dim=0, keepdim=True)
            checks.require(
                (least >= 0) & (most < classes),
                lambda least, most: (
                    f"targets must lie in [0, {classes}) or equal ignore_index="
                    f"{self.ignore_index}; found {least if least < 0 else most:.0f}"
                ),
                least,
                most,
            )
        return targets

    @staticmethod
    def _check_class_axis(outputs: Tensor, targets: Tensor) -> None:
        """Refuses class indices [N, t...] that fit outputs with the classes in the last axis."""
        shape, found = list(outputs.shape), list(targets.shape)
        if outputs.dim() < 3 or found != shape[:-1] or shape[1:] == [1] * (len(shape) - 1):
            return
        moved = "transpose(1, 2)" if outputs.dim() == 3 else "movedim(-1, 1)"
        if found == [shape[0], *shape[2:]]:
            raise ValueError(
                f"targets {found} fit outputs {shape} whether the classes are in axis 1 or in the "
                "last, and nothing is guessed here. Add an axis to both: targets.unsqueeze(-1), "
                "and from the model logits.unsqueeze(-1) where the classes are in axis 1, "
                f"logits.{moved}.unsqueeze(-1) where they are in the last"
            )
        raise ValueError(
            f"targets {found} fit outputs {shape} with the classes in the last axis; they belong "
            f"in axis 1, as in nn.CrossEntropyLoss: let the model return logits.{moved}"
        )

    def _unmasked(self, targets: Tensor) -> Tensor:
        """Which class indices [N, t...] count; bool of their shape."""
        return targets.long() != self.ignore_index

    def _mask(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N, t] bool, tokens that count."""
        if targets.is_floating_point():
            size = (len(outputs), math.prod(outputs.shape[2:]))
            return torch.ones(size, dtype=torch.bool, device=outputs.device)
        return _per_sample(self._unmasked(targets))

    def unread(self, outputs: Tensor, targets: Any) -> Unread | None:
        if outputs.dim() != 3 or targets.is_floating_point():
            return None
        return Unread(~self._unmasked(targets), 1)

    def counted(self, outputs: Tensor, targets: Any) -> Tensor | None:
        if targets.is_floating_point():
            return None
        mask = self._unmasked(targets)
        if on_host(mask) and bool(mask.all()):
            return None
        return mask if mask.dim() == 1 else _per_sample(mask).any(1)

    def _token_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N, t]: 1/sqrt(unmasked tokens) for ``mean``, 1 for ``sum``, 0 where masked."""
        dtype = _wide(outputs.dtype)
        mask = self._mask(outputs, targets)
        if not self.mean or mask.shape[1] == 1:
            return mask.to(dtype)
        return mask.to(dtype) / mask.sum(1).clamp(min=1).to(dtype).sqrt().unsqueeze(1)

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor | None:
        return self._mask(outputs, targets).sum(1).clamp(min=1) if self.mean else None

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        # Closed-form root of diag(p) - p p^T with c - 1 rows: its LDL^T factors (Tanabe & Sagae,
        # J. R. Stat. Soc. B 54, 1992). With tails q_j = p_{j+1} + ... + p_c, row j is
        # sqrt(p_j q_j / (p_j + q_j)) (e_j - p_{>j} / q_j).
        flat = _flat(outputs)
        c, tokens = flat.shape[1:]
        count = _check_count(tokens * (c - 1), outputs)
        p = flat.softmax(1)
        if self.unread(outputs, targets) is not None:
            p.masked_fill_(~self._mask(outputs, targets).unsqueeze(1), 0)
        # Summed from the small end: 1 - p_1 - ... - p_j would lose all digits of a small tail.
        sums = p.flip(1).cumsum(1).flip(1)
        tail = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], dim=1)
        # The ratio first: p * tail underflows where both are small.
        scale = (p * (tail / (p + tail).clamp(min=torch.finfo(p.dtype).tiny))).sqrt()
        scale = scale * self._token_scale(outputs, targets).unsqueeze(1)
        inverse = torch.where(tail > 0, 1 / tail.clamp(min=torch.finfo(p.dtype).tiny), 0.0)
        ratio = scale * inverse

        if tokens == 1:
            step = max(1, _TOGETHER_BYTES // max(1, p.nbytes))

            def together(begin: int) -> Tensor:
                chosen = slice(begin, min(begin + step, count))
                rows = p[:, :, 0] * -ratio[:, chosen, 0].T.unsqueeze(2)
                rows *= rows.new_ones(len(rows), c).triu(begin + 1).unsqueeze(1)
                rows.diagonal(begin, dim1=0, dim2=2).copy_(scale[:, chosen, 0])
                return rows.to(outputs.dtype).reshape(len(rows), *outputs.shape)

            return _some_at_a_time(count, step, together)

        def row(index: int) -> Tensor:
            token, j = divmod(index, c - 1)
            out = torch.zeros_like(p)
            out[:, j, token] = scale[:, j, token]
            weight = -ratio[:, j, token].unsqueeze(1)
            torch.mul(p[:, j + 1 :, token], weight, out=out[:, j + 1 :, token])
            return out.reshape(outputs.shape).to(outputs.dtype)

        return Rows(count, row)

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        tokens = math.prod(outputs.shape[2:])
        together = outputs.dim() > 3
        logits = outputs.detach().flatten(2) if together else outputs
        labels = None
        if not targets.is_floating_point():
            labels = _per_sample(targets.long()) if together else targets.long()
        terms = self._terms(outputs, targets) if tokens > 1 else None
        # Drawn on the host, and therefore the same on every device.
        uniform = draws.uniform(samples, tokens)
        uniform = sent(uniform, outputs.device)
        if labels is not None and tokens > 1:
            uniform = without_padding(uniform, _per_sample(labels != self.ignore_index))

        def row(index: int) -> Tensor:
            gradient = ops.sampled_cross_entropy_gradient(
                logits, uniform[:, index], labels, self.ignore_index, terms, samples**-0.5
            )
            return gradient.unflatten(2, outputs.shape[2:]) if together else gradient

        return Rows(samples, row)

    def _classes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Class indices of which none stops a device for good; the checks report them."""
        labels = targets.long()
        if on_host(targets):
            return labels
        inside = labels.clamp(0, max(outputs.shape[1] - 1, 0))
        return labels.where(labels == self.ignore_index, inside)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        soft = targets.is_floating_point()
        losses = _per_sample(
            F.cross_entropy(
                outputs,
                targets.to(outputs.dtype) if soft else self._classes(outputs, targets),
                reduction="none",
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        )
        terms = self._terms(outputs, targets)
        total = losses.sum(1)
        return total if terms is None else total / terms


class _Elementwise(Loss):
    """A loss that is a sum (or mean) over output elements: A is diagonal."""

    mean: bool
    name: str

    @abstractmethod
    def _curvature(self, outputs: Tensor) -> Tensor:
        """Second derivative of every element's loss, the outputs' shape."""

    @abstractmethod
    def _sampled_gradient(self, outputs: Tensor, scale: float, draws: SampleDraws) -> Tensor:
        """``scale`` times a random [N, ...] with mean outer product diag(curvature)."""

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        return _same_shape(outputs, targets, self.name)

    def _scale(self, outputs: Tensor) -> float:
        return 1.0 / max(math.prod(outputs.shape[1:]), 1) if self.mean else 1.0

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor | None:
        if not self.mean:
            return None
        return outputs.new_full((1,), 1 / self._scale(outputs), dtype=torch.float64)

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        count = _check_count(math.prod(outputs.shape[1:]), outputs)
        flat = _at_least_float32(outputs.detach())
        root = _per_sample((self._curvature(flat) * self._scale(outputs)).sqrt())

        def row(index: int) -> Tensor:
            out = torch.zeros_like(root)
            out[:, index] = root[:, index]
            return out.reshape(outputs.shape).to(outputs.dtype)

        return Rows(count, row)

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        flat = _at_least_float32(outputs.detach())
        scale = (self._scale(outputs) / samples) ** 0.5
        return _drawn_rows(
            samples, lambda: self._sampled_gradient(flat, scale, draws).to(outputs.dtype)
        )


@dataclass(frozen=True)
class _MeanSquaredError(_Elementwise):
    """Squared error: A = 2/c I for ``mean``, 2 I for ``sum``."""

    mean: bool
    name = "MSELoss"

    def _curvature(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)

    def _sampled_gradient(self, outputs: Tensor, scale: float, draws: SampleDraws) -> Tensor:
        noise = draws.normal(math.prod(outputs.shape[1:])).reshape(outputs.shape)
        return sent(noise.mul_(2.0**0.5 * scale).to(outputs.dtype), outputs.device)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        losses = _per_sample(F.mse_loss(outputs, targets.to(outputs), reduction="none"))
        return losses.mean(1) if self.mean else losses.sum(1)


@dataclass(frozen=True)
class _BinaryCrossEntropy(_Elementwise):
    """Logistic loss per output: A = diag(sigma (1 - sigma)), divided by c for ``mean``."""

    mean: bool
    name = "BCEWithLogitsLoss"

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        super().check(outputs, targets, checks)
        if targets.numel():
            least, most = targets.aminmax()
            checks.require(
                # Written so that NaN fails.
                (least >= 0) & (most <= 1),
                lambda lowest, highest: (
                    "targets must lie in [0, 1] for BCEWithLogitsLoss; found values from "
                    f"{lowest:g} to {highest:g}"
                ),
                least,
                most,
            )
        return targets

    def _curvature(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid()

    def _sampled_gradient(self, outputs: Tensor, scale: float, draws: SampleDraws) -> Tensor:
        p = outputs.sigmoid()
        # In float32 numbers have steps of 2^-24, and rarer classes would never be drawn.
        uniform = draws.uniform(math.prod(p.shape[1:])).reshape(p.shape)
        drawn = sent(uniform, p.device) < outputs.double().sigmoid()
        # Not p - 1, which has no digits left where p is nearly 1.
        return torch.where(drawn, (-outputs).sigmoid().neg_(), p).mul_(scale)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        losses = _per_sample(
            F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")
        )
        return losses.mean(1) if self.mean else losses.sum(1)


@dataclass(frozen=True)
class _Custom(Loss):
    """A user's ``output_root(outputs, targets) -> [N, r, *outputs.shape[1:]]`` with Q^T Q = A."""

    output_root: Callable[..., Tensor]
    loss: Any
    known: Loss | None = None

    def split_batch(self, element: Any, index: int) -> Parts:
        split = super().split_batch if self.known is None else self.known.split_batch
        return split(element, index)

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        return super().run(model, inputs) if self.known is None else self.known.run(model, inputs)

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        return targets

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        root = self.output_root(outputs.detach(), targets)
        if not isinstance(root, Tensor):
            raise TypeError(f"output_root must return a tensor, got {type(root).__name__}")
        if root.dim() != outputs.dim() + 1 or (
            root.shape[0] != outputs.shape[0] or root.shape[2:] != outputs.shape[1:]
        ):
            raise ValueError(
                f"output_root must return [N, r, *outputs.shape[1:]] = [{outputs.shape[0]}, r, "
                f"{', '.join(map(str, outputs.shape[1:]))}], got {list(root.shape)}"
            )
        root = root.detach().to(outputs.dtype)
        return Rows(root.shape[1], lambda index: root[:, index])

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        exact = self.exact(outputs, targets)
        shape = (-1,) + (1,) * (outputs.dim() - 1)

        def draw() -> Tensor:
            noise = draws.normal(exact.count) / samples**0.5
            noise = sent(noise.to(outputs.dtype), outputs.device)
            out = torch.zeros_like(outputs)
            for j in range(exact.count):
                out += noise[:, j].reshape(shape) * exact.row(j)
            return out

        return _drawn_rows(samples, draw)

    def empirical(self, outputs: Tensor, targets: Any) -> Rows:
        if self._own_per_sample is None:
            raise NotImplementedError(
                "output='empirical' needs a loss with a gradient; output_root only gives its "
                "curvature (give the loss object a method per_sample(outputs, targets) -> [N])"
            )
        # In the dtype that its own code was written for.
        return self._gradient(outputs, targets, outputs.dtype)

    @property
    def _own_per_sample(self) -> Callable[..., Tensor] | None:
        method = getattr(self.loss, "per_sample", None)
        return method if callable(method) else None

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        if self._own_per_sample is None:
            raise NotImplementedError(
                "autograd needs the loss itself: give the loss object a method "
                "per_sample(outputs, targets) -> [N] beside output_root"
            )
        losses = self._own_per_sample(outputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"per_sample must return [N] = [{len(outputs)}], got {found}")
        return losses
