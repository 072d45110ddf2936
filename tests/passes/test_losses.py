"""Curvature of losses: closed forms, torch's own second derivatives, sampled and empirical rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import gauss_newton, loss_hessian, relative_error
from networks import Shaped, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes.losses import resolve_loss


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).softmax(1)


def masked(*shape: int, c: int, ignore: int, seed: int = 0) -> Tensor:
    """Class indices with the first sample and a few others masked."""
    targets = classes(*shape, c=c, seed=seed)
    targets[0] = ignore
    flat = targets.flatten(1) if targets.dim() > 1 else targets[:, None]
    flat[2, ::2] = ignore
    return targets


@dataclass(frozen=True)
class LossCase:
    """A loss, the shape of a sample's outputs and targets for N samples."""

    loss: nn.Module
    shape: tuple[int, ...]
    targets: Callable[[int, int], Tensor]

    def data(self) -> list[tuple[Tensor, Tensor]]:
        return [(randn(n, 3, seed=n), self.targets(n, n)) for n in (5, 3)]

    def sample_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """torch's loss on that sample alone; a fully masked one counts as 0."""
        ignore = getattr(self.loss, "ignore_index", None)
        if not target.is_floating_point() and bool((target == ignore).all()):
            return outputs.sum() * 0
        return self.loss(outputs, target)

    def weights(self) -> list[Tensor]:
        """1 for every sample that counts, 0 for fully masked ones."""
        ignore = getattr(self.loss, "ignore_index", None)
        return [
            torch.ones(len(t)).double()
            if t.is_floating_point()
            else (t.reshape(len(t), -1) != ignore).any(1).double()
            for _, t in self.data()
        ]

    def terms(self, target: Tensor) -> int:
        """How many terms a sample's loss is the mean of."""
        if self.loss.reduction == "sum":
            return 1
        if not isinstance(self.loss, nn.CrossEntropyLoss):
            return math.prod(self.shape)
        if target.is_floating_point():
            return math.prod(self.shape[1:])
        return max(1, int((target != self.loss.ignore_index).sum()))


LOSSES: dict[str, LossCase] = {
    "cross-entropy": LossCase(
        nn.CrossEntropyLoss(), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "cross-entropy sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "two classes": LossCase(
        nn.CrossEntropyLoss(), (2,), lambda n, seed: classes(n, c=2, seed=seed)
    ),
    "label smoothing": LossCase(
        nn.CrossEntropyLoss(label_smoothing=0.2), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "ignore_index": LossCase(
        nn.CrossEntropyLoss(ignore_index=-7),
        (4,),
        lambda n, seed: masked(n, c=4, ignore=-7, seed=seed),
    ),
    "ignore_index is a class": LossCase(
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, reduction="sum"),
        (4,),
        lambda n, seed: masked(n, c=4, ignore=1, seed=seed),
    ),
    "probabilities": LossCase(
        nn.CrossEntropyLoss(), (4,), lambda n, seed: probabilities(n, 4, seed=seed)
    ),
    "probabilities with label smoothing": LossCase(
        nn.CrossEntropyLoss(label_smoothing=0.3),
        (4,),
        lambda n, seed: probabilities(n, 4, seed=seed),
    ),
    "tokens": LossCase(
        nn.CrossEntropyLoss(), (3, 4), lambda n, seed: classes(n, 4, c=3, seed=seed)
    ),
    "tokens sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"),
        (3, 4),
        lambda n, seed: classes(n, 4, c=3, seed=seed),
    ),
    "masked tokens": LossCase(
        nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1),
        (3, 4),
        lambda n, seed: masked(n, 4, c=3, ignore=-100, seed=seed),
    ),
    "masked tokens sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"),
        (3, 4),
        lambda n, seed: masked(n, 4, c=3, ignore=-100, seed=seed),
    ),
    "tokens with probabilities": LossCase(
        nn.CrossEntropyLoss(), (3, 4), lambda n, seed: probabilities(n, 3, 4, seed=seed)
    ),
    "images": LossCase(
        nn.CrossEntropyLoss(), (3, 2, 2), lambda n, seed: classes(n, 2, 2, c=3, seed=seed)
    ),
    "mse": LossCase(nn.MSELoss(), (4,), lambda n, seed: randn(n, 4, seed=seed)),
    "mse sum": LossCase(nn.MSELoss(reduction="sum"), (4,), lambda n, seed: randn(n, 4, seed=seed)),
    "mse of one number": LossCase(nn.MSELoss(), (), lambda n, seed: randn(n, seed=seed)),
    "mse of images": LossCase(
        nn.MSELoss(), (2, 2, 2), lambda n, seed: randn(n, 2, 2, 2, seed=seed)
    ),
    "bce": LossCase(nn.BCEWithLogitsLoss(), (4,), lambda n, seed: randn(n, 4, seed=seed).sigmoid()),
    "bce sum": LossCase(
        nn.BCEWithLogitsLoss(reduction="sum"),
        (4,),
        lambda n, seed: classes(n, 4, c=2, seed=seed).double(),
    ),
    "bce of one logit": LossCase(
        nn.BCEWithLogitsLoss(), (), lambda n, seed: classes(n, c=2, seed=seed).double()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_against_torchs_second_derivatives(name: str) -> None:
    case = LOSSES[name]
    model, data = seeded(Shaped(case.shape)), case.data()
    weights = case.weights()
    for layer, H in hk.layer_hessians(model, data, case.loss).items():
        block = gauss_newton(model, data, case.sample_loss, layer, weights=weights)
        hessian = loss_hessian(model, data, case.sample_loss, layer, weights=weights)
        assert relative_error(block, hessian) <= 1e-10
        assert relative_error(H.to_dense(), hessian) <= 1e-10
        assert H.num_samples == float(torch.cat(weights).sum())
        R = hk.AutogradHessian(model, data, case.loss, params=[f"{layer}.weight"])
        assert relative_error(R.to_dense(), hessian) <= 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_output_hessian_is_the_mean_curvature(name: str) -> None:
    # A Linear layer that puts out the model's outputs directly: its output Hessian is E[A].
    case = LOSSES[name]
    size = math.prod(case.shape)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(len(x), *case.shape)

    model, data = seeded(Direct()), case.data()
    expected = torch.zeros(size, size, dtype=torch.float64)
    count = 0.0
    for (x, targets), weight in zip(data, case.weights(), strict=True):
        for n in range(len(x)):
            logits = model(x[n : n + 1]).detach().flatten()
            target = targets[n : n + 1]
            expected += weight[n] * torch.autograd.functional.hessian(
                lambda f, t=target: case.sample_loss(f.reshape(1, *case.shape), t), logits
            )
            count += float(weight[n])
    found = hk.kronecker_factors(model, data, case.loss)["fc"]
    assert relative_error(found.output_hessian, expected / count) <= 1e-12
    assert found.num_samples == count


def test_closed_forms() -> None:
    # One input that is one: the layer's Hessian is the mean curvature itself.
    logits = randn(4, seed=1)
    model = nn.Linear(1, 4, bias=False).double()
    model.weight.data.copy_(logits[:, None])
    one = torch.ones(1, 1).double()

    def curvature(loss: nn.Module, target: Tensor) -> Tensor:
        return hk.layer_hessians(model, [(one, target)], loss)[""].to_dense()

    p, sigma = logits.softmax(0), logits.sigmoid()
    label, values = torch.tensor([2]), torch.rand(1, 4).double()
    softmax = torch.diag(p) - torch.outer(p, p)
    assert relative_error(curvature(nn.CrossEntropyLoss(), label), softmax) <= 1e-14
    assert (
        relative_error(curvature(nn.CrossEntropyLoss(label_smoothing=0.5), label), softmax) <= 1e-14
    )
    eye = torch.eye(4).double()
    assert relative_error(curvature(nn.MSELoss(), values), eye / 2) <= 1e-14
    assert relative_error(curvature(nn.MSELoss(reduction="sum"), values), 2 * eye) <= 1e-14
    logistic = torch.diag(sigma * (1 - sigma))
    assert relative_error(curvature(nn.BCEWithLogitsLoss(), values), logistic / 4) <= 1e-14
    assert (
        relative_error(curvature(nn.BCEWithLogitsLoss(reduction="sum"), values), logistic) <= 1e-14
    )


@pytest.mark.parametrize(
    "logits",
    [
        [50.0, 0.0, -50.0, 1.0],
        [0.0, 50.0, 50.0, -80.0],
        [-35.0, -35.0, 35.0, 0.0],
        [20.0, 10.0, 0.0, -10.0],
        [-1000.0, 1000.0, 0.0, 999.0],
    ],
)
def test_confident_predictions_keep_their_digits(logits: list[float]) -> None:
    values = torch.tensor(logits).double()
    p = values.softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    # p - p^2 loses the digits of a probability near one; its complement has them.
    top = int(p.argmax())
    rest = [i for i in range(4) if i != top]
    expected[top, top] = p[top] * p[rest].sum()
    model = nn.Linear(1, 4, bias=False)
    model.weight.data.copy_(values[:, None])
    data = [(torch.ones(1, 1), torch.tensor([0]))]
    found = hk.layer_hessians(model, data, nn.CrossEntropyLoss())[""].to_dense()
    assert torch.isfinite(found).all()
    assert relative_error(found, expected) <= 1e-5
    factor = hk.kronecker_factors(model, data, nn.CrossEntropyLoss())[""].output_hessian
    assert relative_error(factor, expected) <= 1e-5


# Custom losses


def softmax_root(outputs: Tensor, targets: Any) -> Tensor:
    """[N, c, c] with rows sqrt(p_j) (e_j - p)."""
    p = outputs.softmax(1)
    eye = torch.eye(p.shape[1], dtype=p.dtype)
    return p.sqrt().unsqueeze(2) * (eye - p.unsqueeze(1))


class RootLoss:
    def output_root(self, outputs: Tensor, targets: Any) -> Tensor:
        return softmax_root(outputs, targets)


class RootLossWithValue(RootLoss):
    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")


def test_custom_root_as_function_and_object_equals_the_loss_it_belongs_to() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    expected = hk.layer_hessians(model, data, case.loss)
    factors = hk.kronecker_factors(model, data, case.loss)
    for arguments in ({"output_root": softmax_root}, {"loss": RootLoss()}):
        found = hk.layer_hessians(model, data, **arguments)
        found_factors = hk.kronecker_factors(model, data, **arguments)
        for layer in expected:
            assert relative_error(found[layer].to_dense(), expected[layer].to_dense()) <= 1e-12
            assert (
                relative_error(found_factors[layer].output_hessian, factors[layer].output_hessian)
                <= 1e-12
            )
    stream = hk.FactorAccumulator(model, output_root=softmax_root)
    for x, y in data:
        stream.update(x, y)
    found = stream.factors()["a"].output_hessian
    assert relative_error(found, factors["a"].output_hessian) <= 1e-12


def test_custom_root_on_outputs_with_positions_and_any_targets() -> None:
    # 1/2 Σ w (f - t)² with targets (t, w) as a tuple: curvature w.
    model = seeded(Shaped((2, 3)))
    x = randn(4, 3)
    targets = (randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2).abs())

    def root(outputs: Tensor, both: Any) -> Tensor:
        return torch.diag_embed(both[1].sqrt().flatten(1)).unflatten(2, (2, 3))

    def sample(outputs: Tensor, weight: Tensor) -> Tensor:
        return 0.5 * (weight * outputs.square()).sum()

    for layer, H in hk.layer_hessians(model, [(x, targets)], output_root=root).items():
        expected = loss_hessian(model, [(x, targets[1])], sample, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


def test_custom_loss_with_a_value_works_with_autograd_and_empirically() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    loss = RootLossWithValue()
    R = hk.AutogradHessian(model, data, loss, params="a.weight").to_dense()
    expected = loss_hessian(model, data, case.sample_loss, "a")
    assert relative_error(R, expected) <= 1e-10
    found = hk.kronecker_factors(model, data, loss, output="empirical")
    own = hk.kronecker_factors(model, data, case.loss, output="empirical")
    for layer in own:
        assert relative_error(found[layer].output_hessian, own[layer].output_hessian) <= 1e-12


def test_custom_loss_without_a_value_says_what_is_missing() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    R = hk.AutogradHessian(model, data, RootLoss(), params="a.weight")
    with pytest.raises(NotImplementedError, match=r"per_sample\(outputs, targets\) -> \[N\]"):
        _ = R @ torch.ones(12).double()
    with pytest.raises(NotImplementedError, match="output='empirical'"):
        hk.kronecker_factors(model, data, RootLoss(), output="empirical")


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        (lambda f, t: None, TypeError, "output_root must return a tensor, got NoneType"),
        (lambda f, t: f, ValueError, r"output_root must return \[N, r, .*4\], got \[5, 4\]"),
        (lambda f, t: f[:, :, None].expand(5, 4, 5), ValueError, r"got \[5, 4, 5\]"),
        (lambda f, t: f[:3, None], ValueError, r"got \[3, 1, 4\]"),
        (lambda f, t: f[:, None] * float("nan"), ValueError, "contain NaN or Inf in batch 0"),
    ],
)
def test_bad_custom_roots(root: Any, error: type[Exception], message: str) -> None:
    model = seeded(Shaped((4,)))
    data = LOSSES["cross-entropy"].data()
    with pytest.raises(error, match=message):
        hk.kronecker_factors(model, data, output_root=root)
    with pytest.raises(error, match=message):
        hk.layer_hessians(model, data, output_root=root)


# Sampled targets


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
    draws = [
        hk.kronecker_factors(model, data, case.loss, output="mc", mc_samples=40, seed=seed)
        for seed in range(40)
    ]
    for layer in ("a", "b"):
        assert_unbiased(
            torch.stack([f[layer].output_hessian for f in draws]), exact[layer].output_hessian
        )
        assert torch.equal(draws[0][layer].input_covariance, exact[layer].input_covariance)


def test_sampled_rows_of_a_custom_root_are_unbiased() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    exact = hk.kronecker_factors(model, data, case.loss)["a"].output_hessian
    draws = [
        hk.kronecker_factors(
            model, data, output_root=softmax_root, output="mc", mc_samples=40, seed=seed
        )["a"].output_hessian
        for seed in range(40)
    ]
    assert_unbiased(torch.stack(draws), exact)


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
    draws = [
        hk.kronecker_factors(model, case.data(), case.loss, output="mc", mc_samples=40, seed=seed)
        for seed in range(40)
    ]
    for layer in ("a", "b"):
        expected = exact[layer].output_hessian
        assert relative_error(empirical[layer].output_hessian, expected) <= 1e-12
        assert_unbiased(torch.stack([f[layer].output_hessian for f in draws]), expected)


# Rows made a few at a time


@pytest.mark.parametrize(
    "name", ["cross-entropy", "label smoothing", "ignore_index", "two classes"]
)
def test_rows_of_classes_made_a_few_at_a_time_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LOSSES[name]
    outputs, targets = randn(5, *case.shape).mul_(3), case.targets(5, 5)
    together = resolve_loss(case.loss).exact(outputs, targets)
    for size in (0, 2 * outputs.nbytes):
        monkeypatch.setattr("hesskern.passes.losses._TOGETHER_BYTES", size)
        few = resolve_loss(case.loss).exact(outputs, targets)
        assert together.count == few.count == case.shape[0] - 1
        for j in (*range(together.count), 0):
            assert torch.equal(together.row(j), few.row(j))


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_random_rows_are_drawn_in_order(name: str) -> None:
    case = LOSSES[name]
    outputs, targets = randn(5, *case.shape), case.targets(5, 5)
    rows = resolve_loss(case.loss).sampled(outputs, targets, 3, torch.Generator().manual_seed(1))
    assert not torch.equal(rows.row(0), rows.row(1))
    for index in (1, 0):
        with pytest.raises(RuntimeError, match="out of order"):
            rows.row(index)


# Too many rows


def linear_outputs(*shape: int) -> tuple[nn.Module, Tensor]:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(-1, *(1,) * len(shape)).expand(-1, *shape)

    return seeded(Wide()), randn(2, 2)


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "rows"),
    [
        (nn.CrossEntropyLoss(), (2**16 + 2,), torch.zeros(2, dtype=torch.long), "65,537"),
        (nn.CrossEntropyLoss(), (501, 500), torch.zeros(2, 500, dtype=torch.long), "250,000"),
        (nn.MSELoss(), (257, 256), torch.zeros(2, 257, 256), "65,792"),
        (nn.BCEWithLogitsLoss(), (2**16 + 1,), torch.zeros(2, 2**16 + 1), "65,537"),
    ],
)
def test_more_exact_rows_than_anybody_waits_for(
    loss: nn.Module,
    shape: tuple[int, ...],
    targets: Tensor,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = linear_outputs(*shape)

    def backward(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("no backward pass may have begun")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", backward)
        for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
            with pytest.raises(
                ValueError, match=rf"{rows} root rows per sample .* limit is 65,536\. .*output='mc'"
            ):
                call(model, [(x, targets)], loss)
    for output in ("mc", "empirical"):
        hk.kronecker_factors(model, [(x, targets)], loss, output=output)


def test_the_limit_of_rows_itself_is_taken() -> None:
    outputs = randn(1, 2**16 + 1)
    loss = resolve_loss(nn.CrossEntropyLoss())
    assert loss.exact(outputs, torch.zeros(1, dtype=torch.long)).count == 2**16


def test_a_custom_root_may_have_any_number_of_rows() -> None:
    root = torch.ones(1, 1, 1).double().expand(1, 2**16 + 1, 2)
    assert resolve_loss(None, lambda f, t: root).exact(randn(1, 2), None).count == 2**16 + 1


# Classes in the wrong axis


@pytest.mark.parametrize(
    ("shape", "found", "message"),
    [
        (
            (4, 3),
            (4,),
            r"\[5, 4\] fit outputs \[5, 4, 3\] .* last axis; .* logits.transpose\(1, 2\)",
        ),
        ((2, 4, 3), (2, 4), r"\[5, 2, 4\] fit outputs \[5, 2, 4, 3\] .* logits.movedim\(-1, 1\)"),
        ((3, 3), (3,), r"\[5, 3\] fit outputs \[5, 3, 3\] whether .* targets.unsqueeze\(-1\)"),
        ((3, 3, 3), (3, 3), r"fit outputs \[5, 3, 3, 3\] whether .* logits.movedim\(-1, 1\)"),
    ],
)
def test_classes_in_the_last_axis(
    shape: tuple[int, ...], found: tuple[int, ...], message: str
) -> None:
    model = seeded(Shaped(shape))
    data = [(randn(5, 3), classes(5, *found, c=3))]
    for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(ValueError, match=message):
            call(model, data, nn.CrossEntropyLoss())
    R = hk.AutogradHessian(model, data, nn.CrossEntropyLoss(), params=["a.weight"])
    with pytest.raises(ValueError, match=message):
        _ = R @ torch.ones(12).double()


class Changed(nn.Module):
    """A model with something done to its logits."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 3)])
def test_the_way_out_of_an_ambiguous_class_axis(last: bool, shape: tuple[int, ...]) -> None:
    model, loss = seeded(Shaped(shape)), nn.CrossEntropyLoss()
    x, targets = randn(5, 3), classes(5, *shape[1:], c=3)

    def moved(logits: Tensor) -> Tensor:
        return logits.movedim(-1, 1) if last else logits

    wrapped = Changed(model, lambda logits: moved(logits).unsqueeze(-1))
    found = hk.layer_hessians(wrapped, [(x, targets.unsqueeze(-1))], loss)
    for layer in "ab":
        expected = gauss_newton(model, [(x, targets)], lambda f, t: loss(moved(f), t), layer)
        H = found[f"inner.{layer}"]
        assert relative_error(H.to_dense(), expected) <= 1e-10


# What is refused, by name


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(4)), NotImplementedError, "CrossEntropyLoss.weight"),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(4)),
            NotImplementedError,
            "BCEWithLogitsLoss.weight",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)),
            NotImplementedError,
            "BCEWithLogitsLoss.pos_weight=....",
        ),
        (
            nn.CrossEntropyLoss(reduction="none"),
            ValueError,
            "reduction must be 'mean' or 'sum', got 'none'",
        ),
        (nn.MSELoss(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        (nn.L1Loss(), TypeError, r"loss must be nn.CrossEntropyLoss\(\).*got L1Loss"),
        (nn.CrossEntropyLoss, TypeError, "loss must be .* got <class"),
        (F.cross_entropy, TypeError, "loss must be .* got <function cross_entropy"),
        ("cross_entropy", TypeError, "loss must be .* got 'cross_entropy'"),
        (None, TypeError, "loss must be .* got None"),
    ],
)
def test_refused_losses(loss: Any, error: type[Exception], message: str) -> None:
    model, data = seeded(Shaped((4,))), LOSSES["cross-entropy"].data()
    for call in (
        lambda: hk.kronecker_factors(model, data, loss),
        lambda: hk.layer_hessians(model, data, loss),
        lambda: hk.FactorAccumulator(model, loss),
        lambda: hk.AutogradHessian(model, data, loss, params=["a.weight"]),
    ):
        with pytest.raises(error, match=message):
            call()


def test_output_root_that_is_not_callable() -> None:
    model, data = seeded(Shaped((4,))), LOSSES["cross-entropy"].data()
    with pytest.raises(TypeError, match="output_root must be callable, got int"):
        hk.kronecker_factors(model, data, output_root=3)


@pytest.mark.parametrize(
    ("name", "targets", "error", "message"),
    [
        ("cross-entropy", torch.tensor([0, 1, 4, 0, 0]), ValueError, r"lie in \[0, 4\).*found 4"),
        (
            "cross-entropy",
            torch.tensor([0, -1, 0, 0, 0]),
            ValueError,
            r"index=-100; found -1",
        ),
        (
            "cross-entropy",
            torch.zeros(4, dtype=torch.long),
            ValueError,
            r"must be \[5\], got \[4\]",
        ),
        ("cross-entropy", torch.zeros(5, 1, dtype=torch.long), ValueError, r"\[5\], got \[5, 1\]"),
        ("cross-entropy", torch.zeros(5, dtype=torch.int32), TypeError, "int64.*got torch.int32"),
        ("cross-entropy", torch.zeros(5, dtype=torch.bool), TypeError, "int64.*got torch.bool"),
        (
            "cross-entropy",
            torch.zeros(5).double(),
            ValueError,
            r"\[5, 4\] for .* got \[5\]",
        ),
        ("cross-entropy", torch.full((5, 4), 0.5).double(), ValueError, "sums from 2 to 2"),
        ("cross-entropy", torch.full((5, 4), torch.nan).double(), ValueError, "sum to one"),
        ("cross-entropy", [0, 1, 2, 3, 0], TypeError, "targets must be a tensor, got list"),
        ("tokens", torch.zeros(5, dtype=torch.long), ValueError, r"must be \[5, 4\], got \[5\]"),
        ("mse", torch.zeros(5).double(), ValueError, r"shape \[5, 4\] for MSELoss, got \[5\]"),
        ("mse", None, TypeError, "targets must be a tensor for MSELoss, got NoneType"),
        ("bce", torch.full((5, 4), 1.5).double(), ValueError, r"lie in \[0, 1\].*from 1.5 to 1.5"),
        ("bce", torch.full((5, 4), torch.nan).double(), ValueError, r"lie in \[0, 1\]"),
        ("bce", torch.zeros(5, 3).double(), ValueError, r"\[5, 4\] for BCEWithLogitsLoss, got"),
    ],
)
def test_targets_that_do_not_fit(
    name: str, targets: Any, error: type[Exception], message: str
) -> None:
    case = LOSSES[name]
    model = seeded(Shaped(case.shape))
    data = [(randn(5, 3), targets)]
    stream = hk.FactorAccumulator(model, case.loss)
    for call in (
        lambda: hk.kronecker_factors(model, data, case.loss),
        lambda: hk.layer_hessians(model, data, case.loss),
        lambda: stream.update(*data[0]),
        lambda: (
            hk.AutogradHessian(model, data, case.loss, params=["a.weight"])
            @ torch.ones(12).double()
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_outputs_without_a_class_axis() -> None:
    model = seeded(Shaped(()))
    with pytest.raises(ValueError, match=r"outputs must be \[N, c\].*got \[5\]"):
        hk.kronecker_factors(model, [(randn(5, 3), classes(5, c=2))], nn.CrossEntropyLoss())
