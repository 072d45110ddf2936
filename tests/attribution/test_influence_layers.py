"""Influence scores of convolutions, groups, tokens, masks and layers used several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_loops import close, loop_scores, singles, total
from masked import encoder, padded
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def factors(model: nn.Module, train: Any, loss: Any = LOSS, **options: Any) -> dict[str, Any]:
    made = hk.kronecker_factors(model, train, loss, output="empirical", **options)
    return {name: f.operator() for name, f in made.items()}


class Convolutions(nn.Module):
    """Images, groups, strides, and a linear layer at one position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 2, groups=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.grouped(x))
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


class Tokens(nn.Module):
    """One layer used twice, on sequences; outputs [N, c, t] or [N, c]."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.up, self.again, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.again(torch.tanh(self.up(x)))))
        x = self.head(torch.tanh(x.mean(1) if self.pooled else x))
        return x if self.pooled else x.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("q", [1, 3])
def test_convolutions(dtype: torch.dtype, bias: Any, q: int) -> None:
    model = seeded(Convolutions()).to(dtype)
    train = [(randn(9, 2, 8, 8, dtype=dtype), classes(9, c=3))]
    queries = [(randn(q, 2, 8, 8, seed=1, dtype=dtype), classes(q, c=3, seed=1))]
    E = factors(model, train, bias=bias)
    expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    found = hk.influence(E, model, queries, train, LOSS, batch_size=4)
    close(found.scores, total(expected), tolerance)
    assert found.layers == ("first", "grouped", "depthwise", "head")
    low = hk.influence(E, model, queries, train, LOSS, query_rank=100, per_layer=True)
    assert isinstance(low.scores, dict)
    for name, scores in low.scores.items():
        close(scores, expected[name], tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("q", [1, 3])
def test_sequences_and_a_layer_used_twice(reduction: str, pooled: bool, q: int) -> None:
    model, loss = seeded(Tokens(pooled)), nn.CrossEntropyLoss(reduction=reduction)
    shape = () if pooled else (6,)
    train = [(randn(9, 6, 4), classes(9, *shape, c=3))]
    queries = [(randn(q, 6, 4, seed=1), classes(q, *shape, c=3, seed=1))]
    E = factors(model, train, loss)
    expected = loop_scores(E, model, singles(queries), singles(train), loss)
    close(hk.influence(E, model, queries, train, loss).scores, total(expected), 1e-12)


def test_ignored_targets() -> None:
    model = seeded(Tokens(False))
    train = [(randn(9, 6, 4), classes(9, 6, c=3))]
    train[0][1][2, 1:4] = -100
    train[0][1][5] = -100
    queries = [(randn(2, 6, 4, seed=1), classes(2, 6, c=3, seed=1))]
    E = factors(model, train)
    rest = [pair for i, pair in enumerate(singles(train)) if i != 5]
    expected = total(loop_scores(E, model, singles(queries), rest, F.cross_entropy))
    found = hk.influence(E, model, queries, train, LOSS).scores
    assert isinstance(found, Tensor)
    assert bool((found[:, 5] == 0).all())
    close(torch.cat([found[:, :5], found[:, 6:]], 1), expected, 1e-12)


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("rank", [None, 5])
def test_positions(q: int, rank: int | None) -> None:
    model = seeded(Tokens(False))
    train = [(randn(9, 6, 4), classes(9, 6, c=3)), (randn(2, 4, 4), classes(2, 4, c=3))]
    queries = [(randn(q, 6, 4, seed=1), classes(q, 6, c=3, seed=1))]
    E = factors(model, train)
    given = E, model, queries, train, LOSS
    whole = hk.influence(*given, per_layer=True).scores
    parts = hk.influence(*given, per_layer=True, per_token=True, query_rank=rank).scores
    assert isinstance(whole, dict)
    assert isinstance(parts, dict)
    for name, scores in parts.items():
        assert scores.shape == (q, 11, 6)
        # Behind the end of shorter samples there is nothing.
        assert not bool(scores[:, 9:, 4:].any())
        close(scores.sum(2), whole[name], 1e-12)
    # Of the head each position stands alone: its own gradient, without those of the others.
    x, y = train[0][0][:1], train[0][1][:1]
    apart = torch.full_like(y, -100)
    apart[0, 2] = y[0, 2]
    head = hk.influence(E, model, queries, [(x, apart)], LOSS, layers="head").scores
    assert isinstance(head, Tensor)
    # With one target of a sample the mean is over it alone.
    close(head / 6, parts["head"][:, :1, 2], 1e-12)


def test_positions_of_other_layers_are_refused() -> None:
    model = seeded(Tokens(True))
    train = [(randn(3, 6, 4), classes(3, c=3))]
    E = factors(model, train)
    with pytest.raises(ValueError, match=r"train: per_token .*'head' has 1"):
        hk.influence(E, model, train, train, LOSS, per_token=True)
    found = hk.influence(E, model, train, train, LOSS, per_token=True, layers=["up", "again"])
    assert isinstance(found.scores, Tensor)
    assert found.scores.shape == (3, 3, 6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_token", [False, True])
def test_padding(side: str, per_token: bool) -> None:
    model = encoder()
    ((train, classes_), (queries, asked)) = padded(side), padded(side, (2, 5, 3), seed=1)
    mask = {"position_mask": lambda inputs: inputs["mask"]}
    E = factors(model, [(train, classes_)], **mask)
    expected = loop_scores(
        E, model, singles([(queries, asked)]), singles([(train, classes_)]), F.cross_entropy
    )
    given = E, model, [(queries, asked)], [(train, classes_)], LOSS
    if not per_token:
        close(hk.influence(*given, **mask).scores, total(expected), 1e-10)
        return
    layers = ["qkv", "out", "up", "down", "pixel"]
    scores = hk.influence(*given, layers=layers, per_token=True, **mask).scores
    assert isinstance(scores, Tensor)
    close(scores.sum(2), total({name: expected[name] for name in layers}), 1e-10)
    assert not bool(scores[:, train["mask"] == 0].any())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_split_of_dicts_gives_the_same_bits(size: int) -> None:
    model = encoder(torch.float32)
    mask = {"position_mask": lambda inputs: inputs["mask"]}
    train = padded("right", (3, 6, 1, 4, 6, 2, 5, 1))
    E = factors(model, [train], **mask)
    queries = [padded("right", (2, 6), seed=1)]
    expected = hk.influence(E, model, queries, [train], LOSS, **mask).scores
    parts = [
        ({key: value[i : i + size] for key, value in train[0].items()}, train[1][i : i + size])
        for i in range(0, 8, size)
    ]
    found = hk.influence(E, model, queries, parts, LOSS, **mask).scores
    assert isinstance(expected, Tensor)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


class Expert(nn.Module):
    """Tokens whose first entry is positive go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > 0).nonzero().flatten()
        rows = rows.index_add(0, chosen, torch.tanh(self.expert(rows[chosen])))
        return self.head(rows.unflatten(0, x.shape[:2])).transpose(1, 2)


def test_tokens_of_an_expert_have_no_positions() -> None:
    model, x = seeded(Expert()), randn(5, 6, 4)
    # One sample has all its tokens there, so that the number of rows is that of positions.
    x[2, :, 0] = x[2, :, 0].abs()
    assert bool((x[..., 0] < 0).any())
    data = [(x, classes(5, 6, c=3))]
    E = factors(model, data)
    with pytest.raises(ValueError, match=r"one row for each position, but expert took some rows"):
        hk.influence(E, model, data, data, LOSS, per_token=True)
    found = hk.influence(E, model, data, data, LOSS, per_token=True, layers="head").scores
    assert isinstance(found, Tensor)
    assert found.shape == (5, 5, 6)


class Frames(nn.Module):
    """A convolution of every frame, and a linear layer of every frame's features."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.features = nn.Conv2d(1, 2, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.pixels(x.flatten(0, 1))).flatten(1)
        return self.features(rows).unflatten(0, x.shape[:2]).mean(1)


def test_frames_are_no_pixels() -> None:
    """A sample has four frames, and a frame four positions."""
    model, data = seeded(Frames()), [(randn(5, 4, 1, 3, 3), classes(5, c=3))]
    E = factors(model, data)
    expected = loop_scores(E, model, singles(data), singles(data), F.cross_entropy)
    close(hk.influence(E, model, data, data, LOSS).scores, total(expected), 1e-10)
    with pytest.raises(ValueError, match="pixels took several images of a sample"):
        hk.influence(E, model, data, data, LOSS, per_token=True)
    found = hk.influence(E, model, data, data, LOSS, per_token=True, layers="features").scores
    assert isinstance(found, Tensor)
    close(found.sum(2), expected["features"], 1e-10)


class Attends(nn.Module):
    """Keys and values of another width: three matrices, whose biases are in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x[..., :3], x[..., :3])[0].mean(1))


def test_projections_whose_biases_are_in_one_parameter() -> None:
    model = seeded(Attends()).double()
    train = [(randn(6, 5, 4), classes(6, c=3))]
    E = factors(model, train)
    found = hk.influence(E, model, train, train, LOSS, per_layer=True, damping=0.1)
    assert isinstance(found.scores, dict)
    rows = []
    for x, y in singles(train):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradient = model.attention.k_proj_weight.grad
        assert gradient is not None
        rows.append(gradient.flatten().clone())
    G = torch.stack(rows)
    dense = E["attention.k_proj"].to_dense() + 0.1 * torch.eye(12).double()
    close(found.scores["attention.k_proj"], G @ torch.linalg.solve(dense, G.T), 1e-12)


class Unused(nn.Module):
    """What one of its layers computes is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return self.main(x)


@pytest.mark.parametrize("curved", [False, True])
def test_layers_without_effect_are_named(curved: bool) -> None:
    model = seeded(Unused()).double()
    train = [(randn(6, 3), classes(6, c=3))]
    E = factors(model, train) if curved else None
    options = {"damping": 0.1} if curved else {}
    found = hk.influence(E, model, train, train, LOSS, **options)
    assert found.layers == ("main",)
    assert "no effect on the queries' losses" in found.skipped["side"]
