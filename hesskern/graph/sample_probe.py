"""Which rows of a layer's call belong to which sample, where the graph does not prove it.

Two or three backward passes find out: with random rows R, and with each sample's R_n scaled by a
power of two that tells it from the others. The gradient of a row that belongs to sample n then is
scaled by just that power, without rounding, and any other gradient is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.sample_axes import Arrangement

__all__ = ["Probed", "probe", "random_rows"]

# Of a row's gradient: what a coupling must exceed to be seen.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
_NARROW_TOLERANCE = 2e-2
# Powers of two that tell samples apart; the range of the dtype must hold them beside gradients.
_POWERS = {torch.float64: 256, torch.float32: 64, torch.bfloat16: 64}
_FEW_POWERS = 8


@dataclass(frozen=True)
class Probed:
    """What backward passes found out about a call.

    Attributes:
        answer: its arrangement, or what was found instead.
        idle: whether there are rows that act on no output.
        ambiguous: whether other arrangements of such rows are as good.
    """

    answer: Arrangement | str
    idle: bool
    ambiguous: bool


def random_rows(outputs: Tensor) -> Tensor:
    """Random numbers as the outputs [N, ...], always the same."""
    generator = torch.Generator("cpu").manual_seed(1)
    rows = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu")
    return rows.to(outputs.dtype).to(outputs.device)


def probe(outputs: Tensor, edges: list[GradientEdge], rows: list[int]) -> list[Probed]:
    """Arrangements found by backward passes through the whole batch.

    Args:
        outputs: [N, ...] with N >= 2.
        edges: where the gradients of the calls' results arrive.
        rows: by call, the number of its rows, a multiple of N: those of [..., m], or B of a
            convolution's [B, m, ...].

    Returns:
        by call.
    """
    samples = len(outputs)
    dtypes = {outputs.dtype, *(edge.node._input_metadata[0].dtype for edge in edges)}
    weights = _digits(samples, dtypes, outputs)
    random = random_rows(outputs)
    shape = (-1,) + (1,) * (outputs.dim() - 1)
    passes = [random, *(random * weight.reshape(shape) for weight in weights)]
    gradients = []
    for block in passes:
        found = torch.autograd.grad(
            outputs, edges, grad_outputs=block, retain_graph=True, allow_unused=True
        )
        gradients.append([None if g is None else g.detach() for g in found])
    plain, scaled = gradients[0], gradients[1:]
    return [
        _arranged(plain[i], [part[i] for part in scaled], weights, count, samples)
        for i, count in enumerate(rows)
    ]


def _digits(samples: int, dtypes: set[torch.dtype], like: Tensor) -> list[Tensor]:
    """Powers of two [N], as ``like``, that differ in one of them at least for any two samples."""
    base = min(_POWERS.get(dtype, _FEW_POWERS) for dtype in dtypes)
    weights: list[Tensor] = []
    rest = torch.arange(samples, device="cpu")
    while not weights or int(rest.max()) > 0:
        weights.append(torch.exp2((rest % base - base // 2).double()).to(like))
        rest = rest // base
    return weights


def _arranged(
    plain: Tensor | None,
    scaled: list[Tensor | None],
    weights: list[Tensor],
    rows: int,
    samples: int,
) -> Probed:
    positions = rows // samples
    if plain is None or not plain.numel():
        # Nothing comes back at this point: all rows are zero.
        return Probed(Arrangement(1, samples, positions), True, positions > 1)
    flat = plain.reshape(rows, -1).double()
    size = torch.linalg.vector_norm(flat, dim=1)
    # What is not finite is found and named when the rows themselves are looked at.
    silent = ~torch.isfinite(size)
    idle = bool((size == 0).any())
    limit = _TOLERANCES.get(plain.dtype, _NARROW_TOLERANCE)
    floor = torch.finfo(plain.dtype).tiny
    candidates = [inner for inner in range(1, positions + 1) if positions % inner == 0]
    # Samples first, then samples last, then in between.
    candidates.sort(key=lambda inner: (inner != positions, inner != 1, inner))
    number = torch.arange(rows, device=plain.device)
    fitting: list[int] = []
    for inner in candidates:
        owner = number // inner % samples
        fits = True
        for part, weight in zip(scaled, weights, strict=True):
            if part is None:
                return Probed("the gradients that arrive at it come and go", idle, False)
            factor = weight[owner].double()
            rest = part.reshape(rows, -1).double() - flat * factor.unsqueeze(1)
            error = torch.linalg.vector_norm(rest, dim=1)
            if not bool(((error <= factor * (limit * size + floor)) | silent).all()):
                fits = False
                break
        if fits:
            fitting.append(inner)
        if len(fitting) > 1 or (fitting and not idle):
            break
    if not fitting:
        text = "rows of its input act on the outputs of several samples, or on those of another one"
        return Probed(text, idle, False)
    found = Arrangement(positions // fitting[0], samples, fitting[0])
    return Probed(found, idle, len(fitting) > 1)
