"""By the names of operations, where samples are before them."""

from __future__ import annotations

from hesskern.graph.sample_layout import (
    along,
    as_strided,
    elementwise,
    over_axes,
    padding,
    permuted,
    reduction,
    reshaped,
    selected_axis,
    stack,
)
from hesskern.graph.sample_products import (
    added_batched_product,
    attention,
    batch_norm,
    batched_product,
    first_axis,
    grouped_rows,
    images,
    layer_norm,
    linear,
    row_product,
)
from hesskern.graph.sample_selections import (
    concatenation,
    gather,
    index_add,
    index_select,
    indexed,
    put,
    scatter,
    sliced,
    split,
)
from hesskern.graph.sample_step import Rule

__all__ = ["PRODUCTS", "RULES", "STEADY"]


RULES: dict[str, Rule] = {
    "Addmm": row_product,
    "AsStrided": as_strided,
    "Baddbmm": added_batched_product,
    "Bmm": batched_product,
    "Cat": concatenation,
    "ConstantPadNd": padding,
    "Convolution": first_axis,
    "CudnnBatchNorm": batch_norm,
    "Cumsum": along("_saved_dim"),
    "Expand": elementwise,
    "FusedRmsNorm": layer_norm,
    "Flip": over_axes("_saved_dims"),
    "Glu": along("_saved_dim"),
    "Gather": gather,
    "GroupedMm": grouped_rows,
    "Index": indexed,
    "IndexAdd": index_add,
    "IndexCopy": index_add,
    "IndexPut": put,
    "IndexSelect": index_select,
    "Linear": linear,
    "LogSoftmax": along("_saved_dim"),
    "Mm": row_product,
    "NativeBatchNorm": batch_norm,
    "NativeGroupNorm": first_axis,
    "NativeLayerNorm": layer_norm,
    "Roll": over_axes("_saved_dims"),
    "ScaledDotProductCudnnAttention": attention,
    "ScaledDotProductEfficientAttention": attention,
    "ScaledDotProductFlashAttention": attention,
    "ScaledDotProductFlashAttentionForCpu": attention,
    "SafeSoftmax": along("_saved_dim"),
    "Scatter": scatter,
    "ScatterAdd": scatter,
    "Select": selected_axis,
    "Slice": sliced,
    "Softmax": along("_saved_dim"),
    "Sort": along("_saved_dim"),
    "Split": split,
    "SplitWithSizes": split,
    "Stack": stack,
    "Topk": along("_saved_dim"),
    "Unbind": selected_axis,
}
RULES.update(dict.fromkeys(("Permute", "T", "Transpose"), permuted))
RULES.update(dict.fromkeys("ReshapeAlias Squeeze UnsafeView Unsqueeze View".split(), reshaped))
RULES.update(
    dict.fromkeys(
        (
            "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Norm Prod Std"
            " Sum Var"
        ).split(),
        reduction,
    )
)
RULES.update(
    dict.fromkeys(
        (
            "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices MaxUnpool2D"
            " ReflectionPad2D ReplicationPad2D UpsampleBicubic2D UpsampleBilinear2D"
            " UpsampleNearest2D"
        ).split(),
        images,
    )
)
RULES.update(
    dict.fromkeys(
        (
            "Abs Add Addcdiv Addcmul Alias Celu Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp"
            " Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid"
            " MaskedFill Maximum Minimum Mish Mul Neg Pow PreluKernel Reciprocal Relu Rsqrt Rsub"
            " Sigmoid Silu Sin Softplus Softshrink Sqrt Sub Tanh Threshold ToCopy Where"
        ).split(),
        elementwise,
    )
)

# Calls by which a matrix acts on every row alone, whatever the values.
PRODUCTS = frozenset("Addmm Bmm Convolution GroupedMm Linear Mm".split())

# Where samples are not known to be, these cannot move or mix rows in another way in another batch
# of the same shapes. All others can: by a mask, a gate, an adjacency, a list of numbers.
STEADY = frozenset(
    (
        "Abs Alias AsStrided Celu Clamp Clone Convolution CudnnRnn Elu Exp Expand FusedRmsNorm"
        " Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid Mean Mish MkldnnRnnLayer"
        " NativeLayerNorm Neg Permute PixelShuffle PixelUnshuffle Relu ReshapeAlias Select"
        " Sigmoid Silu Slice Softplus Split SplitWithSizes Squeeze Stack T Tanh ThnnFusedGruCell"
        " ThnnFusedLstmCell ToCopy Transpose Trilinear Unbind Unfold UnsafeView Unsqueeze View"
    ).split()
)
