"""From a network, its prior and its data to a certificate."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import check_every, path_of_rank
from hesskern.checkpoints.facts import environment
from hesskern.choices import Method
from hesskern.files import check_writable
from hesskern.pacbayes.bound import bound_rate, kl_inverse
from hesskern.pacbayes.certificate import Certificate, check_prior, rate_of
from hesskern.pacbayes.checkpoint import ENVIRONMENT
from hesskern.pacbayes.description import describe
from hesskern.pacbayes.evaluate import checkpoint_of_draws, draw_error
from hesskern.pacbayes.grid import on_grid
from hesskern.pacbayes.loop import Outcome, optimize
from hesskern.pacbayes.posterior import LayerPosterior
from hesskern.pacbayes.problem import Problem
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.published_methods import Published, PublishedSettings
from hesskern.pacbayes.samples import Samples, collect
from hesskern.pacbayes.settings import CertifySettings, MethodSettings, Start, seed_for
from hesskern.pacbayes.slots import check_fixed, evaluating, slots_of, state_of
from hesskern.pacbayes.surrogates import log_loss
from hesskern.pacbayes.truncated_method import Truncated, TruncatedSettings
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import checksums, inner_model, model_facts
from hesskern.progress import Progress, reporter
from hesskern.version import __version__

__all__ = ["certify", "certify_with", "train_start"]

_TEST_PASSES = 20


def certify(
    model: nn.Module,
    prior: nn.Module | Mapping[str, Tensor],
    data: Any,
    method: Method | Literal["natural"] = "truncated",
    *,
    epochs: int | None = None,
    minutes: float | None = None,
    protocol: Protocol | None = None,
    settings: MethodSettings | None = None,
    start: Start | None = None,
    seed: int = 0,
    n: int | None = None,
    prior_record: Mapping[str, Any] | None = None,
    prior_data: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    test: Any = None,
    progress: bool | Progress = False,
    group: Any = None,
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
        method: "truncated" (ours), or a published one: "base", "appr", "iter", "iter_d", "iter_m".
        epochs, minutes, protocol, settings, start, seed, n, prior_record: see
            :class:`~hesskern.pacbayes.settings.CertifySettings`, whose fields they are.
        prior_data: the samples that the prior was trained on, if it was: a data-dependent prior.
            None of them may be among ``data``, which alone count as n.
        checkpoint: file from which an interrupted optimization goes on, and to which it is saved
            after epochs; a file beside it, with ".draws" behind its name, is that of the error's
            draws, and removed when they are done. The same call ends at the same certificate,
            whatever interrupted it, up to times and dates; where it cannot be written a warning
            says so.
        checkpoint_every: least seconds between two writings of it; 0: after every epoch or draw.
        exact_resume: whether a checkpoint is refused that was written with another version,
            device or number of threads; False goes on with a warning, and may round differently.
        test: samples that took no part, for an error beside the certificate, of the same networks.
        progress: see :func:`hesskern.progress.reporter`.
        group: ranks of torch.distributed that all call this with the same arguments, all of the
            samples among them. Each optimizes the posterior for itself, alike to the bit; of the
            networks that the certificate draws each counts a part. All get the same certificate.
            ``minutes``, at the end of which ranks would stand at different steps, has no place
            then; a ``checkpoint`` is one file for each.

    Returns:
        a verified :class:`Certificate`.

    Raises:
        ValueError: bad arguments, samples missing or counted twice, a tensor outside the posterior
            that differs from the prior's, a batch norm in train mode, an objective that is not
            finite.
        NotImplementedError: tied weights; a network the method cannot handle.
        TypeError: arguments of a wrong type.
        RankError: with a group, ranks have other arguments or come to other posteriors, or another
            rank has failed.
    """
    return certify_with(
        CertifySettings(method, epochs, minutes, protocol, settings, start, seed, n, prior_record),
        model,
        prior,
        data,
        prior_data=prior_data,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        exact_resume=exact_resume,
        test=test,
        progress=progress,
        group=group,
    )


def certify_with(
    settings: CertifySettings,
    model: nn.Module,
    prior: nn.Module | Mapping[str, Tensor],
    data: Any,
    *,
    prior_data: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    test: Any = None,
    progress: bool | Progress = False,
    group: Any = None,
) -> Certificate:
    """:func:`certify`, whose arguments these are, with settings that are made already."""
    ranks = Ranks.of(group)
    with section_of(ranks, "a certificate"):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        report = reporter(progress)
        if ranks is not None:
            model, report = inner_model(model), ranks.watching("a certificate", report)
            checkpoint = path_of_rank(checkpoint, ranks)
            if settings.minutes is not None:
                raise ValueError(
                    "minutes: ranks of a group would stop at different steps; pass epochs"
                )
        samples = collect(data, settings.n)
        # Read before the work: what is wrong with it must not turn up at its end.
        others = None if test is None else collect(test)
        check_every(checkpoint_every, exact_resume)
        kept = None
        if checkpoint is not None:
            kept = _Kept(Path(checkpoint), float(checkpoint_every), exact_resume)
            check_writable(kept.path.parent, "checkpoint: folder")
        record: dict[str, Any] = _plain(settings.record)
        if prior_data is not None:
            record |= _seen(collect(prior_data), samples)
        case = _checked(settings, model, state_of(prior), samples, record, others)
        method = _method(case.problem, settings)
        if ranks is not None:
            facts = {
                "settings": _plain({**_on_record(method, settings), **asdict(settings.terms)}),
                "prior": case.record,
                "samples": case.fingerprint,
                "test": None if others is None else others.fingerprint(),
            }
            ranks.agree("a certificate", {**facts, **model_facts(model)})
            ranks.agree("a certificate", {"prior's tensors": _hash(case.problem.prior)})
        outcome = _optimized(case, method, settings, kept, report, ranks is None)
        certificate = _drawn(case, method, settings, outcome, kept, report, ranks)
        certificate.verify()
        if kept is not None:
            kept.draws.unlink(missing_ok=True)
        return certificate


@dataclass(frozen=True)
class _Kept:
    """Where an unfinished run is kept.

    Attributes:
        path: of the optimization.
        every: least seconds between two writings.
        exact: whether a file of another environment is refused.
    """

    path: Path
    every: float
    exact: bool

    @property
    def draws(self) -> Path:
        """The file of the draws."""
        return self.path.with_name(f"{self.path.name}.draws")


@dataclass(frozen=True, eq=False)
class _Case:
    """What is certified, looked at before the work.

    Attributes:
        problem: with a copy of the network.
        record: of the prior.
        fixed: tensors outside the posterior.
        fingerprint: of the samples.
        test: samples that take no part.
    """

    problem: Problem
    record: dict[str, Any]
    fixed: dict[str, Tensor]
    fingerprint: str
    test: Samples | None


def _checked(
    settings: CertifySettings,
    model: nn.Module,
    prior: Mapping[str, Tensor],
    samples: Samples,
    record: dict[str, Any],
    test: Samples | None,
) -> _Case:
    """Requires that network, prior and samples fit together."""
    work = copy.deepcopy(model)
    slots = slots_of(work, samples.inputs[:2])
    fixed = check_fixed(work, prior, slots)
    _check_targets(work, samples, "targets")
    if test is not None:
        _check_test(work, samples, test)
    check_prior(record, {name: slot.matrix(prior) for name, slot in slots.items()})
    start = state_of(model) if settings.starts_at == "model" else prior
    problem = Problem(work, slots, prior, start, samples, settings.terms)
    return _Case(problem, record, fixed, samples.fingerprint(), test)


def _method(problem: Problem, settings: CertifySettings) -> Truncated | Published:
    """The optimization, at its start."""
    noise = torch.Generator(device=problem.samples.inputs.device)
    noise.manual_seed(settings.seed_for("noise"))
    own = settings.settings
    if settings.ours:
        own = own if isinstance(own, TruncatedSettings) else TruncatedSettings()
        return Truncated(problem, own, noise)
    own = own if isinstance(own, PublishedSettings) else PublishedSettings()
    return Published(settings.method, problem, own, noise)


def _on_record(method: Truncated | Published, settings: CertifySettings) -> dict[str, Any]:
    """What decided how Q was found, for the certificate and the checkpoint."""
    return {
        **method.settings(),
        "start": settings.starts_at,
        "seed": settings.seed,
        "epochs": settings.budget.epochs,
        "minutes": settings.budget.minutes,
    }


def _optimized(
    case: _Case,
    method: Truncated | Published,
    settings: CertifySettings,
    kept: _Kept | None,
    progress: Progress,
    stops_early: bool,
) -> Outcome:
    """Runs the method until the budget is spent, or Ctrl-C if that stops it early."""
    problem = case.problem
    n, layers, protocol = len(problem.samples), len(problem.slots), problem.protocol
    identity = {
        "method": settings.method,
        **_on_record(method, settings),
        "data": case.fingerprint,
        "prior": _hash(problem.prior),
        ENVIRONMENT: environment(problem.samples.inputs.device),
    }
    device = problem.samples.inputs.device.type
    if device != "cpu":
        # The noise of one device cannot be gone on with on another.
        identity["device"] = device
    return optimize(
        method,
        n,
        settings.budget,
        torch.Generator().manual_seed(settings.seed_for("order")),
        checkpoint=None if kept is None else kept.path,
        identity=_plain(identity),
        interval=60.0 if kept is None else kept.every,
        exact=kept is None or kept.exact,
        progress=progress,
        estimate=lambda error, kl: _estimate(protocol, error, kl, n, layers),
        # Ranks that hear of it at different steps would not have one posterior.
        stops_early=stops_early,
    )


def _drawn(
    case: _Case,
    method: Truncated | Published,
    settings: CertifySettings,
    outcome: Outcome,
    kept: _Kept | None,
    progress: Progress,
    ranks: Ranks | None,
) -> Certificate:
    """Puts the posterior on the grid, draws its networks and counts their errors."""
    problem = case.problem
    samples, protocol, n = problem.samples, problem.protocol, len(problem.samples)
    layers = on_grid(method.drafts(), problem.slots, problem.prior, n, protocol)
    seeds = {name: settings.seed_for(name) for name in ("order", "noise", "draws")}
    started = time.perf_counter()
    if ranks is not None:
        _agree_on_posteriors(ranks, layers, outcome)
    given = problem.model, problem.slots, layers, samples, protocol, seeds["draws"], progress
    saved = None
    if kept is not None:
        kept.path.parent.mkdir(parents=True, exist_ok=True)
        if outcome.moved:
            # What is there was drawn from what the optimization has left.
            kept.draws.unlink(missing_ok=True)
        how = kept.draws, kept.every, kept.exact
        asked = problem.model, layers, samples, protocol, seeds["draws"]
        # The path is that of one rank already.
        saved = checkpoint_of_draws(how, "the draws of certify", *asked)
    drawn = draw_error(*given, ranks=ranks, saved=saved)
    divergence = sum(layer.kl(protocol.grid.variance(layer.index)) for layer in layers.values())
    indices = {name: layer.index for name, layer in layers.items()}
    rate = rate_of(protocol, divergence, n, indices)
    q = drawn.upper(protocol.delta_draws)
    run = {"epochs run": outcome.epochs, "steps run": outcome.steps}
    times: dict[str, Any] = {
        "seconds": {"optimization": outcome.seconds, "draws": time.perf_counter() - started},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "history": outcome.history,
    }
    if ranks is not None:
        # One clock's.
        times = ranks.told("times", times)[0]
    return Certificate(
        bound=float(kl_inverse(q, rate)),
        kl=divergence,
        q=q,
        rate=rate,
        n=n,
        protocol=protocol,
        errors=drawn.errors,
        draws=drawn.draws,
        indices=indices,
        layers=layers,
        fixed=case.fixed,
        method=settings.method,
        settings=_plain({**_on_record(method, settings), **run}),
        seeds=seeds,
        prior=case.record,
        fingerprint=case.fingerprint,
        architecture=_plain(describe(problem.model)),
        interrupted=outcome.interrupted,
        seconds=times["seconds"],
        versions=_versions(),
        created=times["created"],
        history=times["history"],
        test=_test_error(case, layers, settings.seed_for("test"), progress, ranks),
        model=problem.model,
    ).sealed()


def _agree_on_posteriors(
    ranks: Ranks, layers: Mapping[str, LayerPosterior], outcome: Outcome
) -> None:
    """Raises RankError on every rank, where one has optimized otherwise."""
    tensors = {
        f"{part} of {name}": value
        for name, layer in layers.items()
        for part, value in vars(layer).items()
        if isinstance(value, Tensor)
    }
    facts = {"steps": outcome.steps, "interrupted": outcome.interrupted}
    what = "the posteriors, which all ranks optimize alike (the same number of threads)"
    ranks.agree(what, {**facts, "checksums": checksums(tensors)})


def _estimate(protocol: Protocol, error: float, kl: float, n: int, layers: int) -> float:
    """The bound for an error measured while training; prices of the grid's middle."""
    priced = [protocol.grid.b] * (1 if protocol.shared_variance else layers)
    rate = bound_rate(kl, n, priced, protocol.delta, protocol.form, protocol.grid)
    return float(kl_inverse(min(1.0, error), rate))


def _test_error(
    case: _Case,
    layers: Mapping[str, LayerPosterior],
    seed: int,
    progress: Progress,
    ranks: Ranks | None,
) -> dict[str, Any] | None:
    if case.test is None:
        return None
    problem, terms = case.problem, Protocol(passes=_TEST_PASSES)
    given = problem.model, problem.slots, layers, case.test, terms, seed, progress
    drawn = draw_error(*given, "test samples", ranks)
    return {
        "error": drawn.mean,
        "n": len(case.test),
        "passes": _TEST_PASSES,
        "fingerprint": case.test.fingerprint(),
    }


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
    order = torch.Generator().manual_seed(seed_for(seed, "sgd"))
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
