"""The error of the stochastic network: draws, errors counted, the Chernoff step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.digests import module_facts
from hesskern.pacbayes.bound import draws_rate, kl_inverse
from hesskern.pacbayes.posterior import LayerPosterior, draws_of
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import Slot, evaluating, replaced
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.progress import Progress

__all__ = ["DrawnError", "checkpoint_of_draws", "counted", "draw_error", "wrong"]

_CHUNK = 2000


@dataclass(frozen=True)
class DrawnError:
    """What counting gave.

    Attributes:
        errors: wrong predictions in all draws.
        draws: independent variables behind the Chernoff step.
        trials: predictions that were made, passes times samples.
        share: ``errors`` over the largest number the ``draws`` variables could have held; equals
            errors / trials except where the last group of examples is smaller than the others.
        scale: trials over that largest number, at most 1.
    """

    errors: int
    draws: int
    trials: int
    share: float
    scale: float

    @property
    def mean(self) -> float:
        """Share of wrong predictions."""
        return self.errors / self.trials

    def upper(self, delta_draws: float) -> float:
        """q: with probability 1 - delta' the error of Q on the samples is not above it."""
        q = float(kl_inverse(self.share, draws_rate(self.draws, delta_draws)))
        return min(1.0, q / self.scale)


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """Bool [N]: which predictions are errors; outputs that are not finite are errors.

    Args:
        outputs: [N, c] scores, or [N, 1] logits of class 1 against class 0.
        targets: [N].
    """
    if outputs.shape[1] == 1:
        predicted = (outputs[:, 0] > 0).to(targets.dtype)
    else:
        predicted = outputs.argmax(1)
    return (predicted != targets) | ~torch.isfinite(outputs).all(1)


def counted(
    protocol: Protocol, layers: Mapping[str, LayerPosterior], errors: int, n: int
) -> DrawnError:
    """What so many errors in the protocol's passes over n samples are worth.

    If all layers are per-example (Linear, used once), each of the T n predictions is made by a
    network of its own: that many independent variables. If some share weights over positions,
    ``protocol.group`` examples share a draw of these, and the mean error of a group is one
    variable; a smaller last group counts as if its missing samples were right, and q is scaled
    back. With whole networks, as published, one pass is one variable.
    """
    passes, trials = protocol.passes, protocol.passes * n
    if protocol.sampling == "networks":
        return DrawnError(errors, passes, trials, errors / trials, 1.0)
    if all(layer.per_example for layer in layers.values()):
        return DrawnError(errors, trials, trials, errors / trials, 1.0)
    size = min(protocol.group, n)
    groups = -(-n // size)
    capacity = passes * groups * size
    return DrawnError(errors, passes * groups, trials, errors / capacity, trials / capacity)


@torch.no_grad()
def draw_error(
    model: nn.Module,
    slots: Mapping[str, Slot],
    layers: Mapping[str, LayerPosterior],
    samples: Samples,
    protocol: Protocol,
    seed: int,
    progress: Progress | None = None,
    description: str = "drawing networks",
    ranks: Ranks | None = None,
    saved: Checkpoint | None = None,
) -> DrawnError:
    """Counts the errors of networks drawn from the posterior, T passes over all samples.

    What is drawn is keyed by the seed, by the pass, and where examples or groups of them see
    networks of their own by the place of these among the samples: ranks that share the work out
    draw what one process would.

    Args:
        samples: inputs [N, *shape], targets [N].
        protocol: how many passes, and what a draw is; see :func:`counted`.
        seed: of the draws.
        progress: callback, or None.
        ranks: that share out the passes; all call this with the same arguments.
        saved: of these draws, which go on from there and are kept there.

    Raises:
        RankError: another rank has failed.

    Warns:
        RuntimeWarning: the checkpoint cannot be written, which ends nothing.
    """
    generator = torch.Generator(device=samples.inputs.device)
    whole = protocol.sampling == "networks"
    draws = draws_of(slots, layers, generator, samples.inputs.dtype, whole)
    grouped = not whole and not all(layer.per_example for layer in layers.values())
    size = min(protocol.group, len(samples)) if grouped else _CHUNK
    chunks = list(zip(samples.inputs.split(size), samples.targets.split(size), strict=True))
    turns = range(protocol.passes)
    # A network that is drawn for a whole pass meets all chunks before the next one is drawn;
    # otherwise a chunk's passes follow each other, so that what they have in common is kept.
    order = [(t, i) for t in turns for i in range(len(chunks))]
    if not whole:
        order = [(t, i) for i in range(len(chunks)) for t in turns]
    if ranks is not None:
        begin, end = (len(order) * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
        order = order[begin:end]
    begin, errors, drawn = 0, 0, None
    if saved is not None:
        saved.begin(description, order)
        if saved.state is not None:
            begin, errors = saved.state["done"], saved.state["errors"]
    with section_of(ranks, description), evaluating(model), replaced(slots, draws):
        for done, (t, i) in enumerate(order[begin:], begin + 1):
            place = t if whole else t * len(chunks) + i
            if place != drawn:
                generator.manual_seed(_keyed(seed, place))
                for draw in draws.values():
                    draw.renew()
                drawn = place
            inputs, targets = chunks[i]
            errors += int(wrong(model(inputs), targets).sum())
            if saved is not None and saved.due:
                saved = _kept(saved, done, errors)
            if progress is not None:
                progress(description, done, len(order))
    if ranks is not None:
        errors = int(ranks.totals("errors of draws", errors)[0])
    return counted(protocol, layers, errors, len(samples))


def checkpoint_of_draws(
    kept: tuple[Any, float, bool],
    call: str,
    model: nn.Module,
    layers: Mapping[str, LayerPosterior],
    samples: Samples,
    protocol: Protocol,
    seed: int,
    ranks: Ranks | None = None,
) -> Checkpoint | None:
    """What :func:`draw_error` takes for ``saved``, of the same draws.

    Args:
        kept: the file or None, seconds between two writings, and whether they must be exact.
        call: who asks.
        model: whose tensors in ``layers`` are replaced, so that their values are nothing to it.
        layers, samples, protocol, seed, ranks: as there.
    """
    drawn = [f"{name}.{part}".lstrip(".") for name in layers for part in ("weight", "bias")]
    fixed = {n: t for n, t in model.state_dict().items() if n not in drawn}
    asked = {
        "network": module_facts(model),
        "fixed tensors": fixed,
        "layers": layers,
        "inputs": samples.inputs,
        "targets": samples.targets,
        "protocol": protocol,
        "seed": seed,
    }
    return Checkpoint.of(*kept, call, nn.Module(), samples.inputs.device, asked, ranks)


def _kept(saved: Checkpoint, done: int, errors: int) -> Checkpoint | None:
    """Writes how far the draws are; None where that cannot be."""
    try:
        saved.keep({"done": done, "errors": errors})
    except OSError as error:
        warnings.warn(f"{error}: these draws are not kept", RuntimeWarning, stacklevel=3)
        return None
    return saved


def _keyed(seed: int, place: int) -> int:
    """The seed of one draw, another one for each of up to 2^32 places.

    Torch's generator on the CPU (MT19937) heeds the lowest 32 bits alone: of hashes two in tens of
    thousands would share them, and draws that have to be independent would be the same.
    """
    digest = hashlib.sha256(f"draws {seed}".encode()).digest()
    return (int.from_bytes(digest[:4], "little") + place) % 2**32
