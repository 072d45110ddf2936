"""What the input covariances of a transformer cost, in units of its forward passes.

    python benchmarks/calibration.py [--rounds 7] [--threads 2] [--json FILE]

A GPT-2 and a Llama of 4 layers, 256 wide, random weights, 64 x 128 tokens in batches of 8, float32.
Beside `hesskern.input_covariances`: forward hooks that add X^T X of every distinct input to a
matrix with `torch.addmm`, without any check of what they add. Each round runs all of them in turn;
a ratio is taken within a round. Processor time is that of all threads together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hesskern as hk
from hesskern.apps.bench import language
from hesskern.apps.bench.language import TextCase
from hesskern.apps.bench.settings import Settings

TARGETS = {"GPT-2": 1.55, "Llama": 1.45}


def measure(case: TextCase, rounds: int) -> dict[str, Any]:
    calls = {
        "forward": lambda: language.forward(case),
        "hesskern": lambda: hk.input_covariances(case.model, case.batches),
        "hooks and addmm": lambda: language.hooked_inputs(case),
    }
    ours, theirs = calls["hesskern"](), calls["hooks and addmm"]()
    difference = max(
        float((ours[n].input_covariance - s / case.samples).norm() / (s / case.samples).norm())
        for n, s in theirs.items()
    )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - used)
    found: dict[str, Any] = {"difference": difference, "layers": len(ours), "sums": len(theirs)}
    for name in calls:
        ratios = [a / b for a, b in zip(seconds[name], seconds["forward"], strict=True)]
        used = [a / b for a, b in zip(processor[name], processor["forward"], strict=True)]
        found[name] = {
            "seconds": seconds[name],
            "processor": processor[name],
            "forwards": statistics.median(ratios),
            "forwards of the least times": min(seconds[name]) / min(seconds["forward"]),
            "forwards, processor": statistics.median(used),
        }
    extra = found["hooks and addmm"]["forwards"] - 1
    found["floor"] = 1 + extra / 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {"GPT-2": language.gpt2(Settings()), "Llama": language.llama(Settings())}
    results = {name: measure(case, arguments.rounds) for name, case in cases.items()}
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    print("| model | contender | forward passes | of the least times | processor time | least |")
    print("|---|---|---|---|---|---|")
    for model, found in results.items():
        for name in ("forward", "hesskern", "hooks and addmm"):
            row = found[name]
            print(
                f"| {model} | {name} | {row['forwards']:.2f} | "
                f"{row['forwards of the least times']:.2f} | {row['forwards, processor']:.2f} | "
                f"{min(row['seconds']):.3f} s |"
            )
    for model, found in results.items():
        print(
            f"{model}: target {TARGETS[model]}, half of addmm's extra {found['floor']:.2f}; "
            f"largest difference {found['difference']:.1e}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
