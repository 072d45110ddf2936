"""Which figures a result has, for the report's page, its layers' pages, and files of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hesskern.apps import plotting
from hesskern.apps.analyze import wording
from hesskern.apps.analyze.digest import Digest
from hesskern.apps.analyze.result import AnalysisResult, Curve, LayerPair, Spectra
from hesskern.apps.pages import svg_uri

__all__ = ["Figure", "Figures", "file_names"]

_LONGEST = 150


@dataclass(frozen=True)
class Figure:
    """A picture with its file's name and a description for those who cannot see it."""

    name: str
    alt: str
    picture: plotting.Picture

    @property
    def uri(self) -> str:
        """The SVG, to be put into a page."""
        return svg_uri(self.picture.svg.encode())


def file_names(layers: list[str]) -> dict[str, str]:
    """A file name, without ending, for every layer: its own where that may be one."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for i, layer in enumerate(layers):
        # Some file systems tell no capitals from small letters, and none takes more than 255 bytes.
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", layer)[-_LONGEST:] or "layer"
        while name.lower() in taken:
            name = f"{name}-{i}"
        taken.add(name.lower())
        names[layer] = name
    return names


class Figures:
    """All figures of a result; each is drawn when it is first used.

    Args:
        result: what :func:`hesskern.apps.analyze.analysis.analyze` computed.

    Attributes:
        groups: those of the report's page, by section.
        layers: those of each layer's page.
    """

    def __init__(self, result: AnalysisResult) -> None:
        self._result = result
        self._digest = Digest(result)
        self._names = file_names(self._digest.layers)
        self._first = result["models"][0]["layers"]
        self._pairs = _pairs(result)
        by_layer = {name: self._of_layer(i, name) for i, name in enumerate(self._digest.layers)}
        self.groups: dict[str, list[Figure]] = {"overlap": self._of_all_layers()}
        for group in ("eigenvalues", "between"):
            self.groups[group] = [f[group] for f in by_layer.values() if group in f]
        self.groups["correspondence"] = [
            found[side]
            for side in ("input", "output")
            for found in by_layer.values()
            if side in found
        ]
        self.layers = {name: list(found.values()) for name, found in by_layer.items()}

    def files(self) -> dict[str, bytes]:
        """SVG and PNG of every figure, contents by file name."""
        figures = [f for group in (self.groups, self.layers) for fs in group.values() for f in fs]
        contents: dict[str, bytes] = {}
        for figure in {figure.name: figure for figure in figures}.values():
            contents[f"{figure.name}.svg"] = figure.picture.svg.encode()
            contents[f"{figure.name}.png"] = figure.picture.png
        return contents

    def overview(self) -> bytes:
        """A PNG of the result's three main figures side by side."""
        result, layers = self._result, self._digest.layers
        chosen = next((n for n in layers if n in self._published_eigenvalues), layers[0])
        return plotting.overview(
            wording.subject(result),
            layers,
            (chosen, self._first[chosen]),
            self._curves("overlap"),
            self._digest.mark,
            self._pairs,
            result["published"],
        )

    def _of_all_layers(self) -> list[Figure]:
        layers, mark = self._digest.layers, self._digest.mark
        published = self._result["published"]
        overlaps = published["overlap"] if published else None
        return [
            Figure(
                "overlap",
                "Overlap of the top-k spaces of the exact Hessian and its Kronecker form, by layer",
                plotting.overlap_panel(layers, self._curves("overlap"), mark, overlaps),
            ),
            Figure(
                "rank-one",
                "Largest singular value over Frobenius norm of the leading eigenvectors, by layer",
                plotting.rank_one_panel(layers, self._curves("rank_one"), mark),
            ),
        ]

    def _of_layer(self, index: int, name: str) -> dict[str, Figure]:
        """Figures of one layer, most telling first."""
        entry, mark, file = self._first[name], self._digest.mark, self._names[name]
        shares = {"overlap with exact H": self._curve("overlap", name)}
        shares["curvature captured"] = self._curve("captured", name)
        found = {
            "eigenvalues": Figure(
                f"eigenvalues-{file}",
                f"Leading eigenvalues of the exact Hessian and its Kronecker form, {name}",
                plotting.eigenvalue_panel(
                    name, index, entry, self._published_eigenvalues.get(name)
                ),
            ),
            "shares": Figure(
                f"kronecker-{file}",
                f"Overlap and captured curvature of the Kronecker form of {name}, over k",
                plotting.share_panel(name, index, shares, mark),
            ),
            "singular": Figure(
                f"singular-values-{file}",
                f"Singular values of the leading eigenvectors of {name}, as matrices",
                plotting.singular_value_panel(name, index, entry["singular_values"], mark),
            ),
        }
        if self._pairs:
            found["between"] = Figure(
                f"between-models-{file}",
                f"Overlap of leading spaces between models, {name}",
                plotting.between_panel(name, index, entry["parameters"], self._pairs[name]),
            )
        if "factors" in entry:
            found["spectra"] = Figure(
                f"factors-{file}",
                f"Leading eigenvalues of the two Kronecker factors of {name}",
                plotting.spectra_panel(
                    name,
                    index,
                    {
                        "τ, of E[M]": entry["factors"]["output_eigenvalues"],
                        "γ, of E[x xᵀ]": entry["factors"]["input_eigenvalues"],
                    },
                ),
            )
        if "correspondence" in entry:
            for side in ("input", "output"):
                found[side] = Figure(
                    f"{side}-side-{file}",
                    f"Components of the leading eigenvectors of {name} along the {side} factor",
                    plotting.correspondence_panel(name, index, side, entry["correspondence"][side]),
                )
        return found

    def _curves(self, key: Curve) -> dict[str, list[list[float]]]:
        return {name: self._curve(key, name) for name in self._digest.layers}

    def _curve(self, key: Curve, name: str) -> list[list[float]]:
        return [model["layers"][name][key] for model in self._result["models"]]

    @property
    def _published_eigenvalues(self) -> Mapping[str, Spectra]:
        published = self._result["published"]
        return published["eigenvalues"] if published else {}


def _pairs(result: AnalysisResult) -> dict[str, list[LayerPair]]:
    if not result["pairs"]:
        return {}
    return {
        name: [pair["layers"][name] for pair in result["pairs"]]
        for name in result["network"]["layers"]
    }
