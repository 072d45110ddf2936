"""Tensors in every memory layout, accumulators that watch their surroundings, error measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

INPUT_LAYOUTS = (
    "contiguous",
    "column_major",
    "swapped",
    "channels_last",
    "window",
    "strided",
    "expanded",
)
ACCUMULATOR_LAYOUTS = ("contiguous", "column_major", "window", "strided")

# Largest relative error (Frobenius) against the float64 reference on the same inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def random(
    shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Standard normal values of the given shape, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return (scale * values).to(dtype)


def f32(*shape: int, seed: int = 0) -> Tensor:
    return random(shape, F32, seed)


def f64(*shape: int, seed: int = 0) -> Tensor:
    return random(shape, F64, seed)


def softmax(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Probabilities [N, c] of random logits."""
    return torch.softmax(random(shape, seed=seed), dim=1).to(dtype)


def _column_major(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _framed(t: Tensor, step: int) -> Tensor:
    """``t`` as a view with an offset and the given step, NaN everywhere between and around."""
    frame = t.new_full([step * size + 2 for size in t.shape], float("nan"))
    view = frame[tuple(slice(1, 1 + step * size, step) for size in t.shape)]
    return view.copy_(t)


_ARRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "column_major": _column_major,
    "swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "window": lambda t: _framed(t, 1),
    "strided": lambda t: _framed(t, 2),
    "expanded": lambda t: t[:1].expand_as(t),
}


def arrange(t: Tensor, layout: str) -> Tensor:
    """``t`` in another memory layout; "expanded" repeats its first entry along dimension 0."""
    return _ARRANGE[layout](t)


class Accumulator:
    """An accumulator with content, NaN in the strictly lower triangle, inside a larger tensor.

    The lower triangle must not matter, and nothing outside the view may change.

    Args:
        shape: [d, d] or [g, d, d].
        dtype: float32 or float64.
        layout: one of ``ACCUMULATOR_LAYOUTS``.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", seed: int = 1
    ) -> None:
        step = 2 if layout == "strided" else 1
        margin = 0 if layout in ("contiguous", "column_major") else 3
        self._frame = random([step * size + margin for size in shape], dtype, seed)
        if layout == "column_major":
            self._frame = self._frame.transpose(-1, -2)
        self._window = tuple(
            slice(min(margin, 1), min(margin, 1) + step * size, step) for size in shape
        )
        self.tensor = self._frame[self._window]
        initial = self.tensor.double().triu()
        self._initial = initial + initial.triu(1).transpose(-1, -2)
        lower = torch.ones(*shape[-2:], dtype=torch.bool).tril(-1)
        self.tensor.masked_fill_(lower, float("nan"))
        self._before = self._frame.clone()

    def check(self, update: Tensor) -> None:
        """Asserts that, mirrored, it is its first content plus ``update``; no more changed."""
        upper = self.tensor.triu()
        torch.ops.hesskern.mirror_(self.tensor)
        assert torch.equal(self.tensor.triu(), upper)
        assert torch.equal(self.tensor, self.tensor.transpose(-1, -2))
        scale = float(self._initial.norm() + update.norm())
        assert_near(self.tensor, self._initial + update.reshape(self._initial.shape), scale)
        around = self._frame.clone()
        around[self._window] = self._before[self._window]
        assert torch.equal(around.nan_to_num(7.0), self._before.nan_to_num(7.0))


def relative_error(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """‖actual - expected‖ (Frobenius) over ‖expected‖, or over ``scale`` where that is larger."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    size = max(float(expected.detach().double().norm()), scale)
    return float(difference) / size if size > 0 else float(difference)


def assert_near(
    actual: Tensor, expected: Tensor, scale: float = 0.0, tolerance: float | None = None
) -> None:
    """Asserts shape and relative error; the tolerance is that of ``actual``'s dtype.

    ``scale`` is the size that rounding errors have where terms cancel in ``expected``.
    """
    assert actual.shape == expected.shape
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected, scale)
    assert error <= limit, f"relative error {error:.2e} above {limit:.0e}"


def to_double(argument: Any) -> Any:
    """Tensors, and tensors in lists, in float64; everything else as it is."""
    if isinstance(argument, Tensor):
        return argument.double()
    if isinstance(argument, list):
        return [to_double(item) for item in argument]
    return argument
