"""Behind which operations a layer's block is the Hessian, and where it says that it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import hessians
from dense import gauss_newton, loss_hessian, relative_error
from networks import CE, Between, Twice, classes, randn, sample_loss, seeded
from torch import Tensor, nn


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
        try:
            hessian = loss_hessian(model, data, sample_loss, "a")
        except RuntimeError as error:
            # The reference's: up to torch 2.10 grid_sample has no second derivative.
            if "derivative for aten::grid_sampler" not in str(error):
                raise
            pytest.skip("this torch has no second derivative of grid_sample")
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


def test_twice_with_tanh_in_a_loop_matches_the_gauss_newton_block() -> None:
    model = seeded(Twice(torch.tanh))
    data = [(randn(5, 4), classes(5, c=3))]
    H = hessians(model, data, CE)["shared"]
    assert "followed by Tanh" in H.inexact_reason
    expected = gauss_newton(model, data, sample_loss, "shared")
    assert relative_error(H.to_dense(), expected) <= 1e-10
