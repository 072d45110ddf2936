"""Ranks that were interrupted in different passes of EKFAC, and go on together.

Whoever has begun the second pass has the eigenvectors of all layers in its checkpoint, the same
bits as all others had. A rank that has not ends its first pass, and takes them from there: the sums
that they came from need not be made again, and would be the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hesskern.parallel.ranks import Ranks
from hesskern.parallel.replicas import checksums
from hesskern.text import listed

__all__ = ["ranks_ahead", "with_bases_of"]


def ranks_ahead(ranks: Ranks, stage: str | None, second: str, first_pass: bool) -> list[int]:
    """The ranks that go on in the second pass, whose eigenvectors all take; or none.

    Args:
        ranks: all of which call this.
        stage: that this rank's checkpoint was written in; None where there is none.
        second: name of the second pass's stage.
        first_pass: whether there is another one before it.

    Warns:
        UserWarning: a rank has nothing to go on with, so that all begin anew.
    """
    stages = ranks.gather("stages of checkpoints", stage)
    ahead = [rank for rank, each in enumerate(stages) if each == second]
    lost = [rank for rank, each in enumerate(stages) if each is None]
    if not (ahead and lost and first_pass):
        return ahead
    # Nobody could tell whether their data are those that the eigenvectors are of.
    warnings.warn(
        f"checkpoint: there is none of rank {listed([str(rank) for rank in lost])}, while rank "
        f"{listed([str(rank) for rank in ahead])} was in the second pass; all begin anew",
        UserWarning,
        stacklevel=3,
    )
    return []


def with_bases_of(
    ranks: Ranks, ahead: list[int], kept: Mapping[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """What ranks in the second pass have kept of the first, on all ranks.

    Args:
        ranks: all of which call this.
        ahead: those that have it, by :func:`ranks_ahead`.
        kept: what :meth:`SecondPass.part` gave; None on a rank that does not have it.
        device: where the eigenvectors are put.

    Returns:
        that, without the evidence, which is a rank's own.

    Raises:
        ValueError: the ranks ahead were not interrupted in one call.
    """
    told = None
    if kept is not None:
        plain = {name: kept[name] for name in ("layers", "made", "skipped", "settings")}
        shapes = {
            name: [[[len(u), str(u.dtype).split(".")[1]] for u in side] for side in sides]
            for name, sides in kept["bases"].items()
        }
        flat = [u for sides in kept["bases"].values() for side in sides for u in side]
        told = [plain, shapes, checksums({str(i): u for i, u in enumerate(flat)})]
    found = ranks.gather("what the second pass begins with", told)
    first = found[ahead[0]]
    differing = [rank for rank in ahead if found[rank] != first]
    if differing:
        raise ValueError(
            f"checkpoint: those of rank {ahead[0]} and rank {differing[0]} hold other "
            "eigenvectors, so they were not written by one call; remove them and begin anew"
        )
    plain, shapes, _ = first
    if kept is not None:
        # One kind of tensor everywhere, for which one backend stands.
        bases = {
            name: [[u.to(device) for u in side] for side in sides]
            for name, sides in kept["bases"].items()
        }
    else:
        bases = {
            name: [
                [torch.empty(n, n, dtype=getattr(torch, kind), device=device) for n, kind in side]
                for side in sides
            ]
            for name, sides in shapes.items()
        }
    if len(ahead) < ranks.size:
        own = [u for sides in bases.values() for side in sides for u in side]
        ranks.broadcast_(own, ahead[0])
    return {**plain, "bases": bases}
