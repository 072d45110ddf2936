"""EKFAC of every layer: the result and its file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import Order, check_choice
from hesskern.factors.parts import Part, part_paths, write_part
from hesskern.factors.result import ByLayer, read_spec
from hesskern.operators.corrected import CorrectedOperator
from hesskern.operators.network import LayerDamping, NetworkOperator
from hesskern.parallel.ranks import Ranks
from hesskern.passes.layers import LayerSpec
from hesskern.tensor_files import OpenedFile, TensorFormat

__all__ = ["EKFAC", "load_ekfac"]

_FILE = TensorFormat("hesskern.ekfac/1", "an EKFAC", "EKFAC file")


class EKFAC(ByLayer[CorrectedOperator]):
    """Eigenvalue-corrected Kronecker factors by layer name: (U (x) V) diag(S) (U (x) V)^T.

    Made by :func:`hesskern.ekfac`. ``E[name]`` multiplies (``@``), and has the eigenvectors
    (``eigenbases``) and S [m, d] (``values``).

    Attributes:
        num_samples: weighted number of samples behind S.
        skipped: modules with parameters that are not in here, with the reason.
        settings: how S was made (``output``, ``bias``, ``mc_samples``, ``seed``, ``precision``,
            ``checked``, as in :class:`hesskern.Factors`), ``eigenvectors``: in which precision the
            factors were decomposed, and ``factors``: their settings.
        specs: the layers' geometry, by name; of a part those of the whole.
        part: with ``sharded=True``, which part is here: other ranks keep the other layers, and what
            needs all of them is refused. None for a whole EKFAC.
    """

    _what = "EKFAC of"

    def __init__(
        self,
        layers: Mapping[str, CorrectedOperator],
        specs: Mapping[str, LayerSpec],
        num_samples: float,
        skipped: Mapping[str, str],
        settings: Mapping[str, Any],
        part: Part | None = None,
    ) -> None:
        self.part = part
        self._layers = dict(layers)
        names = self._layers if part is None else part.owners
        self.specs = {name: specs[name] for name in names}
        self.num_samples = num_samples
        self.skipped = dict(skipped)
        self.settings = dict(settings)
        self._operators: dict[str, NetworkOperator] = {}

    def shard(self, ranks: Ranks) -> EKFAC:
        """The part of one of several ranks, all of which call this with the same EKFAC."""
        tensors = {}
        for name, layer in self._layers.items():
            left, right, _ = layer.eigenbases
            tensors[name] = [*left, *right, layer.values]
        part = Part.of(ranks, tensors, [self.num_samples, self.skipped, self.settings])
        return self if part is None else self._of([self], part)

    def _of(self, given: Iterable[EKFAC], part: Part | None) -> EKFAC:
        """What all of the given have together, as far as a part has it, in its order."""
        layers, specs = dict(self._layers), dict(self.specs)
        for other in given:
            layers.update(other._layers)
            specs.update(other.specs)
        order = self.part or part
        if order is not None:
            names = [name for name in order.owners if part is None or part.has(name)]
            layers = {name: layers[name] for name in names}
        return EKFAC(layers, specs, self.num_samples, self.skipped, self.settings, part)

    def operator(self, order: Order = "weight") -> NetworkOperator:
        """Every layer's matrix as one, block diagonal over all weights, with ``solve`` and ``@``.

        Args:
            order: of flat vectors within a layer: "weight" as the weight is kept, which is [d, m]
                for the Conv1D of transformers and [m, d] otherwise; "output" for [m, d] always.

        Raises:
            ValueError: ``order`` is another word, layers are on several devices, or this is a part
                alone.
        """
        check_choice("order", order, Order)
        if self.part is not None:
            raise ValueError(self.part.refusal("an EKFAC", "load_ekfac"))
        if order not in self._operators:
            layers = {n: _ordered(layer, order) for n, layer in self._layers.items()}
            self._operators[order] = NetworkOperator(layers)
        return self._operators[order]

    def __matmul__(self, vectors: Any) -> Any:
        """The product of :meth:`operator`, whose vectors it takes."""
        return self.operator() @ vectors

    def solve(self, vectors: Any, damping: LayerDamping) -> Any:
        """(E + damping)^-1 times vectors, by :meth:`hesskern.NetworkOperator.solve`."""
        return self.operator().solve(vectors, damping)

    def power(self, p: float, damping: LayerDamping = 0.0) -> NetworkOperator:
        """(E + damping)^p, by :meth:`hesskern.NetworkOperator.power`."""
        return self.operator().power(p, damping)

    def logdet(self, damping: LayerDamping) -> float:
        """log det(E + damping), by :meth:`hesskern.NetworkOperator.logdet`."""
        return self.operator().logdet(damping)

    def sample(self, *args: Any, **given: Any) -> Any:
        """Draws from N(0, (E + damping)^-1), by :meth:`hesskern.NetworkOperator.sample`."""
        return self.operator().sample(*args, **given)

    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return self.operator().trace()

    def diagonal(self) -> Tensor:
        """[P] diagonal of :meth:`operator`."""
        return self.operator().diagonal()

    def __repr__(self) -> str:
        specs = {n: self.specs[n] for n in self._layers}
        rows = [f"  {n}: {spec.kind} {spec.shape}" for n, spec in specs.items()]
        some = "" if self.part is None else f", the part of {self.part.described}"
        return "\n".join([f"EKFAC of {self.num_samples:g} samples{some}:", *rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: the tensors, and everything else as JSON in its header.

        The file appears whole or not at all. A part goes to a file of its own, as in
        :meth:`Factors.save`.

        Raises:
            FileNotFoundError: the folder does not exist.
            FileExistsError: this is a part, and ``path`` itself is a file already.
        """
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            left, right, _ = layer.eigenbases
            tensors[f"{name}.values"] = layer.values
            for group, (u, v) in enumerate(zip(left, right, strict=True)):
                tensors[f"{name}.left.{group}"] = u
                tensors[f"{name}.right.{group}"] = v
        header: dict[str, Any] = {
            "num_samples": self.num_samples,
            "skipped": self.skipped,
            "settings": self.settings,
            "layers": [asdict(self.specs[name]) for name in self._layers],
        }
        if self.part is not None:
            others = [spec for name, spec in self.specs.items() if name not in self._layers]
            header["elsewhere"] = [asdict(spec) for spec in others]
        write_part(_FILE, path, tensors, header, self.part)


def load_ekfac(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    device: str | torch.device = "cpu",
) -> EKFAC:
    """Reads what :meth:`EKFAC.save` has written.

    Args:
        path: the file; for an EKFAC that was left sharded the name that it was saved under, one of
            the parts' files, or several, as in :func:`hesskern.load_factors`.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not one of these, of a newer version, or damaged; parts are missing,
            come twice, or are those of different results.
    """
    paths = part_paths(path)
    found = [_read(one, device) for one in paths]
    return found[0]._of(found, Part.joined([E.part for E in found], paths))


def _read(path: str | os.PathLike[str], device: str | torch.device) -> EKFAC:
    with _FILE.opened(path) as file:
        header = file.header
        specs = [read_spec(entry) for entry in header["layers"]]
        part = Part.of_header(header.get("part"))
        if part is not None:
            part.check_complete([spec.name for spec in specs], path)
        layers = {spec.name: _read_layer(file, spec, device, path) for spec in specs}
        specs += [read_spec(entry) for entry in header.get("elsewhere", ())]
        return EKFAC(
            layers,
            {spec.name: spec for spec in specs},
            header["num_samples"],
            header["skipped"],
            header["settings"],
            part,
        )


def _read_layer(
    file: OpenedFile, spec: LayerSpec, device: str | torch.device, path: Any
) -> CorrectedOperator:
    m, d = spec.shape
    step = m // spec.groups

    def read(name: str, *shape: int) -> Tensor:
        tensor = file.tensor(f"{spec.name}.{name}").to(device)
        if tensor.shape != shape:
            raise ValueError(
                f"path: {str(path)!r} is damaged: {name!r} of layer {spec.name!r} is "
                f"{list(tensor.shape)}, not {list(shape)}"
            )
        return tensor

    return CorrectedOperator.of_bases(
        [read(f"left.{group}", step, step) for group in range(spec.groups)],
        [read(f"right.{group}", d, d) for group in range(spec.groups)],
        read("values", m, d),
        transposed=spec.transposed,
        name=spec.name,
    )


def _ordered(layer: CorrectedOperator, order: Order) -> CorrectedOperator:
    """The layer's operator over flat vectors of one order."""
    if order == "weight" or not layer.transposed:
        return layer
    left, right, _ = layer.eigenbases
    return CorrectedOperator.of_bases(left, right, layer.values, name=layer.name)
