"""Whether everything after a layer is piecewise linear, read off the autograd graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from hesskern.graph.nodes import kind

__all__ = ["layers_followed_by_smooth"]

# Operations that are linear or piecewise linear in all their differentiable operands together. The
# names are those of autograd's nodes without "Backward" and the trailing number. What is not here
# counts as smooth, so an unknown operation can only make the answer more careful. CopySlices (an
# in-place operation on a view) is left out on purpose: it hides which operation that was.
_LINEAR = frozenset(
    (
        "Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax"
        " Amin Aminmax AsStrided AvgPool2D AvgPool3D Cat Ceil ChannelShuffle Clamp ClampMax"
        " ClampMin Clone Col2Im ConstantPadNd Copy CopyBackwards Cummax Cummin Cumsum Detach Diag"
        " DiagEmbed Diagonal Expand Fill Flip Floor Frac FractionalMaxPool2D Gather Hardshrink"
        " Hardsigmoid Hardtanh Im2Col Index IndexAdd IndexCopy IndexFill IndexPut IndexSelect"
        " Kthvalue LeakyRelu LiftFresh MaskedFill MaskedScatter MaskedSelect Max MaxPool2D"
        " MaxPool2DWithIndices MaxPool3DWithIndices MaxUnpool2D Maximum Mean Median Min Minimum"
        " MkldnnMaxPool2D Mode NanToNum Nanmedian Nansum NativeChannelShuffle Neg Permute"
        " PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat"
        " ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Round"
        " RreluWithNoise Rsub Scatter ScatterAdd Select SelectScatter Sgn Sign Slice SliceScatter"
        " Softshrink Sort Split SplitWithSizes Squeeze Stack Sub Sum T Take Threshold ToCopy Topk"
        " Trace Transpose Tril Triu Trunc Unbind Unfold UnsafeSplit UnsafeSplitWithSizes"
        " UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D"
        " UpsampleBilinear2DAa UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D"
        " UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D"
        " UpsampleTrilinear3D View Where Zero"
    ).split()
)

# Linear in each operand: linear in a layer as long as only one of them depends on it.
_BILINEAR = frozenset(
    (
        "Addbmm Addcmul Addmm Addmv Addr Baddbmm Bmm Convolution ConvolutionOverrideable"
        " CudnnBatchNorm CudnnConvolution CudnnConvolutionTranspose Div Dot GridSampler2D"
        " GridSampler3D Lerp Linear MiopenBatchNorm MkldnnConvolution MkldnnLinear Mm Mul Mv"
        " NativeBatchNorm Prelu PreluKernel SlowConv2D ThnnConv2D Vdot"
    ).split()
)

# Of these only the first operand may depend on it.
_LINEAR_IN_FIRST = frozenset(("Div", "GridSampler2D", "GridSampler3D"))


def _takes_complex(node: Any) -> bool:
    """Whether an operand is complex: its absolute value is no piecewise linear function."""
    return any(
        parent is not None and parent._input_metadata[number].dtype.is_complex
        for parent, number in node.next_functions
    )


def _curved(node: Any, operands: list[int]) -> int:
    """Layers in which an operation is not piecewise linear; sets of layers are bit masks.

    Args:
        node: of the graph.
        operands: per operand, the layers that it depends on.
    """
    everything = 0
    several = 0
    for mask in operands:
        several |= everything & mask
        everything |= mask
    if isinstance(node, BackwardCFunction):
        # A torch.autograd.Function says so itself; its name says nothing.
        function = getattr(node, "_forward_cls", None)
        return 0 if getattr(function, "piecewise_linear", False) else everything
    name = kind(node)
    if name in ("Abs", "Sgn") and _takes_complex(node):
        return everything
    if name in _LINEAR:
        return 0
    # In training mode it normalizes by statistics of the data itself (so does instance norm).
    if name not in _BILINEAR or getattr(node, "_saved_training", False):
        return everything
    if name in _LINEAR_IN_FIRST:
        for mask in operands[1:]:
            several |= mask
    return several


def layers_followed_by_smooth(
    outputs: Tensor, edges: dict[str, list[GradientEdge]]
) -> dict[str, str]:
    """Layers with an operation after them that is not piecewise linear in what they put out.

    Args:
        outputs: [N, ...] the model's outputs, with their graph.
        edges: per layer, where the gradients of its outputs arrive.

    Returns:
        the name of such an operation for every such layer.
    """
    if outputs.grad_fn is None:
        return {}
    names = list(edges)
    bits: dict[Any, int] = {}
    for index, name in enumerate(names):
        for edge in edges[name]:
            bits[edge.node] = bits.get(edge.node, 0) | 1 << index
    # depends[node]: the layers that the node's outputs depend on; parents come first.
    depends: dict[Any, int] = {}
    curved: dict[int, str] = {}
    pending = [outputs.grad_fn]
    while pending:
        node = pending[-1]
        parents = [parent for parent, _ in node.next_functions]
        missing = [p for p in parents if p is not None and p not in depends]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if node in depends:
            continue
        operands = [0 if parent is None else depends[parent] for parent in parents]
        total = bits.get(node, 0)
        for mask in operands:
            total |= mask
        depends[node] = total
        rest = _curved(node, operands)
        while rest:
            lowest = rest & -rest
            curved.setdefault(lowest, kind(node))
            rest ^= lowest
    return {names[bit.bit_length() - 1]: operation for bit, operation in curved.items()}
