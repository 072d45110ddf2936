"""What the scripts that measure a GPU leave in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hesskern import build_info
from hesskern.apps.bench.machine import facts

__all__ = ["about", "write"]


def about(device: torch.device, part: float) -> dict[str, Any]:
    """What was measured on, and how it was built."""
    return {
        "machine": facts(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "build": build_info(),
        "part": part,
    }


def write(folder: Path, name: str, made: dict[str, Any], problems: Any, lines: list[str]) -> None:
    """``name``.json and ``name``.md, each whole or not at all."""
    for file, text in (
        (f"{name}.json", json.dumps({"about": made, "problems": problems})),
        (f"{name}.md", f"{made['device']}\n\n" + "\n".join(lines) + "\n"),
    ):
        temporary = folder / f".{file}"
        temporary.write_text(text)
        temporary.rename(folder / file)
