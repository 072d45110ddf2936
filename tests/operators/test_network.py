"""NetworkOperator in all its forms against dense float64 matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense import relative_error
from kronecker_cases import LAYERS, network, power, shifted
from networks import generator, randn
from torch import Tensor

import hesskern as hk

DTYPES = [torch.float32, torch.float64]
BOUND = {torch.float32: 1e-5, torch.float64: 1e-11}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def by_layer(K: hk.NetworkOperator, block: Tensor) -> dict[str, Tensor]:
    """{name: [k, m, d]} of [P, k], cut by hand."""
    found, first = {}, 0
    for name, layer in K.layers.items():
        m, d = layer.layer_shape
        rows = block[first : first + m * d].T
        found[name] = (
            torch.stack([row.reshape(d, m).T for row in rows])
            if layer.transposed
            else rows.reshape(-1, m, d)
        )
        first += m * d
    assert first == len(block)
    return found


def in_every_form(K: hk.NetworkOperator, call: Any, expected: Tensor, bound: float) -> None:
    """A call on flat vectors, blocks and dicts gives expected [P, P] times these."""
    block = randn(len(expected), 3, seed=1).to(K.dtype)
    product = expected @ block.double()
    flat = call(block)
    assert (flat.shape, flat.dtype) == (block.shape, K.dtype)
    assert relative_error(flat, product) <= bound
    single = call(block[:, 0])
    assert single.shape == (len(expected),)
    assert relative_error(single, product[:, 0]) <= bound
    assert call(block[:, :0]).shape == (len(expected), 0)
    wanted = by_layer(K, product)
    matrices = call(by_layer(K, block))
    assert list(matrices) == list(K.layers)
    one = call({name: b[1] for name, b in by_layer(K, block).items()})
    for name, layer in K.layers.items():
        assert matrices[name].shape == (3, *layer.layer_shape)
        assert relative_error(matrices[name], wanted[name]) <= bound
        assert one[name].shape == layer.layer_shape
        assert relative_error(one[name], wanted[name][1]) <= bound


def diagonal(K: hk.NetworkOperator, numbers: dict[str, float]) -> Tensor:
    """[P, P] with every layer's number on the diagonal."""
    parts = [
        torch.full((K.layers[name].shape[0],), number, dtype=torch.float64)
        for name, number in numbers.items()
    ]
    return torch.diag(torch.cat(parts))


@dtypes
def test_products(dtype: torch.dtype) -> None:
    K, dense = network(dtype)
    assert K.shape == tuple(dense.shape)
    in_every_form(K, lambda v: K @ v, dense, BOUND[dtype])
    assert relative_error(K.to_dense(), dense) <= BOUND[dtype]
    assert K.trace() == pytest.approx(float(dense.trace()), rel=BOUND[dtype])
    assert relative_error(K.diagonal(), dense.diagonal()) <= BOUND[dtype]
    found = hk.eigsh(K, 3)
    values = torch.linalg.eigvalsh(dense).flip(0)[:3]
    assert relative_error(found.values, values) <= 1e-5


@dtypes
def test_solves_with_every_damping(dtype: torch.dtype) -> None:
    K, dense = network(dtype)
    identity = torch.eye(len(dense)).double()
    inverse = torch.linalg.inv(dense + 0.3 * identity)
    in_every_form(K, lambda v: K.solve(v, 0.3), inverse, BOUND[dtype])
    numbers = {name: 0.1 * (i + 1) for i, name in enumerate(K.layers)}
    inverse = torch.linalg.inv(dense + diagonal(K, numbers))
    in_every_form(K, lambda v: K.solve(v, numbers), inverse, BOUND[dtype])
    means = {n: 0.1 * float(dense[s, s].diagonal().mean()) for n, s in K.slices.items()}
    inverse = torch.linalg.inv(dense + diagonal(K, means))
    in_every_form(K, lambda v: K.solve(v, "mean"), inverse, 5 * BOUND[dtype])
    mixed: dict[str, Any] = {**means, "plain": "mean"}
    in_every_form(K, lambda v: K.solve(v, mixed), inverse, 5 * BOUND[dtype])


@dtypes
def test_powers_and_logdet(dtype: torch.dtype) -> None:
    K, dense = network(dtype)
    for p in (-1, -0.5, 0.25, 2):
        raised = K.power(p, 0.1)
        assert isinstance(raised, hk.NetworkOperator)
        expected = power(shifted(dense, 0.1), p)
        in_every_form(raised, lambda v, raised=raised: raised @ v, expected, BOUND[dtype])
    logdet = float(torch.linalg.slogdet(shifted(dense, 0.2)).logabsdet)
    assert K.logdet(0.2) == pytest.approx(logdet, rel=1e-5)
    numbers = {name: 0.1 * (i + 1) for i, name in enumerate(K.layers)}
    each = sum(layer.logdet(numbers[name]) for name, layer in K.layers.items())
    assert K.logdet(numbers) == pytest.approx(each, rel=1e-12)


@dtypes
def test_samples(dtype: torch.dtype) -> None:
    """F F^T is the inverse for X = F z with the generator's own z, layer by layer."""
    K, dense = network(dtype)
    size = len(dense)
    drawn = K.sample(2 * size, 0.2, generator(1))
    assert drawn.shape == (size, 2 * size)
    source, parts = generator(1), []
    for layer in K.layers.values():
        for s in layer.eigenbases[2]:
            parts.append(torch.randn(2 * size, *s.shape, dtype=dtype, generator=source).flatten(1))
    z = torch.cat(parts, 1).double()
    root = torch.linalg.lstsq(z, drawn.double().T).solution.T
    inverse = torch.linalg.inv(shifted(dense, 0.2))
    assert relative_error(root @ root.T, inverse) <= 10 * BOUND[dtype]
    matrices = K.sample(2 * size, 0.2, generator(1), blocks=True)
    for name, block in by_layer(K, drawn).items():
        assert torch.equal(matrices[name], block)
    one = next(iter(K.layers.values()))
    assert torch.equal(one.sample(3, 0.2, generator(2)), K.sample(3, 0.2, generator(2))[:20])
    assert K.sample(0, 0.2).shape == (size, 0)


def test_forms_turn_into_each_other() -> None:
    K, dense = network(torch.float64)
    block = randn(len(dense), 2)
    matrices = K.split(block)
    assert all(torch.equal(matrices[n], b) for n, b in by_layer(K, block).items())
    assert torch.equal(K.flat(matrices), block)
    assert torch.equal(K.flat(K.split(block[:, 1])), block[:, 1])


def test_factored_inverse() -> None:
    K, _ = network(torch.float64, "plain", "conv1d", "groups")
    numbers = {"plain": 0.1, "conv1d": 0.2, "groups": 0.3}
    inverse = K.factored_inverse(numbers)
    for name, layer in K.layers.items():
        assert isinstance(layer, hk.KroneckerOperator)
        expected = layer.factored_inverse(numbers[name]).to_dense()
        assert relative_error(inverse.layers[name].to_dense(), expected) <= 1e-12
    with pytest.raises(TypeError, match="layer 'ekfac' is a CorrectedOperator"):
        network(torch.float64, "plain", "ekfac")[0].factored_inverse(0.1)


def test_layers_of_several_dtypes() -> None:
    narrow, wide = LAYERS["conv1d"](torch.float32), LAYERS["plain"](torch.float64)
    K = hk.NetworkOperator({"a": narrow.operator, "b": wide.operator})
    dense = torch.block_diag(narrow.dense, wide.dense)
    assert K.dtype == torch.float64
    vector = randn(len(dense), 2)
    assert relative_error(K @ vector, dense @ vector) <= 1e-6
    expected = torch.linalg.solve(shifted(dense, 0.1), vector)
    assert relative_error(K.solve(vector, 0.1), expected) <= 1e-5
    matrices = K.solve(K.split(vector), 0.1)
    assert (matrices["a"].dtype, matrices["b"].dtype) == (torch.float32, torch.float64)
    assert relative_error(K.flat(matrices), expected) <= 1e-5


def test_factors_of_one_size_are_decomposed_together_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        calls.append(tuple(matrix.shape))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    layers = {str(i): LAYERS["plain"](torch.float32).operator for i in range(3)}
    K = hk.NetworkOperator(layers)
    K.solve(torch.ones(K.shape[0]), 0.1)
    K.logdet(0.1)
    K.power(0.5)
    (2.0 * K).solve(torch.ones(K.shape[0]), 0.1)
    assert sorted(calls) == [(3, 4, 4), (3, 5, 5)]


# Bad input


def small() -> hk.NetworkOperator:
    return hk.NetworkOperator(
        {
            "fc1": hk.KroneckerOperator(torch.eye(2), torch.eye(3)),
            "fc2": hk.KroneckerOperator(torch.eye(4), torch.eye(2)),
        }
    )


def matrices(**change: Any) -> dict[str, Any]:
    return {"fc1": torch.ones(2, 3), "fc2": torch.ones(4, 2), **change}


def with_entry(bad: float) -> Tensor:
    matrix = torch.ones(4, 2)
    matrix[1, 1] = bad
    return matrix


FLAT_BAD = torch.cat([torch.ones(9), torch.tensor([math.nan]), torch.ones(4)])
BAD_VECTORS: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(13), ValueError, r"vectors must be \[14\] or \[14, k\], got \[13\]"),
    (torch.ones(14).double(), TypeError, "vectors must be torch.float32, got torch.float64"),
    (torch.ones(14, device="meta"), ValueError, "vectors must be on cpu, got meta"),
    ([1.0] * 14, TypeError, "a tensor or a mapping from layers to tensors, got list"),
    (FLAT_BAD, ValueError, "finite, but those of layer 'fc2' hold NaN or Inf"),
    ({"fc1": torch.ones(2, 3)}, ValueError, "vectors must have every layer, but lacks .*'fc2'"),
    (matrices(fc3=torch.ones(1)), ValueError, "there is no layer 'fc3'; there are fc1, fc2"),
    (matrices(fc2=torch.ones(2, 4)), ValueError, r"'fc2' must be \[m, d\] = \[4, 2\] .* \[2, 4\]"),
    (matrices(fc2=torch.ones(8)), ValueError, r"vectors of layer 'fc2' must be .*, got \[8\]"),
    (matrices(fc2=None), TypeError, "vectors must be tensors, got NoneType for layer 'fc2'"),
    (matrices(fc2=torch.ones(4, 2).double()), TypeError, "'fc2' must be torch.float32, got .*64"),
    (matrices(fc2=torch.ones(4, 2, device="meta")), ValueError, "'fc2' must be on cpu, got meta"),
    (
        matrices(fc2=torch.ones(3, 4, 2)),
        ValueError,
        r"as many .* \[3, 4, 2\] for 'fc2'",
    ),
    (matrices(fc2=with_entry(math.inf)), ValueError, "those of layer 'fc2' hold NaN or Inf"),
    (matrices(fc2=with_entry(math.nan)), ValueError, "those of layer 'fc2' hold NaN or Inf"),
]


@pytest.mark.parametrize(("vectors", "error", "message"), BAD_VECTORS)
def test_bad_vectors(vectors: Any, error: type[Exception], message: str) -> None:
    K = small()
    for call in (lambda v: K @ v, lambda v: K.solve(v, 0.1)):
        with pytest.raises(error, match=message):
            call(vectors)


CALLS = {
    "solve": lambda K, damping: K.solve(torch.ones(14), damping),
    "power": lambda K, damping: K.power(0.5, damping),
    "logdet": lambda K, damping: K.logdet(damping),
    "sample": lambda K, damping: K.sample(1, damping),
    "factored_inverse": lambda K, damping: K.factored_inverse(damping),
}
BAD_DAMPING: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "damping must be finite and >= 0, got -1"),
    (math.nan, ValueError, "damping must be finite and >= 0, got nan"),
    ("all", ValueError, "damping must be a number or 'mean', got 'all'"),
    ([0.1, 0.2], TypeError, "damping must be a number or 'mean', got list"),
    ({"fc1": 0.1, "fc2": -0.1}, ValueError, r"got -0\.1 for layer 'fc2'"),
    ({"fc1": 0.1}, ValueError, "damping must have every layer, but lacks layer 'fc2'"),
    ({"fc1": 0.1, "fc2": 0.1, "x": 1.0}, ValueError, "no layer 'x'; there are fc1, fc2"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("damping", "error", "message"), BAD_DAMPING)
def test_bad_damping(call: str, damping: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](small(), damping)


@pytest.mark.parametrize("call", ["solve", "logdet", "sample"])
def test_messages_name_the_layer(call: str) -> None:
    dead = hk.KroneckerOperator(torch.zeros(4, 4), torch.eye(2))
    K = hk.NetworkOperator({"fc1": small().layers["fc1"], "fc2": dead})
    with pytest.raises(ValueError, match="layer 'fc2' is singular, of rank 0 of 8"):
        CALLS[call](K, 0.0)
    with pytest.raises(ValueError, match="the trace of layer 'fc2' is 0: give a number"):
        CALLS[call](K, "mean")
    broken = hk.KroneckerOperator(torch.full((4, 4), math.nan), torch.eye(2))
    K = hk.NetworkOperator({"fc1": small().layers["fc1"], "fc2": broken})
    with pytest.raises(ValueError, match="A of layer 'fc2' holds NaN or Inf"):
        CALLS[call](K, 0.1)


def test_bad_layers() -> None:
    K = hk.KroneckerOperator(torch.eye(2), torch.eye(3))
    far = hk.KroneckerOperator(torch.eye(2, device="meta"), torch.eye(3, device="meta"))
    cases: list[tuple[Any, type[Exception], str]] = [
        ([K], TypeError, "layers must map names to operators, got list"),
        ({}, ValueError, "layers must hold at least one operator"),
        ({"a": K, "b": torch.eye(2)}, TypeError, "Kronecker eigenbasis, got Tensor for layer 'b'"),
        ({"a": K, "b": far}, ValueError, "one device, got 'a' on cpu and 'b' on meta"),
    ]
    for layers, error, message in cases:
        with pytest.raises(error, match=message):
            hk.NetworkOperator(layers)
