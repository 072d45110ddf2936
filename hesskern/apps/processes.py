"""Commands under torchrun: the process's place, the group, and what one process does for all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import path_of_rank
from hesskern.parallel.first import on_first
from hesskern.parallel.ranks import RankError, Ranks
from hesskern.zoo.data import Dataset

__all__ = ["ONE", "Place", "Processes", "one_voice", "opened", "place"]

_T = TypeVar("_T")

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# As long as gloo waits by default; whoever fails or ends is noticed sooner.
_TIMEOUT = timedelta(minutes=30)
# How long a process that has failed waits for the first one to have said why.
_SAID = timedelta(seconds=20)
_CONNECT = timedelta(seconds=5)
_ENDED = "hesskern/first has ended"


@dataclass(frozen=True)
class Place:
    """Of a process that torchrun has started.

    Attributes:
        rank, size: among all processes.
        local_rank, local_size: among those of its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place | None:
    """What torchrun's variables say; None where there are none, or one process alone.

    Raises:
        ValueError: some of them are missing, or are no such numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _whole("RANK"), _whole("WORLD_SIZE")
    if size == 1:
        return None
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be in [0, WORLD_SIZE) = [0, {size}), got {rank}")
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise ValueError(
            f"RANK and WORLD_SIZE = {size} are set, but {', '.join(missing)} not: start the "
            "command with torchrun, which sets all of them, or unset these two"
        )
    local = _whole("LOCAL_RANK", rank), _whole("LOCAL_WORLD_SIZE", size)
    return Place(rank, size, *local)


def _whole(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes the first alone writes to the terminal, and is heard before they end.

    torchrun ends all processes as soon as one has failed. So one that fails stays until the first
    has said why; where that takes too long, it says so itself.
    """
    try:
        here = place()
    except ValueError:
        # Whoever needs its place says what is wrong with it.
        here = None
    if here is None:
        yield
        return
    kept = io.StringIO()
    try:
        if here.rank == 0:
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(kept):
                yield
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            _ended(here, kept.getvalue())
        raise


def _ended(here: Place, words: str) -> None:
    """Of the first process: says that it has said all. Of the others: waits for that."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Not among the names that torch declares.
        store = dist.TCPStore(*address, timeout=_CONNECT)  # type: ignore[attr-defined]
        if here.rank == 0:
            store.set(_ENDED, "")
            return
        store.wait([_ENDED], _SAID)
    except (KeyboardInterrupt, RuntimeError):
        if here.rank > 0 and words:
            print(f"rank {here.rank} of {here.size}: {words}", file=sys.stderr, end="", flush=True)


@dataclass
class Processes:
    """The processes that do a command's work together; one alone where ``group`` is None.

    Every method is to be called by all of them, in the same order.

    Attributes:
        group: a process group, for arguments of this name.
        ranks: of it.
    """

    group: Any = None
    ranks: Ranks | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.ranks is None or self.ranks.rank == 0

    def section(self, what: str) -> AbstractContextManager[None]:
        """See :meth:`Ranks.section`; of one process nothing."""
        return nullcontext() if self.ranks is None else self.ranks.section(what)

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """An error in the block that every process has itself goes on; others end all of them.

        Args:
            what: is done in the block, for messages.

        Raises:
            RankError: some processes have an error that others have not.
        """
        if self.ranks is None:
            yield
            return
        try:
            with self.ranks.section(what):
                yield
        except Exception as error:
            own = not isinstance(error, RankError)
            if own and not all(self.ranks.gather("whose error it is", own)):
                rank, size = self.ranks.rank, self.ranks.size
                words = f"{type(error).__name__}: {error}"
                raise RankError(f"rank {rank} of {size} failed in {what}: {words}") from error
            if not own:
                self.ranks.gather("whose error it is", own)
            raise

    def same(self, value: _T) -> _T:
        """The first process's value, of what JSON can hold."""
        return (
            value
            if self.ranks is None
            else self.ranks.gather("the first value", value if self.first else None)[0]
        )

    def all(self, value: bool) -> bool:
        """Whether the value is true on every process."""
        return value if self.ranks is None else all(self.ranks.gather("yes or no", value))

    def see(self, path: Path) -> bool:
        """Whether the first process has the file, and the others see it, too."""
        # One after the other: the first may have written it a moment ago.
        return bool(self.same(path.is_file())) and self.all(path.is_file())

    def on_first(self, what: str, work: Callable[[], _T]) -> _T | None:
        """See :func:`hesskern.parallel.first.on_first`."""
        return work() if self.ranks is None else on_first(self.ranks, what, work)

    def weights(self, model: nn.Module, what: str, work: Callable[[], _T]) -> _T | None:
        """``work()``, which changes the model in place, on the first process; its weights on all.

        Args:
            model: the same on all processes but for its values.
            what, work: see :meth:`on_first`.
        """
        result = self.on_first(what, work)
        if self.ranks is not None:
            with torch.no_grad():
                self.broadcast(list(model.state_dict().values()))
        return result

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Puts the first process's values into all processes' tensors."""
        if self.ranks is None:
            return
        sent = [tensor.detach().contiguous() for tensor in tensors]
        self.ranks.broadcast_(sent, 0)
        for tensor, values in zip(tensors, sent, strict=True):
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)

    def own(self, path: Path) -> Path:
        """The file of this process among those that each writes for itself."""
        own: Path = path_of_rank(path, self.ranks)
        return own

    def batches(self, data: Dataset, size: int) -> Any:
        """This process's part of the data in batches, which know their samples' numbers."""
        if self.ranks is None:
            return data.batches(size)
        return data.part(size, self.ranks.rank, self.ranks.size)


ONE = Processes()
"""One process alone."""


@contextmanager
def opened(device: str) -> Iterator[Processes]:
    """The processes that torchrun has started, for the time of the block.

    Args:
        device: of the command. "cuda" is a GPU for each process of a machine where there are
            enough, which then talk by NCCL; otherwise they talk by gloo.

    Raises:
        ValueError: torchrun's variables are not as they should be.
        RuntimeError: there is a group already, or the others are not found.
    """
    here = place()
    if here is None:
        yield ONE
        return
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is initialized already in this process")
    backend = _backend(here, device)
    dist.init_process_group(
        backend, rank=here.rank, world_size=here.size, timeout=_TIMEOUT, init_method="env://"
    )
    try:
        yield Processes(dist.group.WORLD, Ranks.of(dist.group.WORLD))
    finally:
        dist.destroy_process_group()


def _backend(here: Place, device: str) -> str:
    """Of the group; lets a process that has a GPU of its own use it as "cuda"."""
    if device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        return "gloo"
    count = torch.cuda.device_count()
    if device == "cuda":
        torch.cuda.set_device(here.local_rank % count)
        if here.local_size <= count:
            return "cpu:gloo,cuda:nccl"
    return "gloo"
