"""Influence functions: what training on a sample does to the loss of a query."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from hesskern.attribution.inverses import Curvature, curvature_of
from hesskern.attribution.kept_scores import Kept
from hesskern.attribution.queries import LayerQueries, of_low_rank, sum_calls
from hesskern.attribution.rank_scores import agree_on_queries, numbers_of, scores_of_all
from hesskern.attribution.result import Influence
from hesskern.attribution.resumed import Asked, curvature_facts
from hesskern.attribution.sample_gradients import LayerRows, layer_rows, matrices
from hesskern.attribution.sample_loss import SampleLoss
from hesskern.attribution.shared_inverses import SharedCurvature, curvature_of_parts
from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.checkpoints.facts import described
from hesskern.factors.ekfac import EKFAC
from hesskern.graph.evidence import Evidence
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_model
from hesskern.passes.batches import DataCourse, check_iterable, no_samples
from hesskern.passes.data_pass import DataPass
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, refuse_missing
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.pieces import Piece, pieces, usual_size
from hesskern.passes.whole_pass import agree_on_pass
from hesskern.progress import Progress, reporter

__all__ = ["influence"]

_SAMPLES = "samples"
_UNMOVED = "has no effect on the queries' losses, so that every score through it is zero"


def influence(
    E: Mapping[str, Any] | None,
    model: nn.Module,
    queries: Iterable[Any],
    train: Iterable[Any],
    loss: Any,
    *,
    damping: float | Mapping[str, float] | Literal["mean"] = "mean",
    layers: str | Iterable[str] | None = None,
    per_layer: bool = False,
    per_token: bool = False,
    top: int | None = None,
    query_rank: int | None = None,
    query_loss: Any = None,
    batch_size: int | None = None,
    check: bool = True,
    position_mask: Callable[[Any], Any] | None = None,
    progress: bool | Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    group: Any = None,
) -> Influence:
    """How much training on each sample of ``train`` helps each query: g_q^T (E + damping)^-1 g_n.

    g_n is the gradient of sample n's own loss with respect to the layers' weights, E a curvature of
    the loss in them, block diagonal over layers (Koh & Liang, ICML 2017; with EKFAC Grosse et al.,
    arXiv 2308.03296). A positive score: a little more weight on the sample lowers the query's loss.

    The queries' gradients are multiplied by the inverse once. Those of the training samples are
    dotted as they appear and never all stored. Samples go through the model a fixed number at a
    time, so that scores do not depend on how ``train`` is cut into batches: bit for bit on a CPU
    (with the same number of threads) where the batches' samples have one shape, and on a GPU as far
    as the model itself runs deterministically there.

    Args:
        E: of :func:`hesskern.ekfac`, factors of :func:`hesskern.kronecker_factors`, or by layer an
            operator with a Kronecker eigenbasis. Layers with ``bias="joint"`` are recognized by
            their shape; of a weight that an embedding shares the linear calls count, as in E. None:
            the identity, so that scores are the gradients' own products (weights only).
        model: any module; runs in eval mode and comes back as it was.
        queries: data as in :func:`hesskern.kronecker_factors`.
        train: the same; the samples that are scored, in the order in which they come (from a loader
            that shuffles they come in another than the data set's: there is a warning). It may be
            an iterator. Weights of samples in either are ignored: a score is that of the sample's
            loss with weight one.
        loss: as in :func:`hesskern.kronecker_factors`. A sample's loss is torch's on that sample
            alone: with several targets (tokens) their mean, or their sum where the loss has
            ``reduction="sum"``.
        damping: what is added to E's eigenvalues: a number, numbers by layer, or "mean", a tenth of
            the mean of each layer's eigenvalues.
        layers: names or patterns of the layers that count, as in
            :func:`hesskern.kronecker_factors`; None for all of E's.
        per_layer: scores by layer instead of their sums.
        per_token: the part of every position of the training samples, g_nt^T P_q x_nt, which add up
            to the sample's score. Every layer must have one row for each position, which routed
            experts have not.
        top: keep each query's so many largest scores and their samples alone. Of equal scores the
            earlier sample comes first.
        query_rank: keep each layer's preconditioned gradient P_q of a query as the nearest matrix
            of this rank: less memory, and cheaper products where positions are few. What that
            leaves out is said in ``rank_errors``.
        query_loss: of the queries, where it is another than ``loss``.
        batch_size: samples that go through the model at a time, whatever the batches of the data.
            None: for samples of the first one's shape a power of two up to 256, with about 4,096
            tokens or 4 million input numbers. Batches with a tensor that has no axis of samples go
            through as they are.
        check: whether it is found out which rows of a layer belong to which samples; see
            :func:`hesskern.kronecker_factors`.
        position_mask: which positions are data, as there; for queries and training samples.
        progress: True for a bar with the time left, or a callback (description, done, total).
        checkpoint, checkpoint_every, exact_resume: as in :func:`hesskern.kronecker_factors`, for
            the pass over ``train``; the queries' preconditioned gradients and the scores so far go
            into files beside ``checkpoint``, each written once.
        group: ranks of torch.distributed that all call this, with the same E and the same queries,
            and each with its own part of the training samples, as in
            :func:`hesskern.kronecker_factors`. All get the scores of all samples. They are in the
            order of the samples' numbers where the data is a DataLoader that draws indices of its
            data set, each once; otherwise those of the first rank's come first, in their order
            there: ``settings["columns"]`` is "sample numbers" or "ranks". What a
            DistributedSampler repeats is left out. Of ``ekfac(..., sharded=True)`` each rank gives
            its own part for E.

    Returns:
        :class:`Influence`: ``scores`` [q, n] in float32 (float64 for a float64 model).

    Raises:
        ValueError: bad arguments; E of another model or with other shapes; damping that is negative
            or leaves a layer singular; NaN or Inf in a query or sample (named by its number);
            targets that do not fit; no queries or no samples. Messages begin with "queries" or
            "train" where one of them is at fault.
        TypeError, NotImplementedError, OSError, RankError: as in
            :func:`hesskern.kronecker_factors`.
    """
    ranks = Ranks.of(group)
    with section_of(ranks, "influence"), whole_model(ranks, model) as model:
        _check_choices(per_layer, per_token, top, query_rank, batch_size)
        for name, data in (("queries", queries), ("train", train)):
            with _named(name):
                check_iterable(data)
            if ranks is None or name == "queries":
                _warn_of_shuffling(name, data)
        if isinstance(E, EKFAC) and E.part is not None and ranks is not None:
            given = E, model, layers, damping, ranks, checkpoint
            curvature: Curvature = curvature_of_parts(*given)
        else:
            curvature = curvature_of(E, model, layers, damping)
        resolved = resolve_loss(loss)
        asked = resolved if query_loss is None else resolve_loss(query_loss)
        report, mask, evidence = reporter(progress), checked_mask(position_mask), Evidence(check)
        size = _size(batch_size)
        device = model_device(model)
        stay = None
        shared = isinstance(curvature, SharedCurvature)
        if ranks is not None:
            settings = {
                "E": described(None if shared else curvature_facts(E)),
                "damping": curvature.damping,
                "per_layer": per_layer,
                "per_token": per_token,
                "top": top,
                "query_rank": query_rank,
                "batch_size": batch_size,
                "check": check,
                "position_mask given": mask is not None,
            }
            agree_on_pass(ranks, "influence", model, curvature.specs, resolved, settings)
            report = ranks.watching("influence", report)
            with _named("train"):
                stay = weights_of_part(ranks, train, None, 2)
        saved = Checkpoint.of(
            checkpoint,
            checkpoint_every,
            exact_resume,
            "influence",
            model,
            device,
            {
                "E": curvature_facts(E),
                "loss": loss,
                "damping": damping,
                "layers": list(curvature.specs),
                "geometry": curvature.specs,
                "per_layer": per_layer,
                "per_token": per_token,
                "top": top,
                "query_rank": query_rank,
                "query_loss": query_loss,
                "batch_size": batch_size,
                "check": check,
                "position_mask": position_mask,
            },
            ranks,
        )

        def walk(
            data: Iterable[Any],
            of: SampleLoss,
            description: str,
            specs: dict[str, LayerSpec],
            kept: Collection[str] = (),
            course: DataCourse | None = None,
        ) -> _Walk:
            run = DataPass(
                model,
                data,
                of,
                specs,
                evidence=evidence,
                progress=report,
                description=f"Influence: {description}",
                kept=kept,
                # E has such a layer only where it was made of these calls, too.
                linear_use=E is not None,
                position_mask=mask,
                course=course,
            )
            return _Walk(run, of, size)

        with _named("queries"):
            if saved is not None and saved.stage is not None:
                asked_for = Asked.of_part(next(saved.parts), queries, saved, evidence, device)
            else:
                way = None if saved is None else saved.way(queries)
                first = walk(
                    queries, SampleLoss(asked, "query"), "queries", curvature.specs, course=way
                )
                gradients, count = first.gradients()
                unmoved = dict.fromkeys(curvature.specs.keys() - gradients.keys(), _UNMOVED)
                skipped = {**unmoved, **curvature.skipped, **first.run.capture.reasons}
                refuse_missing(curvature.specs, first.run.capture.unfit)
                if not gradients:
                    raise ValueError("no layer has a gradient here: " + _reasons(skipped))
                if isinstance(curvature, SharedCurvature):
                    curvature.agree(gradients, count)
                prepared, errors = _prepared(curvature, gradients, query_rank)
                asked_for = Asked(prepared, count, skipped, errors)
        specs = {name: replace(curvature.specs[name], required=True) for name in asked_for.prepared}
        if ranks is not None:
            agree_on_queries(ranks, asked_for.prepared, asked_for.count)
        kept = Kept(asked_for.count, per_layer, top, numbered=ranks is not None)
        with _named("train"):
            course = None if saved is None else saved.begin(_SAMPLES, train)
            if saved is not None and saved.state is None:
                assert way is not None
                saved.keep({"pass": None}, asked_for.part(way.state(), evidence))
            second = walk(train, SampleLoss(resolved, "sample"), "samples", specs, specs, course)
            second.score(asked_for.prepared, kept, per_token, saved, stay)
            total, columns = kept.total, None
            if ranks is not None:
                found = scores_of_all(ranks, kept, asked_for.prepared, per_token)
                scores, indices, total, columns = found
                if columns == "ranks":
                    _warn_of_shuffling("train", train)
            if not total:
                raise no_samples()
            if ranks is None:
                scores, indices = kept.finished()
        result = Influence(
            scores,
            indices,
            num_queries=asked_for.count,
            num_train=total,
            layers=tuple(specs),
            skipped=asked_for.skipped,
            damping={name: curvature.damping[name] for name in specs if curvature.damping},
            rank_errors=asked_for.errors,
            settings={
                "per_token": per_token,
                "query_rank": query_rank,
                "batch_size": batch_size,
                "curvature": type(E).__name__ if E is not None else None,
                **({} if columns is None else {"columns": columns}),
            },
        )
    # When all ranks have it.
    if saved is not None:
        saved.remove()
    return result


@dataclass
class _Walk:
    """One pass over queries or training samples, a fixed number of them at a time."""

    run: DataPass
    loss: SampleLoss
    size: Callable[[Any], int]

    def _rows(
        self,
        first: int = 0,
        skip: int = 0,
        behind: Callable[[Piece], None] | None = None,
    ) -> Iterator[tuple[Piece, dict[str, list[LayerRows]]]]:
        """Every piece with its layers' rows; inside the run's ``with`` block.

        Args:
            first: number of the first sample.
            skip: how many samples of the first batch come before that.
            behind: called behind every piece.
        """
        for piece in pieces(self.run.batches(), self.size, first, skip):
            self.loss.first = piece.first
            roots = self.run.roots(piece.batch, "empirical", 1)
            if len(roots.outputs) != piece.count:
                raise ValueError(
                    f"the model gives outputs {list(roots.outputs.shape)} for {piece.count} "
                    "samples (every tensor of a batch must have its samples in the first axis)"
                )
            yield piece, layer_rows(roots, self.run.specs, self.loss.scale)
            self.run.checks.close()
            if behind is not None:
                behind(piece)
        self.run.checks.settle()

    def gradients(self) -> tuple[dict[str, Tensor], int]:
        """{layer: [q, g, m/g, d]} of all samples, for the layers that one of them reaches; q."""
        found: dict[str, list[tuple[int, Tensor]]] = {}
        count = 0
        with self.run:
            for piece, layers in self._rows():
                count = piece.first + piece.count
                for name, calls in layers.items():
                    rows = matrices(calls, slice(None))
                    about = f"the gradient at layer {name!r}"
                    self.loss.require_finite(rows, about, self.run.checks)
                    found.setdefault(name, []).append((piece.first, rows))
                self.run.checks.gather()
        if not count:
            raise no_samples()
        gradients = {}
        for name in self.run.specs:
            if name in found:
                first = found[name][0][1]
                gradients[name] = first.new_zeros(count, *first.shape[1:])
                for begin, rows in found.pop(name):
                    gradients[name][begin : begin + len(rows)] = rows
        return gradients, count

    def score(
        self,
        prepared: Mapping[str, LayerQueries],
        kept: Kept,
        per_token: bool,
        saved: Checkpoint | None,
        stay: Tensor | None,
    ) -> None:
        """Hands the scores of all samples to ``kept``, from where a checkpoint is.

        Args:
            prepared: the queries.
            kept: where scores go.
            per_token: whether positions have scores of their own.
            saved: the checkpoint.
            stay: [samples] zero for those that do not count; None: all do.
        """
        skip = 0
        if saved is not None and saved.state is not None and saved.state["pass"] is not None:
            state = saved.state["pass"]
            # The first of the parts holds the queries.
            kept.restore(state["kept"], islice(saved.parts, 1, None), model_device(self.run.model))
            self.run.restore(state["run"])
            skip = state["skip"]

        def behind(piece: Piece) -> None:
            if saved is not None and saved.due:
                self.run.settle()
                done, taken = piece.behind
                state = {"kept": kept.state(), "run": self.run.state(), "skip": taken}
                saved.keep({"pass": state}, kept.fresh(), done)

        with self.run:
            for piece, layers in self._rows(kept.total, skip, behind):
                positions = _positions(layers) if per_token else None
                scores = {}
                for name, queries in prepared.items():
                    calls = layers.get(name)
                    if calls is None:
                        shape = (piece.count,) if positions is None else (piece.count, positions)
                        scores[name] = queries.zeros(*shape)
                    elif per_token:
                        scores[name] = sum_calls([queries.position_scores(c) for c in calls])
                    else:
                        scores[name] = queries.scores(calls)
                numbers, known = None, True
                if kept.numbered:
                    given = piece.batch.numbers, piece.first, piece.count, stay
                    numbers, known = numbers_of(*given)
                kept.known &= known
                found = kept.add(scores, piece.count, numbers)
                self.loss.require_finite(found.transpose(0, 1), "the scores", self.run.checks)
                self.run.checks.gather()


def _positions(layers: Mapping[str, list[LayerRows]]) -> int:
    """How many positions all layers have."""
    routed = [name for name, calls in layers.items() if any(call.routed for call in calls)]
    if routed:
        raise ValueError(
            f"per_token needs layers with one row for each position, but {', '.join(routed)} "
            "took some rows alone, which do not say what positions they come from; leave some out "
            "with layers=[...]"
        )
    several = [name for name, calls in layers.items() if any(call.image for call in calls)]
    if several:
        raise ValueError(
            f"per_token needs layers with one row for each position, but {', '.join(several)} "
            "took several images of a sample, each with positions of its own; leave some out with "
            "layers=[...]"
        )
    found = {name: call.positions for name, calls in layers.items() for call in calls}
    if len(set(found.values())) > 1:
        text = ", ".join(f"{name!r} has {count}" for name, count in found.items())
        raise ValueError(
            f"per_token needs layers with one row for each position, but {text}; leave some out "
            "with layers=[...]"
        )
    return next(iter(found.values()), 1)


def _prepared(
    curvature: Curvature, gradients: dict[str, Tensor], rank: int | None
) -> tuple[dict[str, LayerQueries], Tensor | None]:
    """Every layer's preconditioned queries, and [q] what their rank leaves out; empties."""
    prepared = {}
    lost: list[Tensor] = []
    whole: list[Tensor] = []
    with torch.no_grad():
        for name in list(gradients):
            queries = LayerQueries(curvature.solve(name, gradients.pop(name)))
            if rank is not None:
                assert queries.matrices is not None
                whole.append(queries.matrices.double().square().sum((1, 2, 3)))
                queries, error = of_low_rank(queries, rank)
                lost.append(error)
            prepared[name] = queries
    if rank is None:
        return prepared, None
    tiny = torch.finfo(torch.float64).tiny
    return prepared, (sum_calls(lost) / sum_calls(whole).clamp(min=tiny)).sqrt()


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r} {reason}" for name, reason in skipped.items())


def _size(batch_size: int | None) -> Callable[[Any], int]:
    return usual_size if batch_size is None else lambda batch: batch_size


def _check_choices(
    per_layer: bool, per_token: bool, top: Any, query_rank: Any, batch_size: Any
) -> None:
    for name, value in (("top", top), ("query_rank", query_rank), ("batch_size", batch_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("per_layer", per_layer), ("per_token", per_token)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        if value and top is not None:
            raise ValueError(f"top keeps scores of whole samples over all layers, not {name}")


def _warn_of_shuffling(name: str, data: Any) -> None:
    if isinstance(data, DataLoader) and isinstance(
        data.sampler, (RandomSampler, WeightedRandomSampler)
    ):
        number = "row" if name == "queries" else "column (or index)"
        warnings.warn(
            f"{name}: the loader shuffles, so that {number} i of the scores belongs to the i-th "
            "sample that it gave this time, not to sample i of its data set; pass a loader with "
            "shuffle=False",
            stacklevel=3,
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Has errors about data say whether it is the queries or the training samples."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        if type(error) not in (ValueError, TypeError, NotImplementedError):
            raise
        raise type(error)(f"{name}: {error}") from error
