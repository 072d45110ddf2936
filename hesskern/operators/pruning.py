"""Leaving out samples and root rows under a bound that holds.

H = 1/N sum_n R_n^T R_n is a sum of positive semi-definite parts, so what is left out changes H by
at most its trace in the spectral norm: 0 <= H - H_t and ‖H - H_t‖_2 <= tr(H - H_t). Stored rows are
first rotated to their sample's principal axes, where few of them carry almost everything.

For one input vector per sample the bound is tighter by what the gradients spread over directions:
x x^T <= ‖x‖^2 I, so sum_n M_n (x) x_n x_n^T <= (sum_n ‖x_n‖^2 M_n) (x) I, and the top eigenvalue
of that [m, m] sum G bounds the norm. It is bounded without an eigenvalue: λ_1 <= tr(G^q)^(1/q), for
q = 256 at most m^(1/256) times too much.

Where the samples are those of several ranks, all of them count together: every rank learns of the
shares of all samples, and leaves out those of its own that one process over all would.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.samples import SampleRows
from hesskern.parallel.ranks import Ranks

__all__ = ["Pruned", "kept_samples", "norm_bound_of", "prune"]

# How many budgets are told apart between the one that the trace allows and m times it, which
# nothing fits, and how many are tried at most.
_BUDGETS = 128
_TRIES = 8
# The tighter bound takes products of matrices of order m.
_LARGEST_ORDER = 2048
# The matrix is squared as often as this: the bound is then at most m^(1/256) times the norm.
_SQUARINGS = 7
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


def kept_samples(
    shares: list[Tensor], budget: float, ranks: Ranks | None = None
) -> tuple[list[Tensor], float]:
    """Which samples to keep so that those left out carry at most ``budget`` of the trace.

    Args:
        shares: per piece [N], parts of the trace.
        budget: relative, in [0, 1).
        ranks: whose samples count together; all of them call this. None: there are no others.

    Returns:
        per piece [N] bool, and the sum of the shares left out, on all ranks.
    """
    everybody = _with_others(shares, ranks)
    if not everybody:
        return [], 0.0
    order, sums, total = _ascending(everybody)
    count = int((sums <= budget * total).sum())
    dropped = float(sums[count - 1]) if count else 0.0
    masks = _masks(order, count, everybody)
    return (masks if ranks is None else _own(masks)), dropped


def _with_others(shares: list[Tensor], ranks: Ranks | None) -> list[Tensor]:
    """The pieces between one of all ranks before and one of all behind, on the CPU.

    Put together they are the same on every rank, down to the order of the samples.
    """
    if ranks is None:
        return shares
    flat = [share.flatten().double().cpu() for share in shares]
    found = ranks.gather_tensors(torch.cat(flat) if flat else torch.empty(0).double())
    before, behind = found[: ranks.rank], found[ranks.rank + 1 :]
    nothing = torch.empty(0, dtype=torch.float64)
    own = [share.reshape(s.shape) for share, s in zip(flat, shares, strict=True)]
    return [torch.cat([nothing, *before]), *own, torch.cat([nothing, *behind])]


def _own(pieces: list[Any]) -> list[Any]:
    """What :func:`_with_others` put between those of the other ranks."""
    return pieces[1:-1]


def _ascending(shares: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Order of all shares, smallest first; their sums in this order; the sum of all."""
    flat = torch.cat([s.flatten() for s in shares]).double()
    # Of equal shares the first goes first, so that all ranks decide alike.
    order = flat.argsort(stable=True)
    return order, flat[order].cumsum(0), float(flat.sum())


def _masks(order: Tensor, count: int, shares: list[Tensor]) -> list[Tensor]:
    """Per piece, which entries stay when the first ``count`` go."""
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    keep[order[:count]] = False
    pieces = keep.split([s.numel() for s in shares])
    return [piece.reshape(s.shape) for piece, s in zip(pieces, shares, strict=True)]


def prune(
    chunks: list[SampleRows],
    shares: list[Tensor],
    tolerance: float,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
) -> Pruned:
    """Sample rows with what the tolerance allows left out.

    Args:
        chunks: pieces; emptied as they are worked through.
        shares: per piece [N], each sample's part of the trace.
        tolerance: of the norm of what is left out, relative to the trace.
        ranks: whose samples count together; all of them call this. None: there are no others.
        device: of the samples, where this rank may have none.
    """
    total = float(torch.stack([s.sum() for s in shares]).sum()) if shares else 0.0
    # Where a product's time goes into the inputs, single rows of a sample save nothing. Where rows
    # are stored whole, half is for whole samples, cheap to find, and the rest for single rows.
    stored = all(chunk.stored for chunk in chunks)
    single = not any(chunk.stored or chunk.x.dim() > 2 for chunk in chunks)
    order = chunks[0].s.shape[2] if chunks else 0
    if ranks is not None:
        found = ranks.gather("shares of the trace", [total, stored, single, order])
        total = math.fsum(each[0] for each in found)
        stored, single = (all(each[i] for each in found) for i in (1, 2))
        order = max(each[3] for each in found)
    if single and total > 0:
        gram = torch.zeros(order, order, dtype=torch.float64, device=device)
        if chunks:
            gram = gram.to(chunks[0].s.device)
        return _prune_spread(chunks, shares, tolerance, gram, ranks)
    keep, dropped = kept_samples(shares, tolerance / 2 if stored else tolerance, ranks)
    chunks.reverse()
    kept = [chunks.pop().select(mask) for mask in keep]
    if not stored or total <= 0:
        return Pruned(kept, dropped, dropped)
    row_shares: list[Tensor] = []
    for i, chunk in enumerate(kept):
        kept[i] = chunk.rotated()
        row_shares.append(kept[i].row_shares())
    remaining = sum(float(s.sum()) for s in row_shares)
    if ranks is not None:
        (remaining,) = ranks.totals("the remaining trace", remaining)
    allowance = (tolerance * total - dropped) / remaining if remaining > 0 else 0.0
    rows, more = kept_samples(row_shares, max(0.0, allowance), ranks)
    pieces: dict[int, list[SampleRows]] = {}
    kept.reverse()
    for mask in rows:
        for count, piece in _by_rows(kept.pop(), mask):
            pieces.setdefault(count, []).append(piece)
    left_out = dropped + more
    return Pruned(
        [piece for count in sorted(pieces) for piece in pieces[count]], left_out, left_out
    )


@dataclass(frozen=True)
class _Candidates:
    """Sets of samples that might go, each within the next: those with the smallest shares.

    Attributes:
        order: per piece, its samples [N], those with the smallest shares first.
        counts: per set and piece, how many samples of the piece go.
        traces: per set, the sum of the shares that go.
    """

    order: list[Tensor]
    counts: list[list[int]]
    traces: list[float]

    @classmethod
    def within(
        cls, shares: list[Tensor], first: float, last: float, ranks: Ranks | None = None
    ) -> _Candidates:
        """Sets within ``_BUDGETS`` budgets between ``first`` and ``last``, parts of the trace.

        One look at the device for all of them.
        """
        shares = _with_others(shares, ranks)
        order, sums, total = _ascending(shares)
        steps = torch.linspace(0, 1, _BUDGETS, dtype=torch.float64, device=order.device)
        budgets = total * first * (last / first) ** steps
        sizes = torch.searchsorted(sums, budgets, right=True)
        lengths = [len(piece) for piece in shares]
        of_piece = torch.arange(len(shares)).repeat_interleave(torch.tensor(lengths))
        piece = of_piece.to(order.device, non_blocking=True)[order]
        nth = torch.arange(len(order), device=order.device)
        place = torch.searchsorted(sizes, nth, right=True) * len(shares) + piece
        table = nth.new_zeros((_BUDGETS + 1) * len(shares))
        table = table.scatter_add_(0, place, torch.ones_like(place)).reshape(-1, len(shares))
        traces = torch.cat([sums.new_zeros(1), sums])[sizes]
        looked_at = torch.cat([table[:-1].cumsum(0).double().flatten(), traces]).tolist()
        counts = [
            [int(count) for count in looked_at[i : i + len(shares)]]
            for i in range(0, _BUDGETS * len(shares), len(shares))
        ]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
        by_piece = order[piece.argsort(stable=True)].split(lengths)
        own = [numbers - start for numbers, start in zip(by_piece, starts, strict=True)]
        if ranks is not None:
            own, counts = _own(own), [_own(each) for each in counts]
        return cls(own, counts, looked_at[-_BUDGETS:])

    def added(self, before: int | None, index: int) -> list[Tensor]:
        """Per piece, the samples that go in one set and stay in the other (None: all stay)."""
        begins = [0] * len(self.order) if before is None else self.counts[before]
        spans = zip(self.order, begins, self.counts[index], strict=True)
        return [samples[begin:end] for samples, begin, end in spans]

    def kept(self, index: int) -> list[Tensor]:
        """Per piece, the samples that stay, in the piece's own order."""
        pieces = zip(self.order, self.counts[index], strict=True)
        return [samples[count:].sort().values for samples, count in pieces]


def _prune_spread(
    chunks: list[SampleRows],
    shares: list[Tensor],
    tolerance: float,
    gram: Tensor,
    ranks: Ranks | None,
) -> Pruned:
    """Whole samples, as many as the tighter of both bounds allows; empties ``chunks``.

    Args:
        gram: zeros [m, m], float64, where the samples are.
    """
    m = len(gram)
    # The norm is at least an m-th of the trace.
    candidates = _Candidates.within(shares, tolerance, tolerance * m, ranks)
    total = float(torch.stack([s.sum() for s in shares]).sum()) if shares else 0.0
    if ranks is not None:
        (total,) = ranks.totals("the trace", total)
    allowed = tolerance * total
    lengths = [chunk.x.norm(dim=1) for chunk in chunks]
    traces = candidates.traces
    # The trace alone lets the first set go.
    chosen, norm, failed, tried = 0, traces[0], _BUDGETS, 0
    seen: int | None = None
    for _ in range(_TRIES if m <= _LARGEST_ORDER else 0):
        more = torch.zeros_like(gram)
        pieces = zip(chunks, lengths, candidates.added(seen, tried), strict=True)
        for chunk, length, samples in pieces:
            more += _weighted_gram(chunk.s, length, samples)
        more = _of_all(more, ranks).add_(gram)
        # Squares that are nothing in float32 are something in the shares.
        bound = float(norm_bound_of(more)) or traces[tried]
        if ranks is not None:
            # What follows is the same on processors that round otherwise.
            bound = ranks.gather("a bound of shares", bound)[0]
        if bound <= allowed:
            chosen, seen, gram = tried, tried, more
            norm = min(bound, traces[tried])
        else:
            failed = tried
        guess = (chosen + failed) // 2
        if traces[tried] > 0:
            # What part of the trace the norm is changes little from one set to the next.
            guess = bisect_right(traces, allowed * traces[tried] / bound) - 1
        tried = min(guess, failed - 1)
        if tried <= chosen:
            break
    kept = candidates.kept(chosen)
    chunks.reverse()
    return Pruned([chunks.pop().select(samples) for samples in kept], norm, traces[chosen])


def _of_all(gram: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum [m, m] over the ranks, in place."""
    if ranks is not None:
        ranks.sum_([gram])
    return gram


def norm_bound_of(gram: Tensor) -> Tensor:
    """0-dim bound on the largest eigenvalue of a symmetric positive semi-definite matrix.

    tr(G^q)^(1/q) with q = 2^(squarings + 1), the trace of G^q being the squared Frobenius norm of
    G^(q/2): the Schatten q-norm, between λ_1 and m^(1/q) λ_1.

    Args:
        gram: G [m, m], float64.
    """
    power, logarithm = gram, gram.new_zeros(())
    for step in range(_SQUARINGS + 1):
        size = torch.linalg.matrix_norm(power)
        # λ_1(G) = λ_1(power)^(1 / 2^step) times what was divided by.
        logarithm = logarithm + size.log() / 2**step
        if step < _SQUARINGS:
            power = power / size
            power = power @ power
    return torch.where(gram.any(), logarithm.exp() * (1 + _MARGIN), 0.0)


def _weighted_gram(s: Tensor, lengths: Tensor, chosen: Tensor) -> Tensor:
    """[m, m] float64: sum of length² s_n^T s_n over the samples ``chosen``; s [N, r, m], [N]."""
    r, m = s.shape[1:]
    total = torch.zeros(m, m, dtype=s.dtype, device=s.device)
    for samples in chosen.split(max(1, _ROWS // max(1, r))) if len(chosen) else ():
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
