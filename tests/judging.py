"""A lab that judges small networks, and what ``hesskern reproduce`` finds computed a second time.

The published tables are replaced by figures for small networks on the digits, so that every verdict
can be computed a second time here and moved over the edge of its tolerance.
"""

from dataclasses import replace
from statistics import fmean

import pytest

import hesskern as hk
from hesskern.apps.reproduce import published
from hesskern.apps.reproduce.lab import Lab, Network, Overrides

LIMIT, EPOCHS, SEEDS, CLASSES = 200, 2, (0, 1, 2), 10
PLAIN = Network("mnist", "f16x2", limit=LIMIT)
BN = Network("mnist", "f16x2-bn", limit=LIMIT)
LAYERS = ("fc1", "fc2", "fc3")
# Names that the items give a meaning to, and the small networks behind them here.
STANDING_FOR = {"lenet5": "f16x2", "lenet5-w12": "f12x2", "lenet5-w14": "f14x2"}
# A figure moved by so many tolerances, and whether it still agrees.
EDGES = pytest.mark.parametrize(
    ("moved", "agrees"), [(-1.02, False), (-0.98, True), (0.98, True), (1.02, False)]
)


class Judging(Lab):
    """The digits stand behind every data set; verdicts are withheld for ``reason`` alone."""

    reason = ""

    def data(self, network):
        return super().data(replace(network, data="digits"))

    def withheld(self, network):
        return self.reason


def lab_of(folder, top, reason=""):
    overrides = Overrides(epochs=EPOCHS, seeds=len(SEEDS), top=top)
    found = Judging(folder, overrides=overrides)
    found.reason = reason
    return found


def pairs(values):
    return [(values[0], values[1]), (values[0], values[2]), (values[1], values[2])]


def exact(lab, network, layer, k=24):
    return [lab.eigenpairs(network, seed, layer, k).vectors for seed in SEEDS]


def kronecker(lab, network, layer, k):
    return [lab.factors(network, seed)[layer].eigsh(k).vectors for seed in SEEDS]


def overlaps_of_pairs(spaces):
    """Overlap curves of all pairs."""
    return [hk.subspace_overlap(U, V).tolist() for U, V in pairs(spaces)]


def at(curves, k):
    return [curve[k - 1] for curve in curves]


def check(verdict, ours, published_text, rule, agrees, note=""):
    assert verdict.ours == pytest.approx(fmean(ours), abs=1e-6), verdict.what
    assert verdict.low == pytest.approx(min(ours), abs=1e-6)
    assert verdict.high == pytest.approx(max(ours), abs=1e-6)
    assert verdict.count == len(ours)
    assert (verdict.published, verdict.rule) == (published_text, rule)
    assert verdict.agrees is agrees, verdict.what
    assert verdict.note == note


def by_name(outcome):
    found = {verdict.what: verdict for verdict in outcome.verdicts}
    assert len(found) == len(outcome.verdicts)
    return found


def publish_overlaps(monkeypatch, ks, layers):
    table = {"overlap": {"k": ks, "layers": layers}, "eigenvalues": {}}
    monkeypatch.setattr(
        published,
        "figures_for",
        lambda data, model: table if (data, model) == ("mnist", "f16x2") else None,
    )


def publish_between(monkeypatch, layers, batch_norm=0.5):
    monkeypatch.setattr(published, "BETWEEN", {("mnist", "f16x2"): layers})
    monkeypatch.setattr(published, "BETWEEN_BATCH_NORM", batch_norm)
