"""Scores of the samples of all ranks of a group, in one order of columns on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hesskern.attribution.kept_scores import Kept
from hesskern.attribution.queries import LayerQueries
from hesskern.parallel.ranks import RankError, Ranks
from hesskern.passes.sample_numbers import Numbers

__all__ = ["agree_on_queries", "numbers_of", "scores_of_all"]

# How far the lengths of the same gradient may be apart on processors of several kinds.
_NEAR = 1e-3


def agree_on_queries(ranks: Ranks, prepared: Mapping[str, LayerQueries], count: int) -> None:
    """Makes sure that all ranks have the same queries, in the same order.

    Compared are the lengths of what was made of their gradients, which rounding changes little.

    Raises:
        RankError: on every rank, where one has others.
    """
    ranks.agree("the queries", {"number": count, "layers": list(prepared)})
    lengths = torch.stack([_lengths(queries) for queries in prepared.values()], 1)
    first, *others = ranks.gather_tensors(lengths.cpu())
    for rank, other in enumerate(others, 1):
        far = (other - first).abs() > _NEAR * torch.maximum(other, first)
        # NaN is near nothing.
        far |= first.isnan() != other.isnan()
        if far.any():
            query = int(far.any(1).nonzero()[0])
            raise RankError(
                f"queries: all ranks must have the same, in one order; query {query} of rank "
                f"{rank} is another than that of rank 0"
            )


def _lengths(queries: LayerQueries) -> Tensor:
    """[q] float64."""
    if queries.matrices is not None:
        return queries.matrices.double().flatten(1).norm(dim=1)
    assert queries.left is not None
    assert queries.right is not None
    left, right = (side.double().transpose(0, 1) for side in (queries.left, queries.right))
    return (left @ right.mT).flatten(1).norm(dim=1)


def numbers_of(own: Numbers, first: int, count: int, stay: Tensor | None) -> tuple[Tensor, bool]:
    """Numbers [N] of a piece's samples, and whether they are their own.

    Args:
        own: what the data has.
        first, count: of the piece in this rank's part.
        stay: [samples of this rank] zero where one does not count; None: all do.
    """
    known = own.known and len(own) == count
    numbers = torch.arange(first, first + count)
    if known:
        numbers = torch.as_tensor(own.values)
    if stay is not None:
        numbers = numbers.masked_fill(stay[first : first + count].cpu() == 0, -1)
    return numbers, known


def scores_of_all(
    ranks: Ranks, kept: Kept, prepared: Mapping[str, LayerQueries], per_token: bool
) -> tuple[Tensor | dict[str, Tensor], Tensor | None, int, str]:
    """The scores of all ranks' samples, the same bits on every rank.

    Columns are in the order of the samples' numbers where these are known and differ; else those
    of the first rank come first.

    Args:
        ranks: all of which call this.
        kept: of this rank's samples.
        prepared: the queries by layer, the same on every rank.
        per_token: whether scores have an axis of positions.

    Returns:
        scores, indices, how many samples there are, and what the columns are ordered by.
    """
    empty = torch.empty(0, dtype=torch.int64)
    numbers = ranks.gather_tensors(torch.cat([empty, *kept.numbers]))
    flat = torch.cat(numbers)
    counting = (flat >= 0).nonzero()[:, 0]
    own = flat[counting]
    by_number = all(ranks.gather("samples with numbers", kept.known)) and len(own.unique()) == len(
        own
    )
    if by_number:
        counting = counting[own.argsort()]
    columns = torch.full_like(flat, -1)
    columns[counting] = torch.arange(len(counting))
    begin = sum(len(before) for before in numbers[: ranks.rank])
    order = "sample numbers" if by_number else "ranks"
    if kept.best:
        mine = columns[begin : begin + len(numbers[ranks.rank])]
        scores, indices = _best(ranks, kept, mine, next(iter(prepared.values())), len(counting))
        return scores, indices, len(counting), order
    first, *_ = prepared.values()
    named = prepared if kept.per_layer else {"": first}
    found, _ = kept.finished() if kept.total else ({}, None)
    if isinstance(found, Tensor):
        found = {"": found}
    longest = 0
    if per_token:
        longest = max(
            ranks.gather(
                "positions of samples", max((s.shape[2] for s in found.values()), default=0)
            )
        )
    gathered = {}
    for name, queries in named.items():
        scores = queries.zeros(0, longest) if per_token else queries.zeros(0)
        if name in found:
            scores = found[name]
        if per_token:
            scores = nn.functional.pad(scores, (0, longest - scores.shape[2]))
        parts = ranks.gather_tensors(scores.transpose(0, 1).contiguous())
        gathered[name] = torch.cat(parts)[counting.to(scores.device)].transpose(0, 1).contiguous()
    return (gathered if kept.per_layer else gathered[""]), None, len(counting), order


def _best(
    ranks: Ranks, kept: Kept, columns: Tensor, queries: LayerQueries, total: int
) -> tuple[Tensor, Tensor]:
    """[q, k] the largest scores of all ranks, and their columns."""
    found = kept.finished() if kept.total else None
    values = queries.zeros(0) if found is None else found[0]
    assert isinstance(values, Tensor)
    places = values.new_empty(values.shape, dtype=torch.int64)
    if found is not None:
        assert found[1] is not None
        places = columns.to(values.device)[found[1]]
    both = [
        torch.cat(ranks.gather_tensors(t.transpose(0, 1).contiguous())).transpose(0, 1)
        for t in (values, places)
    ]
    values, places = both
    values = values.masked_fill(places < 0, -torch.inf)
    before = places.argsort(dim=1, stable=True)
    values, places = values.gather(1, before), places.gather(1, before)
    values, order = values.sort(dim=1, descending=True, stable=True)
    assert kept.best
    wanted = min(kept.best, total)
    return values[:, :wanted].contiguous(), places.gather(1, order)[:, :wanted].contiguous()
