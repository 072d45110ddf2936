"""One walk over data that adds to input covariances, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hesskern.factors.input_batch import NextSums, SpareMemory
from hesskern.factors.input_covariances import InputCovariances, overflow
from hesskern.factors.input_rows import BatchRows, LastSample, out_of_order
from hesskern.passes.batches import Batch, sample_count
from hesskern.passes.checks import Checks
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layers import LayerSpec, shared_weights
from hesskern.passes.masks import LayerMasks
from hesskern.passes.roots import given_weights

__all__ = ["InputPass"]

# Of one call of a layer: what tells whether its rows come sample after sample, where that matters,
# or why its rows cannot be told.
_Seen = LastSample | None | str


@dataclass
class InputPass:
    """One walk over data that adds to a result, batch by batch.

    Attributes:
        result: what is added to.
        model: runs.
        capture: of it, opened by the caller.
        specs: the layers, by name.
        device: of the model.
    """

    result: InputCovariances
    model: nn.Module
    capture: InputCapture
    specs: dict[str, LayerSpec]
    device: torch.device

    def __post_init__(self) -> None:
        self._ordered: set[str] = set()
        self._spare = SpareMemory()
        self.capture.unfit.update(self.result._unfit)
        alike: dict[str, list[str]] = {}
        for name, first in shared_weights(self.model, self.specs).items():
            alike.setdefault(first, [first]).append(name)
        for names in alike.values():
            self.capture.unfit.update(self._unlike(names))
        # Layers of one weight see the inputs of all of them: it is one matrix.
        self._alike = {name: names for names in alike.values() for name in names}
        self._refuse()

    def add(self, batch: Batch) -> None:
        """Adds one batch as a whole, or nothing of it."""
        samples = sample_count(batch)
        if not samples:
            return
        with Checks() as checks:
            weight = self._weights(batch, samples, checks)
            masks = LayerMasks(batch, self.specs, samples, self.model, checks)
            rows = BatchRows(samples, weight, masks)
            found = self.capture.run(batch, lambda: self._adder(rows))
            masks.settle()
            checks.close()
        self._leave_out_misfits(batch, found)
        self._refuse()
        fit = [name for name in self.specs if name not in self.capture.unfit]
        parts = self._next.of(fit)
        squares = self._squares([part.squares() for part in parts])
        whole = []
        for part, here in zip(parts, squares, strict=True):
            whole.append((part, here + part.squares_before))
            if not whole[-1][1] <= torch.finfo(part.dtype).max:
                names = [name for name in self.specs if name in part.layers]
                self._blame(batch, rows, names, part.dtype)
        with self.result._adding():
            self._next.put(whole)
            self.result.num_samples += rows.count
        self.result._unfit = dict(self.capture.unfit)

    def _adder(self, rows: BatchRows) -> Callable[[LayerSpec, Tensor, Hashable], _Seen]:
        """Adds what layers are given in one run of the model to what becomes of the sums."""
        sums = self._next = NextSums(self.result._sums, self._spare)
        last: dict[Hashable, LastSample | None] = {}

        def take(spec: LayerSpec, x: Tensor, number: Hashable) -> _Seen:
            call = rows.call(spec, x)
            if isinstance(call, str):
                return call
            key = number, call.likeness
            sums.add(self._alike.get(spec.name, (spec.name,)), key, spec, call.rows)
            if spec.name in self._ordered:
                return None
            if key not in last:
                last[key] = call.last()
            return last[key]

        return take

    def _unlike(self, names: list[str]) -> dict[str, str]:
        """Layers of one weight whose inputs have no sum, with the reason."""
        if len({replace(self.specs[name], name="") for name in names}) == 1:
            return {}
        reason = "shares its weight with {}, which has another geometry, or a bias of its own"
        return {
            name: reason.format(", ".join(repr(other) for other in names if other != name))
            for name in names
        }

    def _refuse(self) -> None:
        """Raises the reason of a layer that was asked for, or had a covariance before."""
        for name, reason in self.capture.unfit.items():
            if name in self.specs and (
                self.specs[name].required or name in self.result._sums.by_layer
            ):
                raise ValueError(
                    f"layer {name!r} {reason} (leave the layer out with layers=[...]; "
                    "kronecker_factors finds inputs in the graph)"
                )

    def _weights(self, batch: Batch, samples: int, checks: Checks) -> Tensor | None:
        """[N] float64 weights of the samples on the model's device; None where all are one."""
        weight = given_weights(batch, samples, checks)
        if weight is None or bool((weight == 1).all()):
            return None
        return weight.to(self.device, torch.float64)

    def _leave_out_misfits(self, batch: Batch, found: Mapping[str, list[_Seen]]) -> None:
        """Notes layers of whose rows it cannot be told which ones count."""
        unfit = self.capture.unfit
        unsure = {}
        for name, calls in found.items():
            reason = next((call for call in calls if isinstance(call, str)), None)
            if reason is not None:
                unfit[name] = reason
                continue
            last = [call for call in calls if isinstance(call, LastSample)]
            if last:
                unsure[name] = last
        if unsure:
            unfit.update(out_of_order(self.capture, batch, unsure))
            # Of samples that are all alike, any order looks right: the next batch is looked at too.
            self._ordered.update(
                name for name, last in unsure.items() if all(bool(one.tells) for one in last)
            )
        for names in self._alike.values():
            bad = next((name for name in names if name in unfit), None)
            if bad is not None:
                for name in names:
                    unfit.setdefault(name, f"shares its weight with {bad!r}, which {unfit[bad]}")

    @staticmethod
    def _squares(parts: list[list[Tensor]]) -> list[float]:
        """The sum of each list of 0-dim tensors, which every device is asked for once."""
        places: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for index, part in enumerate(parts):
            for value in part:
                places.setdefault(value.device, []).append((index, value))
        sums = [0.0] * len(parts)
        for pairs in places.values():
            values = torch.stack([value.double() for _, value in pairs]).tolist()
            for (index, _), value in zip(pairs, values, strict=True):
                sums[index] += value
        return sums

    def _blame(self, batch: Batch, rows: BatchRows, names: list[str], dtype: torch.dtype) -> None:
        """Raises what is wrong with inputs whose squares cannot be added up.

        Args:
            batch: the model runs on it once more.
            rows: of the batch.
            names: layers with the same inputs.
            dtype: of their sums.
        """

        def finite(spec: LayerSpec, x: Tensor, number: Hashable) -> bool:
            call = rows.call(spec, x)
            return isinstance(call, str) or bool(torch.isfinite(call.rows().x).all())

        found = self.capture.again(batch, lambda: finite)
        for name in names:
            if not all(found.get(name, ())):
                raise ValueError(
                    f"data: inputs of layer {name!r} contain NaN or Inf in batch {batch.index}; "
                    "nothing of this batch was accumulated"
                )
        raise ValueError(overflow(names[0], dtype, f"in batch {batch.index}"))
