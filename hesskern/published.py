"""Figures published in arXiv 2010.04261 that a run can be put beside; those from plots are ±.01."""

from __future__ import annotations

from typing import Any

__all__ = ["figures_for"]

SOURCE = "Wu, Zhu, Wu, Wang, Ge: Dissecting Hessian, arXiv 2010.04261"

_F200X2_MNIST: dict[str, Any] = {
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


def figures_for(data: str, model: str) -> dict[str, Any] | None:
    """The published figures for a data set and a network's name, or None."""
    if data == "mnist" and model.lower() in ("f200x2", "f200^2"):
        return _F200X2_MNIST
    return None
