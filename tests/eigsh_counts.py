"""Vectors, products, reads and launches of ``eigsh`` on a device that the CPU plays.

    python tests/eigsh_counts.py --root DIR

Top 20 of F-200^2, trained on 6,000 images of MNIST, by 2,000 of them; blocks of 1, 2, 4 and 8.
Launches are those beside the products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from played_device import Counts, counting, generators, played
from torch import Tensor, nn

import hesskern as hk
from hesskern.zoo.data import load
from hesskern.zoo.models import build
from hesskern.zoo.training import Recipe, train

LOSS = nn.CrossEntropyLoss()


class Counted:
    """An operator that keeps the launches of its products apart."""

    def __init__(self, H: hk.LayerHessian, counts: Counts) -> None:
        self.shape, self.dtype, self.device = H.shape, H.dtype, H.device
        self._H, self._counts = H, counts
        self.products = self.launches = 0

    def __matmul__(self, v: Tensor) -> Tensor:
        before = self._counts.launches
        image = self._H @ v
        self.products += 1
        self.launches += self._counts.launches - before
        return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with MNIST's files")
    arguments = parser.parse_args()
    data = load("mnist", arguments.root, limit=6000)
    model = build("f200x2", data.input_shape, data.classes)
    train(model, data, Recipe(epochs=6, learning_rate=0.02, batch_size=512, momentum=0.9))
    batch = [(data.inputs[:2000].to(played()), data.targets[:2000].to(played()))]
    with generators():
        for name, H in hk.layer_hessians(model.to(played()), batch, LOSS).items():
            for block in (1, 2, 4, 8):
                with counting() as counts:
                    operator = Counted(H, counts)
                    found = hk.eigsh(operator, 20, block=block)
                print(
                    f"{name} block {block}: {found.matvecs} vectors, {operator.products} products, "
                    f"{counts.reads} reads, {counts.launches - operator.launches} launches",
                    flush=True,
                )


if __name__ == "__main__":
    main()
