"""Heads: tied to an embedding, or with more outputs than a matrix is kept for; why others miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import CE, quietly
from dense import relative_error
from networks import randn, seeded
from torch import Tensor, nn

import hesskern as hk

V, D = 7, 4


class LanguageModel(nn.Module):
    """Tokens [N, T] -> logits [N, V, T]; the head is the embedding, and also acts at the start."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mix(x).cumsum(1).tanh()
        z: Tensor = self.head(self.norm(x))
        return z.transpose(1, 2)


def _tokens(n: int, t: int, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (n, t), generator=g), torch.randint(V, (n, t), generator=g)


def _expected(model: LanguageModel, data: list[Any]) -> tuple[Tensor, Tensor]:
    """A and E[M] of the head's linear use, sample by sample and position by position."""
    A, M, count = torch.zeros(D, D).double(), torch.zeros(V, V).double(), 0
    for tokens, _ in data:
        for one in tokens:
            with torch.no_grad():
                x = model.embed(one)
                x = model.norm(x + model.mix(x).cumsum(0).tanh())
                z = x @ model.head.weight.T
            t = len(one)
            for i in range(t):
                A += torch.outer(x[i], x[i])
                p = torch.softmax(z[i], 0)
                # Of the mean over the sample's t tokens, averaged over as many positions.
                M += (torch.diag(p) - torch.outer(p, p)) / t / t
            count += 1
    return A / count, M / count


def test_a_head_tied_to_an_embedding_has_the_factors_of_its_linear_use(tmp_path: Path) -> None:
    model, data = seeded(LanguageModel()), [_tokens(3, 4), _tokens(2, 4, seed=1)]
    factors = quietly(hk.kronecker_factors, model, data, CE)
    assert list(factors) == ["mix", "head"]
    A, M = _expected(model, data)
    head = factors["head"]
    assert relative_error(head.input_covariance, A) <= 1e-12
    assert relative_error(head.output_hessian, M) <= 1e-12
    assert (head.tied_to, factors["mix"].tied_to) == ("embed", None)
    assert "looks rows of its weight up" in factors.skipped["embed"]
    # The same of a model whose head is a copy.
    copied = LanguageModel(tie=False).double()
    copied.load_state_dict(model.state_dict())
    other = quietly(hk.kronecker_factors, copied, data, CE)["head"]
    assert relative_error(other.output_hessian, M) <= 1e-12
    assert other.tied_to is None
    factors.save(tmp_path / "f.safetensors")
    loaded = hk.load_factors(tmp_path / "f.safetensors")
    assert (loaded["head"].tied_to, loaded["mix"].tied_to) == ("embed", None)


def test_tied_to_survives_state_and_merge() -> None:
    model = seeded(LanguageModel())
    acc, other = (hk.FactorAccumulator(model, CE, layers=["head"]) for _ in range(2))
    acc.update(*_tokens(3, 4))
    other.load_state_dict(acc.state_dict())
    assert other.factors()["head"].tied_to == "embed"
    fresh = hk.FactorAccumulator(model, CE, layers=["head"])
    fresh.merge(acc)
    assert fresh.factors()["head"].tied_to == "embed"


def test_a_tied_weight_has_no_block_of_its_own() -> None:
    """The Hessian in the weight has terms through the embedding, which are no s x^T."""
    model, data = seeded(LanguageModel()), [_tokens(3, 4)]
    for call in (hk.layer_hessians, hk.GaussNewton):
        found = quietly(call, model, data, CE)
        assert "acts through Embedding" in found.skipped["head"]
        with pytest.raises(ValueError, match="'head'"):
            call(model, data, CE, layers=["head"])


class Scaled(nn.Module):
    """Its weight acts in a linear call, is looked up, and counts by its size as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(self.embed(tokens).tanh()) * self.head.weight.norm()
        return z.transpose(1, 2)


def test_lookups_excuse_nothing_else() -> None:
    model, data = seeded(Scaled()), [_tokens(3, 4)]
    with pytest.raises(ValueError, match="'head' has a weight that acts through LinalgVectorNorm"):
        hk.kronecker_factors(model, data, CE)


class Twice(nn.Embedding):
    """An embedding of another package, scaled by two."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def test_an_embedding_of_another_kind_is_no_layer_either() -> None:
    model = LanguageModel()
    model.embed = Twice(V, D)
    model.head.weight = model.embed.weight
    factors = quietly(hk.kronecker_factors, seeded(model), [_tokens(3, 4)], CE)
    assert list(factors) == ["mix", "head"]
    assert factors["head"].tied_to == "embed"
    assert "is a Twice" in factors.skipped["embed"]


def test_large_heads_are_left_out_with_the_number_to_set() -> None:
    model, data = seeded(LanguageModel()), [_tokens(3, 4)]
    factors = quietly(hk.kronecker_factors, model, data, CE, max_outputs=V - 1)
    assert list(factors) == ["mix"]
    assert f"max_outputs={V} would include it (now {V - 1})" in factors.skipped["head"]
    assert "head" in quietly(hk.kronecker_factors, model, data, CE, max_outputs=V)
    with pytest.warns(UserWarning, match=r"left out: 'head' has 7 outputs"):
        hk.kronecker_factors(model, data, CE, max_outputs=V - 1)
    for layers in (["head"], "head"):
        with pytest.raises(ValueError, match=r"layers: 'head' has 7 outputs.*max_outputs=7"):
            hk.FactorAccumulator(model, CE, layers, max_outputs=V - 1)
    with pytest.raises(ValueError, match="no layer is left: 'mix' has 4 outputs"):
        hk.FactorAccumulator(model, CE, max_outputs=3)
    assert "head" not in hk.FactorAccumulator(model, CE, "*", max_outputs=V - 1)._specs


@pytest.mark.parametrize(
    ("given", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_bad_numbers_of_outputs(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_outputs must be"):
        hk.FactorAccumulator(LanguageModel(), CE, max_outputs=given)


class Vectors(nn.Module):
    """A norm of another package: a vector, and tokens [1, 1, D] that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Added(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, D))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(D), "is a LayerNorm: its weight scales entries one by one"),
        (nn.RMSNorm(D), "is a RMSNorm: its weight scales entries one by one"),
        (nn.BatchNorm1d(D), "is a BatchNorm1d: its weight scales entries one by one"),
        (nn.GroupNorm(2, D), "is a GroupNorm: its weight scales entries one by one"),
        (Vectors(), r"is a Vectors, whose own parameters are vectors (scale)"),
        (Added(), "is a Added, which holds no matrix but scale [1, 1, 4]"),
    ],
)
def test_every_kind_of_module_has_its_reason(module: nn.Module, reason: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(D, D), module, nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.last(self.other(self.first(x)).reshape(-1, D))
            return z

    model = seeded(Model())
    factors = hk.kronecker_factors(model, [(randn(5, D), torch.zeros(5).long())], CE)
    assert reason in factors.skipped["other"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_rows_that_attention_appends_are_named(diagonal: bool) -> None:
    """``add_bias_kv``: parameters of a module whose projections have factors."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    data = [(randn(5, 3, 4), torch.arange(5) % 3)]
    K = hk.kronecker_factors(seeded(Attends()), data, nn.CrossEntropyLoss(), diagonal=diagonal)
    assert {"attention.in_proj", "attention.out_proj", "head"} == set(K)
    for name in ("attention.bias_k", "attention.bias_v"):
        assert name in K.skipped
        assert name not in K.diagonals
    assert "attention" not in K.skipped
    E = hk.ekfac(seeded(Attends()), data, nn.CrossEntropyLoss(), bias="joint")
    assert "is a row that is appended" in E.skipped["attention.bias_k"]
