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
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Its builds for PyPI's torch break the import of transformers beside one for the CPU.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import hesskern as hk  # noqa: E402

TOKENS, SAMPLES, BATCH, VOCABULARY = 128, 64, 8, 2000
TARGETS = {"GPT-2": 1.55, "Llama": 1.45}


def models() -> dict[str, nn.Module]:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS, **special
    )
    llama = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        **special,
    )
    torch.manual_seed(0)
    return {"GPT-2": GPT2LMHeadModel(gpt2).eval(), "Llama": LlamaForCausalLM(llama).eval()}


def forward(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for batch in data:
            model(**batch)


def hooks_and_addmm(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[d, d] sums of X^T X by layer; of layers that share one input only the first has its sum."""
    sums: dict[str, Tensor] = {}
    last: list[Any] = [None, None]

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, result: Any) -> None:
            x = args[0]
            if x is last[0] and name != last[1]:
                return
            last[:] = x, name
            rows = x.reshape(-1, x.shape[-1])
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.T, rows)

        return add

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    forward(model, data)
    for handle in handles:
        handle.remove()
    return sums


def measure(model: nn.Module, data: list[dict[str, Tensor]], rounds: int) -> dict[str, Any]:
    calls = {
        "forward": lambda: forward(model, data),
        "hesskern": lambda: hk.input_covariances(model, data),
        "hooks and addmm": lambda: hooks_and_addmm(model, data),
    }
    ours, theirs = calls["hesskern"](), calls["hooks and addmm"]()
    difference = max(
        float((ours[n].input_covariance - s / SAMPLES).norm() / (s / SAMPLES).norm())
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
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS))
    data = [{"input_ids": part} for part in tokens.split(BATCH)]
    results = {name: measure(m, data, arguments.rounds) for name, m in models().items()}
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
