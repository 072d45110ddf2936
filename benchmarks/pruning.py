"""What `tolerance=` leaves of a trained network's samples, and what finding that out takes.

    python benchmarks/pruning.py [--samples 10000] [--root DIR]

F-200^2 after six epochs on the first images of MNIST; processor time, the least of four calls.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from torch import nn

import hesskern as hk
from hesskern.zoo.data import load
from hesskern.zoo.models import build
from hesskern.zoo.training import Recipe, train

SIX_EPOCHS = Recipe(epochs=6, learning_rate=0.02, batch_size=512, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--root", type=Path, help="folder with MNIST's files")
    arguments = parser.parse_args()
    data = load("mnist", arguments.root, limit=arguments.samples)
    model = build("f200x2", data.input_shape, data.classes)
    train(model, data, SIX_EPOCHS)
    for tolerance in (0.0, 1e-4, 1e-3):
        seconds = []
        for _ in range(4):
            begin = time.process_time()
            found = hk.layer_hessians(
                model, [(data.inputs, data.targets)], nn.CrossEntropyLoss(), tolerance=tolerance
            )
            seconds.append(time.process_time() - begin)
        shown = ", ".join(
            f"{name} {H.pruned_trace / (H.trace() + H.pruned_trace):.2e}"
            for name, H in found.items()
        )
        print(f"tolerance {tolerance:g}: {min(seconds):.3f} s; left out of the trace: {shown}")


if __name__ == "__main__":
    main()
