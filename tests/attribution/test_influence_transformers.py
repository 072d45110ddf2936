"""Influence scores of models of transformers, with their batches and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_loops import close, loop_scores, total
from torch import Tensor, nn
from transformer_models import VOCABULARY, built, transformers

import hesskern as hk


def gpt2(tie: bool = False) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return built(lambda: transformers.GPT2LMHeadModel(config))


def batch(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=source)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(data: dict[str, Tensor]) -> list[tuple[Any, Tensor]]:
    """Every sample by itself, without its padding."""
    found = []
    for i, n in enumerate(data["attention_mask"].sum(1).tolist()):
        part = {key: value[i : i + 1, :n] for key, value in data.items()}
        found.append(({"input_ids": part["input_ids"]}, part["labels"]))
    return found


def shifted(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten())


def turned(model: nn.Module) -> nn.Module:
    """The same model with linear layers in place of Conv1D."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape, dtype=child.weight.dtype)
                linear.weight.data = child.weight.data.T.clone()
                linear.bias.data = child.bias.data.clone()
                setattr(module, name, linear)
    return model


TRAIN, QUERIES = batch((6, 3, 5, 6, 2)), batch((4, 6), seed=1)


@pytest.mark.parametrize("bias", ["none", "joint"])
def test_gpt2(bias: Any) -> None:
    model = gpt2()
    E = hk.ekfac(model, [TRAIN], hk.CausalLM(), output="empirical", bias=bias)
    assert "lm_head" in E
    assert E["transformer.h.0.attn.c_attn"].transposed
    plain = dict(E)
    for operator in plain.values():
        # The loop's layers are [m, d].
        operator.transposed = False
    expected = total(loop_scores(plain, turned(gpt2()), alone(QUERIES), alone(TRAIN), shifted))
    for token in ("mean", "token"):
        loss = hk.CausalLM(reduction=token)  # type: ignore[arg-type]
        close(hk.influence(E, model, [QUERIES], [TRAIN], loss).scores, expected, 1e-8)
    parts = hk.influence(E, model, [QUERIES], [TRAIN], hk.CausalLM(), per_token=True).scores
    assert isinstance(parts, Tensor)
    assert parts.shape == (2, 5, 6)
    close(parts.sum(2), expected, 1e-8)
    assert not bool(parts[:, TRAIN["attention_mask"] == 0].any())


def test_a_tied_head_counts_with_its_linear_use() -> None:
    model = gpt2(tie=True)
    E = hk.ekfac(model, [TRAIN], hk.CausalLM(), output="empirical", layers="lm_head")
    untied = gpt2(tie=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    expected = total(loop_scores(E, untied, alone(QUERIES), alone(TRAIN), shifted))
    found = hk.influence(E, model, [QUERIES], [TRAIN], hk.CausalLM())
    close(found.scores, expected, 1e-8)
    with pytest.raises(ValueError, match="lm_head"):
        hk.influence(None, model, [QUERIES], [TRAIN], hk.CausalLM(), layers="lm_head")


def test_any_split_gives_the_same_bits() -> None:
    model = gpt2().float()
    E = hk.ekfac(model, [TRAIN], hk.CausalLM())
    expected = hk.influence(E, model, [QUERIES], [TRAIN], hk.CausalLM()).scores
    assert isinstance(expected, Tensor)
    for size in (1, 2, 3):
        parts = [
            {key: value[i : i + size] for key, value in TRAIN.items()} for i in range(0, 5, size)
        ]
        found = hk.influence(E, model, [QUERIES], parts, hk.CausalLM()).scores
        assert isinstance(found, Tensor)
        assert torch.equal(found, expected)
