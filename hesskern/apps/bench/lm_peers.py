"""Other packages on a language model. All imports are inside.

All but bergson know nn.Linear and not Conv1D, so they get a copy of the model with the one for the
other. All take the same 4 layers of every block as hesskern; what a package needs besides stands at
its function. Each returns factors in hesskern's normalization: A = 1/N sum_n sum_t x x^T, and E[M]
the mean over all positions of g g^T, g the gradients of
:func:`hesskern.apps.bench.language.root_loss`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.apps.bench import language
from hesskern.apps.bench.contenders import Call
from hesskern.apps.bench.language import Pairs, TextCase

__all__ = ["PEERS", "Flat", "Peer", "embeddings_alone", "flat"]


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        name: as shown.
        package, module: as in :class:`hesskern.apps.bench.contenders.Contender`.
        prepare: gives what is timed, for a case and whether targets are drawn.
        padding: whether it can be told which tokens are padding.
    """

    name: str
    package: str
    module: str
    prepare: Callable[[TextCase, bool], Call]
    padding: bool = False


class _Flat(nn.Module):
    """Logits [N T, V] for packages that take one prediction per row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids).logits[:, :-1].flatten(0, 1)


@dataclass(frozen=True)
class Flat:
    """A case for packages that take one prediction per row, without the last position's.

    Attributes:
        model: maps ids [N, T] to logits [N (T - 1), V]; its layers are nn.Linear.
        weights: by the layers' names in the case's model; in ``model`` they begin with "inner.".
        data: (ids [N, T], targets [N (T - 1)]).
        terms: losses per sample.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    data: list[tuple[Tensor, Tensor]]
    terms: int


def flat(case: TextCase) -> Flat:
    """A copy of the case's model, and its batches, without padding."""
    linear = language.as_linear(case).model
    data = [(b["input_ids"], b["labels"][:, 1:].flatten()) for b in case.batches]
    weights = {
        name: module.get_parameter("weight") for name, module in language.layers(linear).items()
    }
    terms = sum(len(targets) for _, targets in data) // case.samples
    return Flat(_Flat(linear), weights, data, terms)


def _curvlinops(case: TextCase, drawn: bool) -> Call:
    """Logits flattened, without the last position's, in which A then counts all the same.

    It averages A over positions and sums the gradients' outer products over them.
    """
    from curvlinops import FisherType, KFACLinearOperator, KFACType

    rows = flat(case)

    def call() -> Pairs:
        operator = KFACLinearOperator(
            rows.model,
            nn.CrossEntropyLoss(),
            list(rows.weights.values()),
            rows.data,
            check_deterministic=False,
            fisher_type=FisherType.MC if drawn else FisherType.EMPIRICAL,
            kfac_approx=KFACType.EXPAND,
            num_data=case.samples,
            num_per_example_loss_terms=rows.terms,
        )
        _ = operator.trace
        inputs, outputs = operator._input_covariances, operator._gradient_covariances
        positions = case.tokens // case.samples
        return {
            name: (
                outputs[f"inner.{name}"] / positions,
                inputs[f"inner.{name}"] * positions,
            )
            for name in rows.weights
        }

    return call


def _kronfluence(case: TextCase, drawn: bool) -> Call:
    """Its sums over all tokens; the mask goes to the inputs alone. Biases' entries are cut off."""
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.module.utils import wrap_tracked_modules
    from kronfluence.task import Task
    from kronfluence.utils.constants import (
        ACTIVATION_COVARIANCE_MATRIX_NAME,
        GRADIENT_COVARIANCE_MATRIX_NAME,
    )
    from kronfluence.utils.state import State

    linear = language.as_linear(case)
    names = list(language.layers(linear.model))
    padded = case.tokens < case.batches[0]["labels"].shape[1] * case.samples

    class Text(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = language.logits_of(model, batch)
            labels = batch["labels"]
            if sample:
                labels = language.drawn_labels(logits, labels)
            return language.root_loss(logits, labels)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return batch["attention_mask"] if padded else None

    task = Text()
    for parameter in linear.model.parameters():
        parameter.requires_grad_(False)
    model = wrap_tracked_modules(linear.model, task)
    state = State(cpu=True)

    def call() -> Pairs:
        _, found = fit_covariance_matrices_with_loader(
            model,
            state,
            task,
            case.batches,
            FactorArguments(use_empirical_fisher=not drawn),
            disable_tqdm=True,
        )
        inputs = found[ACTIVATION_COVARIANCE_MATRIX_NAME]
        outputs = found[GRADIENT_COVARIANCE_MATRIX_NAME]
        return {
            name: (outputs[name] / case.tokens, inputs[name][:-1, :-1] / case.samples)
            for name in names
        }

    return call


def _asdl(case: TextCase, drawn: bool) -> Call:
    """Logits flattened; it takes each token for a sample, and the sum of their losses."""
    from asdl import (
        FISHER_EMP,
        FISHER_MC,
        LOSS_CROSS_ENTROPY,
        SHAPE_KRON,
        FisherConfig,
        get_fisher_maker,
    )

    linear = language.as_linear(case)
    model = _Flat(linear.model)
    names = language.layers(linear.model)
    left_out = [m for m in model.modules() if m not in names.values() and not list(m.children())]
    config = FisherConfig(
        fisher_type=FISHER_MC if drawn else FISHER_EMP,
        fisher_shapes=[SHAPE_KRON],
        loss_type=LOSS_CROSS_ENTROPY,
        data_size=1,
        ignore_modules=left_out,
        ignore_index=-100,
    )
    maker = get_fisher_maker(model, config)
    length = case.batches[0]["labels"].shape[1] - 1

    def call() -> Pairs:
        for i, batch in enumerate(case.batches):
            logits = maker.setup_model_call(model, batch["input_ids"])
            maker.setup_loss_call(
                nn.functional.cross_entropy, logits, batch["labels"][:, 1:].flatten()
            )
            maker.forward_and_backward(accumulate=i > 0)
        found: dict[str, Any] = {name: module.fisher.kron for name, module in names.items()}
        return {
            name: (kron.B / case.tokens / length, kron.A / case.samples)
            for name, kron in found.items()
        }

    return call


def embeddings_alone(model: nn.Module) -> Any:
    """A copy of which the embeddings alone have gradients, as bergson's pipeline has it."""
    frozen: Any = copy.deepcopy(model).requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    return frozen


def _bergson(case: TextCase, drawn: bool) -> Call:
    """Native, as it knows Conv1D; the collector of its K-FAC, without its files.

    It is told all positions that are no padding; by itself it leaves out each sample's last one.
    """
    with language.without_torchvision():
        from bergson.hessians.kfac import CovarianceCollector
    model = embeddings_alone(case.model)
    names = set(language.layers(model))

    def call() -> Pairs:
        collector = CovarianceCollector(
            model=model, target_modules=names, dtype=torch.float32, path=""
        )
        with collector:
            for batch in case.batches:
                collector.with_batch(batch["attention_mask"].bool())
                logits = language.logits_of(model, batch)
                labels = batch["labels"]
                if drawn:
                    labels = language.drawn_labels(logits, labels)
                language.root_loss(logits, labels).backward()
                model.zero_grad()
        return {
            name: (
                collector.S_cov_dict[name] / case.tokens,
                collector.A_cov_dict[name] / case.samples,
            )
            for name in names
        }

    return call


PEERS = (
    Peer("curvlinops KFAC", "curvlinops-for-pytorch", "curvlinops", _curvlinops),
    Peer("kronfluence", "kronfluence", "kronfluence.factor.covariance", _kronfluence, padding=True),
    Peer("bergson", "bergson", "bergson.hessians.kfac", _bergson, padding=True),
    Peer("asdl", "asdfghjkl", "asdl", _asdl),
)
