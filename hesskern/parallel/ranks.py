"""The processes of a torch.distributed group, and what they do together."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hesskern.parallel.bucket_sums import BUCKET, BucketSums
from hesskern.parallel.packing import Segment, layout, segments
from hesskern.parallel.statuses import RankError, Statuses
from hesskern.parallel.wire import Wire
from hesskern.progress import Progress

__all__ = ["RankError", "Ranks", "one_group", "section_of", "telling_of"]

# Of an exception, the statuses of the group whose ranks know of it.
_TOLD = "_hesskern_told"

# Exchanges of a group are numbered on, whoever makes them.
_STATUSES: WeakKeyDictionary[dist.ProcessGroup, Statuses] = WeakKeyDictionary()


class Ranks:
    """The processes of a group. Every method is to be called by all of them, in the same order.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
        group: of torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        if group not in _STATUSES:
            timeout = group._get_backend(group._device_types[0]).options._timeout
            given = group.get_group_store(), self.rank, self.size, timeout / timedelta(seconds=1)
            _STATUSES[group] = Statuses(*given)
        self._statuses = _STATUSES[group]

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """The ranks of a group; None for None.

        Args:
            group: ``torch.distributed.group.WORLD``, or what ``torch.distributed.new_group`` gave.

        Raises:
            TypeError: ``group`` is no process group.
            RuntimeError: torch.distributed is not initialized, or this process is not in the group.
        """
        if group is None:
            return None
        if not dist.is_available():
            raise RuntimeError("group: this torch was built without torch.distributed")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError("group: this process is no member of the group; do not call it here")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed process group such as "
                f"torch.distributed.group.WORLD, got {type(group).__name__}"
            )
        if not dist.is_initialized():
            raise RuntimeError("group: torch.distributed was shut down; initialize it again")
        return cls(group)

    def agree(self, what: str, facts: Mapping[str, Any], more: bool = False) -> None:
        """Makes sure that all ranks were given the same.

        Args:
            what: is to be done, for messages.
            facts: by name, of what JSON can hold.
            more: whether tensors are sent next.

        Raises:
            RankError: on every rank; names a rank, a fact, and both values.
        """
        text = {name: json.dumps(fact) for name, fact in facts.items()}
        digest = hashlib.sha256(json.dumps(text).encode()).hexdigest()
        if self._statuses.exchange(what, digest, judge=_are_one, more=more):
            return
        difference = self._statuses.exchange(what, text, judge=_first_difference)
        raise RankError(f"{what}: the ranks differ. {difference}")

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """At the end of the block all ranks know whether one has failed in it.

        A rank's own exception goes on there, and every other rank raises RankError, inside the
        block where it waits for that rank, or at the end.

        Args:
            what: is done in the block, for messages.

        Raises:
            RankError: another rank has failed, or did not come here within the group's timeout.
        """
        with self.telling(what):
            yield
        self._statuses.exchange(what)

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """:meth:`section` without its end, for blocks whose last act is one of all ranks.

        Args:
            what: is done in the block, for messages.

        Raises:
            RankError: another rank has failed, inside the block where it waits for that rank.
        """
        try:
            yield
        except RankError:
            # Everybody knows.
            raise
        except BaseException as error:
            if getattr(error, _TOLD, None) is not self._statuses:
                setattr(error, _TOLD, self._statuses)
                text = str(error).strip() or "no message"
                failure = f"{type(error).__name__}: {text}"
                self._tell(what, failure, leave=not isinstance(error, Exception))
            raise

    def _tell(self, what: str, failure: str, leave: bool) -> None:
        """Tells the others of an error, which is to be raised whatever becomes of this."""
        try:
            self._statuses.exchange(what, failure=failure, leave=leave)
        except RankError:
            return

    def watching(self, what: str, progress: Progress) -> Progress:
        """A callback for a pass of one rank's own, which ends it soon after another has failed.

        It asks the store at most once a second, and raises RankError. The first rank alone goes on
        telling ``progress``.
        """
        asked = time.monotonic()

        def told(description: str, done: int, total: int | None) -> None:
            nonlocal asked
            if time.monotonic() - asked > 1.0:
                asked = time.monotonic()
                if self._statuses.failed_elsewhere():
                    self._statuses.exchange(what)
            if self.rank == 0:
                progress(description, done, total)

        return told

    def sum_(
        self,
        tensors: Sequence[Tensor],
        upper: Sequence[bool] | None = None,
        what: str = "a sum over the ranks",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds up the tensors of all ranks, in place.

        Sums are made in the order of the ranks, in float64, so all ranks and all runs get the same
        bits.

        Args:
            tensors: of the same shapes and dtypes on every rank, on one device.
            upper: whether of a tensor [..., d, d] the upper triangles alone are defined and sent.
            what: is summed, for messages.
            facts: what else all ranks must have alike, as in :meth:`agree`.

        Raises:
            RankError: shapes, dtypes or facts differ, or a rank has failed or ended.
        """
        halves = [False] * len(tensors) if upper is None else list(upper)
        groups: dict[tuple[torch.dtype, torch.device], list[Segment]] = {}
        for tensor, half in zip(tensors, halves, strict=True) if self.size > 1 else ():
            most = BUCKET // 8 // tensor.element_size()
            groups.setdefault((tensor.dtype, tensor.device), []).extend(
                segments(tensor, half, most)
            )
        sums = [BucketSums(self.group, pieces, *kind) for kind, pieces in groups.items()]
        self.agree(what, {**(facts or {}), "tensors": layout(tensors, halves)}, more=True)
        with self._sending(what):
            for each in sums:
                each.run()

    def totals(self, what: str, *numbers: float) -> tuple[float, ...]:
        """The sums of numbers over the ranks, correctly rounded; ``what`` as in :meth:`gather`."""
        found = self.gather(what, list(numbers))
        return tuple(math.fsum(column) for column in zip(*found, strict=True))

    def gather(self, what: str, value: Any) -> list[Any]:
        """The values of all ranks.

        Args:
            what: the value is, for messages, and so that no rank takes another value for it.
            value: small, of what JSON can hold.
        """
        found: list[Any] = self._statuses.exchange(what, value)
        return found

    def told(self, what: str, value: Any) -> list[Any]:
        """:meth:`gather`, of what is large and mostly the same on all ranks."""
        text = json.dumps(value)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._statuses.exchange(what, digest, judge=_are_one):
            return [json.loads(text)] * self.size
        return self.gather(what, value)

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """The tensors [n_r, ...] of all ranks r, on this rank's device.

        Raises:
            RankError: they differ in more than their first axis, or a rank has failed or ended.
        """
        what = "a gathering of tensors"
        shape = list(tensor.shape[1:])
        self.agree(what, {"dtype": str(tensor.dtype), "shape [n, ...]": shape})
        lengths = self.gather("lengths of tensors", len(tensor))
        if self.size == 1 or not any(lengths) or 0 in shape:
            return [tensor.new_empty(n, *shape) for n in lengths] if self.size > 1 else [tensor]
        with self._sending(what):
            wire = Wire(self.group, tensor.device)
            row, most = math.prod(shape), max(lengths)
            given, got = (wire.buffer(n * most * row, tensor.dtype) for n in (1, self.size))
            given[: tensor.numel()].copy_(tensor.reshape(-1))
            given[tensor.numel() :] = 0
            wire.gather(got, given)
            parts = [part[: n * row] for part, n in zip(got.chunk(self.size), lengths, strict=True)]
            return [
                part.to(tensor.device, copy=True).view(n, *shape)
                for part, n in zip(parts, lengths, strict=True)
            ]

    def broadcast_(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Puts what rank ``owner`` has in its tensors into those of all ranks.

        Args:
            tensors: of the same shapes and dtypes on every rank.
            owner: a rank of the group.

        Raises:
            RankError: shapes or dtypes differ, or a rank has failed or ended.
        """
        what = f"a broadcast of rank {owner}"
        facts = {"tensors": layout(tensors, [False] * len(tensors)), "owner": owner}
        self.agree(what, facts, more=True)
        if self.size == 1:
            return
        with self._sending(what):
            for tensor in tensors:
                wire = Wire(self.group, tensor.device)
                for piece in segments(tensor, False, BUCKET // tensor.element_size()):
                    sent = wire.buffer(piece.count, tensor.dtype)
                    if self.rank == owner:
                        piece.pack(sent)
                    wire.broadcast(sent, owner)
                    piece.unpack(sent)

    @contextmanager
    def _sending(self, what: str) -> Iterator[None]:
        """Around collectives, whose errors say nothing of who has ended."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            self._statuses.exchange(what, failure=reason, wire=True)
            raise RankError(f"{what} failed: {reason}") from error


def section_of(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """:meth:`Ranks.section`, or nothing without ranks."""
    return nullcontext() if ranks is None else ranks.section(what)


def telling_of(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """:meth:`Ranks.telling`, or nothing without ranks."""
    return nullcontext() if ranks is None else ranks.telling(what)


def one_group(found: Iterable[Ranks | None]) -> Ranks | None:
    """The one group among these; None where there is none.

    Raises:
        ValueError: there are several.
    """
    groups = {id(ranks.group): ranks for ranks in found if ranks is not None}
    if len(groups) > 1:
        raise ValueError("group: operators of several process groups do not go together")
    return next(iter(groups.values()), None)


def _are_one(found: list[Any]) -> bool:
    return len(set(found)) == 1


def _first_difference(found: list[dict[str, str]]) -> str:
    """In words where one rank's facts differ from the first rank's."""
    first = found[0]
    for r, facts in enumerate(found):
        for name in {**first, **facts}:
            if first.get(name) != facts.get(name):
                mine, theirs = (json.loads(one.get(name, "null")) for one in (first, facts))
                return _told(name, mine, theirs, r)
    return "They gave their facts in another order."


def _told(name: str, first: Any, other: Any, rank: int) -> str:
    """The innermost place at which two values differ."""
    while True:
        if isinstance(first, dict) and isinstance(other, dict):
            keys = [k for k in {**first, **other} if first.get(k) != other.get(k)]
            if not keys:
                break
            name, first, other = f"{name} {keys[0]!r}", first.get(keys[0]), other.get(keys[0])
        elif isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
            places = [i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b]
            if not places or not isinstance(first[places[0]], (list, dict)):
                break
            name = f"{name} {places[0]}"
            first, other = first[places[0]], other[places[0]]
        else:
            break
    return f"{name}: {_short(first)} on rank 0, {_short(other)} on rank {rank}"


def _short(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 300 else text[:300] + "..."
