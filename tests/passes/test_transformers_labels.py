"""Which labels count, where they stand, and what they weigh in half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from token_loop import (
    Loop,
    close,
)
from torch import Tensor, nn
from transformer_factors import factors_of
from transformer_models import (
    VOCABULARY,
    gpt2,
    t5,
    text,
)

import hesskern as hk

pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:the Gauss-Newton block")


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
