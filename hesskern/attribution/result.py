"""Influence scores: the result and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesskern.tensor_files import TensorFormat

__all__ = ["Influence", "load_influence"]

_FILE = TensorFormat("hesskern.influence/1", "influence scores", "file of influence scores")


@dataclass(frozen=True, eq=False)
class Influence:
    """Scores g_q^T (E + damping)^-1 g_n of training samples n for queries q.

    Positive: training more on the sample lowers the query's loss.

    Attributes:
        scores: [q, n]; with ``per_token`` [q, n, T]; with ``per_layer`` such scores by layer; with
            ``top`` [q, k], each query's largest, in descending order.
        indices: [q, k] int64, the samples that these belong to, with ``top``; None otherwise.
        num_queries: q.
        num_train: n.
        layers: that the scores are summed over, in the model's order.
        skipped: layers that are not among them, with the reason.
        damping: what was added to E's eigenvalues, by layer; empty without E.
        rank_errors: [q] ‖P_q - P_q,r‖_F / ‖P_q‖_F of the preconditioned gradients over all layers,
            with ``query_rank``; None otherwise. A score is off by at most ‖P_q - P_q,r‖_F ‖g_n‖.
        settings: how the scores were made.
    """

    scores: Tensor | dict[str, Tensor]
    indices: Tensor | None
    num_queries: int
    num_train: int
    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    damping: Mapping[str, float]
    rank_errors: Tensor | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept = "" if self.indices is None else f", the {self.indices.shape[1]} largest of each"
        return (
            f"Influence of {self.num_train} training samples on {self.num_queries} queries through "
            f"{len(self.layers)} layers{kept}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, which appears whole or not at all.

        :func:`hesskern.load_influence` reads it. Its tensors are "scores" (or "scores.LAYER") and,
        where they are there, "indices" and "rank_errors"; the rest stands as JSON in its header,
        with checksums of all.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        _FILE.write(path, self._tensors(), self._header())

    def packed(self) -> bytes:
        """The bytes of that file."""
        return _FILE.packed(self._tensors(), self._header())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = (
            {"scores": self.scores}
            if isinstance(self.scores, Tensor)
            else {f"scores.{name}": scores for name, scores in self.scores.items()}
        )
        for name in ("indices", "rank_errors"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        return tensors

    def _header(self) -> dict[str, Any]:
        return {
            "num_queries": self.num_queries,
            "num_train": self.num_train,
            "layers": list(self.layers),
            "skipped": dict(self.skipped),
            "damping": dict(self.damping),
            "settings": dict(self.settings),
        }


def load_influence(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Influence:
    """Reads a file written by :meth:`Influence.save`.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of these, of a newer version, or damaged.
    """
    with _FILE.opened(path) as file:
        header = file.header
        parts = {name: file.tensor(name).to(device) for name in file.names}
        indices, errors = parts.pop("indices", None), parts.pop("rank_errors", None)
        return Influence(
            _read_scores(parts, header["layers"]),
            indices,
            header["num_queries"],
            header["num_train"],
            tuple(header["layers"]),
            header["skipped"],
            header["damping"],
            errors,
            header["settings"],
        )


def _read_scores(parts: dict[str, Tensor], layers: list[str]) -> Tensor | dict[str, Tensor]:
    """The scores, or those of every layer, which must be there."""
    if "scores" in parts:
        return parts["scores"]
    return {name: parts[f"scores.{name}"] for name in layers}
