"""Kronecker factors of every layer: the result and its file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hesskern.choices import Order, check_choice
from hesskern.factors.large_layers import LargeLayerFactors, OfLayer
from hesskern.factors.parts import Part, part_paths, write_part
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.operators.network import NetworkOperator
from hesskern.parallel.ranks import Ranks
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.solvers.result import EigenResult
from hesskern.tensor_files import OpenedFile, TensorFormat

__all__ = ["ByLayer", "Factors", "LayerFactors", "OfLayer", "load_factors", "read_spec"]

Result = TypeVar("Result")

_FILE = TensorFormat("hesskern.factors/1", "hesskern factors", "factors file")
# Before the names of parameters in a file; no layer's name begins so.
_DIAGONAL = "diagonal/"


@dataclass(frozen=True, eq=False)
class LayerFactors(OfLayer):
    """Both Kronecker factors of one layer, means over samples.

    Attributes:
        spec: the layer's geometry.
        input_covariance: E[x x^T], summed over positions: [d, d], or [g, d, d] with groups.
        output_hessian: [m, m] E[M], the mean over all samples' positions.
        num_samples: weighted number of samples behind the means.
        positions: mean of the positions per sample (uses counted, masked ones not); 1 for plain
            linear.
        input_images: E[x] as it came in, one per use: [d], [t, d] or [C, (H,) W]; None where
            the shapes varied between batches.
        tied_to: name of a module that looks rows of the layer's weight up, as the embedding does
            that a head shares its weight with: the factors are those of the weight's linear use
            alone. None for all other layers.
    """

    spec: LayerSpec
    input_covariance: Tensor
    output_hessian: Tensor
    num_samples: float
    positions: float
    input_images: tuple[Tensor, ...] | None = field(default=None, repr=False)
    tied_to: str | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(m, d), or (d, m) for a weight that is kept transposed: the order of flat vectors."""
        return self.spec.weight_shape

    @cached_property
    def input_mean(self) -> Tensor:
        """E[x]: [d], or [d, positions] for convolutions and sequences.

        For a grouped convolution d counts the inputs of all groups. With ``bias="joint"`` the last
        row is one.

        Raises:
            ValueError: the number of positions varied between batches, so there is no mean image.
        """
        if self.input_images is None:
            raise ValueError(
                f"input_mean of layer {self.name!r} is not defined: its input shapes varied "
                "between batches"
            )
        columns = [unfolded(self.spec, image) for image in self.input_images]
        mean = torch.cat(columns, dim=1)
        if self.spec.joint:
            mean = torch.cat([mean, mean.new_ones(1, mean.shape[1])])
        return mean[:, 0] if self.kind == "linear" and mean.shape[1] == 1 else mean

    @cached_property
    def input_mean_direction(self) -> Tensor:
        """[d] unit vector: E[x]/‖E[x]‖, or the first left singular vector of E[X] with positions.

        Its sign makes the sum of entries non-negative. Zero if E[x] is zero.
        """
        mean = self.input_mean
        if mean.dim() == 1:
            return mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
        if not bool(mean.any()):
            return torch.zeros_like(mean[:, 0])
        left = torch.linalg.svd(mean.double(), full_matrices=False).U[:, 0]
        return (left * (1.0 if left.sum() >= 0 else -1.0)).to(mean.dtype)

    def operator(self, order: Order = "weight") -> KroneckerOperator:
        """K = E[M] (x) E[x x^T], [m d, m d]; block diagonal over groups.

        Args:
            order: of flat vectors: "weight" as the weight is kept, which is [d, m] for the Conv1D
                of transformers and [m, d] otherwise; "output" for [m, d] always.

        Raises:
            ValueError: ``order`` is another word.
        """
        check_choice("order", order, Order)
        transposed = self.spec.transposed and order == "weight"
        return KroneckerOperator.of_symmetric(
            self.output_hessian, self.input_covariance, transposed=transposed, name=self.name
        )

    def eigsh(self, k: int) -> EigenResult:
        """Top k eigenpairs of :meth:`operator` from the factors' own, which is never formed."""
        return self.operator().eigsh(k)


class ByLayer(Mapping[str, Result]):
    """Results by layer name, which say why one is missing.

    Attributes:
        skipped: modules with parameters that have no result here, with the reason.
        part: which part of a result this is that ranks have left sharded; None for a whole one.
    """

    _what: ClassVar[str]
    _layers: dict[str, Result]
    skipped: dict[str, str]
    part: Part | None = None

    def _reason(self, name: str) -> str | None:
        """Why a layer is missing, where that is known."""
        kept = None if self.part is None else self.part.reason(name)
        return kept or self.skipped.get(name)

    def __getitem__(self, name: str) -> Result:
        try:
            return self._layers[name]
        except KeyError:
            reason = self._reason(name)
            raise KeyError(
                f"no {self._what} layer {name!r}"
                + (f": it {reason}" if reason else f"; there are {', '.join(self._layers)}")
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Factors(ByLayer[LayerFactors]):
    """Kronecker factors by layer name.

    Attributes:
        num_samples: weighted number of samples.
        skipped: modules with parameters that have no factors here, with the reason.
        settings: how the factors were made (``output``, ``bias``, ``mc_samples``, ``seed``, and
            ``precision``: which one the rows had, e.g. "float64", "bfloat16 model, sums in
            float32", "float32, convolutions in TF32"), and under "checked", by layer, how it is
            known which rows belong to which samples: "graph" (proved), "probe" (found by backward
            passes), "not checked" (never two samples in a batch: nothing was to be told apart)
            or "switched off" (``check=False``).
        diagonals: with ``diagonal=True``, by parameter (``"ln_f.weight"``, ``"fc1.bias"``) and of
            its shape, the diagonal of the Gauss-Newton or Fisher matrix in it:
            1/N sum_n sum_c (d f_nc)^2, with d f_nc the gradient of sample n's root row c in the
            parameter, all its uses counted.
        large: with ``diagonal=True``, the layers with more than ``max_outputs`` outputs by name,
            with the diagonal of E[M] alone. They are no part of this mapping and of
            :meth:`operator`.
        part: with ``sharded=True``, which part is here: layers of other ranks are missing in this
            mapping, in ``large`` and in ``diagonals``. None for whole factors.
    """

    _what = "factors for"

    def __init__(
        self,
        layers: Mapping[str, LayerFactors],
        num_samples: float,
        skipped: Mapping[str, str],
        settings: Mapping[str, Any],
        diagonals: Mapping[str, Tensor] | None = None,
        large: Mapping[str, LargeLayerFactors] | None = None,
        part: Part | None = None,
    ) -> None:
        self.part = part
        self._layers = dict(layers)
        self.num_samples = num_samples
        self.skipped = dict(skipped)
        self.settings = dict(settings)
        self.diagonals = dict(diagonals or {})
        self.large = dict(large or {})

    def _reason(self, name: str) -> str | None:
        if name in self.large:
            return "has too many outputs for E[M]; its diagonal is in .large"
        return super()._reason(name)

    def shard(self, ranks: Ranks) -> Factors:
        """The part of one of several ranks, all of which call this with the same factors."""
        tensors = {
            **{n: [f.output_hessian, f.input_covariance] for n, f in self._layers.items()},
            **{n: [f.output_diagonal, f.input_covariance] for n, f in self.large.items()},
            **{f"{_DIAGONAL}{n}": [diagonal] for n, diagonal in self.diagonals.items()},
        }
        part = Part.of(ranks, tensors, [self.num_samples, self.skipped, self.settings])
        return self if part is None else self._of([self], part)

    def _of(self, given: Iterable[Factors], part: Part | None) -> Factors:
        """What all of the given have together, as far as a part has it, in its order."""
        layers, large, diagonals = dict(self._layers), dict(self.large), dict(self.diagonals)
        for other in given:
            layers.update(other._layers)
            large.update(other.large)
            diagonals.update(other.diagonals)
        order = self.part or part
        if order is not None:
            names = [name for name in order.owners if part is None or part.has(name)]
            layers = {n: layers[n] for n in names if n in layers}
            large = {n: large[n] for n in names if n in large}
            plain = [n.removeprefix(_DIAGONAL) for n in names if n.startswith(_DIAGONAL)]
            diagonals = {n: diagonals[n] for n in plain}
        about = self.num_samples, self.skipped, self.settings
        return Factors(layers, *about, diagonals, large, part)

    def operator(self, order: Order = "weight") -> NetworkOperator:
        """Every layer's K = E[M] (x) E[x x^T] as one block diagonal matrix over all weights.

        Args:
            order: of flat vectors within a layer, as in :meth:`LayerFactors.operator`.

        Raises:
            ValueError: ``order`` is another word, there is no layer, the factors are on several
                devices, or these are a part of them alone.
        """
        check_choice("order", order, Order)
        if self.part is not None:
            raise ValueError(self.part.refusal("factors", "load_factors"))
        return NetworkOperator({name: f.operator(order) for name, f in self._layers.items()})

    def __repr__(self) -> str:
        rows = [f"  {n}: {f.kind} {f.layer_shape}" for n, f in self._layers.items()]
        rows += [f"  {n}: {f.kind} {f.layer_shape}, diagonal E[M]" for n, f in self.large.items()]
        rows += [f"  {n}: diagonal {tuple(d.shape)}" for n, d in self.diagonals.items()]
        some = "" if self.part is None else f", the part of {self.part.described}"
        return "\n".join([f"Factors of {self.num_samples:g} samples{some}:", *rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: the tensors, and everything else as JSON in its header.

        The file appears whole or not at all. A part goes to a file of its own, beside those of
        other ranks: "factors.rank0of2.safetensors" for "factors.safetensors", by which name
        :func:`hesskern.load_factors` finds all of them.

        Raises:
            FileNotFoundError: the folder does not exist.
            FileExistsError: this is a part, and ``path`` itself is a file already.
        """
        tensors: dict[str, Tensor] = {}
        layers = []
        for name, f in self._layers.items():
            tensors[f"{name}.input_covariance"] = f.input_covariance
            tensors[f"{name}.output_hessian"] = f.output_hessian
            for i, image in enumerate(f.input_images or ()):
                tensors[f"{name}.input_image.{i}"] = image
            layers.append(
                {
                    "spec": asdict(f.spec),
                    "num_samples": f.num_samples,
                    "positions": f.positions,
                    "tied_to": f.tied_to,
                    "images": None if f.input_images is None else len(f.input_images),
                }
            )
        header: dict[str, Any] = {
            "num_samples": self.num_samples,
            "skipped": self.skipped,
            "settings": self.settings,
            "layers": layers,
        }
        if self.large:
            header["large"] = []
        for name, one in self.large.items():
            tensors[f"{name}.input_covariance"] = one.input_covariance
            tensors[f"{name}.output_diagonal"] = one.output_diagonal
            entry = {"spec": asdict(one.spec), "num_samples": one.num_samples}
            header["large"].append({**entry, "positions": one.positions, "tied_to": one.tied_to})
        if self.diagonals:
            tensors.update((f"{_DIAGONAL}{name}", d) for name, d in self.diagonals.items())
            header["diagonals"] = list(self.diagonals)
        write_part(_FILE, path, tensors, header, self.part)


def load_factors(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    device: str | torch.device = "cpu",
) -> Factors:
    """Reads what :meth:`Factors.save` has written.

    Args:
        path: the file; for factors that were left sharded the name that they were saved under,
            which stands for all parts, or one of the parts' files, or several: these together.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not one of these, or is damaged; parts are missing, come twice, or
            are those of different factors.
    """
    paths = part_paths(path)
    found = [_read(one, device) for one in paths]
    return found[0]._of(found, Part.joined([factors.part for factors in found], paths))


def _read(path: str | os.PathLike[str], device: str | torch.device) -> Factors:
    with _FILE.opened(path) as file:
        header = file.header
        part = Part.of_header(header.get("part"))
        layers = [_read_layer(file, entry, device) for entry in header["layers"]]
        large = [_read_large(file, entry, device) for entry in header.get("large", ())]
        for one in large:
            m, d = one.layer_shape
            shape = (d, d) if one.groups == 1 else (one.groups, d, d)
            if one.output_diagonal.shape != (m,) or one.input_covariance.shape != shape:
                raise ValueError(
                    f"path: {str(path)!r} is damaged: the factors of layer {one.name!r} do not "
                    f"have its shape {one.layer_shape}"
                )
        for f in layers:
            m, d = f.layer_shape
            shape = (d, d) if f.groups == 1 else (f.groups, d, d)
            if f.output_hessian.shape != (m, m) or f.input_covariance.shape != shape:
                raise ValueError(
                    f"path: {str(path)!r} is damaged: the factors of layer {f.name!r} do not "
                    f"have its shape {f.layer_shape}"
                )
        diagonals = list(header.get("diagonals", ()))
        if part is not None:
            names = [*(f.name for f in layers), *(one.name for one in large)]
            part.check_complete([*names, *(f"{_DIAGONAL}{n}" for n in diagonals)], path)
        return Factors(
            {layer.name: layer for layer in layers},
            header["num_samples"],
            header["skipped"],
            header["settings"],
            {n: file.tensor(f"{_DIAGONAL}{n}").to(device) for n in diagonals},
            {one.name: one for one in large},
            part,
        )


def read_spec(entry: Mapping[str, Any]) -> LayerSpec:
    """A layer's geometry as a file's header has it."""
    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()
    }
    return LayerSpec(**fields)


def _read_layer(
    file: OpenedFile, entry: dict[str, Any], device: str | torch.device
) -> LayerFactors:
    spec = read_spec(entry["spec"])
    count = entry["images"]

    def read(name: str) -> Tensor:
        return file.tensor(f"{spec.name}.{name}").to(device)

    return LayerFactors(
        spec,
        read("input_covariance"),
        read("output_hessian"),
        entry["num_samples"],
        entry["positions"],
        None if count is None else tuple(read(f"input_image.{i}") for i in range(count)),
        entry.get("tied_to"),
    )


def _read_large(
    file: OpenedFile, entry: dict[str, Any], device: str | torch.device
) -> LargeLayerFactors:
    spec = read_spec(entry["spec"])
    names = ("input_covariance", "output_diagonal")
    covariance, diagonal = (file.tensor(f"{spec.name}.{name}").to(device) for name in names)
    about = (entry["num_samples"], entry["positions"], entry["tied_to"])
    return LargeLayerFactors(spec, covariance, diagonal, *about)
