"""Data cut anew into pieces of one size, whatever its batches are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hesskern.passes.batches import Batch
from hesskern.passes.pieces import pieces, usual_size


def batch(index: int, inputs: Any, targets: Tensor, mask: Any = None) -> Batch:
    return Batch(index, inputs, targets, targets, torch.ones(len(targets)), mask)


def numbered(*sizes: int) -> list[Batch]:
    found, first = [], 0
    for index, n in enumerate(sizes):
        x = torch.arange(first, first + n)
        inputs = {"input_ids": x[:, None].expand(n, 3), "flag": True, "pair": (x, None)}
        found.append(batch(index, inputs, x + 100, {"a*": x[:, None] > 2, "*": None}))
        first += n
    return found


@pytest.mark.parametrize("sizes", [(10,), (1,) * 10, (3, 3, 4), (9, 1), (2, 0, 8)])
@pytest.mark.parametrize("size", [1, 4, 10, 99])
def test_samples_in_order(sizes: tuple[int, ...], size: int) -> None:
    found = list(pieces(numbered(*sizes), lambda first: size))
    counts = [size] * (10 // size) + ([10 % size] if 10 % size else [])
    assert [piece.count for piece in found] == counts
    first = 0
    for piece in found:
        expected = torch.arange(first, first + piece.count)
        assert piece.first == first
        inputs = piece.batch.inputs
        assert torch.equal(inputs["input_ids"], expected[:, None].expand(-1, 3))
        assert torch.equal(inputs["pair"][0], expected)
        assert (inputs["flag"], inputs["pair"][1]) == (True, None)
        assert torch.equal(piece.batch.targets, expected + 100)
        assert piece.batch.given_targets is piece.batch.targets
        assert piece.batch.weight is None
        assert torch.equal(piece.batch.mask["a*"][:, 0], expected > 2)
        first += piece.count
    batches = numbered(*sizes)
    for piece in found:
        of = batches[piece.batch.index].targets
        assert int(piece.batch.targets[0]) in of.tolist()


def test_a_piece_ends_where_shapes_change() -> None:
    data = [
        batch(i, torch.zeros(n, width), torch.zeros(n))
        for i, (n, width) in enumerate([(3, 5), (2, 5), (4, 6), (1, 5)])
    ]
    found = [(p.first, p.count, p.batch.inputs.shape[1]) for p in pieces(data, lambda _: 4)]
    assert found == [(0, 4, 5), (4, 1, 5), (5, 4, 6), (9, 1, 5)]


@pytest.mark.parametrize(
    "shared", [torch.tensor(1.0), torch.zeros(5, 5), ["a", "b"], [torch.zeros(2), 3]]
)
def test_what_cannot_be_cut_stays_whole(shared: Any) -> None:
    data = [batch(i, {"input_ids": torch.zeros(2, 3), "x": shared}, torch.zeros(2)) for i in (0, 1)]
    found = list(pieces(data, lambda _: 3))
    assert [(p.first, p.count, p.batch.index) for p in found] == [(0, 2, 0), (2, 2, 1)]
    assert all(p.batch.inputs["x"] is shared and p.batch.weight is None for p in found)


def test_the_usual_size_depends_on_the_shape_of_a_sample_alone() -> None:
    for n in (1, 7, 64):
        for inputs, expected in (
            (torch.zeros(n, 128, dtype=torch.long), 32),
            (torch.zeros(n, 5000, dtype=torch.long), 1),
            (torch.zeros(n, 3, 32, 32), 256),
            (torch.zeros(n, 3, 224, 224), 16),
            ({"input_ids": torch.zeros(n, 1024, dtype=torch.long), "scale": 3}, 4),
            (torch.zeros(n), 256),
        ):
            assert usual_size(batch(0, inputs, torch.zeros(n))) == expected
