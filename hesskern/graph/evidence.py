"""How it is known which rows of a layer belong to which samples: from the graph, or by probing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.nodes import kind, output_shape
from hesskern.graph.routed_rows import RoutedRows
from hesskern.graph.sample_axes import Arrangement, prove
from hesskern.graph.sample_probe import Probed, probe
from hesskern.graph.weight_uses import WeightUse

__all__ = ["ArrangedCall", "Evidence"]

_UNPROVED = "the graph does not tell which sample each of them belongs to"

_SAVED = (
    "_saved_dim _saved_dims _saved_dim0 _saved_dim1 _saved_index _saved_size _saved_start"
    " _saved_storage_offset _saved_stride"
).split()


@dataclass(frozen=True)
class ArrangedCall:
    """What is known of one call's rows.

    Attributes:
        arrangement: which row belongs to which sample.
        problem: why there is no such thing; None where there is.
        ambiguous: whether that is known of rows alone that act on an output.
        routed: whether they are some rows of a larger tensor.
    """

    arrangement: Arrangement | RoutedRows
    problem: str | None = None
    ambiguous: bool = False
    routed: bool = False


@dataclass
class Evidence:
    """Serves several passes of one model.

    Attributes:
        check: whether rows are looked into at all where the graph proves nothing; otherwise the
            first axis counts the samples.
        found: by layer, "graph" (proved), "probe", "not checked" (never two samples in a batch:
            nothing to tell apart yet) or "switched off".
        probed: what was found, by the graph and its shapes, and by call.
        routed: layers to which some rows of a larger tensor were routed.
        compared: whether the loss has been compared with the model's own.
    """

    check: bool = True
    found: dict[str, str] = field(default_factory=dict)
    probed: dict[str, list[ArrangedCall]] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    compared: bool = False

    def state(self) -> dict[str, Any]:
        """What a pass that goes on later needs, as plain values: not what is soon found again."""
        return {
            "found": dict(self.found),
            "routed": sorted(self.routed),
            "compared": self.compared,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""
        self.found, self.routed = dict(state["found"]), set(state["routed"])
        self.compared = state["compared"]

    def note(self, name: str, calls: Iterable[str]) -> None:
        """How it is known for a layer's calls in one batch.

        Within a batch the weakest evidence counts. Over batches, too, but for single samples, which
        leave nothing to be told apart.
        """
        within = ("graph", "probe", "not checked", "switched off")
        over = ("not checked", "graph", "probe", "switched off")
        now = max(calls, key=within.index)
        self.found[name] = max(self.found.get(name, over[0]), now, key=over.index)

    def arrange(
        self,
        outputs: Tensor,
        alive: list[Any],
        calls: dict[str, list[WeightUse]],
        flat: Collection[Any],
    ) -> dict[str, list[ArrangedCall]]:
        """Which rows belong to which sample, for every call.

        Args:
            outputs: [N, ...] with N >= 1.
            alive: the nodes that they depend on, by :func:`hesskern.graph.nodes.behind`.
            calls: by layer, with one row at least. Where their number is no multiple of N, or
                these are a part of a call's rows, only the graph can tell.
            flat: nodes of calls whose layer was given rows [R, d], without positions.
        """
        uses = [(name, use) for name, layer in calls.items() for use in layer]
        samples = outputs.shape[0]
        nodes, windows = [use.node for _, use in uses], [use.window for _, use in uses]
        # An expert's rows are some of all; so are those of a layer that once had fewer.
        trusted = {use.node for name, use in uses if use.expert or name in self.routed}
        proved = prove(outputs, alive, nodes, windows, trusted)
        living = set(alive)
        answers: list[ArrangedCall] = []
        ways = ["graph"] * len(uses)
        open_calls = []
        for i, (name, use) in enumerate(uses):
            arrangement = proved.arrangements[i]
            if arrangement is not None:
                # A head on one token of each sample is no expert: what it gives stays where it is.
                several = use.node in proved.selected and arrangement.positions > 1
                chosen = several or use.node in proved.placed
                if isinstance(arrangement, RoutedRows) or chosen:
                    self.routed.add(name)
                routed = use.expert or name in self.routed
                answers.append(ArrangedCall(arrangement, routed=routed))
                continue
            first = Arrangement(1, samples, use.rows // samples)
            if use.rows % samples or use.window is not None:
                answers.append(ArrangedCall(first, _UNPROVED))
            elif use.node not in living:
                # All its rows are zero.
                answers.append(ArrangedCall(first, ambiguous=first.positions > 1))
            else:
                answers.append(ArrangedCall(first))
                open_calls.append(i)
        if open_calls:
            how = "probe"
            if samples == 1:
                how = "not checked"
            elif not self.check:
                how = "switched off"
            else:
                looked_into = self._probed(
                    outputs, alive, [uses[i][1] for i in open_calls], flat, proved.steady
                )
                for i, answer in zip(open_calls, looked_into, strict=True):
                    answers[i] = answer
            for i in open_calls:
                ways[i] = how
        result: dict[str, list[ArrangedCall]] = {name: [] for name in calls}
        found: dict[str, list[str]] = {name: [] for name in calls}
        for (name, _), answer, way in zip(uses, answers, ways, strict=True):
            result[name].append(answer)
            found[name].append(way)
        for name, own in found.items():
            self.note(name, own)
        return result

    def _probed(
        self,
        outputs: Tensor,
        alive: list[Any],
        uses: Sequence[WeightUse],
        flat: Collection[Any],
        steady: bool,
    ) -> list[ArrangedCall]:
        """What backward passes find of calls that the graph proves nothing about.

        It holds for the batches that follow where the graph and its shapes stay the same and rows
        cannot be moved in another way there.
        """
        route = _route(alive, [use.node for use in uses]) if steady else ""
        if route in self.probed:
            return self.probed[route]
        edges = [GradientEdge(use.node, 0) for use in uses]
        probed = probe(outputs, edges, [use.rows for use in uses])
        answers = [
            _answer(found, use, len(outputs), use.node in flat)
            for found, use in zip(probed, uses, strict=True)
        ]
        if steady and not any(answer.ambiguous for answer in answers):
            self.probed[route] = answers
        return answers


def _answer(found: Probed, use: WeightUse, samples: int, flat: bool) -> ArrangedCall:
    first = Arrangement(1, samples, use.rows // samples)
    if isinstance(found.answer, str):
        return ArrangedCall(first, found.answer)
    if found.idle and flat and use.rows != samples:
        # The layer was given rows, not samples of several positions.
        return ArrangedCall(first, "some of them act on no output")
    return ArrangedCall(found.answer, ambiguous=found.ambiguous)


def _route(alive: list[Any], calls: list[Any]) -> str:
    """A digest that tells graphs of other operations, shapes or calls apart."""
    position = {node: i for i, node in enumerate(alive)}
    operations = tuple(
        (
            kind(node),
            output_shape(node),
            *(str(getattr(node, name, None)) for name in _SAVED),
            *((position.get(f, -1), number) for f, number in node.next_functions),
        )
        for node in alive
    )
    text = repr((operations, [position[node] for node in calls]))
    return hashlib.sha256(text.encode()).hexdigest()
