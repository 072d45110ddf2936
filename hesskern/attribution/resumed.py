"""Scores that go on from a checkpoint: what of the queries is kept, and what of the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hesskern.attribution.queries import LayerQueries
from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.factors.result import LayerFactors
from hesskern.graph.evidence import Evidence
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.passes.sample_numbers import NumberedData

__all__ = ["Asked", "curvature_facts"]


@dataclass
class Asked:
    """The queries, ready to be dotted with samples' gradients.

    Attributes:
        prepared: by layer.
        count: q.
        skipped: layers that do not count, with the reason.
        errors: [q] what the queries' rank leaves out; None where they have all of it.
    """

    prepared: dict[str, LayerQueries]
    count: int
    skipped: dict[str, str]
    errors: Tensor | None

    def part(self, way: Mapping[str, Any], evidence: Evidence) -> dict[str, Any]:
        """All of it, with the way through the queries' data, for a checkpoint."""
        return {
            "way": way,
            "evidence": evidence.state(),
            "count": self.count,
            "skipped": self.skipped,
            "errors": self.errors,
            "prepared": {
                name: {field.name: getattr(queries, field.name) for field in fields(queries)}
                for name, queries in self.prepared.items()
            },
        }

    @classmethod
    def of_part(
        cls,
        part: Mapping[str, Any],
        queries: Iterable[Any],
        saved: Checkpoint,
        evidence: Evidence,
        device: torch.device,
    ) -> Asked:
        """What :meth:`part` has kept, if the queries are the same; none goes through the model.

        Raises:
            ValueError: they are others.
        """
        way = saved.way(queries, part["way"])
        for index, _ in way.elements(NumberedData(queries)):
            raise way.other(f"there are more than {index} batches")
        evidence.restore(part["evidence"])

        def there(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        prepared = {
            name: LayerQueries(**{key: there(value) for key, value in sides.items()})
            for name, sides in part["prepared"].items()
        }
        return cls(prepared, part["count"], part["skipped"], there(part["errors"]))


def curvature_facts(E: Any) -> Any:
    """What of a curvature the scores depend on; whatever is none is refused elsewhere."""
    if not isinstance(E, Mapping):
        return None
    return {name: _layer_facts(layer) for name, layer in E.items()}


def _layer_facts(layer: Any) -> Any:
    if isinstance(layer, LayerFactors):
        return layer.output_hessian, layer.input_covariance
    if isinstance(layer, KroneckerOperator):
        return layer.A, layer.B
    return getattr(layer, "eigenbases", None)
