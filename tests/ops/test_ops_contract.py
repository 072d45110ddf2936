"""What every operator promises to torch, whatever its algorithm.

Registration (opcheck), results under tracing and compilation, and accumulators outside autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensors import (
    BF16,
    F16,
    F32,
    F64,
    Accumulator,
    arrange,
    assert_near,
    f32,
    f64,
    random,
    softmax,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from hesskern import ops


def uniform(count: int) -> Tensor:
    return torch.linspace(0, 0.99, count, dtype=torch.float64)


# Kernel size, stride, padding and dilation.
WINDOW = ([2, 2], [1, 1], [0, 0], [1, 1])
# Arguments of every operator; gradients go to the tensors that take one.
SAMPLES: dict[str, list[Callable[[], tuple]]] = {
    "input_covariance_": [
        lambda: (f32(4, 4), f32(6, 4), 0.5),
        lambda: (f64(5, 5), f64(3, 4), -1.0, True),
        lambda: (f32(150, 150), random((7, 150), BF16)),
        lambda: (f32(4, 4), f32(0, 4)),
        lambda: (f32(8, 8)[1:5, 2:6], f32(4, 6).t()),
        lambda: (f32(4, 4), f32(6, 4), 0.5, False, f32(4, 4, seed=1)),
    ],
    "conv_input_covariance_": [
        lambda: (f32(18, 18), f32(2, 2, 5, 6), [3, 3], [1, 1], [1, 1], [1, 1]),
        lambda: (f64(2, 4, 4), f64(2, 4, 7), [2], [2], [1], [1], 2, 0.5),
        lambda: (f32(1, 8, 8), random((2, 2, 4, 4), F16), [2, 2], [2, 1], [0, 0], [1, 2]),
        lambda: (f32(4, 4), f32(0, 1, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    ],
    "output_hessian_": [
        lambda: (f32(4, 4), f32(5, 3, 4), softmax((5, 3), F32), 0.5),
        lambda: (f64(4, 4), f64(5, 3, 4, 2), softmax((5, 3)), 0.5),
        lambda: (f32(4, 4), f32(5, 3, 4)),
        lambda: (f64(4, 4), random((5, 3, 4, 2), BF16)),
        lambda: (f32(4, 4), f32(0, 3, 4)),
        lambda: (f64(4, 4), f64(5, 3, 4, 2), softmax((5, 3)), 0.5, f64(4, 4, seed=1)),
    ],
    "eigen_correction_": [
        lambda: (f32(4, 3), f32(6, 2, 4), f32(6, 3), f32(4, 4), f32(3, 3), 0.5),
        lambda: (f64(4, 4), f64(5, 2, 4, 7), f64(5, 3, 7), f64(4, 4), f64(4, 4), -1.0, True),
        lambda: (f32(4, 3), random((5, 1, 4, 2), BF16), f32(5, 6, 2), f32(2, 2, 2), f32(2, 3, 3)),
        lambda: (f32(4, 3), f32(0, 2, 4), f32(0, 3), f32(4, 4), f32(3, 3)),
        lambda: (
            f32(3, 4).t(),
            f32(6, 5, 4).mT.unsqueeze(1),
            f32(6, 5, 3).mT,
            f32(4, 4),
            f32(3, 3),
        ),
    ],
    "conv_eigen_correction_": [
        lambda: (f32(4, 8), f32(3, 1, 4, 4, 4), f32(3, 2, 5, 5), f32(4, 4), f32(8, 8), *WINDOW),
        lambda: (
            *(f64(4, 5), f64(2, 3, 4, 4), f64(2, 4, 7), f64(2, 2, 2), f64(2, 5, 5)),
            *([2], [2], [1], [1], 2, 0.5, True),
        ),
    ],
    "mirror_": [lambda: (f32(5, 5),), lambda: (f64(3, 40, 40),), lambda: (f32(9, 9)[::2, 1:6],)],
    "kron_matmul": [
        lambda: (f32(2, 3), f32(4, 5), f32(3, 5)),
        lambda: (f64(2, 3), f64(4, 5), f64(6, 3, 5)),
        lambda: (f32(3, 2).t(), f32(2, 5), f32(2, 5, 3).mT),
        lambda: (f32(2, 0), f32(4, 5), f32(1, 0, 5)),
        lambda: (random((2, 3), BF16), random((4, 5), BF16), random((3, 5), BF16)),
    ],
    "grouped_kron_matmul": [
        lambda: ([f32(2, 3), f32(1, 2)], [f32(4, 5), f32(3, 2)], [f32(3, 5), f32(6, 2, 2)]),
        lambda: ([f64(2, 3)], [f64(4, 5)], [f64(0, 3, 5)]),
    ],
    "kron_eigen_matmul": [
        lambda: (f32(4, 3), f32(3, 2), f32(5, 2), f32(4, 5)),
        lambda: (f64(4, 3), f64(3, 2), f64(5, 2), f64(6, 4, 5)),
        lambda: (f32(3, 4).t(), f32(3, 2), f32(5, 2), f32(2, 5, 4).mT),
        lambda: tuple(random(shape, F16) for shape in ((4, 3), (3, 2), (5, 2), (4, 5))),
    ],
    "grouped_kron_eigen_matmul": [
        lambda: (
            [f32(4, 3), f32(2, 2)],
            [f32(3, 2), f32(2, 1)],
            [f32(5, 2), f32(3, 1)],
            [f32(4, 5), f32(6, 2, 3)],
        ),
    ],
    "layer_hessian_matmul": [
        lambda: (f32(6, 4), f32(6, 2, 3), f32(3, 4), 0.5),
        lambda: (f64(6, 4, 5), f64(6, 2, 3, 5), f64(7, 3, 4)),
        lambda: (f32(4, 60).t(), f32(60, 3, 2).mT, f32(4, 3).t()),
        lambda: (f32(0, 4), f32(0, 2, 3), f32(3, 4)),
        lambda: (f32(6, 4), f32(6, 2, 3), f32(3, 4), 0.5, ops.pack_layer_inputs(f32(6, 4), 3)),
    ],
    "pack_layer_inputs": [
        lambda: (f32(6, 4), 3),
        lambda: (f64(6, 4, 5), 21),
        lambda: (f32(0, 4), 0),
    ],
    "sampled_cross_entropy_gradient": [
        lambda: (f32(5, 4), uniform(5)),
        lambda: (
            f64(4, 5).t(),
            uniform(5),
            torch.tensor([0, -1, 2, 3, 9]),
            -1,
        ),
        lambda: (f32(2, 3, 4), uniform(8), None, -100, torch.tensor([2, 4]), 0.5),
        lambda: (
            random((2, 4, 3), BF16).mT,
            uniform(16)[::2],
            torch.zeros(2, 4).long(),
        ),
        lambda: (f32(0, 4, 3), uniform(0)),
    ],
}
MUTATING = (
    "input_covariance_",
    "conv_input_covariance_",
    "output_hessian_",
    "eigen_correction_",
    "conv_eigen_correction_",
    "mirror_",
)
CASES = [
    pytest.param(name, sample, id=f"{name}-{i}")
    for name, samples in SAMPLES.items()
    for i, sample in enumerate(samples)
]


def overload(name: str) -> Any:
    return getattr(torch.ops.hesskern, name).default


def require_grad(name: str, arguments: tuple) -> tuple:
    """The arguments with gradients wanted wherever the operator takes or tolerates one."""
    if name in MUTATING:
        wanted = list(range(1, len(arguments)))
    elif name == "layer_hessian_matmul":
        wanted = [2]
    elif name in ("pack_layer_inputs", "sampled_cross_entropy_gradient"):
        wanted = []
    else:
        wanted = list(range(len(arguments)))
    return tuple(
        pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), argument)
        if i in wanted
        else argument
        for i, argument in enumerate(arguments)
    )


def test_every_registered_operator_is_covered() -> None:
    registered = {
        name.removeprefix("hesskern::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        # Operators with an underscore in front are for tests and benchmarks alone.
        if name.startswith("hesskern::") and not name.startswith("hesskern::_")
    }
    assert registered == set(SAMPLES)
    assert registered <= set(ops.__all__)


@pytest.mark.parametrize(("name", "sample"), CASES)
class TestRegistration:
    def test_opcheck(self, name: str, sample: Callable[[], tuple]) -> None:
        torch.library.opcheck(overload(name), sample(), test_utils=ALL_TESTS)

    # Newer versions of opcheck look at gradients of their own tensors that are no leaves.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_opcheck_with_gradients(self, name: str, sample: Callable[[], tuple]) -> None:
        arguments = require_grad(name, sample())
        if any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(arguments)):
            torch.library.opcheck(overload(name), arguments, test_utils=ALL_TESTS)
        else:
            assert name in ("mirror_", "pack_layer_inputs", "sampled_cross_entropy_gradient")

    def test_fake_results(self, name: str, sample: Callable[[], tuple]) -> None:
        """Shapes, dtypes and strides of the fake kernel are those of the real one."""
        expected = pytree.tree_leaves(overload(name)(*sample()))
        with FakeTensorMode() as mode:
            fake = pytree.tree_map_only(Tensor, mode.from_tensor, sample())
            traced = pytree.tree_leaves(overload(name)(*fake))
        on_meta = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), sample())
        for results in (traced, pytree.tree_leaves(overload(name)(*on_meta))):
            assert len(results) == len(expected)
            for result, real in zip(results, expected, strict=True):
                if isinstance(real, Tensor):
                    assert result.shape == real.shape
                    assert result.dtype == real.dtype
                    assert result.stride() == real.stride()

    @pytest.mark.parametrize("inference", [False, True])
    def test_autocast_changes_nothing(
        self, name: str, sample: Callable[[], tuple], inference: bool
    ) -> None:
        plain, cast = sample(), sample()
        with torch.inference_mode(inference):
            expected = overload(name)(*plain)
            with torch.autocast("cpu", dtype=BF16):
                results = overload(name)(*cast)
        if name in MUTATING:
            expected, results = plain[0].triu(), cast[0].triu()
        for a, b in zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)

    def test_face_and_operator_agree(self, name: str, sample: Callable[[], tuple]) -> None:
        face, direct = sample(), sample()
        returned = getattr(ops, name)(*face)
        results = overload(name)(*direct)
        if name in MUTATING:
            assert returned is face[0]
            returned, results = face[0].triu(), direct[0].triu()
        for a, b in zip(pytree.tree_leaves(returned), pytree.tree_leaves(results), strict=True):
            assert torch.equal(a, b)


ALL_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_accumulation(self, dynamic: bool) -> None:
        def step(acc: Tensor, x: Tensor, jacobian: Tensor, p: Tensor) -> Tensor:
            ops.input_covariance_(acc, x, 0.5)
            ops.output_hessian_(acc, jacobian, p)
            ops.conv_input_covariance_(acc, x.unsqueeze(1), [4], [1], [1], [1])
            ops.mirror_(acc)
            return acc @ x[0]

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (5, 8, 11):
            arguments = f64(n, 4), f64(n, 3, 4, seed=1), softmax((n, 3))
            eager, traced = torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)
            expected = step(eager, *arguments)
            assert_near(compiled(traced, *arguments), expected)
            assert_near(traced, eager)
            assert not traced.requires_grad

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_products_and_their_gradients(self, dynamic: bool) -> None:
        def loss(A: Tensor, B: Tensor, X: Tensor, S: Tensor) -> Tensor:
            Y = ops.kron_matmul(A, B, X)
            Z = ops.kron_eigen_matmul(A, S, B, Y)
            both = ops.grouped_kron_matmul([A, A.t()], [B, B], [X, X.mT.mT])
            rotated = ops.grouped_kron_eigen_matmul([A, A], [S, S], [B, B], [Y, X])
            coordinates = ops.from_eigenbasis(A, B, ops.to_eigenbasis(A, B, X))
            return sum(t.square().sum() for t in (Y, Z, *both, *rotated, coordinates))

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for k in (2, 5):
            inputs = [f64(3, 3), f64(4, 4, seed=1), f64(k, 3, 4, seed=2), f64(3, 4, seed=3)]
            eager = [t.clone().requires_grad_() for t in inputs]
            traced = [t.clone().requires_grad_() for t in inputs]
            expected, result = loss(*eager), compiled(*traced)
            assert_near(result, expected)
            expected.backward()
            result.backward()
            for a, b in zip(traced, eager, strict=True):
                assert_near(a.grad, b.grad)

    def test_layer_hessian(self) -> None:
        def quadratic(x: Tensor, s: Tensor, V: Tensor) -> Tensor:
            return (V * ops.layer_hessian_matmul(x, s, V, 0.25)).sum()

        compiled = torch.compile(quadratic, fullgraph=True, backend="aot_eager")
        x, s, V = f64(6, 4), f64(6, 2, 3, seed=1), f64(3, 4, seed=2)
        eager, traced = V.clone().requires_grad_(), V.clone().requires_grad_()
        quadratic(x, s, eager).backward()
        compiled(x, s, traced).backward()
        assert_near(traced.grad, eager.grad)


# The accumulating operators in one form: order of acc, shape of the input, call.
ACCUMULATING: dict[str, tuple[int, tuple[int, ...], Callable[[Tensor, Tensor], Any]]] = {
    "input_covariance_": (4, (6, 4), ops.input_covariance_),
    "conv_input_covariance_": (
        4,
        (2, 1, 5, 5),
        lambda acc, x: ops.conv_input_covariance_(acc, x, [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    "output_hessian_": (4, (6, 3, 4), ops.output_hessian_),
    "eigen_correction_": (
        4,
        (6, 4),
        lambda acc, x: ops.eigen_correction_(acc, f32(6, 1, 4), x, f32(4, 4), f32(4, 4)),
    ),
    "eigen_correction_ positions": (
        4,
        (6, 2, 4, 5),
        lambda acc, g: ops.eigen_correction_(acc, g, f32(6, 4, 5), f32(4, 4), f32(4, 4)),
    ),
    "conv_eigen_correction_": (
        4,
        (2, 1, 5, 5),
        lambda acc, x: ops.conv_eigen_correction_(
            acc, f32(2, 3, 4, 4, 4), x, f32(4, 4), f32(4, 4), *WINDOW
        ),
    ),
    "output_hessian_ weighted": (
        4,
        (6, 3, 4),
        lambda acc, j: ops.output_hessian_(acc, j, softmax((6, 3), F32)),
    ),
    "output_hessian_ positions": (
        4,
        (6, 3, 4, 2),
        lambda acc, j: ops.output_hessian_(acc, j, softmax((6, 3), F32)),
    ),
}


@pytest.mark.parametrize("name", ACCUMULATING)
class TestAccumulatorsAndAutograd:
    """Statistics are data: they join no graph, keep no batch alive, and never take gradients."""

    def test_input_that_requires_grad_is_data(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        x = f32(*shape)
        acc, expected = torch.zeros(order, order), torch.zeros(order, order)
        call(acc, x.clone().requires_grad_() * 1)
        call(expected, x)
        assert not acc.requires_grad
        assert acc.grad_fn is None
        assert torch.equal(acc.triu(), expected.triu())

    def test_accumulator_that_requires_grad_is_refused(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        leaf = torch.zeros(order, order, requires_grad=True)
        for acc in (leaf, leaf * 1):
            with pytest.raises(ValueError, match=r"acc must not require grad.*acc\.detach\(\)"):
                call(acc, f32(*shape))
            assert not acc.any()
            with torch.no_grad():
                call(acc, f32(*shape))
            assert acc.any()
            leaf.detach().zero_()

    def test_change_is_seen_by_autograd(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        acc = torch.zeros(order, order)
        w = torch.ones(order, order, requires_grad=True)
        product = w * acc
        call(acc, f32(*shape))
        assert acc._version > 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_inference_mode(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        expected = torch.zeros(order, order)
        call(expected, f32(*shape))
        outside = torch.zeros(order, order)
        with torch.inference_mode():
            inside = torch.zeros(order, order)
            call(inside, f32(*shape))
            call(outside, f32(*shape))
        assert torch.equal(inside.triu(), expected.triu())
        assert torch.equal(outside.triu(), expected.triu())
        # As for torch's own operators: an inference tensor stays as it is outside of the mode.
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            call(inside, f32(*shape))
        assert torch.equal(inside.triu(), expected.triu())

    def test_accumulator_must_not_overlap_itself(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        with pytest.raises(ValueError, match="acc must have its own memory for every element"):
            call(torch.zeros(1, order).expand(order, order), f32(*shape))

    def test_accumulator_must_not_share_memory_with_the_input(self, name: str) -> None:
        order, shape, call = ACCUMULATING[name]
        memory = torch.zeros(max(order * order, torch.Size(shape).numel()) + 1)
        x = memory[1:][: torch.Size(shape).numel()].view(shape)
        with pytest.raises(ValueError, match="acc must not share memory with"):
            call(memory[: order * order].view(order, order), x)


def test_packed_inputs_on_a_gpu_are_of_a_size_that_only_the_device_knows() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, s, V = (torch.empty(shape, device="cuda") for shape in ((6, 4), (6, 2, 3), (3, 4)))
        packed = ops.pack_layer_inputs(x, 3)
        assert isinstance(packed.shape[0], torch.SymInt)
        assert (packed.dim(), packed.dtype, packed.device) == (1, torch.int32, x.device)
        assert ops.layer_hessian_matmul(x, s, V, 1.0, packed).shape == V.shape


def test_mirror_and_autograd() -> None:
    acc = torch.ones(3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="mirror_: acc must not require grad"):
        ops.mirror_(acc)
    plain = torch.ones(3, 3)
    ops.mirror_(plain)
    assert plain._version > 0
    with pytest.raises(ValueError, match="acc must have its own memory for every element"):
        ops.mirror_(torch.ones(3).expand(3, 3))


def test_layouts_do_what_they_say() -> None:
    """The helpers of this directory: same values, other memory, and watched surroundings."""
    t = random((3, 4, 5, 6))
    for layout in ("contiguous", "column_major", "swapped", "channels_last", "window", "strided"):
        assert torch.equal(arrange(t, layout), t)
        assert arrange(t, layout).is_contiguous() == (layout == "contiguous")
    assert arrange(t, "expanded").stride(0) == 0
    for layout in ("window", "strided"):
        acc = Accumulator((3, 3), F64, layout)
        acc._frame[0, 0] += 1
        with pytest.raises(AssertionError):
            acc.check(torch.zeros(3, 3))
    acc = Accumulator((3, 3), F64)
    acc.tensor[0, 1] += 1e-9
    with pytest.raises(AssertionError):
        acc.check(torch.zeros(3, 3))
