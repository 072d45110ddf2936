"""Hessians, Gauss-Newton matrices and clusters of native models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_loop import (
    Loop,
    close,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_factors import factors_of
from transformer_models import (
    bert,
    bert_classifier,
    bert_tagger,
    classified_text,
    gpt2,
    images,
    llama,
    masked_text,
    t5,
    tagged_text,
    text,
    translated_text,
    vit,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")

# A model, its loss with transformers' own mean, and a batch.
OWN_LOSSES: dict[str, Any] = {
    "gpt2": (gpt2, hk.CausalLM(reduction="token"), text(3)),
    "llama": (llama, hk.CausalLM(reduction="token"), text(3)),
    "bert": (bert, hk.MaskedLM(reduction="token"), masked_text(3)),
    "bert_tagger": (bert_tagger, hk.TokenClassification(reduction="token"), tagged_text(3)),
    "t5": (t5, hk.Seq2SeqLM(reduction="token"), translated_text(3)),
    "vit": (vit, hk.ImageClassification(), images(4)),
    "single label": (bert_classifier, hk.SequenceClassification(), classified_text(4)),
    "single label [N, 1]": (
        bert_classifier,
        hk.SequenceClassification(),
        {**classified_text(4), "labels": classified_text(4)["labels"].unsqueeze(1)},
    ),
    "single label, int32": (
        bert_classifier,
        hk.SequenceClassification(),
        {**classified_text(4), "labels": classified_text(4)["labels"].int()},
    ),
    "several labels": (
        bert_classifier,
        hk.SequenceClassification(),
        {**classified_text(4), "labels": torch.rand(4, 3, dtype=torch.float64).round()},
    ),
    "regression": (
        lambda: bert_classifier(num_labels=1),
        hk.SequenceClassification(),
        {**classified_text(4), "labels": torch.randn(4, dtype=torch.float64)},
    ),
    "regression of several": (
        lambda: bert_classifier(problem_type="regression"),
        hk.SequenceClassification(problem_type="regression"),
        {**classified_text(4), "labels": torch.randn(4, 3, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("case", OWN_LOSSES)
def test_the_hessian_is_that_of_the_models_own_loss(case: str) -> None:
    make, loss, batch = OWN_LOSSES[case]
    if case == "single label, int32":
        # torch's own cross-entropy takes none of them.
        expected_batch = {**batch, "labels": batch["labels"].long()}
    else:
        expected_batch = batch
    model = make()
    name, weight = next(
        (name, p)
        for name, p in model.named_parameters()
        if name.endswith(("c_attn.weight", "q_proj.weight", "query.weight", ".q.weight"))
    )
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        own = model(**expected_batch).loss
    (gradient,) = torch.autograd.grad(own, weight, create_graph=True)
    vector = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    (expected,) = torch.autograd.grad(gradient, weight, vector)
    H = hk.AutogradHessian(model, [batch], loss, params=[name])
    # Losses of transformers take logits in float32.
    close((H @ vector.flatten()).view_as(weight), expected, 1e-5, name)
    parts = loss.split_batch(batch, 0)
    outputs = loss.run(model, parts.inputs)
    each = loss.per_sample(outputs, parts.targets).detach()
    weights = loss.counted(outputs, parts.targets)
    mean = each.mean() if weights is None else (each * weights).sum() / weights.sum()
    assert float(mean) == pytest.approx(float(own.detach()), rel=1e-6)


@pytest.mark.parametrize("output", ["exact", "mc"])
@pytest.mark.parametrize("case", ["several labels", "regression", "regression of several"])
def test_factors_of_other_problem_types(case: str, output: str) -> None:
    make, loss, batch = OWN_LOSSES[case]
    model = make()
    binary = case == "several labels"
    # The same by torch's losses, which their own tests hold against loops.
    plain = nn.BCEWithLogitsLoss() if binary else nn.MSELoss()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"] if batch["labels"].dim() == 2 else batch["labels"].unsqueeze(1)
    expected = factors_of(model, [(inputs, targets)], plain, output)
    found = factors_of(model, [batch], loss, output)
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name].output_hessian, expected[name].output_hessian)


def block(model: nn.Module, names: list[str], data: list[dict[str, Tensor]]) -> Tensor:
    """Gauss-Newton matrix over weights as they lie in memory, by one backward pass per row."""
    weights = [model.get_parameter(name) for name in names]
    total, n = torch.zeros(()), 0
    loop = Loop(model, "next", "exact")
    for batch in data:
        for i in range(len(batch["labels"])):
            logits = model(input_ids=batch["input_ids"][i : i + 1]).logits[0]
            terms = torch.cat([batch["labels"][i, 1:], torch.tensor([-100])])
            labelled = (terms != -100).nonzero().flatten().tolist()
            for row in loop.rows(logits.detach(), terms, labelled, torch.empty(0)):
                gradients = torch.autograd.grad(logits, weights, row, retain_graph=True)
                flat = torch.cat([g.flatten() for g in gradients])
                total = total + torch.outer(flat, flat)
            n += 1
    return total / n


SMALL = {"n_layer": 1, "n_embd": 4}
BLOCK = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "mlp.c_proj")]


def test_blocks_and_the_gauss_newton_matrix() -> None:
    model, data = gpt2(**SMALL), [text(2), text(1, seed=1)]
    expected = block(model, [f"{name}.weight" for name in BLOCK], data)
    G = hk.GaussNewton(model, data, hk.CausalLM(), layers=BLOCK)
    close(G.to_dense(), expected, 1e-10, "all")
    hessians = hk.layer_hessians(model, data, hk.CausalLM(), layers=BLOCK)
    for name in BLOCK:
        own = expected[G.slices[name], G.slices[name]]
        H = hessians[name]
        close(H.to_dense(), own, 1e-10, name)
        found = hk.eigsh(H, k=3, tol=1e-10)
        close(found.values, torch.linalg.eigvalsh(own).flip(0)[:3], 1e-8, name)
        vector = torch.randn(len(own), generator=torch.Generator().manual_seed(2)).double()
        again = hk.layer_hessians(model, data, hk.CausalLM(), layers=[name], memory_budget=1)[name]
        close(again @ vector, own @ vector, 1e-10, name)


def test_the_position_mean() -> None:
    model, data = llama(num_hidden_layers=1), [text(2), text(1, seed=1)]
    name = "model.layers.0.mlp.down_proj"
    K = hk.position_mean_hessian(model, data, hk.CausalLM(), name)
    expected: Any = 0.0
    for batch in data:
        for i in range(len(batch["labels"])):
            loop = Loop(model, "next", "exact")
            loop.add({key: value[i : i + 1] for key, value in batch.items()})
            M = loop.outputs[name] / loop.positions[name]
            expected = expected + torch.kron(M, loop.inputs[name])
    close(K.to_dense(), expected / 3, 1e-6, name)


def test_clusters_of_a_classifier() -> None:
    model, batches = bert_classifier(), [classified_text(4), classified_text(5, seed=1)]
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in batches]
    layer = "bert.pooler.dense"
    expected = hk.gradient_clusters(model, pairs, layer)
    assert hk.gradient_clusters(model, batches, layer, hk.SequenceClassification()) == expected
    with pytest.raises(ValueError, match=r"must give logits \[N, c\], got \[2, 5, 11\]"):
        hk.gradient_clusters(bert(), [text()], "cls.predictions.transform.dense", hk.MaskedLM())
