"""What the scripts that measure a GPU leave in a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hesskern import build_info
from hesskern.apps.bench.machine import facts

__all__ = ["Table", "parser_of"]


def parser_of(doc: str, rounds: int) -> argparse.ArgumentParser:
    """What every such script takes, by its docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=float, default=1.0, help="of every problem's size (1)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of calls ({rounds})")
    return parser


class Table:
    """Results in ``name``.json and ``name``.md, written anew after every problem.

    Args:
        arguments: of :func:`parser_of`.
        name: of both files.
        headings: of the columns, of which the first two are words.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, headings: list[str]) -> None:
        self._folder, self._name = arguments.output, name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._about = _about(torch.device(arguments.device), arguments.part)
        self._results: list[dict[str, Any]] = []
        self._width = len(headings)
        ruler = ["---"] * 2 + ["---:"] * (len(headings) - 2)
        self._lines = [self._line(headings), f"|{'|'.join(ruler)}|"]

    def add(self, result: dict[str, Any], rows: list[list[str]]) -> None:
        """A problem's result and its rows, which may be short; printed as well."""
        lines = [self._line(row) for row in rows]
        print("\n".join(lines), flush=True)
        self._results.append(result)
        self._lines += lines
        self._write()

    def _line(self, cells: list[str]) -> str:
        return f"| {' | '.join([*cells, *[''] * (self._width - len(cells))])} |"

    def _write(self) -> None:
        """Both files, each whole or not at all."""
        for file, text in (
            (f"{self._name}.json", json.dumps({"about": self._about, "problems": self._results})),
            (f"{self._name}.md", f"{self._about['device']}\n\n" + "\n".join(self._lines) + "\n"),
        ):
            temporary = self._folder / f".{file}"
            temporary.write_text(text)
            temporary.rename(self._folder / file)


def _about(device: torch.device, part: float) -> dict[str, Any]:
    """What was measured on, and how it was built."""
    return {
        "machine": facts(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "build": build_info(),
        "part": part,
    }
