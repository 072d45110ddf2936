"""State of an unfinished optimization on disk: whole or not at all; reading it runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hesskern.files import keep_if_possible
from hesskern.pacbayes.protocol import RENAMED

__all__ = ["read_checkpoint", "write_checkpoint"]

_FORMAT = "hesskern.certify-checkpoint/1"


def write_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes tensors and plain values; a kill at any moment leaves the old file or the new one.

    Warns:
        RuntimeWarning: it cannot be written: no reason to end what it is a copy of.
    """
    content = {"format": _FORMAT, "identity": identity, "state": state}
    keep_if_possible(path, lambda temporary: torch.save(content, temporary))


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state in ``path``, None if there is no such file.

    Raises:
        ValueError: the file is damaged, or belongs to another run; names what differs.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise ValueError(f"checkpoint {path} is damaged; remove it to start anew") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {path} is not one of these; choose another file")
    found = content["identity"]
    if "method" in found:
        found["method"] = RENAMED.get(found["method"], found["method"])
    for key in sorted(identity.keys() | found.keys()):
        if identity.get(key) != found.get(key):
            raise ValueError(
                f"checkpoint {path} belongs to another run: its {key} is {found.get(key)!r}, not "
                f"{identity.get(key)!r}; remove it or choose another file"
            )
    state: dict[str, Any] = content["state"]
    return state
