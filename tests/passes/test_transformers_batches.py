"""Batches of transformers in every form that they come in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from token_loop import (
    NARROW_NORMS,
    PLACES,
    SEED,
    Loop,
)
from torch import nn
from transformer_factors import factors_of, same
from transformer_models import (
    NATIVE,
    gpt2,
    text,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")


class Called(nn.Module):
    """A model that is called in one way alone, and returns a tuple."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.inner, self.call = gpt2(), call

    def forward(self, batch: Any = None, **inputs: Any) -> Any:
        given = inputs if batch is None else batch
        assert given
        assert "labels" not in given
        assert (self.call == "dict") == (batch is not None)
        return self.inner(**given, return_dict=False)


def test_batches_of_every_form() -> None:
    from transformers import BatchEncoding, default_data_collator

    model, batches = gpt2(), [text(2), text(3, seed=1)]
    expected = factors_of(model, batches, hk.CausalLM(), "mc")
    samples = [{key: value[i] for key, value in b.items()} for b in batches for i in range(2)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=default_data_collator)
    same(
        factors_of(model, loader, hk.CausalLM(), "mc"),
        factors_of(model, [{k: v[:2] for k, v in b.items()} for b in batches], hk.CausalLM(), "mc"),
    )
    same(factors_of(model, map(BatchEncoding, batches), hk.CausalLM(), "mc"), expected)
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in batches]
    same(factors_of(model, pairs, hk.CausalLM(), "mc"), expected)
    packed = [{"text": inputs, "what": labels} for inputs, labels in pairs]
    split = hk.CausalLM(split=lambda batch: (batch["text"], batch["what"]))
    same(factors_of(model, packed, split, "mc"), expected)
    tensors = [(inputs["input_ids"], labels) for inputs, labels in pairs]
    same(factors_of(model, tensors, hk.CausalLM(), "mc"), expected)
    for call in ("keywords", "dict"):
        found = factors_of(Called(call), batches, hk.CausalLM(call=call), "mc")
        for name in expected:
            torch.testing.assert_close(
                found[f"inner.{name}"].output_hessian, expected[name].output_hessian
            )


def test_batches_one_by_one_and_weights() -> None:
    model, batches = gpt2(), [text(2), text(3, seed=1)]
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
    for weights in (None, weight):
        accumulator = hk.FactorAccumulator(
            model, hk.CausalLM(), output="mc", seed=SEED, mc_samples=3
        )
        parts = [None, None] if weights is None else list(weights.split([2, 3]))
        for batch, part in zip(batches, parts, strict=True):
            accumulator.update(batch, sample_weight=part)
        expected = factors_of(model, batches, hk.CausalLM(), "mc", sample_weight=weights)
        same(accumulator.factors(), expected)
    split = hk.CausalLM(
        split=lambda pair: (
            {k: v for k, v in pair[0].items() if k != "labels"},
            pair[0]["labels"],
            pair[1],
        )
    )
    same(factors_of(model, list(zip(batches, parts, strict=True)), split, "mc"), expected)


def test_samples_without_labels_do_not_count() -> None:
    model, batch = gpt2(), text(3)
    batch["labels"][1] = -100
    kept = {key: value[[0, 2]] for key, value in batch.items()}
    for loss in (hk.CausalLM(), hk.CausalLM(reduction="token")):
        found = factors_of(model, [batch], loss, "exact")
        expected = factors_of(model, [kept], loss, "exact")
        assert found.num_samples == expected.num_samples
        for name in found:
            torch.testing.assert_close(
                found[name].input_covariance, expected[name].input_covariance
            )
            torch.testing.assert_close(found[name].output_hessian, expected[name].output_hessian)


def test_a_tokenizer_and_its_collator() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "dog"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    texts = ["the cat sat on a mat", "a dog sat on the cat"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = torch.utils.data.DataLoader(
        [tokenizer(each) for each in texts], batch_size=2, collate_fn=collate
    )
    model = gpt2()
    loop = Loop(model, "next", "empirical")
    for batch in loader:
        loop.add({k: v for k, v in batch.items() if k != "token_type_ids"})
    split = hk.CausalLM(
        split=lambda batch: (
            {k: batch[k] for k in ("input_ids", "attention_mask")},
            batch["labels"],
        )
    )
    loop.check(factors_of(model, loader, split, "empirical"), 1e-10)
    with pytest.raises(TypeError, match=r"'input_ids' of batch 0 is a list, not a tensor"):
        factors_of(model, [{**tokenizer(texts), "labels": torch.zeros(2, 6)}], hk.CausalLM(), "mc")


@pytest.mark.parametrize("output", ["exact", "mc"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_batches_of_several_lengths(name: str, output: str) -> None:
    case = NATIVE[name]
    model = case.model()
    data = [case.batch(2), case.batch(3, tokens=4, seed=1), case.batch(1, tokens=7, seed=2)]
    loop = Loop(model, PLACES.get(name, "same"), output)
    for batch in data:
        loop.add(batch)
    loop.check(factors_of(model, data, case.loss, output), NARROW_NORMS.get(name, 1e-10))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies(copied: Any) -> None:
    for loss in (hk.CausalLM(reduction="token"), hk.SequenceClassification(call="dict")):
        assert copied(loss) == loss
    accumulator = hk.FactorAccumulator(gpt2(), hk.CausalLM(), output="mc", seed=SEED)
    accumulator.update(text())
    again = copied(accumulator)
    for one in (accumulator, again):
        one.update(text(seed=1))
    same(again.factors(), accumulator.factors())


def test_weights_beside_the_mean_over_all_tokens() -> None:
    model, batch = gpt2(), text(3)
    batch["labels"][1, 1:4] = -100
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert tokens.tolist() == [3, 1, 4]
    for output in ("exact", "mc"):
        found = factors_of(
            model, [batch], hk.CausalLM(reduction="token"), output, sample_weight=weight
        )
        expected = factors_of(model, [batch], hk.CausalLM(), output, sample_weight=weight * tokens)
        assert found.num_samples == pytest.approx(float(weight @ tokens.double()))
        same(found, expected)
