"""Finds wrong labels in MNIST by influence functions.

    python examples/flipped_labels.py [--root FOLDER] [--samples 10000] [--share 0.05] [--epochs 10]

A share of the training labels is replaced by another class and a network is trained on them. Then
every training sample is suspected of a wrong label in four ways:

clean queries    a few hundred clean images are the queries; a sample with a wrong label makes the
                 network worse at them. Suspicious: a low sum of its scores, each query's divided by
                 their norm, or the few queries that the network gets wrong would decide alone
the same, E = 1  with gradients' own products in place of a curvature
self-influence   the score of a sample for itself: an odd one rests on nobody else
own loss         without any influence, the sample's loss

Printed is the area under the curve: the probability that a wrong label is more suspicious than a
right one; 1/2 is chance.

MNIST's files are looked for in --root or $HESSKERN_DATA; where they are not found, scikit-learn's
digits take their place.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import hesskern as hk
from hesskern.zoo import data, models, training

QUERIES = 500
# Samples whose scores for themselves are read off a square of scores.
SELF = 100


@dataclass(frozen=True)
class Problem:
    """Training samples, some with a wrong label, and clean samples to ask about.

    Attributes:
        train: with labels as the network sees them.
        flipped: [N] bool, whose labels are wrong.
        queries: clean samples that the network has not seen.
    """

    train: data.Dataset
    flipped: Tensor
    queries: data.Dataset


def load(root: str | None, samples: int, share: float, seed: int = 0) -> Problem:
    """MNIST, or digits; a share of the labels is moved to another class at random."""
    try:
        train, test = (data.load("mnist", root, train=part) for part in (True, False))
    except ValueError as error:
        print(f"{error}\nTaking scikit-learn's digits instead.")
        train, test = (data.load("digits", train=part) for part in (True, False))
    train = replace(train, inputs=train.inputs[:samples], targets=train.targets[:samples])
    test = replace(test, inputs=test.inputs[:QUERIES], targets=test.targets[:QUERIES])
    source = torch.Generator().manual_seed(seed)
    flipped = torch.rand(len(train), generator=source) < share
    shift = torch.randint(1, train.classes, (len(train),), generator=source)
    targets = torch.where(flipped, (train.targets + shift) % train.classes, train.targets)
    return Problem(replace(train, targets=targets), flipped, test)


def area(suspicion: Tensor, flipped: Tensor) -> float:
    """Area under the curve: P(suspicion of a wrong label > of a right one), ties half."""
    # Ranks from 1, ties with their mean.
    _, place, count = suspicion.double().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    ranks = (last - (count - 1) / 2)[place]
    wrong = int(flipped.sum())
    right = len(flipped) - wrong
    return float((ranks[flipped].sum() - wrong * (wrong + 1) / 2) / (wrong * right))


def compare(problem: Problem, model: str, epochs: int, progress: bool = False) -> dict[str, float]:
    """Areas by method, for a network trained on the problem's labels."""
    train = problem.train
    network = models.build(model, train.input_shape, train.classes)
    recipe = replace(training.recipe_for("quick", train.name), epochs=epochs, momentum=0.9)
    training.train(network, train, recipe, progress=progress)

    batches, queries = train.batches(512), problem.queries.batches(512)
    loss = torch.nn.CrossEntropyLoss()
    E = hk.ekfac(network, batches, loss, bias="joint", progress=progress)
    found = {}
    for name, curvature in (("clean queries", E), ("the same, E = 1", None)):
        scores = hk.influence(curvature, network, queries, batches, loss, progress=progress).scores
        # A query that the network is sure of beyond float32 has zeros alone.
        relative = scores / scores.norm(dim=1, keepdim=True).clamp(min=1e-30)
        found[name] = area(-relative.sum(0), problem.flipped)
    own = [
        hk.influence(E, network, [batch], [batch], loss).scores.diagonal()
        for batch in train.batches(SELF)
    ]
    found["self-influence"] = area(torch.cat(own), problem.flipped)
    with torch.no_grad():
        losses = F.cross_entropy(network(train.inputs), train.targets, reduction="none")
    found["own loss"] = area(losses, problem.flipped)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with MNIST's files")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.05, help="of wrong labels")
    parser.add_argument("--model", default="f64x2")
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    problem = load(given.root, given.samples, given.share)
    print(
        f"{problem.train.source}: {int(problem.flipped.sum())} of {len(problem.train):,} labels "
        f"are wrong; {len(problem.queries)} clean queries"
    )
    for name, value in compare(problem, given.model, given.epochs, progress=True).items():
        print(f"{name:<16} area under the curve {value:.3f}")


if __name__ == "__main__":
    main()
