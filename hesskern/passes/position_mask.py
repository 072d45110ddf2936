"""A mask [N, T] over the positions of a batch, and what it leaves of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern.devices import on_host, sent

__all__ = ["PositionMask"]


class PositionMask:
    """A mask [N, T], True where a position is data.

    Where the host knows it, the rows of masked positions are left out, and cost nothing. Where only
    a device does, how many there are cannot be told without waiting for it: they become zeros.

    Args:
        keep: [N, T] bool where it came from.
        device: of the model.

    Attributes:
        host: the mask, if it came from there.
        counts: [N] float64, positions of every sample that are data, where the mask came from.
        length: T.
        width: most positions of a sample, T where only a device knows.
    """

    def __init__(self, keep: Tensor, device: torch.device) -> None:
        self.host = keep if on_host(keep) else None
        self._keep = {device: sent(keep, device)}
        self._drop: dict[torch.device, Tensor] = {}
        self._rows: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self._compact: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        self.counts = keep.sum(1, dtype=torch.float64)
        self.length = self.width = keep.shape[1]
        if self.host is not None and self.host.numel():
            self.width = int(self.counts.max())

    def on(self, device: torch.device) -> Tensor:
        """[N, T] bool on a device."""
        if device not in self._keep:
            first = next(iter(self._keep.values()))
            self._keep[device] = sent(first, device)
        return self._keep[device]

    def _dropped(self, values: Tensor, samples: slice) -> Tensor:
        """[n, 1, T, 1] bool, True where values [n, r, T, q] of some samples are no data."""
        if values.device not in self._drop:
            self._drop[values.device] = ~self.on(values.device)
        return self._drop[values.device][samples, None, :, None]

    def _index(self, samples: slice, rows: int, device: torch.device) -> Tensor:
        """Which of the rows [n, r, T], flattened, are data."""
        assert self.host is not None
        begin, end, _ = samples.indices(len(self.host))
        key = begin, end, rows, device
        if key not in self._rows:
            keep = self.host[samples].unsqueeze(1).expand(-1, rows, -1)
            found = keep.flatten().nonzero()[:, 0]
            self._rows[key] = sent(found, device)
        return self._rows[key]

    def select(self, values: Tensor, samples: slice = slice(None)) -> Tensor:
        """[R, q] of values [n, r, T, q]: the rows that are data, or all with zeros for the others.

        Args:
            values: of ``r`` root rows at the positions of some samples.
            samples: which ones.
        """
        n, r, t, q = values.shape
        if self.host is None:
            return self.zeroed(values, samples).reshape(-1, q)
        flat = values.reshape(n * r * t, q)
        return flat.index_select(0, self._index(samples, r, values.device))

    def zeroed(self, values: Tensor, samples: slice = slice(None)) -> Tensor:
        """Values [n, r, T, q] with zeros at the positions that are no data."""
        return values.masked_fill(self._dropped(values, samples), 0)

    def sum_samples(self, rows: Tensor, out: Tensor) -> None:
        """Writes rows [R, q] of :meth:`select`, of one root row, summed over samples to [T, q].

        Where the rows lie on the host: on a device the order of these sums is not fixed.
        """
        out.zero_()
        if self.host is None:
            out += rows.reshape(len(self.counts), *out.shape).sum(0)
            return
        position = self._index(slice(None), 1, rows.device) % len(out)
        out.scatter_add_(0, position.unsqueeze(1).expand_as(rows), rows.to(out.dtype))

    def compact(self, values: Tensor, axis: int, samples: slice = slice(None)) -> Tensor:
        """Values with an axis [T] of fewer positions: each sample's data first, then zeros.

        Args:
            values: [n, ..., T, ...] of some samples.
            axis: where T stands.
            samples: which ones.

        Returns:
            [n, ..., w, ...] with w the most positions of a sample, or T where only a device knows.
        """
        device = values.device

        def shaped(table: Tensor) -> Tensor:
            shape = [1] * values.dim()
            shape[0], shape[axis] = table.shape
            return table.reshape(shape)

        if self.host is None:
            return values.masked_fill(~shaped(self.on(device)[samples]), 0)
        if device not in self._compact:
            # False sorts behind True; a stable sort keeps the order of the positions.
            keep, order = self.host.sort(stable=True, dim=1, descending=True)
            keep, order = keep[:, : self.width], order[:, : self.width]
            absent = None if bool(keep.all()) else ~keep.contiguous()
            self._compact[device] = (
                sent(order.contiguous(), device),
                None if absent is None else sent(absent, device),
            )
        order, absent = self._compact[device]
        index = shaped(order[samples])
        size = [*values.shape]
        size[axis] = self.width
        found = values.gather(axis, index.expand(size))
        return found if absent is None else found.masked_fill_(shaped(absent[samples]), 0)
