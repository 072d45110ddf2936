"""Rounds the weights of a trained network to 4 bits, by GPTQ on hesskern's input covariances.

    python examples/gptq.py [--bits 4] [--group 32] [--steps 400]

A transformer of two layers learns text from a random Markov chain. Then every linear layer's weight
is rounded to a grid of 2^bits values: each entry to the nearest one, or column by column with the
error of each column made up for in those to come (GPTQ, Frantar et al., arXiv 2210.17323), for
which the input covariances of the training text are all it takes. On held-out text: the relative
squared error of every layer's outputs, E |dW x|^2 / E |W x|^2, and the network's loss.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesskern as hk

TOKENS, LENGTH, WIDTH = 64, 32, 64


@dataclass(frozen=True)
class Grid:
    """Values that a weight [m, d] may take: 2^bits of them for each row and group of columns.

    Attributes:
        step: [m, d] between two values.
        zero: [m, d] number of steps below zero where they begin.
        most: number of the last one.
    """

    step: Tensor
    zero: Tensor
    most: int

    @staticmethod
    def of(weight: Tensor, bits: int, group: int) -> Grid:
        """From the least to the largest entry, zero among them."""
        most = 2**bits - 1
        parts = weight.split(group, 1)
        low = torch.cat([p.amin(1, keepdim=True).clamp(max=0).expand_as(p) for p in parts], 1)
        high = torch.cat([p.amax(1, keepdim=True).clamp(min=0).expand_as(p) for p in parts], 1)
        step = ((high - low) / most).clamp(min=1e-12)
        return Grid(step, (-low / step).round(), most)

    def nearest(self, values: Tensor, columns: slice = slice(None)) -> Tensor:
        """The nearest values of the grid, of some columns."""
        step, zero = self.step[:, columns], self.zero[:, columns]
        return ((values / step).round() + zero).clamp(0, self.most).sub(zero) * step


def gptq(weight: Tensor, covariance: Tensor, grid: Grid, damping: float = 0.01) -> Tensor:
    """The weight on the grid, column by column.

    Rounding a column leaves an error; the columns not yet rounded move so that they make up for it
    as well as they can, in the mean over the inputs.

    Args:
        weight: [m, d].
        covariance: [d, d] E[x x^T], summed over positions or not: its scale does not matter.
        grid: of the weight.
        damping: added to the diagonal, as a part of its mean.
    """
    left, a = weight.double().clone(), covariance.double().clone()
    rounded = torch.zeros_like(left)
    diagonal = a.diagonal()
    # An input that is always zero may have any weight.
    left[:, diagonal == 0] = 0
    diagonal += damping * diagonal.mean()
    # Row j of the factor: how the columns behind j answer, once those before it are fixed.
    upper = torch.linalg.cholesky(torch.linalg.inv(a), upper=True)
    for j in range(len(a)):
        rounded[:, j : j + 1] = grid.nearest(left[:, j : j + 1], slice(j, j + 1))
        error = (left[:, j] - rounded[:, j]) / upper[j, j]
        left[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return rounded.to(weight.dtype)


class Block(nn.Module):
    """Causal attention with four heads, then a gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (f(y).unflatten(2, (4, -1)).transpose(1, 2) for f in self._projections())
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def markov_text(count: int, generator: torch.Generator) -> Tensor:
    """[count, LENGTH + 1] tokens; the next one is likely one of three that the last one names."""
    rows = torch.Generator().manual_seed(7)
    chain = torch.rand(TOKENS, TOKENS, generator=rows).pow(12).add(1e-4)
    text = torch.randint(TOKENS, (count, 1), generator=generator)
    for _ in range(LENGTH):
        following = torch.multinomial(chain[text[:, -1]], 1, generator=generator)
        text = torch.cat([text, following], 1)
    return text


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def trained(steps: int, generator: torch.Generator) -> Network:
    torch.manual_seed(0)
    model = Network()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        adam.zero_grad()
        loss_of(model, markov_text(32, generator)).backward()
        adam.step()
    return model.eval()


def output_error(change: Tensor, weight: Tensor, covariance: Tensor) -> float:
    """E |dW x|^2 / E |W x|^2."""
    return float(((change @ covariance) * change).sum() / ((weight @ covariance) * weight).sum())


@torch.no_grad()
def compare(bits: int = 4, group: int = 32, steps: int = 400) -> dict[str, tuple[float, float]]:
    """Prints, and returns by layer, the errors of rounding to the nearest value and of GPTQ."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        model = trained(steps, generator)
    training, held_out = markov_text(256, generator), markov_text(256, generator)
    seen = hk.input_covariances(model, training[:, :-1].split(32))
    checked = hk.input_covariances(model, held_out[:, :-1].split(32))
    networks = {"nearest": copy.deepcopy(model), "GPTQ": copy.deepcopy(model)}
    errors = {}
    print(f"{'layer':20} {'nearest':>9} {'GPTQ':>9}   relative squared error of the outputs")
    for name in seen:
        weight = model.get_parameter(f"{name}.weight")
        grid = Grid.of(weight, bits, group)
        rounded = {
            "nearest": grid.nearest(weight),
            "GPTQ": gptq(weight, seen[name].input_covariance, grid),
        }
        for how, network in networks.items():
            network.get_parameter(f"{name}.weight").copy_(rounded[how])
        test = checked[name].input_covariance
        nearest, ours = (output_error(r - weight, weight, test) for r in rounded.values())
        errors[name] = nearest, ours
        print(f"{name:20} {nearest:9.5f} {ours:9.5f}")
    for how, network in {"as trained": model, **networks}.items():
        print(f"loss {how}: {float(loss_of(network, held_out)):.4f}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    compare(**vars(parser.parse_args()))
