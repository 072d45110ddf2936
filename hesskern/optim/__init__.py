"""Training with curvature: preconditioners that stand before any torch optimizer."""

from hesskern.optim.kfac import KFAC

__all__ = ["KFAC"]
