"""Against kronfluence 1.0.1, an independent implementation, where both define the same thing.

It sums a sample's losses over its tokens, as losses here do with ``reduction="sum"``, includes
biases, takes the data's own targets with ``use_empirical_fisher``, and its eigenvalues are means
over samples of squared gradients in the eigenbases of factors that differ from ours in their scale
alone. Its scores have our sign.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_loops import close
from networks import classes, randn, seeded
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesskern as hk

pytest.importorskip("kronfluence", reason="kronfluence==1.0.1 is not installed: no peer")
# Its own use of torch and others.
pytestmark = pytest.mark.filterwarnings("ignore")
LOSS = nn.CrossEntropyLoss(reduction="sum")


class Tokens(nn.Module):
    """Logits [N, c, t] of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x))).transpose(1, 2)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2, padding=1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def theirs(
    model: nn.Module, train: Any, queries: Any, damping: float | None, folder: Path
) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Sums(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    wide = {"per_sample_gradient_dtype": torch.float64}
    task = Sums()
    model = prepare_model(model, task)
    analyzer = Analyzer("peer", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    analyzer.fit_all_factors(
        "factors",
        TensorDataset(*train),
        per_device_batch_size=8,
        factor_args=FactorArguments(
            use_empirical_fisher=True,
            activation_covariance_dtype=torch.float64,
            gradient_covariance_dtype=torch.float64,
            eigendecomposition_dtype=torch.float64,
            lambda_dtype=torch.float64,
            **wide,
        ),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        TensorDataset(*queries),
        TensorDataset(*train),
        per_device_query_batch_size=2,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(
            damping_factor=damping,
            score_dtype=torch.float64,
            precondition_dtype=torch.float64,
            **wide,
        ),
    )
    scores = analyzer.load_pairwise_scores("scores")
    assert scores is not None
    return scores["all_modules"].double()


@pytest.mark.parametrize("damping", [None, 0.05])
@pytest.mark.parametrize("kind", ["plain", "images", "tokens"])
def test_scores(
    kind: str, damping: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    make: Any = {"plain": plain, "images": images, "tokens": Tokens}[kind]
    shape, targets = {
        "plain": ((4,), ()), "images": ((1, 4, 4), ()), "tokens": ((5, 4), (5,))
    }[kind]  # fmt: skip
    train = randn(40, *shape), classes(40, *targets, c=3)
    queries = randn(5, *shape, seed=1), classes(5, *targets, c=3, seed=1)
    model = seeded(make())
    E = hk.ekfac(model, [train], LOSS, output="empirical", bias="joint", precision="float64")
    found = hk.influence(
        E, model, [queries], [train], LOSS, damping="mean" if damping is None else damping
    )
    close(found.scores, theirs(seeded(make()), train, queries, damping, tmp_path), 1e-9)
