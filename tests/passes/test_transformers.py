"""Native models of transformers: factors and Hessians against loops over samples by autograd."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from token_loop import (
    NARROW_NORMS,
    PLACES,
    SAMPLES,
    SEED,
    Loop,
    close,
    with_experts_apart,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_models import (
    NATIVE,
    VOCABULARY,
    bert,
    bert_classifier,
    bert_tagger,
    classified_text,
    gpt2,
    images,
    llama,
    lora,
    masked_text,
    t5,
    tagged_text,
    text,
    translated_text,
    vit,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")

HEADS = {
    "bert": "cls.predictions.decoder",
    "gpt2": "lm_head",
    "llama": "lm_head",
    "t5": "lm_head",
}


def factors_of(model: nn.Module, data: Any, loss: Any, output: str, **more: Any) -> hk.Factors:
    return hk.kronecker_factors(
        model, data, loss, output=output, mc_samples=SAMPLES, seed=SEED, **more
    )


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", sorted(NATIVE))
def test_every_layer_of_native_models(name: str, output: str) -> None:
    case = NATIVE[name]
    model = case.model()
    data = [case.batch(2), case.batch(3, seed=1)]
    loop = Loop(with_experts_apart(model), PLACES.get(name, "same"), output)
    for batch in data:
        loop.add(batch)
    factors = factors_of(model, data, case.loss, output)
    loop.check(factors, NARROW_NORMS.get(name, 1e-10))
    assert loop.layers.keys() - set(factors) == set()
    tied = {layer for layer, f in factors.items() if f.tied_to is not None}
    assert tied == ({HEADS[name]} if name in HEADS else set())
    assert set(factors.settings["checked"].values()) == {"graph"}


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_mean_over_all_tokens_weights_samples(name: str, output: str) -> None:
    case = NATIVE[name]
    model = case.model()
    data = [case.batch(2), case.batch(3, seed=1)]
    loop = Loop(model, PLACES.get(name, "same"), output, by_token=True)
    for batch in data:
        loop.add(batch)
    loss = type(case.loss)(reduction="token")
    loop.check(factors_of(model, data, loss, output), 1e-10)
    if output == "exact":
        one = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
        loop.check(factors_of(model, [one], loss, output), 1e-10)


def test_in_float32() -> None:
    loop = Loop(gpt2(), "next", "exact")
    loop.add(text(3))
    loop.check(factors_of(gpt2(torch.float32), [text(3)], hk.CausalLM(), "exact"), 1e-5)


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
def test_adapters_of_peft(output: str) -> None:
    model = lora(llama())
    loop = Loop(model, "next", output)
    loop.add(text(3))
    factors = factors_of(model, [text(3)], hk.CausalLM(), output)
    loop.check(factors, 1e-6)
    assert {name for name in factors if "lora_" in name} == {
        name for name in loop.layers if "lora_" in name
    }


def test_adapters_over_a_base_in_bfloat16() -> None:
    model = lora()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    loop = Loop(model, "next", "exact")
    loop.add(text(3))
    factors = factors_of(model, [text(3)], hk.CausalLM(), "exact", layers=sorted(loop.layers)[1:])
    # Three digits a number, in another order of sums.
    loop.check(factors, 5e-2)
    for name in factors:
        assert factors[name].output_hessian.dtype == torch.float32


def test_a_vocabulary_as_long_as_the_text() -> None:
    model, batch = gpt2(), text(2, VOCABULARY)
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, VOCABULARY, VOCABULARY)
    for output in ("exact", "mc", "empirical"):
        loop = Loop(model, "next", output)
        loop.add(batch)
        loop.check(factors_of(model, [batch], hk.CausalLM(), output), 1e-10)


def test_checkpointed_models_in_training_mode_come_back_as_they_were() -> None:
    model = llama().train()
    loop = Loop(llama(), "next", "mc")
    loop.add(text(2))
    loop.check(factors_of(model, [text(2)], hk.CausalLM(), "mc"), 1e-6)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


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


def same(one: hk.Factors, other: hk.Factors) -> None:
    assert list(one) == list(other)
    for name in one:
        for attribute in ("input_covariance", "output_hessian"):
            torch.testing.assert_close(
                getattr(one[name], attribute), getattr(other[name], attribute), rtol=0, atol=0
            )


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


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(("n", "tokens"), [(1, 5), (3, 1), (1, 1)])
def test_single_samples_and_tokens(n: int, tokens: int, output: str) -> None:
    ids = text(n)["input_ids"][:, :tokens]
    batch = {"input_ids": ids, "labels": ids.flip(0)}
    model = bert()
    loop = Loop(model, "same", output)
    loop.add(batch)
    # A single token is all that it attends to, whatever query and key.
    layers = [name for name in loop.layers if name.endswith((".dense", ".value"))]
    loop.check(factors_of(model, [batch], hk.MaskedLM(), output, layers=layers), 1e-10)


def test_new_adapters() -> None:
    """Their second factor is zero, so that nothing flows back to the first one."""
    model = lora(llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    factors = factors_of(model, [text(2)], hk.CausalLM(), "mc")
    for name in factors:
        assert bool(factors[name].output_hessian.any()) == ("lora_A" not in name)
        if "lora_B" in name:
            assert bool(factors[name].input_covariance.any())


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


def test_biases_as_inputs() -> None:
    model, batch = gpt2(), text(3)
    loop = Loop(model, "next", "exact")
    loop.add(batch)
    plain = factors_of(model, [batch], hk.CausalLM(), "exact")
    joint = factors_of(model, [batch], hk.CausalLM(), "exact", bias="joint")
    for name in plain:
        A = joint[name].input_covariance
        if name == "lm_head":
            # It has no bias.
            close(A, loop.inputs[name] / 3, 1e-10, name)
            continue
        close(A[:-1, :-1], loop.inputs[name] / 3, 1e-10, name)
        close(A[-1, :-1], loop.sums[name] / 3, 1e-10, name)
        assert float(A[-1, -1]) == pytest.approx(5.0)
        close(joint[name].output_hessian, plain[name].output_hessian, 1e-12, name)


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


def padded_text() -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Tensor]:
    """Two texts, the first padded on the left by two tokens, both alone, and the mask."""
    batch = text(2)
    batch["labels"] = batch["input_ids"].clone()
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch["position_ids"] = (keep.cumsum(1) - 1).clamp(min=0)
    alone = [
        {key: value[i : i + 1, begin:] for key, value in batch.items()}
        for i, begin in enumerate((2, 0))
    ]
    return {**batch, "attention_mask": keep}, alone, keep


class Renamed(nn.Module):
    """A model whose mask has another name, and where there is one, another form."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, keep: Tensor, attention_mask: Any = None, **inputs: Any) -> Any:
        return self.inner(**inputs, attention_mask=keep)


@pytest.mark.parametrize("reduction", ["mean", "token"])
@pytest.mark.parametrize("output", ["exact", "empirical"])
@pytest.mark.parametrize("form", ["alone", "beside ones", "in four axes"])
def test_positions_masked_by_another_name_predict_nothing(
    form: str, output: str, reduction: Any
) -> None:
    batch, alone, keep = padded_text()
    loss = hk.CausalLM(reduction=reduction)
    expected = factors_of(gpt2(), alone, loss, output)
    batch = {**batch, "keep": keep}
    del batch["attention_mask"]
    if form != "alone":
        ones = torch.ones_like(keep)
        batch["attention_mask"] = ones if form == "beside ones" else ones[:, None, None]
    found = factors_of(
        Renamed(), [batch], loss, output, position_mask=lambda inputs: inputs["keep"]
    )
    assert found.num_samples == expected.num_samples
    for name in expected:
        one, other = found[f"inner.{name}"], expected[name]
        assert one.positions == pytest.approx(other.positions)
        close(one.output_hessian, other.output_hessian, 1e-10, name)
        close(one.input_covariance, other.input_covariance, 1e-10, name)


@pytest.mark.parametrize("named", [False, True])
def test_the_batchs_own_mask_counts_where_none_or_masks_by_name_are_given(named: bool) -> None:
    batch, alone, keep = padded_text()
    expected = factors_of(gpt2(), alone, hk.CausalLM(), "exact")
    found = factors_of(
        gpt2(),
        [batch],
        hk.CausalLM(),
        "exact",
        position_mask=lambda inputs: {"*": keep} if named else None,
    )
    for name in expected:
        close(found[name].output_hessian, expected[name].output_hessian, 1e-10, name)


class OnlyLogits(nn.Module):
    """Logits that are a parameter's, without a layer before the head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, classes, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.zeros(*input_ids.shape, 1, dtype=self.head.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_empirical_rows_of_many_tokens_in_half_precision(dtype: torch.dtype) -> None:
    # With all logits zero the gradient is (1/V - y) / T, of which 1 / (V T) is 2^-24.5: of float16
    # the smallest number is 2^-24, and the square of 1 / T is not above half of that.
    classes, tokens = 4000, 6000
    ids = torch.arange(tokens).remainder(classes).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids}
    loss = hk.MaskedLM()
    rows = loss.empirical(torch.zeros(1, tokens, classes, dtype=dtype), ids).row(0)
    assert rows.dtype == dtype
    expected = torch.full((tokens, classes), 1 / classes, dtype=torch.float64)
    expected[torch.arange(tokens), ids[0]] -= 1
    expected /= math.sqrt(tokens)
    # Rounded once: relative to the number, or by half the smallest one.
    error = (rows[0].double() - expected).abs()
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    assert bool((error <= torch.finfo(dtype).eps / 2 * 1.001 * expected.abs() + smallest).all())
    small = {key: value[:, :4] for key, value in batch.items()}
    model = OnlyLogits(7).to(dtype)
    found = factors_of(model, [small], loss, "empirical")["head"].output_hessian
    wide = factors_of(OnlyLogits(7).double(), [small], loss, "empirical")["head"].output_hessian
    close(found, wide, 2e-2, "head")


def xlm(kind: str) -> nn.Module:
    """A tiny model of XLNet, XLM or Flaubert with the head of a language model."""
    import transformers

    if kind == "xlnet":
        config: Any = transformers.XLNetConfig(
            vocab_size=VOCABULARY, d_model=8, n_layer=1, n_head=2, d_inner=12
        )
        made: Any = transformers.XLNetLMHeadModel(config)
    else:
        prefix = {"xlm": "XLM", "flaubert": "Flaubert"}[kind]
        config = getattr(transformers, f"{prefix}Config")(
            vocab_size=VOCABULARY, n_words=VOCABULARY, emb_dim=8, n_layers=1, n_heads=2
        )
        made = getattr(transformers, f"{prefix}WithLMHeadModel")(config)
    return made.double().eval()


class Wrapped(nn.Module):
    """As DataParallel has it: what is inside knows its configuration."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.module(*args, **inputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
@pytest.mark.parametrize("kind", ["xlnet", "xlm", "flaubert"])
def test_models_whose_own_loss_does_not_shift(kind: str, wrap: Any) -> None:
    model = xlm(kind)
    batch = text(2)
    with pytest.raises(ValueError, match=rf"CausalLM shifts labels, .* {kind!r} .*hk\.MaskedLM"):
        hk.kronecker_factors(wrap(model), [batch], hk.CausalLM(), output="mc")
    # What the message names is their loss.
    loss = hk.MaskedLM(reduction="token")
    parts = loss.split_batch(batch, 0)
    outputs = loss.run(wrap(model), parts.inputs)
    weight = (batch["labels"] != -100).sum(1)
    each = loss.per_sample(outputs, parts.targets).detach()
    own = model(**batch).loss.detach()
    assert float((each * weight).sum() / weight.sum()) == pytest.approx(float(own), rel=1e-6)


def test_the_outermost_configuration_counts() -> None:
    model: Any = gpt2()
    # As a decoder with an encoder of sounds has it.
    model.unused = t5()
    loop = Loop(gpt2(), "next", "exact")
    loop.add(text(2))
    layers = sorted(loop.layers)
    loop.check(factors_of(model, [text(2)], hk.CausalLM(), "exact", layers=layers), 1e-10)
