"""Models of torch's ``fully_shard``: their parameters whole on every rank, for the time of a pass.

The passes here run a model backwards by other ways than a training step, row by row and layer by
layer, as often on one rank as that rank has batches. So all parameters are gathered before a pass
and let go of behind it, and FSDP's own hooks do nothing in between.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from hesskern.parallel.ranks import Ranks
from hesskern.parallel.replicas import inner_model

__all__ = ["replica", "whole_model"]


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
    ranks.agree("a sharded model", {"sharded modules": list(sharded)})
    with ExitStack() as stack:
        for name, module in sharded.items():
            _refuse_precision(name, module)
        for module in sharded.values():
            module.unshard()
            stack.callback(module.reshard)
        for module in sharded.values():
            stack.enter_context(_hooks_at_rest(module))
        yield inner


def replica(model: Any) -> Any:
    """The module inside ``DistributedDataParallel``, for what runs it again later.

    Raises:
        NotImplementedError: the model is sharded.
    """
    inner = inner_model(model)
    sharded = list(_sharded(inner))
    if sharded:
        raise NotImplementedError(
            f"model: module {sharded[0]!r} is sharded by fully_shard, and products may run the "
            "model again at any time; pass a replica that is whole on every rank (factors, ekfac "
            "and influence take sharded models)"
        )
    return inner


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
