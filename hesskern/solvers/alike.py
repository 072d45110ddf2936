"""One algorithm run by all ranks of a group, each for itself and alike to the bit.

Products with an operator whose samples lie on several ranks give all of them the same bits. What an
algorithm makes of them is the same on every rank as long as they compute alike; whether they do is
compared from time to time, since ranks that go apart would wait for each other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesskern.parallel.ranks import Ranks, one_group
from hesskern.parallel.replicas import checksums

__all__ = ["agree_alike", "ranks_of"]


def ranks_of(group: Any, H: Any) -> Ranks | None:
    """The ranks that a call is made on: those of ``group``, or of the operator's samples.

    Raises:
        TypeError, RuntimeError: ``group`` is none that can be used.
        ValueError: it is another than that of the operator.
    """
    return one_group([Ranks.of(group), getattr(H, "ranks", None)])


def agree_alike(ranks: Ranks | None, what: str, facts: dict[str, Any], **tensors: Tensor) -> None:
    """Makes sure that all ranks are at the same numbers and the same bits.

    Args:
        ranks: all of which call this. None: there are no others.
        what: they run, for messages.
        facts: by name, of what JSON can hold.
        tensors: whose bits are compared.

    Raises:
        RankError: on every rank, where one has others.
    """
    if ranks is not None:
        about = (
            f"{what}, which all ranks run alike (the same arguments, kind of processor and number "
            "of threads)"
        )
        ranks.agree(about, {**facts, "checksums": checksums(tensors)})
