"""The operators: documented faces of ``torch.ops.hesskern``, their fake kernels, their gradients.

The operators that accumulate covariances add to the *upper triangle* of their accumulator, as BLAS
``syrk`` does; :func:`mirror_` completes the matrix, once per pass. Accumulators are float32 or
float64; inputs may also be bfloat16 or float16 and are accumulated in the accumulator's precision.
No gradient flows through an accumulator: inputs that require grad enter as data, an accumulator
that requires grad is refused, and so is one that shares memory with an input. The plain-torch
references that define every result stand in :mod:`hesskern.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hesskern.ops import extension as _extension

__all__ = [
    "conv_eigen_correction_",
    "conv_input_covariance_",
    "eigen_correction_",
    "from_eigenbasis",
    "grouped_kron_eigen_matmul",
    "grouped_kron_matmul",
    "input_covariance_",
    "kron_eigen_matmul",
    "kron_matmul",
    "layer_hessian_matmul",
    "mirror_",
    "output_hessian_",
    "pack_layer_inputs",
    "sampled_cross_entropy_gradient",
    "to_eigenbasis",
]

_extension.load()
_ops = torch.ops.hesskern


# The gradients below are Python functions, through which the dispatcher would send every call. One
# that records no graph goes past them: on small layers they take longer than the product.
_RECORDED: AbstractContextManager[None] = nullcontext()


def _route(*tensors: Tensor) -> AbstractContextManager[None]:
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    ):
        return _RECORDED
    return torch._C._AutoDispatchBelowAutograd()


def input_covariance_(
    acc: Tensor,
    x: Tensor,
    alpha: float = 1.0,
    ones: bool = False,
    base: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Adds ``alpha * x^T x`` to the upper triangle of ``acc``.

    Args:
        acc: [d, d], or [d + 1, d + 1] with ``ones``; float32 or float64, changed in place.
        x: [N, d]; acc's dtype or a narrower one.
        alpha: factor, e.g. 1/N for a mean.
        ones: append a column of ones to ``x`` (the bias as one more input).
        base: what is added to instead of ``acc``, whose values then do not count: of its shape and
            dtype, in memory of its own. None: ``acc``.
        beta: factor of what is added to; where it is 0, its values do not count, whatever they are.

    Returns:
        ``acc``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _ops.input_covariance_(acc, x, alpha, ones, base, beta)
    return acc


def conv_input_covariance_(
    acc: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    alpha: float = 1.0,
) -> Tensor:
    """Adds ``alpha * sum_n X_n X_n^T`` to the upper triangle of ``acc``, X_n the unfolded sample n.

    The rows of X_n follow :func:`torch.nn.functional.unfold`: channel first, then the kernel's
    offsets, so they match the convolution weight's ``flatten(1)``. No unfolded copy is made.

    Args:
        acc: [C k k, C k k], or [g, C k k / g, C k k / g] with one block per group; float32 or
            float64, changed in place.
        x: [N, C, H, W] or [N, C, L]; acc's dtype or a narrower one. Zero padding.
        kernel_size, stride, padding, dilation: one entry per spatial axis.
        groups: number of groups of the convolution.
        alpha: factor.

    Returns:
        ``acc``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _ops.conv_input_covariance_(
        acc, x, list(kernel_size), list(stride), list(padding), list(dilation), groups, alpha
    )
    return acc


def output_hessian_(
    acc: Tensor,
    jacobian: Tensor,
    probabilities: Tensor | None = None,
    alpha: float = 1.0,
    base: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Adds ``alpha * sum_n M_n`` to the upper triangle of ``acc``.

    With ``probabilities`` p, M_n = sum_t G_nt^T (diag(p_n) - p_n p_n^T) G_nt: the output Hessian of
    softmax cross-entropy (arXiv 2010.04261, section 3), weights and centering fused. Without,
    the rows are roots already: M_n = sum_ct g_nct g_nct^T.

    Args:
        acc: [m, m]; float32 or float64, changed in place.
        jacobian: [N, c, m] or, for layers with t positions, [N, c, m, t].
        probabilities: [N, c], non-negative, each row summing to one.
        alpha: factor, e.g. 1/(N t) for the mean over samples and positions.
        base, beta: what is added to, as in :func:`input_covariance_`.

    Returns:
        ``acc``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _ops.output_hessian_(acc, jacobian, probabilities, alpha, base, beta)
    return acc


def eigen_correction_(
    acc: Tensor,
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    alpha: float = 1.0,
    ones: bool = False,
) -> Tensor:
    """Adds ``alpha * sum_n sum_r (U^T R_nr V)²`` to ``acc``, with ``R_nr = sum_t g_nrt x_nt^T``.

    Squares are of elements: with root rows g and eigenvectors U, V of a layer's Kronecker factors
    this is the diagonal of its Hessian in their basis, which EKFAC corrects the eigenvalues with
    (arXiv 1806.03884, section 4.1). Positions are rotated before they are summed or after, by the
    count of multiplications; beside the arguments a few samples' rows are held, 16 MB of float32
    on a CPU, or one sample's where they take more.

    Args:
        acc: [m, d]; float32 or float64, changed in place, all of it.
        g: [N, r, m] or [N, r, m, t], r root rows per sample; acc's dtype or a narrower one. Views
            of tensors kept [N, r, t, m] are read as they lie.
        x: [N, d] or [N, d, t], as g; with groups [N, groups d] or [N, groups d, t].
        U: [m, m], or [groups, m / groups, m / groups] with one basis per group; acc's dtype.
        V: [d, d], or [groups, d, d]; acc's dtype.
        alpha: factor, e.g. 1/N for a mean.
        ones: append ones to x (the bias as one more input of each group); d counts it.

    Returns:
        ``acc``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _ops.eigen_correction_(acc, g, x, U, V, alpha, ones)
    return acc


def conv_eigen_correction_(
    acc: Tensor,
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    alpha: float = 1.0,
    ones: bool = False,
) -> Tensor:
    """:func:`eigen_correction_` of a convolution: x_nt are the patches of image n.

    Patches follow :func:`torch.nn.functional.unfold`, channel first, then the kernel's offsets. A
    few samples are unfolded at a time at most.

    Args:
        acc: [m, d] with d = C k k / groups; float32 or float64, changed in place, all of it.
        g: [N, r, m, Ho, Wo] or [N, r, m, Lo], r root rows per sample; acc's dtype or a narrower
            one.
        x: [N, C, H, W] or [N, C, L], as g. Zero padding.
        U: [m, m], or [groups, m / groups, m / groups] with one basis per group; acc's dtype.
        V: [d, d], or [groups, d, d]; acc's dtype.
        kernel_size, stride, padding, dilation: one entry per spatial axis.
        groups: number of groups of the convolution.
        alpha: factor.
        ones: append ones to every patch (the bias as one more input of each group); d counts it.

    Returns:
        ``acc``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _ops.conv_eigen_correction_(
        acc,
        g,
        x,
        U,
        V,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        alpha,
        ones,
    )
    return acc


def mirror_(acc: Tensor) -> Tensor:
    """Copies the upper triangle of ``acc`` [d, d] or [g, d, d] to the lower one, in place.

    Returns:
        ``acc``.

    Raises:
        ValueError: ``acc`` is not square, or not float32 or float64.
    """
    _ops.mirror_(acc)
    return acc


def kron_matmul(A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """``A X B^T``: the product of the Kronecker product A (x) B with X, row-major. Differentiable.

    Args:
        A: [m', m].
        B: [d', d].
        X: [m, d] or a block [k, m, d]; all of one floating dtype.

    Returns:
        [m', d'] or [k, m', d'].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    with _route(A, B, X):
        return _ops.kron_matmul(A, B, X)


def grouped_kron_matmul(
    A: Sequence[Tensor], B: Sequence[Tensor], X: Sequence[Tensor]
) -> list[Tensor]:
    """:func:`kron_matmul` for a list of layers in one call: ``[A_i X_i B_i^T]``. Differentiable.

    Small layers share the threads instead of taking turns.

    Args:
        A: per layer [m_i', m_i].
        B: per layer [d_i', d_i].
        X: per layer [m_i, d_i] or [k, m_i, d_i].

    Returns:
        Per layer [m_i', d_i'] or [k, m_i', d_i']; an empty list for empty lists.

    Raises:
        ValueError: list lengths, shapes, dtypes or devices do not fit.
    """
    arguments = list(A), list(B), list(X)
    # The dispatcher finds no kernel without a tensor.
    if not any(arguments):
        return []
    with _route(*chain(*arguments)):
        return _ops.grouped_kron_matmul(*arguments)


def kron_eigen_matmul(U: Tensor, S: Tensor, V: Tensor, X: Tensor) -> Tensor:
    """``U (S . (U^T X V)) V^T``: X scaled by S in the Kronecker eigenbasis. Differentiable.

    With eigenvectors U, V and S an outer product of functions of the eigenvalues this is any power,
    inverse or root of a Kronecker product; with another S it is an eigenvalue-corrected one.

    Args:
        U: [m, r], orthonormal columns.
        S: [r, q].
        V: [d, q], orthonormal columns.
        X: [m, d] or [k, m, d].

    Returns:
        The shape of ``X``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    with _route(U, S, V, X):
        return _ops.kron_eigen_matmul(U, S, V, X)


def grouped_kron_eigen_matmul(
    U: Sequence[Tensor], S: Sequence[Tensor], V: Sequence[Tensor], X: Sequence[Tensor]
) -> list[Tensor]:
    """:func:`kron_eigen_matmul` for a list of layers in one call. Differentiable.

    Args:
        U, S, V, X: per layer, as in :func:`kron_eigen_matmul`.

    Returns:
        Per layer the shape of X; an empty list for empty lists.

    Raises:
        ValueError: list lengths, shapes, dtypes or devices do not fit.
    """
    arguments = list(U), list(S), list(V), list(X)
    if not any(arguments):
        return []
    with _route(*chain(*arguments)):
        return _ops.grouped_kron_eigen_matmul(*arguments)


def to_eigenbasis(U: Tensor, V: Tensor, X: Tensor) -> Tensor:
    """``U^T X V``: coordinates in the basis U (x) V. Differentiable.

    Args:
        U: [m, r], orthonormal columns.
        V: [d, q], orthonormal columns.
        X: [m, d] or [k, m, d]; all of one floating dtype.

    Returns:
        [r, q] or [k, r, q].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _check_bases("to_eigenbasis", U, V, "X", X, ("m", "d"), axis=0)
    return kron_matmul(U.t(), V.t(), X)


def from_eigenbasis(U: Tensor, V: Tensor, Y: Tensor) -> Tensor:
    """``U Y V^T``: back from coordinates in the basis U (x) V. Differentiable.

    Args:
        U: [m, r], orthonormal columns.
        V: [d, q], orthonormal columns.
        Y: [r, q] or [k, r, q]; all of one floating dtype.

    Returns:
        [m, d] or [k, m, d].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    _check_bases("from_eigenbasis", U, V, "Y", Y, ("r", "q"), axis=1)
    return kron_matmul(U, V, Y)


def _check_bases(
    op: str, U: Tensor, V: Tensor, name: str, X: Tensor, sizes: tuple[str, str], axis: int
) -> None:
    """Errors in the names of U, V and X rather than in those of the product behind them."""
    if U.dim() != 2:
        raise ValueError(f"{op}: U must be [m, r], got {list(U.shape)}")
    if V.dim() != 2:
        raise ValueError(f"{op}: V must be [d, q], got {list(V.shape)}")
    first, second = sizes
    if X.dim() not in (2, 3):
        raise ValueError(
            f"{op}: {name} must be [{first}, {second}] or [k, {first}, {second}], "
            f"got {list(X.shape)}"
        )
    expected = (U.shape[axis], V.shape[axis])
    if tuple(X.shape[-2:]) != expected:
        raise ValueError(
            f"{op}: {name} must end in [{first}, {second}] = {list(expected)} for "
            f"U {list(U.shape)} and V {list(V.shape)}, got {list(X.shape)}"
        )
    if not X.is_floating_point():
        raise ValueError(f"{op}: {name} must be a floating-point tensor, got {X.dtype}")
    for basis, tensor in (("U", U), ("V", V)):
        if tensor.dtype != X.dtype:
            raise ValueError(f"{op}: {basis} is {tensor.dtype} but {name} is {X.dtype}")
    _check_devices(op, **{"U": U, "V": V, name: X})


def layer_hessian_matmul(
    x: Tensor, s: Tensor, V: Tensor, alpha: float = 1.0, packed: Tensor | None = None
) -> Tensor:
    """``alpha * sum_n sum_c <V, R_nc> R_nc`` with ``R_nc = sum_t s_nct x_nt^T``.

    With s the rows of Q G (see :func:`output_hessian_`) and alpha = 1/N this is the exact
    layer-wise Hessian E[M (x) x x^T] times V. Nothing of size [N, m] is kept in memory.
    Differentiable in V, not in x and s.

    Args:
        x: [N, d] or [N, d, t]; float32 or float64.
        s: [N, c, m] or [N, c, m, t].
        V: [m, d] or a block [k, m, d].
        alpha: factor.
        packed: int32, what :func:`pack_layer_inputs` made of this x, which has not changed since;
            the result is the same to the last bit, and sooner there. [0] or None: nothing.

    Returns:
        The shape of ``V``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
        NotImplementedError: in the backward pass, when x or s requires grad.
    """
    with _route(x, s, V):
        return _ops.layer_hessian_matmul(x, s, V, alpha, packed)


def pack_layer_inputs(x: Tensor, columns: int) -> Tensor:
    """x in the form that :func:`layer_hessian_matmul` multiplies, for many products with one x.

    On a GPU of compute capability 9.0 large float32 products take x as two scaled float16. That is
    most of what a product reads and writes; made once, it takes the memory of x once more.

    Args:
        x: [N, d] or [N, d, t]; float32 or float64.
        columns: k m of the products' V [k, m, d], or m of V [m, d]; other products may be passed
            the result as well.

    Returns:
        int32, flat, for the argument ``packed``; [0] on other devices, for float64, and where a
        product with so many columns would not use it.

    Raises:
        ValueError: x has other axes or another dtype, or columns is negative.
    """
    with _route(x):
        return _ops.pack_layer_inputs(x, columns)


def sampled_cross_entropy_gradient(
    logits: Tensor,
    uniform: Tensor,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    terms: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """``alpha / sqrt(terms_n) * (p_nt - e_k)``, p = softmax(logits), for a class k drawn from p_nt.

    The gradient of softmax cross-entropy in its logits at a class drawn from the model; its outer
    products have the mean ``alpha^2 / terms_n * (diag(p) - p p^T)``. k is the first class at which
    the sum of p, in the order of the classes and taken in float64, passes ``uniform``; a class of
    probability zero is never drawn. The logits are data: no gradient flows through them.

    Args:
        logits: [N, c] or [N, c, t]; float32, float64, bfloat16 or float16. One that is NaN or
            infinite makes its token's row NaN; minus infinity is a class of probability zero.
        uniform: [N t] float64, from [0, 1), those of a sample's tokens one after another. Their
            steps, 2^-53 of torch.rand, are what rare classes' frequencies are rounded to.
        targets: [N] or [N, t] int64. Tokens whose target is ``ignore_index`` get zeros, whatever
            their logits; no other value matters. None: there is none.
        ignore_index: see ``targets``.
        terms: [N] int64, positive; None: ones.
        alpha: factor.

    Returns:
        The shape, dtype and, where they leave no gaps, the strides of ``logits``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the argument.
    """
    with _route():
        return _ops.sampled_cross_entropy_gradient(
            logits.detach() if torch.compiler.is_compiling() else logits,
            uniform,
            targets,
            ignore_index,
            terms,
            alpha,
        )


# A call with one meta tensor runs the fake kernel: without these checks it would do nothing, and
# say nothing.
def _check_devices(op: str, **tensors: Tensor | None) -> None:
    (first_name, first), *rest = ((n, t) for n, t in tensors.items() if t is not None)
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {first_name} is on {first.device} but {name} is on {tensor.device}"
            )


@torch.library.register_fake("hesskern::input_covariance_")
def _(
    acc: Tensor,
    x: Tensor,
    alpha: float = 1.0,
    ones: bool = False,
    base: Tensor | None = None,
    beta: float = 1.0,
) -> None:
    _check_devices("input_covariance_", acc=acc, x=x, base=base)


@torch.library.register_fake("hesskern::conv_input_covariance_")
def _(acc: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    _check_devices("conv_input_covariance_", acc=acc, x=x)


@torch.library.register_fake("hesskern::output_hessian_")
def _(
    acc: Tensor,
    jacobian: Tensor,
    probabilities: Tensor | None = None,
    alpha: float = 1.0,
    base: Tensor | None = None,
    beta: float = 1.0,
) -> None:
    _check_devices(
        "output_hessian_", acc=acc, jacobian=jacobian, probabilities=probabilities, base=base
    )


@torch.library.register_fake("hesskern::eigen_correction_")
def _(acc: Tensor, g: Tensor, x: Tensor, U: Tensor, V: Tensor, *_: Any, **__: Any) -> None:
    _check_devices("eigen_correction_", acc=acc, g=g, x=x, U=U, V=V)


@torch.library.register_fake("hesskern::conv_eigen_correction_")
def _(acc: Tensor, g: Tensor, x: Tensor, U: Tensor, V: Tensor, *_: Any, **__: Any) -> None:
    _check_devices("conv_eigen_correction_", acc=acc, g=g, x=x, U=U, V=V)


@torch.library.register_fake("hesskern::mirror_")
def _(acc: Tensor) -> None:
    return None


@torch.library.register_fake("hesskern::kron_matmul")
def _(A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    _check_devices("kron_matmul", A=A, B=B, X=X)
    return X.new_empty((*X.shape[:-2], A.shape[0], B.shape[0]))


@torch.library.register_fake("hesskern::grouped_kron_matmul")
def _(A: list[Tensor], B: list[Tensor], X: list[Tensor]) -> list[Tensor]:
    for i, (a, b, x) in enumerate(zip(A, B, X, strict=True)):
        _check_devices(f"grouped_kron_matmul[{i}]", A=a, B=b, X=x)
    return [
        x.new_empty((*x.shape[:-2], a.shape[0], b.shape[0]))
        for a, b, x in zip(A, B, X, strict=True)
    ]


@torch.library.register_fake("hesskern::kron_eigen_matmul")
def _(U: Tensor, S: Tensor, V: Tensor, X: Tensor) -> Tensor:
    _check_devices("kron_eigen_matmul", U=U, S=S, V=V, X=X)
    return X.new_empty(X.shape)


@torch.library.register_fake("hesskern::grouped_kron_eigen_matmul")
def _(U: list[Tensor], S: list[Tensor], V: list[Tensor], X: list[Tensor]) -> list[Tensor]:
    for i, (u, s, v, x) in enumerate(zip(U, S, V, X, strict=True)):
        _check_devices(f"grouped_kron_eigen_matmul[{i}]", U=u, S=s, V=v, X=x)
    return [x.new_empty(x.shape) for x in X]


@torch.library.register_fake("hesskern::layer_hessian_matmul")
def _(x: Tensor, s: Tensor, V: Tensor, alpha: float = 1.0, packed: Tensor | None = None) -> Tensor:
    _check_devices("layer_hessian_matmul", x=x, s=s, V=V, packed=packed)
    return V.new_empty(V.shape)


@torch.library.register_fake("hesskern::pack_layer_inputs")
def _(x: Tensor, columns: int) -> Tensor:
    # What a GPU can do decides, which no shape tells.
    size = torch.library.get_ctx().new_dynamic_size() if x.device.type == "cuda" else 0
    return x.new_empty((size,), dtype=torch.int32)


@torch.library.register_fake("hesskern::sampled_cross_entropy_gradient")
def _(
    logits: Tensor,
    uniform: Tensor,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    terms: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    _check_devices(
        "sampled_cross_entropy_gradient",
        logits=logits,
        uniform=uniform,
        targets=targets,
        terms=terms,
    )
    return torch.empty_like(logits)


# Gradients are written with the differentiable operators themselves, so that
# they can be differentiated again.


def _sum_block(per_vector: Tensor) -> Tensor:
    return per_vector.sum(0) if per_vector.dim() == 3 else per_vector


def _kron_factor_gradients(
    need: Sequence[bool], A: Tensor, B: Tensor, X: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``A X B^T`` with respect to A and B."""
    grad_a = _sum_block(grad @ B @ X.mT) if need[0] else None
    grad_b = _sum_block(grad.mT @ A @ X) if need[1] else None
    return grad_a, grad_b


def _eigen_factor_gradients(
    need: Sequence[bool], U: Tensor, S: Tensor, V: Tensor, X: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``U (S . (U^T X V)) V^T`` with respect to U, S and V."""
    grad_u = grad_s = grad_v = None
    if any(need[:3]):
        x_rotated, grad_rotated = to_eigenbasis(U, V, X), to_eigenbasis(U, V, grad)
        if need[0]:
            grad_u = _sum_block(grad @ V @ (S * x_rotated).mT + X @ V @ (S * grad_rotated).mT)
        if need[1]:
            grad_s = _sum_block(x_rotated * grad_rotated)
        if need[2]:
            grad_v = _sum_block(grad.mT @ U @ (S * x_rotated) + X.mT @ U @ (S * grad_rotated))
    return grad_u, grad_s, grad_v


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _save_grouped_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.layers = len(inputs[0])
    ctx.save_for_backward(*(tensor for argument in inputs for tensor in argument))


def _kron_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    A, B, X = ctx.saved_tensors
    grad_x = kron_matmul(A.t(), B.t(), grad) if ctx.needs_input_grad[2] else None
    return *_kron_factor_gradients(ctx.needs_input_grad, A, B, X, grad), grad_x


def _eigen_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    U, S, V, X = ctx.saved_tensors
    grad_x = kron_eigen_matmul(U, S, V, grad) if ctx.needs_input_grad[3] else None
    return *_eigen_factor_gradients(ctx.needs_input_grad, U, S, V, X, grad), grad_x


def _grouped_backward(factor_gradients: Any, transposed_product: Any) -> Any:
    def backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], ...]:
        layers, saved = ctx.layers, ctx.saved_tensors
        arguments = [saved[i * layers : (i + 1) * layers] for i in range(len(saved) // layers)]
        *factors, inputs = arguments
        # The inputs' gradients are a product of the same kind: one call for all that need it.
        needed = [i for i in range(layers) if inputs[i].requires_grad]
        products = transposed_product(
            *([factor[i] for i in needed] for factor in factors), [grads[i] for i in needed]
        )
        input_gradients: list[Tensor | None] = [None] * layers
        for i, product in zip(needed, products, strict=True):
            input_gradients[i] = product
        per_layer = [
            factor_gradients(
                tuple(argument[i].requires_grad for argument in arguments),
                *(argument[i] for argument in arguments),
                grads[i],
            )
            for i in range(layers)
        ]
        return *(list(column) for column in zip(*per_layer, strict=True)), input_gradients

    return backward


def _transposed_kron_matmul(
    A: Sequence[Tensor], B: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    return grouped_kron_matmul([a.t() for a in A], [b.t() for b in B], grads)


def _save_layer_hessian(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, s, _, ctx.alpha, packed = inputs
    ctx.save_for_backward(x, s, packed)


def _layer_hessian_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for name, needed in zip(("x", "s"), ctx.needs_input_grad, strict=False):
        if needed:
            raise NotImplementedError(
                f"layer_hessian_matmul has a gradient for V alone, but {name} requires grad; "
                f"pass {name}.detach()"
            )
    # The matrix is symmetric: its transpose is itself.
    x, s, packed = ctx.saved_tensors
    return None, None, layer_hessian_matmul(x, s, grad, ctx.alpha, packed), None, None


torch.library.register_autograd(
    "hesskern::layer_hessian_matmul", _layer_hessian_backward, setup_context=_save_layer_hessian
)
torch.library.register_autograd("hesskern::kron_matmul", _kron_backward, setup_context=_save_inputs)
torch.library.register_autograd(
    "hesskern::kron_eigen_matmul", _eigen_backward, setup_context=_save_inputs
)
torch.library.register_autograd(
    "hesskern::grouped_kron_matmul",
    _grouped_backward(_kron_factor_gradients, _transposed_kron_matmul),
    setup_context=_save_grouped_inputs,
)
torch.library.register_autograd(
    "hesskern::grouped_kron_eigen_matmul",
    _grouped_backward(_eigen_factor_gradients, grouped_kron_eigen_matmul),
    setup_context=_save_grouped_inputs,
)
