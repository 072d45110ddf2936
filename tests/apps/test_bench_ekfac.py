"""What suite ``ekfac`` holds every package against: plain torch, and differences in given bases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern.apps.bench import streams
from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.streams import Bases, Stream


@pytest.fixture
def stream() -> Stream:
    """A convolution and a linear layer on five images in batches of two, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
        )
    inputs = torch.randn(5, 2, 4, 4, generator=generator)
    targets = torch.randint(4, (5,), generator=generator)
    return streams.double(streams.images(Case("net", "", model.eval(), inputs, targets), 2))


def _sample_gradients(stream: Stream, name: str) -> Tensor:
    """[N, m, d], one backward pass for each sample."""
    weight = stream.layers[name].get_parameter("weight")
    found = []
    for inputs, targets in stream.batches:
        for x, y in zip(inputs, targets, strict=True):
            loss = F.cross_entropy(stream.model(x[None]), y[None])
            found.append(torch.autograd.grad(loss, weight)[0].flatten(1))
    return torch.stack(found)


def test_plain_torch_has_the_corrections_of_a_loop_over_samples(stream: Stream) -> None:
    bases = streams.plain_ekfac(stream, drawn=False)
    assert sorted(bases) == ["0", "3"]
    for name, (u, v, s) in bases.items():
        rotated = u.T @ _sample_gradients(stream, name) @ v
        torch.testing.assert_close(s, rotated.square().mean(0), rtol=1e-10, atol=1e-12)


def test_eigenbases_of_the_rows(stream: Stream) -> None:
    rows: dict[str, list[Tensor]] = {"0": [], "3": []}
    for inputs, _ in stream.batches:
        patches = F.unfold(inputs, 3, padding=1, stride=2).mT.flatten(0, 1)
        rows["0"].append(patches)
        hidden = stream.model[:3](inputs).detach()  # type: ignore[index]
        rows["3"].append(hidden)
    for name, (_, v, _) in streams.plain_ekfac(stream, drawn=True).items():
        x = torch.cat(rows[name])
        turned = v.T @ (x.T @ x) @ v
        off = turned - turned.diagonal().diag()
        assert off.norm() < 1e-10 * turned.norm()


def _changed(bases: Bases, place: int, change: float) -> Bases:
    """The convolution's U or V with the first column, of the smallest eigenvalue, off by a part."""
    u, v, s = (part.clone() for part in bases["0"])
    (u, v)[place][:, 0] *= 1 + change
    return {**bases, "0": (u, v, s)}


@pytest.mark.parametrize("drawn", [False, True])
def test_differences_are_found(stream: Stream, drawn: bool) -> None:
    bases = streams.plain_ekfac(stream, drawn)
    reference = streams.reference(stream, drawn)()
    assert streams.difference(bases, reference) < 1e-10
    assert streams.difference(_changed(bases, 1, 0.01), reference) > 1e-3
    if not drawn:
        assert streams.difference(_changed(bases, 0, 0.01), reference) > 1e-3
        u, v, s = bases["0"]
        wrong = {**bases, "0": (u, v, 1.01 * s)}
        assert streams.difference(wrong, reference) == pytest.approx(0.01, rel=1e-3)
    # Another order of the columns is another basis only together with S.
    u, v, s = bases["0"]
    turned = {**bases, "0": (u, v.flip(1), s.flip(1))}
    assert streams.difference(turned, reference) < 1e-10
    with pytest.raises(ValueError, match="layers"):
        streams.difference({"0": bases["0"]}, reference)
