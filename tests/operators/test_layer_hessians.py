"""Exact layer-wise Hessians against dense ones made by torch's own derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from blocks import hessians
from dense import gauss_newton, loss_hessian, relative_error
from networks import CASES, CE, Between, Case, classes, randn, sample_loss, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hesskern as hk

# torch's remark on "same" padding of even kernels, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


def reference(case: Case, model: nn.Module, data: Any, layer: str, **kwargs: Any) -> Tensor:
    dense = loss_hessian if layer in case.exact else gauss_newton
    return dense(model, data, sample_loss, layer, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_all_faces_of_the_operator_against_the_dense_matrix(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    found = hessians(model, data, CE)
    assert set(found) == set(case.layers)
    for layer, H in found.items():
        expected = reference(case, model, data, layer)
        p = len(expected)
        assert H.shape == (p, p)
        assert H.dtype == torch.float64
        assert H.name == layer
        assert H.num_samples == 7
        assert H.is_exact == (layer in case.exact), H.inexact_reason
        assert (H.inexact_reason is None) == H.is_exact
        assert relative_error(H.to_dense(), expected) <= 1e-10
        vector, block = randn(p, seed=5), randn(p, 3, seed=6)
        assert relative_error(H @ vector, expected @ vector) <= 1e-10
        assert relative_error(H @ block, expected @ block) <= 1e-10
        assert relative_error(H.diagonal(), expected.diagonal()) <= 1e-10
        assert H.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
        operator = H.to_scipy()
        assert isinstance(operator, scipy.sparse.linalg.LinearOperator)
        assert operator.dtype == np.float64
        for v in (vector, block):
            assert relative_error(torch.as_tensor(operator @ v.numpy()), expected @ v) <= 1e-10


@pytest.mark.parametrize("name", CASES)
def test_joint_bias(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    found = hessians(model, data, CE, bias="joint")
    if name == "tied":
        # Two biases, one weight: neither bias belongs to all of its calls.
        assert "is also called without its bias" in found.skipped["first"]
        assert set(found) == {"out"}
    for layer, H in found.items():
        joint = model.get_submodule(layer).bias is not None
        expected = reference(case, model, data, layer, joint=joint)
        assert H.layer_shape[1] == model.get_submodule(layer).weight[0].numel() + joint
        assert H.shape == expected.shape
        assert relative_error(H.to_dense(), expected) <= 1e-10
        vector = randn(len(expected), seed=5)
        assert relative_error(H @ vector, expected @ vector) <= 1e-10


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = CASES[name]
    found = hessians(case.model(torch.float32), case.data(torch.float32), CE)
    model, data = case.model(torch.float32).double(), case.data(torch.float32)
    wide = [(_double(inputs), targets) for inputs, targets in data]
    for layer, H in found.items():
        expected = reference(case, model, wide, layer)
        assert H.dtype == torch.float32
        assert relative_error(H.to_dense(), expected) <= 1e-5
        vector = randn(len(expected), seed=5)
        assert relative_error(H @ vector.float(), expected @ vector) <= 1e-5


def _double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: value.double() for key, value in inputs.items()}
    return tuple(x.double() for x in inputs) if isinstance(inputs, tuple) else inputs.double()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bfloat16", "float16"]
)
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, bound: float) -> None:
    case = CASES["residual"]
    model = case.model(dtype)
    data = [(x.to(dtype), y) for x, y in case.data()]
    found = hk.layer_hessians(model, data, CE)
    wide = [(x.double(), y) for x, y in data]
    model.double()
    for layer, H in found.items():
        assert H.dtype == torch.float32
        assert relative_error(H.to_dense(), reference(case, model, wide, layer)) <= bound


@pytest.mark.parametrize("name", ["twice", "tied", "tanh", "layer norm"])
def test_one_warning_names_layers_and_reasons(name: str) -> None:
    case = CASES[name]
    with pytest.warns(UserWarning, match="Gauss-Newton block is not the Hessian") as caught:
        found = hk.layer_hessians(case.model(), case.data(), CE)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    for layer in case.inexact:
        assert repr(layer) in text
        assert found[layer].inexact_reason in text
    for layer in case.exact:
        assert repr(layer) not in text.split("AutogradHessian")[0].replace("shares", "")


def test_no_warning_where_every_block_is_the_hessian() -> None:
    case = CASES["relu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hk.layer_hessians(case.model(), case.data(), CE)


def test_layer_selection_and_names() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    full = hk.layer_hessians(model, data, CE)
    assert list(full) == ["0", "2", "4"]
    some = hk.layer_hessians(model, data, CE, layers=["4", "0"])
    assert list(some) == ["0", "4"]
    one = hk.layer_hessians(model, data, CE, layers="2")
    assert list(one) == ["2"]
    for layer, H in {**some, **one}.items():
        assert torch.equal(H.to_dense(), full[layer].to_dense())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(context: Any) -> None:
    case = CASES["in-place relu"]
    model, data = case.model(), case.data()
    expected = hk.layer_hessians(model, data, CE)
    with context():
        # Batches made under inference_mode are inference tensors.
        found = hk.layer_hessians(model, [(x.clone(), y.clone()) for x, y in data], CE)
        rerun = hk.layer_hessians(model, data, CE, memory_budget=0)
        for layer in expected:
            assert torch.equal(found[layer].to_dense(), expected[layer].to_dense())
            vector = randn(len(expected[layer].to_dense()))
            assert relative_error(rerun[layer] @ vector, expected[layer] @ vector) <= 1e-12
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.is_grad_enabled()


def test_a_model_in_float32_with_outputs_in_float64() -> None:
    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x))).double()

    model = seeded(Upcast()).float()
    data = [(randn(4, 4, dtype=torch.float32), classes(4, c=3))]
    for layer, H in hk.layer_hessians(model, data, CE).items():
        assert H.dtype == torch.float32
        vector = randn(H.shape[0], dtype=torch.float32)
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H @ vector, expected @ vector) <= 1e-5


def test_blocks_of_no_vectors_and_strided_ones() -> None:
    case = CASES["conv groups"]
    H = hk.layer_hessians(case.model(), case.data(), CE)["0"]
    p = H.shape[0]
    assert (H @ torch.zeros(p, 0).double()).shape == (p, 0)
    wide = randn(p, 8, seed=1)
    assert relative_error(H @ wide[:, ::3], H.to_dense() @ wide[:, ::3]) <= 1e-12
    assert relative_error(H @ wide.T.contiguous().T[:, 2], H.to_dense() @ wide[:, 2]) <= 1e-12


# Data of every kind


def test_data_loaders_generators_and_lists_agree() -> None:
    case = CASES["residual"]
    model = case.model()
    x, y = randn(7, 4), classes(7, c=3)
    batches = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(zip(x, y, strict=True))

    expected = hk.layer_hessians(model, batches, CE)
    sources: dict[str, Any] = {
        "DataLoader": DataLoader(TensorDataset(x, y), batch_size=3),
        "DataLoader over a stream": DataLoader(Stream(), batch_size=3),
        "generator": (batch for batch in batches),
        "lists": [list(batch) for batch in batches],
        "tuple": tuple(batches),
    }
    for source in sources.values():
        for layer, H in hk.layer_hessians(model, source, CE).items():
            assert torch.equal(H.to_dense(), expected[layer].to_dense())


def test_empty_batches_add_nothing() -> None:
    for name in ("relu", "sequence", "conv groups"):
        case = CASES[name]
        model, data = case.model(), case.data()
        x, y = data[0]
        found = hk.layer_hessians(model, [(x[:0], y[:0]), *data, (x[:0], y[:0])], CE)
        for layer, H in hk.layer_hessians(model, data, CE).items():
            assert found[layer].num_samples == 7
            assert torch.equal(found[layer].to_dense(), H.to_dense())


def test_one_sample_and_one_or_two_classes() -> None:
    for c in (1, 2):
        model = seeded(Between(F.relu, c=c))
        data = [(randn(1, 4), classes(1, c=c))]
        for layer, H in hk.layer_hessians(model, data, CE).items():
            expected = loss_hessian(model, data, sample_loss, layer)
            assert relative_error(H.to_dense(), expected) <= 1e-10
            vector = randn(H.shape[0])
            assert relative_error(H @ vector, expected @ vector) <= 1e-10


# Sample weights


def weights_for(data: Any) -> list[Tensor]:
    weights = [randn(len(y), seed=i).abs() for i, (_, y) in enumerate(data)]
    weights[0][1] = 0.0
    return weights


@pytest.mark.parametrize("name", ["relu", "sequence", "conv groups", "twice", "dict"])
@pytest.mark.parametrize("form", ["in data", "keyword"])
def test_sample_weights(name: str, form: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    weights = weights_for(data)
    if form == "in data":
        weighted: Any = [(x, y, w) for (x, y), w in zip(data, weights, strict=True)]
        found = hessians(model, weighted, CE)
    else:
        found = hessians(model, data, CE, sample_weight=torch.cat(weights))
    for layer, H in found.items():
        expected = reference(case, model, data, layer, weights=weights)
        assert relative_error(H.to_dense(), expected) <= 1e-10
        assert H.num_samples == pytest.approx(float(torch.cat(weights).sum()))


def test_integer_weights_count_repeats_and_a_batch_of_zeros_adds_nothing() -> None:
    case = CASES["conv stride"]
    model, data = case.model(), case.data()
    (x, y), second = data
    repeated = [(x[[0, 0, 2, 2, 2]], y[[0, 0, 2, 2, 2]])]
    counts = torch.tensor([2, 0, 3, 0, 0, 0, 0])
    found = hk.layer_hessians(model, data, CE, sample_weight=counts)
    for layer, H in hk.layer_hessians(model, repeated, CE).items():
        assert found[layer].num_samples == 5
        assert relative_error(found[layer].to_dense(), H.to_dense()) <= 1e-12
    with pytest.raises(ValueError, match="no samples"):
        hk.layer_hessians(model, [second], CE, sample_weight=torch.zeros(3))


def test_autocast_of_the_caller() -> None:
    case = CASES["relu"]
    model, data = case.model(torch.float32), case.data(torch.float32)
    expected = hk.layer_hessians(model, data, CE)
    factors = hk.kronecker_factors(model, data, CE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hk.layer_hessians(model, data, CE)
        found_factors = hk.kronecker_factors(model, data, CE)
    for layer, H in expected.items():
        assert found[layer].dtype == torch.float32
        assert relative_error(found[layer].to_dense(), H.to_dense()) <= 0.05
        output_hessian = found_factors[layer].output_hessian
        assert relative_error(output_hessian, factors[layer].output_hessian) <= 0.05
