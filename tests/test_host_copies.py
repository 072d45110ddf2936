"""Copies to the host from devices with events of their own, and from those without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from played_device import generators, played
from torch import nn

import hesskern as hk
from hesskern.devices import HostCopy


def test_on_the_host() -> None:
    values = torch.arange(3.0)
    copy = HostCopy(values)
    assert not copy.arrived
    assert torch.equal(copy.awaited(), values)


def test_a_device_without_events_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = played(), []
    module = torch.get_device_module(device)
    assert not hasattr(module, "Event")
    monkeypatch.setattr(module, "synchronize", lambda *where: asked.append(where))
    with generators():
        copy = HostCopy(torch.arange(3.0).to(device))
        assert not copy.arrived
        assert asked == []
        assert torch.equal(copy.awaited(), torch.arange(3.0))
        assert len(asked) == 1
        # A pass looks at its conditions behind that alone.
        model = nn.Linear(2, 3).to(device)
        batch = (torch.ones(4, 2), torch.tensor([0, 1, 2, 3]).to(device))
        asked.clear()
        with pytest.raises(ValueError, match=r"must lie in \[0, 3\)"):
            hk.kronecker_factors(model, [batch], nn.CrossEntropyLoss())
        assert asked


def test_a_device_with_events_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device, said = played(), []
    module: Any = torch.get_device_module(device)

    class Event:
        done = False

        def record(self, stream: Any) -> None:
            said.append(("recorded", stream))

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            said.append(("waited", None))

    monkeypatch.setattr(module, "Event", Event, raising=False)
    monkeypatch.setattr(module, "current_stream", lambda where: where.type, raising=False)
    monkeypatch.setattr(module, "synchronize", lambda *where: pytest.fail("waits for all"))
    with generators():
        copy = HostCopy(torch.arange(3.0).to(device))
        assert said == [("recorded", "played")]
        assert not copy.arrived
        Event.done = True
        assert copy.arrived
        assert torch.equal(copy.awaited(), torch.arange(3.0))
        assert said[-1] == ("waited", None)
