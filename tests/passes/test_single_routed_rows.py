"""One row of every sample: an expert's, which may be padding, or a head's, which is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from blocks import CE, quietly
from dense import relative_error
from launches import playing_device
from masked import trimmed
from networks import classes, randn, seeded
from torch import Tensor, nn
from transformer_models import mixtral, text

import hesskern as hk

N, T, D, C = 4, 3, 5, 3
Put = Callable[[Tensor, Tensor, Tensor], Tensor]


def _index_add(rows: Tensor, chosen: Tensor, y: Tensor) -> Tensor:
    return rows.index_add(0, chosen, y)


def _index_put(rows: Tensor, chosen: Tensor, y: Tensor) -> Tensor:
    return rows.index_put((chosen,), y, accumulate=True)


def _scatter(rows: Tensor, chosen: Tensor, y: Tensor) -> Tensor:
    return rows.scatter_add(0, chosen.unsqueeze(1).expand_as(y), y)


def _gather(rows: Tensor, chosen: Tensor, y: Tensor) -> Tensor:
    """Sorted, in slices, and back."""
    others = torch.ones(len(rows), dtype=torch.bool).index_fill(0, chosen, False).nonzero()[:, 0]
    order = torch.cat([chosen, others])
    return torch.cat([rows[chosen] + y, rows[others]])[order.argsort()]


class OneEach(nn.Module):
    """An expert to which each sample sends its largest token."""

    def __init__(self, put: Put) -> None:
        super().__init__()
        self.inp, self.expert, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.put = put

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        n, t, _ = h.shape
        chosen = h.detach().sum(2).argmax(1) + t * torch.arange(n)
        rows = h.reshape(n * t, D)
        out = self.put(rows, chosen, self.expert(rows[chosen]).tanh())
        return self.head(out.view(n, t, D).sin().mean(1))


class OnOneToken(nn.Module):
    """A head on the last token that the mask keeps."""

    def __init__(self, last: Tensor) -> None:
        super().__init__()
        self.inp, self.head, self.last = nn.Linear(D, D), nn.Linear(D, C), last

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        return self.head(h[torch.arange(len(h)), self.last])


def keep() -> Tensor:
    mask = torch.ones(N, T)
    mask[0, 2] = mask[2, 1:] = 0
    return mask


@pytest.mark.parametrize("put", [_index_add, _index_put, _scatter, _gather])
def test_an_expert(put: Put) -> None:
    model, data = seeded(OneEach(put)), [(randn(N, T, D), classes(N, c=C))]
    plain = quietly(hk.kronecker_factors, model, data, CE)
    assert plain["expert"].positions == 1
    masked = quietly(hk.kronecker_factors, model, data, CE, position_mask=lambda x: keep())
    assert set(masked) == {"inp", "head"}
    assert "cannot be told" in masked.skipped["expert"]
    with pytest.raises(ValueError, match="'expert' sees rows that a router has chosen"):
        hk.kronecker_factors(model, data, CE, ["expert"], position_mask=lambda x: keep())


def test_a_head_on_one_token() -> None:
    mask = keep()
    model = seeded(OnOneToken(mask.sum(1).long() - 1))
    data = [(randn(N, T, D), classes(N, c=C))]
    masked = quietly(hk.kronecker_factors, model, data, CE, position_mask=lambda x: mask)
    plain = quietly(hk.kronecker_factors, model, data, CE)
    assert set(masked) == {"inp", "head"}
    for factor in ("input_covariance", "output_hessian"):
        one, other = (getattr(found["head"], factor) for found in (masked, plain))
        assert relative_error(one, other) <= 1e-12


def test_one_padded_sample_of_a_model_with_experts() -> None:
    """A head behind ``logits_to_keep``, which takes all positions, is no expert."""
    batch = text(1)
    batch["attention_mask"][0, 3:] = 0
    batch["labels"][0, 3:] = -100
    found = quietly(hk.kronecker_factors, mixtral(), [batch], hk.CausalLM())
    alone = quietly(hk.kronecker_factors, mixtral(), trimmed(batch), hk.CausalLM())
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= set(found)
    for name, layer in found.items():
        for factor in ("input_covariance", "output_hessian"):
            one, other = getattr(layer, factor), getattr(alone[name], factor)
            # Attention is so sharp that queries and keys have next to none.
            assert float(other.norm()) < 1e-20 or relative_error(one, other) <= 1e-6, name
    assert any("cannot be told" in reason for reason in found.skipped.values())


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.pooler = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.token(x).tanh()[:, 0])


class TestOnePosition:
    def data(self) -> list[Any]:
        return [(randn(N, 1, D), classes(N, c=C))]

    def mask(self) -> Tensor:
        mask = torch.ones(N, 1)
        mask[1] = 0
        return mask

    @pytest.mark.parametrize("on_device", [False, True])
    def test_samples_without_a_position_are_refused(self, on_device: bool) -> None:
        model, data = seeded(Pooled()), self.data()
        where = playing_device() if on_device else nullcontext()
        with where, pytest.raises(ValueError, match=r"\[4, 1\] and leaves samples without"):
            hk.kronecker_factors(model, data, CE, position_mask=lambda x: self.mask())
        with pytest.raises(ValueError, match="leaves samples without a position"):
            hk.input_covariances(model, self.data(), position_mask=lambda x: self.mask())

    def test_by_name(self) -> None:
        model, mask = seeded(Pooled()), {"token": self.mask(), "pooler": None}
        found = hk.kronecker_factors(model, self.data(), CE, position_mask=lambda x: mask)
        assert (found["token"].positions, found["pooler"].positions) == (0.75, 1)

    def test_with_all_positions(self) -> None:
        whole = torch.ones(N, 1)
        found = hk.kronecker_factors(
            seeded(Pooled()), self.data(), CE, position_mask=lambda x: whole
        )
        assert found["token"].positions == found["pooler"].positions == 1
