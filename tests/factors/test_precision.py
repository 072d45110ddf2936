"""What results say about the precision of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import CE, classes, randn, seeded
from torch import nn

import hesskern as hk
from hesskern.factors.precision import precision_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def matmul(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """Stands for torch's settings of matrix products on CUDA; those of convolutions come back."""

    class Products:
        fp32_precision = "none"

    monkeypatch.setattr(torch.backends.cuda, "matmul", Products)
    before = torch.backends.cudnn.conv.fp32_precision
    yield Products
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("device", [CPU, GPU])
def test_dtypes(device: torch.device) -> None:
    assert precision_of(torch.float64, device) == "float64"
    assert precision_of(torch.bfloat16, device) == "bfloat16 model, sums in float32"
    assert precision_of(torch.float16, device) == "float16 model, sums in float32"


@pytest.mark.parametrize(
    ("convolutions", "products", "expected"),
    [
        ("tf32", "none", "float32, convolutions in TF32"),
        ("tf32", "tf32", "float32, convolutions and matrix products in TF32"),
        ("ieee", "tf32", "float32, matrix products in TF32"),
        ("ieee", "ieee", "float32"),
        ("none", "none", "float32"),
    ],
)
def test_tf32_is_named_on_cuda(
    convolutions: str, products: str, expected: str, matmul: type
) -> None:
    torch.backends.cudnn.conv.fp32_precision = convolutions
    matmul.fp32_precision = products
    assert precision_of(torch.float32, GPU) == expected
    assert precision_of(torch.float32, CPU) == "float32"
    assert precision_of(torch.float64, GPU) == "float64"


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        text = "model under bfloat16 autocast, sums in"
        assert precision_of(torch.float32, CPU) == f"float32 {text} float32"
        assert precision_of(torch.float64, CPU) == f"float64 {text} float64"
        assert precision_of(torch.float64, GPU) == "float64"


def batch(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(randn(4, 3, dtype=dtype), classes(4, c=2))]


def model(dtype: torch.dtype) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))).to(dtype)


def test_factors_say_it(tmp_path: Path) -> None:
    for dtype, expected in (
        (torch.float64, "float64"),
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16 model, sums in float32"),
    ):
        factors = hk.kronecker_factors(model(dtype), batch(dtype), CE)
        assert factors.settings["precision"] == expected
        factors.save(tmp_path / "run.safetensors")
        assert hk.load_factors(tmp_path / "run.safetensors").settings == factors.settings


def test_a_stream_keeps_what_its_batches_ran_in() -> None:
    data = batch(torch.float32)
    stream = hk.FactorAccumulator(model(torch.float32), CE)
    stream.update(*data[0])
    assert stream.factors().settings["precision"] == "float32"
    other = hk.FactorAccumulator(model(torch.float32), CE)
    with torch.autocast("cpu", torch.bfloat16):
        other.update(*data[0])
        assert stream.factors().settings["precision"] == "float32"
    narrow = "float32 model under bfloat16 autocast, sums in float32"
    assert other.factors().settings["precision"] == narrow
    stream.merge(other)
    assert stream.factors().settings["precision"] == f"float32; {narrow}"
    resumed = hk.FactorAccumulator(model(torch.float32), CE)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.factors().settings == stream.factors().settings
