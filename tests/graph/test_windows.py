"""Windows of images folded into the first axis, and back: their order is proved by the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import CE, check_blocks, check_refused, quietly
from dense import relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

D, W, SIDE = 3, 2, 4


class Windows(nn.Module):
    """[N, SIDE, SIDE, D] -> [N, C] with a layer on rows [N windows, W W, D]."""

    def __init__(self, between: Callable[[Tensor], Tensor], shift: int = 0) -> None:
        super().__init__()
        self.first, self.inside, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.between, self.shift = between, shift

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h.roll((-self.shift, -self.shift), (1, 2))
        windows = h.view(-1, SIDE // W, W, SIDE // W, W, D).transpose(2, 3).reshape(-1, W * W, D)
        scores = torch.softmax(windows @ windows.mT, -1)
        windows = self.inside(self.between(scores @ windows))
        h = windows.view(-1, SIDE // W, SIDE // W, W, W, D).transpose(2, 3)
        h = h.reshape(-1, SIDE, SIDE, D).roll((self.shift, self.shift), (1, 2)) + x
        z: Tensor = self.head(h.sin().mean((1, 2)))
        return z


def _data() -> list[Any]:
    return [(randn(n, SIDE, SIDE, D, seed=n), classes(n, c=3, seed=n)) for n in (4, 3)]


def _expected(model: Windows, data: list[Any], name: str) -> tuple[Tensor, Tensor]:
    """A and E[M] of one image after the other, all rows that the layer sees of it."""
    A, E, samples, positions = torch.zeros(D, D).double(), torch.zeros(D, D).double(), 0, 0
    for images, _ in data:
        for image in images:
            seen: list[tuple[Tensor, Tensor]] = []
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, args, z, seen=seen: seen.append((args[0], z))
            )
            logits = model(image[None])[0]
            hook.remove()
            ((x, z),) = seen
            rows = torch.stack(
                [torch.autograd.grad(one, z, retain_graph=True)[0] for one in logits]
            ).reshape(len(logits), -1, D)
            p = logits.detach().softmax(0)
            curvature = p.diag() - torch.outer(p, p)
            A += x.detach().reshape(-1, D).T @ x.detach().reshape(-1, D)
            E += torch.einsum("ctm,ce,etn->mn", rows, curvature, rows)
            samples, positions = samples + 1, positions + rows.shape[1]
    return A / samples, E / positions


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_belong_to_their_images(shift: int) -> None:
    model, data = seeded(Windows(lambda w: w, shift)), _data()
    found = check_blocks(model, data, {"first", "inside", "head"})
    assert {H.checked for H in found.values()} == {"graph"}
    factors = quietly(hk.kronecker_factors, model, data, CE)
    for name in ("first", "inside"):
        A, E = _expected(model, data, name)
        assert factors[name].positions == SIDE * SIDE
        assert relative_error(factors[name].input_covariance, A) <= 1e-10
        assert relative_error(factors[name].output_hessian, E) <= 1e-10


@pytest.mark.parametrize(
    "mix",
    [
        lambda w: w.roll(1, 0),
        lambda w: w.roll(SIDE * SIDE // (W * W), 0),
        lambda w: w.flip(0),
        lambda w: w + w.mean(0, keepdim=True),
        lambda w: w[torch.arange(len(w)).roll(1)],
    ],
)
def test_windows_rolled_across_images_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    model = seeded(Windows(mix))
    data = [(randn(4, SIDE, SIDE, D), classes(4, c=3))]
    check_refused(model, data, "first", "sees rows that are no samples")
