"""Random models: every number is right or refused with a reason; and the fuzzer's own checks."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import gauss_newton, loss_hessian, relative_error
from fuzz.builder import PRODUCTIONS, Builder
from fuzz.data import Batch
from fuzz.grammar import REJECTED, Case, draw, steady
from fuzz.layers import make_linear
from fuzz.on_device import ANSWERS, judge_on
from fuzz.reference import Reference
from fuzz.runner import Statistics, report
from fuzz.verdict import judge
from torch import Tensor

import hesskern as hk

CHUNK = 10


@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_random_models_are_right_or_refused(first: int) -> None:
    failed = [v for v in (judge(draw(seed)) for seed in range(first, first + CHUNK)) if v.bad]
    assert not failed, "\n".join(report(verdict) for verdict in failed)


def plain_cases(count: int) -> list[Case]:
    """Cases without anything odd, in float64, with layers that have curvature."""
    found: list[Case] = []
    seed = 5000
    while len(found) < count:
        case = draw(seed)
        seed += 1
        program = case.program
        if not program.plain or program.cuts or program.odd or case.dtype != torch.float64:
            continue
        rows = all(len(b.targets) == len(b.inputs["x"]) for b in case.batches)
        if "outputs with logits" in program.features:
            continue
        if not rows or len(case.batches[0].inputs) > 1 or not layer_names(case):
            continue
        reference = Reference(case)
        try:
            for name in layer_names(case):
                weight = case.model().get_parameter(f"{name}.weight")
                vectors = torch.ones(weight.numel(), 1, dtype=torch.float64)
                reference.hessian_product([f"{name}.weight"], vectors)
        except RuntimeError:
            # Some operations have no second derivative.
            continue
        if reference.scale > 1e-3:
            found.append(case)
    return found


@pytest.fixture(scope="module")
def plain() -> list[Case]:
    return plain_cases(12)


def layer_names(case: Case) -> list[str]:
    model = case.model()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d))
    ]


def test_the_reference_agrees_with_another_one(plain: list[Case]) -> None:
    for case in plain:
        reference, model = Reference(case), case.model()
        data = [(batch.inputs["x"], batch.targets) for batch in case.batches]

        def loss(outputs: Tensor, targets: Any, case: Case = case) -> Tensor:
            value = case.loss.sample(outputs, targets)
            return 0 * outputs.sum() if value is None else value

        # Samples that do not count weigh nothing there.
        weights = [
            torch.tensor(
                [
                    0.0 if case.loss.sample(torch.zeros_like(o), y) is None else w
                    for o, y, w in zip(
                        model.eval()(batch.inputs["x"]).split(1),
                        batch.targets.split(1),
                        [1.0] * len(batch.targets)
                        if batch.weight is None
                        else batch.weight.tolist(),
                        strict=True,
                    )
                ],
                dtype=torch.float64,
            )
            for batch in case.batches
        ]
        for name in layer_names(case):
            part = reference.slices[f"{name}.weight"]
            block = reference.gauss_newton[part, part]
            expected = gauss_newton(model, data, loss, name, weights=weights)
            assert relative_error(block, expected) < 1e-9 or float(expected.norm()) < 1e-12
            hessian = loss_hessian(model, data, loss, name, weights=weights)
            vectors = torch.randn(len(block), 2, dtype=torch.float64)
            products = reference.hessian_product([f"{name}.weight"], vectors)
            assert torch.allclose(products, hessian @ vectors, rtol=1e-8, atol=1e-10)


def test_plain_models_are_right(plain: list[Case]) -> None:
    for case in plain:
        wrong = [f for f in judge(case).findings if f.outcome in ("WRONG", "CRASH", "CHANGED")]
        assert not wrong, (wrong, case.describe())


def test_a_seed_is_one_case() -> None:
    code = "from fuzz.grammar import draw; print(draw(17).describe())"
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={"PYTHONHASHSEED": "3", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == draw(17).describe().strip()


STARTS = {
    "v": ("x", (4, 4)),
    "s": ("x", (4, 3, 4)),
    "f": ("x.transpose(0, 1)", (4, 3, 4)),
    "t": ("x.reshape(-1, 4)", (4, 3, 4)),
    "1": ("x", (4, 2, 5)),
    "2": ("x", (4, 2, 4, 4)),
}


@pytest.mark.parametrize("name", PRODUCTIONS)
def test_every_rule_applies_to_all_its_layouts(name: str) -> None:
    rule = PRODUCTIONS[name]
    for layout in rule.layouts:
        expression, shape = STARTS[layout]
        seeds = iter(range(100))
        while True:
            builder = Builder(random.Random(next(seeds)), {"x": torch.ones(shape).double() / 3})
            value = builder.value(f"{expression}.sin()", layout)
            make_linear(builder, 4, 4, "module")
            value = builder.value(f"{value.name}.tanh()", value.layout)
            if builder.attempt(rule, value) is not None:
                break


class SignOfZero(torch.nn.Module):
    """A gate by a sum that is zero but for rounding."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.layer, self.shift = torch.nn.Linear(3, 3, dtype=torch.float64), shift

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(self.layer(x), (3,))
        return h * (h.sum(1, keepdim=True) > self.shift)


def test_models_that_hang_on_rounding_are_not_drawn() -> None:
    source = torch.Generator().manual_seed(1)
    batch = Batch({"x": torch.randn(6, 3, generator=source, dtype=torch.float64)})
    assert not steady(SignOfZero(0.0), batch, source)
    assert steady(SignOfZero(-0.5), batch, source)


def test_models_that_torch_differentiates_wrongly_are_not_drawn() -> None:
    """An instance norm before attention: torch's own gradient is off by more than half."""
    draw(3002121)
    assert REJECTED[-1] == "Rejected: torch's gradient is not the derivative"


def scaled(result: dict[str, Any]) -> dict[str, Any]:
    for H in result.values():
        H.num_samples = H.num_samples * 1.000001
    return result


def called_exact(result: dict[str, Any]) -> dict[str, Any]:
    for H in result.values():
        H.is_exact = True
    return result


def shortened(result: dict[str, Any]) -> dict[str, Any]:
    result.pop(next(iter(result)))
    return result


@pytest.mark.parametrize(
    ("spoil", "outcome"), [(scaled, "WRONG"), (shortened, "DROPPED")], ids=["scaled", "dropped"]
)
def test_a_spoilt_answer_is_found(
    plain: list[Case], spoil: Callable[[Any], Any], outcome: str
) -> None:
    for case in plain:
        before = {(f.layer, f.outcome) for f in judge(case).findings}

        def answer(*args: Any, **options: Any) -> Any:
            return spoil(hk.layer_hessians(*args, **options))

        found = {(f.layer, f.outcome) for f in judge(case, {"layer_hessians": answer}).findings}
        assert outcome in {kind for _, kind in found - before}, case.describe()


def scaled_values(E: hk.EKFAC) -> hk.EKFAC:
    for layer in E.values():
        layer.values *= 1.000001
    return E


def scaled_scores(found: hk.Influence) -> hk.Influence:
    parts = found.scores.values() if isinstance(found.scores, dict) else [found.scores]
    for part in parts:
        part *= 1.000001
    return found


@pytest.mark.parametrize(
    ("entry", "spoil"),
    [
        ("ekfac", scaled_values),
        ("influence", scaled_scores),
    ],
)
def test_spoilt_answers_of_what_is_built_on_factors_are_found(
    plain: list[Case], entry: str, spoil: Callable[[Any], Any]
) -> None:
    function, found = getattr(hk, entry), 0

    def answer(*args: Any, **options: Any) -> Any:
        return spoil(function(*args, **options))

    for case in plain:
        findings = judge(case, {entry: answer}, thorough=True).findings
        found += any(f.outcome == "WRONG" and f.entry.startswith(entry) for f in findings)
    assert found >= len(plain) / 2


def test_a_block_that_is_called_exact_in_vain_is_found() -> None:
    found = 0
    for seed in range(5000, 5040):
        case = draw(seed)
        if not case.program.plain or case.dtype != torch.float64:
            continue

        def answer(*args: Any, **options: Any) -> Any:
            return called_exact(hk.layer_hessians(*args, **options))

        findings = judge(case, {"layer_hessians": answer}).findings
        found += any("is_exact=True" in finding.detail for finding in findings)
    assert found >= 3


def test_errors_of_other_makers_are_crashes(plain: list[Case]) -> None:
    def crashing(*_: Any, **__: Any) -> Any:
        raise KeyError("weight")

    def torchs(*_: Any, **__: Any) -> Any:
        return torch.zeros(2) @ torch.zeros(3)

    for answer in (crashing, torchs):
        findings = judge(plain[0], {"GaussNewton": answer}).findings
        assert "CRASH" in {f.outcome for f in findings if f.entry == "GaussNewton"}


def test_a_model_that_comes_back_changed_is_found(plain: list[Case]) -> None:
    def changing(model: Any, *args: Any, **options: Any) -> Any:
        result = hk.kronecker_factors(model, *args, **options)
        next(model.parameters()).data.add_(1e-3)
        return result

    findings = judge(plain[0], {"kronecker_factors": changing}).findings
    assert "CHANGED" in {f.outcome for f in findings}


def test_statistics_add_up(plain: list[Case]) -> None:
    verdict = judge(plain[0])
    one, both = Statistics(), Statistics()
    one.add(verdict)
    both.merge(one)
    both.merge(one)
    assert both.models == 2
    assert sum(both.outcomes.values()) == 2 * len(verdict.findings)
    assert "2 models" in both.table()


def test_two_devices_are_compared() -> None:
    """Of one device with itself nothing is found; of what is said otherwise on the second, all."""
    cpu = torch.device("cpu")
    cases = [draw(seed) for seed in range(12)]
    assert not [finding for case in cases for finding in judge_on(cpu, case).bad]

    def off(model: Any, data: Any, loss: Any, **options: Any) -> dict[str, Tensor]:
        found = ANSWERS["kronecker_factors"](model, data, loss, **options)
        return {name: 1.5 * tensor for name, tensor in found.items()}

    def refusing(model: Any, data: Any, loss: Any, **options: Any) -> dict[str, Tensor]:
        raise ValueError("model is of another device")

    def changing(model: Any, data: Any, loss: Any, **options: Any) -> dict[str, Tensor]:
        model.train(not model.training)
        return ANSWERS["kronecker_factors"](model, data, loss, **options)

    for answer, outcome in ((off, "WRONG"), (refusing, "CRASH"), (changing, "CHANGED")):
        told = {**ANSWERS, "kronecker_factors": answer}
        verdicts = [judge_on(cpu, case, told) for case in cases]
        found = [{f.outcome for f in v.bad if f.entry == "kronecker_factors"} for v in verdicts]
        assert sum(outcome in outcomes for outcomes in found) > len(cases) / 2
