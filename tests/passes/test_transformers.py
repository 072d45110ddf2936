"""Native models of transformers: factors against loops over samples by autograd."""

from __future__ import annotations

import pytest
import torch
from token_loop import (
    NARROW_NORMS,
    PLACES,
    Loop,
    close,
    with_experts_apart,
)
from transformer_factors import factors_of
from transformer_models import (
    NATIVE,
    VOCABULARY,
    bert,
    gpt2,
    llama,
    lora,
    text,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")

HEADS = {
    "bert": "cls.predictions.decoder",
    "gpt2": "lm_head",
    "llama": "lm_head",
    "t5": "lm_head",
}


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
