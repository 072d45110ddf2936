"""One layer under noise whose variances are tied but for its leading directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern import ops
from hesskern.pacbayes.divergence import exponential_excess
from hesskern.pacbayes.loop import Draft
from hesskern.pacbayes.posterior import spread_out
from hesskern.pacbayes.slots import Slot

__all__ = ["Rotated", "TruncatedLayer", "rows_of"]

_SMALLEST = 1e-12

# Components along the leading directions [N, k], squared norm of the rest [N] or None, w0 x [N, m].
Rotated = tuple[Tensor, Tensor | None, Tensor]


class TruncatedLayer:
    """Parameters of one layer and its outputs under noise.

    See :mod:`hesskern.pacbayes.truncated_method`.

    Attributes:
        u: [m, d], or [m, rank_in] where the mean moves in the leading directions alone: its
            distance from the prior's mean in prior deviations.
        log_ratio: [rows, columns] logarithms of variance over prior variance; the last row and
            column stand for all directions that have none of their own.
        log_prior: [] logarithm of the prior variance.
        U_full, V_full: [m, m] and [d, d] float64, columns by falling importance.
        rows, columns: how many directions each row and column of ``log_ratio`` stands for.
    """

    def __init__(
        self,
        slot: Slot,
        prior_mean: Tensor,
        start: Tensor,
        deviation: float,
        rank_in: int,
        rank_out: int,
        shift_free: bool,
        generator: torch.Generator,
    ) -> None:
        self.slot, self.prior_mean, self._generator = slot, prior_mean, generator
        m, d = prior_mean.shape
        self.shift_free = shift_free and m > 1
        whole = not slot.per_example
        self.rank_in = d if whole else min(rank_in, d)
        self.rank_out = 1 if self.shift_free else m if whole else min(rank_out, m)
        if m == 1:
            self.rank_out = 0
        self.rows = _multiplicities(self.rank_out, m).to(prior_mean)
        self.columns = _multiplicities(self.rank_in, d).to(prior_mean)
        self.U_full = torch.eye(m, dtype=torch.float64, device=prior_mean.device)
        self.V_full = torch.eye(d, dtype=torch.float64, device=prior_mean.device)
        if self.shift_free:
            shift = torch.full((m, 1), m**-0.5, dtype=torch.float64, device=prior_mean.device)
            self.U_full = _completed(shift)
        self.log_prior = torch.tensor(2 * math.log(deviation)).to(prior_mean)
        self.log_ratio = prior_mean.new_zeros(len(self.rows), len(self.columns))
        self.moves_in_basis = slot.reads_data and slot.per_example
        self.u = (start - prior_mean) / deviation
        self._cut()

    def _cut(self) -> None:
        dtype = self.prior_mean.dtype
        self.U = self.U_full[:, : self.rank_out].to(dtype).contiguous()
        self.V = self.V_full[:, : self.rank_in].to(dtype).contiguous()

    def set_first_bases(self, U: Tensor | None, V: Tensor, curvature: Tensor) -> None:
        """Bases (float64, columns by falling eigenvalue), and log r from ``beta h`` [m, d]."""
        if U is not None and not self.shift_free and self.rank_out:
            self.U_full = U
        self.V_full = V
        self._cut()
        beta_h = _tied(curvature, self.rank_out, self.rank_in)
        if self.shift_free:
            beta_h[0] = 0
        self.log_ratio = -torch.log1p(self.log_prior.exp() * beta_h.to(self.log_prior.dtype))
        if self.moves_in_basis:
            self.u = self.u @ self.V

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], U: Tensor, V: Tensor) -> None:
        """Takes over the parameters and whole bases of another time."""
        self.U_full, self.V_full = U.to(self.u.device), V.to(self.u.device)
        self._cut()
        for own, value in zip(self.parameters(), parameters, strict=True):
            own.copy_(value)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.log_ratio, self.log_prior

    def kl(self) -> Tensor:
        """KL(Q ‖ P), 0-dim float64, never negative."""
        # At float32's rounding a sum over millions of entries may come out below zero.
        each = exponential_excess(self.log_ratio.double())
        spread = self.rows.double() @ each @ self.columns.double()
        return 0.5 * (spread + self.u.square().sum(dtype=torch.float64))

    def rotate(self, U: Tensor | None, V: Tensor | None) -> None:
        """New bases; the covariance's diagonal in them becomes the variances, traces are kept."""
        ratio = self.log_ratio.exp()
        if U is not None and not self.shift_free and self.rank_out:
            ratio = _carried(ratio.T, self.U_full, U, self.rank_out).T
            self.U_full = U
        if V is not None and not self.moves_in_basis:
            ratio = _carried(ratio, self.V_full, V, self.rank_in)
            self.V_full = V
        self._cut()
        with torch.no_grad():
            self.log_ratio.copy_(ratio.clamp(min=_SMALLEST).log())

    def moments(self, x: Tensor, known: Rotated | None) -> tuple[Tensor, Tensor]:
        """Mean [N, m] of W x and deviations [N, rows] along U's leading columns and the rest."""
        deviation = (0.5 * self.log_prior).exp()
        if known is not None:
            y, rest, base = known
            mean = torch.addmm(base, y, (deviation * self.u).T)
        else:
            x = self.slot.extended(x)
            y = x @ self.V
            rest = None
            mean = x @ (self.prior_mean + deviation * self.u).T
            if self.rank_in < self.V.shape[0]:
                rest = (x.square().sum(1) - y.square().sum(1)).clamp(min=0)
        squares = y.square() if rest is None else torch.cat([y.square(), rest[:, None]], 1)
        variance = squares @ (self.log_prior + self.log_ratio).exp().T
        return mean, (variance + _SMALLEST).sqrt()

    def noisy(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """W x under noise, from its moments."""
        return spread_out(mean, deviation, self.U, self._generator)

    def weight(self) -> Tensor:
        """One drawn weight [m, d] (layers that share it over positions; bases are whole)."""
        noise = torch.randn(
            self.prior_mean.shape,
            generator=self._generator,
            dtype=self.u.dtype,
            device=self.u.device,
        )
        spread = (0.5 * self.log_ratio).exp() * noise
        moved = self.u + ops.from_eigenbasis(self.U, self.V, spread)
        return self.prior_mean + (0.5 * self.log_prior).exp() * moved

    @torch.no_grad()
    def mean(self) -> Tensor:
        u = self.u @ self.V.T if self.moves_in_basis else self.u
        return self.prior_mean + (0.5 * self.log_prior).exp() * u

    @torch.no_grad()
    def draft(self) -> Draft:
        m, d = self.prior_mean.shape
        prior = self.log_prior.double().exp()
        ratio = self.log_ratio.double().exp()
        counts = [c.long().to(ratio.device) for c in (self.rows, self.columns)]
        whole = ratio.repeat_interleave(counts[0], 0).repeat_interleave(counts[1], 1)
        assert whole.shape == (m, d)
        return Draft(
            self.mean(),
            whole * prior,
            self.U_full if self.rank_out else None,
            self.V_full,
            float(prior),
            relative=True,
        )


def rows_of(known: Rotated, rows: Tensor) -> Rotated:
    """The samples ``rows`` [B] of what is known of all."""
    y, rest, base = known
    return y[rows], None if rest is None else rest[rows], base[rows]


def _multiplicities(rank: int, size: int) -> Tensor:
    rest = [size - rank] if rank < size else []
    return torch.tensor([1.0] * rank + rest)


def _tied(values: Tensor, rank_out: int, rank_in: int) -> Tensor:
    """[m, d] with everything behind the leading rows and columns replaced by its mean."""
    for axis, rank in ((0, rank_out), (1, rank_in)):
        leading, rest = values.tensor_split([rank], axis)
        if rest.shape[axis]:
            leading = torch.cat([leading, rest.mean(axis, keepdim=True)], axis)
        values = leading
    return values


def _carried(ratio: Tensor, old: Tensor, new: Tensor, rank: int) -> Tensor:
    """Diagonal [.., rank (+ 1)] in the new basis of what is diagonal [.., rank (+ 1)] in the old.

    Entry k is sum_j (new_k . old_j)^2 r_j; the tied rest takes what the trace leaves over.
    """
    size = old.shape[0]
    counts = _multiplicities(rank, size).to(ratio)
    shares = (new[:, :rank].T @ old[:, :rank]).square().to(ratio)
    leading = ratio[..., :rank] @ shares.T
    if rank == size:
        return leading
    leading = leading + ratio[..., rank:] * (1 - shares.sum(1)).clamp(min=0)
    left_over = (ratio * counts).sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)
    return torch.cat([leading, left_over / (size - rank)], -1)


def _completed(columns: Tensor) -> Tensor:
    """An orthogonal matrix whose first columns span the same as ``columns`` one by one."""
    return torch.linalg.qr(columns, mode="complete").Q.contiguous()
