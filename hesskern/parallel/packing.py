"""Tensors and triangles of matrices, end to end in buckets of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Segment", "buckets", "layout", "segments"]

# Rows of a triangle that are copied together; what lies left of their diagonal is taken apart.
_ROWS = 64


@dataclass(frozen=True)
class Segment:
    """A piece of a tensor that is copied in one go.

    Attributes:
        source: view [n] or [rows, columns], or [d, d] of which the upper triangle is meant.
        triangle: whether that is so.
    """

    source: Tensor
    triangle: bool = False

    @property
    def count(self) -> int:
        d = self.source.shape[-1]
        return d * (d + 1) // 2 if self.triangle else self.source.numel()

    def pack(self, out: Tensor) -> None:
        """Copies the entries to ``out`` [count]."""
        if self.triangle:
            rows, columns = _upper(self.source.shape[-1], self.source.device)
            out.copy_(self.source[rows, columns])
        else:
            out.view(self.source.shape).copy_(self.source)

    def unpack(self, values: Tensor) -> None:
        """Copies ``values`` [count] back to where they came from."""
        if self.triangle:
            self.source[_upper(self.source.shape[-1], self.source.device)] = values.to(
                self.source.device
            )
        else:
            self.source.copy_(values.view(self.source.shape))


@lru_cache(maxsize=256)
def _upper(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(d, d, device=device)
    return rows, columns


def segments(tensor: Tensor, upper: bool, most: int) -> Iterator[Segment]:
    """A tensor in pieces of at most ``most`` entries, where ``most`` is not below a row's.

    Args:
        tensor: of any shape; [..., d, d] if ``upper``. Its entries, not a copy's, are written.
        upper: whether the upper triangles alone are meant.
        most: entries.
    """
    if not upper:
        if not tensor.is_contiguous():
            raise ValueError("tensors must be contiguous")
        flat = tensor.view(-1)
        for begin in range(0, flat.numel(), most):
            yield Segment(flat[begin : begin + most])
        return
    d = tensor.shape[-1]
    for matrix in tensor.unsqueeze(0).flatten(0, -3).unbind():
        for begin in range(0, d, _ROWS):
            end = min(begin + _ROWS, d)
            yield Segment(matrix[begin:end, begin:end], triangle=True)
            step = max(1, most // max(1, d - end))
            for row in range(begin, end, step) if end < d else ():
                yield Segment(matrix[row : min(row + step, end), end:])


def buckets(pieces: Iterator[Segment], most: int) -> Iterator[list[Segment]]:
    """Lists of pieces that follow each other, of at most ``most`` entries together."""
    held: list[Segment] = []
    count = 0
    for piece in pieces:
        if held and count + piece.count > most:
            yield held
            held, count = [], 0
        held.append(piece)
        count += piece.count
    if held:
        yield held


def layout(tensors: Sequence[Tensor], upper: Sequence[bool]) -> list[tuple[str, list[int], bool]]:
    """What all ranks must have alike, as JSON holds it."""
    return [
        (str(tensor.dtype), list(tensor.shape), half)
        for tensor, half in zip(tensors, upper, strict=True)
    ]
