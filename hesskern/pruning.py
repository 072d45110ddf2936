"""Leaving out samples and root rows under a bound that holds.

H = 1/N sum_n R_n^T R_n is a sum of positive semi-definite parts, so what is left out changes H by
at most its trace in the spectral norm: 0 <= H - H_t and ‖H - H_t‖_2 <= tr(H - H_t). Stored rows are
first rotated to their sample's principal axes, where few of them carry almost everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern.samples import SampleRows

__all__ = ["kept_samples", "prune"]


def kept_samples(shares: list[Tensor], budget: float) -> tuple[list[Tensor], float]:
    """Which samples to keep so that those left out carry at most ``budget`` of the trace.

    Args:
        shares: per piece [N], parts of the trace.
        budget: relative, in [0, 1).

    Returns:
        per piece [N] bool, and the sum of the shares left out.
    """
    if not shares:
        return [], 0.0
    flat = torch.cat([s.flatten() for s in shares]).double()
    order = flat.argsort()
    sums = flat[order].cumsum(0)
    count = int((sums <= budget * float(flat.sum())).sum())
    keep = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    keep[order[:count]] = False
    dropped = float(sums[count - 1]) if count else 0.0
    pieces = keep.split([s.numel() for s in shares])
    return [piece.reshape(s.shape) for piece, s in zip(pieces, shares, strict=True)], dropped


def prune(
    chunks: list[SampleRows], shares: list[Tensor], tolerance: float
) -> tuple[list[SampleRows], float]:
    """Sample rows with what the tolerance allows left out.

    Args:
        chunks: pieces; emptied as they are worked through.
        shares: per piece [N], each sample's part of the trace.
        tolerance: relative to the trace.

    Returns:
        the pieces kept, and the trace (times the number of samples) of what was left out.
    """
    total = sum(float(s.sum()) for s in shares)
    # Where a product's time goes into the inputs, single rows of a sample save nothing. Where rows
    # are stored whole, half is for whole samples, cheap to find, and the rest for single rows.
    stored = all(chunk.stored for chunk in chunks)
    keep, dropped = kept_samples(shares, tolerance / 2 if stored else tolerance)
    chunks.reverse()
    kept = [chunks.pop().select(mask) for mask in keep]
    if not stored or total <= 0:
        return kept, dropped
    row_shares: list[Tensor] = []
    for i, chunk in enumerate(kept):
        kept[i] = chunk.rotated()
        row_shares.append(kept[i].row_shares())
    remaining = sum(float(s.sum()) for s in row_shares)
    allowance = (tolerance * total - dropped) / remaining if remaining > 0 else 0.0
    rows, more = kept_samples(row_shares, max(0.0, allowance))
    pieces: dict[int, list[SampleRows]] = {}
    for chunk, mask in zip(kept, rows, strict=True):
        for count, piece in _by_rows(chunk, mask):
            pieces.setdefault(count, []).append(piece)
    return [piece for count in sorted(pieces) for piece in pieces[count]], dropped + more


def _by_rows(chunk: SampleRows, mask: Tensor) -> list[tuple[int, SampleRows]]:
    """The chunk split by how many rows of a sample stay; mask [N, r]."""
    result = []
    counts = mask.sum(1)
    for count in range(1, mask.shape[1] + 1):
        chosen = counts == count
        if bool(chosen.any()):
            rows = chunk.s[chosen][mask[chosen]].reshape(-1, count, *chunk.s.shape[2:])
            result.append((count, SampleRows(chunk.x[chosen], rows)))
    return result
