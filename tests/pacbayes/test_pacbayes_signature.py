"""certify() names its options: the fields of CertifySettings, with their types and defaults."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
from certificates import FAST, NET, blobs

from hesskern.pacbayes import CertifySettings, Protocol, certify, certify_with, procedure


def test_every_option_is_a_field_and_every_field_an_option() -> None:
    arguments = inspect.signature(certify).parameters
    beside = inspect.signature(certify_with).parameters.keys() - {"settings"}
    options = {name: value for name, value in arguments.items() if name not in beside}
    assert not any(
        a.kind in (a.VAR_KEYWORD, a.VAR_POSITIONAL)
        for a in inspect.signature(certify).parameters.values()
    )
    types, expected = get_type_hints(certify), get_type_hints(CertifySettings)
    assert set(options) == {field.name for field in fields(CertifySettings)}
    for field in fields(CertifySettings):
        assert options[field.name].default == field.default
        assert types[field.name] == expected[field.name]


def test_every_option_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CertifySettings] = []
    monkeypatch.setattr(procedure, "certify_with", lambda settings, *a, **k: seen.append(settings))
    given = {
        "method": "truncated",
        "epochs": 3,
        "minutes": None,
        "protocol": Protocol(passes=5),
        "settings": FAST,
        "start": "model",
        "seed": 4,
        "n": 150,
        "prior_record": {"construction": "drawn", "seed": 1},
    }
    model = NET.build((1, 3, 4), 3)
    certify(model, model, blobs(), **given)
    assert seen == [CertifySettings(**given)]
    minutes = {**given, "epochs": None, "minutes": 0.5}
    certify(model, model, blobs(), **minutes)
    assert seen[1] == CertifySettings(**minutes)


def test_an_unknown_option_is_named() -> None:
    model = NET.build((1, 3, 4), 3)
    with pytest.raises(TypeError, match="epoch"):
        certify(model, model, blobs(), epoch=3)
