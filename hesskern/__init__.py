"""Curvature of neural-network layers: Kronecker factors, exact layer-wise Hessians, eigenspaces."""

from hesskern import ops, pacbayes
from hesskern._extension import build_info
from hesskern.accumulate import FactorAccumulator
from hesskern.centring import centre_inputs
from hesskern.clustering import GradientClusters, gradient_clusters
from hesskern.compute import kronecker_factors
from hesskern.corrected import CorrectedOperator, eigenvalue_corrected
from hesskern.eigen import eigsh
from hesskern.factors import Factors, LayerFactors, load_factors
from hesskern.functional import functional_share
from hesskern.gauss_newton import GaussNewton
from hesskern.layer_hessian import LayerHessian, LayerHessians, layer_hessians
from hesskern.metrics import (
    Correspondence,
    DecouplingError,
    InputAutocorrelation,
    decoupling_error,
    eigenvector_correspondence,
    input_autocorrelation,
    rank_one_ratio,
    singular_values,
    subspace_overlap,
)
from hesskern.nearest import nearest_kronecker
from hesskern.operators import AutogradHessian, CurvatureOperator, KroneckerOperator
from hesskern.output_space import (
    RowSpaceOverlap,
    closed_form_output_hessian,
    row_space_overlap,
    weight_product,
)
from hesskern.position_mean import PositionMeanHessian, position_mean_hessian
from hesskern.predictor import OverlapPrediction, classify_peak, predict_overlap
from hesskern.results import EigenResult
from hesskern.spectrum import SpectralDensity, TraceEstimate, hutchpp_trace, spectral_density
from hesskern.stacked import StackedGaussNewton
from hesskern.version import __version__ as __version__

__all__ = [
    "AutogradHessian",
    "CorrectedOperator",
    "Correspondence",
    "CurvatureOperator",
    "DecouplingError",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "GaussNewton",
    "GradientClusters",
    "InputAutocorrelation",
    "KroneckerOperator",
    "LayerFactors",
    "LayerHessian",
    "LayerHessians",
    "OverlapPrediction",
    "PositionMeanHessian",
    "RowSpaceOverlap",
    "SpectralDensity",
    "StackedGaussNewton",
    "TraceEstimate",
    "build_info",
    "centre_inputs",
    "classify_peak",
    "closed_form_output_hessian",
    "decoupling_error",
    "eigenvalue_corrected",
    "eigenvector_correspondence",
    "eigsh",
    "functional_share",
    "gradient_clusters",
    "hutchpp_trace",
    "input_autocorrelation",
    "kronecker_factors",
    "layer_hessians",
    "load_factors",
    "nearest_kronecker",
    "ops",
    "pacbayes",
    "position_mean_hessian",
    "predict_overlap",
    "rank_one_ratio",
    "row_space_overlap",
    "singular_values",
    "spectral_density",
    "subspace_overlap",
    "weight_product",
]
