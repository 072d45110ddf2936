"""Safetensors files with a header: tensors, and all else as JSON in the file's metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from hesskern.digests import tensor_digest
from hesskern.files import written_whole

__all__ = ["OpenedFile", "TensorFormat", "savable", "sealed"]

_KEY = "hesskern"
# In a header that is sealed: digests of tensors, and of all else.
_SUMS, _SEAL = "checksums", "header"


def savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and on the host, copied where two share their memory.

    The file's format refuses anything else.
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


@dataclass(frozen=True)
class OpenedFile:
    """A file that is being read.

    Attributes:
        header: what was given to :meth:`TensorFormat.write`, without the format's name.
        seal: digest of the header and of all tensors' digests; None in files of earlier versions,
            which have none of these.
    """

    header: dict[str, Any]
    seal: str | None
    _file: Any
    _where: str
    _sums: Mapping[str, str] | None

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now, on the CPU.

        Raises:
            ValueError: it holds other bits than were written.
        """
        found: Tensor = self._file.get_tensor(name)
        if self._sums is not None and tensor_digest(found) != self._sums[name]:
            raise self.damaged(f"tensor {name!r} holds other bits than were written")
        return found

    def check(self) -> None:
        """Raises ValueError where the header, or the tensors' names, are not what was written."""
        if self._sums is None and self.seal is None:
            return
        if self._sums is None or self.seal != _digest({**self.header, _SUMS: self._sums}):
            raise self.damaged("its header is not what was written")
        if sorted(self._sums) != sorted(self.names):
            raise self.damaged("its tensors are not those that its header names")

    def damaged(self, how: str) -> ValueError:
        """The error of a file that is not as it was written."""
        return ValueError(f"{self._where} is damaged: {how}")


def sealed(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with digests of the tensors, and one of all that is in it."""
    sums = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    # As it will be read.
    content = json.loads(json.dumps({**header, _SUMS: sums}))
    return {**content, _SEAL: _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TensorFormat:
    """One kind of file.

    Attributes:
        name: stands in the header, with a version.
        content: what such a file holds, for messages.
        kind: what such a file is, for messages.
        argument: that the path is given as, for messages.
        seals: whether a file gets checksums; not what has a digest of its own.
    """

    name: str
    content: str
    kind: str
    argument: str = "path"
    seals: bool = True

    def packed(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
        """A file's bytes."""
        ready = savable(tensors)
        return save(ready, metadata=self.metadata(self._whole(ready, header)))

    def write(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
    ) -> None:
        """Writes a file, which appears whole or not at all.

        Args:
            path: of the file.
            tensors: of any shape, by name.
            header: what JSON takes.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{self.argument}: there is no folder {str(target.parent)!r}")
        ready = savable(tensors)
        metadata = self.metadata(self._whole(ready, header))
        with written_whole(target) as temporary:
            save_file(ready, temporary, metadata=metadata)

    def _whole(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Mapping[str, Any]:
        return sealed(tensors, header) if self.seals else header

    def metadata(self, header: Mapping[str, Any]) -> dict[str, str]:
        """The header with the format's name, as the file keeps it."""
        return {_KEY: json.dumps({"format": self.name, **header})}

    def _other(self, found: Any) -> str:
        """What is wrong with a file of another format."""
        if not isinstance(found, str):
            return f"does not hold {self.content}"
        kind, _, version = found.rpartition("/")
        own, _, known = self.name.rpartition("/")
        if kind == own and version.isdecimal() and int(version) > int(known):
            return (
                f"was written by a newer version of hesskern (format {found!r}, this one reads "
                f"{self.name!r})"
            )
        return f"does not hold {self.content}, but is of format {found!r}"

    @contextmanager
    def opened(self, path: str | os.PathLike[str]) -> Iterator[OpenedFile]:
        """A file to read from; what is missing or of a wrong type in it makes it a damaged one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not one of these, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{self.argument}: there is no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                found = header.pop("format", None) if isinstance(header, dict) else None
                if found != self.name:
                    raise ValueError(f"{self.argument}: {str(path)!r} {self._other(found)}")
                where = f"{self.argument}: {str(path)!r}"
                seal, sums = header.pop(_SEAL, None), header.pop(_SUMS, None)
                opened = OpenedFile(header, seal, file, where, sums)
                opened.check()
                yield opened
        except (
            SafetensorError,
            KeyError,
            TypeError,
            AttributeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(
                f"{self.argument}: {str(path)!r} is not a readable {self.kind} ({error})"
            ) from error
