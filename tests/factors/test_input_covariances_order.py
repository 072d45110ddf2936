"""Masks of input covariances, and rows that do not come sample after sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from input_covariance_cases import equal, gated, sequences
from networks import randn, seeded
from torch import Tensor, nn

import hesskern as hk

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings(
    "ignore:left out:UserWarning", "ignore:Using padding='same' with even:UserWarning"
)


def masked_rows(x: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([one[keep] for one, keep in zip(x, mask.bool(), strict=True)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", ["attention_mask", "position_mask"])
def test_padding_counts_nowhere(how: str, weighted: bool) -> None:
    model, x = gated(), sequences()
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    # What is at masked positions matters to nobody, as long as it can be computed.
    x = torch.where(mask[..., None] == 0, 1e3 * x, x)
    batch = {"x": x, "attention_mask": mask} if how == "attention_mask" else {"x": x}
    given = None if how == "attention_mask" else lambda inputs: mask
    found = hk.input_covariances(
        model, [batch], bias="joint", position_mask=given, sample_weight=weight
    )
    one = torch.ones(3, dtype=torch.float64) if weight is None else weight
    rows = F.pad(masked_rows(x, mask), (0, 1), value=1.0)
    by_row = one.repeat_interleave(mask.sum(1))
    total = one.sum()
    for name in ("gate", "up"):
        ours = found[name]
        expected = (rows * by_row[:, None]).T @ rows / total
        assert relative_error(ours.input_covariance, expected) <= 1e-12
        assert ours.positions == pytest.approx(float((one * mask.sum(1)).sum() / total))
        mean = (rows * by_row[:, None]).sum(0) / by_row.sum()
        assert relative_error(ours.input_mean, mean) <= 1e-12
    # One row per sample is not the mask's.
    assert found["pooler"].positions == 1
    factors = hk.kronecker_factors(
        model,
        [(x, torch.tensor([0, 1, 2]))],
        CE,
        bias="joint",
        position_mask=lambda inputs: mask,
        sample_weight=weight,
    )
    for name in factors:
        ours, theirs = found[name].input_covariance, factors[name].input_covariance
        assert relative_error(ours, theirs) <= 1e-6


def test_masked_convolutions_over_sequences() -> None:
    model = seeded(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.ReLU())).double()
    x, mask = randn(3, 4, 5), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 0, 1, 1, 1]])
    found = hk.input_covariances(model, [x], position_mask=lambda inputs: mask)["0"]
    columns = F.pad(x, (1, 1)).unfold(2, 3, 1).permute(0, 2, 1, 3)
    rows = masked_rows(columns.reshape(3, 5, 12), mask).reshape(-1, 2, 6)
    expected = torch.einsum("rgi,rgj->gij", rows, rows) / 3
    assert relative_error(found.input_covariance, expected) <= 1e-12
    assert found.positions == pytest.approx(11 / 3)


def test_rows_in_another_order_are_left_out() -> None:
    class Crosswise(nn.Module):
        """Its second layer sees [T, N, d], flattened."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).transpose(0, 1).reshape(-1, 6))

    model, x = seeded(Crosswise()).double(), sequences()
    plain = hk.input_covariances(model, [x])
    assert list(plain) == ["first", "second"]
    with pytest.warns(UserWarning, match="left out: 'second' was given rows that are not"):
        masked = hk.input_covariances(model, [x], position_mask=lambda x: torch.ones(3, 4).triu(-1))
    assert list(masked) == ["first"]
    with pytest.raises(ValueError, match="'second' was given rows that are not"):
        hk.input_covariances(model, [x], "second", sample_weight=torch.tensor([1.0, 2.0, 3.0]))


class Reordered(nn.Module):
    """A layer before and one behind what changes the order of the rows."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.change(self.first(x)))


def positions_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def with_large_feature(x: Tensor, value: float) -> Tensor:
    return torch.cat([x[..., :5], torch.full_like(x[..., :1], value)], -1)


def only_first(model: nn.Module, x: Tensor, mask: list[list[int]]) -> None:
    """Of these masked rows, no covariance is made for the second layer."""
    with pytest.warns(UserWarning, match="left out: 'second' was given rows that are not"):
        found = hk.input_covariances(model, [x], position_mask=lambda x: torch.tensor(mask))
    assert list(found) == ["first"]


def test_the_order_shows_beside_padding_that_is_not_finite() -> None:
    model, x = seeded(Reordered(positions_first)).double(), sequences(2)
    x[1, 3, 2] = torch.nan
    only_first(model, x, [[1, 1, 1, 0], [1, 1, 1, 0]])
    # Where the order is right, what is in the padding matters to nobody.
    same = seeded(Reordered(lambda x: x)).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    found = hk.input_covariances(same, [x], position_mask=lambda x: mask)
    assert list(found) == ["first", "second"]


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e4, torch.float32), (150.0, torch.bfloat16), (1e9, torch.float64)]
)
def test_the_order_shows_beside_a_large_feature(value: float, dtype: torch.dtype) -> None:
    def change(x: Tensor) -> Tensor:
        return with_large_feature(x.transpose(0, 1).reshape(-1, 6), value)

    mask = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    x = sequences().to(dtype)
    only_first(seeded(Reordered(change)).to(dtype), x, mask)
    right = seeded(Reordered(lambda x: with_large_feature(x, value))).to(dtype)
    found = hk.input_covariances(right, [x], position_mask=lambda x: torch.tensor(mask))
    assert list(found) == ["first", "second"]


def test_the_order_shows_though_the_last_row_is_the_same() -> None:
    model = seeded(Reordered(positions_first)).double()
    only_first(model, sequences(2), [[1, 1, 1, 0], [0, 0, 0, 1]])


def test_samples_that_are_alike_tell_nothing_of_the_order() -> None:
    model = seeded(Reordered(lambda x: x.flip(0))).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    alike = sequences(1).expand(2, -1, -1).contiguous()
    found = hk.input_covariances(model, [alike], position_mask=lambda x: mask)
    assert list(found) == ["first", "second"]
    with pytest.raises(ValueError, match="'second' was given rows that are not"):
        hk.input_covariances(model, [alike, sequences(2)], position_mask=lambda x: mask)
    # In the right order both batches count.
    same = seeded(Reordered(lambda x: x)).double()
    found = hk.input_covariances(same, [alike, sequences(2)], position_mask=lambda x: mask)
    assert found["second"].num_samples == 4


@pytest.mark.parametrize("size", [40, 400])
def test_rounding_is_no_other_order(size: int) -> None:
    """Of samples alone, entries next to zero have other roundings."""
    layers = [nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()]
    model = seeded(nn.Sequential(*layers, nn.Linear(size, 3)))
    x, weight = randn(33, size, dtype=torch.float32), torch.arange(33.0)
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype)]
        assert len(hk.input_covariances(model.to(dtype), given, sample_weight=weight)) == 3


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        given = inputs["input_ids"] if "input_ids" in inputs else inputs["tokens"]
        return self.layer(self.words(given))


def test_what_counts_the_samples_of_a_dict() -> None:
    model, ids = seeded(Embedded()).double(), torch.arange(16).reshape(2, 8) % 11
    positions = torch.arange(8)[None]
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    plain = {"position_ids": positions, "input_ids": ids}
    for extra in ({}, {"attention_mask": mask}):
        expected = hk.input_covariances(model, [{"input_ids": ids, **extra}])
        found = hk.input_covariances(model, [{**plain, **extra}])
        assert found.num_samples == 2
        equal(found, expected)
    weight = torch.tensor([0.5, 2.0])
    expected = hk.input_covariances(model, [{"input_ids": ids}], sample_weight=weight)
    equal(hk.input_covariances(model, [plain], sample_weight=weight), expected)
    # Names that tell nothing: the mask does, or nothing.
    batch = {"position_ids": positions, "tokens": ids}
    found = hk.input_covariances(model, [{**batch, "attention_mask": mask}])
    equal(found, hk.input_covariances(model, [{"input_ids": ids, "attention_mask": mask}]))
    equal(hk.input_covariances(model, [batch], position_mask=lambda inputs: mask), found)
    with pytest.raises(ValueError, match="contradict each other: 'position_ids' has 1, 'tokens'"):
        hk.input_covariances(model, [batch])
