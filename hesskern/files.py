"""Files that appear whole or not at all, and results that are not lost with their folder."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "NotDrawnError",
    "check_writable",
    "drawn_or_kept",
    "keep_if_possible",
    "path_of_rank",
    "remove_abandoned",
    "write_files",
    "written_whole",
]

# Room for the smallest of results: with less, not even a page and its figures would fit.
_LEAST_FREE = 2**24


class NotDrawnError(RuntimeError):
    """Pages or figures could not be made; the message says where the numbers are."""


@contextmanager
def written_whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, renamed to it at the end.

    After an error, or a kill at any moment, ``path`` is what it was.

    Args:
        path: of the file.
        durable: whether the new file is on the disk before it takes its place, and its name behind
            that: it then outlives a loss of power, too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        # Folders cannot be opened there.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_of_rank(path: str | os.PathLike[str], rank: int | str, size: int) -> Path:
    """The file of one of several ranks: "factors.rank0of2.safetensors"."""
    found = Path(path)
    return found.with_name(f"{found.stem}.rank{rank}of{size}{found.suffix}")


def remove_abandoned(path: Path, beside: str = "") -> None:
    """Removes what processes that are no more had begun to write in the place of ``path``.

    Args:
        path: of the file.
        beside: a regular expression for what may follow its name, in names of other such files.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        name = re.fullmatch(rf"\.{re.escape(path.name)}(?:{beside})\.(\d+)\.tmp", temporary.name)
        if name is not None and not _alive(int(name[1])):
            temporary.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process of this number is there; True where it cannot be told."""
    if os.name != "posix" or process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_writable(folder: Path, what: str = "output") -> None:
    """Says before the work, not after it, that its results could not be kept in a folder.

    Args:
        folder: need not be there yet.
        what: the argument, for the message.

    Raises:
        ValueError: it, or the one that it is to be made in, is no folder, takes no new file, or has
            hardly any space left.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    reason = ""
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = f"{existing} is no writable folder"
    else:
        try:
            # Permissions alone say little where a file system is read-only or a quota is used up.
            with tempfile.TemporaryFile(prefix=".hesskern-", dir=existing) as file:
                file.write(bytes(4096))
            free = shutil.disk_usage(existing).free
            if free < _LEAST_FREE:
                reason = f"{free / 2**20:.1f} MiB are free there, {_LEAST_FREE >> 20} are needed"
        except OSError as error:
            reason = f"a file in {existing} cannot be made: {error}"
    if reason:
        raise ValueError(f"{what} {folder} cannot be written: {reason}")


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes all files or none: each under a temporary name first, then all take their places.

    Returns:
        the paths, in the order of ``files``.

    Raises:
        OSError: the folder cannot be written; the files are then in a folder for temporary files,
            which the message names.
    """
    try:
        return _write_files(folder, files)
    except OSError as error:
        raise OSError(_rescued(folder, files, error)) from error


def _rescued(folder: Path, files: Mapping[str, bytes], error: OSError) -> str:
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="hesskern-"))
        _write_files(elsewhere, files)
    except OSError as again:
        return f"{folder} cannot be written ({error}), and neither can another folder ({again})"
    return f"{folder} cannot be written ({error}); what was computed is in {elsewhere}"


def _write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hesskern-", dir=folder) as staging:
        for name, content in files.items():
            (Path(staging) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(staging) / name).write_bytes(content)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(staging) / name, folder / name)
    return [folder / name for name in files]


def drawn_or_kept(
    folder: Path, numbers: Mapping[str, bytes], draw: Callable[[], Mapping[str, bytes]]
) -> list[Path]:
    """Writes numbers together with what is drawn from them; if that fails, the numbers alone.

    Args:
        folder: as for :func:`write_files`.
        numbers: files that are ready.
        draw: makes the others, which come first.

    Returns:
        the paths, those of ``draw`` first.

    Raises:
        NotDrawnError: drawing failed; says where the numbers are.
        OSError: as :func:`write_files`.
    """
    try:
        drawn = draw()
    except Exception as error:  # templates and figures raise types of their own
        paths = write_files(folder, numbers)
        raise NotDrawnError(
            f"the pages could not be drawn ({type(error).__name__}: {error}); the numbers are in "
            + ", ".join(map(str, paths))
        ) from error
    return write_files(folder, {**drawn, **numbers})


def keep_if_possible(path: Path, write: Callable[[Path], Any]) -> bool:
    """Writes a file that saves work next time; a warning, no error, where it cannot be written.

    Args:
        path: of the file; its folder is made, and it appears whole or not at all.
        write: fills the file under a temporary name.

    Returns:
        whether it was written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            write(temporary)
    # torch and safetensors have errors of their own for a full disk.
    except Exception as error:
        warnings.warn(
            f"{path} could not be written, so this work is not kept ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
