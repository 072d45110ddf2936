"""Every item that ``hesskern reproduce`` knows, the most telling first."""

from __future__ import annotations

from hesskern.apps.reproduce import (
    architectures,
    between,
    beyond,
    factors,
    overlaps,
    positions,
    vectors,
)
from hesskern.apps.reproduce.items import Item
from hesskern.apps.reproduce.lab import Network

__all__ = ["ITEMS"]

_F200 = Network("mnist", "f200x2")
_F600X2 = Network("mnist", "f600x2")
_F600X4 = Network("mnist", "f600x4")
_LENET5 = Network("cifar10", "lenet5")


def _with_norm(network: Network) -> Network:
    return Network(network.data, f"{network.model}-bn")


_ALL = (
    Item(
        "overlap-f200x2",
        "Exact Hessian and Kronecker form, F-200² on MNIST",
        "Overlap of the top-k eigenspaces of H and of E[M] ⊗ E[x xᵀ]: near 1 up to k = c − 1, then "
        "falling. Eigenvalues of both, side by side.",
        (_F200,),
        overlaps.hessian_and_kronecker,
        {"quick": 4, "paper": 150},
    ),
    Item(
        "autocorrelation",
        "Input auto-correlation",
        "How nearly rank one E[x xᵀ] is: its first eigenvector lies along the mean input, with an "
        "eigenvalue many times the second. Batch norm takes the mean away and this with it.",
        (_F200, _with_norm(_F200), _LENET5, _with_norm(_LENET5)),
        factors.autocorrelation,
        {"quick": 5, "paper": 500},
    ),
    Item(
        "autocorrelation-f600",
        "Input auto-correlation of wider networks",
        "The same for 600 units in a layer, two and four layers deep.",
        (_F600X2, _F600X4, _with_norm(_F600X2)),
        factors.autocorrelation,
        {"quick": 15, "paper": 1300},
    ),
    Item(
        "models-f200x2",
        "Differently seeded models, F-200² on MNIST",
        "Overlap of the leading eigenspaces of one layer in two models. Where the first input "
        "direction dominates it grows linearly and peaks at k = m.",
        (_F200,),
        between.between_models,
        {"quick": 2, "paper": 60},
    ),
    Item(
        "models-lenet5",
        "Differently seeded models, LeNet5 on CIFAR-10",
        "The same for LeNet5: peaks at k = m in the convolutions and fc1.",
        (_LENET5,),
        between.between_models,
        {"quick": 8, "paper": 300},
    ),
    Item(
        "full-f200x2",
        "Full Hessian, F-200² on MNIST",
        "Leading eigenspace of the Gauss-Newton matrix over all layers, and of its approximation "
        "from the stacked output Hessian and the mean inputs.",
        (_F200,),
        overlaps.full_hessian,
        {"quick": 8, "paper": 200},
    ),
    Item(
        "rank-one",
        "Eigenvectors as matrices",
        "Largest singular value over Frobenius norm of H's eigenvectors, folded to the weight's "
        "shape: near 1 for the first c − 1.",
        (_LENET5, _F200),
        vectors.rank_one,
        {"quick": 3, "paper": 60},
    ),
    Item(
        "correspondence",
        "Eigenvectors along the factors' eigenvectors",
        "A dark first row on the input side: eigenvectors of H multiply the mean input. A dark "
        "diagonal on the output side: they follow E[M]'s eigenvectors one by one.",
        (_F200, _LENET5),
        vectors.correspondence,
        {"quick": 1, "paper": 20},
    ),
    Item(
        "output-spectra",
        "Spectra of E[M]",
        "At initialization, after training and with random labels c − 1 eigenvalues of the output "
        "Hessian stand above the rest.",
        (_F200, Network("mnist", "f200x2", random_labels=True, limit=5000)),
        factors.output_spectra,
        {"quick": 4, "paper": 150},
    ),
    Item(
        "models-bn",
        "Differently seeded models with batch norm",
        "With batch norm E[x] is zero, and with it the shared direction: no peak.",
        (_with_norm(_F200), _with_norm(_LENET5)),
        between.between_models,
        {"quick": 12, "paper": 400},
    ),
    Item(
        "overlap-lenet5",
        "Exact Hessian and Kronecker form, LeNet5 on CIFAR-10",
        "Overlap of the top-k eigenspaces of H and of its Kronecker form, convolutions included.",
        (_LENET5,),
        overlaps.hessian_and_kronecker,
        {"quick": 5, "paper": 200},
    ),
    Item(
        "overlap-f200x4",
        "Exact Hessian and Kronecker form, F-200⁴ on MNIST",
        "The same for a deeper network.",
        (Network("mnist", "f200x4"),),
        overlaps.hessian_and_kronecker,
        {"quick": 8, "paper": 300},
    ),
    Item(
        "row-space",
        "What the weights behind a layer say about E[M]",
        "Overlap of the row space of S = W(L) ... W(p+1), without the direction 1ᵀS, with the top "
        "c − 1 eigenvectors of E[M].",
        (
            Network("mnist", "lenet5"),
            Network("mnist", "f1500x3", samples=10_000),
            _LENET5,
            Network("cifar10", "f1500x3"),
        ),
        factors.row_space,
        {"quick": 25, "paper": 3000},
    ),
    Item(
        "models-widths",
        "Differently seeded models, width of fc1 in LeNet5",
        "The peak of the overlap between models moves with the layer's outputs m.",
        tuple(
            Network("cifar10", "lenet5" if m == 120 else f"lenet5-w{m}")
            for m in (80, 100, 120, 150)
        ),
        between.width_variants,
        {"quick": 20, "paper": 1000},
    ),
    Item(
        "forms",
        "Kronecker forms beside each other",
        "The paper never says how far H is from E[M] ⊗ E[x xᵀ]. Here it stands beside the nearest "
        "single Kronecker product and the eigenvalue-corrected forms (EKFAC).",
        (_F200,),
        beyond.forms,
        {"quick": 6, "paper": 30},
    ),
    Item(
        "positions",
        "Convolutions: gradients averaged over positions",
        "A convolution's Kronecker form takes two steps: M is averaged over positions, then inputs "
        "and outputs are decoupled between samples. Here is what each of them costs.",
        (_LENET5,),
        positions.position_means,
        {"quick": 12, "paper": 300},
    ),
    Item(
        "normalization",
        "The mean input, and what takes it away",
        "Plain, with centred activations, with batch norm, with layer norm, with tanh and with "
        "GELU: the rank-one part of E[x xᵀ], the Kronecker form's overlap with H, and what two "
        "models share.",
        (
            _F200,
            _with_norm(_F200),
            *(Network("mnist", f"f200x2-{kind}") for kind in ("ln", "tanh", "gelu")),
        ),
        beyond.normalization,
        {"quick": 12, "paper": 500},
    ),
    Item(
        "trajectory",
        "Over the epochs of training",
        "Overlap of H and its Kronecker form, their distance, and the inputs' first direction, "
        "from initialization on.",
        (_F200,),
        beyond.trajectory,
        {"quick": 6, "paper": 60},
    ),
    Item(
        "random-data",
        "Random two-layer networks",
        "Gaussian data and weights: as the width grows, E[M]'s top c − 1 eigenvectors turn into "
        "the row space of S and the rest of its spectrum falls away.",
        (),
        beyond.random_data,
        {"quick": 1, "paper": 10},
    ),
    Item(
        "functional-term",
        "What the Gauss-Newton matrix leaves out",
        "The functional term is zero within the layers of piecewise linear networks. Its share "
        "with tanh and GELU, and between layers; top eigenspaces and spectral densities of both "
        "matrices.",
        (
            Network("mnist", "f64x2", samples=2000),
            Network("mnist", "f64x2-tanh", samples=2000),
            Network("mnist", "f64x2-gelu", samples=2000),
        ),
        beyond.functional_terms,
        {"quick": 8, "paper": 200},
    ),
    Item(
        "clusters",
        "Clusters of gradients",
        "Gradients of the logits in a layer's output: how much of their variance the logit and the "
        "sample's class explain.",
        (_F200,),
        beyond.clusters,
        {"quick": 2, "paper": 10},
    ),
    Item(
        "architectures",
        "VGG11 and ResNet18, every layer",
        "The same numbers for deep convolutional networks, from a subset of CIFAR-10, within the "
        "memory budget of --memory.",
        (
            Network("cifar10", "vgg11-w16", samples=256),
            Network("cifar10", "resnet18-w8-bn", samples=256),
        ),
        architectures.architectures,
        {"quick": 5, "paper": 3000},
    ),
)

ITEMS = {item.name: item for item in _ALL}
"""By name."""
