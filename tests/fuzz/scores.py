"""Gradients of single samples by a plain loop, and influence scores held against them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import hesskern as hk
from fuzz.data import Batch
from fuzz.program import plain_torch
from fuzz.reference import run_model
from fuzz.verdict import Judge

__all__ = ["influence", "joint", "one_root_row", "samples_alone"]


def joint(rng: random.Random) -> dict[str, Any]:
    """Sometimes blocks with biases."""
    return {"bias": "joint"} if rng.random() < 0.3 else {}


def one_root_row(judge: Judge) -> bool:
    """Whether a sample has one target, whose loss's gradient is what "empirical" takes."""
    kind = judge.case.loss.kind
    tokens = any(batch.targets.dim() > 1 for batch in judge.case.batches)
    return kind == "custom" or (kind == "ce" and not tokens)


def samples_alone(judge: Judge) -> tuple[Tensor, Tensor] | None:
    """Gradients [n, P] of the samples' own losses, each run alone, and their weights [n].

    None where a sample has another gradient in its batch: nobody could say then which is meant.
    """
    case, reference = judge.case, judge.reference
    model = case.reference(lambda name, x, z: z)
    rows, weights = [], []
    with plain_torch():
        for batch in case.batches:
            outputs, parameters = run_model(model, case, batch)
            if len(outputs) != len(batch.inputs["x"]):
                return None
            for n in range(len(outputs)):
                part = slice(n, n + 1)
                one = Batch({k: t[part] for k, t in batch.inputs.items()}, batch.targets[part])
                there = _gradient(judge, outputs[part], one.targets, parameters)
                try:
                    row = _gradient(judge, *_of(judge, model, one))
                except (RuntimeError, ValueError, IndexError):
                    return None
                if judge.error(row, there, 1e-8) is not None:
                    return None
                rows.append(row)
                weights.append(1.0 if batch.weight is None else float(batch.weight[n]))
                if case.loss.sample(outputs[part].detach(), one.targets) is None:
                    weights[-1] = 0.0
    weight = torch.tensor(weights, dtype=torch.float64).to(case.dtype).double()
    assert rows[0].shape == (len(reference.gauss_newton),)
    return torch.stack(rows), weight


def _of(judge: Judge, model: Any, one: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    outputs, parameters = run_model(model, judge.case, one)
    if len(outputs) != 1:
        raise ValueError("no output of its own")
    return outputs, one.targets, parameters


def _gradient(
    judge: Judge, outputs: Tensor, targets: Tensor, parameters: Mapping[str, Tensor]
) -> Tensor:
    """[P] of one sample's loss."""
    slices = judge.reference.slices
    row = torch.zeros(len(judge.reference.gauss_newton), dtype=torch.float64)
    loss = judge.case.loss.sample(outputs.double(), targets)
    if loss is None or not loss.requires_grad:
        return row
    real = [name for name in parameters if name in slices]
    given = [parameters[name] for name in real]
    found = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True)
    for name, gradient in zip(real, found, strict=True):
        if gradient is not None:
            row[slices[name]] = gradient.double().reshape(-1)
    return row


# Influence


def influence(judge: Judge, rng: random.Random) -> None:
    found = samples_alone(judge)
    kind = rng.choice(("factors", "ekfac", "identity"))
    entry = f"influence {kind}"
    E: Any = None
    biased = False
    if kind == "factors":
        E = judge.factors
    elif kind == "ekfac":
        options: dict[str, Any] = {"output": "exact", **joint(rng)}
        biased = "bias" in options
        try:
            E = judge.made("ekfac", options)
        except (ValueError, TypeError, NotImplementedError):
            # Looked at elsewhere.
            return
    damping: Any = "mean"
    if E is not None and rng.random() < 0.6:
        damping = {name: 0.1 + rng.random() for name in E} if rng.random() < 0.3 else 0.3
    if damping == "mean" and E is not None and any(not trace > 0 for trace in _traces(E)):
        damping = 0.5
    chosen: dict[str, Any] = {"damping": damping, "per_layer": True}
    how = rng.choice(("whole", "whole", "sums", "tokens", "top", "rank"))
    if how in ("sums", "top"):
        chosen["per_layer"] = False
    if how == "tokens":
        chosen["per_token"] = True
    if how == "top":
        chosen["top"] = rng.randint(1, 4)
    if how == "rank":
        chosen["query_rank"] = 100
    if rng.random() < 0.6:
        chosen["batch_size"] = rng.choice((1, 2, 3, 100))
    number = rng.randrange(len(judge.data))
    queries = [judge.data[number]]

    def make() -> hk.Influence:
        function = judge.functions["influence"]
        loss = judge.case.loss.loss
        return function(E, judge.model, queries, judge.data, loss, **chosen)

    def see(result: hk.Influence) -> None:
        by_size = any("len(x)" in line for line in judge.case.program.body)
        if found is None or ("route" in judge.case.program.features and by_size):
            judge.add(entry, "*", "unchecked", "samples are not on their own")
            return
        sizes = [len(batch.inputs["x"]) for batch in judge.case.batches]
        begin = sum(sizes[:number])
        _Scores(judge, f"{entry} {how}", E, biased, result).see(
            found[0][begin : begin + sizes[number]], found[0]
        )

    judge.watched(f"{entry} {how}", make, see)


def _traces(E: Any) -> Iterator[float]:
    for layer in E.values():
        yield (layer.operator() if isinstance(layer, hk.LayerFactors) else layer).trace()


class _Scores:
    """Scores against dense solves."""

    def __init__(self, judge: Judge, entry: str, E: Any, joint: bool, result: hk.Influence) -> None:
        self.judge, self.entry, self.E, self.joint = judge, entry, E, joint
        self.result = result

    def see(self, queries: Tensor, train: Tensor) -> None:
        judge, result = self.judge, self.result
        names = list(result.layers)
        if self.E is None:
            judge.account(self.entry, names, result.skipped)
        for name in self.E or ():
            if name not in names and name not in result.skipped:
                judge.add(self.entry, name, "DROPPED", "neither there nor in .skipped")
        expected = {}
        for name in names:
            order = judge.entries(name, self.joint)
            if order is None:
                judge.add(self.entry, name, "WRONG", "a number where there is no such block")
                return
            expected[name] = self._layer(name, queries[:, order], train[:, order])
            # A gradient far below the others' has no digits in float32.
            faint = float(train[:, order].norm()) < 1e-4 * float(train.norm())
            if judge.narrow and faint and self.E is not None:
                judge.add(self.entry, name, "unchecked", "gradients without digits")
                return
        if self.E is not None and "tied to the embedding" in judge.case.program.features:
            judge.add(self.entry, "*", "unchecked", "the linear use of a weight alone")
            return
        total = torch.stack(list(expected.values())).sum(0)
        if result.indices is not None:
            self._see_top(total)
        elif isinstance(result.scores, Tensor):
            self._see("*", result.scores, total)
        else:
            for name, scores in result.scores.items():
                self._see(name, scores, expected[name])
        if self.E is not None:
            self._see_left(names, queries, train)

    def _see_left(self, names: list[str], queries: Tensor, train: Tensor) -> None:
        """Layers of E that are not there have no gradient of a query."""
        for name in self.E:
            order = self.judge.entries(name, self.joint)
            if name in names or order is None:
                continue
            if float(queries[:, order].norm()) > 1e-9:
                reason = self.result.skipped.get(name, "")
                self.judge.add(self.entry, name, "refused", reason)

    def _layer(self, name: str, queries: Tensor, train: Tensor) -> Tensor:
        if self.E is None:
            return queries @ train.T
        layer = self.E[name]
        operator = layer.operator() if isinstance(layer, hk.LayerFactors) else layer
        dense = operator.to_dense().double()
        dense += self.result.damping[name] * torch.eye(len(dense), dtype=torch.float64)
        return torch.linalg.solve(dense, queries.T).T @ train.T

    def _see(self, name: str, scores: Tensor, expected: Tensor) -> None:
        found = scores.sum(2) if scores.dim() == 3 else scores
        error = self.judge.error(found, expected, 1e-3 if self.judge.narrow else 1e-8)
        self.judge.add(self.entry, name, "right" if error is None else "WRONG", error or "")

    def _see_top(self, total: Tensor) -> None:
        scores, indices = self.result.scores, self.result.indices
        assert isinstance(scores, Tensor)
        assert indices is not None
        count = min(scores.shape[1], total.shape[1])
        self._see("*", scores, total.topk(count, 1).values)
        self._see("* indices", scores, total.gather(1, indices))
