"""Whether everything after a layer is piecewise linear, read off the autograd graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["layers_followed_by_smooth"]

# Operations that are linear or piecewise linear in their differentiable operand. The names are
# those of autograd's nodes without "Backward" and the trailing number. What is not here counts as
# smooth, so an unknown operation can only make the answer more careful.
_LINEAR = frozenset(
    (
        "Abs AdaptiveAvgPool2D AdaptiveAvgPool1D AdaptiveMaxPool1D AdaptiveMaxPool2D Alias"
        " AsStrided AvgPool2D AvgPool1D AvgPool3D Cat Chunk Clamp ClampMax ClampMin Clone Constant"
        " Pad ConstantPadNd Copy CopySlices Cudnn Cumsum Detach Diagonal Expand Flip Gather"
        " Hardtanh HardtanhBackward Index IndexSelect LeakyRelu MaskedFill MaskedSelect Max"
        " MaxPool2DWithIndices MaxPool2DWithIndicesBackward MaxPool3DWithIndices Mean Min Mkldnn"
        " Narrow Neg Permute PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D Relu Relu6"
        " Repeat ReplicationPad1D ReplicationPad2D Reshape ReshapeAlias Roll Select Slice Split"
        " SplitWithSizes Squeeze Stack Sub Sum SumBackward T Threshold ToCopy Transpose Unbind"
        " Unfold Im2Col Unsqueeze UnsafeSplit UnsafeView UpsampleNearest1D UpsampleNearest2D"
        " UpsampleBilinear2D View Add Rsub Rrelu RreluWithNoise Hardshrink Softshrink Trace Tril"
        " Triu MaxPool1D Where Identity ReluBackward Amax Amin Maximum Minimum"
    ).split()
)

# Linear in each operand: linear as long as only one of them depends on a layer.
_BILINEAR = frozenset(
    (
        "Addmm Addmv Addbmm Baddbmm Bmm Mm Mv Dot Mul Div Convolution ConvolutionOverrideable"
        " MkldnnConvolution CudnnConvolution ThnnConv2D SlowConv2D Linear MkldnnLinear Prelu"
        " PreluKernel NativeBatchNorm CudnnBatchNorm MiopenBatchNorm Addcmul Lerp"
    ).split()
)


def _kind(node: Any) -> str:
    name = type(node).__name__
    return name.rstrip("0123456789").removesuffix("Backward")


def _is_piecewise_linear(node: Any) -> bool:
    kind = _kind(node)
    if kind in _LINEAR:
        return True
    if kind not in _BILINEAR:
        return kind == "_Root"
    operands = [parent for parent, _ in node.next_functions if parent is not None]
    if kind == "Div" and node.next_functions and len(node.next_functions) > 1:
        # Linear in the numerator alone.
        return node.next_functions[1][0] is None
    return len(operands) <= 1


def layers_followed_by_smooth(
    outputs: Tensor, edges: dict[str, list[GradientEdge]]
) -> dict[str, str]:
    """Layers with an operation after them that is not piecewise linear.

    Args:
        outputs: [N, ...] the model's outputs, with their graph.
        edges: per layer, where the gradients of its outputs arrive.

    Returns:
        the name of such an operation for every such layer.
    """
    root = outputs.grad_fn
    if root is None:
        return {}
    # smooth[node]: an operation between the outputs and the node, exclusive of the node.
    smooth: dict[Any, str | None] = {root: None}
    pending = [root]
    while pending:
        node = pending.pop()
        below = smooth[node]
        if below is None and not _is_piecewise_linear(node):
            below = _kind(node)
        for parent, _ in node.next_functions:
            # A node is looked at again only when the answer for it changes, at most once.
            if parent is not None and (
                parent not in smooth or (smooth[parent] is None and below is not None)
            ):
                smooth[parent] = below
                pending.append(parent)
    found: dict[str, str] = {}
    for name, layer in edges.items():
        for edge in layer:
            operation = smooth.get(edge.node)
            if operation is not None:
                found[name] = operation
    return found
