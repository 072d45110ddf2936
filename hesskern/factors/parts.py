"""Results by layer that the ranks of a group have left sharded, and their parts put together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesskern.digests import digest
from hesskern.files import path_of_rank
from hesskern.parallel.ranks import Ranks
from hesskern.parallel.replicas import checksums
from hesskern.parallel.shares import shared_out
from hesskern.tensor_files import TensorFormat
from hesskern.text import listed

__all__ = ["Part", "check_sharded", "part_paths", "write_part"]

_NAMED = re.compile(r"rank(\d+(?:\+\d+)*)of(\d+)")


@dataclass(frozen=True)
class Part:
    """Which part of a whole result is here.

    Attributes:
        owners: of everything in the whole, by name and in its order, the rank that keeps it.
        size: number of ranks.
        ranks: those whose parts are here.
        whole: a digest of the whole, which its parts have in common and those of others have not.
    """

    owners: dict[str, int]
    size: int
    ranks: tuple[int, ...]
    whole: str

    @classmethod
    def of(cls, ranks: Ranks, tensors: Mapping[str, Sequence[Tensor]], about: Any) -> Part | None:
        """This rank's part of a result that all ranks have; None where there is one rank alone.

        Args:
            ranks: all of which call this with the same bits.
            tensors: of every thing in the result, by name: each is kept with all of its tensors.
            about: what else the result says, of what JSON can hold.

        Raises:
            RankError: the ranks do not have the same.
        """
        sizes = [sum(tensor.nbytes for tensor in own) for own in tensors.values()]
        owners = dict(zip(tensors, shared_out(sizes, ranks.size), strict=True))
        bits = checksums({f"{n} {i}": t for n, own in tensors.items() for i, t in enumerate(own)})
        whole = digest([bits, about])
        ranks.agree("a result that is left sharded", {"digest": whole, "owners": owners})
        return None if ranks.size == 1 else cls(owners, ranks.size, (ranks.rank,), whole)

    @classmethod
    def of_header(cls, found: Any) -> Part | None:
        """What :meth:`header` gave; None for the header of a whole."""
        if found is None:
            return None
        return cls(found["owners"], found["size"], tuple(found["ranks"]), found["whole"])

    @property
    def header(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "ranks": list(self.ranks)}

    @property
    def described(self) -> str:
        """``rank 0 of 2``."""
        word = "rank" if len(self.ranks) == 1 else "ranks"
        return f"{word} {listed([str(rank) for rank in self.ranks])} of {self.size}"

    def has(self, name: str) -> bool:
        """Whether something of the whole is here."""
        return self.owners[name] in self.ranks

    def reason(self, name: str) -> str | None:
        """Why something is missing; None where it is not in the whole either, or is here."""
        if name not in self.owners or self.has(name):
            return None
        return f"is kept by rank {self.owners[name]} of {self.size}"

    def check_complete(self, names: Iterable[str], path: Any) -> None:
        """Raises ValueError where a file does not hold what the part has."""
        if set(names) != {name for name in self.owners if self.has(name)}:
            raise ValueError(
                f"path: {str(path)!r} is damaged: it does not hold the part of {self.described}"
            )

    @staticmethod
    def joined(parts: Sequence[Part | None], paths: Sequence[Any]) -> Part | None:
        """What several files have together; None for the whole.

        Raises:
            ValueError: they do not go together.
        """
        if len(parts) == 1:
            return parts[0]
        first, held = parts[0], dict[int, Any]()
        for part, path in zip(parts, paths, strict=True):
            if part is None or first is None:
                whole = path if part is None else paths[0]
                raise ValueError(f"path: {str(whole)!r} is no part, but whole; read it alone")
            if (part.whole, part.size) != (first.whole, first.size):
                raise ValueError(
                    f"path: {str(path)!r} and {str(paths[0])!r} are parts of different results"
                )
            for rank in part.ranks:
                if rank in held:
                    raise ValueError(
                        f"path: {str(path)!r} and {str(held[rank])!r} both hold the part of rank "
                        f"{rank} of {part.size}"
                    )
                held[rank] = path
        assert first is not None
        if len(held) == first.size:
            return None
        return Part(first.owners, first.size, tuple(sorted(held)), first.whole)

    def refusal(self, what: str, load: str) -> str:
        """Words for what only the whole can be asked for.

        Args:
            what: it is, such as "an EKFAC".
            load: name of the function that reads parts.
        """
        return (
            f"this is a part of {what}, with the layers of {self.described} alone; save all "
            f"parts, and read them together with hk.{load}"
        )


def check_sharded(sharded: Any, ranks: Ranks | None) -> None:
    """Raises TypeError, or ValueError where nobody is there to share with."""
    if not isinstance(sharded, bool):
        raise TypeError(f"sharded must be True or False, got {sharded!r}")
    if sharded and ranks is None:
        raise ValueError("sharded=True leaves a part on each rank of a group, and needs group=")


def write_part(
    form: TensorFormat,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    part: Part | None,
) -> None:
    """Writes a result's file, or that of a part of it beside those of the others.

    Args:
        form: of the file.
        path: where the whole is, or would be.
        tensors, header: as in :meth:`TensorFormat.write`.
        part: None for a whole.

    Raises:
        FileNotFoundError: the folder does not exist.
        FileExistsError: there is a whole one, which would be read instead of the parts.
    """
    if part is None:
        form.write(path, tensors, header)
        return
    if Path(path).exists():
        raise FileExistsError(
            f"path: {str(path)!r} is there already, and would be read instead of the parts; "
            "remove it, or save under another name"
        )
    own = path_of_rank(path, "+".join(map(str, part.ranks)), part.size)
    form.write(own, tensors, {**header, "part": part.header})


def part_paths(path: Any) -> list[Any]:
    """The files that a path stands for, or several do.

    Args:
        path: a file, or the name under which ranks have each saved a part of their own, or
            several files.

    Raises:
        ValueError: there are no files, or some parts are missing, or are those of several results.
    """
    if not isinstance(path, (str, os.PathLike)):
        paths = list(path)
        if not paths:
            raise ValueError("path: must name at least one file, got none")
        return paths
    whole = Path(path)
    beside = whole.parent.iterdir() if whole.parent.is_dir() and not whole.exists() else ()
    begin, found = f"{whole.stem}.", dict[Path, "re.Match[str]"]()
    for file in sorted(beside):
        middle = file.name[len(begin) : len(file.name) - len(whole.suffix)]
        match = _NAMED.fullmatch(middle)
        if match and file.name == f"{begin}{middle}{whole.suffix}":
            found[file] = match
    if not found:
        return [path]
    sizes = {int(match[2]) for match in found.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"path: {str(path)!r} stands for parts of several results: "
            f"{', '.join(file.name for file in found)}; name the files that are meant"
        )
    (size,) = sizes
    present = {int(rank) for match in found.values() for rank in match[1].split("+")}
    missing = sorted(set(range(size)) - present)
    if missing:
        raise ValueError(
            f"path: of the {size} parts of {str(path)!r} those of rank "
            f"{listed([str(rank) for rank in missing])} are missing; name the files that are meant "
            "to read these alone"
        )
    return list(found)
