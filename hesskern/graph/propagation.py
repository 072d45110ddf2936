"""Many rows backwards through a model at once, where its graph consists of known operations.

Autograd runs one row of gradients at a time through the whole batch. Rows of one sample have much
in common: the same derivatives, and zeros at the same places behind ReLUs and maxima. Here the
autograd graph is read, and every operation has a rule that takes all rows of a few samples on
together, few enough to stay in the cache from one operation to the next.

A gradient of a tensor [N, ...] is [n, r, ...] for n of the samples and r of the rows. Tensors whose
first axis merges samples with something else, [N t, ...], count as [N, t, ...]. Images keep their
channels last in memory, behind the rows, on the CPU; on a device where its convolutions want them
so, every row with its channels last.

Hooks that a model registers on its activations change no gradient here: the graph does not show
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from hesskern.graph.nodes import axis_of, kind, passes_gradients, per_axis, product

__all__ = ["Block", "Propagation"]

_internal = torch.ops.hesskern_internal

# Devices on which rows go together; on others autograd takes them one by one.
_DEVICES = ("cpu", "cuda")

# Elements of the largest gradient of a block: its successor and itself stay in the cache.
_BLOCK = 2**21
# Where single samples are large: elements that a block may have for the sake of several rows, which
# share what they have in common, and of a sample for every thread.
_LARGE_BLOCK = 2**23
_ROWS = 28
# On a device, whose launches take as long for few elements: of the largest gradient of a block.
_DEVICE_BLOCK = 2**27
# Gradients of the largest size that are alive at a time, beside those that are wanted.
_ALIVE = 4

# Operations that act on every element alone: the derivative is a factor per element.
_ELEMENTWISE = frozenset(
    (
        "Elu Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid Mish Neg Relu Sigmoid Silu"
        " Softplus Tanh Threshold"
    ).split()
)
_SAME_VALUES = frozenset(
    "Alias Clone ReshapeAlias Squeeze ToCopy Unsqueeze UnsafeView View".split()
)
_KNOWN = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Block:
    """Gradients of some samples and rows, valid until the next block.

    Attributes:
        samples, rows: which.
        gradients: per edge [n, r, ...], or None where nothing arrives.
    """

    samples: slice
    rows: slice
    gradients: list[Tensor | None]


class _Unknown(Exception):
    """The graph holds something that no rule covers."""


@dataclass(frozen=True)
class _Rule:
    """How gradients go on from one operation.

    Attributes:
        operands: positions of those operands of the node that gradients go on to.
        apply: (gradient [n, r, ...], samples, factor [n, ...] or None) to the operands' gradients;
            a factor, given only where there is one operand, multiplies that operand's gradient.
        masked: instead of ``apply`` on a device, where there is one operand: the same, with the
            result [n, ...] of a ReLU or None behind the factor, through which gradients go, too.
        factor: instead of ``apply``, for an elementwise operation: samples to its derivative
            [n or 1, ...], which broadcasts against the operand, in the operation's dtype.
        relu: for a ReLU its result [N, ...], beside ``factor``.
    """

    operands: tuple[int, ...]
    apply: Callable[[Tensor, slice, Tensor | None], list[Tensor]] | None = None
    masked: Callable[[Tensor, slice, Tensor | None, Tensor | None], Tensor] | None = None
    factor: Callable[[slice], Tensor] | None = None
    relu: Tensor | None = None


def _metadata(node: Any) -> Any:
    """Of the node's first output in the forward pass."""
    metadata = node._input_metadata
    if len(metadata) < 1 or metadata[0].is_nested_tensor:
        raise _Unknown
    return metadata[0]


def _shape(node: Any) -> tuple[int, ...]:
    """Shape of the node's first output in the forward pass."""
    return tuple(map(int, _metadata(node).shape))


def _dtype(node: Any) -> torch.dtype:
    """Its dtype, one that rules work in."""
    metadata = _metadata(node)
    if metadata.dtype not in _KNOWN:
        raise _Unknown
    dtype: torch.dtype = metadata.dtype
    return dtype


class Propagation:
    """The plan for one forward pass.

    Args:
        outputs: [N, ...] of the model, with their graph.
        edges: where gradients are wanted.
        tried: forms of graphs that have been tried on this device.

    Attributes:
        by_kernels: whether this package's kernels on the CPU take the rows; else torch's own.
    """

    def __init__(
        self, outputs: Tensor, edges: list[GradientEdge], tried: set[Any] | None = None
    ) -> None:
        tried = set() if tried is None else tried
        self._n = outputs.shape[0]
        self.by_kernels = _by_kernels(outputs)
        self._start: Any = outputs.grad_fn
        self._edges = edges
        self._wanted = {edge.node for edge in edges}
        if outputs.output_nr != 0 or any(edge.output_nr != 0 for edge in edges):
            raise _Unknown
        self._order = self._needed(outputs)
        self._shapes = {node: self._sample_shape(_shape(node)) for node in self._order}
        self._dtypes = {node: _dtype(node) for node in self._order}
        if any(_metadata(node).device != outputs.device for node in self._order):
            raise _Unknown
        self._rules = {node: self._rule(node) for node in self._order}
        self._arrivals: dict[Any, int] = {}
        for node in self._order:
            for operand in self._rules[node].operands:
                following = node.next_functions[operand][0]
                self._arrivals[following] = self._arrivals.get(following, 0) + 1
        sizes = [product(shape) for shape in self._shapes.values()]
        self._largest, self._total = max(sizes, default=1), sum(sizes)
        if not self.by_kernels:
            wanted = [product(self._shapes[n]) for n in self._wanted if n in self._shapes]
            self._total = sum(wanted) + _ALIVE * self._largest
        self._outputs = outputs.new_empty(0, *outputs.shape[1:])
        self._form = tuple(
            (kind(n), self._shapes[n], self._dtypes[n], self._rules[n].operands)
            for n in self._order
        )
        # A trial takes a device as many launches as a block.
        if self.by_kernels or self._form not in tried:
            self._try()
            tried.add(self._form)

    @classmethod
    def plan(
        cls, outputs: Tensor, edges: list[GradientEdge], tried: set[Any] | None = None
    ) -> Propagation | None:
        """The plan, or None where autograd itself has to do it."""
        if outputs.device.type not in _DEVICES or outputs.dtype not in _KNOWN:
            return None
        if outputs.grad_fn is None:
            return None
        if len(outputs) == 0 or not edges:
            return None
        with torch.no_grad():
            try:
                return cls(outputs, edges, tried)
            except Exception:
                # Whatever a rule cannot do, autograd can, or it has the better message.
                return None

    def _needed(self, outputs: Tensor) -> list[Any]:
        """Nodes on the way to a wanted one, each before the nodes that it passes gradients to."""
        needed: dict[Any, bool] = {}
        order: list[Any] = []
        pending: list[Any] = [outputs.grad_fn]
        while pending:
            node = pending[-1]
            if node in needed:
                pending.pop()
                continue
            following = [edge for edge in node.next_functions if edge[0] is not None]
            missing = [follower for follower, _ in following if follower not in needed]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            needed[node] = node in self._wanted or any(needed[f] for f, _ in following)
            if needed[node]:
                if any(number != 0 and needed[f] for f, number in following):
                    raise _Unknown
                order.append(node)
        return order[::-1]

    def _sample_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[...] of one sample of a tensor [N, ...] or [N t, ...]."""
        if not shape or shape[0] % self._n:
            raise _Unknown
        rest = shape[1:]
        return rest if shape[0] == self._n else (shape[0] // self._n, *rest)

    @property
    def samples(self) -> int:
        """N."""
        return self._n

    def shape(self, node: Any) -> tuple[int, ...]:
        """Shape of what the node's operation returned."""
        return _shape(node)

    def sample_shape(self, node: Any) -> tuple[int, ...]:
        """The same for one sample."""
        return self._shapes[node]

    def merged(self, node: Any) -> bool:
        """Whether the first axis counts more than the samples."""
        return _shape(node)[0] != self._n

    def by_sample(self, tensor: Tensor) -> Tensor:
        """[N, ...] of a tensor with samples in its first axis."""
        return tensor.reshape(self._n, *self._sample_shape(tuple(tensor.shape)))

    def check_same(self, node: Any, shapes: list[tuple[int, ...]]) -> None:
        """Refuses operands that were broadcast."""
        if any(shape != self._shapes[node] for shape in shapes):
            raise _Unknown

    def _rule(self, node: Any) -> _Rule:
        following = node.next_functions
        operands = tuple(
            i for i, (next_node, _) in enumerate(following) if next_node in self._shapes
        )
        if not operands:
            return _Rule(())
        name = kind(node)
        if isinstance(node, BackwardCFunction):
            # The name of a torch.autograd.Function says nothing.
            if not passes_gradients(node):
                raise _Unknown
            name = "Alias"
        shapes = [self._shapes[following[i][0]] for i in operands]
        if name in _ELEMENTWISE:
            self.check_same(node, shapes)
            if name == "Relu":
                result = self.by_sample(node._saved_result.detach())
                return _Rule(operands, factor=_is_positive(result), relu=result)
            return _Rule(operands, factor=self._derivative(node))
        if name in _SAME_VALUES:
            return _Rule(operands, lambda g, _, factor: [_times(_view(g, shapes[0]), factor)])
        make = _RULES.get(name)
        if make is None:
            raise _Unknown
        return make(self, node, operands, shapes)

    def _derivative(self, node: Any) -> Callable[[slice], Tensor]:
        metadata = node._input_metadata[0]
        ones = torch.ones((), dtype=metadata.dtype, device=metadata.device).expand(_shape(node))
        return _samples(self.by_sample(node(ones)))

    def _try(self) -> None:
        """One row of one sample, so that what a rule cannot do shows before anything is made."""
        row = self._outputs.new_ones(1, 1, *self._outputs.shape[1:])
        self._run(row, slice(0, 1), strict=True)

    def blocks(
        self, rows: int, row: Callable[[int], Tensor], budget: int | None = None
    ) -> Iterator[Block]:
        """Gradients of all rows and samples, block by block.

        Args:
            rows: number of rows.
            row: ``row(j)`` is [N, ...], shaped as the outputs; called once for each j, in order.
            budget: bytes that a block may take on its way beyond one row; None: what is fastest.

        Yields:
            blocks that together hold every row of every sample once.
        """
        step, samples = self._block_size(rows, budget)
        for begin in range(0, rows, step):
            block = torch.stack([row(j) for j in range(begin, min(rows, begin + step))], 1)
            for start in range(0, self._n, samples):
                chosen = slice(start, min(start + samples, self._n))
                with torch.no_grad():
                    gradients = self._run(block[chosen], chosen)
                yield Block(chosen, slice(begin, begin + block.shape[1]), gradients)

    def _block_size(self, rows: int, budget: int | None) -> tuple[int, int]:
        """Rows and samples of a block."""
        largest = max(1, self._largest)
        step = max(_BLOCK // (largest * self._n), min(_ROWS, _LARGE_BLOCK // largest), 1)
        if not self.by_kernels:
            # Rows before samples: masks and places of maxima are read once for all of them.
            together = min(_ROWS, _DEVICE_BLOCK // largest)
            step = max(_DEVICE_BLOCK // (largest * self._n), together, 1)
        step = min(rows, step)
        if budget is not None:
            # Half is for the rows themselves, held twice while they are put together, half for
            # their gradients at every operation.
            half = budget // (2 * self._outputs.element_size())
            row = 2 * self._n * product(self._outputs.shape[1:])
            step = max(1, min(step, half // max(1, row)))
            if not self.by_kernels:
                step = max(1, min(step, half // max(1, self._total)))
        # All blocks of about the same number of rows.
        step = -(-rows // -(-rows // step))
        if self.by_kernels:
            samples = max(1, _BLOCK // (largest * step))
            threads = torch.get_num_threads()
            shared = -(-samples // threads) * threads
            if shared * step * largest <= max(_LARGE_BLOCK, samples * step * largest):
                samples = shared
        else:
            samples = max(1, _DEVICE_BLOCK // (largest * step))
            samples = -(-self._n // -(-self._n // samples))
        if budget is not None and step > 1:
            samples = max(1, min(samples, half // max(1, step * self._total)))
        return step, samples

    def _run(self, block: Tensor, samples: slice, strict: bool = False) -> list[Tensor | None]:
        """A block's gradients at the edges.

        Args:
            block: [n, r, ...] rows of the samples.
            samples: which.
            strict: whether to raise where a gradient has not the shape of its tensor.
        """
        arrived: dict[Any, Tensor] = {}
        found: dict[Any, Tensor] = {}
        if self._start in self._shapes:
            arrived[self._start] = _view(block, self._shapes[self._start])
        for node in self._order:
            gradient = arrived.pop(node, None)
            if gradient is None:
                continue
            if node in self._wanted:
                found[node] = gradient
            rule = self._rules[node]
            if not rule.operands:
                continue
            if len(rule.operands) == 1:
                target, result = self._pass_on(node, gradient, samples)
                targets, results = [target], [result]
            else:
                assert rule.apply is not None
                results = rule.apply(gradient, samples, None)
                targets = [node.next_functions[i][0] for i in rule.operands]
            for target, result in zip(targets, results, strict=True):
                if strict and result.shape != (*block.shape[:2], *self._shapes[target]):
                    raise _Unknown
                # Operands of several dtypes are promoted; each one's gradient has its own.
                if result.dtype != self._dtypes[target]:
                    result = result.to(self._dtypes[target])
                before = arrived.get(target)
                arrived[target] = result if before is None else before + result
        return [found.get(edge.node) for edge in self._edges]

    def _pass_on(self, node: Any, gradient: Tensor, samples: slice) -> tuple[Any, Tensor]:
        """A gradient through a node of one operand and the elementwise ones behind it.

        Returns:
            the next node, and the gradient that arrives there.
        """
        rule = self._rules[node]
        target, factor, relu = self._through(node, samples)
        if rule.masked is not None:
            return target, rule.masked(gradient, samples, factor, relu)
        if rule.apply is not None:
            if self.by_kernels:
                return target, rule.apply(gradient, samples, factor)[0]
            gradient = rule.apply(gradient, samples, None)[0]
            # Before a factor makes up for what is missing.
            if gradient.shape[2:] != self._shapes[node.next_functions[rule.operands[0]][0]]:
                raise _Unknown
        return target, _times(gradient, factor) if relu is None else _cut(gradient, factor, relu)

    def _through(self, node: Any, samples: slice) -> tuple[Any, Tensor | None, Tensor | None]:
        """The next node behind elementwise ones that nothing else meets, this one among them.

        Returns:
            the next node; what they multiply gradients by, [n or 1, ...] or None; on a device the
            result [n, ...] of a ReLU that is none of the factors, or None.
        """
        factor: Tensor | None = None
        relu: Tensor | None = None
        target = node
        while True:
            rule = self._rules[target]
            if rule.factor is None:
                if target is not node:
                    break
            elif relu is None and rule.relu is not None and not self.by_kernels:
                relu = rule.relu[samples]
            else:
                part = rule.factor(samples)
                factor = part if factor is None else factor * part
            target = target.next_functions[rule.operands[0]][0]
            if self._arrivals[target] > 1 or target in self._wanted:
                break
            if self._dtypes[target] != self._dtypes[node]:
                break
        return target, factor, relu


class _Memory:
    """One operation's gradients, in the same memory for every block: new pages cost as much as the
    values written to them."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape, of the dtype and device of ``like``, with any values."""
        size = product(shape)
        if self._tensor is None or len(self._tensor) < size:
            self._tensor = like.new_empty(size)
        return self._tensor[:size].view(shape)


def _by_kernels(outputs: Tensor) -> bool:
    """Whether there are kernels for rows where the outputs lie."""
    return outputs.device.type == "cpu"


def _samples(factor: Tensor) -> Callable[[slice], Tensor]:
    """The samples' part of a factor [N, ...], or a factor [1, ...] of all."""
    return lambda samples: factor if factor.shape[0] == 1 else factor[samples]


def _is_positive(result: Tensor) -> Callable[[slice], Tensor]:
    """1 where the samples' part of a tensor [N, ...] is positive, 0 elsewhere."""
    return lambda samples: (result[samples] > 0).to(result.dtype)


def _view(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n, r, *shape] of a gradient [n, r, ...]."""
    return g if tuple(g.shape[2:]) == shape else g.reshape(*g.shape[:2], *shape)


def _times(g: Tensor, factor: Tensor | None) -> Tensor:
    return g if factor is None else g * factor.unsqueeze(1)


def _cut(g: Tensor, factor: Tensor | None, relu: Tensor) -> Tensor:
    """Gradients [n, r, ...] times a factor where a ReLU's result [n, ...] is positive."""
    if _channels_are_last(g):
        # Read across the rows' memory format it would take as long as all of them.
        relu = relu.contiguous(memory_format=torch.channels_last)
    if factor is not None:
        factor = torch.ops.aten.threshold_backward(factor.expand_as(relu), relu, 0.0)
        return _times(g, factor)
    return torch.ops.aten.threshold_backward(g, relu.unsqueeze(1), 0.0)


def _channels_are_last(g: Tensor) -> bool:
    """Whether channels of gradients [n, r, C, H, W] are last in memory."""
    return g.dim() == 5 and g.stride(2) == 1 and g.shape[2] > 1


def _channels_last(g: Tensor) -> Tensor:
    """Gradients [n, r, C, H, W] with their channels last in memory; copied where they are not."""
    return g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _wants_channels_last(dtype: torch.dtype, *channels: int) -> bool:
    """Whether a device convolves images with their channels last as they are, others in copies.

    Tensor cores multiply TF32 in such images, four channels at once.
    """
    # torch's stubs do not know the newer flags.
    cudnn: Any = torch.backends.cudnn
    rounded = dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
    return rounded and all(count % 4 == 0 for count in channels)


def _images(g: Tensor) -> Tensor:
    """[n, H, W, r, C] of a gradient [n, r, C, H, W]."""
    return g.permute(0, 3, 4, 1, 2)


def _gradients(images: Tensor) -> Tensor:
    """[n, r, C, H, W] of [n, H, W, r, C]."""
    return images.permute(0, 3, 4, 1, 2)


def _last_axis(factor: Tensor | None, n: int, shape: tuple[int, ...]) -> Tensor | None:
    """[n, H, W, C] of a factor that broadcasts to [n, *shape] = [n, C, H, W]."""
    return None if factor is None else factor.expand(n, *shape).permute(0, 2, 3, 1)


_Operands = tuple[int, ...]
_Shapes = list[tuple[int, ...]]
_Make = Callable[["Propagation", Any, _Operands, _Shapes], _Rule]


def _matmul(
    matrix: Tensor, by_kernels: bool
) -> Callable[[Tensor, slice, Tensor | None], list[Tensor]]:
    """Gradients [n, r, ..., m] times a matrix [m, d]."""

    memory = _Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        if not by_kernels:
            # A device's allocator keeps memory for the next block by itself.
            return [_times(torch.matmul(g, matrix), factor)]
        product = memory.take(g, (*g.shape[:-1], matrix.shape[1]))
        torch.matmul(g, matrix, out=product)
        return [product if factor is None else product.mul_(factor.unsqueeze(1))]

    return apply


def _linear(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    left = 1 if kind(node) == "Addmm" else 0
    if operands != (left,) or len(shapes[0]) != len(plan.sample_shape(node)):
        raise _Unknown
    if getattr(node, "_saved_alpha", 1) != 1:
        raise _Unknown
    return _Rule(operands, _matmul(node._saved_mat2.detach().t(), plan.by_kernels))


def _batched_matmul(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    """A matrix of every sample times a constant one; so linear layers treat strided sequences."""
    if operands != (0,) or plan.merged(node):
        raise _Unknown
    matrices = node._saved_mat2.detach()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [_times(torch.matmul(g, matrices[samples].unsqueeze(1).mT), factor)]

    return _Rule(operands, apply)


def _expansion(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    plan.check_same(node, shapes)
    return _Rule(operands, lambda g, _, factor: [_times(g, factor)])


def _convolution(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    weight = node._saved_weight
    if operands != (0,) or node._saved_transposed or len(shapes[0]) != weight.dim() - 1:
        raise _Unknown
    if not plan.by_kernels:
        return _Rule(operands, _convolution_by_torch(node, shapes[0]))
    axes = weight.dim() - 2
    if axes not in (1, 2):
        raise _Unknown
    flat = axes == 1
    size = list(shapes[0][1:])
    stride, padding, dilation = (
        list(per_axis(values, axes))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    if flat:
        weight = weight.unsqueeze(2)
        size, stride, padding, dilation = [1, *size], [1, *stride], [0, *padding], [1, *dilation]
    weight = weight.detach().contiguous()
    groups = int(node._saved_groups)
    channels = weight.shape[1] * groups
    memory = _Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        if flat:
            g = g.unsqueeze(3)
            factor = factor if factor is None else factor.unsqueeze(2)
        factor = _last_axis(factor, len(g), (channels, *size))
        images = memory.take(g, (len(g), *size, g.shape[1], channels))
        _internal.conv_input_gradient_(
            images, _images(g), weight, stride, padding, dilation, groups, factor
        )
        result = _gradients(images)
        return [result.squeeze(3) if flat else result]

    return _Rule(operands, apply)


def _merged(g: Tensor) -> Tensor:
    """[n r, C, ...] of gradients [n, r, C, ...]; a view where their memory permits."""
    return g.flatten(0, 1)


def _convolution_by_torch(
    node: Any, shape: tuple[int, ...]
) -> Callable[[Tensor, slice, Tensor | None], list[Tensor]]:
    weight = node._saved_weight.detach()
    axes = weight.dim() - 2
    groups = int(node._saved_groups)
    if axes == 2 and groups == 1 and _wants_channels_last(weight.dtype, *weight.shape[:2]):
        return _convolution_channels_last(node, shape)
    stride, padding, dilation = (
        list(per_axis(values, axes))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        rows = _merged(g)
        # Of the inputs only the shape counts.
        inputs = rows.new_empty(1).expand(len(rows), *shape)
        found = torch.ops.aten.convolution_backward(
            rows,
            inputs,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * axes,
            groups,
            (True, False, False),
        )[0]
        return [_times(found.unflatten(0, g.shape[:2]), factor)]

    return apply


def _convolution_channels_last(
    node: Any, shape: tuple[int, ...]
) -> Callable[[Tensor, slice, Tensor | None], list[Tensor]]:
    """The same with channels last in memory, before and behind.

    A convolution's backward function takes the memory format from inputs that it does not read; the
    transposed convolution, which it is, from the gradients.
    """
    weight = node._saved_weight.detach().contiguous(memory_format=torch.channels_last)
    stride, padding, dilation = (
        list(per_axis(values, 2))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    reach = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    # Inputs behind the last window.
    rest = [
        (size + 2 * p - r) % s
        for size, p, r, s in zip(shape[1:], padding, reach, stride, strict=True)
    ]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        rows = _merged(g).contiguous(memory_format=torch.channels_last)
        found = torch.ops.aten.convolution(
            rows, weight, None, stride, padding, dilation, True, rest, 1
        )
        return [_times(found.unflatten(0, g.shape[:2]), factor)]

    return apply


def _max_pool(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    indices = node._saved_result1
    if operands != (0,) or len(shapes[0]) != 3 or indices.dim() != 4:
        raise _Unknown
    where = indices.permute(0, 2, 3, 1)
    size = list(shapes[0][1:])
    kernel = per_axis(node._saved_kernel_size, 2)
    stride = per_axis(node._saved_stride, 2) or kernel
    padding, dilation = per_axis(node._saved_padding, 2), per_axis(node._saved_dilation, 2)
    window = kernel, stride, padding, dilation
    if not plan.by_kernels:
        last = _wants_channels_last(_dtype(node), shapes[0][0])

        def masked(g: Tensor, samples: slice, factor: Tensor | None, relu: Tensor | None) -> Tensor:
            n, r, c = g.shape[:3]
            g = _channels_last(g) if last else g.contiguous()
            found = g.new_empty(n, r, *((*size, c) if last else (c, *size)))
            found = found.permute(0, 1, 4, 2, 3) if last else found
            factor, relu = (_last_axis(each, n, shapes[0]) for each in (factor, relu))
            _internal.max_pool_input_gradient_(
                _images(found), _images(g), where[samples], *window, factor, relu
            )
            return found

        return _Rule(operands, masked=masked)
    memory = _Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        factor = _last_axis(factor, len(g), shapes[0])
        images = memory.take(g, (len(g), *size, g.shape[1], g.shape[2]))
        _internal.max_pool_input_gradient_(images, _images(g), where[samples], *window, factor)
        return [_gradients(images)]

    return _Rule(operands, apply)


def _by_torch(plan_call: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]) -> _Make:
    """A rule from torch's own backward function of a linear operation on images.

    Args:
        plan_call: of the node; returns (gradients [N, C, Ho, Wo], inputs [N, C, H, W] of which only
            the shape counts) to the inputs' gradients.
    """

    def make(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
        if operands != (0,) or len(shapes[0]) != 3:
            raise _Unknown
        call = plan_call(node)

        def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
            rows = g.flatten(0, 1).contiguous()
            result = call(rows, rows.new_zeros(()).expand(len(rows), *shapes[0]))
            return [_times(result.unflatten(0, g.shape[:2]), factor)]

        return _Rule(operands, apply)

    return make


def _average_pool(node: Any) -> Callable[[Tensor, Tensor], Tensor]:
    settings = (
        node._saved_kernel_size,
        node._saved_stride,
        node._saved_padding,
        node._saved_ceil_mode,
        node._saved_count_include_pad,
        node._saved_divisor_override,
    )
    return lambda g, x: torch.ops.aten.avg_pool2d_backward(g, x, *settings)


def _adaptive_average_pool(node: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.ops.aten._adaptive_avg_pool2d_backward


def _reduction(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    """Sum and mean over axes other than that of the samples."""
    full = tuple(int(size) for size in getattr(node, "_saved_self_sym_sizes", ()))
    if not full or full[0] != plan.samples or not hasattr(node, "_saved_dim"):
        raise _Unknown
    axes = sorted(axis_of(axis, len(full)) for axis in (node._saved_dim or ()))
    if not axes or axes[0] == 0:
        raise _Unknown
    scale = 1.0
    if kind(node) == "Mean":
        scale = 1.0 / product(tuple(full[axis] for axis in axes))
    keep = bool(node._saved_keepdim)

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        for axis in () if keep else axes:
            g = g.unsqueeze(axis + 1)
        return [_times((g * scale).expand(*g.shape[:2], *full[1:]), factor)]

    return _Rule(operands, apply)


def _sum(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    """a + alpha b and a - alpha b of equal shapes."""
    plan.check_same(node, shapes)
    sign = 1.0 if kind(node) == "Add" else -1.0
    scales = [1.0 if i == 0 else sign * float(node._saved_alpha) for i in operands]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [_times(g if scale == 1.0 else g * scale, factor) for scale in scales]

    return _Rule(operands, apply)


def _multiplication(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    """a b and a / b, each factor constant or of the same shape."""
    plan.check_same(node, shapes)
    if kind(node) == "Div" and (operands != (0,) or hasattr(node, "_saved_rounding_mode")):
        raise _Unknown
    others = [node._saved_other if i == 0 else node._saved_self for i in operands]
    if any(not isinstance(other, Tensor) for other in others):
        raise _Unknown
    # Masks and whole numbers as what the operation promotes them to, since products of the narrow
    # ones overflow. Python's numbers get an axis: their reciprocal without one is in float32.
    device = _metadata(node).device
    others = [torch.atleast_1d(other.detach().to(device, _dtype(node))) for other in others]
    if kind(node) == "Div":
        others = [other.reciprocal() for other in others]
    factors = [plan.by_sample(other.expand(plan.shape(node))) for other in others]
    if len(factors) == 1:
        return _Rule(operands, factor=_samples(factors[0]))

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [g * other[samples].unsqueeze(1) for other in factors]

    return _Rule(operands, apply)


def _batch_norm(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    """Normalization by running statistics: a factor per channel."""
    plan.check_same(node, shapes)
    shape = plan.shape(node)
    if operands != (0,) or node._saved_training or shape[0] != plan.samples:
        raise _Unknown
    scale = (node._saved_running_var.to(_dtype(node)) + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight.detach().to(_dtype(node))
    return _Rule(operands, factor=_samples(scale.reshape(1, -1, *(1,) * (len(shape) - 2))))


def _concatenation(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    axis = axis_of(node._saved_dim, len(plan.shape(node)))
    if len(operands) != len(node.next_functions) or axis == 0 or plan.merged(node):
        raise _Unknown
    sizes = [shape[axis - 1] for shape in shapes]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [_times(part, factor) for part in g.split(sizes, axis + 1)]

    return _Rule(operands, apply)


def _permutation(plan: Propagation, node: Any, operands: _Operands, shapes: _Shapes) -> _Rule:
    dim = len(plan.shape(node))
    order = list(range(dim))
    if kind(node) == "Transpose":
        a, b = axis_of(node._saved_dim0, dim), axis_of(node._saved_dim1, dim)
        order[a], order[b] = b, a
    else:
        order = [axis_of(axis, dim) for axis in node._saved_dims]
    if order[0] != 0 or plan.merged(node):
        raise _Unknown
    back = [0, 1, *(order.index(axis) + 1 for axis in range(1, dim))]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [_times(g.permute(back), factor)]

    return _Rule(operands, apply)


_RULES: dict[str, _Make] = {
    "Add": _sum,
    "AdaptiveAvgPool2D": _by_torch(_adaptive_average_pool),
    "Addmm": _linear,
    "AvgPool2D": _by_torch(_average_pool),
    "Bmm": _batched_matmul,
    "Cat": _concatenation,
    "Convolution": _convolution,
    "Div": _multiplication,
    "Expand": _expansion,
    "MaxPool2DWithIndices": _max_pool,
    "Mean": _reduction,
    "Mm": _linear,
    "Mul": _multiplication,
    "NativeBatchNorm": _batch_norm,
    "Permute": _permutation,
    "Sub": _sum,
    "Sum": _reduction,
    "Transpose": _permutation,
}
