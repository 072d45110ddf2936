"""Whether a model's own loss takes labels where a loss here takes them.

A model of transformers computes a loss of its own where labels come with the inputs: most decoders
compare the logits of position t with the label of t + 1, others (those taken out of
encoder-decoders, XLNet) with that of t. Which of both cannot be read off its outputs, so one sample
runs once with one label, and the loss that comes back tells.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.passes.checks import Checks

__all__ = ["check_alignment"]

# Relative to one more than the loss, what it may differ by through rounding in its own dtype.
_ROUNDED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
_ROUNDED_NARROW = 5e-2


def check_alignment(
    model: nn.Module,
    run: Callable[[Tensor], Any],
    outputs: Tensor,
    shifts: bool,
    message: Callable[[float, float], str],
    checks: Checks,
) -> bool:
    """Refuses a model whose own loss takes labels at another position.

    A loss that is neither the one nor the other has terms that have no part here (label smoothing,
    a balance of experts): it says nothing of positions, and nothing is refused.

    Args:
        model: of transformers; ``forward()`` takes ``labels``.
        run: what the model returns for a sample with labels [1, T].
        outputs: [T, V] logits of that sample, T >= 2.
        shifts: whether the logits of position t are compared with the label of t + 1.
        message: of the error, called with the model's loss and the one here.
        checks: of the pass.

    Returns:
        whether the host has looked: False on a device, where ``checks`` will.

    Raises:
        ValueError: on the host, where the model's own loss takes labels otherwise.
    """
    if not _takes_labels(model):
        return True
    with torch.no_grad():
        labels, position, label = _telling(outputs.detach())
        try:
            result = run(labels.unsqueeze(0))
        except Exception:
            # A sample that does not run alone, or labels of another form: it tells nothing.
            return True
        loss, logits = _loss_and_logits(result)
        if loss is None or logits is None or logits.shape != (1, *outputs.shape):
            return True
        rows = _log_softmax(logits[0])
        at = -rows[position, label].reshape(1)
        before = -rows[position - 1, label].reshape(1)
        ours, other = (before, at) if shifts else (at, before)
        own = loss.reshape(1).to(ours)
        limit = _ROUNDED.get(loss.dtype, _ROUNDED_NARROW) * (1 + own.abs())
        wrong = ((own - other).abs() <= limit) & ((own - ours).abs() > 4 * limit)
        return checks.require(~wrong, message, own, ours)


def _takes_labels(model: nn.Module) -> bool:
    try:
        arguments = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    # A wrapper hands all arguments on.
    return "labels" in arguments or any(a.kind == a.VAR_KEYWORD for a in arguments.values())


def _log_softmax(logits: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(wide).log_softmax(-1)


def _telling(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [T] of which one counts, its position and its class.

    The one of whose probability two neighbouring positions differ most about.
    """
    tokens, classes = logits.shape
    rows = _log_softmax(logits)
    differences = (rows[1:] - rows[:-1]).abs().nan_to_num(0.0, 0.0, 0.0)
    place = differences.flatten().argmax()
    position, label = place // classes + 1, place % classes
    there = torch.arange(tokens, device=logits.device) == position
    return torch.where(there, label, -100), position, label


def _loss_and_logits(result: Any) -> tuple[Tensor | None, Tensor | None]:
    """Both, where a model has returned both, and nothing else is known to be part of the loss."""
    if isinstance(result, Mapping):
        if result.get("aux_loss") is not None:
            return None, None
        loss, logits = result.get("loss"), result.get("logits")
    elif isinstance(result, tuple) and len(result) > 1:
        loss, logits = result[0], result[1]
    else:
        return None, None
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor) or loss.numel() != 1:
        return None, None
    return loss, logits
