"""Leaving out samples and root rows under a bound that holds.

H = 1/N sum_n R_n^T R_n is a sum of positive semi-definite parts, so what is left out changes H by
at most its trace in the spectral norm: 0 <= H - H_t and ‖H - H_t‖_2 <= tr(H - H_t). Stored rows are
first rotated to their sample's principal axes, where few of them carry almost everything.

For one input vector per sample the bound is tighter by what the gradients spread over directions:
x x^T <= ‖x‖^2 I, so sum_n M_n (x) x_n x_n^T <= (sum_n ‖x_n‖^2 M_n) (x) I, and the top eigenvalue
of that [m, m] sum bounds the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesskern import ops
from hesskern.samples import SampleRows

__all__ = ["Pruned", "kept_samples", "norm_bound", "prune"]

# How much more of the trace is left out from one try to the next, and in how many tries at most.
_GROWTH = 1.25
_TRIES = 20
# The tighter bound needs an eigenvalue of order m.
_LARGEST_ORDER = 2048
# Rows copied at a time: they stay in the cache.
_ROWS = 16_384
# For rounding in the sum that the tighter bound comes from.
_MARGIN = 1e-4


@dataclass(frozen=True)
class Pruned:
    """What was kept.

    Attributes:
        chunks: pieces of sample rows.
        norm: bound on ‖N (H - H_t)‖_2.
        trace: tr(N (H - H_t)), with N the number of samples.
    """

    chunks: list[SampleRows]
    norm: float
    trace: float


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
    order, sums, total = _ascending(shares)
    count = int((sums <= budget * total).sum())
    dropped = float(sums[count - 1]) if count else 0.0
    return _masks(order, count, shares), dropped


def _ascending(shares: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Order of all shares, smallest first; their sums in this order; the sum of all."""
    flat = torch.cat([s.flatten() for s in shares]).double()
    order = flat.argsort()
    return order, flat[order].cumsum(0), float(flat.sum())


def _masks(order: Tensor, count: int, shares: list[Tensor]) -> list[Tensor]:
    """Per piece, which entries stay when the first ``count`` go."""
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    keep[order[:count]] = False
    pieces = keep.split([s.numel() for s in shares])
    return [piece.reshape(s.shape) for piece, s in zip(pieces, shares, strict=True)]


def prune(chunks: list[SampleRows], shares: list[Tensor], tolerance: float) -> Pruned:
    """Sample rows with what the tolerance allows left out.

    Args:
        chunks: pieces; emptied as they are worked through.
        shares: per piece [N], each sample's part of the trace.
        tolerance: of the norm of what is left out, relative to the trace.
    """
    total = sum(float(s.sum()) for s in shares)
    # Where a product's time goes into the inputs, single rows of a sample save nothing. Where rows
    # are stored whole, half is for whole samples, cheap to find, and the rest for single rows.
    stored = all(chunk.stored for chunk in chunks)
    plain = not any(chunk.stored for chunk in chunks)
    if plain and total > 0 and all(chunk.x.dim() == 2 for chunk in chunks):
        return _prune_spread(chunks, shares, tolerance)
    keep, dropped = kept_samples(shares, tolerance / 2 if stored else tolerance)
    chunks.reverse()
    kept = [chunks.pop().select(mask) for mask in keep]
    if not stored or total <= 0:
        return Pruned(kept, dropped, dropped)
    row_shares: list[Tensor] = []
    for i, chunk in enumerate(kept):
        kept[i] = chunk.rotated()
        row_shares.append(kept[i].row_shares())
    remaining = sum(float(s.sum()) for s in row_shares)
    allowance = (tolerance * total - dropped) / remaining if remaining > 0 else 0.0
    rows, more = kept_samples(row_shares, max(0.0, allowance))
    pieces: dict[int, list[SampleRows]] = {}
    kept.reverse()
    for mask in rows:
        for count, piece in _by_rows(kept.pop(), mask):
            pieces.setdefault(count, []).append(piece)
    left_out = dropped + more
    return Pruned(
        [piece for count in sorted(pieces) for piece in pieces[count]], left_out, left_out
    )


def _prune_spread(chunks: list[SampleRows], shares: list[Tensor], tolerance: float) -> Pruned:
    """Whole samples, as many as the tighter of both bounds allows; empties ``chunks``."""
    order, sums, total = _ascending(shares)
    count = int((sums <= tolerance * total).sum())
    norm = float(sums[count - 1]) if count else 0.0
    tried, budget = 0, tolerance * total
    m = chunks[0].s.shape[2]
    gram = torch.zeros(m, m, dtype=torch.float64, device=order.device)
    lengths = [chunk.x.norm(dim=1) for chunk in chunks]
    for _ in range(_TRIES if m <= _LARGEST_ORDER else 0):
        candidate = max(count, int((sums <= budget).sum()))
        before, after = _masks(order, tried, shares), _masks(order, candidate, shares)
        for chunk, length, was, stays in zip(chunks, lengths, before, after, strict=True):
            gram += _weighted_gram(chunk.s, length, was & ~stays)
        tried = candidate
        bound = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + _MARGIN)
        if bound > tolerance * total:
            break
        count, norm = candidate, min(bound, float(sums[candidate - 1]) if candidate else 0.0)
        budget *= _GROWTH
    keep = _masks(order, count, shares)
    chunks.reverse()
    kept = [chunks.pop().select(mask) for mask in keep]
    return Pruned(kept, norm, float(sums[count - 1]) if count else 0.0)


def norm_bound(chunks: list[SampleRows]) -> float:
    """Bound on ‖sum_n R_n^T R_n‖_2, the tighter of both."""
    trace = sum(float(chunk.shares().sum()) for chunk in chunks)
    m = chunks[0].s.shape[2] if chunks else 0
    # Rows that are stored whole and gradients of single inputs do not add up to one matrix.
    alike = all(c.x.dim() == 2 and c.s.shape[2] == m for c in chunks)
    if m == 0 or m > _LARGEST_ORDER or not alike or len({c.stored for c in chunks}) > 1:
        return trace
    gram = torch.zeros(m, m, dtype=torch.float64, device=chunks[0].s.device)
    for chunk in chunks:
        everything = torch.ones(len(chunk.x), dtype=torch.bool, device=chunk.x.device)
        gram += _weighted_gram(chunk.s, chunk.x.norm(dim=1), everything)
    return min(trace, float(torch.linalg.eigvalsh(gram)[-1]) * (1 + _MARGIN))


def _weighted_gram(s: Tensor, lengths: Tensor, chosen: Tensor) -> Tensor:
    """[m, m] float64: sum of length² s_n^T s_n over the chosen samples; s [N, r, m], both [N]."""
    r, m = s.shape[1:]
    total = torch.zeros(m, m, dtype=s.dtype, device=s.device)
    for samples in chosen.nonzero()[:, 0].split(max(1, _ROWS // max(1, r))):
        rows = s[samples].mul_(lengths[samples][:, None, None])
        ops.input_covariance_(total, rows.flatten(0, 1))
    return ops.mirror_(total).double()


def _by_rows(chunk: SampleRows, mask: Tensor) -> list[tuple[int, SampleRows]]:
    """The chunk split by how many rows of a sample stay; mask [N, r]."""
    result = []
    counts = mask.sum(1)
    for count in range(1, mask.shape[1] + 1):
        chosen = counts == count
        if bool(chosen.any()):
            rows = chunk.s[chosen][mask[chosen]].reshape(-1, count, *chunk.s.shape[2:])
            result.append((count, replace(chunk, x=chunk.x[chosen], s=rows)))
    return result
