"""Work of one rank for all, which may take longer than ranks otherwise wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from hesskern import interrupts
from hesskern.parallel.ranks import Ranks

__all__ = ["on_first"]

_T = TypeVar("_T")

# Seconds between two looks at whether the first rank is done.
_LOOK = 0.05


def on_first(
    ranks: Ranks, what: str, work: Callable[[], _T], heeds_interrupts: bool = False
) -> _T | None:
    """``work()`` on the first rank, while the others wait as long as that takes.

    They do not learn of a first rank that is killed, unless its group's store ends with it or
    somebody ends them, as torchrun does.

    Args:
        ranks: all call this, in the same order with whatever else they do together.
        what: is done, for messages.
        work: does nothing together with other ranks; its error is raised there, and RankError on
            the others.
        heeds_interrupts: whether it comes to an early end by itself at Ctrl-C; the others then wait
            on, until there is another one.

    Returns:
        what ``work`` gave; None on the others.
    """
    store = ranks.group.get_group_store()
    turn = ranks.gather("the first rank's turn", None if ranks.rank else time.time_ns())[0]
    key = f"hesskern/first/{turn}"
    result = None
    with ranks.section(what):
        if ranks.rank == 0:
            try:
                result = work()
            finally:
                store.set(key, "done")
        else:
            _wait(store, key, heeds_interrupts)
    return result


def _wait(store: Any, key: str, patient: bool) -> None:
    while True:
        try:
            while not store.check([key]):
                time.sleep(_LOOK)
                interrupts.check()
            return
        except KeyboardInterrupt:
            if not patient:
                raise
            interrupts.handled()
            patient = False
