"""Influence scores of networks on vectors against plain loops, and what a call may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_loops import close, gradients, loop_scores, singles, total
from torch import Tensor, nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()
Data = list[tuple[Tensor, Tensor]]


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)).to(dtype)


def data(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Data:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=source, dtype=torch.float64).to(dtype)
    return [(x, torch.randint(4, (n,), generator=source))]


def cut(whole: Data, size: int) -> Data:
    ((x, y),) = whole
    return list(zip(x.split(size), y.split(size), strict=True))


def corrected(model: nn.Module, train: Any, loss: Any = LOSS, **options: Any) -> dict[str, Any]:
    factors = hk.kronecker_factors(model, train, loss, **options)
    hessians = hk.layer_hessians(model, train, loss, **options)
    return {n: hk.eigenvalue_corrected(hessians[n], f.operator()) for n, f in factors.items()}


def tensor(scores: Any) -> Tensor:
    assert isinstance(scores, Tensor)
    return scores


class TestScores:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bias", ["none", "joint"])
    def test_a_small_network(self, dtype: torch.dtype, bias: Any) -> None:
        model, train, queries = mlp(dtype), data(40, dtype), data(5, dtype, 1)
        E = corrected(model, train, bias=bias)
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)
        found = hk.influence(E, model, queries, cut(train, 16), LOSS)
        close(found.scores, total(expected), 1e-5 if dtype == torch.float32 else 1e-12)
        assert tensor(found.scores).dtype == dtype
        assert (found.num_queries, found.num_train) == (5, 40)
        assert found.layers == ("0", "2")

    def test_training_on_a_helpful_sample_lowers_the_query_loss(self) -> None:
        model, train, queries = mlp(torch.float64), data(30, torch.float64), data(1, seed=1)
        queries = [(queries[0][0].double(), queries[0][1])]
        scores = tensor(hk.influence(None, model, queries, train, LOSS).scores)
        before = F.cross_entropy(model(queries[0][0]), queries[0][1])
        for n in range(30):
            stepped = mlp(torch.float64)
            sample = train[0][0][n : n + 1], train[0][1][n : n + 1]
            grads = torch.autograd.grad(
                F.cross_entropy(stepped(sample[0]), sample[1]),
                [stepped[0].weight, stepped[2].weight],
            )
            with torch.no_grad():
                for weight, grad in zip((stepped[0].weight, stepped[2].weight), grads, strict=True):
                    weight -= 1e-5 * grad
            change = (
                float((before - F.cross_entropy(stepped(queries[0][0]), queries[0][1])).detach())
                / 1e-5
            )
            assert change == pytest.approx(float(scores[0, n]), rel=1e-2, abs=1e-5)

    @pytest.mark.parametrize("q", [1, 3])
    def test_kronecker_factors_as_they_are(self, q: int) -> None:
        model, train, queries = mlp(), data(40), data(q, seed=1)
        factors = hk.kronecker_factors(model, train, LOSS)
        E = {name: f.operator() for name, f in factors.items()}
        damping = {"0": 0.3, "2": 0.01}
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy, damping)
        found = hk.influence(factors, model, queries, train, LOSS, damping=damping)
        close(found.scores, total(expected))
        assert found.damping == damping

    def test_gradients_of_several_targets(self) -> None:
        # The mean over a sample's outputs, or their sum.
        model, train, queries = mlp(), data(20), data(3, seed=1)
        train, queries = (
            [(x, torch.randn(len(x), 4, generator=torch.Generator().manual_seed(5)))]
            for ((x, _),) in (train, queries)
        )
        for reduction in ("mean", "sum"):
            loss = nn.MSELoss(reduction=reduction)
            E = corrected(model, train, loss)
            expected = loop_scores(E, model, singles(queries), singles(train), loss)
            close(hk.influence(E, model, queries, train, loss).scores, total(expected))

    def test_another_loss_of_the_queries(self) -> None:
        model, train, queries = mlp(), data(20), data(3, seed=1)
        asked = [(queries[0][0], torch.randn(3, 4))]
        E = corrected(model, train)
        expected = loop_scores(
            E, model, singles(asked), singles(train), F.cross_entropy, query_loss=F.mse_loss
        )
        found = hk.influence(E, model, asked, train, LOSS, query_loss=nn.MSELoss())
        close(found.scores, total(expected))

    def test_weights_of_samples_are_ignored_and_ignored_targets_score_zero(self) -> None:
        model, train, queries = mlp(), data(20), data(3, seed=1)
        E = corrected(model, train)
        (x, y), expected = train[0], tensor(hk.influence(E, model, queries, train, LOSS).scores)
        weighted = [(x, y, torch.rand(20))]
        assert torch.equal(tensor(hk.influence(E, model, queries, weighted, LOSS).scores), expected)
        y = y.clone()
        y[4] = LOSS.ignore_index
        masked = tensor(hk.influence(E, model, queries, [(x, y)], LOSS).scores)
        assert bool((masked[:, 4] == 0).all())
        assert torch.equal(masked[:, 5:], expected[:, 5:])

    def test_of_one_sample_and_one_query(self) -> None:
        model, train, queries = mlp(), data(1), data(1, seed=1)
        E = corrected(model, data(20))
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)
        close(hk.influence(E, model, queries, train, LOSS).scores, total(expected))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_models(self, dtype: torch.dtype) -> None:
        model, train, queries = mlp(dtype), data(20, dtype), data(3, dtype, 1)
        E = {n: f.operator() for n, f in hk.kronecker_factors(model, train, LOSS).items()}
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)
        found = hk.influence(E, model, queries, train, LOSS)
        assert tensor(found.scores).dtype == torch.float32
        close(found.scores, total(expected), 3e-2 if dtype == torch.bfloat16 else 4e-3)

    def test_gradients_below_the_range_of_float16(self) -> None:
        class PerToken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 2, bias=False)
                # Logits that float16 holds exactly, far apart.
                self.layer.weight.data = torch.tensor([[7.0, 0.0], [0.0, 7.0]])

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x).transpose(1, 2)

        # The mean over many tokens leaves gradients of 1e-3 / 4096.
        model, tokens = PerToken().half(), torch.tensor([0, 1]).repeat(2, 2048)
        x = F.one_hot(tokens, 2).half() * torch.tensor([1.0, 1.25]).half()[:, None, None]
        train, queries = [(x, tokens)], [(x[:1], 1 - tokens[:1])]
        E = {"layer": hk.KroneckerOperator(torch.eye(2), torch.eye(2))}
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)["layer"]
        found = tensor(hk.influence(E, model, queries, train, LOSS).scores)
        assert float((found / expected - 1).abs().max()) < 2e-3


class TestWhatIsKept:
    def test_per_layer(self) -> None:
        model, train, queries = mlp(), data(40), data(5, seed=1)
        E = corrected(model, train)
        expected = loop_scores(E, model, singles(queries), singles(train), F.cross_entropy)
        found = hk.influence(E, model, queries, cut(train, 7), LOSS, per_layer=True)
        assert isinstance(found.scores, dict)
        assert list(found.scores) == ["0", "2"]
        for name, scores in found.scores.items():
            close(scores, expected[name])

    def test_some_layers(self) -> None:
        model, train, queries = mlp(), data(40), data(5, seed=1)
        E = corrected(model, train)
        whole = hk.influence(E, model, queries, train, LOSS, per_layer=True)
        found = hk.influence(E, model, queries, train, LOSS, layers="2")
        assert isinstance(whole.scores, dict)
        assert found.layers == ("2",)
        close(found.scores, whole.scores["2"].double(), 1e-6)

    @pytest.mark.parametrize("k", [1, 6, 100])
    def test_top(self, k: int) -> None:
        model, train, queries = mlp(), data(40), data(5, seed=1)
        # Twice each: of equal scores the earlier one comes first.
        train = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in train]
        E = corrected(model, train)
        whole = tensor(hk.influence(E, model, queries, train, LOSS, batch_size=8).scores)
        found = hk.influence(E, model, queries, train, LOSS, top=k, batch_size=8)
        values, order = whole.sort(dim=1, descending=True, stable=True)
        assert found.indices is not None
        assert torch.equal(tensor(found.scores), values[:, :k])
        assert torch.equal(found.indices, order[:, :k])

    def test_a_low_rank_says_what_it_leaves_out(self) -> None:
        model, train, queries = (
            mlp(torch.float64),
            data(40, torch.float64),
            data(5, torch.float64, 1),
        )
        E = corrected(model, train)
        exact = tensor(hk.influence(E, model, queries, train, LOSS).scores)
        full = hk.influence(E, model, queries, train, LOSS, query_rank=7)
        close(full.scores, exact, 1e-12)
        assert full.rank_errors is not None
        assert float(full.rank_errors.max()) < 1e-12
        few = hk.influence(E, model, queries, train, LOSS, query_rank=1)
        assert few.rank_errors is not None
        rows = gradients(
            model, singles(queries), F.cross_entropy, {n: e.layer_shape for n, e in E.items()}
        )
        lost = whole = torch.zeros(5, dtype=torch.float64)
        for name, operator in E.items():
            dense = operator.to_dense()
            dense += few.damping[name] * torch.eye(len(dense), dtype=torch.float64)
            solved = torch.linalg.solve(dense, rows[name].T).T.unflatten(1, operator.layer_shape)
            values = torch.linalg.svdvals(solved)
            lost = lost + values[:, 1:].square().sum(1)
            whole = whole + values.square().sum(1)
        torch.testing.assert_close(few.rank_errors, (lost / whole).sqrt())
        assert not torch.allclose(tensor(few.scores), exact, rtol=1e-3)


class TestBits:
    @pytest.mark.parametrize("bias", ["none", "joint"])
    def test_any_split_gives_the_same(self, bias: Any) -> None:
        model, train, queries = mlp(), data(300), data(5, seed=1)
        E = corrected(model, train, bias=bias)
        expected = tensor(hk.influence(E, model, queries, train, LOSS).scores)
        for size in (1, 7, 64, 256, 299):
            found = tensor(hk.influence(E, model, cut(queries, 2), cut(train, size), LOSS).scores)
            assert torch.equal(found, expected), size

    def test_an_iterator(self) -> None:
        model, train, queries = mlp(), data(50), data(5, seed=1)
        E = corrected(model, train)

        def once() -> Iterator[tuple[Tensor, Tensor]]:
            yield from cut(train, 9)

        expected = tensor(hk.influence(E, model, queries, train, LOSS).scores)
        found = tensor(hk.influence(E, model, queries, once(), LOSS).scores)
        assert torch.equal(found, expected)

    def test_the_number_at_a_time_is_the_callers(self) -> None:
        model, train, queries = mlp(), data(50), data(5, seed=1)
        E, seen = corrected(model, train), []
        handle = model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
        found = hk.influence(E, model, queries, cut(train, 20), LOSS, batch_size=16)
        handle.remove()
        assert seen == [5, 16, 16, 16, 2]
        expected = hk.influence(E, model, queries, train, LOSS)
        close(found.scores, tensor(expected.scores).double(), 1e-6)
