"""The progress argument in its three forms."""

import sys

import pytest
import torch
from torch import nn

import hesskern as hk
from hesskern.progress import reporter


def run(progress):
    torch.manual_seed(0)
    data = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(5)]
    hk.kronecker_factors(nn.Linear(3, 2), data, nn.CrossEntropyLoss(), progress=progress)


def test_callback_hears_every_batch():
    heard = []
    run(lambda *event: heard.append(event))
    assert heard == [("Kronecker factors", i, 5) for i in range(1, 6)]


def test_bar_shows_the_task_and_its_end(capsys):
    pytest.importorskip("rich")
    run(True)
    shown = capsys.readouterr()
    assert "Kronecker factors" in shown.err
    assert "5/5" in shown.err
    assert shown.out == ""


def test_lines_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    run(True)
    assert "Kronecker factors: 5 of 5" in capsys.readouterr().err


def test_silence(capsys):
    run(False)
    assert capsys.readouterr() == ("", "")


def test_bad_argument():
    with pytest.raises(TypeError, match="progress must be a bool or a callable, got int"):
        reporter(3)
