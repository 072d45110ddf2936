"""Samples as a layer's Hessian needs them: inputs and root-times-Jacobian rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.ops.reference import unfold
from hesskern.passes.layer_uses import LayerUse
from hesskern.passes.layers import LayerSpec
from hesskern.passes.roots import BatchRoots, accumulator_dtype, positions_last

__all__ = ["LayerColumns", "SampleRows", "added_bytes", "join", "joined_bytes", "layer_rows"]

# Samples are joined up to this many bytes, so that a product runs over few large pieces. On a GPU
# the kernels for large products want tens of thousands of samples at a time.
_JOINED_BYTES = {"cpu": 2**25, "cuda": 2**30}

# Samples go into an inner product in parts of about this many bytes.
_INNER_BYTES = 2**26


@dataclass(frozen=True)
class SampleRows:
    """H's part R^T R from some samples: R_nc = sum_t s_nct x_nt^T, flattened.

    Attributes:
        x: [N, d] or [N, d, t].
        s: [N, r, m] or [N, r, m, t].
        stored: whether the rows themselves are stored, with x = ones [N, 1] and s = rows
            [N, r, m d]: where they are smaller than a sample's inputs and gradients.
    """

    x: Tensor
    s: Tensor
    stored: bool = False

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.s.nbytes

    def select(self, keep: Tensor) -> SampleRows:
        """Some samples: those where keep [N] is True, or by their numbers."""
        return replace(self, x=self.x[keep], s=self.s[keep])

    def __reduce__(self) -> tuple[Any, ...]:
        # A part of a larger tensor, such as a batch, would take all of that along when pickled.
        return SampleRows, (_alone(self.x), _alone(self.s), self.stored)

    def alone(self) -> SampleRows:
        """The same in memory of its own."""
        return replace(self, x=self.x.clone(), s=self.s.clone())

    def rotated(self) -> SampleRows:
        """The same R^T R with every sample's rows in their principal axes, largest first."""
        gram = torch.matmul(self.s, self.s.transpose(1, 2))
        # In float64: what is left out later must not rest on rounding.
        axes = torch.linalg.eigh(gram.double()).eigenvectors.flip(2)
        return replace(self, s=torch.matmul(axes.transpose(1, 2).to(self.s.dtype), self.s))

    def row_shares(self) -> Tensor:
        """[N, r] float64: each stored row's part of tr(R^T R)."""
        x = self.x.square().sum(1, dtype=torch.float64)
        return self.s.square().sum(2, dtype=torch.float64) * x.unsqueeze(1)

    def shares(self) -> Tensor:
        """[N] float64: each sample's part of tr(R^T R), which bounds its part of the spectrum."""
        if self.x.dim() == 2:
            x = torch.linalg.vector_norm(self.x, dim=1).double()
            return (x * torch.linalg.vector_norm(self.s, dim=(1, 2)).double()).square()
        m, t = self.s.shape[2:]
        if m * self.x.shape[1] <= t * t:
            rows = torch.matmul(self.s.flatten(1, 2), self.x.transpose(1, 2))
            return rows.square().sum((1, 2), dtype=torch.float64)
        inputs = torch.matmul(self.x.transpose(1, 2), self.x)
        gradients = torch.matmul(self.s.flatten(1, 2).transpose(1, 2), self.s.flatten(1, 2))
        return (inputs * gradients).sum((1, 2), dtype=torch.float64)

    def diagonal(self) -> Tensor:
        """[m d] diagonal of R^T R."""
        if self.x.dim() == 2:
            return (self.s.square().sum(1).T @ self.x.square()).flatten()
        total = self.s.new_zeros(self.s.shape[2] * self.x.shape[1])
        for rows in self.dense_rows():
            total += rows.square().sum(0)
        return total

    def dense_rows(self, limit: int = 2**26) -> Iterator[Tensor]:
        """R as matrices [rows, m d], about ``limit`` bytes at a time."""
        n, r, m = self.s.shape[:3]
        d = self.x.shape[1]
        step = max(1, limit // max(1, r * m * d * self.s.element_size()))
        for start in range(0, n, step):
            x, s = self.x[start : start + step], self.s[start : start + step]
            if x.dim() == 2:
                rows = s.unsqueeze(3) * x[:, None, None, :]
            else:
                rows = torch.matmul(s.flatten(1, 2), x.transpose(1, 2))
            yield rows.reshape(-1, m * d)

    def diagonal_in(self, K: EigenbasisOperator) -> Tensor:
        """[m, d] diagonal of R^T R in K's eigenbasis: sum_nc (u_i^T R_nc v_j)²."""
        left, right, _ = K.eigenbases
        m, d = K.layer_shape
        if not self.stored and K.groups == 1:
            # Inputs and gradients can be rotated by themselves.
            if self.x.dim() == 2:
                turned = SampleRows(self.x @ right[0], self.s @ left[0])
            else:
                turned = SampleRows(
                    torch.matmul(right[0].T, self.x), torch.matmul(left[0].T, self.s)
                )
            return turned.diagonal().reshape(m, d)
        u, v = torch.stack(left), torch.stack(right)
        total = self.s.new_zeros(m, d)
        for rows in self.dense_rows():
            blocks = rows.reshape(len(rows), K.groups, m // K.groups, d)
            turned_rows = torch.matmul(torch.matmul(u.transpose(1, 2), blocks), v)
            total += turned_rows.square().sum(0).reshape(m, d)
        return total

    def inner(self, K: KroneckerOperator) -> float:
        """tr(R^T R K) = sum_nc <R_nc, A R_nc B>.

        Without positions this is sum_n (sum_c s_nc^T A s_nc) (x_n^T B x_n). With them it is
        sum_n <sum_c S_nc^T A S_nc, X_n^T B X_n>, both [t, t], or computed from the rows R_nc [m, d]
        themselves, whichever takes fewer multiplications.
        """
        if self.stored or self._rows_are_cheaper():
            return sum(
                float((rows * K.of_rows(rows)).sum(dtype=torch.float64))
                for rows in self.dense_rows()
            )
        total = 0.0
        step = max(1, _INNER_BYTES * len(self.x) // max(1, self.nbytes))
        for start in range(0, len(self.x), step):
            x, s = self.x[start : start + step], self.s[start : start + step]
            if x.dim() == 2:
                inputs = ((x @ K.B) * x).sum(1, dtype=torch.float64)
                outputs = ((s @ K.A) * s).sum((1, 2), dtype=torch.float64)
            else:
                inputs = torch.matmul(x.transpose(1, 2), torch.matmul(K.B, x))
                images = torch.matmul(K.A, s).flatten(1, 2)
                outputs = torch.matmul(s.flatten(1, 2).transpose(1, 2), images)
            total += float((inputs * outputs).sum(dtype=torch.float64))
        return total

    def _rows_are_cheaper(self) -> bool:
        """Whether :meth:`inner` multiplies less by R_nc than by the positions' Gram matrices."""
        if self.x.dim() == 2:
            return False
        (c, m, t), d = self.s.shape[1:], self.x.shape[1]
        return c * m * d * (t + m + d) < t * (d * d + t * d + c * m * (m + t))

    def contracted_rows(
        self, root: Tensor, side: int, layer_shape: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Matrices [., q] whose Gram sum is R contracted with root root^T on its other side.

        Args:
            root: [d, d] for side 0 (q = m), [m, m] for side 1 (q = d).
            side: which side of R is kept.
            layer_shape: (m, d).
        """
        if self.x.dim() == 2 and not self.stored:
            if side == 0:
                weight = (self.x @ root).norm(dim=1)
                yield (self.s * weight[:, None, None]).flatten(0, 1)
            else:
                weight = torch.matmul(self.s, root).flatten(1).norm(dim=1)
                yield self.x * weight[:, None]
            return
        for rows in self.dense_rows():
            matrices = rows.reshape(-1, *layer_shape)
            if side == 0:
                yield torch.matmul(matrices, root).transpose(1, 2).flatten(0, 1)
            else:
                yield torch.matmul(matrices.transpose(1, 2), root).transpose(1, 2).flatten(0, 1)


def added_bytes(rows: SampleRows, before: SampleRows | None) -> int:
    """Bytes that keeping a piece takes beside the one before it, which may share its inputs."""
    shared = before is not None and before.x is rows.x
    return rows.s.nbytes if shared else rows.nbytes


def joined_bytes(device: torch.device, limit: int) -> int:
    """Bytes up to which pieces on a device are joined, if so many may be held twice meanwhile."""
    return min(limit, _JOINED_BYTES.get(device.type, _JOINED_BYTES["cpu"]))


def join(chunks: list[SampleRows], limit: int) -> list[SampleRows]:
    """The same samples in few pieces; empties the list it is given, to hold them only once.

    Args:
        chunks: pieces.
        limit: bytes that may be held twice meanwhile.
    """
    if chunks:
        limit = joined_bytes(chunks[0].x.device, limit)
    return _grouped(_grouped(chunks, limit, _same_samples), limit, _same_rows)


def _grouped(
    chunks: list[SampleRows], limit: int, fits: Callable[[SampleRows, SampleRows], bool]
) -> list[SampleRows]:
    """Pieces joined with those behind them, as long as one fits the other; empties the list."""
    joined: list[SampleRows] = []
    group: list[SampleRows] = []
    size = 0
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        if group and not (size + chunk.nbytes <= limit and fits(group[-1], chunk)):
            joined.append(_concatenate(group))
            group, size = [], 0
        if chunk.s.numel():
            group.append(chunk)
            size += chunk.nbytes
    if group:
        joined.append(_concatenate(group))
    return joined


def _same_samples(a: SampleRows, b: SampleRows) -> bool:
    """Whether two pieces hold different root rows of the same samples."""
    return a.x is b.x


def _same_rows(a: SampleRows, b: SampleRows) -> bool:
    """Whether two pieces hold equally many root rows of different samples."""
    # Inputs that pieces share would be held once for each of them.
    same = a.x.shape[1:] == b.x.shape[1:] and a.s.shape[1:] == b.s.shape[1:]
    return a.x is not b.x and same and a.stored == b.stored


def _concatenate(group: list[SampleRows]) -> SampleRows:
    if len(group) == 1:
        return group[0]
    if all(chunk.x is group[0].x for chunk in group):
        return replace(group[0], s=torch.cat([c.s for c in group], 1))
    x, s = torch.cat([c.x for c in group]), torch.cat([c.s for c in group])
    return replace(group[0], x=x, s=s)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied where it shares its memory with more than itself."""
    if tensor.untyped_storage().nbytes() <= tensor.nbytes:
        return tensor
    return tensor.clone()


def layer_rows(
    specs: dict[str, LayerSpec], roots: BatchRoots, budget: int, keep_positions: bool = False
) -> Iterator[tuple[str, SampleRows]]:
    """Every layer's sample rows of one batch, in pieces over root rows.

    Args:
        specs: the layers wanted.
        roots: the batch.
        budget: bytes of samples that the caller keeps. A piece of all layers takes an eighth of it,
            or one root row, and gradients on their way a sixteenth.
        keep_positions: inputs and gradients at every position, also where rows would be smaller.

    Yields:
        (name, rows); a layer may come several times, with different root rows of the same samples.
    """
    makers = {
        name: _Maker(spec, roots, keep_positions)
        for name, spec in specs.items()
        if name in roots.uses
    }
    if not makers or roots.rows == 0:
        return
    per_row = sum(maker.row_bytes for maker in makers.values())
    step = min(roots.rows, max(1, budget // 8 // max(1, per_row)))
    for begin in range(0, roots.rows, step):
        end = min(begin + step, roots.rows)
        for maker in makers.values():
            maker.begin(end - begin)
        for samples, rows, gradients in _blocks(roots, budget // 16, begin, end):
            for name, maker in makers.items():
                maker.put(samples, rows, gradients[name])
        yield from _finished(makers, roots)


def _blocks(
    roots: BatchRoots, budget: int, begin: int, end: int
) -> Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]]:
    """Some rows' gradients, many at a time where the model's operations are known."""
    blocks = roots.blocks(budget, begin, end)
    if blocks is not None:
        yield from blocks
        return
    for index, grads in enumerate(roots.gradients(begin, end)):
        one = {
            name: [None if grad is None else grad.unsqueeze(1) for grad in layer]
            for name, layer in grads.items()
        }
        yield slice(None), slice(index, index + 1), one


def _finished(makers: dict[str, _Maker], roots: BatchRoots) -> Iterator[tuple[str, SampleRows]]:
    finished = {name: maker.finish() for name, maker in makers.items()}
    roots.check_gradients({name: rows.s for name, rows in finished.items()})
    for name in list(finished):
        # Whoever takes a piece may drop it before the next begins.
        yield name, finished.pop(name)


class LayerColumns:
    """A layer's inputs at all its positions in a batch, and gradients there: use behind use.

    Args:
        spec: of the layer.
        uses: of the batch.
        samples: which of the batch.
        dtype: of ``x``; None for the inputs' own.

    Attributes:
        x: [n, d] of one use with one position per sample, [n, d, t] otherwise; d counts all groups,
            but no joint bias. Of a masked use the positions that are data, beside zeros. A view
            where nothing is to be put together.
        plain: whether it is [n, d].
        positions: t of every use.
    """

    def __init__(
        self,
        spec: LayerSpec,
        uses: list[LayerUse],
        samples: slice = slice(None),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._spec, self._uses, self._samples = spec, uses, samples
        inputs = [_columns(spec, use, samples).to(dtype) for use in uses]
        self.plain = len(inputs) == 1 and inputs[0].dim() == 2
        if self.plain:
            self.x = inputs[0]
            self.positions = [1]
        else:
            columns = [x if x.dim() == 3 else x.unsqueeze(2) for x in inputs]
            self.positions = [x.shape[2] for x in columns]
            self.x = columns[0] if len(columns) == 1 else torch.cat(columns, 2)

    def with_ones(self) -> Tensor:
        """``x`` with a row of ones behind every group's, zero where a mask keeps nothing."""
        groups = self._spec.groups
        ones = self.x.new_ones(len(self.x), groups, *self.x.shape[2:])
        begin = 0
        for use, t in zip(self._uses, self.positions, strict=True):
            if use.mask is not None:
                whole = ones.new_ones(len(ones), groups, use.mask.length)
                ones[:, :, begin : begin + t] = use.mask.compact(whole, 2, self._samples)
            begin += t
        return torch.cat([self.x.unflatten(1, (groups, -1)), ones.unsqueeze(2)], 2).flatten(1, 2)

    def gradients(
        self, grads: list[Tensor | None], n: int, rows: int, samples: slice | None = None
    ) -> Tensor:
        """[n, r, m] where ``plain``, [n, r, m, t] otherwise, of gradients [n, r, ...] per use.

        Args:
            grads: of every use, in the model's dtype; None where nothing flows back.
            n, rows: of the gradients.
            samples: which of the batch these are; None for those of the inputs.
        """
        samples = self._samples if samples is None else samples
        first = grads[0]
        if self.plain and first is not None and first.dim() == 3:
            return first
        columns = [
            self.x.new_zeros(n, rows, self._spec.outputs, t)
            if grad is None
            else _data_columns(self._spec, use, grad, samples)
            for use, grad, t in zip(self._uses, grads, self.positions, strict=True)
        ]
        if self.plain:
            return columns[0].reshape(n, rows, self._spec.outputs)
        return columns[0] if len(columns) == 1 else torch.cat(columns, 3)


class _Maker:
    """Fills one layer's :class:`SampleRows` row by row, in the smaller of both forms."""

    def __init__(self, spec: LayerSpec, roots: BatchRoots, keep_positions: bool) -> None:
        self._spec, self._roots, self._uses = spec, roots, roots.uses[spec.name]
        dtype = accumulator_dtype(self._uses[0].x.dtype)
        self._columns = LayerColumns(spec, self._uses, dtype=dtype)
        self._x = self._columns.with_ones() if spec.joint else self._columns.x
        plain = self._columns.plain
        m, d = spec.shape
        t = sum(self._columns.positions)
        stored = m * d
        smaller = spec.groups > 1 or roots.rows * stored < roots.rows * m * t + d * t
        self._stored = not plain and not keep_positions and smaller
        self._shape: tuple[int, ...] = (m,) if plain else (m, t)
        if self._stored:
            self._shape = (stored,)
        self._n = len(self._x)
        size = 1
        for axis in self._shape:
            size *= axis
        self.row_bytes = self._n * size * self._x.element_size()

    def begin(self, rows: int) -> None:
        self._s = self._x.new_empty(self._n, rows, *self._shape)

    def put(self, samples: slice, rows: slice, grads: list[Tensor | None]) -> None:
        """Takes gradients [n, r, ...] of some samples and root rows, one per use."""
        target = self._s[samples, rows]
        n, r = target.shape[:2]
        if self._roots.examines:
            self._note_masked(grads, samples)
        s = self._columns.gradients(grads, n, r, samples)
        if not self._stored:
            target.copy_(s)
            return
        groups = self._spec.groups
        s = s.to(self._x.dtype)
        if groups == 1:
            # All rows of a sample share its inputs.
            product = torch.bmm(s.flatten(1, 2), self._x[samples].transpose(1, 2))
            target.copy_(product.view(n, r, -1))
            return
        x = self._x[samples].unflatten(1, (groups, -1)).transpose(2, 3).unsqueeze(1)
        target.copy_(torch.matmul(s.unflatten(2, (groups, -1)), x).flatten(2))

    def _note_masked(self, grads: list[Tensor | None], samples: slice) -> None:
        """Notes whether gradients at masked positions are other than zero."""
        found, name = self._roots.masked_gradients, self._spec.name
        for use, grad in zip(self._uses, grads, strict=True):
            if grad is not None and use.mask is not None:
                columns = _columns_last(self._spec, grad)
                keep = use.mask.on(columns.device)[samples]
                lost = columns.masked_fill(keep[:, None, None, :], 0).any()
                found[name] = found[name] | lost if name in found else lost

    def finish(self) -> SampleRows:
        x = self._x.new_ones(self._n, 1) if self._stored else self._x
        rows = SampleRows(x, self._s, self._stored)
        del self._s
        return rows


def _data_columns(spec: LayerSpec, use: LayerUse, grad: Tensor, samples: slice) -> Tensor:
    """[n, r, m, t] of gradients [n, r, ...] of one use, at its positions that are data."""
    columns = _columns_last(spec, grad)
    return columns if use.mask is None else use.mask.compact(columns, 3, samples)


def _columns_last(spec: LayerSpec, grad: Tensor) -> Tensor:
    """[n, r, m, t] of gradients [n, r, ...] of one use."""
    if spec.kind == "conv":
        return grad.flatten(3)
    if grad.dim() == 3:
        return grad.unsqueeze(3)
    return grad.flatten(2, -2).transpose(2, 3)


def _columns(spec: LayerSpec, use: LayerUse, samples: slice) -> Tensor:
    """[n, d] or [n, d, t] inputs of one use; for a grouped convolution d counts all groups.

    Of a masked use [n, d, t] at the positions that are data, beside zeros.
    """
    x = use.x[samples]
    if spec.kind == "conv":
        columns = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
    else:
        columns = positions_last(spec, x)
    if use.mask is None:
        return columns
    return use.mask.compact(columns if columns.dim() == 3 else columns.unsqueeze(2), 2, samples)
