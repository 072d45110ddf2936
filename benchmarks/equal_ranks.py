"""A group of as many ranks as one likes in one process, all with the same data; counts messages.

torch's own fake group (``torch.testing._internal.distributed.fake_pg``) leaves outputs as they
are, so that nothing behind its first exchange means anything. In this one every other rank is taken
to give what this process, the group's first, gives: a call ends as it would, with the sums of so
many equal parts, which can be checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["EqualRanks", "equal_ranks"]


class _Done(dist._Work):
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class _Store:
    """What the first of the ranks sees of a store to which all of them write the same."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()

    def _own(self, key: str) -> str:
        # Keys that end with a rank are that rank's; it wrote what the first did.
        head, _, tail = key.rpartition("/")
        return f"{head}/0" if tail.isdigit() else key

    def set(self, key: str, value: str) -> None:
        self.calls["set"] += 1
        self._values[key] = value

    def get(self, key: str) -> str:
        self.calls["get"] += 1
        return self._values[self._own(key)]

    def add(self, key: str, amount: int) -> int:
        self.calls["add"] += 1
        self._values[key] = self._values.get(key, 0) + amount * self._size
        return self._values[key]

    def has_extended_api(self) -> bool:
        return True

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        # All others have read what the first has just written.
        return all(key.endswith("/all read") or self._own(key) in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.calls["wait"] += 1
        if not self.check(keys):
            raise RuntimeError(f"nobody will write {keys}")

    def multi_get(self, keys: list[str]) -> list[str]:
        self.calls["multi_get"] += 1
        return [self._values[self._own(key)] for key in keys]

    def delete_key(self, key: str) -> bool:
        self.calls["delete"] += 1
        return self._values.pop(key, None) is not None


class EqualRanks(dist.ProcessGroup):
    """The first of ``size`` ranks.

    Attributes:
        messages: that it sends to other ranks, by the kind of collective: one to each other rank
            for all to all and for gathering.
        sent: bytes of them, by the kind.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.messages: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.store = _Store(size)
        self._device_types_ = [torch.device("cpu")]
        self._exchanged: Tensor | None = None

    @property
    def _device_types(self) -> list[torch.device]:
        return self._device_types_

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(
            options=SimpleNamespace(_timeout=timedelta(seconds=60)), name=lambda: "gloo"
        )

    def get_group_store(self) -> Any:
        return self.store

    def getBackendName(self) -> str:
        return "equal"

    def forget(self) -> None:
        """Begins to count anew."""
        for counter in (self.messages, self.sent, self.store.calls):
            counter.clear()

    def _count(self, kind: str, each: int) -> None:
        self.messages[kind] += self.size() - 1
        self.sent[kind] += each * (self.size() - 1)

    def alltoall_base(
        self, out: Tensor, given: Tensor, out_sizes: Any, sizes: Any, *_: Any
    ) -> dist.Work:
        share = given.numel() // self.size()
        self._count("all to all", share * given.element_size())
        # Every rank gives this one the part that it would itself keep.
        out.view(self.size(), share).copy_(given[:share])
        self._exchanged = given.clone()
        return _Done()

    def _gathered(self, out: Tensor, given: Tensor) -> dist.Work:
        self._count("gather", given.numel() * given.element_size())
        parts = out.view(self.size(), -1)
        sums, self._exchanged = self._exchanged, None
        if sums is not None and sums.numel() == out.numel():
            # What was exchanged has been added up: by every rank another part.
            parts.copy_(self._added(sums, given).view_as(parts))
        else:
            parts.copy_(given.view(1, -1))
        return _Done()

    def _added(self, sums: Tensor, own: Tensor) -> Tensor:
        """The bytes times the number of ranks, in the dtype in which this one's part is right."""
        for dtype in (torch.float32, torch.float64, torch.int64):
            found = (sums.view(dtype) * self.size()).view(torch.uint8)
            if torch.equal(found[: own.numel()], own):
                return found
        raise AssertionError("what was exchanged has not been added up")

    def all_gather_single(self, out: Tensor, given: Tensor, *_: Any) -> dist.Work:
        return self._gathered(out, given)

    def _allgather_base(self, out: Tensor, given: Tensor, *_: Any) -> dist.Work:
        return self._gathered(out, given)

    def broadcast(self, tensors: list[Tensor], *_: Any) -> dist.Work:
        self._count("broadcast", sum(t.numel() * t.element_size() for t in tensors))
        return _Done()


@contextmanager
def equal_ranks(size: int) -> Iterator[EqualRanks]:
    """The group, while torch.distributed is initialized."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield EqualRanks(size)
    finally:
        dist.destroy_process_group()
