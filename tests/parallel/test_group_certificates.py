"""Certificates whose networks several ranks draw and count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from certificates import FAST, blobs
from certify_cases import TERMS, built, same
from networks import classes, randn, seeded
from processes import outcomes, run
from torch import nn

from hesskern.pacbayes import Certificate, Protocol, certify
from hesskern.pacbayes.evaluate import draw_error
from hesskern.pacbayes.posterior import LayerPosterior
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import slots_of
from hesskern.parallel.ranks import Ranks


def _certificates(group: Any, alone: bool = False) -> list[Certificate]:
    found = []
    for protocol in (TERMS, replace(TERMS, sampling="networks")):
        model = built()
        given: dict[str, Any] = {"epochs": 2, "protocol": protocol, "settings": FAST}
        given["group"] = None if alone else group
        found.append(certify(model, model, blobs(), test=blobs(30, seed=9), **given))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_certificate_of_one_process(size: int) -> None:
    # In a process like theirs: with as many threads.
    (want,) = run(_certificates, 1, True)
    everywhere = run(_certificates, size, store="tcp")
    for found in everywhere:
        for mine, alone, first in zip(found, want, everywhere[0], strict=True):
            assert same(mine, alone)
            assert (mine.errors, mine.draws, mine.test) == (alone.errors, alone.draws, alone.test)
            assert mine.digest == first.digest
            mine.verify()


def _draws(group: Any, alone: bool = False) -> list[tuple[int, int]]:
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)))
    samples = Samples(randn(25, 1, 3, 4), classes(25, c=3))
    slots = slots_of(model, samples.inputs[:2])
    layers = {}
    for name, slot in slots.items():
        matrix, spread = slot.matrix(), torch.full(slot.spec.shape, 0.5).double()
        layers[name] = LayerPosterior(slot.per_example, matrix, matrix, spread, None, None, 1)
    ranks = None if alone else Ranks.of(group)
    given: list[dict[str, Any]] = [
        {"passes": 7, "group": 10},
        {"passes": 5, "group": 25},
        {"passes": 3, "sampling": "networks"},
        {"passes": 1, "group": 1000},
    ]
    found = []
    for terms in given:
        drawn = draw_error(model, slots, layers, samples, Protocol(**terms), 3, ranks=ranks)
        found.append((drawn.errors, drawn.draws))
    return found


def test_shares_of_uneven_groups_passes_and_networks() -> None:
    want = _draws(None, True)
    assert len({errors for errors, _ in want}) > 1
    for found in run(_draws, 4, store="tcp"):
        assert found == want


def _odd(group: Any, kind: str) -> None:
    bad = group.rank() == 1
    model, given = built(), {}
    data = blobs(seed=int(kind == "samples" and bad))
    if kind == "seed":
        given["seed"] = int(bad)
    if kind == "minutes":
        given["minutes"] = 1.0
    if kind == "posteriors" and bad:
        torch.set_num_threads(1)
        import hesskern.pacbayes.procedure as procedure

        made = procedure.on_grid

        def moved(*args: Any) -> Any:
            layers = made(*args)
            name = next(iter(layers))
            layers[name] = replace(layers[name], mean=layers[name].mean + 1e-6)
            return layers

        procedure.on_grid = moved
    if "minutes" not in given:
        given["epochs"] = 1
    certify(model, model, data, protocol=TERMS, settings=FAST, group=group, **given)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("samples", "a certificate: the ranks differ. samples: "),
        ("seed", "a certificate: the ranks differ. settings 'seed': 0 on rank 0, 1 on rank 1"),
        ("posteriors", "the posteriors, which all ranks optimize alike"),
        ("minutes", "minutes: ranks of a group would stop at different steps; pass epochs"),
    ],
)
def test_what_differs_is_refused_on_all_ranks(kind: str, words: str) -> None:
    for outcome in outcomes(_odd, 2, kind, store="tcp"):
        assert words in outcome.message


def _verified(group: Any) -> None:
    model = built()
    found = certify(model, model, blobs(), epochs=1, protocol=TERMS, settings=FAST, group=group)
    found.verify(blobs(), group=group)
    found.verify(blobs(seed=group.rank()), group=group)


def test_a_certificate_is_verified_on_all_ranks() -> None:
    first, second = outcomes(_verified, 2, store="tcp")
    assert second.message == (
        "CertificateError: data: these are not the samples of the certificate"
    )
    assert first.message.startswith("RankError: rank 1 of 2 failed in verifying a certificate: Ce")
