"""Which positions of a batch are data: masks [N, T], and the layers whose rows they speak of.

A masked position counts nowhere: neither its input nor its gradient is looked at, whatever they
hold. A mask speaks of a linear call whose samples have T rows each, and of a convolution over
sequences with T columns. What has one row per sample, or a number of rows that T does not divide,
is not the mask's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.devices import on_host
from hesskern.passes.batches import Batch
from hesskern.passes.checks import Checks
from hesskern.passes.layer_uses import LayerUse, positions_of
from hesskern.passes.layers import LayerSpec
from hesskern.passes.position_mask import PositionMask

__all__ = ["checked_mask", "masked_uses"]

# Of an encoder-decoder model, the layers of the decoder that read the encoder's positions.
_CROSS = re.compile(r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attn)(\.|$)")
_READS = frozenset("k v k_proj v_proj key value".split())


def checked_mask(position_mask: Any) -> Callable[[Any], Any] | None:
    """The argument ``position_mask``, or a TypeError where it cannot be called."""
    if position_mask is not None and not callable(position_mask):
        raise TypeError(
            "position_mask must be a function of a batch's inputs that gives its mask [N, T], got "
            f"{type(position_mask).__name__}"
        )
    return position_mask


def masked_uses(
    batch: Batch,
    uses: dict[str, list[LayerUse]],
    specs: Mapping[str, LayerSpec],
    outputs: Tensor,
    model: nn.Module,
    checks: Checks,
) -> dict[str, list[LayerUse]]:
    """The uses, with the batch's mask where it speaks of their positions.

    Args:
        batch: its mask is [N, T], or a dict of patterns of layers' names, each with such a mask or
            None; the first pattern that fits a layer counts, and a layer that none fits has no
            mask. In encoder-decoder models of transformers a mask [N, T] is the encoder's; what
            works on the decoder's positions has the inputs' ``decoder_attention_mask``.
        uses: by layer.
        specs: of the layers.
        outputs: [N, ...] of the model.
        model: gave them.
        checks: of the pass.

    Raises:
        TypeError: a mask is not a tensor, or of complex numbers.
        ValueError: it is not [N, T], holds other values than 0 and 1 or 0 alone, or speaks of no
            layer; a layer has several times T positions, so that it cannot be told which is which.
    """
    given = batch.mask
    if given is None or not len(outputs):
        return uses
    about = f"the mask of batch {batch.index}"
    named = isinstance(given, Mapping)
    if named:
        choose = _by_pattern(given, specs, outputs, about)
    else:
        choose = _by_side(_checked(given, outputs, about), batch, outputs, model, about)
    made: dict[int, PositionMask | None] = {}
    result: dict[str, list[LayerUse]] = {}
    spoken: set[int] = set()
    others: dict[str, int] = {}
    for name, layer in uses.items():
        keep = choose(name)
        if keep is None:
            result[name] = layer
            continue
        if id(keep) not in made:
            _require_values(keep, checks, about)
            # With all positions there is nothing to leave out.
            whole = on_host(keep) and bool(keep.all())
            made[id(keep)] = None if whole else PositionMask(keep.bool(), outputs.device)
        result[name] = []
        for use in layer:
            if use.routed:
                # Where padding could be among its rows, the layer has been left out.
                result[name].append(use)
                continue
            count = positions_of(specs[name], use)
            if count == keep.shape[1] and (named or len(specs[name].kernel_size) < 2):
                spoken.add(id(keep))
                result[name].append(replace(use, mask=made[id(keep)]))
                continue
            result[name].append(use)
            if count > 1:
                others[name] = count
                _refuse(specs[name], count, keep.shape[1], named, about)
    _require_spoken(spoken, others, batch, given, about)
    return result


def _refuse(spec: LayerSpec, count: int, length: int, named: bool, about: str) -> None:
    """Refuses a mask of so many positions where a layer's ``count`` rows may still be its own."""
    if named:
        raise ValueError(
            f"position_mask: layer {spec.name!r} has {count} positions, {about} that is returned "
            f"for it has {length}; a pattern before it can say None"
        )
    if spec.kind == "linear" and length > 1 and count % length == 0:
        raise ValueError(
            f"layer {spec.name!r} has {count} rows per sample, {count // length} times the "
            f"{length} positions of {about}, and it cannot be told which rows are masked: let "
            f"position_mask return a dict with its mask [N, {count}], or None, under its name"
        )


def _require_spoken(
    spoken: set[int], others: dict[str, int], batch: Batch, given: Any, about: str
) -> None:
    """Refuses a mask [N, T] that no layer and no input has the length of."""
    if spoken or not others or isinstance(given, Mapping):
        return
    if any(t.shape[:2] == given.shape for t in _tensors(batch.inputs) if t is not given):
        # Of a part of the model that was not asked for.
        return
    name, count = next(iter(others.items()))
    raise ValueError(
        f"{about} is {list(given.shape)}, but no layer has {given.shape[1]} positions; "
        f"{name!r} has {count}"
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key != "attention_mask"]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _by_pattern(
    given: Mapping[str, Any], specs: Mapping[str, LayerSpec], outputs: Tensor, about: str
) -> Callable[[str], Tensor | None]:
    """A layer's mask by the first pattern that fits its name."""
    masks = {}
    for pattern, one in given.items():
        if not any(fnmatchcase(name, pattern) for name in specs):
            raise ValueError(
                f"position_mask: no layer fits {pattern!r}; there are {', '.join(specs)}"
            )
        masks[pattern] = None if one is None else _checked(one, outputs, f"{about} for {pattern!r}")

    def choose(name: str) -> Tensor | None:
        return next((one for pattern, one in masks.items() if fnmatchcase(name, pattern)), None)

    return choose


def _by_side(
    keep: Tensor, batch: Batch, outputs: Tensor, model: nn.Module, about: str
) -> Callable[[str], Tensor | None]:
    """A layer's mask by its name: one for all but in encoder-decoder models."""
    if not any(
        getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True
        for module in model.modules()
    ):
        return lambda name: keep
    decoder = None
    if isinstance(batch.inputs, Mapping):
        decoder = batch.inputs.get("decoder_attention_mask")
    if decoder is not None:
        decoder = _checked(decoder, outputs, f"the decoder's mask of {about.split(' of ')[-1]}")

    def side(name: str) -> Tensor | None:
        parts = name.split(".")
        if _CROSS.search(name):
            return keep if parts[-1] in _READS else decoder
        return keep if "encoder" in parts else decoder

    return side


def _checked(given: Any, outputs: Tensor, about: str) -> Tensor:
    """The mask [N, T]."""
    n = len(outputs)
    if not isinstance(given, Tensor):
        raise TypeError(f"{about} must be a tensor [N, T], got {type(given).__name__}")
    if given.is_complex():
        raise TypeError(f"{about} must be bool or of zeros and ones, got {given.dtype}")
    if given.dim() != 2 or len(given) != n:
        raise ValueError(f"{about} must be [N, T] with N = {n}, got {list(given.shape)}")
    return given


def _require_values(keep: Tensor, checks: Checks, about: str) -> None:
    if keep.dtype != torch.bool and keep.numel():
        bad = (keep != 0) & (keep != 1)
        checks.require(
            ~bad.any(),
            lambda least, most: (
                f"{about} must hold 0 (no data) and 1 (data) alone, got values from {least:g} to "
                f"{most:g}; of a mask that is added to scores, pass (mask == 0)"
            ),
            lambda: keep.amin(),
            lambda: keep.amax(),
        )
    checks.require(
        (keep != 0).any(),
        lambda: f"{about} leaves no position: a batch of padding alone has nothing to add",
    )
