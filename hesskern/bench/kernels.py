from __future__ import annotations
from hesskern.bench.contenders import Problem
__all__ = ["problems"]
def problems() -> list[Problem]:
    return []
