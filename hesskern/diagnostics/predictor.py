"""How much two models' leading eigenspaces of a layer will overlap, from their factors alone.

In the Kronecker form the eigenvectors are u_i (x) v_j with eigenvalues tau_i gamma_j (tau of E[M],
gamma of E[x x^T]). Where gamma_1 stands far above gamma_2, precisely tau_m gamma_1 > tau_1 gamma_2,
the first m are u_i (x) v_1 for all i: the whole output space times one input direction. Two models
share nothing of the order of their outputs, so at k <= m they overlap by (k / m) (t^T t')², t the
first input eigenvectors (arXiv 2010.04261, section 4).

The curve here carries that reasoning past k = m and to layers where the condition fails: with
n_j(k) of the top k products on input direction j, and output directions of two models taken as
random to each other, the overlap is expected to be

    1 / (k m) sum_jj' n_j(k) n'_j'(k) (v_j^T v'_j')²

which is the paper's line as long as only v_1 occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.factors.result import LayerFactors

__all__ = ["OverlapPrediction", "classify_peak", "peak_position", "predict_overlap"]

# A peak this near k = m counts as one at m.
_NEAR = (0.8, 1.25)
# A maximum among the last of these parts of the window is none: the curve still rises.
_RISING = 0.98
# What counts as the maximum: several k can reach it, and rounding must not choose among them.
_TIE = 1e-3


@dataclass(frozen=True)
class OverlapPrediction:
    """What is expected of the overlap between two models' spaces.

    Attributes:
        applies: whether tau_m gamma_1 > tau_1 gamma_2 in both models.
        squared_cosine: (t^T t')², the height that the linear growth reaches at k = m.
        outputs: m.
        curve: [k] float64, expected overlap at 1 ... k.
        peak: position of the curve's maximum, see :func:`peak_position`.
        kind: see :func:`classify_peak`.
    """

    applies: bool
    squared_cosine: float
    outputs: int
    curve: Tensor
    peak: int
    kind: str

    def height(self, k: int) -> float:
        """(k / m) (t^T t')², the published prediction for k <= m.

        Raises:
            ValueError: k is not in [1, m].
        """
        if not 1 <= k <= self.outputs:
            raise ValueError(f"k must lie in [1, {self.outputs}], got {k}")
        return k / self.outputs * self.squared_cosine


def predict_overlap(
    first: LayerFactors, second: LayerFactors, k: int | None = None
) -> OverlapPrediction:
    """The overlap that two models' factors of one layer let expect.

    Args:
        first, second: of the same layer in two models, one group.
        k: length of the curve; None: 9/4 m, at most m d.

    Raises:
        ValueError: the layers' shapes differ, or k is not in [1, m d].
        NotImplementedError: the layer is a grouped convolution.
    """
    for factors in (first, second):
        if factors.groups > 1:
            raise NotImplementedError(
                f"layer {factors.name!r} has {factors.groups} groups and no single input eigenbasis"
            )
    if first.layer_shape != second.layer_shape:
        raise ValueError(
            f"first and second must be of one shape, got {first.layer_shape} and "
            f"{second.layer_shape}"
        )
    m, d = first.layer_shape
    shown = min(m * d, _window(m)) if k is None else k
    if not 1 <= shown <= m * d:
        raise ValueError(f"k must lie in [1, {m * d}], got {k}")
    # Long enough to tell where the peak is, also where less is asked for.
    length = min(m * d, max(shown, _window(m)))
    applies, bases, counts = True, [], []
    for factors in (first, second):
        tau = torch.linalg.eigvalsh(factors.output_hessian.double()).flip(0)
        gamma, v = torch.linalg.eigh(factors.input_covariance.double())
        gamma, v = gamma.flip(0), v.flip(1)
        applies &= d > 1 and bool(tau[-1] * gamma[0] > tau[0] * gamma[1])
        direction = torch.outer(tau, gamma).flatten().topk(length).indices % d
        used = int(direction.max()) + 1
        # [k, used]: how many of the first 1 ... k products lie on each input direction.
        counts.append(torch.nn.functional.one_hot(direction, used).cumsum(0).double())
        bases.append(v[:, :used])
    squares = (bases[0].T @ bases[1]).square()
    sizes = torch.arange(1, length + 1, device=squares.device, dtype=torch.float64)
    curve = ((counts[0] @ squares) * counts[1]).sum(1) / (sizes * m)
    peak = peak_position(curve.tolist(), m)
    # A single input has no second direction, and no products beyond the m-th.
    kind = classify_peak(curve.tolist(), m) if d > 1 else "normal"
    return OverlapPrediction(applies, float(squares[0, 0]), m, curve[:shown], peak, kind)


def _window(outputs: int) -> int:
    """How far a peak is looked for: first layers' curves rise again behind it."""
    return 9 * outputs // 4


def peak_position(curve: Sequence[float], outputs: int) -> int:
    """The first k, counted from 1 to at most 9/4 m, within .1 % of the maximum up to there.

    Args:
        curve: overlap at k = 1, 2, ...
        outputs: m.
    """
    seen = curve[: _window(outputs)]
    enough = (1 - _TIE) * max(seen)
    return next(k for k, value in enumerate(seen, 1) if value >= enough)


def classify_peak(curve: Sequence[float], outputs: int) -> str:
    """Where an overlap curve has its maximum: "early", "normal" (near k = m), "delayed" or "none".

    "none": the curve still rises at k = 9/4 m, up to which a peak is looked for, or at its end.

    Args:
        curve: overlap at k = 1, 2, ...; long enough to tell, at least 5/4 m.
        outputs: m.

    Raises:
        ValueError: the curve is shorter than 5/4 m.
    """
    low, high = (factor * outputs for factor in _NEAR)
    if len(curve) < high:
        raise ValueError(f"curve must reach at least k = 5/4 m = {high:g}, got {len(curve)} values")
    peak = peak_position(curve, outputs)
    if peak > high and peak > _RISING * min(len(curve), _window(outputs)):
        return "none"
    return "early" if peak < low else "delayed" if peak > high else "normal"
