"""Native models of transformers from tiny configurations, with random weights, and their batches.

Whoever imports this skips where transformers is not installed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk

# torchvision of PyPI breaks the import of transformers beside a CPU torch; None says it is missing.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY = 11
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose random weights are large enough that every position matters."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """GPT2LMHeadModel: Conv1D layers, a head tied to the embedding."""
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    config = transformers.GPT2Config(**{**sizes, **_TOKENS, **changes})
    return built(lambda: transformers.GPT2LMHeadModel(config), dtype)


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """LlamaForCausalLM: grouped queries, a tied head, gradient checkpoints."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    config = transformers.LlamaConfig(**{**sizes, **_TOKENS, **changes})
    model = built(lambda: transformers.LlamaForCausalLM(config), dtype)
    # Its older name warns where there is a newer one.
    newer = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable"
    getattr(model, name)()
    return model


def mixtral(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """MixtralForCausalLM: experts to which a router sends each token."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        # The grouped product of torch knows no float64.
        "experts_implementation": "eager",
    }
    config = transformers.MixtralConfig(**{**sizes, **_TOKENS, **changes})
    return built(lambda: transformers.MixtralForCausalLM(config), dtype)


def _bert_config(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    return transformers.BertConfig(**{**sizes, **changes})


def bert(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """BertForMaskedLM."""
    return built(lambda: transformers.BertForMaskedLM(_bert_config(**changes)), dtype)


def bert_tagger(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """BertForTokenClassification, five classes (as many as tokens in :func:`text`)."""
    config = _bert_config(num_labels=5, **changes)
    return built(lambda: transformers.BertForTokenClassification(config), dtype)


def bert_classifier(
    dtype: torch.dtype = torch.float64, num_labels: int = 3, **changes: Any
) -> nn.Module:
    """BertForSequenceClassification, which has a pooler."""
    config = _bert_config(num_labels=num_labels, **changes)
    return built(lambda: transformers.BertForSequenceClassification(config), dtype)


def vit(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """ViTForImageClassification on images [3, 8, 8]."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 3,
    }
    config = transformers.ViTConfig(**{**sizes, **changes})
    return built(lambda: transformers.ViTForImageClassification(config), dtype)


def swin(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """SwinForImageClassification on images [3, 8, 8]: windows of 2 x 2, shifted ones, merges."""
    sizes = {
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "image_size": 8,
        "patch_size": 2,
        "num_labels": 3,
    }
    config = transformers.SwinConfig(**{**sizes, **changes})
    return built(lambda: transformers.SwinForImageClassification(config), dtype)


def t5(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """T5ForConditionalGeneration: encoder and decoder with cross-attention."""
    sizes = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.T5Config(**{**sizes, **changes})
    return built(lambda: transformers.T5ForConditionalGeneration(config), dtype)


def lora(base: nn.Module | None = None, targets: Any = None) -> nn.Module:
    """A model of peft: adapters of rank 2 over a frozen base, by default a Llama in bfloat16.

    Over a base in half precision peft keeps the adapters in float32.
    """
    peft = pytest.importorskip("peft")
    base = llama(torch.bfloat16) if base is None else base
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=targets or ["q_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings():
        # It asks for checkpoints by their older name.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # They begin as zero, and then nothing flows back to the other factor.
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _integers(high: int, shape: tuple[int, ...], seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def text(n: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A batch of unpadded text whose labels are its own tokens, some of them -100."""
    ids = _integers(VOCABULARY, (n, tokens), seed, low=3)
    labels = ids.clone()
    labels[0, 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def masked_text(n: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A batch for masked tokens: -100 but for one label of the first sample and two of others."""
    batch = text(n, tokens, seed)
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 1] = batch["input_ids"][0, 1]
    labels[1:, 2:4] = batch["input_ids"][1:, 2:4]
    return {**batch, "labels": labels}


def tagged_text(n: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A batch with one of five classes for every token but one."""
    batch = text(n, tokens, seed)
    labels = _integers(5, (n, tokens), seed + 100)
    labels[-1, 0] = -100
    return {**batch, "labels": labels}


def classified_text(n: int = 3, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A batch with one of three classes for every sample."""
    return {**text(n, tokens, seed), "labels": _integers(3, (n,), seed + 100)}


def images(n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch of images [3, 8, 8] in float64 with one of three classes each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": _integers(3, (n,), seed + 100)}


def translated_text(n: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A batch with labels of three tokens for the decoder, one of them -100."""
    batch = text(n, tokens, seed)
    labels = _integers(VOCABULARY, (n, 3), seed + 100, low=1)
    labels[0, 2] = -100
    return {**batch, "labels": labels}


@dataclass(frozen=True)
class Native:
    """A native model, the loss that knows its batches, and how these are made.

    Attributes:
        model: makes it.
        loss: of hesskern.
        batch: ``batch(n, seed=...)``.
    """

    model: Callable[..., nn.Module]
    loss: Any
    batch: Callable[..., dict[str, Tensor]]


NATIVE = {
    "gpt2": Native(gpt2, hk.CausalLM(), text),
    "llama": Native(llama, hk.CausalLM(), text),
    "mixtral": Native(mixtral, hk.CausalLM(), text),
    "bert": Native(bert, hk.MaskedLM(), masked_text),
    "bert_tagger": Native(bert_tagger, hk.TokenClassification(), tagged_text),
    "bert_classifier": Native(bert_classifier, hk.SequenceClassification(), classified_text),
    "vit": Native(vit, hk.SequenceClassification(), images),
    "swin": Native(swin, hk.SequenceClassification(), images),
    "t5": Native(t5, hk.Seq2SeqLM(), translated_text),
}
