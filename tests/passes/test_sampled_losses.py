"""Sampled and empirical rows: they have the exact curvature as their expectation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from loss_cases import LOSSES, LossCase, softmax_root
from networks import Shaped, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes.draws import Draws, SampleDraws
from hesskern.passes.losses import resolve_loss
from hesskern.passes.sample_numbers import Numbers

MONTE_CARLO = [
    "cross-entropy",
    "cross-entropy sum",
    "label smoothing",
    "masked tokens",
    "tokens sum",
    "probabilities",
    "images",
    "mse",
    "mse sum",
    "bce",
    "bce of one logit",
]


def draws(samples: int) -> SampleDraws:
    return Draws(1).of(Numbers(torch.arange(samples).numpy()))


def assert_unbiased(samples: Tensor, expected: Tensor) -> None:
    """Means of independent estimates [S, ...] within five standard errors, all entries."""
    error = samples.std(0) / len(samples) ** 0.5
    scale = float(expected.abs().max())
    assert bool(((samples.mean(0) - expected).abs() <= 5 * error + 1e-12 * scale).all())
    # The test has teeth: an estimate 20% off would not pass.
    assert float((0.2 * expected.abs() > 5 * error).any())


@pytest.mark.parametrize("name", MONTE_CARLO)
def test_sampled_targets_are_unbiased(name: str) -> None:
    case = LOSSES[name]
    model, data = seeded(Shaped(case.shape)), case.data()
    exact = hk.kronecker_factors(model, data, case.loss)
    drawn = [
        hk.kronecker_factors(model, data, case.loss, output="mc", mc_samples=40, seed=seed)
        for seed in range(40)
    ]
    for layer in ("a", "b"):
        assert_unbiased(
            torch.stack([f[layer].output_hessian for f in drawn]), exact[layer].output_hessian
        )
        assert torch.equal(drawn[0][layer].input_covariance, exact[layer].input_covariance)


def test_sampled_rows_of_a_custom_root_are_unbiased() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    exact = hk.kronecker_factors(model, data, case.loss)["a"].output_hessian
    drawn = [
        hk.kronecker_factors(
            model, data, output_root=softmax_root, output="mc", mc_samples=40, seed=seed
        )["a"].output_hessian
        for seed in range(40)
    ]
    assert_unbiased(torch.stack(drawn), exact)


def test_more_samples_come_closer() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    exact = hk.kronecker_factors(model, data, case.loss)["b"].output_hessian

    def error(samples: int) -> float:
        f = hk.kronecker_factors(model, data, case.loss, output="mc", mc_samples=samples)
        return relative_error(f["b"].output_hessian, exact)

    assert error(3000) < 0.05 < error(1)


def test_sampling_depends_on_the_seed_alone() -> None:
    case = LOSSES["tokens"]
    model, data = seeded(Shaped(case.shape)), case.data()

    def factor(seed: int) -> Tensor:
        return hk.kronecker_factors(model, data, case.loss, output="mc", seed=seed)[
            "a"
        ].output_hessian

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = factor(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, factor(5))
    assert not torch.equal(first, factor(6))


# The data's own targets


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_against_a_loop_over_samples(name: str) -> None:
    case = LOSSES[name]
    model, data = seeded(Shaped(case.shape)), case.data()
    weights = case.weights()
    expected = {"a": torch.zeros(4, 4).double()}
    size = math.prod(case.shape)
    expected["b"] = torch.zeros(size, size).double()
    for (x, targets), weight in zip(data, weights, strict=True):
        for n in range(len(x)):
            z = {"a": model.a(x[n : n + 1]).detach().requires_grad_()}
            z["b"] = model.b(F.relu(z["a"]))
            loss = case.sample_loss(z["b"].reshape(1, *case.shape), targets[n : n + 1])
            terms = case.terms(targets[n])
            for layer, g in zip("ab", torch.autograd.grad(loss, [z["a"], z["b"]]), strict=True):
                expected[layer] += weight[n] * terms * g.T @ g
    found = hk.kronecker_factors(model, data, case.loss, output="empirical")
    for layer, total in expected.items():
        mean = total / float(torch.cat(weights).sum())
        assert relative_error(found[layer].output_hessian, mean) <= 1e-12


# All three modes


def two_classes(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Values that a target of one output takes, [2, ...], and their probabilities."""
    sigma = outputs.sigmoid()
    return torch.stack([torch.zeros_like(sigma), torch.ones_like(sigma)]), torch.stack(
        [1 - sigma, sigma]
    )


def around(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same for squared errors: two points with the variance 1/2 of the model's normal."""
    return torch.stack([outputs - 0.5**0.5, outputs + 0.5**0.5]), torch.full_like(
        torch.stack([outputs, outputs]), 0.5
    )


def drawn_in_all_ways(case: LossCase, model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every target that the model may draw, as a batch with its probability as weights."""
    batches = []
    for x, given in case.data():
        outputs = model(x).detach()
        if isinstance(case.loss, nn.CrossEntropyLoss):
            p = (
                outputs.flatten(2).softmax(1).movedim(1, 0)
                if outputs.dim() > 2
                else outputs.softmax(1).T[..., None]
            )
            values = torch.arange(len(p)).reshape(-1, 1, 1).expand(p.shape)
            fixed = (given == case.loss.ignore_index).reshape(len(x), -1)
        else:
            values, p = (
                two_classes(outputs)
                if isinstance(case.loss, nn.BCEWithLogitsLoss)
                else around(outputs)
            )
            values, p = values.reshape(2, len(x), -1), p.reshape(2, len(x), -1)
            fixed = torch.zeros(p.shape[1:], dtype=torch.bool)
        for choice in itertools.product(range(len(p)), repeat=p.shape[2]):
            index = torch.tensor(choice).reshape(1, 1, -1).expand(1, *p.shape[1:])
            # A masked token stays masked, whatever would have been drawn there.
            targets = torch.where(
                fixed, given.reshape(fixed.shape).to(values.dtype), values.gather(0, index)[0]
            )
            weight = p.gather(0, index)[0].prod(1)
            batches.append((x, targets.reshape(given.shape), weight))
    return batches


@pytest.mark.parametrize(
    "name",
    [
        "cross-entropy",
        "tokens",
        "tokens sum",
        "masked tokens",
        "masked tokens sum",
        "images",
        "mse",
        "mse sum",
        "mse of images",
        "bce",
        "bce sum",
        "bce of one logit",
    ],
)
def test_exact_sampled_and_empirical_have_one_expectation(name: str) -> None:
    case = LOSSES[name]
    if isinstance(case.loss, nn.CrossEntropyLoss):
        # A smoothed target is none that the model draws.
        loss = nn.CrossEntropyLoss(
            ignore_index=case.loss.ignore_index, reduction=case.loss.reduction
        )
        case = LossCase(loss, case.shape, case.targets)
    model = seeded(Shaped(case.shape))
    exact = hk.kronecker_factors(model, case.data(), case.loss)
    every = drawn_in_all_ways(case, model)
    empirical = hk.kronecker_factors(model, every, case.loss, output="empirical")
    drawn = [
        hk.kronecker_factors(model, case.data(), case.loss, output="mc", mc_samples=40, seed=seed)
        for seed in range(40)
    ]
    for layer in ("a", "b"):
        expected = exact[layer].output_hessian
        assert relative_error(empirical[layer].output_hessian, expected) <= 1e-12
        assert_unbiased(torch.stack([f[layer].output_hessian for f in drawn]), expected)


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_random_rows_are_drawn_in_order(name: str) -> None:
    case = LOSSES[name]
    outputs, targets = randn(5, *case.shape), case.targets(5, 5)
    rows = resolve_loss(case.loss).sampled(outputs, targets, 3, draws(5))
    assert not torch.equal(rows.row(0), rows.row(1))
    for index in (1, 0):
        with pytest.raises(RuntimeError, match="out of order"):
            rows.row(index)


@pytest.mark.parametrize("gap", [12.0, 18.0, 25.0])
def test_drawn_rows_of_confident_outputs_keep_their_digits(gap: float) -> None:
    """In float32 p - 1 has none where p is nearly 1."""
    loss = resolve_loss(nn.BCEWithLogitsLoss(reduction="sum"))
    outputs = torch.full((64, 1), gap)

    def rows(values: Tensor) -> Tensor:
        return loss.sampled(values, torch.ones(64, 1), 1, draws(64)).row(0)

    expected = rows(outputs.double())
    assert bool((expected < 0).all())
    torch.testing.assert_close(rows(outputs).double(), expected, rtol=1e-5, atol=0)


def test_empirical_rows_of_tokens_with_narrow_labels() -> None:
    outputs, targets = randn(3, 5, 4), torch.tensor([[0, 1, 4, 2]] * 3)
    loss = resolve_loss(nn.CrossEntropyLoss())
    narrow = loss.empirical(outputs, targets.to(torch.uint8)).row(0)
    assert torch.equal(narrow, loss.empirical(outputs, targets).row(0))


@pytest.mark.parametrize("name", ["cross-entropy", "masked tokens", "images", "bce"])
def test_every_dtype_draws_the_same_targets(name: str) -> None:
    """Numbers of float32 have steps of 2^-24, which rarer classes fall between."""
    case = LOSSES[name]
    loss, targets = resolve_loss(case.loss), case.targets(50, 1)
    outputs = randn(50, *case.shape).float()

    def rows(values: Tensor) -> Tensor:
        return loss.sampled(values, targets, 1, draws(50)).row(0)

    torch.testing.assert_close(rows(outputs).double(), rows(outputs.double()), rtol=1e-5, atol=1e-6)
