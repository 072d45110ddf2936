"""Checksums by which ranks compare tensors: of every size and dtype, down to none at all."""

from __future__ import annotations

import pytest
import torch
from networks import seeded
from processes import run
from torch import Tensor, nn

import hesskern as hk
from hesskern.parallel.replicas import checksums

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    for count in (0, 1, 2, 3, 7, 8, 9, 17):
        tensor = torch.ones(count, dtype=dtype)
        found = {0: checksums({"": tensor})[""]}
        for i in range(count):
            other = tensor.clone()
            # One bit: the last of the element.
            other.view(torch.uint8)[i * dtype.itemsize] ^= 1
            found[i + 1] = checksums({"": other})[""]
        assert len(set(found.values())) == count + 1
        assert checksums({"": tensor.clone()})[""] == found[0]


def test_a_scalar() -> None:
    assert checksums({"": torch.tensor(1.0)}) == checksums({"": torch.ones(1)})


def _model() -> nn.Module:
    """Tensors of four bytes: a scalar of an activation, and the bias of one output."""
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 1))).float()


def _batches() -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=made).float(), torch.randn(n, 1, generator=made).float())
        for n in (2, 3)
    ]


def _factors(group: object) -> list[Tensor]:
    mine = _batches() if group is None else [_batches()[group.rank()]]
    given = {"diagonal": True, "group": group}
    found = hk.kronecker_factors(_model(), mine, nn.MSELoss(), **given)
    layers = [t for f in found.values() for t in (f.input_covariance, f.output_hessian)]
    return [*layers, *found.diagonals.values()]


def test_a_model_of_one_output_in_a_group() -> None:
    for found in run(_factors, 2):
        for mine, want in zip(found, _factors(None), strict=True):
            assert torch.allclose(mine, want, rtol=1e-6, atol=0)
