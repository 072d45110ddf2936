"""State of an unfinished optimization on disk: whole or not at all; reading it runs no code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from hesskern.checkpoints.facts import differences
from hesskern.files import keep_if_possible
from hesskern.pacbayes.protocol import RENAMED

__all__ = ["ENVIRONMENT", "read_checkpoint", "write_checkpoint"]

ENVIRONMENT = "environment"
_FORMAT = "hesskern.certify-checkpoint/1"


def write_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes tensors and plain values; a kill at any moment leaves the old file or the new one.

    Warns:
        RuntimeWarning: it cannot be written: no reason to end what it is a copy of.
    """
    content = {"format": _FORMAT, "identity": identity, "state": state}
    keep_if_possible(path, lambda temporary: torch.save(content, temporary))


def read_checkpoint(
    path: Path, identity: dict[str, Any], exact: bool = True
) -> dict[str, Any] | None:
    """The state in ``path``, None if there is no such file.

    Args:
        path: of the file.
        identity: of the run; under "environment" what its rounding depends on.
        exact: whether a file of another environment is refused.

    Raises:
        ValueError: the file is damaged, or belongs to another run; names what differs.

    Warns:
        UserWarning: it was written in another environment, and ``exact`` is False.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise ValueError(f"checkpoint {path} is damaged; remove it to start anew") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {path} is not one of these; choose another file")
    found, identity = content["identity"], dict(identity)
    own = identity.pop(ENVIRONMENT, {})
    # Files of earlier versions do not say.
    there = found.pop(ENVIRONMENT, own)
    if "method" in found:
        found["method"] = RENAMED.get(found["method"], found["method"])
    for key in sorted(identity.keys() | found.keys()):
        if identity.get(key) != found.get(key):
            raise ValueError(
                f"checkpoint {path} belongs to another run: its {key} is {found.get(key)!r}, not "
                f"{identity.get(key)!r}; remove it or choose another file"
            )
    if difference := differences(there, own):
        about = f"checkpoint {path} was written elsewhere, so that the rest may round differently"
        if exact:
            raise ValueError(f"{about}: {difference} (exact_resume=False goes on nevertheless)")
        warnings.warn(f"{about}: {difference}", UserWarning, stacklevel=2)
    state: dict[str, Any] = content["state"]
    return state
