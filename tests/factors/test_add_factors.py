"""Factors added are those of one pass over all the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import CE, quietly
from networks import classes, randn, seeded
from same_factors import assert_same
from torch import Tensor, nn

import hesskern as hk


class Sequences(nn.Module):
    """A layer that sees as many positions as a sample has, a grouped convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(4, 6)
        self.mix = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.token(x))
        return self.head(torch.relu(self.mix(h.mT)).mean(2))


def batch(n: int, t: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(n, t, 4, seed=seed), classes(n, c=3, seed=seed), randn(n, seed=seed + 9).abs()


PARTS = [[batch(3, 5, 0), batch(2, 5, 1)], [batch(4, 5, 2)], [batch(1, 5, 3), batch(5, 5, 4)]]
VARIED = [[batch(3, 5, 0), batch(2, 7, 1)], [batch(4, 2, 2)]]


def of(data: Any, **options: Any) -> hk.Factors:
    found: hk.Factors = quietly(hk.kronecker_factors, seeded(Sequences()), data, CE, **options)
    return found


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("parts", [PARTS, VARIED], ids=["one length", "several lengths"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_one_pass(bias: str, parts: Any, weighted: bool) -> None:
    if not weighted:
        parts = [[entry[:2] for entry in part] for part in parts]
    together = of([entry for part in parts for entry in part], bias=bias)
    added = hk.add_factors(*(of(part, bias=bias) for part in parts))
    assert_same(added, together, 1e-12)
    assert added.num_samples == pytest.approx(together.num_samples, rel=1e-14)
    for name, f in together.items():
        assert (f.input_images is None) == (added[name].input_images is None)
        assert added[name].spec == f.spec
    assert added.settings == together.settings
    assert added.skipped == together.skipped
    # Whatever the order and the brackets.
    first, *others = (of(part, bias=bias) for part in parts)
    for other in others:
        first = hk.add_factors(first, other)
    assert_same(first, together, 1e-12)


def test_of_one_alone_is_the_same() -> None:
    alone = of(PARTS[0])
    assert_same(hk.add_factors(alone), alone, 1e-15)


def test_is_the_sum_of_sums_of_output_factors_and_the_mean_of_input_factors() -> None:
    """As laplace-torch's Kron, whose output factors are sums over samples."""
    parts = [of([entry[:2] for entry in part])["head"] for part in PARTS]
    added = hk.add_factors(*(of([entry[:2] for entry in part]) for part in PARTS))["head"]
    total = sum(f.num_samples for f in parts)
    outputs = sum(f.num_samples * f.output_hessian for f in parts)
    inputs = sum(f.num_samples / total * f.input_covariance for f in parts)
    expected = torch.kron(outputs, inputs)
    found = total * added.operator().to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_settings_that_differ_are_kept_apart() -> None:
    parts = [of(part, output="mc", seed=seed) for seed, part in enumerate(PARTS)]
    added = hk.add_factors(*parts, parts[0])
    assert added.settings["seed"] == [0, 1, 2]
    assert added.settings["output"] == "mc"
    settings = {**parts[1].settings, "checked": {"token": "probe", "mix": "not checked"}}
    less_sure = hk.Factors(dict(parts[1]), parts[1].num_samples, {}, settings)
    assert hk.add_factors(parts[0], less_sure, parts[2]).settings["checked"] == {
        "token": "probe",
        "mix": "not checked",
        "head": "graph",
    }


def test_saved_and_read(tmp_path: Any) -> None:
    added = hk.add_factors(*(of(part, output="mc", seed=i) for i, part in enumerate(PARTS)))
    added.save(tmp_path / "f.safetensors")
    again = hk.load_factors(tmp_path / "f.safetensors")
    assert_same(added, again)
    assert again.settings == added.settings


def test_what_does_not_fit_is_refused_by_name() -> None:
    plain = of(PARTS[0])
    cases: list[tuple[hk.Factors, str]] = [
        (of(PARTS[0], output="empirical"), "factors 2 were made with output='empirical', the fi"),
        (of(PARTS[0], bias="joint"), "factors 2 were made with bias='joint', the first with"),
        (of(PARTS[0], layers=["token", "mix"]), "layer 'head' is missing in factors 2"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            hk.add_factors(plain, other)
    with pytest.raises(ValueError, match="layer 'head' is missing in the first factors"):
        hk.add_factors(of(PARTS[0], layers=["token", "mix"]), plain)
    wide = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    narrow = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data = [(randn(6, 4), classes(6, c=3))]
    a, b = (hk.kronecker_factors(seeded(m), data, CE) for m in (wide, narrow))
    with pytest.raises(ValueError, match="layer '0' has another geometry in factors 2"):
        hk.add_factors(a, b)
    single = hk.kronecker_factors(wide.float(), [(data[0][0].float(), data[0][1])], CE)
    with pytest.raises(ValueError, match=r"'0' has another dtype in factors 2: torch\.float32"):
        hk.add_factors(a, single)
    with pytest.raises(TypeError, match="factors must be of Factors, got list"):
        hk.add_factors([a])
    with pytest.raises(ValueError, match="factors must hold at least one"):
        hk.add_factors()
