"""What autograd keeps of a transformer's block, counted on tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from scale_shapes import Model
from torch import Tensor

from hesskern.apps.bench.language import without_torchvision

__all__ = ["per_token"]

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_ATTENTION = "saved_by_kernel"


def per_token(model: Model) -> float:
    """Bytes that one block keeps for its backward pass, over the tokens of a sequence.

    The model of transformers runs on the meta device with one block and with two; the difference
    is a block's. Attention is a fused kernel that keeps q, k, v, its output, and a row's logarithm.
    """
    one, two = (_kept(model, blocks) for blocks in (1, 2))
    return (two - one) / model.tokens


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> Any:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out = kernel(query, key, value, 0.0, True, scale=options.get("scaling"))[0]
    return out.transpose(1, 2).contiguous(), None


def _kept(model: Model, blocks: int) -> int:
    with without_torchvision() as library, torch.device("meta"):
        library.AttentionInterface.register(_ATTENTION, _attention)
        # Llama's settings are all given, GPT-2's are its defaults.
        kind = library.LlamaConfig if model.settings else library.GPT2Config
        config = kind(**dict(model.settings), num_hidden_layers=blocks)
        network = library.AutoModelForCausalLM.from_config(
            config, attn_implementation=_ATTENTION, dtype=_DTYPES[model.number]
        ).eval()
        for parameter in network.parameters():
            # As a pass has it: the layers' weights alone require gradients.
            parameter.requires_grad_(parameter.dim() == 2)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        kept: dict[int, Any] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                # Held, so that no other storage takes its place.
                kept[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(1, model.tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(input_ids=tokens, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
