"""Every operator, and the way from a model to eigenpairs, on each device against float64.

The tests marked ``cuda`` need a GPU and a build with CUDA: ``pytest -m cuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from devices import CUDA_KERNELS, needs_cuda
from tensors import F32, F64, INPUT_LAYOUTS, arrange, assert_near, random, softmax, to_double
from torch import Tensor, nn

import hesskern as hk
from hesskern import ops
from hesskern.devices import sent
from hesskern.ops import reference

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

WINDOW = {"kernel_size": [3, 2], "stride": [1, 2], "padding": [1, 0], "dilation": [1, 2]}


@pytest.fixture(autouse=True)
def waiting_allowed() -> Iterator[None]:
    """A pass that fails may leave its data, and with them what they forbid, behind."""
    yield
    if CUDA_KERNELS:
        torch.cuda.set_sync_debug_mode("default")


Case = tuple[Callable[..., Any], Callable[..., Any], list[Any]]


def accumulated(op: Callable[..., Tensor], order: Callable[..., tuple[int, ...]]) -> Any:
    """The operator as a function of its inputs: what it adds to a poisoned accumulator."""

    def call(*inputs: Any, **more: Any) -> Tensor:
        dtype = F64 if inputs[0].dtype == F64 else F32
        acc = torch.zeros(order(*inputs), dtype=dtype, device=inputs[0].device)
        acc.masked_fill_(torch.ones_like(acc, dtype=torch.bool).tril(-1), float("nan"))
        return ops.mirror_(op(acc, *inputs, **more))

    return call


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Operator, its reference, and inputs at sizes about the kernels' tiles."""
    wide = F32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def r(*shape: int) -> Tensor:
        return random(shape, dtype)

    def w(*shape: int, seed: int = 0) -> Tensor:
        return random(shape, wide, seed)

    d = 2 * 3 * 2
    covariance = accumulated(ops.input_covariance_, lambda x: (x.shape[1],) * 2)
    bordered = accumulated(
        lambda acc, x: ops.input_covariance_(acc, x, 0.5, True), lambda x: (x.shape[1] + 1,) * 2
    )
    conv = accumulated(
        lambda acc, x: ops.conv_input_covariance_(acc, x, **WINDOW, groups=3), lambda x: (3, d, d)
    )
    hessian = accumulated(ops.output_hessian_, lambda g, *p: (g.shape[2],) * 2)
    found: dict[str, Case] = {
        f"covariance {n} x {k}": (covariance, reference.input_covariance, [r(n, k)])
        for n, k in ((1, 1), (300, 64), (901, 32), (1000, 129), (5000, 7))
    }
    found["covariance, ones"] = (
        bordered, lambda x: reference.input_covariance(x, 0.5, True), [r(77, 30)],
    )  # fmt: skip
    found["conv"] = (
        conv,
        lambda x: reference.conv_input_covariance(x, **WINDOW, groups=3),
        [r(5, 6, 11, 12)],
    )
    for shape in (
        (6, 10, 70), (6, 40, 20), (301, 10, 64), (75, 3, 10), (50, 5, 47), (6, 5, 9, 13),
        (6, 33, 130, 2), (9, 2, 6, 28), (7, 3, 48, 20),
    ):  # fmt: skip
        found[f"output Hessian {shape}"] = (
            hessian, reference.output_hessian, [r(*shape), softmax(shape[:2], wide)],
        )  # fmt: skip
        found[f"output Hessian of roots {shape}"] = (
            hessian, reference.output_hessian, [r(*shape)],
        )  # fmt: skip
    found["kron"] = (ops.kron_matmul, reference.kron_matmul, [r(9, 7), r(20, 5), r(3, 7, 5)])
    found["kron, large"] = (
        ops.kron_matmul, reference.kron_matmul, [r(130, 140), r(70, 200), r(140, 200)],
    )  # fmt: skip
    found["kron in the eigenbasis"] = (
        ops.kron_eigen_matmul,
        reference.kron_eigen_matmul,
        [r(9, 7), r(7, 5), r(20, 5), r(2, 9, 20)],
    )
    found["layer Hessian"] = (
        ops.layer_hessian_matmul, reference.layer_hessian_matmul,
        [w(50, 30, seed=1), w(50, 4, 20), w(2, 20, 30)],
    )  # fmt: skip
    found["layer Hessian, positions"] = (
        ops.layer_hessian_matmul, reference.layer_hessian_matmul,
        [w(9, 30, 6, seed=1), w(9, 4, 20, 6), w(20, 30)],
    )  # fmt: skip
    return found


def on(device: str, arguments: list[Any]) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in arguments]


@devices
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(cases(F64)))
class TestOperators:
    def test_reference(self, name: str, dtype: torch.dtype, device: str) -> None:
        op, expected, arguments = cases(dtype)[name]
        result = op(*on(device, arguments)).cpu()
        # Results of the input's narrow dtype are rounded to it.
        limit = None if result.dtype in (F32, F64) else 2 * torch.finfo(result.dtype).eps
        assert_near(result, expected(*map(to_double, arguments)), tolerance=limit)

    def test_layouts_and_repetition(self, name: str, dtype: torch.dtype, device: str) -> None:
        """Other strides give the same result, and the same call the same bits."""
        op, expected, arguments = cases(dtype)[name]
        for layout in INPUT_LAYOUTS:
            if layout == "channels_last" and arguments[0].dim() < 3:
                continue
            first = arrange(arguments[0].to(device), layout)
            given = [first, *on(device, arguments[1:])]
            result = op(*given)
            assert torch.equal(result, op(*given))
            limit = None if result.dtype in (F32, F64) else 2 * torch.finfo(result.dtype).eps
            reference_of = [arrange(arguments[0], layout).double(), *map(to_double, arguments[1:])]
            assert_near(result.cpu(), expected(*reference_of), tolerance=limit)


@devices
def test_groups_are_their_layers(device: str) -> None:
    """More layers than one launch takes, and layers of different dtypes."""
    shapes = [(3, 4, 5, 6), (70, 20, 9, 130), (1, 1, 1, 1)] * 30
    layers = [
        on(device, [random((m2, m), dtype), random((d2, d), dtype), random((m, d), dtype)])
        for i, (m, d, m2, d2) in enumerate(shapes)
        for dtype in [F64 if i % 2 else F32]
    ]
    grouped = ops.grouped_kron_matmul(*map(list, zip(*layers, strict=True)))
    for result, layer in zip(grouped, layers, strict=True):
        assert_near(result.cpu(), reference.kron_matmul(*(t.double().cpu() for t in layer)))


@devices
def test_tf32_only_where_it_is_allowed(device: str) -> None:
    x = random((4000, 20), F32)
    exact = reference.input_covariance(x.double())
    before = torch.get_float32_matmul_precision()
    try:
        for precision, limit in (("highest", 1e-6), ("high", 2e-3)):
            torch.set_float32_matmul_precision(precision)
            acc = torch.zeros(20, 20, device=device)
            result = ops.mirror_(ops.input_covariance_(acc, x.to(device)))
            assert_near(result.cpu(), exact, tolerance=limit)
    finally:
        torch.set_float32_matmul_precision(before)


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(5 * 9, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    batches = [
        (torch.randn(7, 2, 6, 6, generator=generator), torch.randint(4, (7,), generator=generator))
        for _ in range(3)
    ]
    return model, batches


@devices
@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_model_to_eigenpairs(device: str, output: str) -> None:
    model, batches = network()
    loss = nn.CrossEntropyLoss()
    exact = hk.kronecker_factors(model.double(), [(x.double(), y) for x, y in batches], loss,
                                 output=output)  # fmt: skip
    hessians = hk.layer_hessians(model, [(x.double(), y) for x, y in batches], loss)
    model = model.float().to(device)
    there = [(x.to(device), y.to(device)) for x, y in batches]
    factors = hk.kronecker_factors(model, there, loss, output=output)
    for name in exact:
        found = factors[name]
        assert found.input_covariance.device.type == device
        assert_near(found.input_covariance.cpu(), exact[name].input_covariance)
        assert_near(found.output_hessian.cpu(), exact[name].output_hessian)
    for name, H in hk.layer_hessians(model, there, loss).items():
        dense = hessians[name].to_dense()
        assert_near(H.to_dense().cpu(), dense)
        top = hk.eigsh(H, k=3, tol=1e-5)
        torch.testing.assert_close(
            top.values.double().cpu(), torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-4, atol=0
        )


@devices
def test_compiled(device: str) -> None:
    x, s = random((50, 12), F32).to(device), random((50, 3, 8), F32).to(device)
    A, B = random((8, 8), F32).to(device), random((12, 12), F32).to(device)

    def step(x: Tensor, s: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        acc = ops.mirror_(ops.input_covariance_(torch.zeros_like(B), x))
        return acc, ops.layer_hessian_matmul(x, s, ops.kron_matmul(A, B, V))

    V = random((8, 12), F32).to(device)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(x, s, V), step(x, s, V), strict=True):
        assert torch.equal(found, expected)


@devices
@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_autocast(device: str, output: str) -> None:
    model, batches = network()
    data, loss = [(x.to(device), y.to(device)) for x, y in batches], nn.CrossEntropyLoss()
    exact = hk.kronecker_factors(model.to(device), data, loss, output=output)
    with torch.autocast(device, torch.bfloat16):
        found = hk.kronecker_factors(model, data, loss, output=output)
    limit = 16 * torch.finfo(torch.bfloat16).eps
    for name in exact:
        for factor in ("input_covariance", "output_hessian", "input_mean"):
            one, other = getattr(found[name], factor), getattr(exact[name], factor)
            assert one.dtype == F32
            assert_near(one.cpu(), other.double().cpu(), tolerance=limit)


class Quietly:
    """Data after whose first batch the host must not wait for the device."""

    def __init__(self, data: list[tuple[Tensor, Tensor]]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._data[0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from self._data[1:]
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_KERNELS, reason="needs a GPU and CUDA kernels")
class TestPasses:
    @pytest.mark.parametrize("where", ["cpu", "cuda"])
    @pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
    def test_nothing_waits_for_the_device(self, output: str, where: str) -> None:
        model, batches = network()
        there = [(x.to(where), y.to(where)) for x, y in batches]
        loss, model = nn.CrossEntropyLoss(), model.cuda()
        factors = hk.kronecker_factors(model, Quietly(there), loss, output=output)
        expected = hk.kronecker_factors(model.cpu(), batches, loss, output=output)
        for name in expected:
            assert_near(
                factors[name].output_hessian.cpu(), expected[name].output_hessian, tolerance=1e-4
            )
        model = model.cuda()
        H = hk.layer_hessians(model, Quietly(there), loss)["4"]
        again = hk.layer_hessians(model, Quietly(there), loss, memory_budget=0)["4"]
        V = random((H.shape[0], 2), F32).cuda()
        assert_near((again @ V).cpu(), (H @ V).double().cpu())

    def test_a_bad_batch_is_found_at_the_end(self) -> None:
        model, batches = network()
        model = model.cuda()
        good = [(x.cuda(), y.cuda()) for x, y in batches]
        spoiled = (good[1][0].clone(), good[1][1])
        spoiled[0][2, 0, 1, 1] = float("nan")
        foreign = (good[1][0], torch.full_like(good[1][1], 4))
        for bad, message in ((spoiled, "contain NaN or Inf in batch 1"), (foreign, "found 4")):
            stream = hk.FactorAccumulator(model, nn.CrossEntropyLoss())
            with pytest.raises(ValueError, match=message):
                stream.consume([good[0], bad, good[2]])
            expected = hk.kronecker_factors(model, good[:1], nn.CrossEntropyLoss())
            for name, layer in stream.factors().items():
                assert torch.equal(layer.output_hessian, expected[name].output_hessian)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_KERNELS, reason="needs a GPU and CUDA kernels")
class TestStreams:
    def test_work_is_queued_on_the_current_stream(self) -> None:
        x = random((20_000, 100), F32)
        expected = reference.input_covariance(2 * x.double())
        stream = torch.cuda.Stream()
        source = x.cuda()
        acc = torch.zeros(100, 100, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            ops.input_covariance_(acc, source.mul(2))
            ops.mirror_(acc)
        stream.synchronize()
        assert_near(acc.cpu(), expected)

    def test_captured_graphs_replay(self) -> None:
        x = random((3000, 40), F32).cuda()
        acc = torch.zeros(40, 40, device="cuda")
        s, V = random((300, 3, 20), F32).cuda(), random((20, 40), F32).cuda()
        ops.input_covariance_(acc, x)
        ops.layer_hessian_matmul(x[:300], s, V)
        torch.cuda.synchronize()
        acc.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.mirror_(ops.input_covariance_(acc, x))
            product = ops.layer_hessian_matmul(x[:300], s, V)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert_near(acc.cpu(), 3 * reference.input_covariance(x.double().cpu()))
        assert_near(product.cpu(), reference.layer_hessian_matmul(
            *(t.double().cpu() for t in (x[:300], s, V))))  # fmt: skip


@pytest.mark.parametrize(("name", "waits"), [("cpu", True), ("cuda", False)])
def test_copies_to_the_host_wait_for_their_values(name: str, waits: bool) -> None:
    """One that does not is read before the device has written it."""
    tensor, device = mock.Mock(), torch.device(name)
    sent(tensor, device)
    tensor.to.assert_called_once_with(device, non_blocking=not waits)
