"""What is right: Jacobian and loss Hessian of whole batches in float64, by torch alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fuzz.data import Batch
from fuzz.grammar import Case
from fuzz.program import Taps, plain_torch

__all__ = ["LayerReference", "Reference", "run_model", "weight_name"]


def weight_name(key: str, names: dict[str, Tensor] | dict[str, slice]) -> str | None:
    """The weight that a key of a result stands for."""
    for name in (f"{key}.weight" if key else "weight", f"{key}_weight", key):
        if name in names:
            return name
    return None


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor by which a module acts, by name: parameters, and weights made from them."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if name and hasattr(module, "parametrizations"):
            found[f"{name}.weight"] = module.weight
    return found


@dataclass
class LayerReference:
    """Kronecker factors of a layer; None where they are not defined for this model.

    Attributes:
        input_covariance: [d, d], or [g, d, d].
        output_hessian: [m, m].
        empirical: [m, m] from the gradients of the samples' losses.
    """

    input_covariance: Tensor | None = None
    output_hessian: Tensor | None = None
    empirical: Tensor | None = None


@dataclass
class _Sums:
    covariance: Tensor | None = None
    hessian: Tensor | None = None
    empirical: Tensor | None = None
    positions: float = 0.0
    known: bool = True


@dataclass
class Reference:
    """Derivatives of the mean loss of a case.

    Attributes:
        wide: in float64; False: in the dtype of the case, whatever its errors.
        slices: by weight's name, where its entries stand; tied names have one slice.
        gauss_newton: [P, P] of all weights together.
        scale: its norm; errors far below it are rounding.
        rarest: smallest probability of a target that the model gives.
        count: weighted number of samples.
        layers: factors by layer.
    """

    case: Case
    wide: bool = True
    slices: dict[str, slice] = field(default_factory=dict)
    rarest: float = 1.0
    count: float = 0.0
    layers: dict[str, LayerReference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sums: dict[str, _Sums] = defaultdict(_Sums)
        self._gradients: dict[bool, list[_Gradient]] = {}
        self._taps = Taps()
        self._model = self.case.reference(self._taps, self.wide)
        self._owner = _owners_of_weights(self._model, self.case.program.pruned)
        _tap_inside(self._model, self._taps)
        total: Tensor | None = None
        with plain_torch(), _projections_tapped(self._model, self._taps):
            for batch in self.case.batches:
                part = self._batch(batch)
                total = part if total is None else total + part
        assert total is not None
        self.gauss_newton = total / self.count
        self.scale = float(self.gauss_newton.norm())
        self._finish_layers()

    # One batch

    def _batch(self, batch: Batch) -> Tensor:
        taps, model = self._taps, self._model
        taps.clear()
        outputs, weights = run_model(model, self.case, batch, self.wide)
        unique = self._index(weights)
        flat = outputs.reshape(-1)
        inputs = [*unique, *[z for _, _, z in taps]]
        rows: list[list[Tensor]] = [[] for _ in inputs]
        for element in flat:
            grads = (
                torch.autograd.grad(element, inputs, retain_graph=True, allow_unused=True)
                if element.requires_grad
                else [None] * len(inputs)
            )
            for store, grad, tensor in zip(rows, grads, inputs, strict=True):
                store.append((torch.zeros_like(tensor) if grad is None else grad).double())
        jacobians = [torch.stack(store) for store in rows]
        J = torch.cat([j.reshape(len(flat), -1) for j in jacobians[: len(unique)]], 1)
        self._note_probabilities(outputs.detach().double())
        A, gradient, shares = self._curvature(batch, outputs.detach())
        self.count += float(shares.sum())
        for (name, x, _), j in zip(taps, jacobians[len(unique) :], strict=True):
            self._layer(name, model, x, j, A, gradient, shares, len(outputs), taps)
        return J.T @ A @ J

    def _index(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """Real weights, each once, in a fixed order; fills ``slices``."""
        seen: dict[int, slice] = {}
        unique = []
        size = 0
        for name, tensor in weights.items():
            if tensor.is_complex():
                continue
            if id(tensor) not in seen:
                seen[id(tensor)] = slice(size, size + tensor.numel())
                size += tensor.numel()
                unique.append(tensor)
            self.slices[name] = seen[id(tensor)]
        return unique

    def _curvature(self, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[O, O] Hessian in all outputs, [O] gradient per sample's outputs, [N] weights."""
        free = outputs.double().clone().requires_grad_()
        losses, shares = self._losses(batch, free)
        (gradient,) = torch.autograd.grad(losses.sum(), free, create_graph=True)
        weighted = (gradient.reshape(len(free), -1) * shares[:, None]).reshape(-1)
        rows = [
            torch.autograd.grad(entry, free, retain_graph=True)[0].reshape(-1)
            if entry.requires_grad
            else torch.zeros(free.numel(), dtype=free.dtype)
            for entry in weighted
        ]
        return torch.stack(rows), gradient.detach().reshape(-1), shares

    def _note_probabilities(self, outputs: Tensor) -> None:
        kind = self.case.loss.kind
        if kind == "ce":
            self.rarest = min(self.rarest, float(outputs.softmax(1).min()))
        elif kind == "bce":
            self.rarest = min(self.rarest, float((-outputs.abs()).sigmoid().min()))

    def _losses(self, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """[N] losses of the samples alone, and [N] their weights: 0 for those that do not count."""
        losses, counts = [], []
        for n in range(len(outputs)):
            loss = self.case.loss.sample(outputs[n : n + 1], batch.targets[n : n + 1])
            counts.append(0.0 if loss is None else 1.0)
            losses.append(0 * outputs[n].sum() if loss is None else loss)
        shares = torch.tensor(counts, dtype=torch.float64)
        if batch.weight is not None:
            shares = shares * batch.weight.to(self.case.dtype).double()
        return torch.stack(losses), shares

    # Factors

    def _layer(
        self,
        name: str,
        model: nn.Module,
        x: Tensor,
        j: Tensor,
        A: Tensor,
        gradient: Tensor,
        shares: Tensor,
        n: int,
        taps: Taps,
    ) -> None:
        """Adds one use: x as it came in, j [O, *z.shape]."""
        # Layers with one weight are one layer.
        owner = self._owner[name]
        alike = {other for other, first in self._owner.items() if first == owner}
        sums = self._sums[owner]
        if alike & self.case.program.odd:
            sums.known = False
            return
        module = dict(model.named_modules()).get(name)
        columns, vectors = _columns(module, x.double()), _vectors(module, j)
        rows, positions = columns.shape[1], vectors.shape[1]
        if not positions or rows != positions or positions % n:
            sums.known = False
            return
        # Which samples' outputs depend on a position.
        depends = vectors.abs().amax(2).reshape(n, -1, positions).amax(1) > 0
        sums.positions += float(shares.sum()) * positions / n
        curved = torch.einsum("opi,oq,qpj->ij", vectors, A, vectors)
        sums.hessian = _plus(sums.hessian, curved)
        weighted = (gradient.reshape(n, -1) * shares.sqrt()[:, None]).reshape(n, -1, 1, 1)
        rows_of = (weighted * vectors.reshape(n, -1, positions, vectors.shape[2])).sum(1)
        sums.empirical = _plus(sums.empirical, torch.einsum("npi,npj->ij", rows_of, rows_of))
        owners = self._owners(depends, shares, positions, n)
        if owners is None:
            sums.known = False
            return
        covariance = torch.einsum("gpi,p,gpj->gij", columns, owners, columns)
        sums.covariance = _plus(sums.covariance, covariance)

    @staticmethod
    def _owners(depends: Tensor, shares: Tensor, positions: int, n: int) -> Tensor | None:
        """[positions] weight of the sample that each belongs to; None where that is not known."""
        if bool((shares == shares[0]).all()):
            return shares[:1].expand(positions)
        counts = depends.sum(0)
        if bool((counts == 1).all()):
            return shares[depends.int().argmax(0)]
        # Positions without effect: with the samples in blocks, by their place.
        block = torch.arange(n).repeat_interleave(positions // n)
        inside = torch.nn.functional.one_hot(block, n).T.bool()
        if bool((depends & ~inside).any()) or bool((counts == 0).all()):
            return None
        strided = torch.arange(n).repeat(positions // n)
        beside = torch.nn.functional.one_hot(strided, n).T.bool()
        if positions > n and not bool((depends & ~beside).any()):
            # Samples one after the other would fit as well.
            return None
        if bool((depends | ~inside).all(0).any()):
            return shares[block]
        return None

    def _finish_layers(self) -> None:
        for name, owner in self._owner.items():
            sums = self._sums[owner]
            if not sums.known:
                self.layers[name] = LayerReference()
                continue
            covariance = sums.covariance
            if covariance is not None and len(covariance) == 1:
                covariance = covariance[0]
            self.layers[name] = LayerReference(
                None if covariance is None else covariance / self.count,
                None if sums.hessian is None else sums.hessian / (sums.positions or 1.0),
                None if sums.empirical is None else sums.empirical / (sums.positions or 1.0),
            )

    # Second derivatives

    def hessian_product(self, names: list[str], block: Tensor, through: bool = False) -> Tensor:
        """Products [P, k] of the Hessian in some weights together, by double backward passes.

        Args:
            names: of the weights, as in ``slices``.
            block: [P, k].
            through: for the function with the derivatives that the model leaves out.

        Raises:
            RuntimeError: an operation has no second derivative.
        """
        total = torch.zeros_like(block)
        with plain_torch():
            for gradient in self._batch_gradients(through):
                total += gradient.product(names, block)
        return total / self.count

    def _batch_gradients(self, through: bool) -> list[_Gradient]:
        if through not in self._gradients:
            model = self.case.through() if through else self.case.reference(lambda n, x, z: z)
            gradients = []
            for batch in self.case.batches:
                outputs, weights = run_model(model, self.case, batch)
                losses, shares = self._losses(batch, outputs.double())
                gradients.append(_Gradient(weights, (losses * shares).sum()))
            self._gradients[through] = gradients
        return self._gradients[through]


class _Gradient:
    """The gradient of one batch's loss in all real weights, with its graph."""

    def __init__(self, weights: dict[str, Tensor], loss: Tensor) -> None:
        self._weights = {n: w for n, w in weights.items() if not w.is_complex()}
        self._first: dict[str, Tensor] = {}
        if loss.requires_grad:
            first = torch.autograd.grad(
                loss,
                list(self._weights.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            self._first = dict(zip(self._weights, first, strict=True))

    def product(self, names: list[str], block: Tensor) -> Tensor:
        if not self._first:
            return torch.zeros_like(block)
        flat = torch.cat([self._first[name].reshape(-1) for name in names])
        if not flat.requires_grad:
            return torch.zeros_like(block)
        columns = []
        for vector in block.T:
            second = torch.autograd.grad(
                flat,
                [self._weights[name] for name in names],
                grad_outputs=vector.to(flat),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            columns.append(torch.cat([g.reshape(-1) for g in second]).double())
        return torch.stack(columns, 1)


def _owners_of_weights(model: nn.Module, pruned: set[str]) -> dict[str, str]:
    """For every module with a weight, the first one with the same weight."""
    first: dict[int, str] = {}
    owners = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[name] = first.setdefault(id(weight), name)
        elif name and (hasattr(module, "parametrizations") or name in pruned):
            owners[name] = name
    for key, weight in _projections(model).items():
        owners[key] = first.setdefault(id(weight), key)
    return owners


def _projections(model: nn.Module) -> dict[str, Tensor]:
    """The weights of attention that no module applies."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found[f"{name}.out_proj"] = module.out_proj.weight
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                weight = getattr(module, f"{part}_weight")
                if weight is not None:
                    found[f"{name}.{part}"] = weight
    return found


@contextmanager
def _projections_tapped(model: nn.Module, taps: Taps) -> Iterator[None]:
    """Attention calls ``F.linear`` with its weights; with a part of one it is not noted."""
    names = {id(weight): key for key, weight in _projections(model).items()}
    linear = nn.functional.linear

    def noted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = linear(input, weight, bias)
        return taps(names[id(weight)], input, z) if id(weight) in names else z

    nn.functional.linear = noted
    try:
        yield
    finally:
        nn.functional.linear = linear


def _tap_inside(model: nn.Module, taps: Taps) -> None:
    """Layers inside of modules, where the program's text has no taps."""
    for name, module in model.named_modules():
        if "." in name and type(module) is nn.Linear and "parametrizations" not in name:

            def hook(_: nn.Module, args: tuple[Tensor, ...], z: Tensor, name: str = name) -> Tensor:
                return taps(name, args[0], z)

            module.register_forward_hook(hook)


def run_model(
    model: nn.Module, case: Case, batch: Batch, wide: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs [N, ...] and the weights that made them."""
    with parametrize.cached():
        weights = weights_of(model)
        outputs = model(*case.inputs(batch, wide))
        outputs = getattr(outputs, "logits", outputs)
    for name in case.program.pruned:
        weights[f"{name}.weight"] = model.get_submodule(name).weight
    return outputs, weights


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _is_conv(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def _columns(module: nn.Module | None, x: Tensor) -> Tensor:
    """[g, positions, d]: what the weight sees, by groups; positions in the order of the output.

    For a convolution by a convolution whose weight is the identity.
    """
    if not _is_conv(module):
        return x.reshape(1, -1, x.shape[-1])
    channels = module.in_channels // module.groups
    taps = 1
    for size in module.kernel_size:
        taps *= size
    kind = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    probe = kind(
        channels,
        channels * taps,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=False,
        padding_mode=module.padding_mode,
        dtype=torch.float64,
    )
    identity = torch.eye(channels * taps, dtype=torch.float64)
    probe.weight.data.copy_(identity.reshape(probe.weight.shape))
    groups = []
    with torch.no_grad():
        for part in x.split(channels, 1):
            groups.append(probe(part).flatten(2).transpose(1, 2).reshape(-1, channels * taps))
    return torch.stack(groups)


def _vectors(module: nn.Module | None, j: Tensor) -> Tensor:
    """[O, positions, m] of j [O, *z.shape]."""
    if not _is_conv(module):
        return j.reshape(len(j), -1, j.shape[-1])
    return j.flatten(3).transpose(2, 3).reshape(len(j), -1, j.shape[2])
