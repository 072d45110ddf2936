"""A function in several processes of one torch.distributed group, and what became of it in each.

>>> def both(group, number):  # at the top of a module
...     return number + group.rank()
>>> run(both, 2, 5)
[5, 6]

Functions are called with the group first. They must stand at the top of a module, as must the types
of what they are given. Whatever hangs is killed behind a limit, which the caller is told of.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

__all__ = ["Outcome", "outcomes", "run"]

Store = Literal["file", "tcp"]

_CONTEXT = multiprocessing.get_context("forkserver")
# The server imports once what every process needs, torch._dynamo as the first pass does; a process
# then starts within milliseconds.
_CONTEXT.set_forkserver_preload(["hesskern", "pytest", "torch._dynamo"])


@dataclass
class Outcome:
    """What became of a function in one process.

    Attributes:
        value: that it returned.
        error: type of the exception and its message; None where there was none.
        trace: where it was raised.
        exitcode: of the process; negative for a signal.
        seconds: until it was done, measured in the process; None where it was killed.
    """

    value: Any = None
    error: tuple[str, str] | None = None
    trace: str = ""
    exitcode: int | None = None
    seconds: float | None = None

    @property
    def message(self) -> str:
        return "" if self.error is None else f"{self.error[0]}: {self.error[1]}"


def run(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    limit: float = 180.0,
    store: Store = "file",
) -> list[Any]:
    """What the function returns, by rank.

    Args:
        function: called as ``function(group, *args)`` in every process.
        ranks: number of processes.
        args: what pickle and torch.save can carry.
        timeout: of the group, in seconds.
        limit: seconds behind which all processes are killed and the call fails.
        store: "file", or "tcp" on a free port, hosted by rank 0 as under a plain ``env://``.

    Raises:
        AssertionError: a process raised (its traceback is the message), or ended without a value.
    """
    found = outcomes(function, ranks, *args, timeout=timeout, limit=limit, store=store)
    for rank, outcome in enumerate(found):
        assert outcome.error is None, f"rank {rank}:\n{outcome.trace}"
        assert outcome.exitcode == 0, f"rank {rank} ended with {outcome.exitcode}"
    return [outcome.value for outcome in found]


def outcomes(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    limit: float = 180.0,
    store: Store = "file",
) -> list[Outcome]:
    """:func:`run`, of functions that may fail; raises AssertionError behind the limit alone."""
    with tempfile.TemporaryDirectory() as folder:
        _start_server()
        place = Path(folder) / "store"
        given = _saved((function, args))
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_child, args=(there, rank, ranks, str(place), store, timeout, given)
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, processes, limit)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


@functools.cache
def _start_server() -> None:
    """The server imports from where this process does, wherever it stands."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _collect(pipes: list[Connection], processes: list[Any], limit: float) -> list[Outcome]:
    until = time.monotonic() + limit
    found = [Outcome() for _ in pipes]
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), max(0.0, until - time.monotonic()))
        if not ready:
            hung = ", ".join(map(str, sorted(open_pipes.values())))
            raise AssertionError(f"rank {hung} took longer than {limit} seconds: it hangs")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                found[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                # Killed.
                continue
    for outcome, process in zip(found, processes, strict=True):
        process.join(max(0.0, until - time.monotonic()))
        outcome.exitcode = process.exitcode
    return found


def _child(
    pipe: Connection, rank: int, ranks: int, place: str, store: Store, timeout: float, given: bytes
) -> None:
    # Whoever runs the tests in the background may have it ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    # As pytest has them in the tests' own process.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch.*")
    begin = time.monotonic()
    outcome = Outcome()
    try:
        function, args = torch.load(io.BytesIO(given), weights_only=False)
        limit = timedelta(seconds=timeout)
        made = _tcp(place, rank, ranks) if store == "tcp" else dist.FileStore(place, ranks)
        dist.init_process_group("gloo", store=made, rank=rank, world_size=ranks, timeout=limit)
        outcome.value = function(dist.group.WORLD, *args)
    except BaseException as error:
        outcome.error = type(error).__name__, str(error)
        outcome.trace = traceback.format_exc()
    outcome.seconds = time.monotonic() - begin
    pipe.send_bytes(_saved(outcome))
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _tcp(place: str, rank: int, ranks: int) -> dist.Store:
    """Rank 0 takes a port that the system gives, and tells the others in a file."""
    if rank == 0:
        made = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        Path(place + ".new").write_text(str(made.port))
        os.replace(place + ".new", place)
        return made
    while not Path(place).exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(Path(place).read_text()), ranks, is_master=False)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
