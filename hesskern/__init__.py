"""Curvature of neural-network layers: Kronecker factors, exact layer-wise Hessians, eigenspaces."""

from hesskern import ops, optim, pacbayes
from hesskern.attribution.influence import influence
from hesskern.attribution.result import Influence, load_influence
from hesskern.diagnostics.centring import centre_inputs
from hesskern.diagnostics.clustering import GradientClusters, gradient_clusters
from hesskern.diagnostics.functional import functional_share
from hesskern.diagnostics.metrics import (
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
from hesskern.diagnostics.output_space import (
    RowSpaceOverlap,
    closed_form_output_hessian,
    row_space_overlap,
    weight_product,
)
from hesskern.diagnostics.predictor import OverlapPrediction, classify_peak, predict_overlap
from hesskern.factors.accumulator import FactorAccumulator
from hesskern.factors.addition import add_factors
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.compute_ekfac import ekfac
from hesskern.factors.compute_inputs import input_covariances
from hesskern.factors.ekfac import EKFAC, load_ekfac
from hesskern.factors.input_covariances import (
    InputCovariances,
    LayerInputs,
    load_input_covariances,
)
from hesskern.factors.large_layers import LargeLayerFactors
from hesskern.factors.result import Factors, LayerFactors, load_factors
from hesskern.operators.autograd import AutogradHessian
from hesskern.operators.base import CurvatureOperator, SumOperator
from hesskern.operators.corrected import CorrectedOperator, eigenvalue_corrected
from hesskern.operators.diagonal_kronecker import DiagonalKroneckerOperator
from hesskern.operators.gauss_newton import GaussNewton
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.operators.layer_hessian import LayerHessian, LayerHessians, layer_hessians
from hesskern.operators.nearest import nearest_kronecker
from hesskern.operators.network import NetworkOperator
from hesskern.operators.position_mean import PositionMeanHessian, position_mean_hessian
from hesskern.operators.stacked import StackedGaussNewton
from hesskern.ops.extension import build_info
from hesskern.parallel.statuses import RankError
from hesskern.passes.transformers import (
    CausalLM,
    ImageClassification,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassification,
    TokenClassification,
)
from hesskern.planning.compute import plan
from hesskern.planning.result import LayerPlan, Plan
from hesskern.solvers.eigsh import eigsh
from hesskern.solvers.result import EigenResult
from hesskern.solvers.spectrum import (
    SpectralDensity,
    TraceEstimate,
    hutchpp_trace,
    spectral_density,
)
from hesskern.version import __version__ as __version__

__all__ = [
    "EKFAC",
    "AutogradHessian",
    "CausalLM",
    "CorrectedOperator",
    "Correspondence",
    "CurvatureOperator",
    "DecouplingError",
    "DiagonalKroneckerOperator",
    "EigenResult",
    "FactorAccumulator",
    "Factors",
    "GaussNewton",
    "GradientClusters",
    "ImageClassification",
    "Influence",
    "InputAutocorrelation",
    "InputCovariances",
    "KroneckerOperator",
    "LargeLayerFactors",
    "LayerFactors",
    "LayerHessian",
    "LayerHessians",
    "LayerInputs",
    "LayerPlan",
    "MaskedLM",
    "NetworkOperator",
    "OverlapPrediction",
    "Plan",
    "PositionMeanHessian",
    "RankError",
    "RowSpaceOverlap",
    "Seq2SeqLM",
    "SequenceClassification",
    "SpectralDensity",
    "StackedGaussNewton",
    "SumOperator",
    "TokenClassification",
    "TraceEstimate",
    "add_factors",
    "build_info",
    "centre_inputs",
    "classify_peak",
    "closed_form_output_hessian",
    "decoupling_error",
    "eigenvalue_corrected",
    "eigenvector_correspondence",
    "eigsh",
    "ekfac",
    "functional_share",
    "gradient_clusters",
    "hutchpp_trace",
    "influence",
    "input_autocorrelation",
    "input_covariances",
    "kronecker_factors",
    "layer_hessians",
    "load_ekfac",
    "load_factors",
    "load_influence",
    "load_input_covariances",
    "nearest_kronecker",
    "ops",
    "optim",
    "pacbayes",
    "plan",
    "position_mean_hessian",
    "predict_overlap",
    "rank_one_ratio",
    "row_space_overlap",
    "singular_values",
    "spectral_density",
    "subspace_overlap",
    "weight_product",
]
