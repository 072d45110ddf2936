"""Figures published in arXiv 2010.04261 that a run can be put beside; those from plots are ±.01."""

from __future__ import annotations

from hesskern.apps.analyze.result import PublishedFigures

__all__ = [
    "AUTOCORRELATION",
    "AUTOCORRELATION_DEEP",
    "BETWEEN",
    "BETWEEN_BATCH_NORM",
    "FULL_OVERLAP",
    "LENET5_WIDTHS",
    "RANK_ONE",
    "ROW_SPACE",
    "SOURCE",
    "figures_for",
]

SOURCE = "Wu, Zhu, Wu, Wang, Ge: Dissecting Hessian, arXiv 2010.04261"

_F200X2_MNIST: PublishedFigures = {
    "network": "F-200² on MNIST",
    "source": SOURCE,
    "training": (
        "1000 epochs of SGD, learning rate .01, batch 128, no momentum, no weight decay; "
        "means over 5 seeds"
    ),
    "precision": 0.01,
    # Of one net, read off a plot; keys are layers.
    "eigenvalues": {
        "fc1": {
            "exact": [2.04, 1.70, 1.27, 1.15, 0.74, 0.63, 0.39, 0.33, 0.25, 0.21],
            "kronecker": [1.86, 1.59, 1.15, 1.06, 0.68, 0.57, 0.36, 0.28, 0.22, 0.16],
        }
    },
    # Overlap of the top-k spaces of H and of its Kronecker form.
    "overlap": {
        "k": [1, 9, 10, 20, 49],
        "layers": {
            "fc1": [0.97, 0.94, 0.93, 0.86, 0.73],
            "fc2": [0.94, 0.93, 0.88, 0.63, 0.59],
            "fc3": [0.89, 0.89, 0.83, 0.64, 0.70],
        },
    },
    # Between differently seeded models; fc3's curve is flat from the start.
    "between": {
        "fc1": {"k": 150, "overlap": 0.30},
        "fc2": {"k": 400, "overlap": 0.04},
        "fc3": {"k": 1, "overlap": 0.38},
    },
    # Mean, min, max over the layers behind the first.
    "autocorrelation": {"mean_alignment": 1.000, "eigenvalue_ratio": [12.29, 9.65, 16.16]},
}


FULL_OVERLAP: dict[str, dict[str, list[float]]] = {
    "f200x2": {"k": [1, 9, 10, 20, 49], "overlap": [0.96, 0.94, 0.92, 0.83, 0.74]},
    "f600x4": {"k": [1, 9, 50], "overlap": [0.97, 0.84, 0.69]},
}
"""On MNIST: leading spaces of the full Hessian and of its approximation, by network."""

BETWEEN: dict[tuple[str, str], dict[str, tuple[int, float]]] = {
    ("mnist", "f200x2"): {"fc1": (150, 0.30), "fc2": (400, 0.04), "fc3": (9, 0.38)},
    ("cifar10", "lenet5"): {
        "conv1": (6, 0.71),
        "conv2": (16, 0.34),
        "fc1": (120, 0.59),
        "fc2": (150, 0.18),
        "fc3": (9, 0.5),
    },
}
"""Between differently seeded models, by (data, model) and layer: k and the overlap there. Curves of
last layers are flat; k = 9 stands for all."""

LENET5_WIDTHS: dict[int, float] = {80: 0.67, 100: 0.60, 120: 0.59, 150: 0.485}
"""fc1 of LeNet5 on CIFAR-10 with so many outputs: overlap between models at its peak."""

BETWEEN_BATCH_NORM = 0.025
"""Between models with batch norm: the overlap stays about here, without a peak."""

RANK_ONE: dict[str, tuple[int, float, float]] = {
    "conv1": (6, 0.94, 0.99),
    "conv2": (14, 0.93, 0.95),
    "fc1": (9, 0.81, 0.88),
    "fc2": (9, 0.72, 0.76),
    "fc3": (9, 0.80, 0.87),
}
"""LeNet5 on CIFAR-10, by layer: the first so many eigenvectors have ratios in [low, high]."""

AUTOCORRELATION: dict[
    tuple[str, str], dict[str, tuple[float, float, tuple[float, float] | None]]
] = {
    ("mnist", "f200x2"): {"fc": (1.000, 12.29, (9.65, 16.16))},
    ("mnist", "f600x2"): {"fc": (0.999, 12.00, (11.42, 13.00))},
    ("mnist", "f600x4"): {"fc": (1.000, 17.81, (7.33, 28.00))},
    ("mnist", "f600x8"): {"fc": (0.991, 6.63, (2.28, 11.15))},
    ("mnist", "f200x2-bn"): {"fc": (0.062, 1.16, None)},
    ("mnist", "f600x2-bn"): {"fc": (0.026, 1.13, None)},
    ("cifar10", "f600x2"): {"fc": (0.999, 9.24, (4.74, 13.74))},
    ("cifar10", "f1500x3"): {"fc": (0.999, 13.27, None)},
    ("cifar10", "lenet5"): {
        "fc": (0.998, 7.21, (5.88, 9.02)),
        "conv": (0.999, 15.87, (11.15, 27.20)),
    },
    ("cifar10", "lenet5-bn"): {"fc": (0.210, 1.54, None)},
}
"""By (data, model) and kind of layer: (v_1^T E[x])² / ‖E[x]‖² and lambda_1 / lambda_2, means over
the layers of that kind behind the first, and the ratio's range."""

AUTOCORRELATION_DEEP: dict[tuple[str, str], tuple[str, str]] = {
    ("cifar10", "vgg11"): ("0.994 to 0.998", "5.2 to 5.8"),
    ("cifar10", "resnet18"): ("0.981 to 0.987", "3.79 to 4.16"),
}
"""Both numbers by (data, family): convolutions, over networks of several widths."""

ROW_SPACE: dict[tuple[str, str], dict[str, float]] = {
    ("mnist", "f1500x3"): {"fc1": 0.602, "fc2": 0.967, "fc3": 0.982},
    ("mnist", "lenet5"): {"fc1": 0.890, "fc2": 0.931, "fc3": 0.999},
    ("cifar10", "f1500x3"): {"fc1": 0.880, "fc2": 0.943, "fc3": 0.993},
    ("cifar10", "lenet5"): {"fc1": 0.951, "fc2": 0.972, "fc3": 0.999},
}
"""By (data, model) and layer: overlap of the row space of S, without the direction 1^T S, with the
top c - 1 eigenvectors of E[M]."""


def figures_for(data: str, model: str) -> PublishedFigures | None:
    """The published figures for a data set and a network's name, or None."""
    if data == "mnist" and model.lower() in ("f200x2", "f200^2"):
        return _F200X2_MNIST
    return None
