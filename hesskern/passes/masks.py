"""Which positions of a batch are data: masks [N, T], and the layers whose rows they speak of.

A masked position counts nowhere: neither its input nor its gradient is looked at, whatever they
hold. A mask speaks of a linear call whose samples have T rows each, and of a convolution over
sequences with T columns. What has one row per sample, and images, are not the mask's; a layer with
another number of positions is refused, since which of them are data is then for the caller to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.devices import on_host
from hesskern.passes.batches import Batch
from hesskern.passes.checks import Checks
from hesskern.passes.diagonal_uses import DiagonalUse, mask_positions
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layer_uses import LayerUse, positions_of
from hesskern.passes.layers import LayerSpec
from hesskern.passes.position_mask import PositionMask

__all__ = ["LayerMasks", "checked_mask", "masked_diagonals", "masked_uses"]

# Of an encoder-decoder model, the layers of the decoder that read the encoder's positions.
_CROSS = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attention|cross_attn)(\.|$)"
)
_READS = frozenset("k v k_proj v_proj key value key_proj value_proj".split())


def checked_mask(position_mask: Any) -> Callable[[Any], Any] | None:
    """The argument ``position_mask``, or a TypeError where it cannot be called."""
    if position_mask is not None and not callable(position_mask):
        raise TypeError(
            "position_mask must be a function of a batch's inputs that gives its mask [N, T], got "
            f"{type(position_mask).__name__}"
        )
    return position_mask


@dataclass
class LayerMasks:
    """The masks of a batch's layers.

    Its mask is [N, T], or a dict of patterns of layers' names, each with such a mask or None; the
    first pattern that fits a layer counts, and a layer that none fits has no mask. In
    encoder-decoder models of transformers a mask [N, T] is the encoder's; what works on the
    decoder's positions has the inputs' ``decoder_attention_mask``.

    Attributes:
        batch: has a mask, or none.
        specs: of the layers.
        samples: N.
        model: runs on the batch.
        checks: of the pass.
    """

    batch: Batch
    specs: Mapping[str, LayerSpec]
    samples: int
    model: nn.Module
    checks: Checks
    _made: dict[int, PositionMask | None] = field(default_factory=dict)
    _spoken: set[int] = field(default_factory=set)
    _others: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, n = self.batch.mask, self.samples
        self._about = f"the mask of batch {self.batch.index}"
        self._named = isinstance(given, Mapping)
        self._choose: Callable[[str], Tensor | None]
        if given is None:
            self._choose = lambda name: None
        elif self._named:
            self._choose = _by_pattern(given, self.specs, n, self._about)
        else:
            keep = _checked(given, n, self._about)
            self._choose = _by_side(keep, self.batch, n, self.model, self._about)

    def of(self, name: str, count: int) -> PositionMask | None:
        """The mask of a layer's call with ``count`` positions per sample, if there is one.

        Raises:
            TypeError: a mask is not a tensor, or of complex numbers.
            ValueError: it holds other values than 0 and 1 or 0 alone; the layer has another number
                of positions, so that it cannot be told which of them are data.
        """
        keep = self._choose(name)
        if keep is None:
            return None
        spec = self.specs[name]
        made = self._mask(keep)
        if count == keep.shape[1] and (self._named or len(spec.kernel_size) < 2):
            self._spoken.add(id(keep))
            return made
        if count > 1:
            self._others[name] = count
            # With all positions data there is nothing to tell apart, whatever the layer's are.
            if self._named or made is not None:
                _refuse(spec, count, keep.shape[1], self._named, self._about)
        return None

    def of_module(self, name: str, count: int) -> PositionMask | str | None:
        """The mask of an operation with ``count`` positions by a module's parameter, if any.

        Where it cannot be told which of them are data, the reason. Neither module nor parameter
        need be a layer.
        """
        keep = self._choose(name)
        made = None if keep is None else self._mask(keep)
        if keep is None or made is None or count == keep.shape[1]:
            return made
        if count <= 1:
            return None
        return (
            f"acts on {count} positions per sample, while the mask has {keep.shape[1]}, and it "
            "cannot be told which of them are data"
        )

    @property
    def sided(self) -> bool:
        """Whether an encoder and a decoder have different masks, and positions are left out."""
        if self._named or not _has_sides(self.model):
            return False
        sides = [self._choose(side) for side in ("encoder", "decoder")]
        return any(keep is not None and self._mask(keep) is not None for keep in sides)

    def _mask(self, keep: Tensor) -> PositionMask | None:
        """None where all positions are data."""
        if id(keep) not in self._made:
            _require_values(keep, self.checks, self._about)
            # With all positions there is nothing to leave out.
            whole = on_host(keep) and bool(keep.all())
            device = model_device(self.model)
            self._made[id(keep)] = None if whole else PositionMask(keep.bool(), device)
        if keep.shape[1] == 1 and not self._named:
            _require_whole(keep, self.checks, self._about)
        return self._made[id(keep)]

    def settle(self) -> None:
        """Behind the last call: refuses a mask [N, T] that spoke of no layer."""
        _require_spoken(self._spoken, self._others, self.batch, self._about)


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
        batch: with its mask.
        uses: by layer.
        specs: of the layers.
        outputs: [N, ...] of the model.
        model: gave them.
        checks: of the pass.

    Raises:
        TypeError, ValueError: as :class:`LayerMasks`, or a mask is not [N, T], or speaks of no
            layer.
    """
    if batch.mask is None or not len(outputs):
        return uses
    masks = LayerMasks(batch, specs, len(outputs), model, checks)
    # Where padding could be among rows that a router has chosen, the layer has been left out.
    result = {
        name: [
            use if mask is None else replace(use, mask=mask)
            for use in layer
            for mask in [None if use.routed else masks.of(name, positions_of(specs[name], use))]
        ]
        for name, layer in uses.items()
    }
    masks.settle()
    return result


def masked_diagonals(
    batch: Batch,
    uses: dict[str, list[DiagonalUse]],
    specs: Mapping[str, LayerSpec],
    outputs: Tensor,
    model: nn.Module,
    checks: Checks,
) -> tuple[dict[str, list[DiagonalUse]], dict[str, str]]:
    """The uses of parameters that are no matrices, with the batch's mask where it speaks of them.

    Args:
        batch, specs, outputs, model, checks: as for :func:`masked_uses`.
        uses: by parameter.

    Returns:
        the uses, and why parameters have none whose positions cannot be told to be data or not.
    """
    if batch.mask is None or not uses:
        return uses, {}
    masks = LayerMasks(batch, specs, len(outputs), model, checks)
    found: dict[str, list[DiagonalUse]] = {}
    reasons: dict[str, str] = {}
    for name, own in uses.items():
        module = name.rpartition(".")[0]
        if masks.sided and sum(use.use.indices is not None for use in own) > 1:
            reasons[name] = (
                "is looked up several times, by the encoder and by the decoder, whose masks cannot "
                "be told apart there"
            )
            continue
        found[name] = []
        for use in own:
            count, columns = mask_positions(use)
            mask = masks.of_module(module, count)
            if mask is not None and use.routed:
                mask = "acts on rows that a router has chosen, and which are padding cannot be told"
            if isinstance(mask, str):
                reasons[name] = mask
            else:
                found[name].append(replace(use, mask=mask, columns=columns))
    return {name: own for name, own in found.items() if name not in reasons}, reasons


def _require_whole(keep: Tensor, checks: Checks, about: str) -> None:
    """Refuses samples without data where a sample has one position.

    A layer's one row of such a sample may be its token's, which is no data, or the sample's own.
    """
    checks.require(
        (keep != 0).all(),
        lambda: (
            f"{about} is {list(keep.shape)} and leaves samples without a position; it cannot be "
            "told which layers have one row for a token and which one for a sample (a pooler): "
            "leave these samples out of the batch, or let position_mask return a dict of masks by "
            "layers' names"
        ),
    )


def _refuse(spec: LayerSpec, count: int, length: int, named: bool, about: str) -> None:
    """Refuses a mask of so many positions where a layer's ``count`` rows may be made of them."""
    if named:
        raise ValueError(
            f"position_mask: layer {spec.name!r} has {count} positions, {about} that is returned "
            f"for it has {length}; a pattern before it can say None"
        )
    if len(spec.kernel_size) < 2:
        raise ValueError(
            f"layer {spec.name!r} has {count} positions per sample, {about} has {length}, and it "
            "cannot be told which of the layer's are data: let position_mask return a dict with "
            f"its mask [N, {count}], or None, under its name"
        )


def _require_spoken(spoken: set[int], others: dict[str, int], batch: Batch, about: str) -> None:
    """Refuses a mask [N, T] that no layer and no input has the length of."""
    given = batch.mask
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
    given: Mapping[str, Any], specs: Mapping[str, LayerSpec], samples: int, about: str
) -> Callable[[str], Tensor | None]:
    """A layer's mask by the first pattern that fits its name."""
    masks = {}
    for pattern, one in given.items():
        if not any(fnmatchcase(name, pattern) for name in specs):
            raise ValueError(
                f"position_mask: no layer fits {pattern!r}; there are {', '.join(specs)}"
            )
        masks[pattern] = None if one is None else _checked(one, samples, f"{about} for {pattern!r}")

    def choose(name: str) -> Tensor | None:
        return next((one for pattern, one in masks.items() if fnmatchcase(name, pattern)), None)

    return choose


def _has_sides(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder model of transformers, or holds one."""
    return any(
        getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True
        for module in model.modules()
    )


def _by_side(
    keep: Tensor, batch: Batch, samples: int, model: nn.Module, about: str
) -> Callable[[str], Tensor | None]:
    """A layer's mask by its name: one for all but in encoder-decoder models."""
    if not _has_sides(model):
        return lambda name: keep
    decoder = None
    if isinstance(batch.inputs, Mapping):
        decoder = batch.inputs.get("decoder_attention_mask")
    if decoder is not None:
        decoder = _checked(decoder, samples, f"the decoder's mask of {about.split(' of ')[-1]}")

    def side(name: str) -> Tensor | None:
        parts = name.split(".")
        if _CROSS.search(name):
            return keep if parts[-1] in _READS else decoder
        # The first one: a decoder that is a BERT has an encoder of its own inside.
        first = next((part for part in parts if part in ("encoder", "decoder")), "decoder")
        return keep if first == "encoder" else decoder

    return side


def _checked(given: Any, n: int, about: str) -> Tensor:
    """The mask [N, T]."""
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
                f"{most + 0.0:g}; of a mask that is added to scores, pass (mask == 0)"
            ),
            lambda: keep.amin(),
            lambda: keep.amax(),
        )
    checks.require(
        (keep != 0).any(),
        lambda: f"{about} leaves no position: a batch of padding alone has nothing to add",
    )
