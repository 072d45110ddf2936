"""A loss that takes labels at another position than the model's own loss does is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from played_device import counting, generators, played
from torch import Tensor, nn
from transformer_models import (
    NATIVE,
    VOCABULARY,
    bert,
    bert_tagger,
    built,
    gpt2,
    llama,
    lora,
    mixtral,
    t5,
    tagged_text,
    text,
    transformers,
    translated_text,
)

import hesskern as hk

# Decoders alone have no cross-attention to reach.
pytestmark = pytest.mark.filterwarnings("ignore:left out")

_SMALL = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# Decoders taken out of encoder-decoders: the loss of none of them shifts labels.
UNSHIFTED = (
    "Bart BigBirdPegasus Blenderbot BlenderbotSmall MBart Marian Mvp PLBart Pegasus TrOCR Whisper"
).split()
SHIFTED = {
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "xglm": lambda: decoder("XGLM", torch.float32, num_layers=1, attention_heads=2, ffn_dim=12),
    "bert as a decoder": lambda: built(
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(
                hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=VOCABULARY, is_decoder=True,
            )
        )
    ),
}  # fmt: skip


def decoder(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    more = {"attention_type": "original_full"} if kind == "BigBirdPegasus" else {}
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **more, **changes})
    return built(lambda: getattr(transformers, f"{kind}ForCausalLM")(config), dtype)


@pytest.mark.parametrize("kind", UNSHIFTED)
def test_decoders_that_do_not_shift(kind: str) -> None:
    model, batch = decoder(kind), text()
    for run in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(ValueError, match=r"CausalLM shifts labels, but the model's own loss"):
            run(model, [batch], hk.CausalLM())
    loss = hk.MaskedLM()
    assert len(hk.kronecker_factors(model, [batch], loss, output="mc"))
    one = text(n=1)
    own = model(**one).loss
    labels = one.pop("labels")
    torch.testing.assert_close(loss.per_sample(loss.run(model, one), labels)[0], own)


@pytest.mark.parametrize("kind", SHIFTED)
def test_decoders_that_shift(kind: str) -> None:
    model, batch = SHIFTED[kind](), text()
    assert len(hk.kronecker_factors(model, [batch], hk.CausalLM(), output="mc"))
    for loss in (hk.MaskedLM(), hk.TokenClassification()):
        with pytest.raises(ValueError, match=r"takes labels at their .* shifts them"):
            hk.kronecker_factors(model, [batch], loss, output="mc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"output": "empirical"}
    for good, bad in ((gpt2(dtype), decoder("Bart", dtype)),):
        assert len(hk.kronecker_factors(good, [text()], hk.CausalLM(), **settings))
        with pytest.raises(ValueError, match="the model's own loss"):
            hk.kronecker_factors(bad, [text()], hk.CausalLM(), **settings)


def test_the_hessian_by_autograd() -> None:
    operator = hk.AutogradHessian(
        decoder("Bart"), [text()], hk.CausalLM(), ["model.decoder.layers.0.fc1.bias"]
    )
    with pytest.raises(ValueError, match="the model's own loss takes them at their positions"):
        operator.trace()


@pytest.mark.parametrize("name", sorted(NATIVE))
@pytest.mark.parametrize("tokens", ["all", "one label"])
def test_native_models_pass(name: str, tokens: str) -> None:
    case = NATIVE[name]
    batch = case.batch(3)
    if tokens == "one label" and batch["labels"].dim() == 2:
        batch["labels"][:, :2] = -100
        batch["labels"][:, 3:] = -100
        batch["labels"][:, 2] = 1
    assert len(hk.kronecker_factors(case.model(), [batch], case.loss, output="mc"))


def test_more_terms_are_no_other_positions() -> None:
    """A balance of experts, smoothed labels, weights of classes."""
    model = mixtral(output_router_logits=True)
    assert len(hk.kronecker_factors(model, [text()], hk.CausalLM(), output="mc"))
    model = gpt2()

    def smoothed(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3
        )

    model.loss_function = smoothed
    assert len(hk.kronecker_factors(model, [text()], hk.CausalLM(), output="mc"))
    batch = {**text(), "num_items_in_batch": torch.tensor(7)}
    assert len(hk.kronecker_factors(gpt2(), [batch], hk.CausalLM(), output="mc"))
    with pytest.raises(ValueError, match="the model's own loss"):
        hk.kronecker_factors(gpt2(), [batch], hk.MaskedLM(), output="mc")


def test_adapters_are_compared_too() -> None:
    base = decoder("Bart")
    assert len(hk.kronecker_factors(lora(llama(), ["q_proj"]), [text()], hk.CausalLM()))
    model = lora(base, ["q_proj"])
    with pytest.raises(ValueError, match="the model's own loss"):
        hk.kronecker_factors(model, [text()], hk.CausalLM())


def test_encoder_decoders_whose_loss_shifts_once_more() -> None:
    model, batch = t5(), translated_text()
    assert len(hk.kronecker_factors(model, [batch], hk.Seq2SeqLM(), output="mc"))

    plain = model.forward

    def forward(labels: Any = None, **given: Any) -> Any:
        result = plain(**given)
        if labels is not None:
            result["loss"] = F.cross_entropy(result.logits[:, :-1].mT, labels[:, 1:])
        return result

    model.forward = forward
    with pytest.raises(ValueError, match="the labels moved by one position"):
        hk.kronecker_factors(model, [batch], hk.Seq2SeqLM(), output="mc")
    loss = hk.Seq2SeqLM(
        split=lambda b: ({k: v for k, v in b.items() if k != "labels"}, b["labels"])
    )
    assert len(hk.kronecker_factors(model, [batch], loss, output="mc"))


def test_one_sample_runs_once_more_for_all_data() -> None:
    model, sizes = gpt2(), []
    model.register_forward_pre_hook(
        lambda m, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    data = [text(3), text(2), text(4)]
    hk.kronecker_factors(model, data, hk.CausalLM(), output="mc")
    assert sizes == [3, 1, 2, 4]
    sizes.clear()
    accumulator = hk.FactorAccumulator(model, hk.CausalLM(), output="mc")
    # One position has no neighbour.
    short = {key: value[:, :1] for key, value in text(2).items()}
    for batch in (short, *data):
        accumulator.update(batch)
    assert sizes == [2, 3, 1, 2, 4]


def test_nothing_is_kept_and_the_next_batch_is_refused_as_well() -> None:
    accumulator = hk.FactorAccumulator(decoder("Bart"), hk.CausalLM())
    for _ in range(2):
        with pytest.raises(ValueError, match="the model's own loss"):
            accumulator.update(text())
    assert accumulator.num_samples == 0


def test_padding_at_either_side() -> None:
    batch = text(3)
    batch["attention_mask"][0, :] = 0
    batch["attention_mask"][0, -1] = 1
    batch["attention_mask"][1, :3] = 0
    assert len(hk.kronecker_factors(llama(), [batch], hk.CausalLM(), output="mc"))
    with pytest.raises(ValueError, match="the model's own loss"):
        hk.kronecker_factors(llama(), [batch], hk.MaskedLM(), output="mc")
    tagged = tagged_text(3)
    assert len(hk.kronecker_factors(bert_tagger(), [tagged], hk.TokenClassification()))
    assert len(hk.kronecker_factors(bert(), [tagged], hk.MaskedLM()))


class Tokens(nn.Module):
    """Logits [N, T, 7] of tokens, and a loss as models of transformers have it."""

    def __init__(self, shifts: bool) -> None:
        super().__init__()
        self.first, self.head, self.shifts = nn.Linear(7, 6), nn.Linear(6, 7), shifts
        self.config = SimpleNamespace(model_type="tokens")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = F.one_hot(input_ids, 7).to(self.first.weight.dtype)
        logits = self.head(self.first(x.cumsum(1)).relu())
        if labels is None:
            return {"logits": logits}
        given = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return {"loss": F.cross_entropy(given[0].mT, given[1]), "logits": logits}


def test_on_a_device_the_pass_does_not_wait_for_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    device = played()
    with generators():
        for shifts in (True, False):
            model = seeded(Tokens(shifts)).double().to(device)
            accumulator = hk.FactorAccumulator(model, hk.CausalLM())
            if shifts:
                accumulator.update(batch)
                before = accumulator.num_samples
                with counting() as counts:
                    accumulator.update(batch)
                # The answer is known, and nothing runs once more.
                assert counts.operations["_log_softmax"] == 0
                assert before == 3
                continue
            for _ in range(2):
                with pytest.raises(ValueError, match="the model's own loss"):
                    accumulator.update(batch)
            assert accumulator.num_samples == 0


def test_on_a_device_a_batch_that_is_halved_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    device = played()
    with generators():
        model = seeded(Tokens(shifts=False)).double().to(device)
        accumulator = hk.FactorAccumulator(model, hk.CausalLM())
        plain, calls = type(accumulator._batch_sums).of, []

        def fails_once(*given: Any) -> Any:
            calls.append(given)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("no room")
            return plain(*given)

        monkeypatch.setattr(type(accumulator._batch_sums), "of", fails_once)
        with pytest.raises(ValueError, match="the model's own loss"):
            accumulator.update(batch)
        assert len(calls) == 3
        assert accumulator.num_samples == 0
