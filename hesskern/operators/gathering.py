"""The samples of every layer, gathered in one pass as far as a budget goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.operators.samples import SampleRows, added_bytes, layer_rows
from hesskern.operators.spilled import SpilledSamples, keep_few_waiting
from hesskern.passes.data_pass import DataPass, once_only
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec
from hesskern.passes.roots import accumulator_dtype
from hesskern.spill.rooms import Spill

__all__ = ["GatheredLayer", "Gathering"]


@dataclass
class GatheredLayer:
    """What the pass has gathered for one layer.

    Attributes:
        spec: the layer's geometry.
        chunks: sample rows kept so far, or None once they exceeded the memory budget.
        held: bytes in ``chunks``.
        shares: per piece, every sample's share of the trace; only with pruning.
        batches: per piece, the batch that it belongs to; only with pruning.
        dtype: of the sample rows; None before the first.
        lost: 0-dim bool, whether gradients at masked positions were not zero; None without masks.
        spilled: where pieces go instead of ``chunks``; None: they stay, or are dropped.
    """

    spec: LayerSpec
    chunks: list[SampleRows] | None = field(default_factory=list)
    held: int = 0
    shares: list[Tensor] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    dtype: torch.dtype | None = None
    lost: Tensor | None = None
    spilled: SpilledSamples | None = None

    def shares_by_batch(self) -> list[Tensor]:
        """Shares of the samples of every batch: a batch comes in pieces over root rows."""
        totals: dict[int, Tensor] = {}
        for batch, shares in zip(self.batches, self.shares, strict=True):
            totals[batch] = totals[batch] + shares if batch in totals else shares
        return [totals[batch] for batch in sorted(totals)]

    def keep(self, chunk: SampleRows, batch: int, pruned: bool) -> None:
        """Adds a piece of a batch."""
        if pruned:
            self.shares.append(chunk.shares())
            self.batches.append(batch)
        if self.spilled is not None:
            self.spilled.add(chunk)
        elif self.chunks is not None:
            # What pruning leaves of two pieces shares nothing.
            before = self.chunks[-1] if self.chunks and not pruned else None
            self.chunks.append(chunk)
            self.held += added_bytes(chunk, before)

    def spill(self, spilled: SpilledSamples) -> None:
        """Moves the samples, and from now on those to come."""
        self.spilled, pieces, self.held = spilled, (self.chunks or [])[::-1], 0
        self.chunks = None
        while pieces:
            spilled.add(pieces.pop())

    def drop(self) -> None:
        """Lets go of the samples for good."""
        self.chunks, self.held = None, 0


class Gathering:
    """One pass that keeps samples.

    Args:
        run: the pass, not yet begun; says which layers.
        budget: bytes of samples that may be kept for all layers together.
        tolerance: of pruning, for which shares of the trace are kept as well; 0 for none.
        checkpoint: of the call, kept on the way; None for none.
        spill: where the samples of layers above the budget go; None: they are dropped.
    """

    def __init__(
        self,
        run: DataPass,
        budget: int,
        tolerance: float,
        checkpoint: Checkpoint | None,
        spill: Spill | None = None,
    ) -> None:
        self._spill = spill
        self._run, self._budget, self._pruned = run, budget, tolerance > 0
        self._layers = {name: GatheredLayer(spec) for name, spec in run.specs.items()}
        self._checkpoint = checkpoint
        # Pieces and shares of each layer that are in files already.
        self._written = dict.fromkeys(self._layers, (0, 0))

    def layers(self) -> dict[str, GatheredLayer]:
        """Makes the pass: the samples of every layer, as far as the budget goes.

        Raises:
            ValueError: bad data, a checkpoint of other data, or the budget is too small for data
                that can be iterated only once.
            OSError: the checkpoint cannot be written.
        """
        run, gathered = self._run, self._layers
        if self._checkpoint is not None:
            self._go_on(self._checkpoint)
        with run:
            for batch, roots in run:
                wanted = {
                    n: layer.spec
                    for n, layer in gathered.items()
                    if layer.chunks is not None or layer.spilled is not None or self._pruned
                }
                for name in roots.uses:
                    gathered[name].dtype = accumulator_dtype(roots.uses[name][0].x.dtype)
                for name, chunk in layer_rows(wanted, roots, self._budget):
                    gathered[name].keep(chunk, batch.index, self._pruned)
                    self._evict(run.data)
                for name, lost in roots.masked_gradients.items():
                    before = gathered[name].lost
                    gathered[name].lost = lost if before is None else before | lost
        for name, layer in gathered.items():
            if layer.spilled is not None:
                layer.spilled.finish()
            if layer.lost is not None and bool(layer.lost):
                run.capture.inexact.setdefault(
                    name, "has masked positions on which the outputs that count depend"
                )
        return gathered

    def _evict(self, data: Iterable[Any]) -> None:
        """Spills or drops the largest layers' samples until the rest fits."""
        while sum(layer.held for layer in self._layers.values()) > self._budget:
            name, largest = max(self._layers.items(), key=lambda item: item[1].held)
            if self._spill is not None:
                device = model_device(self._run.model)
                largest.spill(SpilledSamples(self._spill, device))
                continue
            if isinstance(data, Iterator):
                raise once_only(self._budget, f"layer {name!r}")
            largest.drop()
        if self._spill is not None:
            spilled = [layer.spilled for layer in self._layers.values() if layer.spilled]
            keep_few_waiting(spilled, self._budget)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Begins where the checkpoint is, and has the pass keep it."""
        begin = checkpoint.begin if checkpoint.course is None else checkpoint.restart
        self._run.course = begin("Layer Hessians", self._run.data)
        self._run.behind = self._keep
        state = checkpoint.state
        if state is None:
            return
        device = model_device(self._run.model)
        for part in checkpoint.parts:
            for name, found in part.items():
                self._take(self._layers[name], found, device)
        for name, layer in self._layers.items():
            found = state["layers"][name]
            layer.dtype = None if found["dtype"] is None else getattr(torch, found["dtype"])
            layer.lost = None if found["lost"] is None else found["lost"].to(device)
            if found["dropped"]:
                layer.drop()
            self._written[name] = len(layer.chunks or ()), len(layer.shares)
        self._run.restore(state["run"])

    def _take(self, layer: GatheredLayer, found: Mapping[str, Any], device: torch.device) -> None:
        """Adds what a file has of a layer."""
        inputs: dict[int, Tensor] = {}
        assert layer.chunks is not None
        for x, s, stored in found["chunks"]:
            # Pieces of one batch have their inputs in common.
            inputs.setdefault(id(x), x.to(device))
            before = layer.chunks[-1] if layer.chunks and not self._pruned else None
            layer.chunks.append(SampleRows(inputs[id(x)], s.to(device), stored))
            layer.held += added_bytes(layer.chunks[-1], before)
        layer.shares += [shares.to(device) for shares in found["shares"]]
        layer.batches += found["batches"]

    def _keep(self) -> None:
        """Behind a batch: writes what is new, if it is time."""
        checkpoint = self._checkpoint
        if checkpoint is None or not checkpoint.due:
            return
        self._run.settle()
        part = {name: self._new(name) for name in self._layers}
        state = {
            "layers": {
                name: {
                    "dropped": layer.chunks is None,
                    "dtype": None if layer.dtype is None else str(layer.dtype).split(".")[1],
                    "lost": layer.lost,
                }
                for name, layer in self._layers.items()
            },
            "run": self._run.state(),
            "budget": self._budget,
        }
        checkpoint.keep(state, part)
        for name, layer in self._layers.items():
            self._written[name] = len(layer.chunks or ()), len(layer.shares)

    def _new(self, name: str) -> dict[str, Any]:
        """What no file has of a layer yet."""
        layer, (chunks, shares) = self._layers[name], self._written[name]
        pieces = [] if layer.chunks is None else layer.chunks[chunks:]
        return {
            "chunks": [[chunk.x, chunk.s, chunk.stored] for chunk in pieces],
            "shares": layer.shares[shares:],
            "batches": layer.batches[shares:],
        }
