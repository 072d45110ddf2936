"""Models of torch's ``fully_shard``: their parameters whole on every rank, for the time of a pass.

The passes here run a model backwards by other ways than a training step, row by row and layer by
layer, as often on one rank as that rank has batches. So all parameters are gathered before a pass
and let go of behind it, and FSDP's own hooks do nothing in between. Products that run the model
again do the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hesskern.parallel.ranks import Ranks
from hesskern.parallel.replicas import checksums, inner_model

__all__ = ["gathered_values", "is_sharded", "whole_again", "whole_model"]

# Checksums of parameters that are whole just now, or were when they were last looked at.
_VALUES: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


@contextmanager
def whole_model(ranks: Ranks | None, model: Any) -> Iterator[Any]:
    """The module inside ``DistributedDataParallel``, whose parameters are whole in the block.

    Args:
        ranks: all of which come here together; None for a model that is taken as it is.
        model: of this rank.

    Raises:
        RankError: other modules are sharded on another rank.
        NotImplementedError: the model is sharded in a way that cannot be undone for a pass.
    """
    if ranks is None:
        yield model
        return
    inner = inner_model(model)
    sharded = _sharded(inner)
    _VALUES.pop(inner, None)
    ranks.agree("a sharded model", {"sharded modules": list(sharded)})
    with ExitStack() as stack:
        for name, module in sharded.items():
            _refuse_precision(name, module)
        for module in sharded.values():
            # FSDP keeps the tensors that it makes here, for training as well.
            with torch.inference_mode(False):
                module.unshard()
            stack.callback(module.reshard)
        for module in sharded.values():
            stack.enter_context(_hooks_at_rest(module))
        yield inner


def whole_again(
    ranks: Ranks | None, model: Any, runs: bool
) -> Callable[[], AbstractContextManager[Any]]:
    """What surrounds every product of an operator that may run a model again.

    Args:
        ranks: all of which call this, and make products together.
        model: of this rank, by :func:`whole_model`.
        runs: whether this rank runs it again.

    Returns:
        :func:`whole_model` where the model is sharded and one rank runs it, as then all have to
        gather its parameters; else nothing.
    """
    if ranks is None or not is_sharded(model):
        return nullcontext
    if not any(ranks.gather("whether the model runs again", runs)):
        return nullcontext
    return partial(whole_model, ranks, model)


def is_sharded(model: Any) -> bool:
    """Whether ``fully_shard`` was applied to a module of the model, whole just now or not."""
    return bool(_sharded(model))


def gathered_values(model: nn.Module) -> list[int]:
    """Numbers that change with a parameter or buffer of a model that is whole just now.

    Parameters are gathered anew every time, so that neither places nor versions tell anything; as
    long as they are whole, nobody changes them.
    """
    if model not in _VALUES:
        _VALUES[model] = checksums(dict(model.named_parameters()))
    return [*_VALUES[model].values(), *checksums(dict(model.named_buffers())).values()]


def _sharded(model: Any) -> dict[str, Any]:
    """The modules that ``fully_shard`` was applied to, by name."""
    # Whoever has such a module has imported this.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not isinstance(model, nn.Module):
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _refuse_precision(name: str, module: Any) -> None:
    policy = module._get_fsdp_state()._mp_policy
    if policy.param_dtype is not None or policy.output_dtype is not None:
        raise NotImplementedError(
            f"model: module {name!r} is sharded with {policy}, which computes in another dtype "
            "than the parameters have; shard without a MixedPrecisionPolicy for the pass, in the "
            "dtype that is meant"
        )


@contextmanager
def _hooks_at_rest(module: Any) -> Iterator[None]:
    """FSDP's hooks of a module leave inputs, outputs and parameters as they are."""
    state = module._get_fsdp_state()
    before = state._training_state
    # In this state they do nothing, since recomputation of a checkpoint passes them in it.
    state._training_state = type(before).PRE_BACKWARD
    try:
        yield
    finally:
        state._training_state = before
