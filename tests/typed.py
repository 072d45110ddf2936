"""The command line in several processes, as torchrun starts them, without torchrun.

A test's process holds the store, as torchrun does; each process of ``processes.py`` calls what the
console script calls.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from processes import run

from hesskern.apps import cli

__all__ = ["Typed", "typed"]


@dataclass
class Typed:
    """What one process made of the command."""

    code: int
    out: str
    err: str


def typed(
    arguments: Sequence[Any],
    folder: Path,
    ranks: int = 2,
    replaced: dict[str, Callable[..., Any]] | None = None,
    **variables: str,
) -> list[Typed]:
    """``hesskern ARGUMENTS`` in a folder, by rank.

    Args:
        arguments: words of the command.
        folder: where it is typed.
        ranks: number of processes; 1 for a command without torchrun.
        replaced: by "module:name", functions of this file's caller that stand in for others; they
            are called with what was there first.
        variables: of the environment, besides torchrun's.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [str(argument) for argument in arguments]
    return run(_typed, ranks, store.port, words, str(folder), replaced or {}, variables)


def _typed(
    group: dist.ProcessGroup,
    port: int,
    words: list[str],
    folder: str,
    replaced: dict[str, Callable[..., Any]],
    variables: dict[str, str],
) -> Typed:
    rank, size = group.rank(), group.size()
    dist.destroy_process_group()
    if size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    os.environ.update(variables)
    os.chdir(folder)
    for place, other in replaced.items():
        name, _, attribute = place.partition(":")
        module = importlib.import_module(name)
        first = getattr(module, attribute)
        setattr(module, attribute, lambda *a, other=other, first=first, **k: other(first, *a, **k))
    sys.argv = ["hesskern", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code or 0
    return Typed(code, out.getvalue(), err.getvalue())
