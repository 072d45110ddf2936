"""Factors and root rows of native transformers by a loop over samples and autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn_rows import uniform_numbers
from torch import Tensor, nn
from transformer_models import transformers

import hesskern as hk

Conv1D = transformers.pytorch_utils.Conv1D

SEED = 3
SAMPLES = 3
# Where a label's term stands: "next" at the position before it, "same" at its own.
PLACES = {"gpt2": "next", "llama": "next", "mixtral": "next", "t5": "same"}
# Their norms take squares in float32, whatever the model's dtype: so far two orders agree.
NARROW_NORMS = {"llama": 1e-6, "mixtral": 1e-6, "t5": 1e-6}


class ExpertsApart(nn.Module):
    """Experts that transformers keeps in two parameters, as modules of the same names."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        for name in ("gate_up_proj", "down_proj"):
            layers = nn.ModuleList()
            for weight in getattr(fused, name):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight = nn.Parameter(weight.detach().clone())
                layers.append(layer)
            setattr(self, name, layers)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, (first, second) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):  # type: ignore[arg-type]
            for token, place in (chosen == e).nonzero().tolist():
                gate, up = first(x[token : token + 1]).chunk(2, dim=-1)
                y = second(self.act_fn(gate) * up) * weights[token, place]
                out = out.index_add(0, torch.tensor([token]), y)
        return out


def with_experts_apart(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if hasattr(module, "experts"):
            module.experts = ExpertsApart(module.experts)
    return model


class Loop:
    """Factors by a loop over samples, each run through the model alone, in its own dtype.

    Attributes:
        inputs, sums, outputs: by layer, the sums of x x^T, x and M over samples and positions.
        positions: by layer, the number of positions over all samples.
        products: by layer, of every sample and root row the sum of s x^T over its positions [m, d],
            times the root of the sample's weight.
        weight: of all samples.
    """

    def __init__(self, model: nn.Module, place: str, output: str, by_token: bool = False) -> None:
        self.model, self.place, self.output, self.by_token = model, place, output, by_token
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d, Conv1D))
        }
        self.inputs: dict[str, Any] = dict.fromkeys(self.layers, 0.0)
        self.outputs: dict[str, Any] = dict.fromkeys(self.layers, 0.0)
        self.sums: dict[str, Any] = dict.fromkeys(self.layers, 0.0)
        self.positions = dict.fromkeys(self.layers, 0.0)
        self.products: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.weight = 0.0
        self.seen = 0

    @contextmanager
    def calls(self) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """By layer, rows of inputs and the output of every call."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, z: Tensor) -> None:
                x = args[0].detach()
                if isinstance(module, nn.Conv2d):
                    x = F.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)
                found[name].append((x.reshape(-1, x.shape[-1]).double(), z))

            return hook

        handles = [module.register_forward_hook(note(n)) for n, module in self.layers.items()]
        yield found
        for handle in handles:
            handle.remove()

    def add(self, batch: dict[str, Tensor]) -> None:
        for i in range(len(batch["labels"])):
            sample = {key: value[i : i + 1] for key, value in batch.items()}
            labels = sample.pop("labels")
            with self.calls() as calls:
                if "decoder_input_ids" not in sample and self.model.config.is_encoder_decoder:
                    # The label before, behind the token that starts.
                    start = torch.zeros_like(labels[:, :1])
                    sample["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], 1).clamp(min=0)
                logits = self.model(**sample).logits
            logits = logits.reshape(-1, logits.shape[-1])
            terms = labels.reshape(-1)
            if self.place == "next":
                terms = torch.cat([terms[1:], torch.tensor([-100])])
            labelled = (terms != -100).nonzero().flatten().tolist()
            weight = float(len(labelled)) if self.by_token else float(len(labelled) > 0)
            self.weight += weight
            # One per labelled token, and for every draw.
            numbers = uniform_numbers(SEED, self.seen, len(labelled) * SAMPLES)
            uniform = torch.zeros(len(terms), SAMPLES, dtype=torch.float64)
            uniform[labelled] = torch.tensor(numbers, dtype=torch.float64).reshape(-1, SAMPLES)
            self.seen += 1
            rows = self.rows(logits.detach().double(), terms, labelled, uniform)
            for name, uses in calls.items():
                for x, _ in uses:
                    self.inputs[name] += weight * x.T @ x
                    self.sums[name] += weight * x.sum(0)
                    self.positions[name] += weight * len(x)
            edges = [z for uses in calls.values() for _, z in uses]
            for row in rows:
                gradients = iter(
                    torch.autograd.grad(
                        logits, edges, row.to(logits), retain_graph=True, allow_unused=True
                    )
                )
                for name, uses in calls.items():
                    product: Any = 0.0
                    for x, _ in uses:
                        g = next(gradients)
                        if g is None:
                            continue
                        if isinstance(self.layers[name], nn.Conv2d):
                            g = g.flatten(2).transpose(1, 2)
                        g = g.reshape(-1, g.shape[-1]).double()
                        self.outputs[name] += weight * g.T @ g
                        product = product + math.sqrt(weight) * g.T @ x
                    if isinstance(product, Tensor):
                        self.products[name].append(product)

    def rows(
        self, logits: Tensor, terms: Tensor, labelled: list[int], uniform: Tensor
    ) -> list[Tensor]:
        """Rows [T, V] whose outer products sum to the Hessian of the mean, or estimate it."""
        p = logits.softmax(1)
        found = []
        if self.output == "exact":
            for t in labelled:
                for j in range(p.shape[1]):
                    row = torch.zeros_like(p)
                    row[t] = -p[t]
                    row[t, j] += 1
                    found.append(row * (p[t, j] / len(labelled)).sqrt())
            return found
        for draw in range(SAMPLES if self.output == "mc" else 1):
            row = torch.zeros_like(p)
            for t in labelled:
                if self.output == "mc":
                    k = int((p[t].cumsum(0) > uniform[t, draw] * p[t].sum()).nonzero()[0])
                else:
                    k = int(terms[t])
                row[t] = p[t]
                row[t, k] -= 1
            draws = SAMPLES if self.output == "mc" else 1
            found.append(row / math.sqrt(max(len(labelled), 1) * draws))
        return found

    def check(self, factors: hk.Factors, tolerance: float) -> None:
        """Compares every layer that the factors have."""
        assert factors.num_samples == pytest.approx(self.weight)
        for name in factors:
            if name not in self.layers:
                continue
            found = factors[name]
            close(found.input_covariance, self.inputs[name] / self.weight, tolerance, name)
            close(found.output_hessian, self.outputs[name] / self.positions[name], tolerance, name)
            assert found.positions == pytest.approx(self.positions[name] / self.weight)


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    scale = float(expected.abs().max())
    assert scale > 0, name
    assert float((found.double() - expected).abs().max()) <= tolerance * scale, name
