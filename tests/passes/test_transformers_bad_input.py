"""Bad batches of transformers: one clear error that names what is wrong, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_models import (
    VOCABULARY,
    bert,
    bert_classifier,
    classified_text,
    gpt2,
    masked_text,
    t5,
    text,
    translated_text,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out")

LM = hk.CausalLM()
CLASSES = hk.SequenceClassification()
Make = Callable[..., nn.Module]


def without(batch: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != key}


class Wrapped(nn.Module):
    """As DataParallel has it: what is inside knows its configuration."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def with_label(value: int) -> dict[str, Tensor]:
    batch = text()
    batch["labels"][1, 3] = value
    return batch


def one_token() -> dict[str, Tensor]:
    return {key: value[:, :1] for key, value in text().items()}


# A model, a loss, a batch, the error and what it says.
BAD: dict[str, tuple[Make, Any, Any, type[Exception], str]] = {
    "no labels": (
        gpt2,
        LM,
        without(text(), "labels"),
        ValueError,
        r"batch 0 has no 'labels', which CausalLM takes; it has 'input_ids', 'attention_mask'\.",
    ),
    "labels are None": (gpt2, LM, {**text(), "labels": None}, ValueError, "has no 'labels'"),
    "labels of another name": (
        bert_classifier,
        CLASSES,
        {**without(classified_text(), "labels"), "label": torch.zeros(3)},
        ValueError,
        r"has no 'labels', which SequenceClassification takes; it has .*'label'\. split=",
    ),
    "lists": (
        gpt2,
        LM,
        {"input_ids": [[3, 4, 5], [6, 7]], "labels": torch.zeros(2, 3)},
        TypeError,
        r"'input_ids' of batch 0 is a list, not a tensor: .*return_tensors='pt'",
    ),
    "lists of labels": (
        gpt2,
        LM,
        {**text(), "labels": [[3, 4, 5, 6, 7]] * 2},
        TypeError,
        "'labels' of batch 0 is a list, not a tensor",
    ),
    "text": (
        gpt2,
        LM,
        ["some text", "more"],
        TypeError,
        "'labels' of batch 0 must be a tensor, got str",
    ),
    "tensor": (
        gpt2,
        LM,
        text()["input_ids"],
        TypeError,
        r"data must yield dicts with 'labels' or \(inputs, labels\) for CausalLM; batch 0 is Te",
    ),
    "floating labels": (
        gpt2,
        LM,
        {**text(), "labels": torch.rand(2, 5)},
        TypeError,
        r"'labels' of batch 0 must be integers \[N, T\] for CausalLM, got torch.float32",
    ),
    "labels without a batch axis": (
        gpt2,
        LM,
        {**text(), "labels": torch.ones(5, dtype=torch.long)},
        ValueError,
        r"'labels' of batch 0 must be \[N, T\] for CausalLM, got \[5\]",
    ),
    "labels of another length": (
        bert,
        hk.MaskedLM(),
        {**masked_text(), "labels": masked_text(2, 4)["labels"]},
        ValueError,
        r"'labels' must be \[N, T\] = \[2, 5\] as the logits \[2, 5, 11\] have it, got \[2, 4\]",
    ),
    "labels with the axes exchanged": (
        bert,
        hk.MaskedLM(),
        {**masked_text(), "labels": masked_text()["labels"].T},
        ValueError,
        r"'labels' must be \[N, T\] = \[2, 5\] .*, got \[5, 2\]",
    ),
    "a vocabulary larger than the head": (
        gpt2,
        LM,
        with_label(VOCABULARY),
        ValueError,
        r"'labels' must lie in \[0, 11\), the size of the model's head, or be -100; found 11",
    ),
    "negative label": (gpt2, LM, with_label(-1), ValueError, "'labels' must lie in .*found -1"),
    "labels of -100 alone": (
        gpt2,
        LM,
        {**text(), "labels": torch.full((2, 5), -100)},
        ValueError,
        r"data yielded no samples, so there are no factors: .*labels are all masked \(-100",
    ),
    "one token, which has no next": (gpt2, LM, one_token(), ValueError, "data yielded no samples"),
    "mask of another length": (
        gpt2,
        LM,
        {**text(), "attention_mask": torch.ones(2, 4)},
        ValueError,
        r"attention_mask of batch 0 must be \[N, T\] = \[2, 5\], got \[2, 4\]",
    ),
    "mask for every pair": (
        gpt2,
        LM,
        {**text(), "attention_mask": torch.ones(2, 1, 5, 5)},
        ValueError,
        r"attention_mask of batch 0 must be \[N, T\] = \[2, 5\], got \[2, 1, 5, 5\]; pos",
    ),
    "logits of samples": (
        bert_classifier,
        hk.TokenClassification(),
        text(),
        ValueError,
        r"logits must be \[N, T, V\] for TokenClassification, got \[2, 3\]",
    ),
    "logits of tokens": (
        gpt2,
        CLASSES,
        {**text(), "labels": torch.zeros(2, dtype=torch.long)},
        ValueError,
        r"logits must be \[N, C\] for SequenceClassification, got \[2, 5, 11\]",
    ),
    "classes beyond the head": (
        bert_classifier,
        CLASSES,
        {**classified_text(), "labels": torch.tensor([0, 3, 1])},
        ValueError,
        r"targets must lie in \[0, 3\)",
    ),
    "several labels of another number": (
        bert_classifier,
        CLASSES,
        {**classified_text(), "labels": torch.rand(3, 2)},
        ValueError,
        r"'labels' must be \[3, 3\] for 'multi_label_classification' with logits \[3, 3\], got",
    ),
    "several labels out of range": (
        bert_classifier,
        CLASSES,
        {**classified_text(), "labels": torch.full((3, 3), 1.5)},
        ValueError,
        r"targets must lie in \[0, 1\]",
    ),
    "floating classes": (
        bert_classifier,
        hk.SequenceClassification(problem_type="single_label_classification"),
        {**classified_text(), "labels": torch.zeros(3)},
        TypeError,
        "'labels' must be integers for 'single_label_classification', got torch.float32",
    ),
    "a model with another problem type": (
        lambda: bert_classifier(problem_type="regression"),
        CLASSES,
        {**classified_text(), "labels": torch.rand(3, 3)},
        ValueError,
        r"model\.config\.problem_type is 'regression', but logits \[3, 3\] .* pass "
        r"hk\.SequenceClassification\(problem_type='regression'\)",
    ),
    "an encoder-decoder that is shifted": (
        t5,
        LM,
        translated_text(),
        ValueError,
        r"the model is an encoder-decoder, .*hk\.Seq2SeqLM",
    ),
    "another problem type behind a wrapper": (
        lambda: Wrapped(bert_classifier(problem_type="regression")),
        CLASSES,
        {**classified_text(), "labels": torch.rand(3, 3)},
        ValueError,
        r"model\.config\.problem_type is 'regression', but logits \[3, 3\]",
    ),
    "an encoder-decoder behind a wrapper": (
        lambda: Wrapped(t5()),
        LM,
        # The decoder's inputs are of the length of the labels.
        {**translated_text(), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)},
        ValueError,
        r"the model is an encoder-decoder, .*hk\.Seq2SeqLM",
    ),
    "a decoder that is asked for its inputs": (
        gpt2,
        hk.Seq2SeqLM(),
        text(),
        ValueError,
        "no 'decoder_input_ids', and the model has no method",
    ),
    "a split of another form": (
        gpt2,
        hk.CausalLM(split=lambda batch: batch["input_ids"]),
        text(),
        TypeError,
        r"split must return \(inputs, targets\) or \(inputs, targets, weight\), got Tensor",
    ),
    "a model without a head": (
        lambda: gpt2().transformer,
        LM,
        text(),
        TypeError,
        r"model must return a tensor \(or an object with \.logits\), got BaseModel",
    ),
    "torch's loss": (
        gpt2,
        nn.CrossEntropyLoss(),
        text(),
        TypeError,
        r"batch 0 is a dict with labels \(the losses for such are hk\.CausalLM\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_factors(case: str) -> None:
    make, loss, batch, error, message = BAD[case]
    with pytest.raises(error, match=message):
        hk.kronecker_factors(make(), [batch], loss, output="mc")


OF_A_BATCH = sorted(
    case
    for case, (make, loss, *_) in BAD.items()
    if make is gpt2 and loss is LM and "-100" not in case and case != "one token, which has no next"
)


@pytest.mark.parametrize("case", OF_A_BATCH)
def test_nothing_accumulated_is_lost(case: str) -> None:
    model, (_, _, batch, error, message) = gpt2(), BAD[case]
    accumulator = hk.FactorAccumulator(model, LM, output="mc")
    accumulator.update(text())
    with pytest.raises(error, match=message):
        accumulator.consume([batch])
    accumulator.update(text(seed=1))
    expected = hk.kronecker_factors(model, [text(), text(seed=1)], LM, output="mc")
    found = accumulator.factors()
    for name in expected:
        torch.testing.assert_close(found[name].output_hessian, expected[name].output_hessian)
        torch.testing.assert_close(found[name].input_covariance, expected[name].input_covariance)


def test_batches_without_labels_add_nothing() -> None:
    model, empty = gpt2(), {**text(), "labels": torch.full((2, 5), -100)}
    accumulator = hk.FactorAccumulator(model, LM, output="exact")
    for batch in (text(), empty):
        accumulator.update(batch)
    expected = hk.kronecker_factors(model, [text()], LM)
    found = accumulator.factors()
    assert found.num_samples == 2
    for name in expected:
        torch.testing.assert_close(found[name].output_hessian, expected[name].output_hessian)
        torch.testing.assert_close(found[name].input_covariance, expected[name].input_covariance)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hk.CausalLM(reduction="sum"), "reduction must be 'mean' or 'token', got 'sum'"),
        (lambda: hk.MaskedLM(call="list"), "call must be 'keywords' or 'dict', got 'list'"),
        (lambda: hk.CausalLM(split="labels"), "split must be callable, got str"),
        (
            lambda: hk.SequenceClassification(problem_type="ranking"),
            "problem_type must be 'regression', .* got 'ranking'",
        ),
        (lambda: hk.FactorAccumulator(gpt2(), hk.CausalLM), r"a loss of transformers such as"),
    ],
)
def test_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "call",
    [
        lambda *given: hk.layer_hessians(*given),
        lambda *given: hk.GaussNewton(*given),
        lambda model, data, loss: hk.AutogradHessian(model, data, loss).trace(),
        lambda *given: hk.position_mean_hessian(*given, "transformer.h.0.mlp.c_fc"),
    ],
)
def test_other_passes(call: Callable[..., Any]) -> None:
    model = gpt2(n_layer=1)
    with pytest.raises(ValueError, match="batch 0 has no 'labels'"):
        call(model, [without(text(), "labels")], LM)
