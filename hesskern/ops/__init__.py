"""Documented faces of ``torch.ops.hesskern``: the compiled operators, as users type them."""

from hesskern.ops import faces
from hesskern.ops.faces import *  # noqa: F403

__all__ = faces.__all__
