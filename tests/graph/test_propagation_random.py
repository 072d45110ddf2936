"""Random chains of operations: rows of gradients in blocks against autograd's.

Operands come in every shape that broadcasts, in every dtype that is promoted, as numbers, masks and
whole numbers; weights require gradients, as layers' do while a pass runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from hesskern.graph import nodes as graph
from hesskern.graph import propagation_rules
from hesskern.graph.propagation import Propagation

CASES = 500
ROWS = 3

ELEMENTWISE: list[Callable[[Tensor], Tensor]] = [
    torch.relu, torch.tanh, torch.sigmoid, torch.neg, F.gelu, F.silu, F.softplus, F.elu, F.mish,
    F.hardtanh, F.hardswish, F.leaky_relu, F.logsigmoid, F.hardsigmoid,
    lambda h: F.threshold(h, 0.1, 0.0),
]  # fmt: skip


class Chain:
    """A random function of samples [N, ...], operation by operation."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.n = self.choose.choice([1, 2, 2, 3, 4, 6])
        shape = self.choose.choice([(6,), (3, 4), (4, 6), (2, 5, 6), (4, 4, 3)])
        self.dtype = self.choose.choice([torch.float64] * 4 + [torch.float32])
        self.pool = [self.values((self.n, *shape)).requires_grad_() * 1.0]

    def values(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.torch, dtype=torch.float64)
        dtype = dtype or self.dtype
        if dtype == torch.bool:
            return drawn > 0
        if dtype.is_floating_point:
            return drawn.to(dtype)
        # Products of two such uint8 or int8 overflow.
        return (drawn.abs() * 40 + 1).clamp(max=120).to(dtype)

    def weight(self, *shape: int) -> Tensor:
        return self.values(shape).requires_grad_(self.choose.random() < 0.5)

    def below(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to this one."""
        kept = [1 if self.choose.random() < 0.4 else size for size in shape]
        return tuple(kept[self.choose.choice([0, 0, 0, 1, len(shape)]) :])

    def constant(self, shape: tuple[int, ...]) -> Any:
        """Something that an operation takes beside the gradient's way."""
        kind = self.choose.random()
        if kind < 0.15:
            return self.choose.choice([2, 0.5, True, -3, 1e-3])
        dtypes = [torch.float64, torch.float32, torch.bool, torch.uint8, torch.int8, torch.int64]
        dtype = self.choose.choice([self.dtype, *dtypes])
        if dtype == torch.float64 and self.dtype == torch.float32 and kind < 0.6:
            dtype = self.dtype
        return self.values(self.below(shape), dtype)

    def step(self, h: Tensor) -> Tensor:
        name = self.choose.choice([m for m in dir(self) if m.startswith("do_")])
        result: Tensor = getattr(self, name)(h)
        return result

    def do_elementwise(self, h: Tensor) -> Tensor:
        return self.choose.choice(ELEMENTWISE)(h)

    def do_multiply(self, h: Tensor) -> Tensor:
        other = self.constant(tuple(h.shape))
        return h * other if self.choose.random() < 0.5 else other * h

    def do_multiply_twice(self, h: Tensor) -> Tensor:
        return self.do_multiply(self.do_multiply(h))

    def do_divide(self, h: Tensor) -> Tensor:
        other = self.constant(tuple(h.shape))
        if isinstance(other, Tensor):
            other = other + 1 if other.dtype == torch.bool else other.abs() + 1
        return h / other

    def do_shift(self, h: Tensor) -> Tensor:
        other = self.constant(tuple(h.shape))
        if self.choose.random() < 0.3:
            return torch.add(h, other, alpha=2) if isinstance(other, Tensor) else h + other
        if isinstance(other, bool) or (isinstance(other, Tensor) and other.dtype == torch.bool):
            return h + other
        return h - other if self.choose.random() < 0.5 else other - h

    def do_mask(self, h: Tensor) -> Tensor:
        mask = h > 0.1 if self.choose.random() < 0.5 else h.detach()[:1] > 0
        return h * mask

    def do_combine(self, h: Tensor) -> Tensor:
        """Two tensors on the way, broadcast against each other where they differ."""
        others = [o for o in self.pool if broadcasts(o, h)]
        other = self.choose.choice([h, *others])
        return self.choose.choice([torch.add, torch.sub, torch.mul])(h, other)

    def do_gate(self, h: Tensor) -> Tensor:
        axes = list(range(1, h.dim()))
        return h * torch.sigmoid(h.mean(axes, keepdim=True)) if axes else h

    def do_larger(self, h: Tensor) -> Tensor:
        """An operand on the way that is expanded by a constant one."""
        if h.dim() < 2:
            return h
        kept = h.mean(-1, keepdim=True)
        return kept * self.values((h.shape[-1],)) if self.choose.random() < 0.5 else kept + h

    def do_reduce(self, h: Tensor) -> Tensor:
        if h.dim() < 2:
            return h
        axis = self.choose.randrange(1, h.dim()) - self.choose.choice([0, h.dim()])
        reduce = self.choose.choice([torch.mean, torch.sum])
        return reduce(h, axis, keepdim=self.choose.random() < 0.5)

    def do_transpose(self, h: Tensor) -> Tensor:
        if h.dim() < 3:
            return h.unsqueeze(-1) if self.choose.random() < 0.5 else h.unsqueeze(1)
        order = list(range(1, h.dim()))
        self.choose.shuffle(order)
        return h.permute(0, *order) if self.choose.random() < 0.5 else h.transpose(1, -1)

    def do_swap_samples(self, h: Tensor) -> Tensor:
        return torch.tanh(h.transpose(0, -1)).transpose(0, -1) if h.dim() > 1 else h

    def do_view(self, h: Tensor) -> Tensor:
        ways = [
            lambda: h.reshape(len(h), -1),
            lambda: h.reshape(-1, h.shape[-1]).tanh().reshape(h.shape),
            lambda: h.contiguous().view(h.shape).view(-1).view(h.shape),
            lambda: h.unsqueeze(1).squeeze(),
            lambda: h.clone(),
            lambda: h.expand(h.shape),
            lambda: h.reshape(-1, 1).expand(-1, 2).sum(1).reshape(h.shape),
            lambda: h.unsqueeze(-1).expand(*h.shape, 2).mean(-1),
        ]
        return self.choose.choice(ways)() if h.numel() else h

    def do_copy(self, h: Tensor) -> Tensor:
        return h.to(self.choose.choice([torch.float64, torch.float32]))

    def do_linear(self, h: Tensor) -> Tensor:
        if h.dim() < 2:
            return h
        m = self.choose.choice([1, 3, 6])
        bias = self.weight(m).to(h.dtype) if self.choose.random() < 0.5 else None
        return F.linear(h, self.weight(m, h.shape[-1]).to(h.dtype), bias)

    def do_merged_linear(self, h: Tensor) -> Tensor:
        if h.dim() < 3:
            return h
        flat = F.linear(h.flatten(0, -2), self.weight(h.shape[-1], h.shape[-1]).to(h.dtype))
        return (flat * self.constant(tuple(flat.shape))).reshape(h.shape)

    def do_batched(self, h: Tensor) -> Tensor:
        if h.dim() != 3:
            return h
        return torch.bmm(h, self.values((h.shape[0], h.shape[2], 3), h.dtype))

    def do_concatenate(self, h: Tensor) -> Tensor:
        if h.dim() < 2:
            return h
        parts = [h, torch.tanh(h)]
        if self.choose.random() < 0.3:
            parts.append(h.detach())
        if self.choose.random() < 0.3:
            parts[1] = parts[1].double()
        return torch.cat(parts, self.choose.randrange(1, h.dim()))

    def do_split(self, h: Tensor) -> Tensor:
        """Nodes with several outputs."""
        if h.dim() < 2 or h.shape[1] < 2:
            return h
        first, second = h[:, :1].contiguous(), h.split([1, h.shape[1] - 1], 1)[1]
        return self.choose.choice(
            [lambda: first + second, lambda: second, lambda: h.unbind(1)[0]]
        )()

    def do_images(self, h: Tensor) -> Tensor:
        if h.dim() == 3:
            norm = [self.values((h.shape[1],), h.dtype) for _ in range(4)]
            return F.batch_norm(h, norm[0], norm[1].abs() + 0.5, norm[2], norm[3])
        if h.dim() != 4 or min(h.shape[2:]) < 2:
            return h
        channels = h.shape[1]
        norm = [self.values((channels,), h.dtype) for _ in range(4)]
        convolved = {
            "stride": self.choose.choice([1, 2]), "padding": self.choose.choice([0, 1])
        }  # fmt: skip
        ways = [
            lambda: F.conv2d(h, self.weight(4, channels, 2, 2).to(h.dtype), **convolved),
            lambda: F.batch_norm(h, norm[0], norm[1].abs() + 0.5, norm[2], norm[3]),
            lambda: F.batch_norm(h, norm[0], norm[1].abs() + 0.5),
            lambda: F.max_pool2d(h, 2, stride=1),
            lambda: F.avg_pool2d(h, 2, stride=1),
            lambda: F.adaptive_avg_pool2d(h, 2),
            lambda: F.conv2d(
                F.batch_norm(h, norm[0], norm[1].abs() + 0.5, norm[2]),
                self.weight(4, channels, 1, 1).to(h.dtype),
            ),
        ]
        return self.choose.choice(ways)()

    def run(self, steps: int) -> Tensor:
        for _ in range(steps):
            h = self.step(self.choose.choice([self.pool[-1], self.pool[-1], *self.pool[-3:]]))
            if h.dim() and len(h) == self.n and 0 < h.numel() < 3000 and h.requires_grad:
                self.pool.append(h)
        return self.pool[-1]


def broadcasts(a: Tensor, b: Tensor) -> bool:
    try:
        return len(torch.broadcast_shapes(a.shape, b.shape)) > 0
    except RuntimeError:
        return False


def compared(outputs: Tensor, edges: list[GradientEdge], shapes: list[torch.Size]) -> bool:
    """Whether blocks were planned; asserts that they are autograd's rows."""
    n = len(outputs)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, *outputs.shape, generator=generator, dtype=outputs.dtype)
    plan = Propagation.plan(outputs, edges)
    if plan is None:
        return False
    expected = [
        torch.autograd.grad(outputs, edges, row, retain_graph=True, allow_unused=True)
        for row in rows
    ]
    found: list[list[Tensor]] = [[] for _ in edges]
    for block in plan.blocks(ROWS, lambda j: rows[j]):
        assert (block.samples, block.rows) == (slice(0, n), slice(0, ROWS))
        for edge, gradient, shape in zip(found, block.gradients, shapes, strict=True):
            edge.extend(
                outputs.new_zeros(shape) if gradient is None else gradient[:, j].reshape(shape)
                for j in range(ROWS)
            )
    narrow = any(m.dtype == torch.float32 for node in _nodes(outputs) for m in _metadata(node))
    limit = 2e-5 if narrow else 1e-11
    for j, row in enumerate(expected):
        for i, gradient in enumerate(row):
            ours, theirs = found[i][j], gradient
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            assert ours.dtype == theirs.dtype or not bool(ours.any())
            error = float((ours.double() - theirs.double()).norm())
            assert error <= limit * float(theirs.double().norm())
    return True


def test_random_chains() -> None:
    planned = 0
    kinds: set[str] = set()
    for seed in range(CASES):
        chain = Chain(seed)
        outputs = chain.run(2 + seed % 7)
        inner = chain.choose.sample(chain.pool, min(len(chain.pool), 3))
        edges = [get_gradient_edge(h) for h in inner]
        shapes = [h.shape for h in inner]
        try:
            if compared(outputs, edges, shapes):
                planned += 1
                kinds.update(graph.kind(node) for node in _nodes(outputs))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, samples {chain.n}") from error
    # The comparison has something to compare, of every rule.
    assert planned > CASES // 3
    rules = {*propagation_rules._RULES, *propagation_rules._SAME_VALUES, "Relu", "Tanh"}
    # A GPU has a batch norm of cuDNN's, in tests/test_cuda_calls.py.
    assert rules - kinds <= {"Alias", "CudnnBatchNorm", "ReshapeAlias"}


def _metadata(node: Any) -> list[Any]:
    return list(getattr(node, "_input_metadata", ()))


def _nodes(outputs: Tensor) -> list[Any]:
    pending, seen = [outputs.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return list(seen)
