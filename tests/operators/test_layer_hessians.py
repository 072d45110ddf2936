"""Exact layer-wise Hessians against dense ones made by torch's own derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from dense import gauss_newton, loss_hessian, relative_error
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import (
    CASES,
    Between,
    Case,
    TiedDecoder,
    Twice,
    classes,
    generator,
    randn,
    seeded,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hesskern as hk

# torch's remark on "same" padding of even kernels, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

CE = nn.CrossEntropyLoss()


def sample_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


def hessians(*args: Any, **kwargs: Any) -> hk.LayerHessians:
    """``layer_hessians`` where its warnings are not what is looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the Gauss-Newton block|left out", UserWarning)
        return hk.layer_hessians(*args, **kwargs)


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


class _Square(torch.autograd.Function):
    """Named like a linear operation of torch's own, which it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Relu(_Square):
    pass


def _assign(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:].tanh()
    out[:, 3:] = h[:, :3]
    return out


def _in_place_on_a_view(h: Tensor) -> Tensor:
    h[:, :2].tanh_()
    return h


def _multiply_in_place(h: Tensor) -> Tensor:
    h = h.clone()
    return h.mul_(h.detach().clone().requires_grad_(False) * 0 + h)


CONSTANT = randn(6, seed=9)
SQUARE = randn(6, 6, seed=9)

# What stands between two Linear layers, on [N, 6]: the first layer's block is then not the Hessian.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "glu": lambda h: F.glu(h).repeat(1, 2),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "exp": torch.exp,
    "log": lambda h: (h.square() + 1).log(),
    "sin": torch.sin,
    "square": torch.square,
    "power": lambda h: h**3,
    "sqrt": lambda h: (h.abs() + 1).sqrt(),
    "reciprocal": lambda h: 1 / (h.abs() + 1),
    "x sigmoid(x)": lambda h: h * h.sigmoid(),
    "x relu(x)": lambda h: h * h.relu(),
    "x * x": lambda h: h * h,
    "divided by its norm": lambda h: h / h.norm(dim=1, keepdim=True),
    "divided by its sum": lambda h: h / (h.abs().sum(1, keepdim=True) + 1),
    "constant divided by it": lambda h: CONSTANT / (h.abs() + 1),
    "F.normalize": F.normalize,
    "layer_norm": lambda h: F.layer_norm(h, (6,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "rms_norm": lambda h: F.rms_norm(h, (6,)),
    "instance_norm": lambda h: F.instance_norm(h[:, None])[:, 0],
    "local_response_norm": lambda h: F.local_response_norm(h[:, :, None], 2)[:, :, 0],
    "standard deviation": lambda h: h + h.std(1, keepdim=True),
    "variance": lambda h: h + h.var(1, keepdim=True),
    "logsumexp": lambda h: h + h.logsumexp(1, keepdim=True),
    "einsum of two branches": lambda h: torch.einsum("ni,nj->nij", h, h.relu()).sum(2),
    "bmm of two branches": lambda h: (h[:, :, None] @ h[:, None, :]).sum(2),
    "convolution with itself": lambda h: F.conv1d(
        h[None], h[:, None, :3], padding=1, groups=len(h)
    )[0],
    "product over units": lambda h: h + h[:, :2].prod(1, keepdim=True),
    "cumprod": lambda h: h.cumprod(1),
    "gate": lambda h: torch.cat([h[:, :3] * h[:, 3:].sigmoid(), h[:, 3:]], 1),
    "where on smooth branch": lambda h: torch.where(h > 0, h, h.exp() - 1),
    "assignment to slices": _assign,
    "in place on a view": _in_place_on_a_view,
    "multiplied by itself in place": _multiply_in_place,
    "autograd function": _Square.apply,
    "autograd function named Relu": Relu.apply,
    "prelu with its own slope": lambda h: F.prelu(h.reshape(1, -1), h.flatten()).reshape(h.shape),
    "lerp by itself": lambda h: torch.lerp(h, 2 * h, h),
    "addcmul of itself": lambda h: torch.addcmul(h, h, h),
    "grid_sample at it": lambda h: (
        F.grid_sample(SQUARE[None, None].expand(len(h), 1, 6, 6), h.reshape(-1, 1, 3, 2).tanh())
        .reshape(-1, 3)
        .repeat(1, 2)
    ),
    "norm": lambda h: h + torch.linalg.vector_norm(h, dim=1, keepdim=True),
    "cosine_similarity": lambda h: h + F.cosine_similarity(h, CONSTANT[None], dim=1)[:, None],
    "pairwise_distance": lambda h: h + F.pairwise_distance(h, CONSTANT)[:, None],
    "scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(
        h.reshape(-1, 3, 2), h.reshape(-1, 3, 2), h.reshape(-1, 3, 2)
    ).flatten(1),
}

# The first layer's block is the Hessian.
PIECEWISE_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "relu_": lambda h: F.relu_(h),
    "relu_ on a reshaped clone": lambda h: F.relu(h.clone().reshape(-1, 3, 2)).flatten(1),
    "relu6": F.relu6,
    "leaky_relu": lambda h: F.leaky_relu(h, 0.1),
    "leaky_relu_": lambda h: F.leaky_relu_(h, 0.1),
    "rrelu in eval": lambda h: F.rrelu(h, training=False),
    "prelu": lambda h: F.prelu(h, CONSTANT),
    "hardtanh": F.hardtanh,
    "hardtanh_": lambda h: F.hardtanh_(h),
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda h: F.threshold(h, 0.1, 0.3),
    "abs": torch.abs,
    "neg": torch.neg,
    "clamp": lambda h: h.clamp(-0.4, 0.7),
    "clamp by tensors": lambda h: h.clamp(-CONSTANT.abs(), CONSTANT.abs()),
    "clip at zero": lambda h: h.clamp(min=0),
    "maximum": lambda h: torch.maximum(h, h.flip(1)),
    "minimum with constants": lambda h: torch.minimum(h, CONSTANT),
    "max over units": lambda h: h - h.max(1, keepdim=True).values,
    "amax": lambda h: h - h.amax(1, keepdim=True),
    "maxout": lambda h: h.reshape(-1, 3, 2).amax(2).repeat(1, 2),
    "min over units": lambda h: h + h.min(1, keepdim=True)[0],
    "median": lambda h: h - h.median(1, keepdim=True).values,
    "sort": lambda h: h.sort(1).values,
    "topk": lambda h: h.topk(3, 1).values.repeat(1, 2),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "masked_fill": lambda h: h.masked_fill(h < 0, 0.5),
    "times a mask": lambda h: h * (h > 0),
    "add and subtract": lambda h: 1 + h - CONSTANT + h.flip(1),
    "times constants": lambda h: 0.5 * h * CONSTANT,
    "divided by constants": lambda h: h / (CONSTANT.abs() + 1) / 2,
    "lerp": lambda h: torch.lerp(CONSTANT, h, 0.3),
    "addcmul": lambda h: torch.addcmul(CONSTANT, h, CONSTANT),
    "matmul": lambda h: h @ SQUARE,
    "linear": lambda h: F.linear(h, SQUARE, CONSTANT),
    "einsum with constants": lambda h: torch.einsum("ni,ij->nj", h, SQUARE),
    "bmm with constants": lambda h: (SQUARE.expand(len(h), 6, 6) @ h[:, :, None])[:, :, 0],
    "cumsum": lambda h: h.cumsum(1),
    "mean": lambda h: h - h.mean(1, keepdim=True),
    "sum": lambda h: h + h.sum(1, keepdim=True),
    "gather": lambda h: h.gather(1, torch.arange(6).flip(0).expand(len(h), 6)),
    "index": lambda h: h[:, [2, 0, 1, 5, 4, 4]],
    "index_select": lambda h: h.index_select(1, torch.tensor([0, 0, 1, 2, 5, 3])),
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 2]), h[:, :2]),
    "scatter_add": lambda h: h.scatter_add(1, torch.ones(len(h), 2, dtype=torch.long), h[:, :2]),
    "cat": lambda h: torch.cat([h[:, 4:], h[:, :4]], 1),
    "stack": lambda h: torch.stack([h[:, :3], h[:, 3:]], 2).flatten(1),
    "split": lambda h: torch.cat(h.split([2, 4], 1)[::-1], 1),
    "chunk": lambda h: torch.cat(h.chunk(3, 1)[::-1], 1),
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1),
    "roll and flip": lambda h: h.roll(1, 1).flip(1),
    "repeat": lambda h: h[:, :2].repeat(1, 3),
    "repeat_interleave": lambda h: h[:, :3].repeat_interleave(2, 1),
    "expand": lambda h: h[:, :1].expand(-1, 6),
    "rearranged": lambda h: h.unflatten(1, (2, 3)).permute(0, 2, 1).reshape(len(h), 6),
    "transposed and squeezed": lambda h: h.unsqueeze(1).transpose(1, 2).squeeze(2).contiguous(),
    "narrow": lambda h: torch.cat([h.narrow(1, 0, 3), h.select(1, 2)[:, None].expand(-1, 3)], 1),
    "padded": lambda h: F.pad(h[:, :4], (1, 1)),
    "reflection": lambda h: F.pad(h[:, None, :4], (1, 1), mode="reflect")[:, 0],
    "replication": lambda h: F.pad(h[:, None, :4], (1, 1), mode="replicate")[:, 0],
    "unfolded": lambda h: h.unfold(1, 3, 1)[:, :2].flatten(1),
    "im2col": lambda h: F.unfold(h.reshape(-1, 1, 2, 3), (2, 1)).flatten(1),
    "fold": lambda h: (
        F.fold(h.reshape(-1, 2, 3), (1, 4), (1, 2)).repeat(1, 1, 1, 2).flatten(1)[:, :6]
    ),
    "max_pool1d": lambda h: F.max_pool1d(h[:, None], 2, 1, padding=1)[:, 0, :6],
    "avg_pool1d": lambda h: F.avg_pool1d(h[:, None], 3, 1, padding=1)[:, 0],
    "max_pool2d": lambda h: F.max_pool2d(h.reshape(-1, 1, 2, 3), 2, 1).flatten(1).repeat(1, 3),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h.reshape(-1, 1, 2, 3), (2, 3)).flatten(
        1
    ),
    "adaptive_avg_pool2d": lambda h: (
        F.adaptive_avg_pool2d(h.reshape(-1, 1, 2, 3), (1, 2)).flatten(1).repeat(1, 3)
    ),
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(h[:, None], 2)[:, 0].repeat(1, 3),
    "nearest": lambda h: F.interpolate(h[:, None, :3], scale_factor=2)[:, 0],
    "linear upsampling": lambda h: F.interpolate(h[:, None, :3], size=6, mode="linear")[:, 0],
    "bilinear upsampling": lambda h: F.interpolate(
        h.reshape(-1, 1, 2, 3), size=(1, 6), mode="bilinear"
    ).flatten(1),
    "pixel_shuffle": lambda h: (
        F.pixel_shuffle(h[:, :4].reshape(-1, 4, 1, 1), 2).flatten(1).repeat(1, 2)[:, :6]
    ),
    "channel_shuffle": lambda h: F.channel_shuffle(h[:, :, None, None], 2).flatten(1),
    "conv1d": lambda h: F.conv1d(h[:, None], CONSTANT[None, None, :3], padding=1)[:, 0],
    "conv_transpose1d": lambda h: F.conv_transpose1d(h[:, None, :4], CONSTANT[None, None, :3])[
        :, 0
    ],
    "batch_norm in eval": lambda h: F.batch_norm(
        h, CONSTANT, CONSTANT.abs() + 1, CONSTANT, CONSTANT
    ),
    "dropout in eval": lambda h: F.dropout(h, training=False),
    "to and back": lambda h: h.to(torch.float32).to(torch.float64) * 0 + h,
    "copied into a buffer": lambda h: torch.empty_like(h).copy_(h),
    "triangle": lambda h: (h[:, None, :] * SQUARE).tril().sum(2),
    "tensordot": lambda h: torch.tensordot(h, SQUARE, 1),
    "diagonal": lambda h: torch.diag_embed(h).diagonal(dim1=1, dim2=2),
    "grid_sample of it": lambda h: (
        F.grid_sample(
            h.reshape(-1, 1, 2, 3),
            torch.tensor([[-0.5, 0.2], [0.1, 0.3]]).double().expand(len(h), 1, 2, 2),
            align_corners=True,
        )
        .flatten(1)
        .repeat(1, 3)
    ),
    "one branch gates with constants of another input": lambda h: h * CONSTANT.sigmoid(),
}


def _without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.sigmoid()


# Linear, but the graph hides it (an in-place operation on a view), or linear in the graph alone:
# a value was taken out of it. The answer is the careful one.
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "detached gate": lambda h: h * h.detach().sigmoid(),
    "gate by .data": lambda h: h * h.data,
    "gate under no_grad": lambda h: h * _without_gradients(h),
    "scaled by a number": lambda h: h * h.square().mean().item(),
    "scaled by a float": lambda h: h / float(h.detach().abs().sum()),
    "by numpy": lambda h: h * torch.as_tensor(h.detach().numpy().copy()).sigmoid(),
    "circular padding": lambda h: F.pad(h[:, None, :4], (1, 1), mode="circular")[:, 0],
    "relu_ on a view": lambda h: F.relu_(h.reshape(-1, 3, 2)).flatten(1),
}

# torch has no second derivative of these; the reference is the same function, spelt out.
SPELT_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": lambda h: (h / 6 + 0.5).clamp(0, 1),
}


def _check_against_both(
    op: Callable[[Tensor], Tensor], spelt_out: Callable[[Tensor], Tensor] | None = None
) -> tuple[bool, float, float, float]:
    """(is_exact, error to the Gauss-Newton block, error to the Hessian, gap between these two)."""
    model = seeded(Between(op))
    data = [(randn(4, 4, seed=3), classes(4, c=3))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Default grid_sample", UserWarning)
        H = hessians(model, data, CE, layers=["a", "b"])["a"]
        model.op = spelt_out or op
        block = gauss_newton(model, data, sample_loss, "a")
        hessian = loss_hessian(model, data, sample_loss, "a")
    dense = H.to_dense()
    return (
        H.is_exact,
        relative_error(dense, block),
        relative_error(dense, hessian),
        relative_error(block, hessian),
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_not_exact_behind_a_smooth_operation(name: str) -> None:
    is_exact, to_block, _, gap = _check_against_both(SMOOTH[name])
    assert gap > 1e-6, "this operation does not test what it should"
    assert not is_exact
    assert to_block <= 1e-10


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_exact_behind_a_piecewise_linear_operation(name: str) -> None:
    is_exact, to_block, to_hessian, _ = _check_against_both(
        PIECEWISE_LINEAR[name], SPELT_OUT.get(name)
    )
    # torch's kernel of hardsigmoid multiplies by 1/6 in float32.
    bound = 1e-6 if name in SPELT_OUT else 1e-10
    assert to_block <= bound
    assert to_hessian <= bound
    assert is_exact


@pytest.mark.parametrize("name", HIDDEN)
def test_careful_where_the_graph_hides_the_operation(name: str) -> None:
    is_exact, _, to_hessian, _ = _check_against_both(HIDDEN[name])
    assert to_hessian <= 1e-10
    assert not is_exact


def _multihead() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.out((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))

    return seeded(Net())


def test_multihead_attention_after_a_layer() -> None:
    model = _multihead()
    data = [(randn(3, 4, 3), classes(3, c=3))]
    found = hessians(model, data, CE)
    # out_proj is never called as a module, and in_proj is none: both are found by their weights.
    projections = {"attention.in_proj", "attention.out_proj"}
    assert set(found) == {"embed", "out"} | projections
    assert {name for name in found if found[name].is_exact} == {"out", "attention.out_proj"}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for layer in found:
            expected = gauss_newton(model, data, sample_loss, layer)
            assert relative_error(found[layer].to_dense(), expected) <= 1e-10


def test_transformer_layer_runs_its_layers_although_eval_mode_could_fuse_them() -> None:
    model = seeded(
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        )
    )
    data = [(randn(3, 3, 4), classes(3, c=3))]
    found = hessians(model, data, CE)
    attention = {"0.self_attn.in_proj", "0.self_attn.out_proj"}
    assert set(found) == {"0.linear1", "0.linear2", "2"} | attention
    for layer, H in found.items():
        assert H.is_exact == (layer == "2")
        expected = gauss_newton(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


def test_exactness_depends_on_what_a_gate_depends_on() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.value = nn.Linear(4, 3)
            self.gate = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            return self.value(h) * F.relu(self.gate(h))

    model = seeded(Gated())
    data = [(randn(4, 4), classes(4, c=3))]
    found = hessians(model, data, CE)
    assert {name: H.is_exact for name, H in found.items()} == {
        "stem": False,
        "value": True,
        "gate": True,
    }
    for layer, H in found.items():
        dense = loss_hessian if H.is_exact else gauss_newton
        assert relative_error(H.to_dense(), dense(model, data, sample_loss, layer)) <= 1e-10


def test_weight_reused_transposed_is_refused() -> None:
    model = seeded(TiedDecoder())
    data = [(randn(4, 3), classes(4, c=3))]
    found = hessians(model, data, CE)
    assert set(found) == {"out"}
    assert "acts through Mm, which is no linear call by it" in found.skipped["encode"]
    with pytest.raises(ValueError, match="layer 'encode' has a weight that acts through Mm"):
        hk.layer_hessians(model, data, CE, layers=["encode"])
    with pytest.raises(KeyError, match="no Hessian of layer 'encode': it has a weight"):
        found["encode"]


def test_a_tied_weight_asked_for_by_one_of_its_names_has_the_whole_block() -> None:
    case = CASES["tied"]
    model, data = case.model(), case.data()
    H = hessians(model, data, CE, layers=["second"])["second"]
    assert H.inexact_reason == "is used 2 times in one forward pass, one after the other"
    expected = gauss_newton(model, data, sample_loss, "first")
    assert relative_error(H.to_dense(), expected) <= 1e-10


def test_weight_tied_to_an_embedding_is_left_out() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.hidden = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(self.embed(tokens)))).transpose(1, 2)

    model = seeded(Language())
    tokens = classes(3, 4, c=5)
    data = [(tokens, tokens.roll(-1, 1))]
    found = hessians(model, data, CE)
    assert found["hidden"].is_exact
    assert "acts through Embedding" in found.skipped["head"]
    expected = loss_hessian(model, data, sample_loss, "hidden")
    assert relative_error(found["hidden"].to_dense(), expected) <= 1e-10


def test_parametrized_weights_are_not_mistaken_for_shared_ones() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(
        weight_norm(nn.Linear(4, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 5)), nn.ReLU()
    )
    model.append(nn.Linear(5, 3))
    seeded(model)
    data = [(randn(4, 4), classes(4, c=3))]
    found = hk.layer_hessians(model, data, CE)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    plain.double()
    for i in (0, 2, 4):
        plain[i].weight.data.copy_(model[i].weight.detach())
        plain[i].bias.data.copy_(model[i].bias.detach())
    assert set(found) == {"0", "2", "4"}
    for layer, H in found.items():
        assert H.is_exact
        expected = loss_hessian(plain, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointed_part(inplace: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)
            self.c = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(
                lambda t: F.relu(self.b(F.relu(self.a(t), inplace))), x, use_reentrant=False
            )
            return self.c(h)

    model = seeded(Checkpointed())
    data = [(randn(4, 4), classes(4, c=3))]
    found = hessians(model, data, CE)
    factors = hk.kronecker_factors(model, data, CE)
    plain = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c)
    expected_factors = hk.kronecker_factors(plain, data, CE)
    for layer, name in zip("abc", "024", strict=True):
        expected = loss_hessian(plain, data, sample_loss, name)
        assert relative_error(found[layer].to_dense(), expected) <= 1e-10
        assert (
            relative_error(factors[layer].output_hessian, expected_factors[name].output_hessian)
            <= 1e-12
        )


def test_layer_input_overwritten_in_place_after_it_was_read() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.in_place = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            first = self.a(h)
            h = h.add_(1.0).relu_() if self.in_place else (h + 1.0).relu()
            return first + self.b(h)

    model = seeded(Overwrites())
    data = [(randn(4, 4), classes(4, c=3)), (randn(2, 4, seed=1), classes(2, c=3))]
    found = hk.layer_hessians(model, data, CE)
    factors = hk.kronecker_factors(model, data, CE)
    # With trainable weights torch itself refuses the in-place form.
    model.in_place = False
    for layer, H in found.items():
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10
    inputs = torch.cat([model.stem(x) for x, _ in data]).detach()
    expected = inputs.T @ inputs / 6
    assert relative_error(factors["a"].input_covariance, expected) <= 1e-12


def test_model_that_overwrites_its_own_input_is_refused_not_run_twice() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return z + x.mul_(2.0)[:, :3]

    model = seeded(Overwrites())
    with pytest.raises(ValueError, match=r"model must not overwrite its own inputs"):
        hk.layer_hessians(model, [(randn(4, 4), classes(4, c=3))], CE)


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


class _Routed(nn.Module):
    """One of two experts per batch, by the sign of the first entry; ``unused`` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.positive = nn.Linear(4, 3)
        self.negative = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)
        self.dead = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        self.dead(h)
        return self.positive(h) if x[0, 0] > 0 else self.negative(h)


def routed_data() -> list[tuple[Tensor, Tensor]]:
    """Batches for ``_Routed`` through negative, positive, negative."""
    data = []
    for i, sign in enumerate((-1.0, 1.0, -1.0)):
        x = randn(3, 4, seed=i)
        x[0, 0] = sign * x[0, 0].abs()
        data.append((x, classes(3, c=3, seed=i)))
    return data


def test_layers_reached_in_some_batches_or_never() -> None:
    model, data = seeded(_Routed()), routed_data()
    with pytest.warns(UserWarning, match="left out: 'unused' was never reached .* covers"):
        found = hk.layer_hessians(model, data, CE)
    assert found.skipped == {"unused": "was never reached in the forward pass"}
    assert set(found) == {"stem", "positive", "negative", "dead"}
    for layer, H in found.items():
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10
        assert H.num_samples == 9
    assert found["dead"].trace() == 0.0
    assert torch.equal(found["dead"] @ randn(12), torch.zeros(12).double())
    # Asked for by name, a layer that only a later batch reaches is right, one never reached is not.
    assert set(hk.layer_hessians(model, data, CE, layers=["positive"])) == {"positive"}
    with pytest.raises(ValueError, match="'unused' was never reached"):
        hk.layer_hessians(model, data, CE, layers=["stem", "unused"])


def test_frozen_layers_count_and_stay_frozen() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    expected = hk.layer_hessians(model, data, CE)
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    found = hk.layer_hessians(model, data, CE)
    for layer in expected:
        assert torch.equal(found[layer].to_dense(), expected[layer].to_dense())
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True, True]


def test_layer_under_no_grad_inside_the_model() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = F.relu(self.backbone(x))
            return self.head(h)

    model = seeded(Frozen())
    data = [(randn(4, 4), classes(4, c=3))]
    with pytest.warns(UserWarning, match="left out: 'backbone' runs under torch.no_grad"):
        assert set(hk.layer_hessians(model, data, CE)) == {"head"}
    with pytest.raises(ValueError, match=r"layers: 'backbone' runs under torch.no_grad"):
        hk.layer_hessians(model, data, CE, layers=["backbone"])


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


# Recomputing above the memory budget


@pytest.mark.parametrize("name", ["residual", "conv groups", "sequence", "pooling", "twice"])
@pytest.mark.parametrize("budget", [0, 700, 3000])
def test_recomputed_products_equal_cached_ones(name: str, budget: int) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    cached = hessians(model, data, CE, bias="joint")
    rerun = hessians(model, data, CE, bias="joint", memory_budget=budget)
    assert all(H.cached for H in cached.values())
    if budget == 0:
        assert not any(H.cached for H in rerun.values())
    for layer, H in cached.items():
        other = rerun[layer]
        assert other.pruning_error == 0.0
        assert relative_error(other.to_dense(), H.to_dense()) <= 1e-12
        block = randn(H.shape[0], 2, seed=1)
        assert relative_error(other @ block, H @ block) <= 1e-12
        assert relative_error(other.diagonal(), H.diagonal()) <= 1e-12
        assert other.trace() == pytest.approx(H.trace(), rel=1e-12)


def test_memory_budget_evicts_the_largest_layers_first() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    cached = hk.layer_hessians(model, data, CE)
    # Inputs and two root rows of every sample, in float64.
    needed = {name: 7 * 8 * (H.layer_shape[1] + 2 * H.layer_shape[0]) for name, H in cached.items()}
    budget = sum(needed.values()) - 1
    found = hk.layer_hessians(model, data, CE, memory_budget=budget)
    largest = max(needed, key=lambda name: needed[name])
    assert {name for name, H in found.items() if not H.cached} == {largest}


@pytest.mark.parametrize("name", ["residual", "conv groups", "sequence", "pooling"])
@pytest.mark.parametrize("budget", [0, 500, 2500])
def test_recomputing_with_pruning(name: str, budget: int) -> None:
    # A small budget also cuts a batch into pieces of few root rows, differently in both passes.
    case = CASES[name]
    model = case.model()
    data = heavy_tailed(case, seed=3)
    exact = hk.layer_hessians(model, data, CE)
    for tolerance in (1e-6, 0.05, 0.3):
        found = hk.layer_hessians(model, data, CE, tolerance=tolerance, memory_budget=budget)
        for layer, H in found.items():
            check_pruned(H, exact[layer].to_dense(), tolerance)
            block = randn(H.shape[0], 2, seed=1)
            assert relative_error(H @ block, H.to_dense() @ block) <= 1e-10
            assert H.trace() == pytest.approx(float(H.to_dense().trace()), rel=1e-10)


def test_recomputing_with_pruning_notices_another_order_of_the_data() -> None:
    case = CASES["relu"]
    model = case.model()
    x = randn(12, 4) * randn(12, 1, seed=1).exp()
    loader = DataLoader(
        TensorDataset(x, classes(12, c=3)), batch_size=4, shuffle=True, generator=generator(3)
    )
    found = hk.layer_hessians(model, loader, CE, tolerance=0.1, memory_budget=0)
    for H in found.values():
        with pytest.raises(RuntimeError, match="data must come in the same order"):
            _ = H @ torch.ones(H.shape[0]).double()
    # Without pruning the order does not matter.
    exact = hk.layer_hessians(model, [(x, loader.dataset.tensors[1])], CE)
    for layer, H in hk.layer_hessians(model, loader, CE, memory_budget=0).items():
        assert relative_error(H.to_dense(), exact[layer].to_dense()) <= 1e-12


def test_recomputing_with_pruning_notices_fewer_or_more_batches() -> None:
    case = CASES["relu"]
    model, data = case.model(), list(case.data())
    found = hk.layer_hessians(model, data, CE, tolerance=0.1, memory_budget=0)["0"]
    data.append(data[0])
    with pytest.raises(RuntimeError, match="same order"):
        found.to_dense()
    del data[1:]
    with pytest.raises(RuntimeError, match="same order"):
        found.trace()


def test_generator_with_too_small_a_budget() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    with pytest.raises(ValueError, match=r"memory_budget of 100 bytes is too small for layer '.'"):
        hk.layer_hessians(model, iter(data), CE, memory_budget=100)
    with pytest.raises(ValueError, match="memory_budget"):
        hk.layer_hessians(model, iter(data), CE, memory_budget=100, tolerance=0.5)


def test_cached_layers_outlive_the_model_recomputed_ones_notice_its_change() -> None:
    case = CASES["residual conv"]
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "step in place": lambda m: m.conv1.weight.detach().add_(0.1),
        "load_state_dict": lambda m: m.load_state_dict(dict(m.state_dict())),
        "new parameter": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
        "new data": lambda m: setattr(m.fc.weight, "data", m.fc.weight.detach() * 2),
        "running statistics": lambda m: m.train()(case.inputs(4)),
        "dtype": lambda m: m.float(),
    }
    for change in changes.values():
        model, data = case.model(), case.data()
        cached = hk.layer_hessians(model, data, CE)
        rerun = hk.layer_hessians(model, data, CE, memory_budget=0)
        before = {layer: H.to_dense() for layer, H in cached.items()}
        change(model)
        for layer, H in rerun.items():
            with pytest.raises(RuntimeError, match=f"the model changed .* layer '{layer}'"):
                _ = H @ torch.ones(H.shape[0]).double()
            assert torch.equal(cached[layer].to_dense(), before[layer])


class _Stops(nn.Module):
    """Raises in its n-th forward pass from now on."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.error = error
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        h = F.relu(self.a(x))
        if self.left < 0:
            raise self.error("stopped")
        return self.b(h)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("grad", [True, False])
def test_error_while_recomputing_leaves_the_model_and_gradient_mode_alone(
    error: type[BaseException], grad: bool
) -> None:
    model = seeded(_Stops(error)).train()
    data = CASES["relu"].data()
    found = hk.layer_hessians(model, data, CE, memory_budget=0)
    for method in (lambda H: H @ torch.ones(H.shape[0]).double(), lambda H: H.trace()):
        for H in found.values():
            model.left = 1
            with torch.set_grad_enabled(grad):
                with pytest.raises(error, match="stopped") as caught:
                    method(H)
                # Also while the traceback still holds the frames.
                assert caught.value is not None
                assert torch.is_grad_enabled() == grad
                assert model.training
                assert all(p.requires_grad for p in model.parameters())
                assert not model.a._forward_hooks
            model.left = 10**9


def test_error_between_recomputed_pieces_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The product itself fails after the first piece: the pass over the model must end as well.
    case = CASES["relu"]
    model = case.model().train()
    H = hk.layer_hessians(model, case.data(), CE, memory_budget=0)["0"]

    def fail(*args: Any) -> Tensor:
        raise MemoryError("full")

    monkeypatch.setattr(hk.ops, "layer_hessian_matmul", fail)
    with torch.no_grad():
        with pytest.raises(MemoryError) as caught:
            _ = H @ torch.ones(H.shape[0]).double()
        assert caught.traceback is not None
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model[0]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


# Pruning


def heavy_tailed(case: Case, seed: int) -> list[tuple[Any, Tensor]]:
    """Batches in which few samples carry most of the trace."""
    data = []
    for i, n in enumerate((6, 5)):
        scale = (2 * randn(n, seed=seed + 50 + i)).exp()
        x = case.inputs(n, seed + i)
        data.append((x * scale.reshape(-1, *[1] * (x.dim() - 1)), classes(n, c=3, seed=seed + i)))
    return data


def check_pruned(H: hk.LayerHessian, exact: Tensor, tolerance: float) -> None:
    """0 <= H - H_t, ‖H - H_t‖_2 <= pruning_error <= tolerance tr(H), all up to rounding."""
    trace = float(exact.trace())
    rounding = 1e-12 * trace
    left_out = torch.linalg.eigvalsh(exact - H.to_dense())
    assert float(left_out[0]) >= -rounding
    assert float(left_out[-1]) <= H.pruning_error + rounding
    assert H.pruning_error <= tolerance * trace + rounding
    # What is left out is known exactly, not only bounded.
    assert abs(H.trace() + H.pruned_trace - trace) <= rounding
    assert H.pruning_error <= H.pruned_trace + rounding


@given(
    name=st.sampled_from(["relu", "residual", "conv groups", "conv stride", "sequence", "conv1d"]),
    tolerance=st.one_of(st.floats(1e-9, 0.9), st.sampled_from([1e-4, 1e-2, 0.5])),
    tail=st.booleans(),
    seed=st.integers(0, 20),
    budget=st.sampled_from([2**30, 1500]),
)
def test_pruning_bound(name: str, tolerance: float, tail: bool, seed: int, budget: int) -> None:
    case = CASES[name]
    model = seeded(case.build(), seed)
    data = heavy_tailed(case, seed) if tail else case.data()
    exact = hk.layer_hessians(model, data, CE)
    assume(all(H.trace() > 0 for H in exact.values()))
    for layer, H in hk.layer_hessians(
        model, data, CE, tolerance=tolerance, memory_budget=budget
    ).items():
        check_pruned(H, exact[layer].to_dense(), tolerance)


@pytest.mark.parametrize("name", ["linear", "conv groups", "sequence", "conv stride"])
def test_pruning_drops_much_where_few_samples_carry_the_trace(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x = case.inputs(6)
    tail = torch.ones(6, dtype=torch.float64)
    tail[1:] = 1e-4
    data = [(x * tail.reshape(-1, *[1] * (x.dim() - 1)), classes(6, c=3))]
    exact = hk.layer_hessians(model, data, CE)
    first = case.exact[0]
    H = hk.layer_hessians(model, data, CE, tolerance=1e-3)[first]
    check_pruned(H, exact[first].to_dense(), 1e-3)
    assert H.pruning_error > 0
    # One sample of six is left, so the rank is at most its number of root rows.
    assert int(torch.linalg.matrix_rank(H.to_dense(), hermitian=True, rtol=1e-9)) <= 2


def test_spread_gradients_allow_more_than_the_trace_does() -> None:
    # Gradients of 30 classes in many directions: no eigenvalue is near the trace.
    model = seeded(nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 30)), 0)
    data = [(randn(200, 5, seed=1), classes(200, c=30, seed=2))]
    exact = hk.layer_hessians(model, data, CE)
    for name, H in hk.layer_hessians(model, data, CE, tolerance=0.02).items():
        check_pruned(H, exact[name].to_dense(), 0.02)
        assert H.pruned_trace > 0.04 * exact[name].trace()


def test_tolerance_zero_keeps_all() -> None:
    case = CASES["relu"]
    for H in hk.layer_hessians(case.model(), case.data(), CE, tolerance=0).values():
        assert H.pruning_error == 0.0


def test_pruning_everything_negligible_gives_zero_products() -> None:
    # All inputs of the first layer vanish: H is zero, and so is its bound.
    case = CASES["relu"]
    model = case.model()
    data = [(torch.zeros(3, 4).double(), classes(3, c=3))]
    H = hk.layer_hessians(model, data, CE, tolerance=0.5)["0"]
    assert H.pruning_error == 0.0
    assert H.trace() == 0.0
    assert torch.equal(H @ torch.ones(H.shape[0]).double(), torch.zeros(H.shape[0]).double())
    assert torch.equal(H.to_dense(), torch.zeros(H.shape).double())


def test_twice_with_tanh_in_a_loop_matches_the_gauss_newton_block() -> None:
    model = seeded(Twice(torch.tanh))
    data = [(randn(5, 4), classes(5, c=3))]
    H = hessians(model, data, CE)["shared"]
    assert "followed by Tanh" in H.inexact_reason
    expected = gauss_newton(model, data, sample_loss, "shared")
    assert relative_error(H.to_dense(), expected) <= 1e-10


def test_users_hooks_belong_to_the_model() -> None:
    model = seeded(Between(F.relu))
    model.a.register_forward_pre_hook(lambda _, args: (args[0] * 2 + 1,))
    model.a.register_forward_hook(lambda _, args, z: 3 * z, prepend=True)
    model.b.register_forward_hook(lambda _, args, z: z - 1)
    data = [(randn(4, 4), classes(4, c=3))]
    for layer, H in hk.layer_hessians(model, data, CE).items():
        assert H.is_exact
        expected = loss_hessian(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


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
