"""Names of layers as users give them: exact ones, and patterns as shells know them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["given_names", "is_pattern", "matching"]

_NEAREST = 3


def given_names(layers: Any) -> list[str]:
    """``layers`` as a list of names and patterns.

    Raises:
        TypeError: it is neither a string nor an iterable of strings.
        ValueError: it is empty.
    """
    if isinstance(layers, str):
        return [layers]
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be names of modules or None, got {type(layers).__name__}")
    names = list(layers)
    if not names:
        raise ValueError("layers is empty; name at least one layer or pass None for all")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers must be names of modules, got a {type(name).__name__} in it")
    return names


def is_pattern(name: str, known: Collection[str]) -> bool:
    """Whether a name is a pattern: a layer's own name never is."""
    return name not in known and any(sign in name for sign in "*?[")


def matching(pattern: str, known: Collection[str], others: Collection[str]) -> list[str]:
    """The layers that a pattern matches, in their order: * any text with dots, ?, [abc].

    Args:
        pattern: as in :mod:`fnmatch`, upper and lower case told apart.
        known: names of the layers that can be had.
        others: names of modules that have parameters and no layer.

    Raises:
        ValueError: it matches none of them; names the nearest.
    """
    found = [name for name in known if fnmatchcase(name, pattern)]
    if found:
        return found
    beside = [name for name in others if name and fnmatchcase(name, pattern)]
    if beside:
        text = ", ".join(map(repr, beside[:_NEAREST]))
        raise ValueError(
            f"layers: the pattern {pattern!r} matches no supported layer, but {text}"
            + (" and more" if len(beside) > _NEAREST else "")
            + " alone, which have none"
        )
    raise ValueError(
        f"layers: the pattern {pattern!r} matches no layer; the nearest names are "
        f"{', '.join(_nearest(pattern, known)) or 'none'}"
    )


def _nearest(pattern: str, known: Collection[str]) -> list[str]:
    """The names most like a pattern, of each kind one: numbers of blocks do not tell them apart."""
    plain = pattern.replace("*", "")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, plain, name, autojunk=False).ratio()

    return sorted(known, key=likeness, reverse=True)[:_NEAREST]
