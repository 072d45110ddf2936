"""Curvature of neural-network layers: Kronecker factors, exact layer-wise Hessians, eigenspaces."""

from hesskern import ops, pacbayes
from hesskern._extension import build_info
from hesskern.accumulate import FactorAccumulator
from hesskern.eigen import eigsh
from hesskern.factors import Factors, LayerFactors, kronecker_factors, load_factors
from hesskern.layer_hessian import LayerHessian, layer_hessians
from hesskern.metrics import (
    Correspondence,
    DecouplingError,
    InputAutocorrelation,
    decoupling_error,
    eigenvector_correspondence,
    input_autocorrelation,
    rank_one_ratio,
    subspace_overlap,
)
from hesskern.nearest import nearest_kronecker
from hesskern.operators import AutogradHessian, CurvatureOperator, KroneckerOperator
from hesskern.results import EigenResult

__version__ = "0.1.0"

__all__ = [
    "AutogradHessian",
    "Correspondence",
    "CurvatureOperator",
    "DecouplingError",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "InputAutocorrelation",
    "KroneckerOperator",
    "LayerFactors",
    "LayerHessian",
    "build_info",
    "decoupling_error",
    "eigenvector_correspondence",
    "eigsh",
    "input_autocorrelation",
    "kronecker_factors",
    "layer_hessians",
    "load_factors",
    "nearest_kronecker",
    "ops",
    "pacbayes",
    "rank_one_ratio",
    "subspace_overlap",
]
