"""From a network, its prior and its data to a certificate."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import math
import platform
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.files import check_writable
from hesskern.pacbayes.architecture import describe
from hesskern.pacbayes.bound import bound_rate, kl_inverse
from hesskern.pacbayes.certificate import Certificate, check_prior, rate_of
from hesskern.pacbayes.evaluate import draw_error
from hesskern.pacbayes.loop import Budget, Draft, optimize
from hesskern.pacbayes.natural import Natural, NaturalSettings
from hesskern.pacbayes.network import Slot, check_fixed, evaluating, slots_of, state_of
from hesskern.pacbayes.posterior import LayerPosterior
from hesskern.pacbayes.protocol import OURS, PUBLISHED, Protocol
from hesskern.pacbayes.published_methods import METHODS, Published, PublishedSettings
from hesskern.pacbayes.samples import Samples, collect
from hesskern.pacbayes.surrogates import log_loss
from hesskern.progress import Progress, reporter
from hesskern.version import __version__

__all__ = ["certify", "train_start"]

_DECLARED = "declared data-free by the user"
_DEFAULT_EPOCHS = 100
_TEST_PASSES = 20
SAVE_INTERVAL = 30.0
"""Least seconds between two checkpoints."""


def certify(
    model: nn.Module,
    prior: nn.Module | Mapping[str, Tensor],
    data: Any,
    method: str = "natural",
    *,
    epochs: int | None = None,
    minutes: float | None = None,
    protocol: Protocol | None = None,
    settings: NaturalSettings | PublishedSettings | None = None,
    start: str | None = None,
    seed: int = 0,
    n: int | None = None,
    prior_record: Mapping[str, Any] | None = None,
    prior_data: Any = None,
    checkpoint: str | Path | None = None,
    test: Any = None,
    progress: bool | Progress = False,
) -> Certificate:
    """Optimizes a posterior and draws its certificate, once, with fresh noise.

    All Linear, Conv1d and Conv2d layers carry a Gaussian posterior, biases included; everything
    else must equal the prior's. Ctrl-C ends the optimization early: the certificate is then that of
    the posterior so far. The result has passed :meth:`Certificate.verify`.

    Args:
        model: network [N, ...] -> [N, c], or [N, 1] for one logit of class 1 against class 0. It
            comes back unchanged. Batch norm must be in eval mode.
        prior: module or state dict that holds w0, the prior's centre; fixed before the data.
        data: the training samples, each once: batches (inputs, targets [B] of class indices).
        method: "natural" (ours), or a published one: "base", "appr", "iter", "iter_d", "iter_m".
        epochs: passes of the optimization; None, with ``minutes`` None too: 100.
        minutes: wall-clock time of the optimization instead.
        protocol: confidence, prior grid, form of the bound, T; fixed before the data. None:
            ``OURS`` for "natural", ``PUBLISHED`` (T = 50,000 whole networks) for the others.
        settings: of the method; None: its defaults.
        start: where the mean starts: "prior" (default of "natural": the model's weights are not
            used, only its shape) or "model" (default and only choice of the published methods).
        seed: of the order of samples, of the optimization's noise, and of the final draws.
        n: the number of samples there must be.
        prior_record: how the prior was made, e.g. ``{"construction": ..., "seed": ...}``; None:
            the certificate says 'declared data-free by the user'.
        prior_data: the samples that the prior was trained on, if it was: a data-dependent prior.
            None of them may be among ``data``, which alone count as n.
        checkpoint: file from which an interrupted optimization goes on, and to which it is saved.
        test: samples that took no part, for an error beside the certificate, of the same networks.
        progress: see :func:`hesskern.progress.reporter`.

    Returns:
        a verified :class:`Certificate`.

    Raises:
        ValueError: bad arguments, samples missing or counted twice, a tensor outside the posterior
            that differs from the prior's, a batch norm in train mode, an objective that is not
            finite.
        NotImplementedError: tied weights; a network the method cannot handle.
        TypeError: arguments of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    protocol = protocol or (OURS if method == "natural" else PUBLISHED)
    if epochs is None and minutes is None:
        epochs = _DEFAULT_EPOCHS
    budget = Budget(epochs, minutes)
    settings = _settings(method, settings)
    start = _start(method, start)
    report = reporter(progress)
    samples = collect(data, n)
    # Read before the work: what is wrong with it must not turn up at its end.
    others = None if test is None else collect(test)
    if checkpoint is not None:
        check_writable(Path(checkpoint).parent, "checkpoint: folder")
    record = _record(prior_record)
    if prior_data is not None:
        record |= _seen(collect(prior_data), samples)
    centre = state_of(prior)
    work = copy.deepcopy(model)
    slots = slots_of(work, samples.inputs[:2])
    fixed = check_fixed(work, centre, slots)
    _check_targets(work, samples, "targets")
    if others is not None:
        _check_test(work, samples, others)
    check_prior(record, {name: slot.matrix(centre) for name, slot in slots.items()})
    architecture = _plain(describe(work))
    begin = state_of(model) if start == "model" else centre
    fingerprint = samples.fingerprint()
    seeds = {name: _seed(seed, name) for name in ("order", "noise", "draws")}
    noise = torch.Generator(device=samples.inputs.device).manual_seed(seeds["noise"])
    optimizer = _method(method, work, slots, centre, begin, samples, protocol, settings, noise)
    options = {
        **optimizer.settings(),
        "start": start,
        "seed": seed,
        "epochs": epochs,
        "minutes": minutes,
    }
    device = samples.inputs.device.type
    # The noise of one device cannot be gone on with on another.
    elsewhere = {} if device == "cpu" else {"device": device}
    outcome = optimize(
        optimizer,
        len(samples),
        budget,
        torch.Generator().manual_seed(seeds["order"]),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        identity=_plain(
            {"method": method, **options, "data": fingerprint, "prior": _hash(centre)} | elsewhere
        ),
        interval=SAVE_INTERVAL,
        progress=report,
        estimate=lambda error, kl: _estimate(protocol, error, kl, len(samples), len(slots)),
    )
    layers = on_grid(optimizer.drafts(), slots, centre, len(samples), protocol)
    started = time.perf_counter()
    drawn = draw_error(work, slots, layers, samples, protocol, seeds["draws"], report)
    divergence = sum(layer.kl(protocol.grid.variance(layer.index)) for layer in layers.values())
    indices = {name: layer.index for name, layer in layers.items()}
    rate = rate_of(protocol, divergence, len(samples), indices)
    q = drawn.upper(protocol.delta_draws)
    options |= {"epochs run": outcome.epochs, "steps run": outcome.steps}
    certificate = Certificate(
        bound=float(kl_inverse(q, rate)),
        kl=divergence,
        q=q,
        rate=rate,
        n=len(samples),
        protocol=protocol,
        errors=drawn.errors,
        draws=drawn.draws,
        indices=indices,
        layers=layers,
        fixed=fixed,
        method=method,
        settings=_plain(options),
        seeds=seeds,
        prior=record,
        fingerprint=fingerprint,
        architecture=architecture,
        interrupted=outcome.interrupted,
        seconds={
            "optimization": outcome.seconds,
            "draws": time.perf_counter() - started,
        },
        versions=_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        history=outcome.history,
        test=None
        if others is None
        else _test_error(work, slots, layers, others, _seed(seed, "test"), report),
        model=work,
    ).sealed()
    certificate.verify()
    return certificate


def on_grid(
    drafts: Mapping[str, Draft],
    slots: Mapping[str, Slot],
    prior: Mapping[str, Tensor],
    n: int,
    protocol: Protocol,
) -> dict[str, LayerPosterior]:
    """Puts the prior variances on the grid.

    A relative draft goes to the nearest j, and mean and variances with it: its KL stays what it
    was. Of another draft's neighbouring j the one with the lower rate is taken.
    """

    def layer(name: str, index: int, moved: bool = False) -> LayerPosterior:
        draft, slot = drafts[name], slots[name]
        mean, variance, centre = draft.mean.clone(), draft.variance.double(), slot.matrix(prior)
        scale = protocol.grid.variance(index) / draft.prior_variance
        if draft.relative:
            variance = variance * scale
        # Of what is positive, no part may round to zero: its logarithm is part of KL.
        variance = variance.clamp(min=torch.finfo(torch.float64).tiny)
        if moved:
            mean = centre + scale**0.5 * (mean - centre)
        return LayerPosterior(
            slot.per_example,
            mean,
            centre,
            variance,
            draft.U,
            draft.V,
            index,
        )

    def cost(chosen: Collection[LayerPosterior]) -> float:
        divergence = sum(item.kl(protocol.grid.variance(item.index)) for item in chosen)
        priced = protocol.priced([item.index for item in chosen])
        return divergence + sum(protocol.grid.price(j) for j in priced)

    if protocol.shared_variance:
        # All drafts of a method with one prior variance agree on it; others meet in the middle.
        logs = [math.log(draft.prior_variance) for draft in drafts.values()]
        common = protocol.grid.neighbours(math.exp(sum(logs) / len(logs)))
        options = [{name: layer(name, j) for name in drafts} for j in common]
        return min(options, key=lambda chosen: cost(chosen.values()))
    found: dict[str, LayerPosterior] = {}
    for name, draft in drafts.items():
        if draft.relative:
            found[name] = layer(name, protocol.grid.nearest(draft.prior_variance), moved=True)
        else:
            near = protocol.grid.neighbours(draft.prior_variance)
            found[name] = min((layer(name, j) for j in near), key=lambda item: cost([item]))
    return found


def _estimate(protocol: Protocol, error: float, kl: float, n: int, layers: int) -> float:
    """The bound for an error measured while training; prices of the grid's middle."""
    priced = [protocol.grid.b] * (1 if protocol.shared_variance else layers)
    rate = bound_rate(kl, n, priced, protocol.delta, protocol.form, protocol.grid)
    return float(kl_inverse(min(1.0, error), rate))


def _test_error(
    model: nn.Module,
    slots: Mapping[str, Slot],
    layers: Mapping[str, LayerPosterior],
    samples: Samples,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    terms = Protocol(passes=_TEST_PASSES)
    drawn = draw_error(model, slots, layers, samples, terms, seed, progress, "test samples")
    return {
        "error": drawn.mean,
        "n": len(samples),
        "passes": _TEST_PASSES,
        "fingerprint": samples.fingerprint(),
    }


def _method(
    name: str,
    model: nn.Module,
    slots: Mapping[str, Slot],
    centre: Mapping[str, Tensor],
    begin: Mapping[str, Tensor],
    samples: Samples,
    protocol: Protocol,
    settings: NaturalSettings | PublishedSettings,
    noise: torch.Generator,
) -> Natural | Published:
    if isinstance(settings, NaturalSettings):
        return Natural(model, slots, centre, begin, samples, protocol, settings, noise)
    return Published(name, model, slots, centre, begin, samples, protocol, settings, noise)


def _settings(
    method: str, settings: NaturalSettings | PublishedSettings | None
) -> NaturalSettings | PublishedSettings:
    if method != "natural" and method not in METHODS:
        raise ValueError(f"method must be natural or one of {', '.join(METHODS)}; got {method!r}")
    expected = NaturalSettings if method == "natural" else PublishedSettings
    if settings is None:
        return expected()
    if not isinstance(settings, expected):
        raise TypeError(
            f"settings of method {method!r} must be {expected.__name__}, got "
            f"{type(settings).__name__}"
        )
    return settings


def _start(method: str, start: str | None) -> str:
    if start is None:
        return "prior" if method == "natural" else "model"
    if start not in ("prior", "model"):
        raise ValueError(f"start must be 'prior' or 'model', got {start!r}")
    if start == "prior" and method != "natural":
        raise ValueError(f"start: method {method!r} starts from the model's weights")
    return start


def _record(record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {"construction": _DECLARED, "seed": None}
    missing = {"construction", "seed"} - record.keys()
    if missing:
        raise ValueError(
            f"prior_record must hold 'construction' and 'seed', {min(missing)!r} is missing"
        )
    plain: dict[str, Any] = _plain(dict(record))
    return plain


def _seen(seen: Samples, samples: Samples) -> dict[str, Any]:
    """The record of a data-dependent prior's samples, none of which may be counted again."""
    common = set(seen.digests()) & set(samples.digests())
    if common:
        raise ValueError(
            f"prior_data: {len(common)} of its samples are among the data; a certificate counts "
            "only samples that its prior has not seen"
        )
    return {"samples seen": len(seen), "fingerprint seen": seen.fingerprint()}


def _check_targets(model: nn.Module, samples: Samples, name: str) -> None:
    with torch.no_grad(), evaluating(model):
        classes = max(2, model(samples.inputs[:2]).shape[1])
    low, high = int(samples.targets.min()), int(samples.targets.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got {low}..{high}")


def _check_test(model: nn.Module, samples: Samples, test: Samples) -> None:
    """Requires that the network takes the test samples as it takes the others."""
    found, expected = test.inputs, samples.inputs
    if (found.shape[1:], found.dtype, found.device) != (
        expected.shape[1:],
        expected.dtype,
        expected.device,
    ):
        raise ValueError(
            f"test: inputs must be [N, ...] = [N, {', '.join(map(str, expected.shape[1:]))}], "
            f"{expected.dtype} on {expected.device} as the training samples are, got "
            f"{list(found.shape)}, {found.dtype} on {found.device}"
        )
    _check_targets(model, test, "test: targets")


def _seed(seed: int, purpose: str) -> int:
    """Seeds of different purposes, far apart, from one."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _versions() -> dict[str, str]:
    return {
        "hesskern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def train_start(
    model: nn.Module,
    samples: Samples,
    epochs: int,
    seed: int,
    progress: Progress,
    rate: float = 0.01,
    momentum: float = 0.9,
    batch_size: int = 100,
) -> None:
    """SGD on the surrogate loss, in place: the trained weights the published methods start from."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    order = torch.Generator().manual_seed(_seed(seed, "sgd"))
    for epoch in range(epochs):
        for rows in torch.randperm(len(samples), generator=order).split(batch_size):
            loss = log_loss(model(samples.inputs[rows]), samples.targets[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not bool(torch.isfinite(loss.detach())):
            raise ValueError(
                f"the start's training diverged in epoch {epoch + 1}: its loss is not finite with "
                f"learning rate {rate}"
            )
        progress("training the start", epoch + 1, epochs)
    model.zero_grad(set_to_none=True)
