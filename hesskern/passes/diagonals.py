"""Parameters that are no matrices: which ones have a diagonal block, and their gradients by sample.

Biases, the weights of norms and other scales, embeddings, and vectors that are added or repeated
for every sample. What a parameter does is read off the graph of a run; before anything of it
counts, the sum of its gradients by sample is held against the gradient that autograd itself gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesskern.graph.evidence import Evidence
from hesskern.graph.parameter_uses import Leaf, find_parameter_uses
from hesskern.graph.sample_probe import random_rows
from hesskern.passes.diagonal_uses import DiagonalUse, as_call, diagonal_use
from hesskern.passes.layer_names import given_names
from hesskern.passes.layers import LayerSpec, bias_of, is_norm_or_embedding, own_parameters

__all__ = ["DiagonalCapture", "diagonal_parameters"]

# Of the sum of gradients by sample against autograd's own, relative to the largest of the former.
_AGREES = {torch.float64: 1e-8, torch.float32: 1e-3}
_AGREES_NARROW = 0.1
# Entries of gradients by sample that are held at a time.
_ENTRIES = 2**24


def diagonal_parameters(
    model: nn.Module, specs: Mapping[str, LayerSpec], layers: str | Iterable[str] | None
) -> dict[str, Tensor]:
    """The parameters that may have a diagonal block, by name.

    Vectors and scalars of all modules, without those that are a column of a layer's block
    (``bias="joint"``) or make a weight; all parameters of embeddings and norms; and what modules of
    other packages hold for all samples, [1, ..., d].

    Args:
        model: any module.
        specs: the layers with factors.
        layers: as in :func:`hesskern.passes.layers.select_layers`: those whose module, or which
            themselves, fit one of the names or patterns; None for all.
    """
    modules = dict(model.named_modules())
    joint = {id(bias_of(modules, spec)) for spec in specs.values() if spec.joint}
    chosen = None if layers is None else given_names(layers)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if id(parameter) in joint or name in specs or not parameter.is_floating_point():
            continue
        if chosen is not None and not any(
            fnmatchcase(text, pattern) for text in (owner, name) for pattern in chosen
        ):
            continue
        if _may_be_diagonal(modules[owner], owner, name.rpartition(".")[2], parameter):
            found[name] = parameter
    return found


def _may_be_diagonal(module: nn.Module, owner: str, own: str, parameter: Tensor) -> bool:
    if isinstance(module, nn.Module) and is_norm_or_embedding(module):
        return True
    if ".parametrizations." in f".{owner}." or f"{own.removesuffix('_g')}_v" in own_parameters(
        module
    ):
        # They make a weight.
        return False
    if parameter.dim() < 2:
        return True
    # Attention of torch appends rows [1, 1, d].
    foreign = not type(module).__module__.startswith("torch.nn.") or own in ("bias_k", "bias_v")
    return foreign and parameter.dim() > 2 and parameter.shape[0] == 1


@dataclass
class DiagonalCapture:
    """The parameters' uses in runs of a model.

    Attributes:
        parameters: by name, leaves that require gradients while the model runs.
        kept: those of which earlier passes have kept something.
        unfit: those that have no diagonal here, with the reason.
        reached: those that had uses in some batch.
        verified: forms of uses whose gradients were found to add up, shared by passes of one model.
    """

    parameters: dict[str, Tensor]
    kept: Collection[str] = ()
    unfit: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    verified: set[Any] = field(default_factory=set)

    @property
    def reasons(self) -> dict[str, str]:
        """Parameters without a diagonal, with the reason."""
        never = "was never reached from the outputs, which do not depend on it"
        missing = {name: never for name in self.parameters if name not in self.reached}
        return {**missing, **self.unfit}

    def uses(
        self, outputs: Tensor, alive: list[Any], evidence: Evidence, flat: Collection[Any]
    ) -> dict[str, list[DiagonalUse]]:
        """Uses by parameter, of all that have gradients by sample.

        Args:
            outputs: [N, ...] with N >= 1.
            alive: the nodes that they depend on.
            evidence: of which rows belong to which samples.
            flat: nodes of layers' calls on rows [R, d].

        Raises:
            ValueError: a parameter that had gradients by sample before has none here.
        """
        leaves = {
            name: Leaf(get_gradient_edge(parameter), tuple(parameter.shape))
            for name, parameter in self.parameters.items()
            if name not in self.unfit
        }
        found, others = find_parameter_uses(alive, leaves, len(outputs))
        self.leave_out(others)
        calls = {
            name: [call for call in map(as_call, own) if call.rows] for name, own in found.items()
        }
        calls = {name: own for name, own in calls.items() if own}
        if not calls:
            return {}
        arranged = evidence.arrange(outputs, alive, calls, flat)
        result: dict[str, list[DiagonalUse]] = {}
        for name in calls:
            own = [use for use in found[name] if as_call(use).rows]
            shape = leaves[name].shape
            made = [
                diagonal_use(use, shape, call)
                for use, call in zip(own, arranged[name], strict=True)
            ]
            reason = next((one for one in made if isinstance(one, str)), None)
            if reason is not None:
                self.leave_out({name: reason})
                continue
            result[name] = [one for one in made if isinstance(one, DiagonalUse)]
        self._verify(outputs, result, leaves)
        return {name: own for name, own in result.items() if name not in self.unfit}

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Keeps why parameters have no diagonal.

        Raises:
            ValueError: one of them had gradients by sample before.
        """
        for name, reason in reasons.items():
            if name in self.reached or name in self.kept:
                raise ValueError(
                    f"parameter {name!r} {reason}; in the batches before it had a diagonal block "
                    "(diagonal=False leaves all of them out)"
                )
            self.unfit.setdefault(name, reason)

    def _verify(
        self, outputs: Tensor, uses: dict[str, list[DiagonalUse]], leaves: dict[str, Leaf]
    ) -> None:
        """Holds the uses' gradients against autograd's, once for all runs of the same form."""
        forms = {name: (name, tuple(use.use.form for use in own)) for name, own in uses.items()}
        names = [name for name in uses if forms[name] not in self.verified]
        if not names:
            return
        edges: list[GradientEdge] = [use.edge for name in names for use in uses[name]]
        arrived = torch.autograd.grad(
            outputs,
            [*edges, *(leaves[name].edge for name in names)],
            random_rows(outputs),
            retain_graph=True,
            allow_unused=True,
        )
        gradients = iter(arrived[: len(edges)])
        with torch.no_grad():
            for name, whole in zip(names, arrived[len(edges) :], strict=True):
                own: list[tuple[DiagonalUse, Tensor | None]]
                own = [(use, next(gradients)) for use in uses[name]]
                if not _agrees(own, whole, self.parameters[name]):
                    reason = "acts in a way in which its gradients by sample do not add up"
                    self.leave_out({name: reason})
                self.verified.add(forms[name])


def _agrees(
    uses: list[tuple[DiagonalUse, Tensor | None]], whole: Tensor | None, parameter: Tensor
) -> bool:
    """Whether gradients by sample add up to autograd's own gradient in a parameter."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    total = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    # Terms may cancel: a bias of keys under a softmax has no gradient at all.
    size = torch.zeros_like(total)
    narrow = parameter.dtype
    for use, gradient in uses:
        if gradient is None:
            continue
        rows = use.by_sample(gradient.detach())
        if gradient.dtype not in _AGREES:
            narrow = gradient.dtype
        elif narrow in _AGREES and gradient.dtype == torch.float32:
            narrow = torch.float32
        step = max(1, _ENTRIES // max(1, parameter.numel()))
        for begin in range(0, len(rows), step):
            samples = slice(begin, min(begin + step, len(rows)))
            values = use.values(rows[samples].unsqueeze(1), samples, dtype)
            for sums, taken in ((total, values), (size, values.abs())):
                part = total.new_zeros(samples.stop - samples.start, 1, parameter.numel())
                use.add_(part, taken, samples)
                sums += part.sum((0, 1))
    expected = total.new_zeros(()) if whole is None else whole.detach().to(dtype).flatten()
    if not total.numel():
        return True
    size, error = size.abs().amax(), (total - expected).abs().amax()
    limit = _AGREES.get(narrow, _AGREES_NARROW) * size
    # What is not finite is found and named when the rows themselves are looked at.
    return not bool(torch.isfinite(size) & torch.isfinite(error) & (error > limit))
