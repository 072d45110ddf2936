"""Plans of transformers against what the allocator hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measured_peaks import Call, Loaded, measured
from torch import Tensor, nn
from transformer_models import gpt2

import hesskern as hk

SAMPLES, TOKENS, WORDS = 4, 8, 20
LM = hk.CausalLM()


def model_of(**changes: Any) -> nn.Module:
    sizes = {"n_embd": 48, "n_head": 4, "n_positions": TOKENS, "vocab_size": WORDS}
    return gpt2(torch.float32, **{**sizes, **changes})


def batch() -> dict[str, Tensor]:
    """Texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (SAMPLES, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, TOKENS - 3, TOKENS // 2, TOKENS])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


CALLS: dict[str, tuple[str, dict[str, Any], Call]] = {
    "factors": ("factors", {}, lambda model, data: hk.kronecker_factors(model, data, LM)),
    "diagonals": (
        "factors",
        {"output": "mc", "diagonal": True, "max_outputs": WORDS - 1},
        lambda model, data: hk.kronecker_factors(
            model, data, LM, output="mc", diagonal=True, max_outputs=WORDS - 1
        ),
    ),
    "ekfac": ("ekfac", {}, lambda model, data: hk.ekfac(model, data, LM)),
    "hessians": (
        "hessians",
        {"output": "mc"},
        lambda model, data: hk.layer_hessians(model, data, LM, output="mc"),
    ),
    "inputs": ("inputs", {}, lambda model, data: hk.input_covariances(model, data)),
}


@pytest.mark.parametrize("name", CALLS)
def test_peaks(name: str) -> None:
    what, options, call = CALLS[name]
    model = model_of()
    plan = hk.plan(model, batch(), LM, what=what, num_samples=2 * SAMPLES, timing=False, **options)
    real = measured(call, model, Loaded(batch(), 2))
    assert plan.peak == pytest.approx(real, rel=0.1)


def test_one_text_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = model_of(n_layer=1)
    one = {name: tensor[:1].to("meta") for name, tensor in batch().items()}
    plan = hk.plan(model, one, LM, what="inputs", batch_size=SAMPLES)
    assert plan.layers
    assert plan.batch_size == SAMPLES
    assert not plan.seconds


def test_a_vocabulary_is_better_drawn() -> None:
    model = model_of(n_layer=1, vocab_size=1100)
    plan = hk.plan(model, batch(), LM, layers="*.c_fc", memory_budget=2**16, timing=False)
    assert plan.root_rows >= 1000
    assert any("output='mc'" in text for text in plan.advice)
