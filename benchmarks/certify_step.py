"""One step of `hesskern certify` beside one of deterministic SGD: T-600, batch 500.

    python benchmarks/certify_step.py [--net T-600] [--rounds 15]

Both take the same rows of random data of MNIST's shape, turn about; medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from hesskern.apps.certify.published_nets import parse_net
from hesskern.pacbayes import Protocol, TruncatedSettings
from hesskern.pacbayes.problem import Problem
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import slots_of, state_of
from hesskern.pacbayes.surrogates import log_loss
from hesskern.pacbayes.truncated_method import Truncated

__all__ = ["BATCH", "steps"]

STEPS = 10
BATCH = TruncatedSettings().batch_size


def steps(
    name: str, count: int, number: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """So many steps of a certificate's optimization, and of SGD on the same rows.

    Args:
        name: of the net.
        count: of the samples.
        number: of the steps.
        device: where they run.
    """
    net = parse_net(name)
    generator = torch.Generator().manual_seed(0)
    # A fifth of the pixels inked, as in MNIST.
    inputs = torch.rand(count, 1, 28, 28, generator=generator)
    inputs *= torch.rand(inputs.shape, generator=generator) < 0.2
    digits = torch.randint(0, 10, (count,), generator=generator)
    samples = Samples(inputs, net.targets(digits, 0)).to(device)
    model, plain = (net.build((1, 28, 28), 0).to(device) for _ in range(2))
    state, noise = state_of(model), torch.Generator(device).manual_seed(0)
    slots = slots_of(model, samples.inputs[:2])
    problem = Problem(model, slots, state, state, samples, Protocol())
    method = Truncated(problem, TruncatedSettings(), noise)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)
    batches = list(torch.randint(0, count, (number, BATCH), generator=generator))

    def certify() -> None:
        for rows in batches:
            method.step(rows, 0.5)

    def deterministic() -> None:
        for rows in batches:
            loss = log_loss(plain(samples.inputs[rows]), samples.targets[rows]).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    return certify, deterministic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="T-600")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=5000)
    arguments = parser.parse_args()
    certify, deterministic = steps(arguments.net, arguments.samples, STEPS, torch.device("cpu"))
    times: dict[str, list[float]] = {"certify": [], "sgd": []}
    for round_number in range(arguments.rounds + 1):
        for name, run in (("certify", certify), ("sgd", deterministic)):
            started = time.perf_counter()
            run()
            if round_number:
                times[name].append((time.perf_counter() - started) / STEPS * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "net": parse_net(arguments.net).name,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "certify_ms": round(medians["certify"], 2),
        "sgd_ms": round(medians["sgd"], 2),
        "ratio": round(medians["certify"] / medians["sgd"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
