"""Fingerprint of the C++/CUDA sources, shared by setup.py and the import check."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["source_digest"]


def source_digest(csrc: Path) -> str:
    """First 16 hex digits of the SHA-256 over all C++/CUDA sources below ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.relative_to(csrc).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
