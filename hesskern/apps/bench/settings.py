"""What a benchmark run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hesskern.choices import check_counts

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Options of one run, the same in this process and in those that measure memory.

    Attributes:
        quick: small data, for a look at whether all runs.
        threads: intra-operator threads of torch.
        repeats: rounds; in each, every contender runs once, in turn.
        root: folder with MNIST's files; None: see :func:`hesskern.zoo.data.data_root`.
        checkpoint: state dict of the trained F-200^2, so that it is trained once per run.
        memory: whether to measure peak memory.
    """

    quick: bool = False
    threads: int = 0
    repeats: int = 5
    root: Path | None = None
    checkpoint: Path | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        check_counts(self, "repeats")
        if self.threads == 0:
            object.__setattr__(self, "threads", torch.get_num_threads())
