"""Input covariances of every layer, of all data seen so far, and their file."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import Bias
from hesskern.factors.input_sums import InputSums, SharedSums
from hesskern.factors.result import OfLayer, read_spec
from hesskern.passes.layers import LayerSpec
from hesskern.tensor_files import TensorFormat

__all__ = ["InputCovariances", "LayerInputs", "load_input_covariances", "overflow"]

_FILE = TensorFormat(
    "hesskern.input_covariances/1", "hesskern input covariances", "input covariances file"
)


@dataclass(frozen=True, eq=False)
class LayerInputs(OfLayer):
    """What one layer is given, as means over samples.

    Attributes:
        spec: the layer's geometry.
        input_covariance: E[x x^T], summed over positions: [d, d], or [g, d, d] with groups; the
            same as :attr:`hesskern.LayerFactors.input_covariance`. Divided by ``positions`` it is
            the mean over positions too.
        input_mean: [d] mean of x over samples and positions, [g d] with groups; with
            ``bias="joint"`` a one stands at its end.
        num_samples: weighted number of samples behind the means.
        positions: positions per sample (calls counted), 1 for plain linear.
    """

    spec: LayerSpec
    input_covariance: Tensor
    input_mean: Tensor
    num_samples: float
    positions: float


class InputCovariances(Mapping[str, LayerInputs]):
    """Input covariances by layer name, of all data seen so far.

    Layers that were always given the same tensor (query, key and value; gate and up), one right
    after another, have their sums in common; ``result["name"]`` makes the means of one layer anew
    each time.

    A new one is empty, for :func:`hesskern.input_covariances` to add to:

    >>> seen = InputCovariances()
    >>> for part in parts:
    ...     hk.input_covariances(model, part, accumulate=seen)

    Attributes:
        num_samples: weighted number of samples.
        skipped: modules with parameters that have no covariance here, with the reason.
    """

    def __init__(self) -> None:
        self.num_samples = 0.0
        self.skipped: dict[str, str] = {}
        self._bias: Bias | None = None
        self._specs: dict[str, LayerSpec] = {}
        self._sums = SharedSums()
        self._unfit: dict[str, str] = {}
        self._precisions: dict[str, None] = {}
        self._whole = True

    @property
    def settings(self) -> dict[str, Any]:
        """How they were made: ``bias``, and ``precision`` in words, as :attr:`Factors.settings`."""
        return {"bias": self._bias, "precision": "; ".join(self._precisions)}

    def __getitem__(self, name: str) -> LayerInputs:
        self._require_whole()
        sums = self._sums.by_layer.get(name)
        if sums is None:
            reason = self.skipped.get(name)
            there = ", ".join(self) or "none, as no data was seen yet"
            raise KeyError(
                f"no input covariance for layer {name!r}"
                + (f": it {reason}" if reason else f"; there are {there}")
            )
        spec = self._specs[name]
        # Where all weights are zero, so are all sums.
        mean = sums.column / (sums.positions or 1.0)
        if spec.joint:
            mean = torch.cat([mean, mean.new_ones(1)])
        covariance = sums.covariance(spec, self.num_samples)
        return LayerInputs(
            spec, covariance, mean, self.num_samples, sums.positions / self.num_samples
        )

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._specs if name in self._sums.by_layer)

    def __len__(self) -> int:
        return len(self._sums.by_layer)

    def __contains__(self, name: object) -> bool:
        return name in self._sums.by_layer

    def __repr__(self) -> str:
        rows = [f"  {n}: {self._specs[n].kind} {self._specs[n].shape}" for n in self]
        return "\n".join([f"InputCovariances of {self.num_samples:g} samples:", *rows])

    def merge(self, other: InputCovariances) -> None:
        """Adds what others have seen, with the same layers: of other data, in another process.

        Raises:
            TypeError: ``other`` is not an InputCovariances.
            ValueError: its layers or its bias differ, or one of both cannot have a layer that the
                other has; nothing is added then.
        """
        if not isinstance(other, InputCovariances):
            raise TypeError(f"other must be an InputCovariances, got {type(other).__name__}")
        if other is self:
            other = self._copy()
        self._require_whole()
        other._require_whole()
        if not other._specs:
            return
        self._require_same(other._specs, other._bias, "other has")
        for one, another in ((self, other), (other, self)):
            for name in one._sums.by_layer.keys() & another._unfit.keys():
                raise ValueError(
                    f"other does not fit: layer {name!r} {another._unfit[name]} in one of both and "
                    "has a covariance in the other (leave the layer out with layers=[...])"
                )
        groups: dict[Hashable, list[str]] = {}
        theirs: dict[Hashable, InputSums] = {}
        for name, sums in other._sums.by_layer.items():
            groups.setdefault(id(sums), []).append(name)
            theirs[id(sums)] = sums
        self._require_room(other)
        empty = {
            key: InputSums.zeros(self_spec, theirs[key].inputs.dtype, theirs[key].inputs.device)
            for key, names in groups.items()
            for self_spec in [other._specs[names[0]]]
        }
        with self._adding():
            for key, mine in self._sums.arrange(groups, empty):
                mine.add(theirs[key])
            self.num_samples += other.num_samples
        self._specs, self._bias = dict(other._specs), other._bias
        self._precisions.update(other._precisions)
        self._unfit = {**other._unfit, **self._unfit}
        reasons = {**other.skipped, **self.skipped}
        self.skipped = {name: text for name, text in reasons.items() if name not in self}

    def _take(self, other: InputCovariances) -> None:
        """:meth:`merge`, of what nobody else holds."""
        if self._specs:
            self.merge(other)
        else:
            self.__dict__.update(other.__dict__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, to be read by :func:`hesskern.load_input_covariances`.

        The file appears whole or not at all. It holds the sums, to the bit: what is added to those
        read from it is as if nothing had happened in between.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        self._require_whole()
        numbers: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}
        entries = []
        for sums in self._sums.by_layer.values():
            if id(sums) in numbers:
                continue
            number = numbers[id(sums)] = len(numbers)
            tensors[f"{number}.inputs"], tensors[f"{number}.column"] = sums.inputs, sums.column
            entries.append({"squares": sums.squares, "positions": sums.positions})
        header = {
            "num_samples": self.num_samples,
            "bias": self._bias,
            "precisions": list(self._precisions),
            "skipped": self.skipped,
            "unfit": self._unfit,
            "specs": [asdict(spec) for spec in self._specs.values()],
            "sums": entries,
            "layers": {name: numbers[id(sums)] for name, sums in self._sums.by_layer.items()},
        }
        _FILE.write(path, tensors, header)

    def _copy(self) -> InputCovariances:
        copied = InputCovariances()
        copied.__dict__.update(self.__dict__)
        copied._sums = self._sums.copy()
        copied._unfit, copied._precisions = dict(self._unfit), dict(self._precisions)
        return copied

    def _require_whole(self) -> None:
        if not self._whole:
            raise RuntimeError(
                "these input covariances were interrupted while a batch was being added, which is "
                "in some layers' sums and not in others'; begin anew, or from a saved file"
            )

    def _require_same(
        self, specs: Mapping[str, LayerSpec], bias: Bias | None, subject: str
    ) -> None:
        if not self._specs:
            return
        if bias != self._bias:
            raise ValueError(f"{subject} bias={bias!r}, what was accumulated {self._bias!r}")
        if list(specs.items()) != list(self._specs.items()):
            names = [n for n in {**specs, **self._specs} if specs.get(n) != self._specs.get(n)]
            raise ValueError(
                f"{subject} other layers than what was accumulated"
                + (f": {', '.join(map(repr, names[:5]))} differ" if names else "")
            )

    def _require_room(self, other: InputCovariances) -> None:
        """Refuses what would overflow once both are added up."""
        for name, sums in other._sums.by_layer.items():
            known = self._sums.by_layer.get(name)
            squares = sums.squares + (0.0 if known is None else known.squares)
            if not squares <= torch.finfo(sums.inputs.dtype).max:
                raise ValueError(overflow(name, sums.inputs.dtype, "after the merge"))

    def _adding(self) -> _Adding:
        return _Adding(self)


def overflow(name: str, dtype: torch.dtype, when: str) -> str:
    """Says that the squares of a layer's inputs go beyond what their sum's dtype holds."""
    return (
        f"data: squared inputs of layer {name!r} overflow {dtype} {when}; nothing of it was "
        "accumulated"
    )


class _Adding:
    """Around what changes sums: whatever breaks off inside leaves them useless, and known to be."""

    def __init__(self, result: InputCovariances) -> None:
        self._result = result

    def __enter__(self) -> None:
        self._result._whole = False

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._result._whole = kind is None


def load_input_covariances(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> InputCovariances:
    """Reads a file written by :meth:`InputCovariances.save`; more can be added to what it held.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of these, or is damaged.
    """
    with _FILE.opened(path) as file:
        header = file.header
        specs = [read_spec(entry) for entry in header["specs"]]
        result = InputCovariances()
        result.num_samples, result._bias = header["num_samples"], header["bias"]
        result.skipped, result._unfit = dict(header["skipped"]), dict(header["unfit"])
        result._precisions = dict.fromkeys(header["precisions"])
        result._specs = {spec.name: spec for spec in specs}
        sums = [
            InputSums(
                file.tensor(f"{number}.inputs").to(device),
                file.tensor(f"{number}.column").to(device),
                entry["squares"],
                entry["positions"],
            )
            for number, entry in enumerate(header["sums"])
        ]
        for name, number in header["layers"].items():
            spec, own = result._specs[name], sums[number]
            empty = InputSums.zeros(spec, own.inputs.dtype, torch.device("meta"))
            if own.inputs.shape != empty.inputs.shape or own.column.shape != empty.column.shape:
                raise ValueError(
                    f"path: {str(path)!r} is damaged: the sums of layer {name!r} do not have its "
                    f"shape {spec.shape}"
                )
            result._sums.by_layer[name] = own
        return result
