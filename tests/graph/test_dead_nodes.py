"""Nodes whose graph is gone by the time that it is read."""

from __future__ import annotations

import torch

from hesskern.graph.nodes import has_graph


class _Legacy:
    """What torch up to 2.10 leaves of a ``torch.autograd.Function`` behind its graph."""

    @property
    def next_functions(self) -> None:
        raise RuntimeError("Attribute 'next_functions' is invalid for this instance")


def test_what_outlives_its_graph_is_told_apart() -> None:
    alive = torch.ones(2, requires_grad=True).exp().grad_fn
    assert has_graph(alive)
    assert not has_graph(_Legacy())
