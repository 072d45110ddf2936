"""Other packages' influence scores, fitted as :mod:`hesskern.apps.bench.ekfac_peers` has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.apps.bench import language
from hesskern.apps.bench.contenders import Call
from hesskern.apps.bench.ekfac_peers import Bergson, Kronfluence
from hesskern.apps.bench.language import Batch
from hesskern.apps.bench.streams import Stream

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        name: as shown.
        package, module: as in :class:`hesskern.apps.bench.contenders.Contender`.
        prepare: gives what is timed, for a stream, the queries in one batch, and whether targets
            are drawn; scores [q, n].
    """

    name: str
    package: str
    module: str
    prepare: Callable[[Stream, Batch, bool], Call]


class _Loader(list[Any]):
    """Batches, with the samples that kronfluence counts in ``dataset``."""

    def __init__(self, batches: Any) -> None:
        super().__init__(batches)
        self.dataset = range(sum(len(batch["labels"]) for batch in self))


def _kronfluence(stream: Stream, queries: Batch, drawn: bool) -> Call:
    """Its damping None is a tenth of the mean eigenvalue of every layer."""
    from kronfluence.arguments import ScoreArguments
    from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

    fitted = Kronfluence(stream, drawn)

    def call() -> Tensor:
        fitted.fit()
        (scores,) = compute_pairwise_scores_with_loaders(
            fitted.factors,
            fitted.model,
            fitted.state,
            fitted.task,
            _Loader([queries]),
            len(queries["labels"]),
            _Loader(stream.batches),
            ScoreArguments(damping_factor=None),
            fitted.arguments,
            None,
            disable_tqdm=True,
        ).values()
        found: Tensor = scores
        return found

    return call


def _bergson(stream: Stream, queries: Batch, drawn: bool) -> Call:
    """Its preconditioner and its scorer, fed by a collector that keeps gradients in memory.

    Its own pipeline writes the queries' gradients to files in between.
    """
    with language.without_torchvision():
        from bergson.collector.collector import HookCollectorBase
        from bergson.config import InversionConfig
        from bergson.hessians.preconditioner import FactoredPreconditioner
        from bergson.score.score_writer import InMemorySequenceScoreWriter
        from bergson.score.scorer import Scorer

    fitted = Bergson(stream, drawn)
    names = set(stream.names)

    class Gradients(HookCollectorBase):  # type: ignore[misc]
        """Gives a batch's gradients to a scorer, or keeps them where there is none."""

        scorer: Any = None

        def setup(self) -> None:
            self.save_dtype = torch.float32

        def teardown(self) -> None:
            pass

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            pass

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            gradients = self._module_gradient(module, g)
            if self.scorer is None:
                self.mod_grads[module._name] = self._materialize_gradient(gradients)
            else:
                self.scorer.accumulate(module._name, gradients)

    def backward(collector: Any, batch: Batch) -> None:
        collector.with_batch(batch["attention_mask"].bool())
        stream.losses(fitted.model, batch).backward()
        fitted.model.zero_grad()

    def call() -> Tensor:
        bases = fitted.fit()
        inverse = FactoredPreconditioner(
            {name: v for name, (_, v, _) in bases.items()},
            {name: u for name, (u, _, _) in bases.items()},
            {name: s for name, (_, _, s) in bases.items()},
            inversion_cfg=InversionConfig(inversion="damped_inverse", damping_factor=0.1),
            sharded=False,
        )
        collector: Any = Gradients(model=fitted.model, target_modules=names)
        writer = InMemorySequenceScoreWriter(stream.samples, len(queries["labels"]))
        with collector:
            backward(collector, queries)
            turned = inverse.apply(collector.mod_grads)
            collector.mod_grads = {}
            collector.scorer = Scorer(
                turned, list(stream.names), writer, torch.device("cpu"), torch.float32
            )
            done = 0
            for batch in stream.batches:
                backward(collector, batch)
                count = len(batch["labels"])
                collector.scorer(list(range(done, done + count)), {})
                done += count
        found: Tensor = writer.scores.T
        return found

    return call


PEERS = (
    Peer("kronfluence", "kronfluence", "kronfluence.score.pairwise", _kronfluence),
    Peer("bergson", "bergson", "bergson.score.scorer", _bergson),
)
