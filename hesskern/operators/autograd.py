"""Hessians of any parameters by double backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesskern.operators.base import CurvatureOperator, Layout
from hesskern.passes.batches import Batch, batches, check_iterable, no_samples
from hesskern.passes.checks import Checks
from hesskern.passes.forward_pass import (
    check_repeatable,
    frozen_eval,
    model_device,
    random_state,
)
from hesskern.passes.layers import layers_of_parameters
from hesskern.passes.losses import resolve_loss
from hesskern.passes.roots import checked_targets, sample_weights
from hesskern.portable import Portable
from hesskern.progress import Progress, reporter

__all__ = ["AutogradHessian"]


class AutogradHessian(Portable, CurvatureOperator):
    """The Hessian of the mean loss in chosen parameters, by double backward passes.

    The reference for everything else here, and the way for layers followed by smooth activations.
    Vectors are in the order of the parameters' memory, as those of ``operator(order="weight")``.

    Args:
        model: runs in eval mode and comes back as it was.
        data: re-iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what the loss
            takes apart.
        loss: as in :func:`hesskern.kronecker_factors`; an object with ``output_root`` also needs
            ``per_sample(outputs, targets) -> [N]``.
        params: names from ``model.named_parameters()``; None for all real ones. P counts their
            entries, concatenated in this order.
        sample_weight: [total samples].
        progress: True for a bar per product, or a callback.

    Attributes:
        params: the names that P counts.
        skipped: complex parameters and those of integers, with the reason.

    Raises:
        TypeError: ``model`` is not a module, or ``data`` not iterable.
        ValueError: a name is unknown, or the data is empty or can be iterated only once. At a
            product: the outputs are random, or a parameter's module runs under no_grad() alone.
        NotImplementedError: a parameter is complex or of integers. At a product: the model holds an
            operation without a second derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss: Any = None,
        params: Iterable[str] | None = None,
        *,
        sample_weight: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_iterable(data)
        known = dict(model.named_parameters())
        if isinstance(params, str):
            params = [params]
        real = [name for name, parameter in known.items() if parameter.is_floating_point()]
        self.params = real if params is None else list(params)
        self.skipped = {
            name: f"is {known[name].dtype}, in which a loss has no Hessian of this form"
            for name in known.keys() - set(real)
        }
        for name in self.params:
            if name not in known:
                raise ValueError(
                    f"params: the model has no parameter {name!r}; it has {', '.join(known)}"
                )
        if not self.params:
            raise ValueError("params must name at least one parameter")
        if isinstance(data, Iterator):
            raise ValueError("data must be re-iterable (a DataLoader or a list), got an iterator")
        self._model, self._data, self._loss = model, data, resolve_loss(loss)
        self._sample_weight, self._progress = sample_weight, reporter(progress)
        self._bar = progress is True
        self._compared = False
        self._layers = layers_of_parameters(model)
        self._parameters = [known[name] for name in self.params]
        for name, parameter in zip(self.params, self._parameters, strict=True):
            if not parameter.is_floating_point():
                raise NotImplementedError(
                    f"params: {name!r} is {parameter.dtype}; a Hessian is defined for real "
                    "floating-point parameters"
                )
        size = sum(p.numel() for p in self._parameters)
        self.shape = (size, size)
        self.dtype, self.device = self._parameters[0].dtype, self._parameters[0].device

    def _layout(self) -> Layout:
        found: list[tuple[str | None, tuple[int, int], bool]] = []
        for name, parameter in zip(self.params, self._parameters, strict=True):
            specs = self._layers.get(name, [])
            if not specs:
                found.append((name, (parameter.numel(), 1), False))
            elif len(specs) > 1 and specs[0].expert is None:
                # Layers of one weight: any of their names.
                found.append((None, specs[0].shape, specs[0].transposed))
            else:
                found += [(spec.name, spec.shape, spec.transposed) for spec in specs]
        return tuple(found)

    def _given(self) -> dict[str, Any]:
        return {"model": self._model, "data": self._data, "loss": self._loss}

    def _about(self) -> str:
        return "an AutogradHessian, which runs the model at every product,"

    def _state(self) -> dict[str, Any]:
        # A bar on the terminal, or a callback, stays with the one it was made for.
        return {**super()._state(), "_progress": reporter(self._bar)}

    def _matmul(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        total_weight: float | Tensor = 0.0
        # Of a device, which answers behind the last batch.
        asked = False
        # Fused attention has no second derivative; its plain form has.
        with (
            Checks() as checks,
            frozen_eval(self._model, self._parameters),
            sdpa_kernel(SDPBackend.MATH),
            _GradientModes(self._model, self.params) as modes,
        ):
            for batch in batches(
                self._data,
                model_device(self._model),
                self._sample_weight,
                self._progress,
                "Autograd Hessian",
                self._loss.split_batch,
            ):
                outputs = self._outputs(batch)
                targets = checked_targets(self._loss, outputs, batch, checks)
                if not self._compared and not asked:
                    conditions = checks.conditions
                    self._compared = self._loss.compare(self._model, batch, outputs, checks)
                    asked = checks.conditions > conditions
                losses = self._loss.per_sample(outputs, targets)
                weight, batch_weight = sample_weights(batch, outputs, self._loss, checks)
                checks.close()
                total_weight = total_weight + batch_weight
                loss = losses.sum() if weight is None else (losses * weight).sum()
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    loss,
                    self._parameters,
                    create_graph=True,
                    materialize_grads=True,
                )
                flat = torch.cat([g.reshape(-1) for g in gradients])
                if not flat.requires_grad:
                    continue
                for j, vector in enumerate(block):
                    total[j] += self._again(flat, vector, keep=j < len(block) - 1)
            modes.check()
        self._compared |= asked
        count = float(total_weight)
        if count == 0:
            raise no_samples()
        return total / count

    def _outputs(self, batch: Batch) -> Tensor:
        """[N, ...] of the model; refused if they or their derivatives are random."""
        before = random_state(self.device)
        outputs = self._loss.run(self._model, batch.inputs)
        if random_state(self.device) != before:

            def values(outputs: Tensor) -> list[Tensor]:
                first = outputs.detach()
                if not outputs.requires_grad:
                    return [first]
                return [
                    first,
                    *torch.autograd.grad(
                        outputs.sum(), self._parameters, retain_graph=True, materialize_grads=True
                    ),
                ]

            check_repeatable(
                values(outputs),
                lambda: values(self._loss.run(self._model, batch.inputs)),
                batch.index,
            )
        return outputs

    def _again(self, gradient: Tensor, vector: Tensor, keep: bool) -> Tensor:
        """[P] derivative of <gradient, vector>, both [P]."""
        try:
            products = torch.autograd.grad(
                gradient,
                self._parameters,
                grad_outputs=vector,
                retain_graph=keep,
                materialize_grads=True,
            )
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            raise NotImplementedError(
                "model holds an operation that torch cannot differentiate twice "
                f"({str(error).splitlines()[0]}); layer_hessians needs its first derivative alone"
            ) from error
        return torch.cat([p.reshape(-1) for p in products])

    def trace(self) -> float:
        """Exact, by P products; for small models."""
        return float(self.to_dense().diagonal().double().sum())

    def diagonal(self) -> Tensor:
        """[P], exact, by P products; for small models."""
        return self.to_dense().diagonal().clone()


class _GradientModes:
    """Which parameters belong to modules that run without gradients, inside a ``with`` block."""

    def __init__(self, model: nn.Module, params: list[str]) -> None:
        self._modules = dict(model.named_modules())
        self._params = params
        self._with: set[str] = set()
        self._without: set[str] = set()

    def __enter__(self) -> _GradientModes:
        self._handles = [
            self._modules[owner].register_forward_pre_hook(self._hook(owner))
            for owner in {name.rpartition(".")[0] for name in self._params}
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, owner: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            (self._with if torch.is_grad_enabled() else self._without).add(owner)

        return hook

    def check(self) -> None:
        """Refuses parameters on which the outputs depend in a way that autograd never sees.

        Raises:
            ValueError: naming the first of them.
        """
        for name in self._params:
            owner = name.rpartition(".")[0]
            if owner in self._without and owner not in self._with:
                raise ValueError(
                    f"params: {name!r} belongs to a module that runs under torch.no_grad() inside "
                    "the model, so autograd has no Hessian in it"
                )
