"""Sums over ranks, a bucket of packed tensors at a time, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hesskern.parallel.packing import Segment, buckets
from hesskern.parallel.wire import Wire

__all__ = ["BUCKET", "BucketSums"]

BUCKET = 25 * 2**20
"""Bytes that are summed, or sent, at a time."""


class BucketSums:
    """Sums of one dtype on one device.

    Every rank owns a share of a bucket: it is sent that share by all ranks, adds them up in their
    order, and sends the sum to all. These are the bytes of an all-reduce, whose sums may depend on
    which rank is faster. Memory is taken here, so that nothing can be lacking half-way.

    Args:
        group: a process group.
        pieces: that are to be summed, in the same order on every rank.
        dtype, device: of all of them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        pieces: Sequence[Segment],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._size = group.size()
        self._wire = Wire(group, device)
        self._buckets = list(buckets(iter(pieces), max(1, BUCKET // dtype.itemsize)))
        most = max((_count(bucket) for bucket in self._buckets), default=0)
        share = -(-most // self._size)
        self._packed = torch.zeros(share * self._size, dtype=dtype, device=device)
        self._given = self._wire.buffer(share * self._size, dtype)
        self._got = self._wire.buffer(share * self._size, dtype)
        # Rounded once, at the end.
        wide = torch.float64 if dtype == torch.float32 else dtype
        self._total = torch.empty(share, dtype=wide, device=self._wire.device)

    def run(self) -> None:
        """Sends, sums and writes back; every rank at the same time."""
        for bucket in self._buckets:
            self._sum(bucket)

    def _sum(self, bucket: list[Segment]) -> None:
        count = _count(bucket)
        share = -(-count // self._size)
        packed, given, got = (
            buffer[: share * self._size] for buffer in (self._packed, self._given, self._got)
        )
        parts = packed[:count].split([piece.count for piece in bucket])
        for piece, part in zip(bucket, parts, strict=True):
            piece.pack(part)
        given.copy_(packed)
        self._wire.exchange(got, given)
        first, *others = got.split(share) if share else [got]
        total = self._total[:share].copy_(first)
        for other in others:
            total += other
        # What each rank has sent is no longer needed.
        own = got[:share].copy_(total)
        self._wire.gather(given, own)
        packed.copy_(given)
        for piece, part in zip(bucket, parts, strict=True):
            piece.unpack(part)


def _count(bucket: Sequence[Segment]) -> int:
    return sum(piece.count for piece in bucket)
