"""Queries' gradients times a damped inverse, ready to be dotted with other samples' gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.attribution.sample_gradients import LayerRows, matrices

__all__ = ["LayerQueries", "of_low_rank"]

# Bytes of samples' gradient matrices, or of images of their rows, that are made at a time.
_TOGETHER_BYTES = {"cpu": 2**26, "cuda": 2**29}


@dataclass(frozen=True)
class LayerQueries:
    """P_q of one layer for all queries: scores are <P_q, G_n>.

    Attributes:
        matrices: [q, g, m/g, d]; None where they are kept as ``left`` and ``right``.
        left: [g, q, m/g, r], with P_q = left right^T.
        right: [g, q, d, r].
    """

    matrices: Tensor | None
    left: Tensor | None = None
    right: Tensor | None = None

    def zeros(self, *shape: int) -> Tensor:
        """Scores [q, *shape] of samples that the layer has no gradient for."""
        if self.matrices is not None:
            return self.matrices.new_zeros(len(self.matrices), *shape)
        assert self.left is not None
        return self.left.new_zeros(self.left.shape[1], *shape)

    def scores(self, calls: list[LayerRows]) -> Tensor:
        """[q, N] of the samples of some calls.

        Either G_n is made and dotted, which takes t m d + q m d multiplications for a sample, or
        P_q is applied to its inputs (or its output gradients) and G_n is never made: q t m d
        (1 + 1/max(m, d)).
        """
        if self.matrices is None:
            return sum_calls([self._low_rank(call).sum(2) for call in calls])
        q, _, m, d = self.matrices.shape
        t = sum(call.positions for call in calls)
        if q * t * (m * d + min(m, d)) <= (t + q) * m * d:
            return sum_calls([self._through(call).sum(2) for call in calls])
        flat = self.matrices.flatten(1)
        step = _at_a_time(flat[0])
        n = len(calls[0].x)
        parts = [
            flat @ matrices(calls, slice(begin, begin + step)).flatten(1).T
            for begin in range(0, n, step)
        ]
        return torch.cat(parts, 1)

    def position_scores(self, call: LayerRows) -> Tensor:
        """[q, N, t]: the part g_nt^T P_q x_nt of every position."""
        return self._low_rank(call) if self.matrices is None else self._through(call)

    def _through(self, call: LayerRows) -> Tensor:
        assert self.matrices is not None
        x, g = call.grouped()
        q, _, m, d = self.matrices.shape
        # The smaller of both images is made.
        rows, others, P = (x, g, self.matrices.mT) if m <= d else (g, x, self.matrices)
        step = _queries_at_a_time(call, min(m, d))
        parts = [
            (torch.matmul(rows, P[begin : begin + step]) * others).sum((1, 3))
            for begin in range(0, q, step)
        ]
        return torch.cat(parts).unflatten(1, call.x.shape[:2])

    def _low_rank(self, call: LayerRows) -> Tensor:
        assert self.left is not None
        assert self.right is not None
        x, g = call.grouped()
        q, rank = self.left.shape[1], self.left.shape[3]
        step = _queries_at_a_time(call, 2 * rank)
        parts = []
        for begin in range(0, q, step):
            left, right = (
                # [g, m/g or d, q r]: all queries of a part in one product.
                side[:, begin : begin + step].transpose(1, 2).flatten(2)
                for side in (self.left, self.right)
            )
            product = torch.matmul(x, right) * torch.matmul(g, left)
            parts.append(product.unflatten(2, (-1, rank)).sum((0, 3)).T)
        return torch.cat(parts).unflatten(1, call.x.shape[:2])


def sum_calls(parts: list[Tensor]) -> Tensor:
    """Their sum, in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _at_a_time(one: Tensor, times: int = 1) -> int:
    """How many tensors like one (or so many of it) are made together."""
    limit = _TOGETHER_BYTES.get(one.device.type, _TOGETHER_BYTES["cpu"])
    return max(1, limit // max(1, times * one.nbytes))


def _queries_at_a_time(call: LayerRows, columns: int) -> int:
    """Queries with images of so many columns per group and row of a call."""
    return _at_a_time(call.x[:, :, :1], call.groups * columns)


def of_low_rank(queries: LayerQueries, rank: int) -> tuple[LayerQueries, Tensor]:
    """The nearest P_q of a rank (per group), and what that leaves out.

    Returns:
        the queries, [q] float64 squared Frobenius norms of the differences.
    """
    assert queries.matrices is not None
    P = queries.matrices.double()
    rank = min(rank, *P.shape[2:])
    # The leading eigenvectors of the smaller Gram matrix, and P projected onto them.
    tall = P.shape[2] <= P.shape[3]
    gram = P @ P.mT if tall else P.mT @ P
    basis = torch.linalg.eigh(gram).eigenvectors[..., -rank:]
    image = P.mT @ basis if tall else P @ basis
    left, right = (basis, image) if tall else (image, basis)
    error = (P - left @ right.mT).square().sum((1, 2, 3))
    dtype = queries.matrices.dtype
    kept = (side.transpose(0, 1).to(dtype).contiguous() for side in (left, right))
    return LayerQueries(None, *kept), error
