"""What a plan says, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hesskern.text import counted, number, seconds

__all__ = ["LayerPlan", "Plan", "size"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: float) -> str:
    """Bytes in the unit that gives three figures or fewer."""
    unit = 0
    while nbytes >= 1000 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{nbytes:.3g} {_UNITS[unit]}"


@dataclass(frozen=True)
class LayerPlan:
    """What one layer takes, in bytes.

    Attributes:
        name, kind: of the layer.
        shape: (m, d) of the weight as a matrix.
        positions: per sample, all uses together.
        factors: of what the result holds: factors, or eigenvectors and eigenvalues; 0 for stored
            samples. Layers that are always given the same inputs have their covariance in common:
            it counts for the first of them.
        rows: of all root rows of a batch at the layer's outputs, were they there at once.
        samples: of all samples stored, for Hessians; 0 where the budget has them made anew.
        workspaces: that a kernel takes inside at most.
        recomputed: whether the model runs again for every product with the layer's Hessian.
        spilled: whether the result's tensors of the layer lie where ``spill`` puts them.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    positions: int
    factors: int
    rows: int
    samples: int
    workspaces: int
    recomputed: bool = False
    spilled: bool = False


@dataclass(frozen=True)
class Plan:
    """What a pass will take, before it is made. Made by :func:`hesskern.plan`; prints as a table.

    All memory is in bytes of tensors on the model's device, beyond the model and the data.

    Attributes:
        what: "factors", "ekfac", "hessians" or "inputs".
        output: "exact", "mc" or "empirical".
        batch_size, num_samples, batches: of the pass.
        device: that it runs on.
        root_rows: per sample; 0 where there are none.
        blocks: that the root rows of a batch go backwards in, for factors and EKFAC; 0: one row of
            the whole batch after another.
        layers: what every layer takes.
        skipped: modules that will be left out, with the reason.
        peak: the most that is held at a time.
        at_peak: what that consists of.
        kept: what the result holds.
        model: what parameters and buffers take, which is there before.
        memory_budget: as it was given; None for the function's default.
        available: what may be used; None where that is not known.
        fits: whether the peak is below that.
        operations: floating-point operations of all of the pass, by what they are for.
        seconds: of all of the pass by its parts, as two batches took here; empty where none was
            timed.
        advice: what could be changed, and what it would take then.
        spill: as it was given; None: all is on the device.
        elsewhere: the most bytes at a time in files, or in the host's memory beside a GPU's.
        read_ahead: bytes of the host's memory that a product with a spilled Hessian reads into, at
            most.
    """

    what: str
    output: str
    batch_size: int
    num_samples: int
    batches: int
    device: str
    root_rows: int
    blocks: int
    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    peak: int
    at_peak: Mapping[str, int]
    kept: int
    model: int
    memory_budget: int | None
    available: int | None
    fits: bool
    operations: Mapping[str, int]
    seconds: Mapping[str, float]
    advice: tuple[str, ...]
    spill: str | None = None
    elsewhere: int = 0
    read_ahead: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it in lists, dicts, words and numbers, as JSON has them."""
        found = asdict(self)
        found["layers"] = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        found["advice"] = list(self.advice)
        return found

    def __str__(self) -> str:
        rows = f", {self.root_rows:,} root rows per sample" if self.root_rows else ""
        drawn = f", output={self.output!r}" if self.root_rows else ""
        lines = [
            f"{_WHAT[self.what]} of {counted(len(self.layers), 'layer')}{drawn}: "
            f"{counted(self.num_samples, 'sample')}, {self.batch_size:,} at a time{rows}",
            "",
            *_table(self.table()),
            "",
            f"Peak {size(self.peak)} on {self.device}, beyond the model's {size(self.model)}: "
            + ", ".join(f"{what} {size(n)}" for what, n in self.at_peak.items()),
            f"The result holds {size(self.kept)}"
            + ("" if self.available is None else f"; {size(self.available)} may be used")
            + ("" if self.fits else ": it does NOT fit"),
        ]
        if self.elsewhere:
            where = "files" if self.spill == "disk" else "pinned memory of the host"
            lines.append(
                f"In {where}: {size(self.elsewhere)}"
                + (f"; a product reads into {size(self.read_ahead)}" if self.read_ahead else "")
            )
        if self.blocks:
            lines.append(f"Root rows of a batch go backwards in {counted(self.blocks, 'block')}")
        total = sum(self.operations.values())
        parts = ", ".join(f"{what} {number(n / 1e9)}" for what, n in self.operations.items())
        lines.append(f"{number(total / 1e9)} billion operations: {parts}")
        if self.seconds:
            parts = ", ".join(f"{what} {seconds(s)} s" for what, s in self.seconds.items())
            lines.append(f"About {seconds(sum(self.seconds.values()))} s: {parts}")
        lines += [f"Left out: {name} {reason}" for name, reason in self.skipped.items()]
        lines += [f"* {text}" for text in self.advice]
        return "\n".join(lines)

    def table(self) -> list[list[str]]:
        """The layers as rows of words, headings first."""
        names = [name for name in _COLUMNS if any(getattr(la, name) for la in self.layers)]
        found = [["layer", "m x d", "positions", *(_COLUMNS[name] for name in names)]]
        for layer in self.layers:
            m, d = layer.shape
            cells = [size(getattr(layer, name)) for name in names]
            if layer.spilled:
                cells[names.index("factors" if layer.factors else "samples")] += " spilled"
            if layer.recomputed:
                cells[-1] += ", made anew"
            found.append([layer.name, f"{m} x {d}", str(layer.positions), *cells])
        return found


_WHAT = {
    "factors": "Kronecker factors",
    "ekfac": "EKFAC",
    "hessians": "Layer Hessians",
    "inputs": "Input covariances",
}
_COLUMNS = {
    "factors": "factors",
    "rows": "root rows",
    "samples": "samples",
    "workspaces": "workspace",
}


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
