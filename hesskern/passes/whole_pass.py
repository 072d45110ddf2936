"""Passes of several ranks, each over its own part of the data, as one pass over all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from hesskern.graph.evidence import Evidence
from hesskern.parallel.ranks import Ranks
from hesskern.parallel.replicas import model_facts
from hesskern.passes.data_pass import DataPass
from hesskern.passes.layers import LayerSpec
from hesskern.passes.loss_facts import loss_facts
from hesskern.passes.losses import Loss

__all__ = ["PassKnowledge", "agree_on_pass"]

# Of all reasons the one that a rank without data gives as well.
_NOWHERE = "was never reached in the forward pass"


def agree_on_pass(
    ranks: Ranks,
    what: str,
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    loss: Loss,
    settings: Mapping[str, Any],
) -> None:
    """Makes sure that all ranks have the same model, layers, loss and settings.

    Args:
        ranks: all of which call this.
        what: is to be made, for messages.
        model: whose tensors' names, shapes, dtypes and values are compared.
        specs: the layers by name.
        loss: compared by its class, constants, functions, modules and tensors.
        settings: by name, of what JSON can hold.

    Raises:
        RankError: on every rank, where one has others; names it and what differs.
    """
    facts = {
        "layers": list(specs),
        "geometry": [asdict(spec) for spec in specs.values()],
        "settings": dict(settings),
        "loss": loss_facts(loss),
    }
    ranks.agree(what, {**facts, **model_facts(model)})


@dataclass
class PassKnowledge:
    """What a pass has found out besides what it was made for.

    Attributes:
        count: weighted number of samples.
        reasons: why layers have no curvature.
        unfit: those among them that were reached, and do not fit.
        inexact: why blocks of layers are not the Hessian.
        checked: by layer, how it is known which rows belong to which samples.
        dtypes: by layer, of its rows.
    """

    count: float
    reasons: dict[str, str]
    unfit: dict[str, str]
    inexact: dict[str, str]
    checked: dict[str, str]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, run: DataPass, dtypes: Mapping[str, torch.dtype]) -> PassKnowledge:
        """What a pass knows at its end; arguments as the attributes."""
        capture = run.capture
        return cls(
            run.count,
            capture.reasons,
            dict(capture.unfit),
            dict(capture.inexact),
            dict(run.evidence.found),
            dict(dtypes),
        )

    def of_all(self, ranks: Ranks | None) -> PassKnowledge:
        """What one pass over the data of all ranks would know.

        A layer that does not fit on one rank is left out on all. Of two reasons the earlier
        rank's counts.

        Args:
            ranks: all of which call this. None: there are no others.

        Raises:
            RankError: a rank has failed.
        """
        if ranks is None:
            return self
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own["dtypes"] = {name: str(dtype) for name, dtype in self.dtypes.items()}
        (count,) = ranks.totals("the number of samples", own.pop("count"))
        parts = ranks.told("what the passes have found", own)
        unfit, inexact, dtypes = (
            _first(part[name] for part in parts) for name in ("unfit", "inexact", "dtypes")
        )
        evidence = Evidence()
        for part in parts:
            for name, how in part["checked"].items():
                evidence.note(name, [how])
        reasons = {}
        for name in parts[0]["reasons"]:
            if all(name in part["reasons"] for part in parts):
                texts = [part["reasons"][name] for part in parts]
                reasons[name] = next((t for t in texts if not t.startswith(_NOWHERE)), texts[0])
        return PassKnowledge(
            count,
            {**reasons, **unfit},
            unfit,
            inexact,
            evidence.found,
            {name: getattr(torch, dtype.removeprefix("torch.")) for name, dtype in dtypes.items()},
        )


def _first(parts: Any) -> dict[str, Any]:
    """The dicts as one; of several values the first counts."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, value)
    return found
