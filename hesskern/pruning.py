"""Leaving out samples and root rows under a bound that holds.

H = 1/N sum_n R_n^T R_n is a sum of positive semi-definite parts, so what is left out changes H by at
most its trace in the spectral norm: 0 <= H - H_t and ‖H - H_t‖_2 <= tr(H - H_t). Each sample's rows
are first rotated to their own principal axes, where few of them carry almost everything.
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
    # Half for whole samples, cheap to find; the rest for single rows of the samples kept.
    keep, dropped = kept_samples(shares, tolerance / 2)
    chunks.reverse()
    kept: list[SampleRows] = []
    row_shares: list[Tensor] = []
    for mask in keep:
        chunk = chunks.pop().select(mask)
        if chunk.x.dim() == 3 or chunk.s.shape[1] < 2:
            kept.append(chunk)
            row_shares.append(chunk.shares().unsqueeze(1))
            continue
        gram = torch.matmul(chunk.s, chunk.s.transpose(1, 2))
        # eigh in float64: the bound must not rest on rounding.
        values, axes = torch.linalg.eigh(gram.double())
        rotated = torch.matmul(axes.flip(2).transpose(1, 2).to(chunk.s.dtype), chunk.s)
        kept.append(SampleRows(chunk.x, rotated))
        x = chunk.x.square().sum(1, dtype=torch.float64)
        row_shares.append(rotated.square().sum(2, dtype=torch.float64) * x.unsqueeze(1))
    if total <= 0:
        return kept, dropped
    remaining = sum(float(s.sum()) for s in row_shares)
    allowance = (tolerance * total - dropped) / remaining if remaining > 0 else 0.0
    rows, more = kept_samples(row_shares, max(0.0, allowance))
    pieces: dict[int, list[SampleRows]] = {}
    for chunk, mask in zip(kept, rows, strict=True):
        for count, piece in _by_rows(chunk, mask):
            pieces.setdefault(count, []).append(piece)
    return [piece for count in sorted(pieces) for piece in pieces[count]], dropped + more


def _by_rows(chunk: SampleRows, mask: Tensor) -> list[tuple[int, SampleRows]]:
    """The chunk split by how many rows of a sample stay; mask [N, r] (or [N, 1] for all or none)."""
    if mask.shape[1] != chunk.s.shape[1]:
        keep = mask[:, 0]
        return [(chunk.s.shape[1], chunk.select(keep))] if bool(keep.any()) else []
    result = []
    counts = mask.sum(1)
    for count in range(1, mask.shape[1] + 1):
        chosen = counts == count
        if bool(chosen.any()):
            rows = chunk.s[chosen][mask[chosen]].reshape(-1, count, *chunk.s.shape[2:])
            result.append((count, SampleRows(chunk.x[chosen], rows)))
    return result
