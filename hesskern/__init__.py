"""Curvature of neural-network layers: Kronecker factors, exact layer-wise Hessians, eigenspaces."""

from hesskern import ops
from hesskern._extension import build_info
from hesskern.accumulate import FactorAccumulator
from hesskern.factors import Factors, LayerFactors, kronecker_factors, load_factors
from hesskern.layer_hessian import LayerHessian, layer_hessians
from hesskern.operators import AutogradHessian, CurvatureOperator, KroneckerOperator
from hesskern.results import EigenResult

__version__ = "0.1.0"

__all__ = [
    "AutogradHessian",
    "CurvatureOperator",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "KroneckerOperator",
    "LayerFactors",
    "LayerHessian",
    "build_info",
    "kronecker_factors",
    "layer_hessians",
    "load_factors",
    "ops",
]
