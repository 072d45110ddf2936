"""Curvature of neural-network layers: Kronecker factors, exact layer-wise Hessians, eigenspaces."""

from hesskern import ops

__all__ = ["ops"]
