"""Bytes that EKFAC's corrections take inside on the host (csrc/eigen_correction.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesskern.graph.nodes import product

__all__ = ["conv_correction_bytes", "correction_bytes"]

# Numbers held beside the arguments, about; samples whose squares go into one sum, with positions
# and without (csrc/cpu/eigen_correction/eigen_correction.cpp).
_NUMBERS, _LEVEL, _PRODUCTS_LEVEL = 2**22, 128, 512
# How many times more multiplications sums over positions may take to be as fast as patches.
_UNFOLDING = 1.5


@dataclass(frozen=True)
class _Call:
    """Sizes of a call: outputs m and inputs d of one group, with the column of ones.

    Attributes:
        converted: numbers of a sample that are brought into the accumulator's dtype.
    """

    n: int
    r: int
    t: int
    groups: int
    m: int
    d: int
    ones: bool
    converted: int

    @property
    def matrix(self) -> int:
        return self.r * self.m * self.d

    @property
    def outputs_first(self) -> bool:
        return self.t == 1 or self.t < self.d

    @property
    def inputs_first(self) -> bool:
        return self.t == 1 or self.t < self.r * self.m

    def together(self, numbers: int) -> int:
        """Samples at a time, of which one takes so many numbers."""
        level = _PRODUCTS_LEVEL if self.t == 1 else max(1, _LEVEL // self.r)
        return min(self.n, max(1, min(_NUMBERS // max(1, numbers), level)))

    def sums_pay(self) -> bool:
        """Whether a convolution sums over positions first."""
        left = self.t * self.r * self.m if self.outputs_first else self.matrix
        right = self.t * self.d if self.inputs_first else self.matrix
        least = self.t * self.matrix + left * self.m + right * self.d
        return self.t > 1 and self.matrix * (self.t + self.m + self.d) <= _UNFOLDING * least

    def by_sums(self, samples: int) -> int:
        """Numbers held at most where a convolution sums over positions first.

        Args:
            samples: numbers of a sample's image and gradients.
        """
        count = self.together(4 * (3 * self.groups * self.matrix + samples))
        held = (self.groups + 2) * self.matrix + self.converted
        return count * held + self.groups * self.m * self.d

    def by_rows(self, patches: bool, packed: bool, rows_last: bool) -> int:
        """Numbers held at most where rows are rotated as they come.

        Args:
            patches: whether the inputs are unfolded.
            packed: whether gradients [n, r, m, t] are contiguous.
            rows_last: whether they are in the order [n, r, t, m].
        """
        r, t, m, d = self.r, self.t, self.m, self.d
        formed = t > 1 and not (self.outputs_first and self.inputs_first)
        numbers = t * (3 * d + 2 * r * m) + (3 * self.matrix if formed else 0)
        count = self.together(self.groups * numbers)
        unfolded = self.groups * t * d if patches else 0
        whole = self.groups * m * d + count * (unfolded + self.converted)
        rows, inputs, matrices = count * r * t * m, count * t * d, count * self.matrix
        if t == 1:
            turned = 2 * rows if self.groups > 1 else rows
            summed = rows + count * m if r > 1 else rows
            return whole + max(turned, summed, (count * m if r > 1 else rows) + inputs)
        left = rows if self.outputs_first else 0
        copied = 0 if rows_last and self.groups == 1 else rows
        begin = left + copied if self.outputs_first else 0
        right = inputs if self.inputs_first or self.ones else 0
        if self.outputs_first and self.inputs_first:
            return whole + max(begin, left + right)
        # As the product takes them: [n, r m, t].
        plain = not self.outputs_first and packed and self.groups == 1
        product_of = matrices + (0 if plain else rows)
        return whole + max(begin, left + right + max(product_of, 2 * matrices))


def _converted(acc: Tensor, *given: Tensor) -> int:
    """Numbers of a sample in tensors [N, ...] of another dtype than acc's."""
    return sum(t.numel() // len(t) for t in given if t.dtype != acc.dtype)


def _order(g: Tensor) -> tuple[bool, bool]:
    """Whether gradients [N, r, m, ...] are contiguous, and whether with positions before m."""
    flat = g.flatten(3) if g.dim() > 3 else g.unsqueeze(3)
    return flat.is_contiguous(), flat.transpose(2, 3).is_contiguous()


def correction_bytes(
    acc: Tensor,
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    alpha: float = 1.0,
    ones: bool = False,
) -> int:
    """Of ``eigen_correction_``, whose arguments these are."""
    groups = U.shape[0] if U.dim() == 3 else 1
    (n, r, outputs), t = g.shape[:3], product(g.shape[3:])
    if not acc.numel() or not g.numel():
        return 0
    call = _Call(n, r, t, groups, outputs // groups, acc.shape[1], ones, _converted(acc, g, x))
    return acc.element_size() * call.by_rows(False, *_order(g))


def conv_correction_bytes(
    acc: Tensor,
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    alpha: float = 1.0,
    ones: bool = False,
) -> int:
    """Of ``conv_eigen_correction_``, whose arguments these are."""
    (n, r, outputs), t = g.shape[:3], product(g.shape[3:])
    if not acc.numel() or not g.numel():
        return 0
    call = _Call(n, r, t, groups, outputs // groups, acc.shape[1], ones, _converted(acc, g, x))
    if call.sums_pay():
        return acc.element_size() * call.by_sums((x.numel() + g.numel()) // n)
    return acc.element_size() * call.by_rows(True, *_order(g))
