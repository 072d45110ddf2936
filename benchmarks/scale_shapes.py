"""Bytes and operations of transformers' layers, from their shapes; what ranks share and send.

Nothing here is measured but :data:`RATES`, whose sources stand beside them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "EIGH",
    "FLOAT32",
    "MODELS",
    "RATES",
    "Layer",
    "Model",
    "Rates",
    "longest_share",
    "shares",
]

# Bytes of a number of factors, eigenvectors and corrections.
FLOAT32 = 4
# Operations of a symmetric eigendecomposition with vectors, over n^3: the usual count of
# tridiagonalization, divide and conquer, and the way back (as in NOTES.md).
EIGH = 9


@dataclass(frozen=True)
class Layer:
    """A linear layer [m, d] of a block."""

    name: str
    m: int
    d: int


@dataclass(frozen=True)
class Model:
    """A transformer of equal blocks.

    Attributes:
        width: of the residual stream.
        layers: of one block.
        vocabulary: rows of the head, which is left out of the factors.
        number: bytes of a number of the model.
        tokens: of a sequence.
        settings: keyword arguments of the configuration in transformers, for the activations.
    """

    name: str
    blocks: int
    width: int
    layers: tuple[Layer, ...]
    vocabulary: int
    number: int
    tokens: int
    tied: bool
    settings: tuple[tuple[str, int], ...]

    def sides(self) -> list[int]:
        """Orders of all factors, of every layer of every block."""
        return [n for layer in self.layers for n in (layer.m, layer.d)] * self.blocks

    @property
    def weights(self) -> int:
        """Parameters of the layers."""
        return self.blocks * sum(layer.m * layer.d for layer in self.layers)

    @property
    def parameters(self) -> int:
        """With head and embedding; norms, biases and positions are not counted."""
        return self.weights + self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def factors(self) -> int:
        """Bytes of E[x x^T] and E[M], as they lie in memory; the eigenvectors take as many."""
        return FLOAT32 * sum(n * n for n in self.sides())

    @property
    def triangles(self) -> int:
        """Bytes of the factors as they are sent."""
        return FLOAT32 * sum(n * (n + 1) // 2 for n in self.sides())

    @property
    def corrections(self) -> int:
        """Bytes of S."""
        return FLOAT32 * self.weights

    @property
    def rows(self) -> int:
        """Bytes of one root row per layer, of a sequence."""
        return self.number * self.tokens * self.blocks * sum(layer.m for layer in self.layers)

    def pass_operations(self) -> float:
        """Of a sequence forwards, and backwards without gradients of weights.

        Products with weights, and causal attention: half of Q K^T and of its product with V
        forwards, twice that backwards.
        """
        products = 4 * (self.weights + self.vocabulary * self.width) * self.tokens
        return products + 6 * self.blocks * self.width * self.tokens**2

    def gram_operations(self) -> Iterator[tuple[int, float]]:
        """(n, operations) of every factor's sum over a sequence, one triangle."""
        for n in self.sides():
            yield n, self.tokens * n * (n + 1)

    def correction_operations(self) -> float:
        """Of EKFAC's products for a sequence, each side rotated where that takes fewer."""
        t = self.tokens
        return self.blocks * sum(
            2
            * (t * layer.m * layer.d + layer.m**2 * min(t, layer.d) + layer.d**2 * min(t, layer.m))
            for layer in self.layers
        )

    def eigen_operations(self) -> list[float]:
        """Of every factor's eigendecomposition."""
        return [float(EIGH * n**3) for n in self.sides()]


def _llama(name: str, blocks: int, width: int, inner: int) -> Model:
    keys = 1024
    layers = (
        Layer("q", width, width),
        Layer("k", keys, width),
        Layer("v", keys, width),
        Layer("o", width, width),
        Layer("gate", inner, width),
        Layer("up", inner, width),
        Layer("down", width, inner),
    )
    settings = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 128,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    return Model(name, blocks, width, layers, 128_256, 2, 2048, False, tuple(settings.items()))


_GPT2 = (Layer("qkv", 2304, 768), Layer("o", 768, 768), Layer("up", 3072, 768))
MODELS = (
    Model("GPT-2 small", 12, 768, (*_GPT2, Layer("down", 768, 3072)), 50_257, 4, 1024, True, ()),
    _llama("Llama-8B", 32, 4096, 14_336),
    _llama("Llama-70B", 80, 8192, 28_672),
)


@dataclass(frozen=True)
class Rates:
    """Operations a second on one NVIDIA H200.

    Attributes:
        product: of a matrix product in the model's dtype.
        gram: (n, operations a second) of ``input_covariance_`` on [65536, n], one triangle counted.
    """

    product: float
    gram: tuple[tuple[int, float], ...]

    def gram_at(self, n: int) -> float:
        """Of the largest measured n that is not above; of the smallest below it."""
        return next((rate for size, rate in reversed(self.gram) if size <= n), self.gram[0][1])


def _grams(milliseconds: dict[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple((n, 65_536 * n * (n + 1) / ms * 1e3) for n, ms in milliseconds.items())


# benchmarks/README.md, "GPU", as of commit c4fe906: input covariances (rebuilt since, and not
# measured), torch.mm in float32 41.4 ms, three products in TF32 25.7, torch.mm in bfloat16 2.68.
_SQUARE = 2 * 65_536 * 4096**2
RATES = {
    4: Rates(_SQUARE / 41.4e-3, _grams({512: 0.404, 2048: 4.89, 4096: 18.6})),
    2: Rates(_SQUARE / 2.68e-3, _grams({512: 0.119, 2048: 1.27, 4096: 4.60})),
}
TF32 = 3 * _SQUARE / 25.7e-3


def shares(costs: Sequence[float], ranks: int) -> list[float]:
    """What each rank gets if work goes, largest first, to whoever has least."""
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return sorted(loads, reverse=True)


def longest_share(costs: Sequence[float], ranks: int) -> float:
    """The largest of :func:`shares`."""
    return shares(costs, ranks)[0]
